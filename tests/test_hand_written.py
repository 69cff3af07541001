"""Linear layers, ReLU, layer norm and attention written by hand are PyTorch's own."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatminima.derivatives.attention import multi_head_attention, scaled_dot_product_attention
from flatminima.derivatives.batch_norm import relu
from flatminima.derivatives.linear_layers import layer_norm, linear
from flatminima.derivatives.substitution import CheapSecondDerivatives


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
        found = derivatives(function, leaves, CheapSecondDerivatives(), order)
        for number, (a, b) in enumerate(zip(found, expected, strict=True)):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, msg=f"{order}: {number}")


def each_and_all(leaves):
    return [leaves, *([leaf] for leaf in leaves)]


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4), (2, 1, 3, 4)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_layers(shape, bias):
    x, weight, b = tensor(*shape), tensor(6, 4, seed=1), tensor(6, seed=2)
    arguments = (x, weight, b) if bias else (x, weight)
    assert linear(*arguments) is not None
    for leaves in each_and_all(list(arguments)):
        assert_alike(lambda: F.linear(*arguments), leaves)
    assert_alike(lambda: F.linear(x.transpose(0, -2), *arguments[1:]), list(arguments))


def test_relu_in_all_its_forms():
    x = tensor(4, 5)
    assert relu(x) is not None
    for function in (F.relu, torch.relu, method, nn.ReLU()):
        assert_alike(lambda f=function: f(x.square() - 0.5), [x])
        with CheapSecondDerivatives():
            assert function(x).grad_fn.name() == "_ReluBackward"


def method(x):
    return x.relu()


def test_relu_has_no_derivative_by_its_mask():
    """What PyTorch fills with zeros and adds up is not there at all."""
    x = tensor(3)
    with CheapSecondDerivatives():
        (gradient,) = torch.autograd.grad(F.relu(x).square().sum(), x, create_graph=True)
    assert torch.equal(torch.autograd.grad(gradient.sum(), x)[0], 2.0 * (x > 0))


@pytest.mark.parametrize("sizes", [(4,), (3, 4)])
@pytest.mark.parametrize("affine", ["both", "weight", "neither"])
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_layer_norm(sizes, affine, eps):
    x, weight, bias = tensor(5, 3, 4), tensor(*sizes, seed=1), tensor(*sizes, seed=2)
    given = {"both": [weight, bias], "weight": [weight], "neither": []}[affine]
    assert layer_norm(x, sizes, *given, eps=eps) is not None
    for leaves in each_and_all([x, *given]):
        assert_alike(lambda: F.layer_norm(x, sizes, *given, eps=eps), leaves)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert_alike(lambda: F.layer_norm(turned, sizes, *given, eps=eps), [x, *given])


def test_layer_norm_with_a_bias_alone():
    """PyTorch's own fails at the derivatives of this one."""
    x, bias = tensor(5, 4), tensor(4, seed=2)
    expected = derivatives(lambda: F.layer_norm(x, (4,)) + bias, [x], contextlib.nullcontext(), 2)
    found = derivatives(lambda: F.layer_norm(x, (4,), None, bias), [x], CheapSecondDerivatives(), 2)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_layer_norm_far_from_zero_is_as_exact_in_float32():
    x = (tensor(8, 64).detach() + 100).float().requires_grad_()
    weight = tensor(64, seed=1).detach().float().requires_grad_()

    def product(x, weight, mode):
        with mode:
            value = F.layer_norm(x, (64,), weight).sin().sum()
        gradient = torch.autograd.grad(value, (x, weight), create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in gradient), (x, weight))

    exact = product(x.double(), weight.double(), contextlib.nullcontext())
    own = product(x, weight, contextlib.nullcontext())
    found = product(x, weight, CheapSecondDerivatives())
    for a, b, c in zip(found, own, exact, strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm() + 1e-6 * c.norm()


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


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_multi_head_attention(weights, other, bias):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=True, bias=bias).double()
    x, y = tensor(3, 4, 8), tensor(3, 5, 8, seed=1)

    def function():
        return module(x, *([y, y] if other else [x, x]), need_weights=weights)[0]

    leaves = [x, *([y] if other else []), *module.parameters()]
    assert_alike(function, leaves, orders=(2, 3))


def test_multi_head_attention_gives_pytorchs_own_messages():
    module = nn.MultiheadAttention(8, 2)
    x = torch.ones(3, 4, 8)
    with CheapSecondDerivatives(), pytest.raises(AssertionError, match="embedding dimension"):
        module(torch.ones(3, 4, 6), x, x)
    assert multi_head_attention.__code__ is F.multi_head_attention_forward.__code__


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, b: linear(x, w, b),
        lambda x, w, b: layer_norm(x, (3,), w[0], b[:3]),
        lambda x, w, b: relu(torch.where(x > 0, x + 1, x - 1)),
        lambda x, w, b: scaled_dot_product_attention(x[None], (x @ w.t() @ w)[None], w[None, :2]),
    ],
    ids=["linear", "layer norm", "relu", "attention"],
)
def test_gradgradcheck(function):
    inputs = (tensor(2, 3), tensor(4, 3, seed=1), tensor(4, seed=2))
    if function(*inputs).dim() == 3:
        inputs = (tensor(2, 3), tensor(2, 3, seed=1), tensor(4, seed=2))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: relu(x, inplace=True),
        lambda x: relu(x.int()),
        lambda x: linear(x, x[0]),
        lambda x: linear(x, torch.ones(2, 7)),
        lambda x: linear(x, x.half()),
        lambda x: linear(x.half(), x.half()),
        lambda x: layer_norm(x, (5,)),
        lambda x: layer_norm(x, (4,), torch.ones(3)),
        lambda x: layer_norm(x[:0], (4,)),
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

    def hessian():
        function = torch.func.jacrev(lambda x: F.layer_norm(F.relu(x), (4,)).exp().sum())
        return torch.func.jacrev(function)(x)

    with CheapSecondDerivatives():
        found = hessian()
        mapped = torch.func.vmap(lambda x: F.linear(x, x))(x[None])
    torch.testing.assert_close(found, hessian())
    torch.testing.assert_close(mapped[0], x @ x.t())
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x.float(), x.float()) is None
