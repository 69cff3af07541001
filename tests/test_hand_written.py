"""Attention written by hand is PyTorch's own."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatminima.derivatives.attention import multi_head_attention, scaled_dot_product_attention
from flatminima.derivatives.gradients import nodes
from flatminima.derivatives.hand_written import PIECES
from flatminima.derivatives.substitution import Substitution

REPLACING = set(PIECES) - {"channels_last"}


def tensor(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def derivatives(function, leaves, mode, order):
    """The output, the gradient, and so on: of each derivative a product with fixed vectors."""
    with mode, sdpa_kernel([SDPBackend.MATH]):
        out = function()
    found = [out]
    value = out.tanh().square().sum()
    for number in range(order):
        gradient = torch.autograd.grad(value, leaves, create_graph=number + 1 < order)
        found += gradient
        value = sum((g * tensor(*g.shape, seed=7).detach()).sum() for g in gradient)
    return found


def assert_alike(function, leaves, orders=(2, 3, 4)):
    for order in orders:
        expected = derivatives(function, leaves, contextlib.nullcontext(), order)
        found = derivatives(function, leaves, Substitution(REPLACING), order)
        for number, (a, b) in enumerate(zip(found, expected, strict=True)):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, msg=f"{order}: {number}")


def each_and_all(leaves):
    return [leaves, *([leaf] for leaf in leaves)]


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "booleans": {"attn_mask": torch.arange(24).reshape(4, 6) % 5 > 1},
    "a row masked as a whole": {"attn_mask": torch.arange(4).unsqueeze(1).expand(4, 6) > 0},
    "added": {"attn_mask": torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)},
    "for each head": {"attn_mask": torch.arange(72).reshape(3, 4, 6) % 7 > 1},
    "scale": {"scale": 0.3},
}


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("lead", [(2, 3), (3,)])
def test_attention(options, lead):
    q, k, v = tensor(*lead, 4, 5), tensor(*lead, 6, 5, seed=1), tensor(*lead, 6, 7, seed=2)
    assert scaled_dot_product_attention(q, k, v, **options) is not None

    def function():
        return F.scaled_dot_product_attention(q, k, v, **options)

    for leaves in each_and_all([q, k, v]):
        assert_alike(function, leaves, orders=(2, 3))


def test_attention_of_a_tensor_with_itself():
    q = tensor(2, 4, 5)
    assert_alike(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True), [q])


# ------------------------------------------------------------------------ nn.MultiheadAttention


def refuse(*args, **kwargs):
    raise AssertionError("the module's own forward was called")


def booleans(*shape, every):
    """Never a whole row."""
    return torch.arange(math.prod(shape)).reshape(shape) % every == 1


OTHERS = {
    "itself": lambda x, y: (x, x, x),
    "another": lambda x, y: (x, y, y),
    "two others": lambda x, y: (x, y, y * 2),
    "keys alone": lambda x, y: (x, x, x * 2),
}
# For 3 sequences of 4, or 5, places, and 2 heads.
MODULE_MASKS = {
    "none": lambda s: {},
    "booleans": lambda s: {"attn_mask": booleans(4, s, every=3)},
    "numbers": lambda s: {"attn_mask": tensor(4, s, seed=4).detach()},
    "for each head": lambda s: {"attn_mask": booleans(6, 4, s, every=3)},
    "padding": lambda s: {"key_padding_mask": booleans(3, s, every=4)},
    "padding in numbers": lambda s: {"key_padding_mask": tensor(3, s, seed=4).detach()},
    "both": lambda s: {
        "attn_mask": booleans(4, s, every=3),
        "key_padding_mask": booleans(3, s, every=7),
    },
    "causal": lambda s: {
        "attn_mask": torch.ones(4, s, dtype=torch.bool).triu(1),
        "is_causal": True,
    },
    "causal and padding": lambda s: {
        "attn_mask": torch.ones(4, s, dtype=torch.bool).triu(1),
        "key_padding_mask": booleans(3, s, every=4),
        "is_causal": True,
    },
}


@pytest.mark.parametrize("options", MODULE_MASKS.values(), ids=MODULE_MASKS)
@pytest.mark.parametrize("others", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_multi_head_attention(options, others, batch_first, bias):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=batch_first, bias=bias).double()
    inputs = others(tensor(3, 4, 8), tensor(3, 5, 8, seed=1))
    length = inputs[1].shape[1]
    if not batch_first:
        same = {id(t): t.transpose(0, 1) for t in inputs}
        inputs = [same[id(t)] for t in inputs]
    leaves = list(module.parameters())
    calls = module.forward, multi_head_attention(module, refuse)
    outs = [call(*inputs, need_weights=False, **options(length)) for call in calls]
    assert outs[0][0].stride() == outs[1][0].stride()
    assert outs[1][1] is None
    expected, found = (
        derivatives(lambda c=c: c(*inputs, need_weights=False, **options(length))[0], leaves, m, 2)
        for c, m in zip(calls, (contextlib.nullcontext(), Substitution(REPLACING)), strict=True)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_multi_head_attention_in_a_product_is_written_by_hand():
    """In the module's own forward nothing would be replaced."""
    module = nn.MultiheadAttention(8, 2)
    x = torch.randn(4, 3, 8)
    names = []
    for forward in (module.forward, multi_head_attention(module, module.forward)):
        with Substitution(REPLACING):
            out, _ = forward(x, x, x, need_weights=False)
        names.append({node.name() for node in nodes(out)})
    assert "_AttentionBackward" in names[1] - names[0]


MASK = torch.zeros(4, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ({}, {"need_weights": True}),
        ({}, {"need_weights": False, "attn_mask": MASK[:3]}),
        ({}, {"need_weights": False, "attn_mask": MASK.int()}),
        ({}, {"need_weights": False, "key_padding_mask": MASK[:2]}),
        ({}, {"need_weights": False, "is_causal": True}),
        (
            {},
            {"need_weights": False, "attn_mask": MASK, "key_padding_mask": torch.zeros(3, 4)},
        ),
        ({}, {"need_weights": False, "nonsense": 1}),
        ({"add_bias_kv": True}, {"need_weights": False}),
        ({"add_zero_attn": True}, {"need_weights": False}),
        ({"kdim": 8, "vdim": 7}, {"need_weights": False}),
        ({"dropout": 0.5}, {"need_weights": False}),
    ],
)
def test_what_is_left_to_the_modules_own_attention(module, call):
    attention = nn.MultiheadAttention(8, 2, **module)
    x = torch.ones(4, 3, 8)
    own = multi_head_attention(attention, lambda *args, **kwargs: ("own", args, kwargs))
    assert own(x, x, x, **call) == ("own", (x, x, x), call)


class Derived(nn.MultiheadAttention):
    pass


def test_input_that_is_left_to_the_modules_own_attention():
    plain = nn.MultiheadAttention(8, 2)

    def left(*inputs, attention=plain):
        return multi_head_attention(attention, lambda *args, **kwargs: "own")(
            *inputs, need_weights=False
        )

    x = torch.ones(4, 3, 8)
    assert left(x, x, x, attention=Derived(8, 2)) == "own"
    assert left(x[0], x[0], x[0]) == "own"
    assert left(x[..., :6], x, x) == "own"
    assert left(x, x[:, :2], x[:, :2]) == "own"
    assert left(x, x, x[:3]) == "own"
    assert left(x.double(), x.double(), x.double()) == "own"
    assert left(x[:0], x[:0], x[:0]) == "own"
    with torch.autocast("cpu", torch.bfloat16):
        assert left(x, x, x) == "own"
    assert left(x, x, x)[0].shape == x.shape


def test_multi_head_attention_gives_pytorchs_own_messages():
    module = nn.MultiheadAttention(8, 2)
    x, forward = torch.ones(3, 4, 8), multi_head_attention(module, module.forward)
    with Substitution(REPLACING), pytest.raises(AssertionError, match="embedding dimension"):
        forward(torch.ones(3, 4, 6), x, x, need_weights=False)


def test_gradgradcheck():
    def function(q, k, v):
        return scaled_dot_product_attention(q, k, v)

    inputs = (tensor(2, 2, 3), tensor(2, 4, 3, seed=1), tensor(2, 4, 2, seed=2))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: scaled_dot_product_attention(x, x, x),
        lambda x: scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.5),
        lambda x: scaled_dot_product_attention(x[None], x[None], x[None], enable_gqa=True),
        lambda x: scaled_dot_product_attention(x[None], x[None], x[None, :2]),
        lambda x: scaled_dot_product_attention(
            x[None], x[None], x[None], attn_mask=torch.zeros(3, 3, requires_grad=True)
        ),
        lambda x: scaled_dot_product_attention(
            x[None], x[None], x[None], attn_mask=torch.zeros(2, 3, 3)
        ),
        lambda x: scaled_dot_product_attention(
            x[None], x[None], x[None], attn_mask=torch.zeros(3, 2)
        ),
    ],
)
def test_what_is_left_to_pytorch(call):
    assert call(torch.ones(3, 4)) is None


def test_transforms_and_autocast_are_left_to_pytorch():
    x = tensor(3, 4).detach()

    def attended(x):
        return F.scaled_dot_product_attention(x, x, x)

    def hessian():
        function = torch.func.jacrev(lambda x: attended(x[None]).exp().sum())
        return torch.func.jacrev(function)(x)

    with Substitution(REPLACING):
        found = hessian()
        mapped = torch.func.vmap(attended)(x[None, None])
    torch.testing.assert_close(found, hessian())
    torch.testing.assert_close(mapped[0], attended(x[None]))
    with torch.autocast("cpu", torch.bfloat16):
        assert scaled_dot_product_attention(*[x.float()[None]] * 3) is None
