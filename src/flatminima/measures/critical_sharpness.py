"""Critical sharpness: how long a step along an update can be before the loss rises."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import InvalidArgumentError, ShapeError, StateMismatchError, closest
from ..objective.objective import Objective, check_objective
from ..results import Outcome, Table, format_number
from ..support.checks import check_positive
from ..support.precision import precision_notes, resolution
from ..support.progress import progress_bar
from ..support.randomness import Seed, as_generator
from ..support.vectors import check_vector
from .result import Measurement, MeasureResult, format_count

__all__ = ["CriticalSharpnessResult", "critical_sharpness"]

FIRST = 1e-3
"""Length of the first step tried, relative to that of the parameters."""
DOUBLINGS = 40
"""Largest number of times that the first step is doubled or halved."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CriticalSharpnessResult(MeasureResult):
    """2 divided by the step at which the loss is back at its value at θ.

    Attributes:
        value: 2 / η.
        error: half the difference of 2 / η between the ends of the last bracket, combined with the
            effect of rounding of the loss, which depends on how far the loss falls.
        step: η, the middle of the last bracket, as a multiple of the update.
        bracket: a step after which the loss was lower, and a longer one after which it was not.
        update_norm: ‖u‖₂.
        loss: L(θ).
        along: "gradient", or "update" if one was given.
        tried_steps: every η that was tried, ascending.
        tried_losses: L(θ + η u) at each of them.
        gradients: number of evaluations of loss and gradient: 1 without `update`, else 0.
        evaluations: number of evaluations of the loss alone.
        outcome: completed; not reached, if the loss is lower at the longest step tried; below
            rounding, if it falls by no more than its rounding error; or no descent, if the loss
            is lower at no step along a given update.
        readings: how many times the data were read again; 0 if they are kept on the device.
        notes: remarks on the computation.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = torch.eye(2), torch.zeros(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> result = fm.critical_sharpness(objective)
        >>> result.bracket[0] < 2.0 < result.bracket[1]  # H = I
        True
    """

    value: float
    error: float
    step: float
    bracket: tuple[float, ...]
    update_norm: float
    loss: float
    along: str
    tried_steps: tuple[float, ...]
    tried_losses: tuple[float, ...]
    gradients: int
    evaluations: int
    outcome: Outcome
    readings: int = 0
    notes: tuple[str, ...] = ()

    def measurements(self) -> tuple[Measurement, ...]:
        """Return 2 / η as one line of a report."""
        cost = f"{format_count(self.gradients, 'gradient')}, " if self.gradients else ""
        cost += format_count(self.evaluations, "loss")
        error = self.error if math.isfinite(self.error) else None
        name = "critical sharpness 2/η" + (", update given" if self.along == "update" else "")
        return self._line(name, cost, error, "bracket")

    def _table(self) -> Table:
        return Table(
            header=("quantity", "value"),
            rows=(
                ("critical sharpness 2/η", format_number(self.value)),
                ("half of its bracket", format_number(self.error, 2)),
                ("critical step η", format_number(self.step)),
                ("length of that step", format_number(self.step * self.update_norm)),
                ("loss L(θ)", format_number(self.loss)),
                ("gradients", str(self.gradients)),
                ("losses alone", str(self.evaluations)),
            ),
            title="Critical sharpness",
            notes=self._make_notes(),
        )


def critical_sharpness(
    objective: Objective,
    *,
    update: Tensor | Mapping[str, Tensor] | None = None,
    tol: float = 0.01,
    seed: Seed = 0,
    progress: bool = True,
) -> CriticalSharpnessResult:
    """Return 2 / η for the shortest step η along an update at which the loss is no longer lower.

    η = min { η > 0 : L(θ + η u) > L(θ) } (Kalra et al. 2026, arXiv:2601.16979). Only losses are
    needed. For a quadratic loss and u = −∇L, 2 / η is ∇Lᵀ H ∇L / ‖∇L‖², the curvature along the
    gradient. It is at most the largest eigenvalue, and near it if training by gradient descent is
    at the edge of stability.

    The first step moves θ by a thousandth of its length. The step is doubled until the loss is not
    lower than at θ, or halved until it is; then η is found by bisection of log η. A loss that
    rises and falls again within a factor of 2 is overlooked.

    Args:
        objective: the objective to evaluate.
        update: u, a direction in which the loss falls: a vector (n,), or tensors by parameter
            name, zero for those left out. Default: minus the gradient. For another optimiser,
            take the change of the parameters in one of its steps, divided by its step size.
        tol: relative width of the last bracket of η, below 1.
        seed: unused, since nothing is random; every measure has this argument.
        progress: show a bar if it takes long.

    Returns:
        2 / η and η, with the bracket and all losses evaluated.

    Raises:
        InvalidArgumentError: the update, or the gradient without one, is zero; or `tol` is out of
            range.
        ShapeError: the update has the wrong shape.
        StateMismatchError: the update names a parameter that is not selected.
        NonFiniteError: L(θ) or the update is NaN or infinite.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), (x, torch.zeros(2, 1)))
        >>> round(fm.critical_sharpness(objective).value, 1)  # H = 4 I
        4.0
    """
    call = "critical_sharpness"
    check_objective(call, objective)
    tol = check_positive(call, "tol", tol)
    if tol >= 1:
        raise InvalidArgumentError(f"The 'tol' argument of {call} must be below 1; got {tol!r}.")
    as_generator(seed, objective.device)
    before = objective.batches.readings
    if update is None:
        loss, gradient = objective.value_and_gradient()
        direction = -gradient
    else:
        direction = _check_update(call, objective, update)
        loss = objective.loss()
    length = float(torch.linalg.vector_norm(direction.double()))
    if length == 0:
        what = "gradient" if update is None else "update"
        raise InvalidArgumentError(
            f"{call} follows the loss along the {what}, which is zero here; pass another update=."
        )
    tried: dict[float, float] = {}
    with progress_bar("critical sharpness", total=None, unit="loss", show=progress) as bar:

        def falls(step: float) -> bool:
            tried[step] = objective.loss_at(direction * step)
            bar.set_postfix_str(f"η = {step:.3g}", refresh=False)
            bar.update()
            return tried[step] < loss

        size = float(torch.linalg.vector_norm(objective.point().double())) or 1.0
        step, low, high = FIRST * size / length, 0.0, math.inf
        for _ in range(DOUBLINGS):
            if falls(step):
                low = step
            else:
                high = step
            if low > 0 and high < math.inf:
                break
            step *= 2 if high == math.inf else 0.5
        while low > 0 and (1 + tol) * low < high < math.inf:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if falls(middle) else (low, middle)
    outcome = Outcome.COMPLETED
    if low == 0:
        critical, outcome = 0.0, Outcome.NO_DESCENT
    elif high == math.inf:
        critical, outcome = low, Outcome.NOT_REACHED
    else:
        critical = math.sqrt(low * high)
    error = 1 / low - 1 / high if outcome is Outcome.COMPLETED else math.nan
    depth = loss - min(tried.values(), default=loss)
    if outcome is Outcome.COMPLETED:
        # On a parabola, an error r of the loss changes η by r / (4 depth), relative to η.
        shift = resolution(objective.model, objective.device, loss) / 4 / (4 * depth)
        error = math.hypot(error, 2 / critical * shift)
        outcome = Outcome.BELOW_ROUNDING if shift > 0.1 else outcome
    elif outcome is Outcome.NO_DESCENT and update is None:
        outcome = Outcome.BELOW_ROUNDING
    return CriticalSharpnessResult(
        value=2 / critical if critical else math.inf,
        error=error,
        step=critical,
        bracket=(low, high),
        update_norm=length,
        loss=loss,
        along="gradient" if update is None else "update",
        tried_steps=tuple(sorted(tried)),
        tried_losses=tuple(tried[s] for s in sorted(tried)),
        gradients=int(update is None),
        evaluations=len(tried) + int(update is not None),
        outcome=outcome,
        readings=objective.batches.readings - before,
        notes=precision_notes(objective.model, objective.device),
    )


def _check_update(call: str, objective: Objective, update: Tensor | Mapping[str, Tensor]) -> Tensor:
    layout = objective.layout
    if isinstance(update, Mapping):
        for name, tensor in update.items():
            if name not in layout.names:
                raise StateMismatchError(
                    f"The 'update' argument of {call} names {name!r}, which is not a selected "
                    f"parameter. {closest(str(name), layout.names)}"
                )
            wanted = layout.shapes[layout.names.index(name)]
            if not isinstance(tensor, Tensor) or tensor.shape != wanted:
                got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ShapeError(
                    f"The 'update' argument of {call} must hold a tensor {tuple(wanted)} for "
                    f"{name!r}; got {got}."
                )
        update = layout.flatten([update.get(name) for name in layout.names])
    return check_vector(
        f"{call}(update=...)", update, size=layout.size, dtype=layout.dtype, device=layout.device
    )
