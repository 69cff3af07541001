"""Maximisation over a box around the origin."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ...results import Outcome
from ...support.randomness import Seed, as_generator

if TYPE_CHECKING:
    from .lbfgsb import LBFGSB
    from .scipy_box import ScipyLBFGSB

__all__ = ["SOLVERS", "BoxMaximum", "maximize_over_box"]

GRADIENT_SCALE = 100.0
"""Mean |gradient| per box half-width that the solver is shown at the start."""

CURVED = 0.1
"""The share of the rise that must come from curvature for another corner to be looked for."""

STARTS = 64
CANDIDATES = 4
"""Corners from which the quadratic is climbed, and how many of those reached are evaluated."""

SOLVERS = ("lbfgsb", "scipy")

ValueAndGradient = Callable[[Tensor], tuple[float, Tensor]]


@dataclasses.dataclass(frozen=True)
class BoxMaximum:
    """The best point that was evaluated.

    Attributes:
        point: (n,), within the box; zeros when nothing better than the centre was found.
        value: the function there.
        evaluations: how often value and gradient were computed, the centre included.
        outcome: why the start that found it stopped.
    """

    point: Tensor
    value: float
    evaluations: int
    outcome: Outcome


def maximize_over_box(
    function: ValueAndGradient,
    half_width: Tensor,
    *,
    iterations: int,
    restarts: int = 0,
    flips: bool = False,
    seed: Seed = 0,
    solver: Literal["lbfgsb", "scipy"] = "lbfgsb",
    on_evaluation: Callable[[float], None],
) -> BoxMaximum:
    """Maximise over { x : |x_i| ≤ h_i } with L-BFGS-B (Byrd, Lu, Nocedal, Zhu 1995), from x = 0.

    It is run in the coordinates u = x / h, on the function times a constant that makes its mean
    absolute gradient at the start 100: in the raw coordinates the solver's first step has the
    length of the gradient, which has nothing to do with the size of the box, and SciPy's
    stopping tests, which are absolute, end it at once near a minimum. Neither changes
    the problem. Near a minimum the function is convex, and every corner that is reached can be a
    local maximum, often after an iteration or two: what is left of the iterations then goes into
    starts from random corners. Where the gradient at the centre is zero, the first start is one.

    Args:
        function: x (n,) → value and gradient (n,), which is overwritten.
        half_width: h (n,), not negative.
        iterations: of L-BFGS-B, all starts together; a start takes one at least.
        restarts: how many times more the same number of iterations, from random corners alone.
        flips: look for a better corner where the rise is mostly curvature: flip each coordinate of
            the best one, which also shows the Hessian, and evaluate the best corners of the
            quadratic. Takes at most n + 5 evaluations, so this is for few dimensions.
        seed: of the random corners.
        solver: "lbfgsb", on the device of h and in its precision, or "scipy", on the host in
            float64.
        on_evaluation: called with the best value after each evaluation.
    """
    size = half_width.numel()
    center = torch.zeros_like(half_width)
    start = function(center)
    slope = float((start[1] * half_width).abs().mean())
    best_value, best_point, evaluations = start[0], center, 1
    # Kept for few dimensions alone: the solver writes to what it is given.
    first_value, first_gradient = start[0], start[1].clone() if flips else center
    on_evaluation(best_value)
    scale = GRADIENT_SCALE / slope if slope > 0 else 1.0
    # Memory for points, used again unless they turn out to be the best.
    spare = torch.empty_like(half_width)
    # Value and gradient at the centre, which are not computed again for the start from there.
    known = [start] if slope > 0 else []
    del start, center
    zero = half_width.new_zeros(())

    def evaluated(point: Tensor) -> tuple[float, Tensor]:
        nonlocal best_value, best_point, evaluations
        value, gradient = function(point)
        evaluations += 1
        if value > best_value and math.isfinite(value):
            best_value, best_point = value, point
        on_evaluation(best_value)
        return value, gradient

    def downhill(u: Tensor) -> tuple[float, Tensor]:
        nonlocal spare
        if known:
            value, gradient = known.pop()
        else:
            before = best_point
            value, gradient = evaluated(torch.mul(half_width, u, out=spare))
            spare = before if best_point is spare else spare
        return -scale * value, torch.addcmul(zero, gradient, half_width, value=-scale, out=gradient)

    def flip(signs: Tensor) -> Outcome:
        """Flip the coordinates of a corner one by one, and try what the quadratic promises."""
        corner = half_width * signs
        height, gradient = evaluated(corner)
        gradient = gradient.clone()
        best = height, corner, gradient
        columns = torch.zeros(size, size, dtype=half_width.dtype, device=half_width.device)
        for i in half_width.nonzero().flatten().tolist():
            other = corner.clone()
            other[i] = -other[i]
            value, slopes = evaluated(other)
            columns[i] = (slopes - gradient) / (other[i] - corner[i])
            best = (value, other, slopes.clone()) if value > best[0] else best
        matrix = (columns + columns.T) / 2
        starts = torch.stack([signs, *(random_signs() for _ in range(STARTS - 1))])
        for candidate in best_corners(matrix, gradient - matrix @ corner, half_width, starts):
            point = half_width * candidate
            value, slopes = evaluated(point)
            best = (value, point, slopes.clone()) if value > best[0] else best
        # In a corner every coordinate must push outwards, or the loss still rises inwards.
        outwards = bool((best[1] * best[2] >= 0).all())
        return Outcome.STATIONARY if outwards else Outcome.ITERATION_LIMIT

    def random_signs() -> Tensor:
        dtype, device = half_width.dtype, generator.device
        bits = torch.randint(2, (size,), generator=generator, dtype=dtype, device=device)
        return bits.mul_(2).sub_(1).to(half_width)

    generator = as_generator(seed, half_width.device)
    search = _solver(solver)(size, dtype=half_width.dtype, device=half_width.device)
    at_center = slope > 0
    outcome, unbounded = Outcome.NO_ASCENT, False
    for _ in range(1 + restarts):
        left = iterations
        while left > 0:
            if not at_center:
                search.point.copy_(random_signs())
            before = best_value
            stopped, used = search.minimize(downhill, left)
            left -= max(1, used)
            at_center = False
            unbounded = unbounded or stopped is Outcome.UNBOUNDED
            if best_value > before:
                outcome = stopped
    del search
    searched, flipped = best_value, outcome
    curvature = best_value - first_value - float(torch.dot(first_gradient, best_point))
    # Also where nothing was found at all.
    if flips and curvature >= CURVED * (best_value - first_value):
        flipped = flip(torch.where(best_point < 0, -1.0, 1.0).to(half_width))
    if best_value > searched:
        outcome = flipped
    if unbounded:
        outcome = Outcome.UNBOUNDED
    return BoxMaximum(best_point, best_value, evaluations, outcome)


def best_corners(matrix: Tensor, slope: Tensor, half_width: Tensor, signs: Tensor) -> Tensor:
    """Return corners of the box where gᵀx + ½ xᵀHx is large, as signs, best first.

    Each start is climbed by flipping the coordinate that raises the quadratic most, until none
    does.

    Args:
        matrix: H, symmetric, shape (n, n).
        slope: g, shape (n,).
        half_width: h, shape (n,).
        signs: to start from, shape (starts, n).

    Returns:
        Shape (at most `CANDIDATES`, n), distinct.
    """
    linear, quadratic = slope * half_width, half_width[:, None] * matrix * half_width
    signs = signs.clone()
    rows = torch.arange(len(signs), device=signs.device)
    # Each flip raises the quadratic, so this ends; the limit is for rounding.
    for _ in range(10 * signs.shape[1]):
        gains = -2 * signs * (linear + signs @ quadratic) + 2 * quadratic.diagonal()
        best, place = gains.max(dim=1)
        rising = best > 0
        if not bool(rising.any()):
            break
        signs[rows[rising], place[rising]] *= -1
    distinct: Tensor = torch.unique(signs, dim=0)
    heights = distinct @ linear + 0.5 * ((distinct @ quadratic) * distinct).sum(dim=1)
    best = heights.argsort(descending=True)[:CANDIDATES]
    return distinct.index_select(0, best)


def _solver(name: str) -> type[LBFGSB] | type[ScipyLBFGSB]:
    """Loaded when it is needed, for a quick start of the library."""
    if name == "scipy":
        from .scipy_box import ScipyLBFGSB

        return ScipyLBFGSB
    from .lbfgsb import LBFGSB

    return LBFGSB
