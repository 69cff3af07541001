"""The norm of the gradient, which shows how far a point is from being stationary."""

from __future__ import annotations

import dataclasses

import torch

from ..objective.objective import Objective, check_objective
from ..results import Outcome, Table, format_number
from ..support.precision import precision_notes
from ..support.randomness import Seed, as_generator
from .result import Measurement, MeasureResult

__all__ = ["GradientNormResult", "gradient_norm"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class GradientNormResult(MeasureResult):
    """The norm of the gradient, overall and for each parameter tensor.

    Attributes:
        value: ‖∇L(θ)‖₂.
        largest: max |∂L/∂θ_i|.
        tensors: the norm for each parameter tensor; their squares add up to that of `value`.
        loss: L(θ).
        outcome: completed.
        readings: how many times the data were read again; 0 if they are kept on the device.
        notes: remarks on the computation.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1)
        >>> _ = torch.nn.init.zeros_(model.weight), torch.nn.init.ones_(model.bias)
        >>> data = torch.tensor([[3.0, 0.0]]), torch.zeros(1, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> fm.gradient_norm(objective).tensors
        {'weight': 6.0, 'bias': 2.0}
    """

    value: float
    largest: float
    tensors: dict[str, float]
    loss: float
    outcome: Outcome
    readings: int = 0
    notes: tuple[str, ...] = ()

    def measurements(self) -> tuple[Measurement, ...]:
        """Return the norm as one line of a report."""
        return (Measurement("gradient norm ‖∇L‖", self.value, None, "", None, "1 gradient"),)

    def _table(self) -> Table:
        return Table(
            header=("parameter", "gradient norm"),
            rows=(
                ("overall", format_number(self.value)),
                *((name, format_number(norm)) for name, norm in self.tensors.items()),
            ),
            title=f"Gradient norm, loss {format_number(self.loss)}",
            notes=self._make_notes(f"Largest entry: {format_number(self.largest)}."),
        )


def gradient_norm(
    objective: Objective, *, seed: Seed = 0, progress: bool = True
) -> GradientNormResult:
    """Return ‖∇L(θ)‖₂, which is zero at a minimum.

    Args:
        objective: the objective to differentiate.
        seed: unused, since nothing is random; every measure has this argument.
        progress: unused, since it takes one gradient; every measure has this argument.

    Returns:
        The norm over all selected parameters and for each tensor, added up in float64.

    Raises:
        NonFiniteError: the loss or the gradient holds NaN or infinity.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> round(fm.gradient_norm(objective).value, 4)  # ∇L = (1, 4)
        4.1231
    """
    check_objective("gradient_norm", objective)
    as_generator(seed, objective.device)
    del progress
    before = objective.batches.readings
    loss, gradient = objective.value_and_gradient()
    wide = gradient if gradient.device.type == "mps" else gradient.double()
    squares = torch.stack([wide[place].square().sum() for _, place in objective.layout.slices()])
    whole, largest = torch.stack([torch.linalg.vector_norm(wide), wide.abs().max()]).tolist()
    names = objective.layout.names
    return GradientNormResult(
        value=whole,
        largest=largest,
        tensors=dict(zip(names, squares.sqrt().tolist(), strict=True)),
        loss=loss,
        outcome=Outcome.COMPLETED,
        readings=objective.batches.readings - before,
        notes=precision_notes(objective.model, objective.device),
    )
