"""Activations that lie channels last change no number, and stop no model from running."""

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import flatminima as fm
from flatminima.derivatives.channels_last import is_marked
from flatminima.derivatives.hand_written import PIECES
from flatminima.derivatives.substitution import Substitution


class Net(nn.Module):
    """Two convolutions, and between them and after them what a case does."""

    def __init__(self, middle=None, end=None, *, channels=3, first=None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = first or nn.Conv2d(channels, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.middle, self.end = middle, end
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.4
        self.norm.running_mean.normal_(generator=generator)

    def forward(self, x):
        out = F.silu(self.norm(self.first(x)))
        out = out if self.middle is None else self.middle(out)
        out = self.second(out)
        out = out if self.end is None else self.end(out)
        return out.flatten(1)[:, :5]


def inplace_through_view(y):
    y.view(-1).add_(1.0)
    y.view(y.shape[0], -1)[:, ::3].mul_(2.0)
    return y


def inplace_through_data(y):
    y.data.view(-1)[::5] *= 1.5
    return y


def alias_written_later(y):
    other = y.detach()
    scaled = y * 2
    other.flatten()[0] = 0.0
    return scaled


def branch(y):
    return y * 2 if y.is_contiguous() else y * 3


def storage_order(y):
    order = torch.tensor(list(y.detach().untyped_storage()[:64]), dtype=torch.float32)
    return y * (1 + order.mean() / 1000)


def own_layout(y):
    return y.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).reshape(y.shape)


def mixed_layouts(y):
    noise = torch.linspace(0, 1, y.numel()).view(y.shape[0], *y.shape[2:], y.shape[1])
    out = noise.permute(0, 3, 1, 2) + y
    return out * (1 + sum(s * 0.01 for s in out.stride()))


def random_like(y):
    return y + torch.rand_like(y) + torch.empty_like(y).uniform_()


def through_hook(y):
    y.register_hook(lambda g: g.view(-1).mul(torch.rand_like(g).view(-1)).view(g.shape))
    return y * 1.0


def own_gradient(y):
    z = F.conv2d(y, torch.ones(6, 6, 3, 3) / 9, padding=1).square().sum()
    (gradient,) = torch.autograd.grad(z, y, create_graph=True)
    return y + gradient * torch.rand_like(gradient) + 0.01 * gradient.stride(1)


class Viewing(torch.autograd.Function):
    """Takes views of what it is given, both ways."""

    @staticmethod
    def forward(ctx, y):
        return y.view(-1).mul(2.0).view(y.shape)

    @staticmethod
    def backward(ctx, g):
        return (g.view(-1) * 2.0).view(g.shape)


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripts are on their way out
        return torch.jit.script(_scripted)


def _scripted(y: torch.Tensor) -> torch.Tensor:
    return y.view(-1).sin().view(y.shape)


CASES = {
    "nothing": None,
    "view": lambda y: y.view(-1).sin().view(y.shape),
    "view_as": lambda y: y.view_as(y).flatten(1).view_as(y),
    "flatten": lambda y: nn.Flatten()(y).cumsum(1).view(y.shape),
    "as_strided": lambda y: y.as_strided(y.shape, y.stride()) + y.as_strided(y.shape, (0, 1, 2, 3)),
    "torch.as_strided": lambda y: torch.as_strided(y, y.shape, (1, 0, 2, 3)) + y,
    "stride": lambda y: y * (1 + 0.01 * y.stride(1)) + y.stride()[3],
    "is_contiguous": branch,
    "in place": lambda y: y.add_(1).mul_(2).relu_(),
    "in place through views": inplace_through_view,
    "in place through data": inplace_through_data,
    "alias": alias_written_later,
    "storage": storage_order,
    "its own layout": own_layout,
    "layouts mixed": mixed_layouts,
    "random numbers": random_like,
    "dropout": lambda y: F.dropout(F.dropout(y, 0.5, True), 0.5, False),
    "numpy": lambda y: y * torch.from_numpy(y.detach().numpy().cumsum() * 1e-4).float().view_as(y),
    "hook on a tensor": through_hook,
    "autograd.Function": Viewing.apply,
    "gradient of its own": own_gradient,
    "checkpoint": lambda y: checkpoint(
        lambda t: t.view(-1).sin().view(t.shape), y, use_reentrant=False
    ),
    "vmap": lambda y: torch.vmap(lambda t: t.view(-1).sin().view(t.shape))(y),
    "scripted": lambda y: scripted()(y),
    "pooling": lambda y: F.max_pool2d(y, 3, 1, 1) + F.avg_pool2d(y, 3, 1, 1) + y.mean((2, 3), True),
    "indices": lambda y: F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), 2),
    "odd results": lambda y: y.mean(1).view(-1).sum() + y.sum(2).view(-1).sum() + y,
    "out": lambda y: y + torch.add(y.detach(), 1, out=torch.empty(0)).view(y.shape),
    "cat": lambda y: torch.cat([y[:, :3], y, torch.ones_like(y)], 1)[:, 2:8],
    "transposed": nn.ConvTranspose2d(6, 6, 3, padding=1),
    "depthwise": nn.Conv2d(6, 6, 3, padding=1, groups=6),
    "groups": nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=2),
    "one by one": nn.Conv2d(6, 6, 1),
    "same": nn.Conv2d(6, 6, 3, padding="same"),
    "conv1d": lambda y: F.conv1d(y.flatten(2), torch.ones(6, 6, 3) / 9, padding=1).view(y.shape),
    "conv3d": lambda y: F.conv3d(y[:, None], torch.ones(1, 1, 3, 3, 3) / 9, padding=1)[:, 0],
    "group norm": nn.GroupNorm(2, 6),
    "training norm": nn.BatchNorm2d(6, track_running_stats=False),
    "shuffle": lambda y: nn.PixelShuffle(2)(nn.PixelUnshuffle(2)(y)),
}


# Where something may meet activations that is not one of PyTorch's functions.
LEFT = (
    "autograd.Function",
    "checkpoint",
    "gradient of its own",
    "hook on a tensor",
    "scripted",
    "vmap",
)


def seeded(function, *args):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return function(*args)


def products(net, x, y, *, allowed, passes=3, keep=False, dtype=torch.float32):
    objective = fm.Objective(net, nn.CrossEntropyLoss(), [(x, y), (x[:3] * 2, y[:3])], mode="keep")
    hessian = fm.HessianOperator(objective, keep_graph=keep)
    way = objective.differentiation
    if not allowed:
        way.retreat(RuntimeError())
    generator = torch.Generator().manual_seed(3)
    vector = torch.randn(objective.size, generator=generator, dtype=dtype)
    with hessian.session() if keep else contextlib.nullcontext():
        found = [seeded(hessian.matvec, vector) for _ in range(passes)]
    assert hessian.method != "finite_differences"
    return found, way


def batch(channels=3):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(5, channels, 8, 8, generator=generator)
    return x, torch.randint(5, (5,), generator=generator)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("place", ["middle", "end"])
@pytest.mark.parametrize("case", CASES)
def test_products_are_what_they_are_otherwise(case, place, keep):
    net = Net(**{place: CASES[case]}).eval()
    expected, _ = products(net, *batch(), allowed=False, keep=keep)
    found, way = products(net, *batch(), allowed=True, keep=keep)
    assert way.retreat(RuntimeError()) == (case not in LEFT)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * float(b.abs().max()))


@pytest.mark.parametrize("keep", [False, True])
def test_what_only_later_passes_do_is_computed_with_activations_as_they_always_lie(keep):
    class Late(Net):
        calls = 0

        def forward(self, x):
            Late.calls += 1
            self.middle = Viewing.apply if Late.calls > 3 else lambda y: y * 2.0
            return super().forward(x)

    torch.manual_seed(0)
    found, way = products(Late().eval(), *batch(), allowed=True, keep=keep, passes=3)
    assert Late.calls > (4 if keep else 6)  # one batch was begun in vain
    assert not way.retreat(RuntimeError())
    expected, _ = products(Net(lambda y: y * 2.0).eval(), *batch(), allowed=False)
    for a in found:
        torch.testing.assert_close(a, expected[0], rtol=2e-5, atol=1e-5)


def test_an_error_of_the_models_own_is_raised():
    class Failing(Net):
        calls = 0

        def forward(self, x):
            Failing.calls += 1
            if Failing.calls > 2:
                raise ValueError("tired")
            return super().forward(x)

    with pytest.raises(ValueError, match="tired"):
        products(Failing().eval(), *batch(), allowed=True)


def test_errors_of_the_librarys_own_are_not_tried_again():
    _, way = products(Net().eval(), *batch(), allowed=True)
    assert not way.retreat(fm.NonFiniteError("NaN"))
    assert way.retreat(RuntimeError("view"))
    assert not way.retreat(RuntimeError("view"))


@pytest.mark.parametrize("keep", [False, True])
def test_checkpointed_convolutions(keep):
    class Checkpointed(Net):
        def forward(self, x):
            x = torch.relu(self.first(x))
            x = checkpoint(lambda t: self.second(self.norm(t)), x, use_reentrant=False)
            return x.flatten(1)[:, :5]

    class Plain(Net):
        def forward(self, x):
            return self.second(self.norm(torch.relu(self.first(x)))).flatten(1)[:, :5]

    found, _ = products(Checkpointed().eval(), *batch(), allowed=True, keep=keep)
    expected, _ = products(Plain().eval(), *batch(), allowed=False)
    for a in found:
        torch.testing.assert_close(a, expected[0], rtol=2e-5, atol=1e-5)


class ImagesOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, x):
        return self.conv(x)


def test_a_loss_function_meets_images_as_they_always_lie():
    seen = []

    def loss_fn(output, target):
        seen.append(output.stride())
        return output.view(len(output), 5, -1).mean(2).sub(target).square().mean()

    torch.manual_seed(0)
    x, _ = batch()
    objective = fm.Objective(ImagesOut(), loss_fn, [(x, torch.randn(5, 5))])
    hessian = fm.HessianOperator(objective)
    vector = torch.randn(objective.size)
    first = hessian @ vector
    torch.testing.assert_close(hessian @ vector, first, rtol=2e-5, atol=1e-6)
    assert objective.differentiation.retreat(RuntimeError())
    assert set(seen) == {(180, 36, 6, 1)}


def conv(x, channels=4, **options):
    weight = torch.ones(channels, x.shape[1], 3, 3, dtype=x.dtype, requires_grad=True)
    return F.conv2d(x, weight, **options)


def lies_last(t):
    return not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)


FOLLOWING = {
    "a chain": lambda y: F.relu(2 * (y + 1) - y / 2),
    "pooling": lambda y: F.avg_pool2d(F.max_pool2d(y, 2), 1),
    "batch norm": lambda y: F.batch_norm(y, torch.ones(4), torch.ones(4)),
    "batch norm in training": lambda y: F.batch_norm(y, None, None, training=True),
    "another convolution": conv,
    "same padding": lambda y: conv(y, padding="same"),
    "cat": lambda y: torch.cat([y, y.relu()], 1),
    "in place": lambda y: y.add_(1).relu_(),
    "idle dropout": lambda y: F.dropout2d(F.dropout(y, 0.5, False), training=False),
    "ReLU in place": lambda y: F.relu(y * 1.0, inplace=True),
}


@pytest.mark.parametrize("function", FOLLOWING.values(), ids=FOLLOWING)
def test_functions_that_take_activations_as_they_lie(function):
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    with Substitution(PIECES):
        y = conv(x)
        out = function(y)
    expected = function(conv(x))
    assert lies_last(y)
    assert lies_last(out)
    assert is_marked(out)
    assert not lies_last(expected)
    torch.testing.assert_close(out.contiguous(), expected.contiguous(), rtol=1e-5, atol=1e-5)


def test_other_functions_change_how_the_tensor_itself_lies():
    with Substitution(PIECES):
        y = conv(torch.ones(2, 3, 9, 9))
        assert y.shape == (2, 4, 7, 7)
        saved = y * y
        flat = y.view(-1)
        assert y.stride() == (196, 49, 7, 1)
    assert not is_marked(y)
    assert flat.data_ptr() == y.data_ptr()
    assert saved.grad_fn is not None
    (gradient,) = torch.autograd.grad(saved.sum(), y)
    torch.testing.assert_close(gradient, 2 * y)


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(2, 3, 9, 9, dtype=torch.float64),
        torch.ones(2, 3, 9, 9).contiguous(memory_format=torch.channels_last),
        torch.ones(2, 9, 9, 3).permute(0, 3, 1, 2),
    ],
    ids=["float64", "channels last already", "permuted"],
)
def test_what_the_user_has_laid_out_stays_so(x):
    with Substitution(PIECES):
        y = conv(x)
        strides, marked = y.stride(), is_marked(y)
    assert not marked
    assert strides == conv(x).stride()


def entered(monkeypatch):
    count = []
    enter = Substitution.__enter__
    monkeypatch.setattr(Substitution, "__enter__", lambda self: count.append(1) or enter(self))
    return count


class Product(nn.Module):
    """Of nothing that has another second derivative than PyTorch's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize(("normed", "later"), [(False, 0), (True, 1)])
def test_the_mode_is_entered_only_where_it_has_something_to_do(monkeypatch, normed, later):
    torch.manual_seed(0)
    net = nn.Sequential(Product(), nn.BatchNorm1d(4) if normed else nn.Tanh())
    data = torch.randn(6, 3), torch.randint(4, (6,))
    objective = fm.Objective(net, nn.CrossEntropyLoss(), data)
    hessian, vector = fm.HessianOperator(objective), torch.ones(objective.size)
    count = entered(monkeypatch)
    first = hessian @ vector
    assert count
    with hessian.session():
        count.clear()
        torch.testing.assert_close(hessian @ vector, first)
        assert len(count) == later
        count.clear()
        torch.testing.assert_close(hessian @ vector, first)
        assert not count
