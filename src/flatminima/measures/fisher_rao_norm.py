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
    """The squared Fisher–Rao norm θᵀ F θ.

    Attributes:
        value: θᵀ F θ, never negative except for rounding.
        error: known error due to inexact products, beyond rounding; 0 if they are exact.
        kind: the kind of Fisher matrix, "exact" or "empirical".
        parameter_norm: ‖θ‖₂.
        products: number of products with F.
        outcome: completed, or as exact as the products allow.
        readings: how many times the data were read again; 0 if they are kept on the device.
        notes: remarks on the computation.

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
        """The name of the measure, with its settings."""
        return "Fisher–Rao norm" + ("" if self.kind == "exact" else f", {self.kind} Fisher matrix")

    def measurements(self) -> tuple[Measurement, ...]:
        """Return the squared norm as one line of a report."""
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
            notes=self._make_notes(),
        )


def fisher_rao_norm(
    objective: Objective,
    *,
    kind: Literal["exact", "empirical"] = "exact",
    seed: Seed = 0,
    progress: bool = True,
) -> FisherRaoResult:
    """Return θᵀ F θ with the Fisher matrix F, unchanged by rescalings that keep the function.

    This is the square of the Fisher–Rao norm of Liang et al. 2019 (arXiv:1711.01530,
    definition 2). The default matrix is that of the model's own predictions, the empirical one
    that of the given labels; the paper has both (section 4.1). It takes one product.

    Args:
        objective: an objective with `loss_fn`, as for `FisherOperator`.
        kind: "exact" or "empirical", as for `FisherOperator`.
        seed: unused, since nothing is random; every measure has this argument.
        progress: unused, since it takes one product; every measure has this argument.

    Returns:
        The squared norm.

    Raises:
        InvalidArgumentError: the objective has `batch_loss`, the loss is not a known likelihood
            ("exact"), or the examples cannot be separated ("empirical").
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
