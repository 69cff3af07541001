"""Maximisation over a ball around the origin."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import InvalidArgumentError
from ...results import Outcome
from ...support.randomness import Seed, as_generator

__all__ = ["BallMaximum", "maximize_over_ball"]

CURVATURE_SHARE = 0.75
"""The largest curvature a step assumes, as a share of the slope along the point itself: at 1 the
next point could be anywhere."""

FINITE_SHARE = 0.25
"""How much of a step is tried next where the function is not finite at its end."""

MOVEMENT = 1e-6
"""A step shorter than this, or than √eps of the precision, relative to the point, is none."""

EXTREME = 1e30
"""By how much a curvature may differ from the gradient at most: float32 can divide by it."""

ValueAndGradient = Callable[[Tensor], tuple[float, Tensor]]


@dataclasses.dataclass(frozen=True)
class BallMaximum:
    """The best point that was evaluated.

    Attributes:
        point: δ (n,), within the ball; zeros when nothing better than the centre was found.
        value: the function there.
        start: the function at the centre.
        first_order: ρ ‖c ⊙ g‖_q with the gradient g at the centre and the dual norm q: by how
            much the function would rise if it were linear.
        gradients: how often value and gradient were computed, the centre included.
        losses: how often the value alone was computed.
        outcome: why the start that found the point stopped.
    """

    point: Tensor
    value: float
    start: float
    first_order: float
    gradients: int
    losses: int
    outcome: Outcome


def maximize_over_ball(
    function: ValueAndGradient,
    size: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    scale: Tensor | None = None,
    radius: float,
    norm: float,
    steps: int,
    restarts: int = 0,
    seed: Seed = 0,
    value_only: Callable[[Tensor], float] | None = None,
    on_evaluation: Callable[[float], None],
) -> BallMaximum:
    """Maximise over { δ = c ⊙ u : ‖u‖_p ≤ ρ } by projected ascent, from δ = 0.

    With one step it evaluates the maximiser of the linear model at the centre, the point of SAM
    (Foret et al. 2021, arXiv:2010.01412): u = ρ c⊙g / ‖c⊙g‖₂ for p = 2, ρ sign(c⊙g) for p = ∞.

    Every further point is the maximiser over the ball of the model g·s + a ‖s‖² / 2 around the
    best point of the start, where a is the curvature that was seen along the last step. Where a
    is negative this is the spectral projected gradient step (Birgin, Martínez, Raydan 2000,
    doi:10.1137/S1052623497330963), with a = 0 the generalised power method (Journée et al. 2010),
    and with a > 0 a shifted one, u ← ρ (g − a u) / ‖g − a u‖ or ρ sign(g − a u), which
    converges faster and, for p = ∞, passes by poor corners. Where the function falls, a is that
    of the parabola through both values and the slope, which halves the step at least.

    What it finds is a local maximum; restarts look for others. Where the gradient at the centre
    is zero there is no first step, and with steps > 1 the first start is from a random point, too.

    Args:
        function: δ (n,) → value and gradient (n,), a new tensor, which is overwritten.
        size: n.
        dtype: of the vectors.
        device: of the vectors.
        scale: c (n,), not negative; coordinates where it is zero do not move. None for ones.
        radius: ρ, positive.
        norm: p, 2 or math.inf.
        steps: evaluations for each start, in addition to the one at the centre; fewer are used by a
            start that no longer moves.
        restarts: number of further starts, from random points of the ball's boundary (uniform
            directions for p = 2, corners for p = ∞), which are the first of their evaluations.
        seed: of the random points.
        value_only: δ → value, where that is cheaper: it is used for the last step of a start.
        on_evaluation: called with the best value after each evaluation.

    Raises:
        InvalidArgumentError: `norm` is neither.
    """
    ball = _Ball(scale, radius, norm)
    center = torch.zeros(size, dtype=dtype, device=device)
    start, gradient = function(center)
    best_value, best_point, gradients, losses = start, center, 1, 0
    on_evaluation(start)
    steepness, uphill = ball.slope(gradient)
    del gradient
    first_order = steepness * ball.dual(uphill)
    outcome, unbounded = Outcome.NO_ASCENT, not math.isfinite(start + first_order)

    def evaluated(u: Tensor, last: bool) -> tuple[float, float, Tensor]:
        """Return the value at u, and the slope there unless it is the last point of a start."""
        nonlocal best_value, best_point, gradients, losses, unbounded
        slope, direction = 0.0, center
        if last and value_only is not None:
            value = value_only(ball.displacement(u))
            losses += 1
        else:
            value, gradient = function(ball.displacement(u))
            gradients += 1
            if not last:
                slope, direction = ball.slope(gradient)
        if not math.isfinite(value + slope):
            unbounded = True
        if value > best_value and math.isfinite(value):
            best_value, best_point = value, u
        on_evaluation(best_value)
        return value, slope, direction

    def climb(trial: Tensor, point: Tensor, height: float, slope: float, up: Tensor) -> Outcome:
        """Ascend from `trial`, a step away from a point whose value and slope are known.

        A height of −∞ says that they are not: then any finite trial replaces the point.
        """
        movement = max(MOVEMENT, math.sqrt(torch.finfo(dtype).eps))
        curvature = radial = 0.0
        step = trial - point
        for k in range(steps):
            value, trial_slope, trial_up = evaluated(trial, k == steps - 1)
            if k == steps - 1:
                break
            if not math.isfinite(value + trial_slope):
                trial = torch.add(point, step, alpha=FINITE_SHARE)
            else:
                square, before, after = _dots((step, step), (step, up), (step, trial_up))
                if value > height:
                    known = height > -math.inf
                    seen = (trial_slope * after - slope * before) / square if known else 0.0
                    point, height, slope, up = trial, value, trial_slope, trial_up
                    along, length = _dots((point, up), (point, point))
                    radial = max(slope * along / length, 0.0) if length > 0 else 0.0
                    curvature = min(seen, CURVATURE_SHARE * radial)
                else:
                    seen = 2 * (value - height - slope * before) / square
                    curvature = min(seen, 2 * curvature - radial)
                if slope == 0:
                    return Outcome.STATIONARY
                trial = ball.model_maximizer(point, up, curvature / slope)
            step = trial - point
            moved, length = _dots((step, step), (point, point))
            if moved <= movement**2 * length:
                return Outcome.STATIONARY
        return Outcome.COMPLETED if steps == 1 else Outcome.ITERATION_LIMIT

    generator = as_generator(seed, device)
    movable = size > 0 and (scale is None or bool(scale.any()))
    for i in range(1 + restarts if movable and not unbounded else 0):
        before = best_value
        if i == 0 and steepness > 0:
            first = ball.model_maximizer(center, uphill, 0.0)
            stopped = climb(first, center, start, steepness, uphill)
        elif i == 0 and steps == 1:
            continue
        else:
            stopped = climb(ball.random_point(center, generator), center, -math.inf, 0.0, center)
        if best_value > before:
            outcome = stopped
    if unbounded:
        outcome = Outcome.UNBOUNDED
    point = ball.displacement(best_point)
    return BallMaximum(point, best_value, start, first_order, gradients, losses, outcome)


class _Ball:
    """The ball in coordinates in which it is the unit ball of the norm, δ = ρ c ⊙ u."""

    def __init__(self, scale: Tensor | None, radius: float, norm: float) -> None:
        if norm not in (2, math.inf):
            raise InvalidArgumentError(f"The 'norm' argument must be 2 or math.inf; got {norm!r}.")
        self.scale = scale
        self.radius = radius
        self.round = norm == 2

    def displacement(self, u: Tensor) -> Tensor:
        """Return δ at u, a new tensor."""
        return u * self.radius if self.scale is None else (u * self.scale).mul_(self.radius)

    def slope(self, gradient: Tensor) -> tuple[float, Tensor]:
        """The gradient with respect to u as its largest entry and a vector, the given one's memory.

        So the squares of gradients that are tiny or huge neither vanish nor overflow. The largest
        entry is NaN or infinite where any is.
        """
        if self.scale is not None:
            gradient.mul_(self.scale)
        largest = torch.linalg.vector_norm(gradient, math.inf) if len(gradient) else gradient.sum()
        height = float(largest)
        return self.radius * height, gradient.div_(largest) if height > 0 else gradient

    def dual(self, direction: Tensor) -> float:
        """Return the dual norm, ‖·‖₂ or ‖·‖₁."""
        return float(torch.linalg.vector_norm(direction, 2 if self.round else 1))

    def model_maximizer(self, u: Tensor, up: Tensor, curvature: float) -> Tensor:
        """Return the v of the ball with the largest up · (v − u) + curvature ‖v − u‖² / 2."""
        curvature = max(curvature, -EXTREME)
        unit = max(1.0, -curvature)
        inside = -curvature / unit
        v = (up / unit).add_(u, alpha=inside)
        if self.round:
            length = max(float(torch.linalg.vector_norm(v)), inside)
            return v.div_(length) if length > 0 else v
        return v.clamp_(-inside, inside).div_(inside) if inside > 1 / EXTREME else v.sign_()

    def random_point(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Return a point of the boundary, with zeros where the scale is zero."""
        device = generator.device
        if self.round:
            v = torch.randn(len(like), generator=generator, dtype=like.dtype, device=device)
        else:
            bits = torch.randint(2, (len(like),), generator=generator, device=device)
            v = bits.to(like.dtype).mul_(2).sub_(1)
        v = v.to(like.device)
        if self.scale is not None:
            v.mul_(self.scale.sign())
        return v.div_(torch.linalg.vector_norm(v)) if self.round else v


def _dots(*pairs: tuple[Tensor, Tensor]) -> list[float]:
    """Return inner products, brought to the host together."""
    return [float(x) for x in torch.stack([a @ b for a, b in pairs]).tolist()]
