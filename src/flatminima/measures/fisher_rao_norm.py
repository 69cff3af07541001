"""The Fisher–Rao norm: the length of the parameters as the model's own distribution sees it."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from ..objective.objective import Objective, check_objective
from ..operators.gauss_newton import FisherOperator
from ..results import Outcome, Table, format_number
from ..support.checks import check_choice
from ..support.randomness import Seed, as_generator
from .result import Measurement, MeasureResult

__all__ = ["FisherRaoResult", "fisher_rao_norm"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FisherRaoResult(MeasureResult):
    """θᵀ F θ.

    Attributes:
        value: θᵀ F θ, never negative but for rounding.
        error: what the products are known to be off by, beyond rounding; 0 where they are exact.
        kind: of the Fisher matrix.
        parameter_norm: ‖θ‖₂.
        products: with F.
        outcome: completed, or as exact as the products allow.
        readings: how often the data were read again for it; 0 if they are kept on the device.
        notes: what a reader should know about how it was computed.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = torch.eye(2), torch.zeros(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> fm.fisher_rao_norm(objective).products
        1
    """

    value: float
    error: float
    kind: str
    parameter_norm: float
    products: int
    outcome: Outcome
    readings: int = 0
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """With its settings."""
        return "Fisher–Rao norm" + ("" if self.kind == "exact" else f", {self.kind} Fisher matrix")

    def measurements(self) -> tuple[Measurement, ...]:
        """One line."""
        error = self.error or None
        return self._line(self.name, "1 product", error, "differences" if error else "")

    def _table(self) -> Table:
        return Table(
            header=("quantity", "value"),
            rows=(
                ("θᵀ F θ", format_number(self.value)),
                ("its root", format_number(max(self.value, 0.0) ** 0.5)),
                ("parameter norm ‖θ‖", format_number(self.parameter_norm)),
            ),
            title=self.name,
            notes=self._said(),
        )


def fisher_rao_norm(
    objective: Objective,
    *,
    kind: Literal["exact", "empirical"] = "exact",
    seed: Seed = 0,
    progress: bool = True,
) -> FisherRaoResult:
    """Return θᵀ F θ with the Fisher matrix F: unchanged by every rescaling that keeps the function.

    The Fisher–Rao norm of Liang et al. 2019 (arXiv:1711.01530, definition 2), as its square. The
    default matrix is that of the model's own predictions, the other that of the labels
    given: the paper has both (section 4.1). It takes one product.

    Args:
        objective: with `loss_fn`, as `FisherOperator` takes it.
        kind: "exact" or "empirical", as of `FisherOperator`.
        seed: unused, as nothing is random; every measure takes one.
        progress: unused, as one product shows none; every measure takes it.

    Returns:
        The squared norm.

    Raises:
        InvalidArgumentError: the objective has `batch_loss`, the loss is no likelihood that is
            known ("exact"), or examples cannot be told apart ("empirical").
        NonFiniteError: the product holds NaN or infinity.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 3.0)
        >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> fm.fisher_rao_norm(objective).value  # F = diag(1, 4)
        45.0
    """
    call = "fisher_rao_norm"
    check_objective(call, objective)
    check_choice(call, "kind", kind, ("exact", "empirical"))
    as_generator(seed, objective.device)
    del progress
    before = objective.batches.readings
    operator = FisherOperator(objective, kind=kind)
    point = objective.point()
    product = operator.matvec(point)
    wide = torch.float32 if point.device.type == "mps" else torch.float64
    value, square = torch.stack(
        [point.to(wide) @ product.to(wide), point.to(wide).square().sum()]
    ).tolist()
    return FisherRaoResult(
        value=value,
        error=operator.error * square,
        kind=kind,
        parameter_norm=square**0.5,
        products=1,
        outcome=Outcome.INEXACT_PRODUCTS if operator.error else Outcome.COMPLETED,
        readings=objective.batches.readings - before,
        notes=((operator.reason,) if operator.reason else ()) + operator.notes,
    )
