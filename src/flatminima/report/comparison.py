"""Reports side by side."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from ..errors import ArgumentTypeError, InvalidArgumentError
from ..results import Result, Table, format_number
from ..support.checks import check_choice
from .result import SharpnessReport

__all__ = ["Comparison", "compare"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Comparison(Result):
    """Several models measured alike, side by side.

    Attributes:
        labels: of the models; the ratios are to the first.
        measures: the names of the measurements that all reports share.
        values: for each label, for each measure, the values of all its reports (one for each
            seed).
        ratio_of_means: for each label, for each measure: its mean over the first label's.
        notes: what stands in the way of comparing: numbers that did not converge, reports that
            were not made alike.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = torch.eye(2), torch.zeros(2, 1)
        >>> report = fm.sharpness(model, torch.nn.MSELoss(), data, measures=["trace"])
        >>> comparison = fm.compare({"one": report, "same": report})
        >>> comparison.ratio_of_means["same"]
        (1.0, 1.0)
    """

    labels: tuple[str, ...]
    measures: tuple[str, ...]
    values: dict[str, tuple[tuple[float, ...], ...]]
    ratio_of_means: dict[str, tuple[float, ...]]
    notes: tuple[str, ...] = ()

    def mean(self, label: str, measure: str) -> float:
        """Return mean over the reports (seeds) of one label."""
        return _mean(self._reports(label, measure))

    def standard_deviation(self, label: str, measure: str) -> float:
        """Over the reports (seeds) of one label, n − 1 in the denominator; NaN for one."""
        return _spread(self._reports(label, measure))

    def _table(self) -> Table:
        header = ["measure", *self.labels]
        header += [f"{label} / {self.labels[0]}" for label in self.labels[1:]]
        rows = []
        for i, measure in enumerate(self.measures):
            cells = [_mean_and_spread(self.values[label][i]) for label in self.labels]
            ratios = [format_number(self.ratio_of_means[n][i], 3) for n in self.labels[1:]]
            rows.append((measure, *cells, *ratios))
        count = max(len(self.values[label][0]) for label in self.labels)
        counts = {label: len(self.values[label][0]) for label in self.labels}
        over = ", ".join(f"{n} ({label})" for label, n in counts.items())
        if len(set(counts.values())) == 1:
            over = str(count)
        spread = (f"Mean ± standard deviation over {over} seeds.",) if count > 1 else ()
        return Table(tuple(header), tuple(rows), notes=spread + self.notes)

    def _reports(self, label: str, measure: str) -> tuple[float, ...]:
        for argument, name, known in (
            ("label", label, self.labels),
            ("measure", measure, self.measures),
        ):
            check_choice("Comparison", argument, name, known)
        return self.values[label][self.measures.index(measure)]


# `math.fsum` does not take infinities of both signs.


def _mean(values: Sequence[float]) -> float:
    finite = all(map(math.isfinite, values))
    return (math.fsum(values) if finite else sum(values)) / len(values)


def _spread(values: Sequence[float]) -> float:
    """Return the standard deviation, with n − 1 in the denominator."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    mean = _mean(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def _mean_and_spread(values: Sequence[float]) -> str:
    mean = format_number(_mean(values))
    return mean if len(values) == 1 else f"{mean} ± {format_number(_spread(values), 2)}"


def compare(reports: Mapping[str, SharpnessReport | Sequence[SharpnessReport]]) -> Comparison:
    """Return reports side by side, with the ratios to the first.

    Args:
        reports: by label, one report or several (of the same training with other seeds), which
            then appear as mean ± standard deviation.

    Returns:
        A table of the measurements that all reports share.

    Raises:
        InvalidArgumentError: fewer than two labels, or an empty list.
        ArgumentTypeError: something that is not a report.

    Examples:
        >>> import torch, flatminima as fm
        >>> x, y = torch.eye(2), torch.zeros(2, 1)
        >>> reports = {}
        >>> for name, size in {"small": 1.0, "large": 2.0}.items():
        ...     model = torch.nn.Linear(2, 1, bias=False)
        ...     _ = torch.nn.init.constant_(model.weight, size)
        ...     reports[name] = fm.sharpness(
        ...         model, torch.nn.MSELoss(), (x, y), measures=["gradient_norm"]
        ...     )
        >>> print(fm.compare(reports))
        measure             small  large  large / small
        ──────────────────  ─────  ─────  ─────────────
        loss L(θ)               1      4              4
        gradient norm ‖∇L‖  1.414  2.828              2
    """
    if not isinstance(reports, Mapping):
        raise ArgumentTypeError(
            'compare takes a mapping such as {"small batch": report, "large batch": report}; got '
            f"{type(reports).__name__}."
        )
    if len(reports) < 2:
        raise InvalidArgumentError(f"compare needs two reports at least; got {len(reports)}.")
    series: dict[str, list[SharpnessReport]] = {}
    for label, given in reports.items():
        several = list(given) if isinstance(given, Iterable) else [given]
        if not several:
            raise InvalidArgumentError(f"compare got an empty list for {label!r}.")
        for report in several:
            if not isinstance(report, SharpnessReport):
                raise ArgumentTypeError(
                    f"compare takes reports of sharpness(); {label!r} holds a "
                    f"{type(report).__name__}."
                )
        series[str(label)] = several
    numbers = {
        label: [{m.name: m.value for m in report.measurements()} for report in several]
        for label, several in series.items()
    }
    every = [report for several in numbers.values() for report in several]
    shared = [name for name in every[0] if all(name in report for report in every)]
    values = {
        label: tuple(tuple(report[name] for report in several) for name in shared)
        for label, several in numbers.items()
    }
    labels = tuple(values)
    base = [_mean(v) for v in values[labels[0]]]
    ratios = {
        label: tuple(
            _mean(v) / b if b else math.nan for v, b in zip(values[label], base, strict=True)
        )
        for label in labels
    }
    return Comparison(labels, tuple(shared), values, ratios, _doubts(series))


def _doubts(series: Mapping[str, Sequence[SharpnessReport]]) -> tuple[str, ...]:
    """What a reader of a comparison should know: unlike reports and numbers not to be trusted."""
    notes = []
    for name in ("parameters", "examples", "mode"):
        found = {
            label: {str(getattr(r, name)) for r in several} for label, several in series.items()
        }
        if len(set().union(*found.values())) > 1:
            each = "; ".join(f"{label}: {', '.join(sorted(v))}" for label, v in found.items())
            notes.append(f"The reports differ in {name} ({each}), so they may not compare.")
    names = [{m.name for m in r.measurements()} for several in series.values() for r in several]
    dropped = sorted(names[0].union(*names) - names[0].intersection(*names))
    if dropped:
        notes.append("Not in all reports, and left out: " + "; ".join(dropped) + ".")
    for label, several in series.items():
        for line in several[0].measurements():
            outcomes = [m.outcome for r in several for m in r.measurements() if m.name == line.name]
            bad = [o for o in outcomes if o is not None and o.doubtful]
            if bad:
                notes.append(f"{line.name}, {label}: {bad[0].brief}.")
    return tuple(notes)
