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
        outcome: why it stopped.
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
    seed: Seed = 0,
    on_evaluation: Callable[[float], None],
) -> BoxMaximum:
    """Maximise over { x : |x_i| ≤ h_i } with L-BFGS-B (Byrd, Lu, Nocedal, Zhu 1995), from x = 0.

    SciPy's implementation is run in the coordinates u = x / h, on the function times a constant
    that makes its mean absolute gradient at the start 100: in the raw coordinates the solver's
    first step has the length of the gradient, which has nothing to do with the size of the box,
    and its stopping tests, which are absolute, end it at once near a minimum. Neither changes
    the problem. When the gradient at the centre is zero, or nothing is gained from there, it
    starts from a random corner.

    Args:
        function: x (n,) → value and gradient (n,).
        half_width: h (n,), not negative.
        iterations: of L-BFGS-B, for each start.
        restarts: number of further starts, from random corners.
        seed: of those corners.
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

    def negated(u: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        nonlocal best_value, best_point, evaluations
        if not u.any():
            value, gradient = start_value, start_gradient
        else:
            point = half_width * torch.as_tensor(u.copy()).to(half_width)
            value, gradient = function(point)
            evaluations += 1
            if value > best_value and math.isfinite(value):
                best_value, best_point = value, point
            on_evaluation(best_value)
            if not (math.isfinite(value) and bool(torch.isfinite(gradient).all())):
                raise _NotFiniteError
        downhill = (-scale * (gradient * half_width).double()).cpu().numpy()
        return -scale * value, downhill

    def run(start: NDArray[np.float64]) -> Outcome:
        options: Any = {"maxiter": iterations, "ftol": 0.0, "gtol": 0.0}
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
            return Outcome.UNBOUNDED
        return Outcome.ITERATION_LIMIT if found.nit >= iterations else Outcome.STATIONARY

    generator = as_generator(seed, half_width.device)
    outcomes = []
    if slope > 0:
        outcomes.append(run(np.zeros(size)))
    while len(outcomes) < 1 + restarts or (best_value <= start_value and len(outcomes) < 2):
        signs = torch.randint(2, (size,), generator=generator, device=generator.device)
        outcomes.append(run(2.0 * signs.double().cpu().numpy() - 1.0))
    outcome = outcomes[-1]
    if Outcome.UNBOUNDED in outcomes:
        outcome = Outcome.UNBOUNDED
    elif best_value <= start_value:
        outcome = Outcome.NO_ASCENT
    elif Outcome.ITERATION_LIMIT in outcomes:
        outcome = Outcome.ITERATION_LIMIT
    return BoxMaximum(best_point, best_value, evaluations, outcome)
