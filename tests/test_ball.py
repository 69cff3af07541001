"""Ascent in a ball against the exact trust-region maximum, all corners, and what it may cost."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import flatminima as fm
from flatminima.algorithms.optimize.ball import BallMaximum, maximize_over_ball
from zoo import matrix_with_spectrum

DOUBLE = torch.float64
CPU = torch.device("cpu")
INF = math.inf
Outcome = fm.Outcome

# ------------------------------------------------------------------------- problems and oracles


def exact_trust_region(matrix: torch.Tensor, gradient: torch.Tensor, radius: float) -> float:
    """The maximum of gᵀδ + δᵀAδ / 2 over ‖δ‖₂ ≤ ρ, from all eigenpairs, in float64.

    On the boundary δ = (μ − A)⁻¹ g with μ ≥ λ₁ and ‖δ‖ = ρ; where g has nothing along the top
    eigenvectors and that is too short for every μ > λ₁, they fill it up (the hard case).
    """
    spectrum, vectors = torch.linalg.eigh(matrix.to(DOUBLE))
    linear = vectors.T @ gradient.to(DOUBLE)
    size, top = float(linear.norm()), float(spectrum[-1])
    tiny = 1e-14 * max(size, radius * float(spectrum.abs().max()))

    def gain(x: torch.Tensor) -> float:
        return float(linear @ x + 0.5 * (spectrum * x * x).sum())

    if top < 0 and float((linear / spectrum).norm()) <= radius:
        return gain(-linear / spectrum)
    below = spectrum < top - 1e-12 * max(1.0, abs(top))
    if top >= 0 and float(linear[~below].norm()) <= tiny:
        x = torch.where(below, linear, 0.0) / torch.where(below, top - spectrum, 1.0)
        missing = radius**2 - float(x @ x)
        if missing >= 0:
            x[-1] = math.sqrt(missing)
            return gain(x)
    low, high = max(top, 0.0), max(top, 0.0) + size / radius
    for _ in range(200):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        too_long = float((linear / (middle - spectrum)).norm()) > radius
        low, high = (middle, high) if too_long else (low, middle)
    x = linear / (high - spectrum)
    return gain(x * (radius / x.norm()))


def quadratic(matrix: torch.Tensor, gradient: torch.Tensor, start: float = 0.0):
    """δ → start + gᵀδ + δᵀAδ / 2 and its gradient."""

    def both(x: torch.Tensor):
        product = matrix @ x
        return start + float(gradient @ x + 0.5 * (x @ product)), product + gradient

    return both


def linear(gradient: torch.Tensor, start: float = 0.0):
    return lambda x: (start + float(gradient @ x), gradient.clone())


def maximized(function, size: int, **settings) -> BallMaximum:
    defaults = {
        "dtype": DOUBLE,
        "device": CPU,
        "radius": 1.0,
        "norm": 2,
        "steps": 20,
        "on_evaluation": lambda best: None,
    }
    return maximize_over_ball(function, size, **(defaults | settings))


def fixed_steps(function, size: int, steps: int, norm: float = 2) -> float:
    """The gain of projected ascent with a fixed step of 2.5 / steps, in the unit ball."""
    x = torch.zeros(size, dtype=DOUBLE)
    start, gradient = function(x)
    best = start
    for _ in range(steps):
        x = x + 2.5 / steps * (gradient / gradient.norm() if norm == 2 else gradient.sign())
        x = x / max(1.0, float(x.norm())) if norm == 2 else x.clamp(-1, 1)
        value, gradient = function(x)
        best = max(best, value)
    return best - start


def draws(seed: int, *shape: int, dtype: torch.dtype = DOUBLE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=DOUBLE).to(dtype)


def spectrum_of(kind: str, n: int, seed: int) -> torch.Tensor:
    noise = draws(seed, n)
    if kind == "indefinite":
        return noise / 2
    if kind == "positive":
        return noise.exp()
    if kind == "concave":
        return -(noise / 2).exp()
    bulk = 0.05 * noise.abs() * torch.where(draws(seed + 1, n) < -0.5, -1.0, 1.0)
    bulk[:8] = torch.logspace(0, math.log10(50), 8, dtype=DOUBLE)
    return bulk


# What the gradient at the centre is, relative to the largest curvature.
SLOPES = (1e-3, 0.1, 1.0, 10.0)
KINDS = {"network": 1e-5, "positive": 0.02, "concave": 0.01, "indefinite": 0.15}
"""The largest share of the exact maximum that may be missed after 20 steps."""


def problems(kind: str):
    for n, seed, slope in itertools.product((20, 100), range(3), SLOPES):
        spectrum = spectrum_of(kind, n, 10 * n + seed)
        matrix = matrix_with_spectrum(spectrum.tolist(), seed, DOUBLE)
        direction = draws(seed + 100, n)
        yield matrix, direction * (slope * float(spectrum.abs().max()) / direction.norm())


# --------------------------------------------------------------------------------- the oracle


def test_oracle_agrees_with_a_fine_grid_and_with_the_hard_case():
    angle = torch.linspace(0, 2 * math.pi, 20001, dtype=DOUBLE)
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    disc = torch.cat([r * circle[::20] for r in torch.linspace(0, 1, 301)] + [circle])
    for seed in range(12):
        values = draws(seed, 2) - (2 if seed % 3 == 0 else 0)
        matrix, gradient = matrix_with_spectrum(values.tolist(), seed, DOUBLE), draws(seed + 50, 2)
        grid = float((disc * 1.5 @ gradient + 1.125 * ((disc @ matrix) * disc).sum(1)).max())
        assert exact_trust_region(matrix, gradient, 1.5) == pytest.approx(grid, abs=1e-4)
    matrix = torch.diag(torch.tensor([1.0, 2.0]))
    # δ = (1, ±√3), and without any gradient λ₁ ρ² / 2.
    assert exact_trust_region(matrix, torch.tensor([1.0, 0.0]), 2.0) == pytest.approx(4.5)
    assert exact_trust_region(matrix, torch.zeros(2), 3.0) == pytest.approx(9.0)
    assert exact_trust_region(-matrix, torch.zeros(2), 3.0) == 0.0


# ------------------------------------------------------------------------------- linear functions


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("norm", [2, INF])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("steps", [1, 20])
def test_linear_function_rises_by_the_dual_norm(norm, scaled, steps, dtype):
    n, radius = 50, 0.3
    gradient = draws(0, n, dtype=dtype)
    scale = draws(1, n, dtype=dtype).abs()
    scale[::3] = 0.0
    slope = (gradient * scale if scaled else gradient).double()
    expected = radius * float(slope.norm() if norm == 2 else slope.abs().sum())
    found = maximized(
        linear(gradient, 7.0),
        n,
        scale=scale if scaled else None,
        radius=radius,
        norm=norm,
        steps=steps,
        dtype=dtype,
    )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    assert found.start == 7.0
    assert found.first_order == pytest.approx(expected, rel=tolerance)
    assert found.value - found.start == pytest.approx(expected, rel=tolerance)
    assert found.outcome is (Outcome.COMPLETED if steps == 1 else Outcome.STATIONARY)
    assert found.gradients == 2, "one point cannot be improved on"
    if norm == 2:
        direction = slope * (scale.double() if scaled else 1.0) / slope.norm()
    else:
        direction = slope.sign() * (scale.double() if scaled else 1.0)
    torch.testing.assert_close(found.point.double(), radius * direction, rtol=1e-5, atol=1e-7)
    assert found.point.dtype == dtype
    if scaled:
        assert not found.point[::3].any()


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("norm", [2, INF])
@pytest.mark.parametrize("size", [1e-30, 1e-25, 1e25])
def test_tiny_and_huge_gradients_keep_their_direction(norm, size, dtype):
    direction = draws(3, 40)
    gradient = (direction * size).to(dtype)

    def function(x):  # in float64, as the products would vanish
        return float(gradient.double() @ x.double()), gradient.clone()

    found = maximized(function, 40, norm=norm, dtype=dtype)
    expected = direction.norm() if norm == 2 else direction.abs().sum()
    assert found.first_order == pytest.approx(float(expected) * size, rel=1e-5)
    assert found.value == pytest.approx(found.first_order, rel=1e-5)
    assert found.outcome is Outcome.STATIONARY


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_tiny_gradient_beside_a_large_curvature(sign, dtype):
    n = 30
    matrix = matrix_with_spectrum((sign * spectrum_of("positive", n, 5)).tolist(), 0, dtype)
    gradient = draws(6, n, dtype=dtype) * 1e-25
    found = maximized(quadratic(matrix, gradient), n, dtype=dtype, steps=40)
    assert torch.isfinite(found.point).all()
    assert found.outcome is not Outcome.UNBOUNDED
    exact = exact_trust_region(matrix, gradient, 1.0)
    if sign > 0:
        assert found.value == pytest.approx(exact, rel=1e-3)
    else:
        assert 0 <= found.value <= exact * (1 + 1e-4)


# ------------------------------------------------------------------------------ quadratics, p = 2


@pytest.mark.parametrize("kind", KINDS)
def test_quadratics_are_maximised(kind):
    gaps = []
    for matrix, gradient in problems(kind):
        function = quadratic(matrix, gradient)
        exact = exact_trust_region(matrix, gradient, 1.0)
        found = maximized(function, len(gradient))
        assert found.value <= exact * (1 + 1e-9)
        assert found.value == pytest.approx(function(found.point)[0], rel=1e-12)
        assert float(found.point.norm()) <= 1 + 1e-14
        gaps.append(1 - found.value / exact)
    assert max(gaps) < KINDS[kind]
    assert sum(gaps) / len(gaps) < KINDS[kind] / 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [5, 10, 20])
def test_adaptive_step_is_better_than_a_fixed_one(kind, steps):
    adaptive, fixed = [], []
    for matrix, gradient in problems(kind):
        function = quadratic(matrix, gradient)
        exact = exact_trust_region(matrix, gradient, 1.0)
        adaptive.append(1 - maximized(function, len(gradient), steps=steps).value / exact)
        fixed.append(1 - fixed_steps(function, len(gradient), steps) / exact)
    # Where the curvature along a tiny gradient is negative, five steps do not leave the centre.
    factor = 1.3 if (kind, steps) == ("indefinite", 5) else 0.4
    assert sum(adaptive) < factor * sum(fixed)


def test_more_steps_are_better():
    def gain(steps):
        return sum(
            maximized(quadratic(*problem), len(problem[1]), steps=steps).value
            / exact_trust_region(*problem, 1.0)
            for kind in KINDS
            for problem in problems(kind)
        )

    gains = [gain(steps) for steps in (1, 2, 5, 10, 20, 40)]
    assert gains == sorted(gains)
    assert gains[0] < 0.8 * gains[-1]


@pytest.mark.parametrize("norm", [2, INF])
def test_scale_and_radius_are_a_change_of_coordinates(norm):
    n, radius = 25, 0.05
    matrix, gradient = next(iter(problems("network")))
    matrix, gradient = matrix[:n, :n], gradient[:n]
    n = len(gradient)
    scale = draws(8, n).exp()
    plain = maximized(quadratic(matrix, gradient), n, norm=norm)
    width = radius * scale
    moved = quadratic(matrix / width[:, None] / width, gradient / width)
    found = maximized(moved, n, scale=scale, radius=radius, norm=norm)
    assert found.value == pytest.approx(plain.value, rel=1e-6)
    torch.testing.assert_close(found.point, plain.point * width, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("norm", [2, INF])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_still_coordinates_do_not_move_and_the_point_is_in_the_ball(norm, dtype):
    n, radius = 60, 0.02
    matrix = matrix_with_spectrum(spectrum_of("indefinite", n, 2).tolist(), 0, dtype)
    scale = draws(4, n, dtype=dtype).abs()
    scale[::4] = 0.0
    points = []

    def function(x):
        points.append(x.clone())
        return quadratic(matrix, 1e-3 * draws(5, n, dtype=dtype))(x)

    found = maximized(
        function, n, scale=scale, radius=radius, norm=norm, dtype=dtype, restarts=2, steps=3
    )
    assert found.value > found.start
    seen = torch.stack(points)[:, scale > 0].double() / scale[scale > 0].double()
    on_boundary = torch.linalg.vector_norm(seen, norm, dim=1) > radius * (1 - 1e-5)
    assert found.gradients == 1 + 3 * 3
    assert on_boundary[[1, 4, 7]].all(), "the first point of each start"
    for point in [*points, found.point]:
        assert torch.isfinite(point).all()
        assert not point[::4].any()
        u = point.double()[scale > 0] / scale.double()[scale > 0]
        length = float(torch.linalg.vector_norm(u, norm))
        assert length <= radius * (1 + 8 * torch.finfo(dtype).eps)


# --------------------------------------------------------------------------- quadratics, p = ∞


def test_cube_against_all_corners():
    gaps, fixed = [], []
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=10)), dtype=DOUBLE)
    for seed, slope in itertools.product(range(8), SLOPES):
        spectrum = spectrum_of("positive", 10, seed)
        matrix = matrix_with_spectrum(spectrum.tolist(), seed, DOUBLE)
        gradient = draws(seed + 100, 10) * slope * float(spectrum.max())
        exact = float((corners @ gradient + 0.5 * ((corners @ matrix) * corners).sum(1)).max())
        function = quadratic(matrix, gradient)
        found = maximized(function, 10, norm=INF)
        assert torch.equal(found.point.abs(), torch.ones(10, dtype=DOUBLE)), "a corner"
        gaps.append(1 - found.value / exact)
        fixed.append(1 - fixed_steps(function, 10, 20, INF) / exact)
        more = maximized(function, 10, norm=INF, restarts=30)
        assert 0.99 * exact < more.value <= exact * (1 + 1e-12)
    # The corner found may be a poor one.
    assert max(gaps) < 0.45
    assert sum(gaps) < 0.5 * sum(fixed)


def test_separable_function_in_the_cube_is_solved_coordinate_by_coordinate():
    diagonal = -draws(0, 12).abs() - 0.1
    gradient = draws(1, 12)
    function = quadratic(torch.diag(diagonal), gradient)
    found = maximized(function, 12, norm=INF, steps=100)
    exact = (-gradient / diagonal).clamp(-1, 1)
    assert 0 < int((exact.abs() < 1).sum()) < 12
    torch.testing.assert_close(found.point, exact, rtol=0, atol=1e-4)
    assert found.outcome is Outcome.STATIONARY


# ------------------------------------------------------------------------------------ outcomes


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("norm", [2, INF])
def test_maximum_inside_the_ball_is_found(norm, dtype):
    n = 20
    matrix = matrix_with_spectrum(torch.linspace(-4, -1, n).tolist(), 0, dtype)
    inside = draws(2, n, dtype=dtype)
    inside *= 0.4 / torch.linalg.vector_norm(inside, norm)
    function = quadratic(matrix, -(matrix @ inside), 1.0)
    found = maximized(function, n, norm=norm, steps=60, dtype=dtype)
    tolerance = 2e-3 if dtype == torch.float32 else 1e-5
    torch.testing.assert_close(found.point, inside, rtol=tolerance, atol=tolerance)
    assert found.outcome is Outcome.STATIONARY
    assert found.gradients + found.losses < 61
    short = maximized(function, n, norm=norm, steps=4, dtype=dtype)
    assert short.outcome is Outcome.ITERATION_LIMIT


def test_where_the_first_order_point_is_lower_nothing_is_gained_by_it_alone():
    function = quadratic(-100 * torch.eye(5, dtype=DOUBLE), draws(0, 5), 3.0)
    found = maximized(function, 5, steps=1)
    assert found.outcome is Outcome.NO_ASCENT
    assert found.value == found.start == 3.0
    assert not found.point.any()
    more = maximized(function, 5, steps=3)
    assert more.value == pytest.approx(3 + float(draws(0, 5) @ draws(0, 5)) / 200, rel=1e-12)


@pytest.mark.parametrize("norm", [2, INF])
def test_without_anything_to_move(norm):
    still = torch.zeros(6, dtype=DOUBLE)
    for steps, restarts in ((1, 0), (1, 3), (10, 3)):
        found = maximized(
            linear(draws(0, 6)), 6, scale=still, norm=norm, steps=steps, restarts=restarts
        )
        assert found.outcome is Outcome.NO_ASCENT
        assert found.first_order == 0.0
        assert found.gradients == 1
        assert not found.point.any()


@pytest.mark.parametrize("norm", [2, INF])
def test_zero_gradient_at_the_centre(norm):
    values = spectrum_of("positive", 12, 0)
    matrix = matrix_with_spectrum(values.tolist(), 0, DOUBLE)
    function = quadratic(matrix, torch.zeros(12, dtype=DOUBLE), 2.0)
    one = maximized(function, 12, norm=norm, steps=1)
    assert (one.outcome, one.value, one.gradients) == (Outcome.NO_ASCENT, 2.0, 1)
    found = maximized(function, 12, norm=norm, steps=40)
    assert found.first_order == 0.0
    assert found.outcome is Outcome.STATIONARY
    if norm == 2:
        assert found.value == pytest.approx(2 + float(values.max()) / 2, rel=1e-6)
    one_restart = maximized(function, 12, norm=norm, steps=1, restarts=2)
    assert one_restart.gradients == 3
    assert one_restart.outcome is Outcome.COMPLETED


@pytest.mark.parametrize("norm", [2, INF])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_the_centre_is_the_maximum(norm, dtype):
    for curvature in (-4.0, -1e-30, -1e30):
        function = quadratic(curvature * torch.eye(4, dtype=dtype), torch.zeros(4, dtype=dtype))
        found = maximized(function, 4, norm=norm, dtype=dtype, restarts=3, steps=6)
        assert found.outcome is Outcome.NO_ASCENT
        assert found.value == 0.0
        assert not found.point.any()
        assert found.gradients < 1 + 4 * 6, "from the boundary to the centre, where it stays"


@pytest.mark.parametrize("bad", [INF, math.nan, -INF])
@pytest.mark.parametrize("norm", [2, INF])
def test_values_that_are_not_finite_are_never_best(norm, bad):
    gradient = draws(0, 10)

    def function(x):
        if float(x.norm()) > 0.5:
            return bad, torch.full_like(x, math.nan)
        return float(gradient @ x), gradient.clone()

    heard = []
    found = maximized(function, 10, norm=norm, restarts=1, on_evaluation=heard.append)
    assert found.outcome is Outcome.UNBOUNDED
    assert float(found.point.norm()) <= 0.5
    assert found.value == pytest.approx(float(gradient @ found.point))
    assert found.value > 0.8 * 0.5 * float(gradient.norm()) * (1 if norm == 2 else 0.5)
    assert all(math.isfinite(value) for value in heard)
    one = maximized(function, 10, norm=norm, steps=1)
    assert (one.outcome, one.value) == (Outcome.UNBOUNDED, 0.0)


def test_not_finite_at_the_centre():
    found = maximized(lambda x: (math.nan, x + 1), 3, restarts=2)
    assert found.outcome is Outcome.UNBOUNDED
    assert found.gradients == 1
    assert math.isnan(found.value)


def test_norms_that_are_neither_are_refused():
    with pytest.raises(fm.InvalidArgumentError, match=r"must be 2 or math\.inf; got 1"):
        maximized(linear(draws(0, 3)), 3, norm=1)


# ------------------------------------------------------------------------- counts, seeds, starts


class Counted:
    """A function that counts its two kinds of evaluation and keeps their values."""

    def __init__(self, function) -> None:
        self.function = function
        self.calls: list[str] = []
        self.values: list[float] = []

    def both(self, x):
        value, gradient = self.function(x)
        self.calls.append("gradient")
        self.values.append(value)
        return value, gradient

    def alone(self, x):
        value = self.function(x)[0]
        self.calls.append("loss")
        self.values.append(value)
        return value


@pytest.mark.parametrize("norm", [2, INF])
@pytest.mark.parametrize("cheaper", [True, False])
@pytest.mark.parametrize(("steps", "restarts"), [(1, 0), (1, 2), (4, 0), (4, 2)])
def test_evaluations_are_counted_and_reported(norm, cheaper, steps, restarts):
    n = 80
    # It is not stationary after so few steps.
    matrix = matrix_with_spectrum(torch.linspace(-5, -0.01, n).tolist(), 0, DOUBLE)
    counted = Counted(quadratic(matrix, draws(0, n)))
    heard = []
    found = maximized(
        counted.both,
        n,
        norm=norm,
        steps=steps,
        restarts=restarts,
        value_only=counted.alone if cheaper else None,
        on_evaluation=heard.append,
    )
    one_start = ["gradient"] * (steps - 1) + ["loss" if cheaper else "gradient"]
    assert counted.calls == ["gradient", *one_start * (1 + restarts)]
    assert found.gradients == counted.calls.count("gradient")
    assert found.losses == counted.calls.count("loss")
    assert heard == list(itertools.accumulate(counted.values, max))
    assert found.value == max(counted.values)


@pytest.mark.parametrize("norm", [2, INF])
def test_same_seed_same_points(norm):
    matrix = matrix_with_spectrum(spectrum_of("indefinite", 40, 1).tolist(), 0, DOUBLE)

    def points(seed):
        seen = []

        def function(x):
            seen.append(x.clone())
            return quadratic(matrix, 0.1 * draws(0, 40))(x)

        maximized(function, 40, norm=norm, steps=3, restarts=2, seed=seed)
        return torch.stack(seen)

    assert torch.equal(points(3), points(3))
    assert torch.equal(points(3), points(torch.Generator().manual_seed(3)))
    first, second = points(3), points(4)
    assert torch.equal(first[:4], second[:4]), "the first start is not random"
    assert not torch.equal(first[4], second[4])
    assert not torch.equal(first[4], first[7])
    starts = torch.linalg.vector_norm(first[[4, 7]], norm, dim=1)
    torch.testing.assert_close(starts, torch.ones(2, dtype=DOUBLE))


@pytest.mark.parametrize("norm", [2, INF])
def test_restarts_find_what_the_gradient_points_away_from(norm):
    # The centre lies on the slope of a low hill; a far higher one lies opposite.
    along = torch.ones(6, dtype=DOUBLE) / (math.sqrt(6) if norm == 2 else 6)

    def function(x):
        t = float(along @ x)
        return 0.1 * t + (t < 0) * 5 * t**4, along * (0.1 + (t < 0) * 20 * t**3)

    low = maximized(function, 6, norm=norm)
    assert low.value == pytest.approx(0.1, rel=1e-6)
    high = maximized(function, 6, norm=norm, restarts=20)
    assert high.value == pytest.approx(4.9, rel=1e-4)
    assert high.outcome is Outcome.STATIONARY


def test_smooth_function_that_is_no_quadratic():
    features, targets = draws(0, 60, 15), draws(1, 60)

    def function(x):
        x = x.clone().requires_grad_()
        value = ((features @ x).tanh() - targets).square().sum()
        return float(value.detach()), torch.autograd.grad(value, x)[0]

    few = maximized(function, 15, radius=3.0, steps=20)
    many = maximized(function, 15, radius=3.0, steps=400)
    assert many.outcome is Outcome.STATIONARY
    assert few.value - few.start > 0.95 * (many.value - many.start)
    slope = function(many.point)[1]
    inward = slope - (slope @ many.point) / 9 * many.point
    assert float(inward.norm()) < 1e-3 * float(slope.norm()), "no ascent along the sphere"
    assert few.value - few.start > fixed_gain(function, 15, 3.0)


def fixed_gain(function, size: int, radius: float) -> float:
    def scaled(u):
        value, gradient = function(radius * u)
        return value, radius * gradient

    return fixed_steps(scaled, size, 20)
