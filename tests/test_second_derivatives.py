"""Functions computed for cheap second derivatives are PyTorch's own."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flatminima.derivatives.hand_written import PIECES
from flatminima.derivatives.substitution import Substitution

REPLACING = set(PIECES) - {"channels_last"}


def tensor(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def derivatives(function, leaves, mode):
    with mode:
        out = function()
    loss = out.tanh().square().sum()
    gradient = torch.autograd.grad(loss, leaves, create_graph=True)
    vectors = [tensor(*t.shape, seed=7).detach() for t in leaves]
    products = torch.autograd.grad(gradient, leaves, vectors, retain_graph=True)
    again = torch.autograd.grad(gradient, leaves, vectors)
    assert all(map(torch.equal, products, again))
    return out, [out, *gradient, *products]


def assert_replaced_and_alike(function, leaves):
    own, expected = derivatives(function, leaves, contextlib.nullcontext())
    new, found = derivatives(function, leaves, Substitution(REPLACING))
    assert new.grad_fn.name() != own.grad_fn.name()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1, "groups": 2}, "lists"])
def test_convolutions(dimensions, bias, options):
    if options == "lists":
        options = {"stride": [2], "padding": (1,) * dimensions, "dilation": 2}
    groups = options.get("groups", 1)
    function = (F.conv1d, F.conv2d, F.conv3d)[dimensions - 1]
    x = tensor(2, 4, *[6] * dimensions)
    weight = tensor(6, 4 // groups, *[3] * dimensions, seed=1)
    leaves = [x, weight, *([tensor(6, seed=2)] if bias else [])]

    def convolution():
        return function(x, weight, *leaves[2:], **options)

    assert_replaced_and_alike(convolution, leaves)
    for leaf in leaves:
        assert_replaced_and_alike(convolution, [leaf])


def test_convolution_of_data_without_a_derivative():
    x, weight = tensor(2, 3, 5, 5).detach(), tensor(4, 3, 3, 3, seed=1)
    assert_replaced_and_alike(lambda: F.conv2d(x, weight), [weight])


def test_third_derivatives_of_a_convolution():
    def third(mode):
        x, weight = tensor(1, 2, 4), tensor(2, 2, 3, seed=1)
        with mode:
            value = F.conv1d(x, weight).tanh().sum()
        for _ in range(3):
            value = torch.autograd.grad(value, weight, create_graph=True)[0].square().sum()
        return value

    torch.testing.assert_close(third(Substitution(REPLACING)), third(contextlib.nullcontext()))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2), (4, 3, 2, 2), (2, 3, 2, 2, 2)])
def test_batch_norm_in_evaluation_mode(affine, shape):
    x = tensor(*shape)
    mean, var = tensor(3, seed=1).detach() + 50, tensor(3, seed=2).detach().square() + 0.1
    leaves = [x, *([tensor(3, seed=3), tensor(3, seed=4)] if affine else [])]
    assert_replaced_and_alike(lambda: F.batch_norm(x, mean, var, *leaves[1:]), leaves)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("affine", ["", "weight", "both"])
def test_batch_norm_of_images_in_either_layout(affine, layout):
    x = tensor(4, 3, 5, 2).detach().contiguous(memory_format=layout).requires_grad_()
    mean, var = tensor(3, seed=1).detach(), tensor(3, seed=2).detach().square() + 0.1
    weight = tensor(3, seed=3) if affine else None
    bias = tensor(3, seed=4) if affine == "both" else None
    leaves = [t for t in (x, weight, bias) if t is not None]

    def norm():
        return F.batch_norm(x, mean, var, weight, bias).transpose(1, 2)

    _, expected = derivatives(norm, leaves, contextlib.nullcontext())
    _, found = derivatives(norm, leaves, Substitution(REPLACING))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for leaf in leaves:
        assert_replaced_and_alike(lambda: F.batch_norm(x, mean, var, weight, bias), [leaf])


def test_statistics_with_a_derivative():
    x, mean, scale = tensor(4, 3), tensor(3, seed=1), tensor(3, seed=2)
    leaves = [x, mean, scale]

    def norm():
        return F.batch_norm(x, mean, scale.square() + 0.1)

    _, found = derivatives(norm, leaves, Substitution(REPLACING))
    _, expected = derivatives(
        lambda: (x - mean) / torch.sqrt(scale.square() + 0.1 + 1e-5),
        leaves,
        contextlib.nullcontext(),
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_third_derivatives_of_batch_norm():
    def third(mode):
        x, w = tensor(4, 3), tensor(3, seed=1)
        with mode:
            value = F.batch_norm(x, w.detach(), w.detach().square() + 1, w, w).tanh().sum()
        found = []
        for _ in range(3):
            gradients = torch.autograd.grad(value, [x, w], create_graph=True)
            found += gradients
            value = sum(g.sin().sum() for g in gradients)
        return found

    expected = third(contextlib.nullcontext())
    for a, b in zip(third(Substitution(REPLACING)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.BatchNorm1d(3), torch.ones(4, 3)),
        (nn.BatchNorm1d(3, track_running_stats=False).eval(), torch.ones(4, 3)),
        (nn.Conv2d(3, 2, 3, padding="same"), torch.ones(1, 3, 5, 5)),
        (nn.Conv2d(3, 2, 3), torch.ones(3, 5, 5)),
    ],
    ids=["training", "no statistics", "same padding", "no batch dimension"],
)
def test_what_is_left_to_pytorch(module, x):
    own = module(x).grad_fn.name()
    with Substitution(REPLACING):
        assert module(x).grad_fn.name() == own


def test_pytorchs_own_messages():
    with Substitution(REPLACING), pytest.raises(RuntimeError, match="channels"):
        nn.Conv2d(3, 2, 3)(torch.ones(1, 4, 5, 5))
    with Substitution(REPLACING), pytest.raises(RuntimeError, match="running_mean"):
        nn.BatchNorm1d(3).eval()(torch.ones(4, 5))


def test_autocast_is_left_to_pytorch():
    with Substitution(REPLACING), torch.autocast("cpu", torch.bfloat16):
        assert nn.Conv2d(3, 2, 3)(torch.ones(1, 3, 5, 5)).dtype == torch.bfloat16
