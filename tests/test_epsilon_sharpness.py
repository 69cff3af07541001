"""Keskar's ε-sharpness against maxima known by hand, brute force and random search."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import flatminima as fm
from flatminima.measures import epsilon_sharpness as measure_module
from flatminima.support import vectors as vectors_module
from flatminima.support.vectors import GaussianSubspace
from integrity import untouched
from zoo import build, matrix_with_spectrum, quadratic_case


class Alone(nn.Module):
    """One parameter vector, and a function of it as the loss."""

    def __init__(self, theta: torch.Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta)


def objective_of(function, theta=(0.0, 0.0), dtype=torch.float64) -> fm.Objective:
    model = Alone(torch.tensor(theta, dtype=dtype))
    return fm.Objective(model, data=[torch.zeros(1)], batch_loss=lambda m, batch: function(m.theta))


def half_width(objective: fm.Objective, epsilon: float) -> torch.Tensor:
    """ε (|θ_i| + 1) in float64."""
    return epsilon * (objective.point().double().abs() + 1)


def percentage(gain: float, loss: float) -> float:
    return 100 * gain / (1 + loss)


def linear_objective(n=9, dtype=torch.float64, seed=0) -> fm.Objective:
    """L = gᵀθ with every g_i ≠ 0, small enough that 1 + L > 0."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(n, generator=generator, dtype=torch.float64)
    theta = 0.1 * torch.randn(n, generator=generator, dtype=torch.float64)
    matrix = torch.zeros(n, n, dtype=dtype)
    return quadratic_case(matrix, g.to(dtype), theta.to(dtype)).objective()


def separable_objective(curvature, gradient, theta) -> fm.Objective:
    """1 + Σ g_i (x_i − θ_i) + ½ a_i (x_i − θ_i)², read at x = θ."""
    a, g, t = (torch.tensor(v, dtype=torch.float64) for v in (curvature, gradient, theta))
    return objective_of(lambda x: 1 + g @ (x - t) + 0.5 * a @ (x - t) ** 2, theta)


# ---------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("epsilon", [1e-3, 5e-4, 0.3])
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-10), (torch.float32, 1e-2)])
def test_linear_loss_gives_the_exact_maximum(epsilon, dtype, rel):
    objective = linear_objective(dtype=dtype)
    g = objective.gradient().double()
    exact = float(g.abs() @ half_width(objective, epsilon))
    result = fm.epsilon_sharpness(objective, epsilon=epsilon)
    assert result.value == pytest.approx(percentage(exact, objective.loss()), rel=rel)
    assert result.loss == objective.loss()
    assert (result.epsilon, result.subspace, result.iterations) == (epsilon, None, 10)


def test_default_epsilon_is_the_papers_first():
    objective = linear_objective()
    assert fm.epsilon_sharpness(objective) == fm.epsilon_sharpness(objective, epsilon=1e-3)


@pytest.mark.parametrize(
    ("curvature", "gradient", "theta"),
    [
        ([1.0, 10.0, 100.0], [0.3, -0.2, 0.1], [0.5, -2.0, 0.0]),
        ([0.0, 5.0, 5.0], [1e-6, 1e-6, -1e-6], [1.0, 1.0, 1.0]),
        ([1000.0, 1e-3], [1e-9, 1.0], [0.0, 3.0]),
        ([4.0] * 30, [(-1.0) ** i * 1e-2 for i in range(30)], [0.1 * i for i in range(30)]),
    ],
)
@pytest.mark.parametrize("epsilon", [1e-3, 0.2])
def test_separable_convex_quadratic_gives_the_better_corner_of_each_coordinate(
    curvature, gradient, theta, epsilon
):
    objective = separable_objective(curvature, gradient, theta)
    a, g = torch.tensor(curvature).double(), torch.tensor(gradient).double()
    h = half_width(objective, epsilon)
    exact = float(torch.maximum(0.5 * a * h**2 + g * h, 0.5 * a * h**2 - g * h).sum())
    result = fm.epsilon_sharpness(objective, epsilon=epsilon)
    assert result.value == pytest.approx(percentage(exact, objective.loss()), rel=1e-6)


@pytest.mark.parametrize("epsilon", [1e-3, 0.2])
def test_exactly_stationary_point_of_a_separable_convex_quadratic(epsilon):
    objective = separable_objective([1.0, 3.0, 0.0, 50.0], [0.0] * 4, [0.2, -1.0, 0.0, 4.0])
    assert not objective.gradient().any()
    h = half_width(objective, epsilon)
    exact = float(0.5 * torch.tensor([1.0, 3.0, 0.0, 50.0]).double() @ h**2)
    result = fm.epsilon_sharpness(objective, epsilon=epsilon)
    assert result.value == pytest.approx(percentage(exact, objective.loss()), rel=1e-6)


@pytest.mark.parametrize("epsilon", [1e-3, 0.2])
def test_coordinates_without_a_slope_are_not_forgotten(epsilon):
    # From the centre the gradient shows only the first coordinate.
    objective = separable_objective([1.0, 80.0, 80.0], [0.1, 0.0, 0.0], [1.0, 1.0, 1.0])
    h = half_width(objective, epsilon)
    exact = float(0.5 * torch.tensor([1.0, 80.0, 80.0]).double() @ h**2 + 0.1 * h[0])
    result = fm.epsilon_sharpness(objective, epsilon=epsilon)
    assert result.value == pytest.approx(percentage(exact, objective.loss()), rel=1e-6)


@pytest.mark.parametrize("epsilon", [1e-3, 0.1])
@pytest.mark.parametrize("subspace", [1, 3, 9])
def test_linear_loss_in_a_subspace(subspace, epsilon):
    objective = linear_objective()
    basis = GaussianSubspace(
        objective.size, subspace, seed=4, dtype=torch.float64, device=objective.device
    )
    unit = torch.eye(subspace, dtype=torch.float64)
    a = torch.stack([basis.expand(e) for e in unit], dim=1)
    h = epsilon * ((torch.linalg.pinv(a) @ objective.point()).abs() + 1)
    exact = float((a.T @ objective.gradient()).abs() @ h)
    result = fm.epsilon_sharpness(objective, epsilon=epsilon, subspace=subspace, seed=4)
    assert result.value == pytest.approx(percentage(exact, objective.loss()), rel=1e-8)
    assert result.subspace == subspace


def grid_maximum(objective: fm.Objective, h: torch.Tensor, points: int) -> float:
    axes = [torch.linspace(-1, 1, points, dtype=torch.float64) * w for w in h]
    return max(
        objective.loss_at(torch.stack(z).to(objective.dtype)) for z in itertools.product(*axes)
    )


def two_parameters(seed: int) -> fm.Objective:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(1, 1, generator=generator))
    x = torch.randn(12, 1, generator=generator, dtype=torch.float64)
    y = torch.randn(12, 1, generator=generator, dtype=torch.float64)
    return fm.Objective(model.double(), nn.MSELoss(), (x, y))


@pytest.mark.parametrize("epsilon", [1e-3, 0.1])
@pytest.mark.parametrize("seed", range(6))
def test_two_parameters_against_a_grid_over_the_box(seed, epsilon):
    objective = two_parameters(seed)
    brute = grid_maximum(objective, half_width(objective, epsilon), 31)
    result = fm.epsilon_sharpness(objective, epsilon=epsilon)
    gain = brute - result.loss
    assert result.maximum >= brute - 1e-9 * gain
    assert result.maximum <= brute + 0.1 * gain, "no grid point is near the maximum found"


@pytest.mark.parametrize("seed", range(2))
def test_three_parameters_of_an_indefinite_quadratic_against_a_grid(seed):
    matrix = matrix_with_spectrum([3.0, -1.0, 0.5], seed, torch.float64)
    linear = torch.tensor([0.02, -0.01, 0.03], dtype=torch.float64)
    objective = quadratic_case(matrix, linear).objective()
    brute = grid_maximum(objective, half_width(objective, 0.1), 9)
    result = fm.epsilon_sharpness(objective, epsilon=0.1)
    assert result.maximum >= brute - 1e-9


# ---------------------------------------------------------------------------- random search


def small_net(seed: int, dtype=torch.float64) -> tuple[fm.Objective, list[nn.Parameter]]:
    activation = (nn.Tanh(), nn.GELU(), nn.Sigmoid(), nn.ReLU())[seed % 4]
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 3)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator))
    x = torch.randn(24, 3, generator=generator).to(dtype)
    y = (x @ torch.randn(3, 3, generator=generator).to(dtype)).argmax(dim=1)
    y[:4] = torch.randint(3, (4,), generator=generator)
    return fm.Objective(model, nn.CrossEntropyLoss(), (x, y)), list(model.parameters())


def descend(objective: fm.Objective, parameters: list[nn.Parameter], steps: int) -> None:
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(steps):
        pieces = objective.layout.unflatten(objective.gradient())
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.clone()
        optimizer.step()


def regression_at_its_minimum() -> fm.Objective:
    """Linear regression solved exactly: the gradient is rounding alone."""
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(30, 2, generator=generator, dtype=torch.float64)
    model = nn.Linear(4, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    return fm.Objective(model, nn.MSELoss(), (x, y))


def exactly_stationary() -> fm.Objective:
    matrix = matrix_with_spectrum([5.0, 2.0, 1.0, 0.3, 0.1, 0.0, 0.0], 9, torch.float64)
    return quadratic_case(matrix).objective()


def saddle() -> fm.Objective:
    matrix = matrix_with_spectrum([5.0, 2.0, 1.0, -0.3, -1.0, -4.0], 10, torch.float64)
    return quadratic_case(matrix).objective()


def trained(seed: int, steps: int) -> fm.Objective:
    objective, parameters = small_net(seed)
    descend(objective, parameters, steps)
    return objective


PROBLEMS = {
    "linear regression": lambda: build("linear_regression").objective(),
    "softmax regression": lambda: build("softmax_regression").objective(),
    "quadratic": lambda: build("quadratic").objective(),
    "batch norm": lambda: build("mlp_batch_norm_dropout").objective(),
    "tied weights": lambda: build("tied_weights").objective(),
    "partly frozen": lambda: build("partly_frozen").objective(),
    "exactly stationary": exactly_stationary,
    "saddle": saddle,
    **{f"net {s} at its start": lambda s=s: small_net(s)[0] for s in range(4)},
    **{f"net {s} trained": lambda s=s: trained(s, 300) for s in range(8)},
}


@pytest.fixture(scope="module")
def problem():
    """Problems by name, each built once."""
    made: dict[str, fm.Objective] = {}

    def get(name: str) -> fm.Objective:
        if name not in made:
            made[name] = PROBLEMS[name]()
        return made[name]

    return get


def random_points(h: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """100 points of the box and 100 of its corners."""
    generator = torch.Generator().manual_seed(seed)
    cube = 2 * torch.rand(200, len(h), generator=generator, dtype=torch.float64) - 1
    cube[100:] = cube[100:].sign()
    return list((cube * h).unbind())


@pytest.mark.parametrize("epsilon", [1e-3, 5e-4])
@pytest.mark.parametrize("name", PROBLEMS)
def test_no_random_point_of_the_box_lies_higher(name, epsilon, problem):
    objective = problem(name)
    result = fm.epsilon_sharpness(objective, epsilon=epsilon)
    points = random_points(half_width(objective, epsilon), 1)
    best = max(objective.loss_at(z) for z in points)
    assert result.maximum >= best - 1e-15
    assert result.value >= 0


@pytest.mark.parametrize("epsilon", [1e-3, 5e-4])
@pytest.mark.parametrize("name", PROBLEMS)
def test_no_random_point_of_the_box_in_a_subspace_lies_higher(name, epsilon, problem):
    objective = problem(name)
    p = min(5, objective.size)
    basis = GaussianSubspace(
        objective.size, p, seed=2, dtype=objective.dtype, device=objective.device
    )
    h = epsilon * (basis.coordinates(objective.point()).abs() + 1)
    result = fm.epsilon_sharpness(objective, epsilon=epsilon, subspace=p, seed=2)
    best = max(objective.loss_at(basis.expand(z)) for z in random_points(h, 3))
    assert result.maximum >= best - 1e-15
    assert result.value >= 0


def test_exact_minimum_gives_the_best_of_all_corners():
    # A convex function is largest at a corner; here nearly every corner is a local maximum.
    objective = regression_at_its_minimum()
    h = half_width(objective, 1e-3)
    corners = itertools.product((-1.0, 1.0), repeat=objective.size)
    best = max(objective.loss_at(h * torch.tensor(c, dtype=torch.float64)) for c in corners)
    result = fm.epsilon_sharpness(objective)
    assert result.maximum == pytest.approx(best, rel=1e-14)


def regression(n: int, steps: int) -> fm.Objective:
    """Linear regression with n parameters after some steps of gradient descent."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(40, n, generator=generator, dtype=torch.float64)
    y = torch.randn(40, 1, generator=generator, dtype=torch.float64)
    objective = fm.Objective(nn.Linear(n, 1, bias=False).double(), nn.MSELoss(), (x, y))
    with torch.no_grad():
        objective.model.weight.copy_(torch.randn(1, n, generator=generator).double())
        for _ in range(steps):
            objective.model.weight -= 0.1 * objective.gradient()
    return objective


@pytest.mark.parametrize("n", [3, 7, 12])
@pytest.mark.parametrize("steps", [0, 20, 300])
def test_few_parameters_reach_the_best_of_all_corners(n, steps):
    objective = regression(n, steps)
    h = half_width(objective, 1e-3)
    hessian = fm.HessianOperator(objective).to_dense(progress=False)
    corners = h * torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n)), dtype=torch.float64)
    rises = corners @ objective.gradient() + 0.5 * ((corners @ hessian) * corners).sum(1)
    result = fm.epsilon_sharpness(objective)
    assert result.value == pytest.approx(100 * float(rises.max()) / (1 + result.loss), rel=1e-7)


@pytest.mark.parametrize("n", [10, 30, 64])
@pytest.mark.parametrize("steps", [0, 300])
def test_few_parameters_take_few_more_evaluations(n, steps, monkeypatch):
    objective = regression(n, steps)
    found = fm.epsilon_sharpness(objective)
    monkeypatch.setattr(measure_module, "FEW_PARAMETERS", 0)
    without = fm.epsilon_sharpness(objective)
    assert found.value >= without.value
    assert without.evaluations <= found.evaluations <= without.evaluations + n + 5
    if steps == 0:
        # The rise is nearly linear: there is nothing to look for.
        assert found.evaluations == without.evaluations


@pytest.mark.parametrize("epsilon", [1e-3, 5e-4])
def test_what_is_left_of_the_iterations_is_spent_on_other_corners(epsilon, monkeypatch):
    monkeypatch.setattr(measure_module, "FEW_PARAMETERS", 0)
    # At a minimum a start ends after an iteration or two, in an arbitrary local maximum.
    objective = exactly_stationary()
    first = fm.epsilon_sharpness(objective, epsilon=epsilon, iterations=1)
    ten = fm.epsilon_sharpness(objective, epsilon=epsilon, iterations=10)
    assert ten.evaluations >= 11
    assert ten.value > first.value > 0


# ------------------------------------------------------------------- what the result promises


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [1e-3, 5e-4, 0.37])
@pytest.mark.parametrize("seed", range(4))
def test_maximiser_lies_in_the_box_exactly(seed, epsilon, dtype):
    objective, _ = small_net(seed, dtype)
    result = fm.epsilon_sharpness(objective, epsilon=epsilon, return_displacement=True, restarts=1)
    assert result.displacement.dtype == dtype
    assert bool((result.displacement.double().abs() <= half_width(objective, epsilon)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_box_widths_are_the_largest_that_fit(dtype):
    objective, _ = small_net(0, dtype)
    widths = measure_module._half_width(1e-3, objective.point())
    exact = half_width(objective, 1e-3)
    above = torch.nextafter(widths, torch.full_like(widths, math.inf))
    assert bool((widths.double() <= exact).all())
    assert bool((above.double() > exact).all())


@pytest.fixture
def maxima(monkeypatch):
    """Every box with the point found in it, in the coordinates of the search."""
    seen = []
    original = measure_module.maximize_over_box

    def watched(function, width, **options):
        found = original(function, width, **options)
        seen.append((width, found.point))
        return found

    monkeypatch.setattr(measure_module, "maximize_over_box", watched)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [1e-3, 0.37])
def test_maximiser_in_a_subspace_lies_in_the_box_exactly(epsilon, dtype, maxima):
    objective, _ = small_net(1, dtype)
    options = {"epsilon": epsilon, "subspace": 6, "seed": 3}
    result = fm.epsilon_sharpness(objective, return_displacement=True, **options)
    ((_, point),) = maxima
    basis = GaussianSubspace(objective.size, 6, seed=3, dtype=dtype, device=objective.device)
    widths = epsilon * (basis.coordinates(objective.point()).abs() + 1)
    assert bool((point.double().abs() <= widths).all())
    assert bool(point.any())
    assert torch.equal(result.displacement, basis.expand(point))


@pytest.mark.parametrize("subspace", [None, 4])
@pytest.mark.parametrize("seed", range(4))
def test_maximum_is_the_loss_at_the_displacement(seed, subspace):
    objective, _ = small_net(seed)
    result = fm.epsilon_sharpness(objective, subspace=subspace, return_displacement=True)
    assert objective.loss_at(result.displacement) == pytest.approx(result.maximum, rel=1e-14)
    assert result.value == percentage(result.maximum - result.loss, result.loss)


def test_displacement_is_left_out_unless_asked_for():
    assert fm.epsilon_sharpness(linear_objective()).displacement is None


@pytest.fixture
def calls(monkeypatch):
    """Counts evaluations of loss and gradient."""
    count = [0]
    original = fm.Objective.value_and_gradient

    def counted(self, displacement=None):
        count[0] += 1
        return original(self, displacement)

    monkeypatch.setattr(fm.Objective, "value_and_gradient", counted)
    return count


@pytest.mark.parametrize("options", [{}, {"subspace": 4}, {"restarts": 3}, {"iterations": 1}])
@pytest.mark.parametrize("name", ["quadratic", "net 0 trained", "exactly stationary", "saddle"])
def test_evaluations_are_counted_exactly(name, options, problem, calls):
    objective = problem(name)
    calls[0] = 0
    result = fm.epsilon_sharpness(objective, **options)
    assert result.evaluations == calls[0] >= 2


def test_more_restarts_never_give_less(problem):
    objective = problem("net 1 trained")
    values = [fm.epsilon_sharpness(objective, restarts=r).value for r in (0, 1, 4)]
    assert values == sorted(values)


def test_more_iterations_reach_higher(problem):
    objective = problem("net 2 at its start")
    few = fm.epsilon_sharpness(objective, epsilon=0.5, iterations=1)
    many = fm.epsilon_sharpness(objective, epsilon=0.5, iterations=100)
    assert many.value > few.value
    assert many.evaluations > few.evaluations


@pytest.mark.parametrize("name", ["softmax regression", "linear regression"])
def test_value_grows_with_epsilon_on_a_convex_problem(name, problem):
    epsilons = np.geomspace(1e-5, 0.3, 12).tolist()
    values = [fm.epsilon_sharpness(problem(name), epsilon=e).value for e in epsilons]
    assert all(a < b for a, b in itertools.pairwise(values))


# ----------------------------------------------------------------------------------- outcomes


@pytest.mark.parametrize("subspace", [None, 1])
def test_flat_loss_has_no_ascent(subspace):
    result = fm.epsilon_sharpness(objective_of(lambda t: 0 * t.sum() + 3.0), subspace=subspace)
    assert result.outcome is fm.Outcome.NO_ASCENT
    assert (result.value, result.loss, result.maximum) == (0.0, 3.0, 3.0)


@pytest.mark.parametrize("subspace", [None, 2])
def test_top_of_a_hill_has_no_ascent_and_a_zero_displacement(subspace):
    objective = objective_of(lambda t: 2 - (t * t).sum())
    result = fm.epsilon_sharpness(objective, subspace=subspace, return_displacement=True)
    assert result.outcome is fm.Outcome.NO_ASCENT
    assert result.value == 0.0
    assert not result.displacement.any()


def test_iteration_limit_is_told(monkeypatch):
    monkeypatch.setattr(measure_module, "FEW_PARAMETERS", 0)
    result = fm.epsilon_sharpness(build("conv_batch_norm").objective(), epsilon=0.1, iterations=2)
    assert result.outcome is fm.Outcome.ITERATION_LIMIT


@pytest.mark.parametrize("beyond", [math.nan, math.inf])
def test_loss_that_is_not_finite_inside_the_box_is_told_and_the_value_stays_finite(beyond):
    def wall(t):
        total = t.sum()
        return torch.where(total > 0.05, total + beyond, total)

    result = fm.epsilon_sharpness(objective_of(wall), epsilon=0.1, return_displacement=True)
    assert result.outcome is fm.Outcome.UNBOUNDED
    assert math.isfinite(result.value)
    assert math.isfinite(result.maximum)
    assert result.value >= 0


def test_gradient_that_is_not_finite_inside_the_box_is_told():
    objective = objective_of(lambda t: -(0.1 - t[0]).clamp(min=0).sqrt() - (t[1] ** 2))
    result = fm.epsilon_sharpness(objective, epsilon=0.1)
    assert result.outcome is fm.Outcome.UNBOUNDED
    assert math.isfinite(result.value)


def test_gain_within_rounding_is_told():
    objective = objective_of(lambda t: 1e4 + 1e-3 * t.sum(), dtype=torch.float32)
    result = fm.epsilon_sharpness(objective, epsilon=0.5)
    assert result.outcome in (fm.Outcome.BELOW_ROUNDING, fm.Outcome.NO_ASCENT)
    assert result.value >= 0


def test_one_unit_in_the_last_place_is_called_rounding():
    step = 2.0**-23
    objective = objective_of(lambda t: 1 + step * (t.sum() > 0) + 0 * t.sum(), dtype=torch.float32)
    result = fm.epsilon_sharpness(objective, epsilon=0.5, restarts=5)
    assert result.maximum == 1 + step
    assert result.outcome is fm.Outcome.BELOW_ROUNDING


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("loss", [-1.0, -5.0])
def test_loss_at_or_below_minus_one_is_refused(loss):
    objective = objective_of(lambda t: t.sum() + loss)
    with pytest.raises(fm.InvalidArgumentError, match=r"divides by 1 \+ L\(θ\)"):
        fm.epsilon_sharpness(objective)


@pytest.mark.parametrize("epsilon", [0.0, -1e-3, math.nan, math.inf])
def test_epsilon_that_is_not_positive_and_finite_is_refused(epsilon):
    with pytest.raises(fm.InvalidArgumentError, match="'epsilon' argument of epsilon_sharpness"):
        fm.epsilon_sharpness(linear_objective(), epsilon=epsilon)


@pytest.mark.parametrize("subspace", [0, -2, 10])
def test_subspace_outside_one_to_n_is_refused(subspace):
    with pytest.raises(fm.InvalidArgumentError, match=r"'subspace' .* integer from 1 to 9"):
        fm.epsilon_sharpness(linear_objective(), subspace=subspace)


@pytest.mark.parametrize(
    ("argument", "value"), [("iterations", 0), ("iterations", -1), ("restarts", -1)]
)
def test_counts_too_small_are_refused(argument, value):
    with pytest.raises(fm.InvalidArgumentError, match=f"'{argument}' argument"):
        fm.epsilon_sharpness(linear_objective(), **{argument: value})


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("epsilon", "1e-3"),
        ("epsilon", None),
        ("subspace", 2.0),
        ("iterations", 10.0),
        ("restarts", None),
        ("seed", "0"),
    ],
)
def test_arguments_of_another_type_are_refused(argument, value):
    options = {"subspace": 2, argument: value}
    with pytest.raises(fm.ArgumentTypeError, match=f"'{argument}' argument"):
        fm.epsilon_sharpness(linear_objective(), **options)


def test_model_in_place_of_an_objective_is_refused_with_advice():
    with pytest.raises(fm.ArgumentTypeError, match=r"fm\.Objective\(model, loss_fn, data\)"):
        fm.epsilon_sharpness(nn.Linear(2, 1))


def test_loss_that_is_not_finite_at_the_model_raises():
    with pytest.raises(fm.NonFiniteError, match="batch 0"):
        fm.epsilon_sharpness(objective_of(lambda t: t.sum() * math.nan))


# --------------------------------------------------------------------- repetition, side effects


@pytest.mark.parametrize("options", [{}, {"subspace": 4}, {"restarts": 2}])
@pytest.mark.parametrize("name", ["net 0 trained", "exactly stationary"])
def test_same_seed_gives_the_same_bits(name, options, problem):
    options = {"return_displacement": True, "seed": 7, **options}
    objective = problem(name)
    first = fm.epsilon_sharpness(objective, **options)
    again = fm.epsilon_sharpness(objective, **options)
    assert first == again
    assert torch.equal(first.displacement, again.displacement)


def test_seed_chooses_the_subspace():
    objective = linear_objective()
    values = {fm.epsilon_sharpness(objective, subspace=3, seed=s).value for s in range(4)}
    assert len(values) == 4


def test_generator_as_seed_is_used_and_moves_on():
    objective = linear_objective()
    generator = torch.Generator().manual_seed(7)
    first = fm.epsilon_sharpness(objective, subspace=3, seed=generator)
    second = fm.epsilon_sharpness(objective, subspace=3, seed=generator)
    assert first == fm.epsilon_sharpness(
        objective, subspace=3, seed=torch.Generator().manual_seed(7)
    )
    assert first != second


@pytest.mark.parametrize("options", [{}, {"subspace": 4, "restarts": 1}])
def test_model_data_and_random_states_are_untouched(options):
    case = build("mlp_batch_norm_dropout", torch.float32)
    case.model.train()
    with untouched(case.model, case.batches):
        fm.epsilon_sharpness(case.objective(), **options)


def test_model_is_untouched_when_the_loss_raises_in_the_middle():
    case = build("mlp_batch_norm_dropout", torch.float32)
    count = [0]

    def failing(output, target):
        count[0] += 1
        if count[0] > 7:
            raise RuntimeError("in the middle")
        return nn.functional.cross_entropy(output, target)

    objective = case.objective(loss_fn=failing)
    with untouched(case.model, case.batches), pytest.raises(RuntimeError, match="in the middle"):
        fm.epsilon_sharpness(objective)


# ------------------------------------------------------------------------------- the subspace


def subspace(n=50, p=6, **options) -> GaussianSubspace:
    options = {"seed": 5, "dtype": torch.float64, "device": torch.device("cpu"), **options}
    return GaussianSubspace(n, p, **options)


def dense(basis: GaussianSubspace) -> torch.Tensor:
    unit = torch.eye(basis.dimension, dtype=torch.float64)
    return torch.stack([basis.expand(e) for e in unit], dim=1).double()


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of eight rows at p = 6, so that A takes several."""
    monkeypatch.setattr(vectors_module.GaussianSubspace, "BLOCK_ENTRIES", 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_made_anew_equal_blocks_kept(small_blocks, dtype):
    kept, anew = subspace(dtype=dtype), subspace(dtype=dtype, budget=1)
    assert kept._kept is not None
    assert anew._kept is None
    z, v = torch.linspace(-1, 1, 6).double(), torch.linspace(-2, 3, 50).sin().to(dtype)
    assert torch.equal(kept.expand(z), anew.expand(z))
    assert torch.equal(kept.project(v), anew.project(v))
    assert torch.equal(kept.coordinates(v), anew.coordinates(v))


def test_blocks_made_anew_are_never_held_together(small_blocks, monkeypatch):
    basis = subspace(n=50, budget=1)
    sizes = []
    original = torch.randn

    def watched(*arguments, **options):
        made = original(*arguments, **options)
        sizes.append((made.numel(), made.dtype))
        return made

    monkeypatch.setattr(torch, "randn", watched)
    basis.coordinates(torch.ones(50, dtype=torch.float64))
    assert {dtype for _, dtype in sizes} == {torch.float32}
    assert max(size for size, _ in sizes) <= 48
    held = [v for v in vars(basis).values() if isinstance(v, torch.Tensor | list)]
    assert held == []


def test_kept_blocks_are_float32(small_blocks):
    assert {b.dtype for b in subspace()._kept} == {torch.float32}


@pytest.mark.parametrize("p", [1, 6, 50])
def test_coordinates_are_those_of_the_pseudo_inverse(small_blocks, p):
    basis = subspace(p=p)
    theta = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.linalg.pinv(dense(basis)) @ theta
    torch.testing.assert_close(basis.coordinates(theta), expected, rtol=1e-8, atol=1e-10)


def test_project_is_the_transpose_of_expand(small_blocks):
    basis = subspace()
    z = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    v = torch.randn(50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    a = dense(basis)
    torch.testing.assert_close(basis.expand(z), a @ z)
    torch.testing.assert_close(basis.project(v), a.T @ v)


def test_entries_are_independent_standard_normal():
    a = dense(subspace(n=4000, p=5))
    assert abs(float(a.mean())) < 4 / math.sqrt(a.numel())
    assert float(a.var()) == pytest.approx(1, abs=4 * math.sqrt(2 / a.numel()))
    gram = a.T @ a / 4000
    assert float((gram - torch.eye(5)).abs().max()) < 5 * math.sqrt(2 / 4000)


def test_seed_decides_the_entries():
    assert torch.equal(dense(subspace(seed=1)), dense(subspace(seed=1)))
    assert not torch.equal(dense(subspace(seed=1)), dense(subspace(seed=2)))
