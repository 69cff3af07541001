"""The results of `trace`."""

from __future__ import annotations

import dataclasses

from ...results import Outcome, Result, Table, format_number, reading_notes

__all__ = ["SHOWN", "BlockTrace", "TraceResult"]

SHOWN = 12
"""Largest number of modules or parameter tensors in a table."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BlockTrace(Result):
    """The trace of the diagonal block of a parameter tensor or a module.

    Attributes:
        name: name of the tensor or module; "" for tensors of the model itself.
        size: number of its parameters.
        value: the trace of the block.
        standard_error: standard error of `value`.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), (torch.eye(2), torch.ones(2, 1)))
        >>> [(b.name, round(b.value, 3)) for b in fm.trace(fm.HessianOperator(objective)).tensors]
        [('weight', 2.0), ('bias', 2.0)]
    """

    name: str
    size: int
    value: float
    standard_error: float

    def _table(self) -> Table:
        return Table(_HEADER, (_row(self),))


_HEADER = ("quantity", "value", "standard error")


def _row(block: BlockTrace) -> tuple[str, ...]:
    return (
        block.name or "(the model's own)",
        format_number(block.value),
        format_number(block.standard_error, 2),
    )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TraceResult(Result):
    """An estimate of a trace.

    Attributes:
        value: tr A.
        standard_error: standard error of `value`, from the spread of the samples. It is widened
            by Student's t if there are few of them: `value` ± 2 `standard_error` covers tr A in
            about 95 % of the cases. 0 if the value is exact up to rounding.
        size: n; the mean eigenvalue is `value / size`.
        products: total number of products with the operator.
        outcome: completed, exact, or whether `rtol` was reached.
        method: "hutchinson", "hutch++", "xtrace" or "exact".
        tensors: the trace of the diagonal block of each parameter tensor, from the same products.
            They add up to `value`. Empty if the operator does not belong to a model.
        modules: the same for the modules that own the tensors.
        readings: how many times the data were read again; 0 if they are kept on the device.
        notes: remarks on the computation.

    Examples:
        >>> import torch, flatminima as fm
        >>> operator = fm.FunctionOperator(lambda v: 2 * v, 1000)
        >>> result = fm.trace(operator, method="hutchinson", products=5)
        >>> result.value, result.standard_error, result.products
        (2000.0, 0.0, 5)
    """

    value: float
    standard_error: float
    size: int
    products: int
    outcome: Outcome
    method: str = "hutchinson"
    tensors: tuple[BlockTrace, ...] = ()
    modules: tuple[BlockTrace, ...] = ()
    readings: int = 0
    notes: tuple[str, ...] = ()

    def _table(self) -> Table:
        mean = self.value / self.size, self.standard_error / self.size
        rows: list[tuple[str, ...]] = [
            ("trace", format_number(self.value), format_number(self.standard_error, 2)),
            ("mean eigenvalue", format_number(mean[0]), format_number(mean[1], 2)),
        ]
        largest = sorted(self.modules, key=lambda block: -abs(block.value))[:SHOWN]
        shown = [block for block in self.modules if block in largest]
        rows += [_row(block) for block in shown] if len(self.modules) > 1 else []
        hidden = len(self.modules) - len(shown)
        return Table(
            header=_HEADER,
            rows=tuple(rows),
            title=f"Trace by {_TITLES[self.method]}, {self.products} products",
            notes=(
                self.outcome.value,
                *((f"{hidden} modules with smaller traces are in `modules`.",) if hidden else ()),
                *reading_notes(self.readings),
                *self.notes,
            ),
        )


_TITLES = {
    "hutchinson": "Hutchinson's estimator",
    "hutch++": "Hutch++",
    "xtrace": "XTrace",
    "exact": "its diagonal",
}
