"""The LSTM that is cheap to differentiate twice is PyTorch's own, in values and derivatives."""

import contextlib
import itertools

import pytest
import torch
from torch import nn

from flatminima.derivatives.recurrent import twice_differentiable

OPTIONS = list(itertools.product((1, 2), (False, True), (False, True), (False, True)))


@contextlib.contextmanager
def unfused():
    enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = enabled


def derivatives(function, module, x, hx):
    """A loss that uses every output, its gradient and a product with its Hessian."""
    leaves = [*module.parameters(), x, *(hx or ())]
    # Not the leaf itself, for which the module's own forward is called.
    out, (h, c) = function(1 * x, hx)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    loss = (out.sin() * weights).sum() + (h * c).exp().mean() + c.pow(3).sum()
    gradient = torch.autograd.grad(loss, leaves, create_graph=True)
    generator = torch.Generator().manual_seed(1)
    vectors = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in leaves]
    products = torch.autograd.grad(gradient, leaves, vectors)
    return [out, h, c, loss, *gradient, *products]


def assert_alike(module, x, hx=None):
    with unfused():
        expected = derivatives(module.forward, module, x, hx)
    replaced = twice_differentiable(module, refuse)
    found = derivatives(replaced, module, x, hx)
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=f"tensor {number}")


def refuse(*args, **kwargs):
    raise AssertionError("the module's own forward was called")


def tensor(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize(("layers", "both_ways", "batch_first", "bias"), OPTIONS)
@pytest.mark.parametrize("given", [False, True])
def test_equals_pytorchs_own_up_to_second_derivatives(layers, both_ways, batch_first, bias, given):
    torch.manual_seed(0)
    module = nn.LSTM(
        3, 4, layers, bias=bias, batch_first=batch_first, bidirectional=both_ways
    ).double()
    x = tensor(2, 5, 3) if batch_first else tensor(5, 2, 3)
    size = layers * (1 + both_ways)
    hx = (tensor(size, 2, 4, seed=1), tensor(size, 2, 4, seed=2)) if given else None
    assert_alike(module, x, hx)


@pytest.mark.parametrize("both_ways", [False, True])
def test_input_without_a_batch_dimension(both_ways):
    torch.manual_seed(0)
    module = nn.LSTM(3, 4, 2, bidirectional=both_ways).double()
    size = 2 * (1 + both_ways)
    assert_alike(module, tensor(5, 3))
    assert_alike(module, tensor(5, 3), (tensor(size, 4, seed=1), tensor(size, 4, seed=2)))


def test_a_single_time_step():
    torch.manual_seed(0)
    assert_alike(nn.LSTM(3, 4).double(), tensor(1, 2, 3))


def test_second_derivative_by_one_state_alone():
    torch.manual_seed(0)
    module = nn.LSTM(3, 4).double()
    x, leaves = tensor(5, 2, 3), list(module.parameters())
    with unfused():
        for index in range(3):
            products = []
            for function in (module.forward, twice_differentiable(module, refuse)):
                out, (h, c) = function(1 * x)
                loss = (out, h, c)[index].tanh().square().sum()
                gradient = torch.autograd.grad(loss, leaves[:1], create_graph=True)
                seed = [torch.ones_like(g) for g in gradient]
                products += torch.autograd.grad(gradient, leaves, seed)
            for a, b in zip(products[:4], products[4:], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradgradcheck():
    torch.manual_seed(0)
    module = nn.LSTM(2, 2, bidirectional=True).double()
    names = [n for n, _ in module.named_parameters()]

    def function(x, h, c, *weights):
        replaced = nn.LSTM(2, 2, bidirectional=True).double()
        for name, weight in zip(names, weights, strict=True):
            delattr(replaced, name)
            setattr(replaced, name, weight)
        out, states = twice_differentiable(replaced, refuse)(1 * x, (h, c))
        return (out, *states)

    inputs = (tensor(3, 1, 2), tensor(2, 1, 2, seed=1), tensor(2, 1, 2, seed=2))
    assert torch.autograd.gradgradcheck(function, (*inputs, *module.parameters()))


class Derived(nn.LSTM):
    pass


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.GRU(3, 4), torch.ones(5, 2, 3)),
        (nn.RNN(3, 4), torch.ones(5, 2, 3)),
        (Derived(3, 4), torch.ones(5, 2, 3)),
        (nn.LSTM(3, 4, proj_size=2), torch.ones(5, 2, 3)),
        (nn.LSTM(3, 4, 2, dropout=0.5).train(), torch.ones(5, 2, 3)),
        (nn.LSTM(3, 4).half(), torch.ones(5, 2, 3).half()),
        (nn.LSTM(3, 4), torch.ones(5, 2, 3).double()),
        (nn.LSTM(3, 4), torch.ones(5, 2, 7)),
        (nn.LSTM(3, 4), torch.nn.utils.rnn.pack_sequence([torch.ones(5, 3), torch.ones(2, 3)])),
    ],
    ids=["gru", "rnn", "derived", "projection", "dropout", "half", "types", "size", "packed"],
)
def test_what_is_not_treated_goes_to_the_modules_own_forward(module, x):
    assert twice_differentiable(module, lambda *args: ("own", args))(x) == ("own", (x,))


@pytest.mark.parametrize(
    "hx", [(torch.ones(1, 3, 4), torch.ones(1, 2, 4)), (torch.ones(2, 4), torch.ones(2, 4))]
)
def test_states_that_do_not_fit_get_pytorchs_own_message(hx):
    module = nn.LSTM(3, 4)
    with pytest.raises((RuntimeError, ValueError)):
        twice_differentiable(module, module.forward)(torch.ones(5, 2, 3), hx)


def test_autocast_is_left_to_pytorch():
    module = nn.LSTM(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert twice_differentiable(module, lambda x: "own")(torch.ones(5, 2, 3)) == "own"


def test_dropout_in_evaluation_mode_is_no_obstacle():
    torch.manual_seed(0)
    assert_alike(nn.LSTM(3, 4, 2, dropout=0.5).double().eval(), tensor(5, 2, 3))


def test_a_graph_that_is_kept_gives_the_same_product_again():
    torch.manual_seed(0)
    module = nn.LSTM(3, 4, 2).double()
    leaves = list(module.parameters())
    loss = twice_differentiable(module, refuse)(1 * tensor(5, 2, 3))[0].square().sum()
    gradient = torch.autograd.grad(loss, leaves, create_graph=True)
    seed = [torch.ones_like(g) for g in gradient]
    first, second = (
        torch.autograd.grad(gradient, leaves, seed, retain_graph=True) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_an_input_that_is_a_leaf_goes_to_the_modules_own_forward():
    """A loss that differentiates by it takes one derivative more than there is here."""
    x = tensor(5, 2, 3)
    module = nn.LSTM(3, 4).double()
    with pytest.raises(AssertionError, match="own forward"):
        twice_differentiable(module, refuse)(x)
