"""Maximisation over a box around the origin."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..randomness import Seed, as_generator
from ..results import Outcome

__all__ = ["BoxMaximum", "maximize_over_box"]

GRADIENT_SCALE = 100.0
"""Mean |gradient| per box half-width that the solver is shown at the start."""

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


class _NotFiniteError(Exception):
    pass


def maximize_over_box(
    function: ValueAndGradient,
    half_width: Tensor,
    *,
    iterations: int,
    restarts: int = 0,
    climbs: int = 0,
    seed: Seed = 0,
    on_evaluation: Callable[[float], None],
) -> BoxMaximum:
    """Maximise over { x : |x_i| ≤ h_i } with L-BFGS-B (Byrd, Lu, Nocedal, Zhu 1995), from x = 0.

    SciPy's implementation is run in the coordinates u = x / h, on the function times a constant
    that makes its mean absolute gradient at the start 100: in the raw coordinates the solver's
    first step has the length of the gradient, which has nothing to do with the size of the box,
    and its stopping tests, which are absolute, end it at once near a minimum. Neither changes
    the problem. Near a minimum the function is convex, and every corner that is reached can be a
    local maximum, often after an iteration or two: what is left of the iterations then goes into
    starts from random corners. Where the gradient at the centre is zero, the first start is one.

    Args:
        function: x (n,) → value and gradient (n,).
        half_width: h (n,), not negative.
        iterations: of L-BFGS-B, all starts together; a start takes one at least.
        restarts: how many times more the same number of iterations, from random corners alone.
        climbs: number of corners, the best point's and then random ones, of which single
            coordinates are flipped as long as that raises the function; a pass over the
            coordinates costs n evaluations, so this is for few dimensions.
        seed: of the random corners.
        on_evaluation: called with the best value after each evaluation.
    """
    from scipy.optimize import minimize

    size = half_width.numel()
    center = torch.zeros_like(half_width)
    start_value, start_gradient = function(center)
    slope = float((start_gradient * half_width).abs().mean())
    best_value, best_point, evaluations = start_value, center, 1
    on_evaluation(best_value)
    scale = GRADIENT_SCALE / slope if slope > 0 else 1.0

    def evaluated(point: Tensor) -> tuple[float, Tensor]:
        nonlocal best_value, best_point, evaluations
        value, gradient = function(point)
        evaluations += 1
        if value > best_value and math.isfinite(value):
            best_value, best_point = value, point
        on_evaluation(best_value)
        return value, gradient

    def negated(u: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        if not u.any():
            value, gradient = start_value, start_gradient
        else:
            value, gradient = evaluated(half_width * torch.as_tensor(u.copy()).to(half_width))
            if not (math.isfinite(value) and bool(torch.isfinite(gradient).all())):
                raise _NotFiniteError
        downhill = (-scale * (gradient * half_width).double()).cpu().numpy()
        return -scale * value, downhill

    def run(start: NDArray[np.float64], allowed: int) -> tuple[Outcome, int]:
        """Why it stopped, and after how many iterations."""
        options: Any = {"maxiter": allowed, "ftol": 0.0, "gtol": 0.0}
        try:
            found = minimize(
                negated,
                start,
                jac=True,
                method="L-BFGS-B",
                bounds=np.tile([-1.0, 1.0], (size, 1)),
                options=options,
            )
        except _NotFiniteError:
            return Outcome.UNBOUNDED, 1
        stopped = Outcome.ITERATION_LIMIT if found.nit >= allowed else Outcome.STATIONARY
        return stopped, max(1, int(found.nit))

    def climb(corner: Tensor) -> None:
        height = evaluated(corner)[0]
        improved = True
        while improved:
            improved = False
            for i in range(size):
                other = corner.clone()
                other[i] = -other[i]
                value = evaluated(other)[0]
                if value > height:
                    corner, height, improved = other, value, True

    def random_signs() -> Tensor:
        bits = torch.randint(2, (size,), generator=generator, device=generator.device)
        return 2 * bits.to(half_width) - 1

    generator = as_generator(seed, half_width.device)
    at_center = slope > 0
    outcome, unbounded = Outcome.NO_ASCENT, False
    for _ in range(1 + restarts):
        left = iterations
        while left > 0:
            start = np.zeros(size)
            if not at_center:
                start = random_signs().double().cpu().numpy()
            before = best_value
            stopped, used = run(start, left)
            left -= used
            at_center = False
            unbounded = unbounded or stopped is Outcome.UNBOUNDED
            if best_value > before:
                outcome = stopped
    searched = best_value
    for i in range(climbs):
        signs = random_signs() if i else torch.where(best_point < 0, -1.0, 1.0).to(half_width)
        climb(half_width * signs)
    if best_value > searched:
        outcome = Outcome.STATIONARY
    if unbounded:
        outcome = Outcome.UNBOUNDED
    return BoxMaximum(best_point, best_value, evaluations, outcome)
