"""The common base of all results of measures, and one line of a report."""

from __future__ import annotations

import dataclasses

from ..results import Outcome, Result, Table, format_number, reading_notes

__all__ = ["HEADER", "MeasureResult", "Measurement", "format_count"]

HEADER = ("measure", "value", "± error", "diagnosis", "cost")


def format_count(number: int, unit: str) -> str:
    """Return a number with its unit, in the plural where needed.

    Examples:
        >>> format_count(1, "gradient"), format_count(3, "loss")
        ('1 gradient', '3 losses')
    """
    plural = {"loss": "losses"}.get(unit, f"{unit}s")
    return f"{number} {unit if number == 1 else plural}"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Measurement(Result):
    """One line of a report.

    Attributes:
        name: name of the measure, with its settings.
        value: the number.
        error: its uncertainty; None if it has none.
        error_kind: the kind of `error`: "residual", "standard error", "std", "bracket",
            "differences" or "".
        outcome: how the computation ended; None for a plain evaluation.
        cost: the cost, in words.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = torch.eye(2), torch.zeros(2, 1)
        >>> report = fm.sharpness(model, torch.nn.MSELoss(), data, measures=["gradient_norm"])
        >>> [(line.name, line.value) for line in report.measurements()][0]
        ('loss L(θ)', 1.0)
    """

    name: str
    value: float
    error: float | None
    error_kind: str
    outcome: Outcome | None
    cost: str

    @property
    def row(self) -> tuple[str, ...]:
        """Its cells in a table under `HEADER`."""
        error = "" if self.error is None else f"{format_number(self.error, 2)} ({self.error_kind})"
        diagnosis = "" if self.outcome is None else self.outcome.brief
        return (self.name, format_number(self.value), error, diagnosis, self.cost)

    def _table(self) -> Table:
        return Table(HEADER, (self.row,))


class MeasureResult(Result):
    """The base class of the results of measures: a number, its outcome, and its cost.

    Attributes:
        value: the measure. Larger is sharper, except for the evidence of a Laplace approximation.
        outcome: how the computation ended.
        readings: how many times the data were read again; 0 if they are kept on the device.
        notes: remarks on the computation.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = torch.eye(2), torch.zeros(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> for measure in (fm.gradient_norm, fm.fisher_rao_norm):
        ...     result = measure(objective, seed=0, progress=False)
        ...     print(type(result).__name__, result.measurements()[0].name, round(result.value, 3))
        GradientNormResult gradient norm ‖∇L‖ 1.414
        FisherRaoResult Fisher–Rao norm 2.0
    """

    value: float
    outcome: Outcome
    readings: int
    notes: tuple[str, ...]

    def measurements(self) -> tuple[Measurement, ...]:
        """Return the number, and others computed with it, as lines of a report."""
        raise NotImplementedError

    def _line(
        self, name: str, cost: str, error: float | None = None, kind: str = ""
    ) -> tuple[Measurement, ...]:
        """Return the value as the only line."""
        return (Measurement(name, self.value, error, kind, self.outcome, cost),)

    def _make_notes(self, *more: str) -> tuple[str, ...]:
        """Return the notes below a table, with `more` after the outcome."""
        return (self.outcome.value, *more, *reading_notes(self.readings), *self.notes)
