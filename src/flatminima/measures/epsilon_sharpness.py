"""Keskar's ε-sharpness."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from ..algorithms.optimize.box import SOLVERS, maximize_over_box
from ..errors import InvalidArgumentError
from ..objective.objective import Objective, check_objective
from ..results import Outcome, Table, format_number
from ..support.checks import check_choice, check_integer, check_positive
from ..support.precision import precision_notes
from ..support.progress import progress_bar
from ..support.randomness import Seed
from ..support.vectors import GaussianSubspace
from .result import Measurement, MeasureResult

__all__ = ["EpsilonSharpnessResult", "epsilon_sharpness"]

FEW_PARAMETERS = 64
"""With so few parameters single coordinates of a corner matter, and are flipped."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class EpsilonSharpnessResult(MeasureResult):
    """Keskar's ε-sharpness φ, with the losses it was computed from.

    Attributes:
        value: φ, a percentage, never negative.
        loss: L(θ).
        maximum: the largest loss evaluated in the box.
        epsilon: ε.
        subspace: p, or None for the full space.
        iterations: number of L-BFGS-B iterations allowed.
        evaluations: number of evaluations of loss and gradient.
        outcome: why the maximisation stopped.
        displacement: θ* − θ of the maximum, shape (n,), on request.
        readings: how many times the data were read again; 0 if they are kept on the device.
        notes: remarks on the computation.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = torch.eye(2), torch.zeros(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> result = fm.epsilon_sharpness(objective)
        >>> print(round(result.value, 3), result.outcome.brief)
        0.2 stationary
    """

    value: float
    loss: float
    maximum: float
    epsilon: float
    subspace: int | None
    iterations: int
    evaluations: int
    outcome: Outcome
    displacement: Tensor | None = None
    readings: int = 0
    notes: tuple[str, ...] = ()

    def measurements(self) -> tuple[Measurement, ...]:
        """Return φ as one line of a report."""
        where = "full space" if self.subspace is None else f"subspace {self.subspace}"
        name = f"ε-sharpness φ (%), ε = {self.epsilon:g}, {where}"
        return self._line(name, f"{self.evaluations} gradients")

    def _table(self) -> Table:
        where = "full space" if self.subspace is None else f"random subspace, p = {self.subspace}"
        return Table(
            header=("quantity", "value"),
            rows=(
                ("ε-sharpness φ (%)", format_number(self.value)),
                ("loss L(θ)", format_number(self.loss)),
                ("largest loss in the box", format_number(self.maximum)),
                ("evaluations", str(self.evaluations)),
            ),
            title=f"ε-sharpness, ε = {self.epsilon:g}, {where}",
            notes=self._make_notes(),
        )


def epsilon_sharpness(
    objective: Objective,
    *,
    epsilon: float = 1e-3,
    subspace: int | None = None,
    iterations: int = 10,
    restarts: int = 0,
    solver: Literal["lbfgsb", "scipy"] = "lbfgsb",
    seed: Seed = 0,
    return_displacement: bool = False,
    progress: bool = True,
) -> EpsilonSharpnessResult:
    """Return how far the loss can rise, in per cent of 1 + L(θ), within a small box around θ.

    φ = 100 · (max over z ∈ C of L(θ + A z) − L(θ)) / (1 + L(θ)), with
    C = { z : |z_i| ≤ ε (|(A⁺θ)_i| + 1) } (Keskar et al. 2017, arXiv:1609.04836, metric 2.1). In
    the full space A = I; in a random subspace A ∈ ℝ^{n×p} has independent N(0, 1) entries. The
    maximisation is inexact by definition: L-BFGS-B, stopped after 10 iterations.

    The paper states neither the start nor the scaling of the problem; here it starts from z = 0,
    in units of the box (see `optimize.box`). If L-BFGS-B reaches a local maximum early, the
    remaining iterations start from random corners of the box: near a minimum nearly every
    direction leads upwards, and the first one is not the steepest. In models of at most 64
    parameters, if more than a tenth of the rise comes from curvature, at most n + 5 more
    evaluations look for a better corner: each coordinate of the best corner is flipped, and the
    best corners of the resulting quadratic model are tried. The value is that of the best point
    evaluated.

    Args:
        objective: the objective to maximise.
        epsilon: ε, the size of the box; the paper uses 1e-3 and 5e-4.
        subspace: p, the dimension of a random subspace (the paper uses 100), or None for the full
            space.
        iterations: number of L-BFGS-B iterations, for all starts together.
        restarts: how many times to repeat that number of iterations, only from random corners of
            the box; the best point counts.
        solver: "lbfgsb", on the device and in the precision of the model, or "scipy", its
            reference, on the host and in float64. Both take the same steps up to rounding; SciPy
            is much slower for many parameters.
        seed: seed of the subspace and of the corners.
        return_displacement: keep the maximising displacement in the result.
        progress: show a bar if it takes long.

    Returns:
        φ in per cent, with the losses, the number of evaluations of loss and gradient, and why
        the maximisation stopped.

    Raises:
        InvalidArgumentError: ε ≤ 0, p is outside [1, n], the solver is unknown, or 1 + L(θ) ≤ 0.
        NonFiniteError: L(θ) is NaN or infinite.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> x = torch.tensor([[3.0, -1.0]])
        >>> objective = fm.Objective(model, lambda out, y: out.mean(), (x, torch.zeros(1, 1)))
        >>> result = fm.epsilon_sharpness(objective, epsilon=1e-2)
        >>> round(result.value, 4)  # 100 ε Σ |g_i| (|θ_i| + 1)
        4.0
    """
    call = "epsilon_sharpness"
    check_objective(call, objective)
    epsilon = check_positive(call, "epsilon", epsilon)
    check_integer(call, "iterations", iterations, low=1)
    check_integer(call, "restarts", restarts, low=0)
    check_choice(call, "solver", solver, SOLVERS)
    before = objective.batches.readings
    basis: GaussianSubspace | None = None
    point = objective.point()
    if subspace is None:
        half_width = _half_width(epsilon, point)
    else:
        subspace = check_integer(call, "subspace", subspace, low=1, high=objective.size)
        basis = GaussianSubspace(
            objective.size,
            subspace,
            seed=seed,
            dtype=objective.dtype,
            device=objective.device,
        )
        half_width = _half_width(epsilon, basis.coordinates(point))

    def function(z: Tensor) -> tuple[float, Tensor]:
        if not z.any():
            # At θ itself, where a loss that is not finite is an error.
            value, gradient = objective.value_and_gradient()
        else:
            displacement = z if basis is None else basis.expand(z)
            value, gradient = objective.value_and_gradient(displacement)
        return value, gradient if basis is None else basis.project(gradient)

    loss: float | None = None
    with progress_bar("ε-sharpness", total=None, unit="evaluation", show=progress) as bar:

        def advance(best: float) -> None:
            nonlocal loss
            loss = best if loss is None else loss
            if 1 + loss <= 0:
                raise InvalidArgumentError(
                    f"Keskar's metric divides by 1 + L(θ), and L(θ) is {loss:.4g}; it is made for "
                    "losses above −1 (add a constant to the loss if that is meaningful)."
                )
            bar.set_postfix_str(f"largest loss {best:.4g}", refresh=False)
            bar.update()

        found = maximize_over_box(
            function,
            half_width,
            iterations=iterations,
            restarts=restarts,
            flips=objective.size <= FEW_PARAMETERS,
            seed=seed,
            solver=solver,
            on_evaluation=advance,
        )
    assert loss is not None
    gain = found.value - loss
    outcome = found.outcome
    if 0 < gain <= 4 * torch.finfo(objective.dtype).eps * max(abs(loss), abs(found.value)):
        outcome = Outcome.BELOW_ROUNDING
    displacement = None
    if return_displacement:
        displacement = found.point if basis is None else basis.expand(found.point)
    return EpsilonSharpnessResult(
        value=100 * gain / (1 + loss),
        loss=loss,
        maximum=found.value,
        epsilon=epsilon,
        subspace=subspace,
        iterations=iterations,
        evaluations=found.evaluations,
        outcome=outcome,
        displacement=displacement,
        readings=objective.batches.readings - before,
        notes=precision_notes(objective.model, objective.device),
    )


def _half_width(epsilon: float, point: Tensor) -> Tensor:
    """Return ε (|θ_i| + 1), rounded towards zero so that no displacement leaves the box."""
    wide = point if point.device.type == "mps" else point.double()
    exact = epsilon * (wide.abs() + 1)
    rounded = exact.to(point.dtype)
    too_wide = rounded.to(exact.dtype) > exact
    return torch.where(too_wide, torch.nextafter(rounded, torch.zeros_like(rounded)), rounded)
