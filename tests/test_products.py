"""The ways to a Hessian product: what is exact, what is approximate, and how that is found out."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations

import flatminima as fm
from flatminima.operators.products.differences import SHRINKINGS, central_differences
from flatminima.operators.products.gradient_graph import GradientGraph
from flatminima.support.vectors import Layout


def seeded(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# --------------------------------------------------------------------------- central differences

POINT = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
V = torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64)
RMS = math.sqrt(float(POINT.square().mean()))


class Recorded:
    """∇L(θ + δ) for a gradient by hand, and the displacements that it was asked at."""

    def __init__(self, gradient, point=POINT):
        self.gradient, self.point = gradient, point
        self.shifts = []

    def __call__(self, shift):
        self.shifts.append(shift.clone())
        return self.gradient(self.point + shift)

    @property
    def steps(self):
        """The largest move of a parameter at each evaluation."""
        return [float(s.abs().max()) for s in self.shifts]


def differences(gradient, *, vector=V, point=POINT, eps=2.0**-40):
    recorded = Recorded(gradient, point)
    product, error = central_differences(recorded, vector, point, eps)
    return product, error, recorded


@pytest.mark.parametrize("eps", [2.0**-52, 2.0**-23, 2.0**-7])
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("length", [1e-9, 1.0, 1e9])
def test_the_step_follows_the_point_the_vector_and_the_precision(length, size, eps):
    vector, point = length * V, size * POINT
    _, _, recorded = differences(lambda t: t, vector=vector, point=point, eps=eps)
    h = eps**0.25 * size * RMS
    assert recorded.steps == pytest.approx([h, h, h / 2, h / 2], rel=1e-12)
    for shift in recorded.shifts:
        assert float(shift @ vector) ** 2 == pytest.approx(
            float(shift @ shift) * float(vector @ vector), rel=1e-12
        )
    assert torch.equal(recorded.shifts[0], -recorded.shifts[1])
    assert torch.equal(recorded.shifts[2], -recorded.shifts[3])


def test_a_point_at_zero_has_steps_of_its_own():
    product, _, recorded = differences(lambda t: 3 * t, point=torch.zeros_like(POINT))
    assert recorded.steps[0] == pytest.approx((2.0**-40) ** 0.25)
    torch.testing.assert_close(product, 3 * V)


def test_quadratics_and_cubics_have_exact_differences():
    """∇L linear or quadratic in θ: no error but rounding, and the estimate says so."""
    for gradient, expected in (
        (lambda t: 5 * t + 1, 5 * V),
        (lambda t: t**2, 2 * POINT * V),
    ):
        product, error, recorded = differences(gradient)
        torch.testing.assert_close(product, expected, rtol=1e-11, atol=1e-11)
        assert error <= 1e-7
        assert len(recorded.shifts) == 4


def test_quartics_are_extrapolated_and_their_estimate_is_that_of_plain_differences():
    """∇L = θ³: D(h) = 3θ²v + h²v³, of which Richardson leaves 3θ²v; |D(h/2) − D(h)| = ¾h²|v³|."""
    eps = 1e-10
    product, error, recorded = differences(lambda t: t**3, eps=eps)
    h = eps**0.25 * RMS / float(V.abs().max())
    torch.testing.assert_close(product, 3 * POINT**2 * V, rtol=1e-9, atol=1e-9)
    assert error == pytest.approx(0.75 * h**2 * float((V**3).norm()), rel=1e-4)
    assert len(recorded.shifts) == 4


@pytest.mark.parametrize("eps", [1e-6, 1e-8])
def test_the_product_is_of_fourth_order(eps):
    """∇L = θ⁵: (4 D(h/2) − D(h)) / 3 = 5θ⁴v − ¼ h⁴ v⁵."""
    product, error, _ = differences(lambda t: t**5, eps=eps)
    h = eps**0.25 * RMS / float(V.abs().max())
    exact = 5 * POINT**4 * V
    torch.testing.assert_close(product - exact, -0.25 * h**4 * V**5, rtol=1e-3, atol=1e-9)
    assert float((product - exact).norm()) <= error


def test_the_zero_vector_needs_no_gradient():
    product, error, recorded = differences(lambda t: t / 0, vector=torch.zeros_like(V))
    assert torch.equal(product, torch.zeros_like(V))
    assert error == 0
    assert not recorded.shifts


def test_the_product_is_a_tensor_of_its_own():
    shared = torch.empty_like(V)

    def gradient(point):
        return torch.mul(point, 2, out=shared).clone()

    product, _, _ = differences(gradient)
    product += 1
    assert not torch.equal(shared, product)


@pytest.mark.parametrize("relative", [1e-9, 1e-5, 1e-3])
def test_noise_is_told_as_error(relative):
    """Noise of the gradient is divided by the step: what it adds must be within the estimate."""
    generator = torch.Generator().manual_seed(1)
    noise = relative * float(POINT.norm())

    def gradient(point):
        return 2 * point + noise * torch.randn(4, generator=generator, dtype=torch.float64)

    for _ in range(20):
        product, error, _ = differences(gradient, eps=2.0**-52)
        assert float((product - 2 * V).norm()) <= 10 * error


def test_rounding_of_float32_is_within_the_estimate():
    point, vector = POINT.float(), V.float()
    product, error, recorded = differences(
        lambda t: t.sin() * 100, vector=vector, point=point, eps=2.0**-23
    )
    true = (product.double() - 100 * POINT.cos() * V).norm()
    assert float(true) <= 10 * error
    assert error <= 0.01 * float(product.norm())
    assert len(recorded.shifts) == 4


@pytest.mark.parametrize(
    ("sharpness", "rounds"), [(0.5, 1), (60.0, 2), (600.0, 3)], ids=["smooth", "sharp", "sharper"]
)
def test_steps_shrink_while_the_two_differences_disagree(sharpness, rounds):
    """∇L = sin(kθ): the first step, 2^-10 of θ's size, is too wide for a large k."""
    product, error, recorded = differences(lambda t: (sharpness * t).sin(), eps=2.0**-20)
    assert len(recorded.shifts) == 4 * rounds
    first = recorded.steps[0]
    assert recorded.steps[::4] == pytest.approx([first / 16**i for i in range(rounds)])
    exact = sharpness * (sharpness * POINT).cos() * V
    assert float((product - exact).norm()) <= 10 * error
    assert error <= 0.05 * float(exact.norm())


def test_shrinking_ends_and_the_best_product_is_kept():
    """A jump in the gradient: no step is small enough."""
    _, error, recorded = differences(lambda t: (t - POINT).sign(), eps=2.0**-52)
    assert len(recorded.shifts) == 4 * (1 + SHRINKINGS)
    wide = recorded.steps[0] / float(V.abs().max())
    # D(h) = sign(v) / h doubles at h / 2, so that the widest step has the smallest gap.
    assert error == pytest.approx(2.0 / wide, rel=1e-6)


def test_rounding_alone_does_not_shrink_the_step():
    """Smaller steps would only have more of it."""
    point = POINT.float()
    product, error, recorded = differences(
        lambda t: 1000 + 1e-4 * t, vector=V.float(), point=point, eps=2.0**-23
    )
    assert len(recorded.shifts) == 4
    assert float((product.double() - 1e-4 * V).norm()) <= 10 * error


def test_gradients_that_are_not_finite_give_no_number():
    product, error, _ = differences(lambda t: t / 0)
    assert not math.isfinite(error) or bool(product.isfinite().all())


def test_differences_at_points_where_the_gradient_is_not_finite_are_refused():
    class Edge(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([1e-6, 1.0], dtype=torch.float64))

        def forward(self, x):
            return self.theta.sqrt().sum()

    objective = fm.Objective(Edge(), data=[torch.zeros(1)], batch_loss=lambda m, b: m(b))
    operator = fm.HessianOperator(objective, method="finite_differences")
    with pytest.raises(fm.NonFiniteError, match=r"θ ± h v .*finite differences"):
        operator @ torch.tensor([1.0, 0.0]).double()


class Autocast(nn.Module):
    """Parameters in float32, arithmetic in bfloat16."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.body(x).float()


@pytest.mark.parametrize("seed", range(6))
def test_differences_under_autocast_tell_their_error(seed):
    """The noise of bfloat16 is not that of the parameters' type, and small steps drown in it."""
    model, data = Autocast(seed), (seeded(40, 3).float(), seeded(40, 2, seed=1).float())
    cast, plain = (fm.Objective(m, nn.MSELoss(), data) for m in (model, model.body))
    v = seeded(cast.size, seed=seed).float()
    exact = fm.HessianOperator(plain) @ v
    torch.testing.assert_close(fm.HessianOperator(cast) @ v, exact, rtol=0.1, atol=0.05)
    operator = fm.HessianOperator(cast, method="finite_differences")
    true = float((operator @ v - exact).norm())
    assert true <= 10 * operator.error * float(v.norm())


def test_steps_that_drown_in_rounding_are_not_taken_for_exact():
    """A gradient of few digits: at small steps both differences are zero, and agree."""
    product, error, _ = differences(lambda t: (100 * t.sin()).round() / 100, eps=2.0**-23)
    true = float((product - POINT.cos() * V).norm())
    assert true <= 10 * error


# ------------------------------------------------------------------------------- double backward


class Pieces:
    """Σ aᵢθᵢ³/6 + (Σθ)²/2 of three tensors, a parameter of constant gradient, and an unused one."""

    def __init__(self):
        self.leaves = [
            torch.tensor([1.0, 2.0], dtype=torch.float64),
            torch.tensor([[3.0], [-1.0]], dtype=torch.float64),
            torch.tensor([5.0], dtype=torch.float64),
            torch.tensor([1.0, 1.0], dtype=torch.float64),
            torch.tensor(2.0, dtype=torch.float64),
        ]
        self.layout = Layout.of(dict(zip("abcde", self.leaves, strict=True)))
        for leaf in self.leaves:
            leaf.requires_grad_()
        flat = torch.cat([leaf.detach().reshape(-1) for leaf in self.leaves])
        curved = torch.tensor([1.0] * 5 + [0.0] * 3, dtype=torch.float64)
        self.hessian = torch.diag(flat * curved) + torch.outer(curved, curved)

    def loss(self):
        curved = torch.cat([leaf.reshape(-1) for leaf in self.leaves[:3]])
        return (curved**3).sum() / 6 + curved.sum() ** 2 / 2 + self.leaves[3].sum()


def test_double_backward_multiplies_by_the_hessian():
    case = Pieces()
    vectors = list(seeded(3, 8))
    products = GradientGraph(case.loss(), case.leaves, case.layout).products(vectors)
    products = [case.layout.flatten(products[5 * i : 5 * i + 5]) for i in range(3)]
    for vector, product in zip(vectors, products, strict=True):
        torch.testing.assert_close(product, case.hessian @ vector)
        assert not product.requires_grad
    assert all(leaf.grad is None for leaf in case.leaves)


BLOCKS = [
    [[0], [1], [2], [3], [4]],
    [[0, 2], [1]],
    [[2]],
    [[3], [4]],
    [[4, 1, 3]],
    [[0, 1, 2, 3, 4]],
]


@pytest.mark.parametrize("blocks", BLOCKS)
def test_block_products_are_those_of_the_diagonal_blocks(blocks):
    case = Pieces()
    places = [place for _, place in case.layout.slices()]
    mask = torch.zeros(8, 8, dtype=torch.bool)
    inside = torch.zeros(8, dtype=torch.bool)
    for block in blocks:
        own = torch.cat([torch.arange(8)[places[i]] for i in block])
        mask[own[:, None], own] = True
        inside[own] = True
    vector = seeded(8)
    expected = torch.where(mask, case.hessian, 0) @ vector
    # Outside of the blocks nothing is looked at.
    vector = torch.where(inside, vector, math.nan)
    graph = GradientGraph(case.loss(), case.leaves, case.layout)
    product = case.layout.flatten(graph.block_product(vector, blocks))
    torch.testing.assert_close(product, expected)


@pytest.mark.parametrize("method", ["auto", "finite_differences"])
def test_block_products_of_an_operator_are_those_of_the_dense_blocks(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    objective = fm.Objective(
        model,
        nn.MSELoss(),
        [(seeded(5, 3), seeded(5, 2)), (seeded(2, 3, seed=1), seeded(2, 2, seed=1))],
    )
    hessian = fm.HessianOperator(objective) @ torch.eye(objective.size).double()
    expected = torch.block_diag(hessian[:16, :16], hessian[16:, 16:])
    operator = fm.HessianOperator(objective, method=method)
    vector = seeded(objective.size, seed=2)
    product = operator.block_product(vector, [[0, 1], [2, 3]])
    torch.testing.assert_close(product, expected @ vector, rtol=1e-8, atol=1e-10)
    alone = operator.block_product(vector, [[2, 3]])
    assert torch.equal(alone[:16], torch.zeros(16).double())
    torch.testing.assert_close(alone[16:], product[16:], rtol=1e-12, atol=1e-14)


# -------------------------------------------------------------------- autograd functions by users


class HidesSine(torch.autograd.Function):
    """sin x, whose backward takes its derivative for a constant."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x.detach().cos()


class HidesByNumbers(torch.autograd.Function):
    """The same with what the forward has computed beforehand."""

    @staticmethod
    def forward(ctx, x):
        ctx.slope = x.cos()
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.slope


class HidesInNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * torch.from_numpy(x.detach().numpy()).cos()


class HonestSine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x.cos()


class HonestSineOfNewStyle(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x.cos()


class SineOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x.cos()


HIDING = [HidesSine, HidesByNumbers, HidesInNumpy]


class Wavy(nn.Module):
    """A linear layer, a sine, a linear layer."""

    def __init__(self, sine):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(3, 4), Named(sine), nn.Linear(4, 2)
        self.double()

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


class Named(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


X, Y = seeded(9, 3, seed=3), seeded(9, 2, seed=4)


def wavy_hessian(objective):
    """By torch.sin, of the same loss."""
    plain = fm.Objective(Wavy(torch.sin), objective.loss_fn, (X, Y), params=objective.layout.names)
    return fm.HessianOperator(plain) @ torch.eye(objective.size).double()


def mean_output(output, target):
    """Without curvature of its own, so that all of H comes from the model."""
    return output.mean()


def assert_good_products(operator, expected, first=None):
    """Of every unit vector, after products with `first` of one or several columns."""
    if first is not None:
        operator @ first
    found = operator @ torch.eye(operator.shape[0]).double()
    assert float((found - expected).norm()) <= 1e-8 * float(expected.norm())


class OnlyWavy(nn.Module):
    """All of its curvature is the sine's."""

    def __init__(self, sine):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.bias = nn.Linear(3, 4), Named(sine), nn.Parameter(seeded(4))
        self.double()

    def forward(self, x):
        return self.middle(self.first(x)) + self.bias


def only_wavy(sine):
    return fm.Objective(OnlyWavy(sine), mean_output, (X, Y))


ONLY_WAVY = fm.HessianOperator(only_wavy(torch.sin)) @ torch.eye(20).double()


@pytest.mark.parametrize("function", HIDING)
def test_a_backward_that_hides_what_it_depends_on_is_found_out(function):
    operator = fm.HessianOperator(only_wavy(function.apply))
    with pytest.warns(fm.FiniteDifferenceWarning, match=function.__name__) as caught:
        assert_good_products(operator, ONLY_WAVY, seeded(20, seed=5))
    assert len(caught) == 1
    assert "(in the module 'middle')" in str(caught[0].message)
    assert "contradicts differences of gradients" in operator.reason
    assert operator.method == "finite_differences"


STARTS = {
    "zero": lambda n: torch.zeros(n).double(),
    "tiny": lambda n: 1e-300 * seeded(n, seed=5),
    "elsewhere": lambda n: torch.eye(n)[0 if n == 20 else -1].double(),
    "random": lambda n: seeded(n, seed=5),
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("together", [False, True], ids=["matvec", "matmat"])
def test_a_hiding_backward_is_found_out_whatever_the_first_vector_is(together, start):
    """Also by one that the function has no part in, after which nobody would look again."""
    operator = fm.HessianOperator(only_wavy(HidesSine.apply))
    first = STARTS[start](20)
    if together:
        first = torch.stack([first, seeded(20)], 1)
    with pytest.warns(fm.FiniteDifferenceWarning):
        assert_good_products(operator, ONLY_WAVY, first)


@pytest.mark.parametrize("function", HIDING)
@pytest.mark.parametrize("loss_fn", [mean_output, nn.MSELoss()], ids=["mean", "squares"])
def test_a_backward_that_hides_little_is_found_out(loss_fn, function):
    objective = fm.Objective(Wavy(function.apply), loss_fn, (X, Y))
    expected = wavy_hessian(objective)
    layout, v = objective.layout, seeded(objective.size)

    def bare(seen, leaves):
        return GradientGraph(seen.loss, leaves, layout).products([v])

    found = objective.sum_over_batches(bare, derivatives=2)[1][0]
    assert 0.03 < float((found - expected @ v).norm() / (expected @ v).norm()) < 0.3
    operator = fm.HessianOperator(objective)
    with pytest.warns(fm.FiniteDifferenceWarning, match=function.__name__):
        assert_good_products(operator, expected)


@pytest.mark.parametrize("function", HIDING)
def test_double_backward_refuses_a_hiding_backward(function):
    operator = fm.HessianOperator(only_wavy(function.apply), method="double_backward")
    with pytest.raises(fm.NotTwiceDifferentiableError, match="hides what it depends on") as caught:
        operator @ seeded(20)
    assert (caught.value.operation, caught.value.module) == (function.__name__, "middle")


def test_block_products_find_a_hiding_backward_out():
    objective = fm.Objective(Wavy(HidesSine.apply), mean_output, (X, Y))
    expected = wavy_hessian(objective)
    operator = fm.HessianOperator(objective)
    vector = seeded(objective.size)
    with pytest.warns(fm.FiniteDifferenceWarning, match="HidesSine"):
        found = operator.block_product(vector, [[0, 1], [2, 3]])
    blocks = torch.block_diag(expected[:16, :16], expected[16:, 16:])
    torch.testing.assert_close(found, blocks @ vector, rtol=1e-7, atol=1e-9)


def test_layerwise_finds_a_hiding_backward_out():
    """The first layer's block comes from the hidden part alone: it would be zero."""
    objective = fm.Objective(Wavy(HidesSine.apply), mean_output, (X, Y))
    expected = wavy_hessian(objective)
    with pytest.warns(fm.FiniteDifferenceWarning, match="HidesSine"):
        result = fm.layerwise(objective, trace_products=2)
    top = float(torch.linalg.eigvalsh(expected[:16, :16])[-1])
    assert result.layers[0].eigenvalue == pytest.approx(top, rel=0.02)


@pytest.mark.parametrize("function", [HonestSine, HonestSineOfNewStyle])
@pytest.mark.parametrize("loss_fn", [mean_output, nn.MSELoss()], ids=["mean", "squares"])
@pytest.mark.parametrize("start", STARTS)
def test_honest_functions_stay_exact(function, loss_fn, start):
    objective = fm.Objective(Wavy(function.apply), loss_fn, (X, Y))
    operator = fm.HessianOperator(objective)
    operator @ STARTS[start](26)
    found = operator @ torch.eye(26).double()
    torch.testing.assert_close(found, wavy_hessian(objective), rtol=1e-12, atol=1e-14)
    assert (operator.method, operator.reason, operator.error) == ("double_backward", "", 0.0)


class HonestReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (x > 0)


@pytest.mark.parametrize("seed", range(5))
def test_an_honest_function_with_kinks_is_not_suspected(seed):
    """Differences in float32 step over kinks, so that they differ from the exact product."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 32), Named(HonestReLU.apply), nn.Linear(32, 2))
    data = seeded(60, 3, seed=seed).float(), seeded(60, 2, seed=seed + 9).float()
    operator, plain = (
        fm.HessianOperator(fm.Objective(m, nn.MSELoss(), data))
        for m in (model, nn.Sequential(model[0], nn.ReLU(), model[2]))
    )
    v = seeded(operator.shape[0], seed=seed).float()
    torch.testing.assert_close(operator @ v, plain @ v)
    assert operator.method == "double_backward"


def test_a_function_is_tried_once_not_at_every_product(monkeypatch):
    objective = fm.Objective(Wavy(HonestSine.apply), nn.MSELoss(), (X, Y))
    operator = fm.HessianOperator(objective)
    operator @ seeded(26)
    calls = []
    value_and_gradient = objective.value_and_gradient
    monkeypatch.setattr(
        objective, "value_and_gradient", lambda *a: calls.append(a) or value_and_gradient(*a)
    )
    for seed in range(3):
        operator @ seeded(26, seed=seed)
    assert not calls


@pytest.mark.parametrize("depth", ["inside", "last"])
def test_a_function_that_torch_prunes_silently_is_found_out(depth):
    """Where its incoming gradient is constant PyTorch does not complain, but gives zero."""
    if depth == "last":
        model, loss_fn = Wavy(torch.sin), lambda o, t: SineOnce.apply(o).mean()
        plain = lambda o, t: o.sin().mean()  # noqa: E731
    else:
        model, loss_fn = Wavy(SineOnce.apply), mean_output
        plain = mean_output
    objective = fm.Objective(model, loss_fn, (X, Y))
    twin = fm.Objective(Wavy(torch.sin), plain, (X, Y))
    expected = fm.HessianOperator(twin) @ torch.eye(26).double()
    operator = fm.HessianOperator(objective)
    with pytest.warns(fm.FiniteDifferenceWarning, match="second derivative of SineOnce"):
        assert_good_products(operator, expected)


def test_a_bare_graph_shows_what_torch_prunes():
    """The reason for looking at the graph: without it the derivative is silently incomplete."""
    leaf = torch.tensor([0.5, 1.0], dtype=torch.float64, requires_grad=True)
    layout = Layout.of({"leaf": leaf})
    graph = GradientGraph(SineOnce.apply(leaf).sum(), [leaf], layout)
    assert graph.products([torch.ones(2).double()]) == [None]


@pytest.mark.parametrize("function", [*HIDING, SineOnce])
def test_functions_in_frozen_parts_do_no_harm(function):
    model = Wavy(function.apply)
    model.first.requires_grad_(False)
    objective = fm.Objective(model, nn.MSELoss(), (X, Y))
    operator = fm.HessianOperator(objective)
    found = operator @ torch.eye(objective.size).double()
    torch.testing.assert_close(found, wavy_hessian(objective), rtol=1e-12, atol=1e-14)
    assert operator.method == "double_backward"


@pytest.mark.parametrize("function", [*HIDING, SineOnce])
def test_functions_before_the_selected_parameters_do_no_harm(function):
    """The derivative by the last layer never goes through them."""
    objective = fm.Objective(Wavy(function.apply), nn.MSELoss(), (X, Y), params="last.*")
    operator = fm.HessianOperator(objective)
    found = operator @ torch.eye(objective.size).double()
    torch.testing.assert_close(found, wavy_hessian(objective), rtol=1e-12, atol=1e-14)
    assert operator.method == "double_backward"


def test_the_module_of_an_operation_used_in_several_is_one_of_them():
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Sequential(nn.Hardsigmoid(), nn.Linear(4, 4)), nn.Linear(4, 2)
    ).double()
    operator = fm.HessianOperator(
        fm.Objective(model, nn.MSELoss(), (X, Y)), method="double_backward"
    )
    with pytest.raises(fm.NotTwiceDifferentiableError) as caught:
        operator @ torch.ones(operator.shape[0]).double()
    assert (caught.value.operation, caught.value.module) == ("hardsigmoid", "1.0")


# --------------------------------------------------------------------------------- weight norm


def by_hand_weight_norm(model, v, g, dim, layer):
    """H in float64 of the squared error, with g v / ‖v‖ written out."""
    names = [n for n, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def loss(theta):
        pieces = torch.split(theta, [s.numel() for s in shapes])
        own = {n: p.view(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
        over = [d for d in range(own[v].dim()) if d != dim]
        length = own[v].square().sum(over, keepdim=True).sqrt()
        weight = own[v] * own[g] / length
        hidden = layer(weight, own["0.bias"])
        return F.mse_loss(hidden.tanh().flatten(1) @ own["3.weight"].T + own["3.bias"], Y)

    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return torch.autograd.functional.hessian(loss, theta)


def legacy(module, dim):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module, dim=dim)


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("form", ["parametrization", "hooks"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_weight_norm_has_its_true_second_derivative(kind, form, dim):
    """PyTorch's own takes the norms for constants."""
    torch.manual_seed(1)
    layer = nn.Linear(3, 4) if kind == "linear" else nn.Conv1d(1, 2, 2)
    wrapped = (
        parametrizations.weight_norm(layer, dim=dim)
        if form == "parametrization"
        else legacy(layer, dim)
    )
    model = nn.Sequential(wrapped, nn.Tanh(), nn.Flatten(), nn.Linear(4, 2)).double()
    inputs = X if kind == "linear" else X[:, None]
    if kind == "linear":
        apply = lambda w, b: F.linear(inputs, w, b)  # noqa: E731
    else:
        apply = lambda w, b: F.conv1d(inputs, w, b)  # noqa: E731
    v, g = (
        ("0.parametrizations.weight.original1", "0.parametrizations.weight.original0")
        if form == "parametrization"
        else ("0.weight_v", "0.weight_g")
    )
    expected = by_hand_weight_norm(model, v, g, dim, apply)
    operator = fm.HessianOperator(fm.Objective(model, nn.MSELoss(), (inputs, Y)))
    found = operator @ torch.eye(operator.shape[0]).double()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert operator.method == "double_backward"


def test_weight_norm_called_as_a_function_is_found_out():
    """Nobody sees it coming, so the operation itself must be recognised."""

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.v, self.g = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.ones(2, 1))

        def forward(self, x):
            return F.linear(x, torch._weight_norm(self.v, self.g, 0)).tanh()

    class Plain(Normed):
        def forward(self, x):
            return F.linear(x, self.v * self.g / self.v.norm(dim=1, keepdim=True)).tanh()

    objective, twin = (fm.Objective(m().double(), nn.MSELoss(), (X, Y)) for m in (Normed, Plain))
    expected = fm.HessianOperator(twin) @ torch.eye(8).double()
    operator = fm.HessianOperator(objective)
    with pytest.warns(fm.FiniteDifferenceWarning, match="weight_norm"):
        assert_good_products(operator, expected)


# ------------------------------------------------------------------------------------- kernels


class Watching(nn.Module):
    """Hands its input on and notes how PyTorch is set."""

    def __init__(self, note=lambda x: flags()):
        super().__init__()
        # Behind a function: what attributes lead to is put back as it was.
        seen = []
        self.box, self.note = (lambda: seen), note

    @property
    def seen(self):
        return self.box()

    def forward(self, x):
        self.seen.append(self.note(x))
        return x


def flags():
    return {
        "cudnn": torch.backends.cudnn.enabled,
        "mkldnn": torch.backends.mkldnn.enabled,
        "math": torch.backends.cuda.math_sdp_enabled(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
    }


def spying(kind):
    class Spying(kind):
        def forward(self, *args, **kwargs):
            spies.append(flags())
            return super().forward(*args, **kwargs)

    spies = []
    return Spying, spies


class ConvolvedRecurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        kind, spies = spying(kind)
        self.box = lambda: spies
        self.before, self.after = Watching(), Watching()
        self.conv = nn.Conv1d(3, 3, 2)
        self.body = kind(3, 4, batch_first=True, num_layers=2)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.before(self.conv(x)).transpose(1, 2)
        return self.head(self.after(self.body(x)[0][:, -1]))

    @property
    def spies(self):
        return self.box()

    def clear(self):
        for seen in (self.spies, self.before.seen, self.after.seen):
            seen.clear()


SERIES = seeded(6, 3, 5).float(), seeded(6, 2, seed=1).float()


def product(objective, **options):
    return fm.HessianOperator(objective, **options) @ torch.ones(objective.size)


CALLS = {
    "loss": lambda o: o.loss(),
    "gradient": lambda o: o.gradient(),
    "differences": lambda o: product(o, method="finite_differences"),
    "product": product,
}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("call", CALLS)
def test_fused_kernels_are_off_inside_recurrent_modules_alone(call, mode, kind):
    model = ConvolvedRecurrent(kind)
    objective = fm.Objective(model, nn.MSELoss(), SERIES, mode=mode)
    outside = flags()
    model.clear()
    CALLS[call](objective)
    plain = call != "product" and mode == "eval"
    for name in ("cudnn", "mkldnn"):
        assert {f[name] for f in model.spies} == {plain}
        assert {f[name] for f in model.before.seen + model.after.seen} == {outside[name]}
    assert model.spies
    assert flags() == outside


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("call", CALLS)
def test_attention_runs_as_plain_mathematics_for_second_derivatives_alone(call, mode):
    model = nn.Sequential(nn.Flatten(), nn.Linear(15, 2), Watching())
    objective = fm.Objective(model, nn.MSELoss(), SERIES, mode=mode)
    outside = flags()
    model[2].seen.clear()
    CALLS[call](objective)
    free = call != "product" and mode == "eval"
    for seen in model[2].seen:
        assert seen["math"]
        assert seen["flash"] == (free and outside["flash"])
        assert seen["efficient"] == (free and outside["efficient"])
        assert not seen["fast path"]
    assert model[2].seen
    assert flags() == outside


def test_a_choice_of_kernels_by_the_user_stays_his(monkeypatch):
    """Outside of exact products, which would fail under it."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    model = nn.Sequential(nn.Flatten(), nn.Linear(15, 2), Watching())
    objective = fm.Objective(model, nn.MSELoss(), SERIES)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        chosen = flags()
        model[2].seen.clear()
        objective.gradient()
        assert model[2].seen == [chosen | {"fast path": False}]
        product(objective)
        assert flags() == chosen


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_kernels_are_put_back_when_a_recurrent_forward_fails(kind):
    model = ConvolvedRecurrent(kind)
    objective = fm.Objective(model, nn.MSELoss(), SERIES)
    product(objective)
    outside = flags()
    model.body.input_size = 7
    with pytest.raises(RuntimeError, match=r"input\.size"):
        product(objective)
    assert flags() == outside
    assert "forward" not in vars(model.body)


def test_lstm_as_a_function_has_exact_products():
    """Called past nn.LSTM, where no module could be switched."""

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            body = self.body
            weights = [body.weight_ih_l0, body.weight_hh_l0, body.bias_ih_l0, body.bias_hh_l0]
            state = (x.new_zeros(1, len(x), 4),) * 2
            output, _, _ = torch.lstm(x, state, weights, True, 1, 0.0, False, False, True)
            return self.head(output[:, -1])

    class Plain(Functional):
        def forward(self, x):
            return self.head(self.body(x)[0][:, -1])

    data = seeded(6, 5, 3), seeded(6, 2, seed=1)
    objective, twin = (fm.Objective(m().double(), nn.MSELoss(), data) for m in (Functional, Plain))
    unit = torch.eye(objective.size).double()
    expected = fm.HessianOperator(twin) @ unit
    operator = fm.HessianOperator(objective)
    torch.testing.assert_close(operator @ unit, expected, rtol=1e-10, atol=1e-12)
    assert operator.method == "double_backward"


# ---------------------------------------------------------------------------- stochastic layers


def dropping():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 16),
        nn.BatchNorm1d(16),
        nn.Dropout(0.5),
        Watching(lambda x: x == 0),
        nn.Linear(16, 2),
    ).double()


def test_masks_are_the_same_at_every_evaluation_of_a_batch():
    model = dropping()
    objective = fm.Objective(model, nn.MSELoss(), (X, Y), mode="train", batch_size=3)
    before = {n: b.clone() for n, b in model.named_buffers()}
    shift = 0.1 * torch.ones(objective.size).double()
    for call in (
        objective.loss,
        objective.gradient,
        lambda: objective.loss_at(shift),
        lambda: objective.value_and_gradient(shift),
        lambda: fm.HessianOperator(objective) @ shift,
        lambda: fm.HessianOperator(objective, method="finite_differences") @ shift,
        lambda: fm.layerwise(objective, trace_products=2, tol=0.5),
        lambda: fm.random_sharpness(objective, samples=1),
    ):
        torch.rand(7)
        call()
    seen = model[3].seen
    assert len(seen) % 3 == 0
    assert len(seen) > 45
    for start in range(0, len(seen), 3):
        for batch in range(3):
            assert torch.equal(seen[start + batch], seen[batch])
    assert not torch.equal(seen[0], seen[1])
    assert 0.3 < torch.cat(seen[:3]).double().mean() < 0.7
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])


def test_training_mode_has_one_function_for_products_and_differences():
    objective = fm.Objective(dropping(), nn.MSELoss(), (X, Y), mode="train", batch_size=3)
    unit = torch.eye(objective.size).double()[:, ::9]
    exact = fm.HessianOperator(objective) @ unit
    operator = fm.HessianOperator(objective, method="finite_differences")
    found = operator @ unit
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-8)
    assert bool(((found - exact).norm(dim=0) <= 10 * operator.error + 1e-12).all())


# ------------------------------------------------------------- small parts and narrow paths


def test_a_small_block_that_is_hidden_is_found_beside_a_large_one():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.big, self.small = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return 30 * self.big(x) ** 2 + HidesSine.apply(self.small(x))

    operator = fm.HessianOperator(fm.Objective(Mixed().double(), nn.MSELoss(), (X, Y)))
    with pytest.warns(fm.FiniteDifferenceWarning, match="HidesSine"):
        operator @ seeded(operator.shape[0])


def test_the_module_named_is_one_that_the_selected_parameters_go_through():
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Hardsigmoid(), nn.Linear(4, 4), nn.Hardsigmoid(), nn.Linear(4, 2)
    ).double()
    objective = fm.Objective(model, nn.MSELoss(), (X, Y), params="2.*")
    with pytest.warns(fm.FiniteDifferenceWarning, match="in the module '3'"):
        fm.HessianOperator(objective) @ seeded(objective.size)


def test_sparse_gradients_are_those_of_dense_ones():
    class Tokens(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            torch.manual_seed(1)
            self.table, self.head = nn.Embedding(7, 3, sparse=sparse), nn.Linear(3, 4)

        def forward(self, ids):
            return self.head(self.table(ids).tanh())

    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(k, (20,), generator=generator) for k in (7, 4)]
    plain, sparse = (
        fm.HessianOperator(fm.Objective(Tokens(s).double(), nn.CrossEntropyLoss(), tuple(data)))
        for s in (False, True)
    )
    v = seeded(plain.shape[0])
    torch.testing.assert_close(sparse @ v, plain @ v, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(sparse.objective.gradient(), plain.objective.gradient())


def test_embeddings_that_renorm_their_rows_are_differentiated():
    """They write to their weight in the forward, after the layer before has saved its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    table = nn.Embedding(5, 2, max_norm=1.0).double()

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.table = model, table

        def forward(self, x):
            return self.body(x).tanh() * self.table(torch.arange(len(x)) % 5)

    objective = fm.Objective(Both(), nn.MSELoss(), (X, Y))
    with torch.no_grad():
        norms = table.weight.norm(dim=1, keepdim=True)
        table.weight.copy_(torch.where(norms > 1, table.weight / (norms + 1e-7), table.weight))
    expected = torch.autograd.grad(F.mse_loss(Both()(X), Y), list(Both().parameters()))
    found = objective.layout.unflatten(objective.gradient())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
