"""How each measure reacts when a net is rescaled without changing its function."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from ..errors import ArgumentTypeError, InvalidArgumentError
from ..landscape.symmetry.rescaling import rescale
from ..results import Result, Table, format_number
from ..support.checks import check_choice, check_positive
from ..support.randomness import Seed, draw_seed
from .measure_table import Options
from .result import SharpnessReport
from .sharpness import sharpness

__all__ = ["InvarianceTable", "invariance_table"]

Kind = Literal["layer", "neuron"]

SAME = 0.01
"""Relative change of a measure that counts as none: rounding and maximisers leave some."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class InvarianceTable(Result):
    """Measures of one function in several parametrisations.

    Attributes:
        measures: the names of the measurements.
        values: of the net as it is.
        rescaled: by the kind of rescaling, the values after it.
        ratios: of these to `values`; NaN where both are zero.
        factor: of the rescaling.
        loss_change: the largest relative change of the loss, which is rounding alone.
        tolerance: up to which relative change a measure counts as unchanged.
        notes: remarks on the computation.

    Examples:
        >>> import torch, flatminima as fm
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> loss_fn, data = torch.nn.CrossEntropyLoss(), (torch.randn(9, 3), torch.arange(9) % 2)
        >>> some = ["gradient_norm", "fisher_rao_norm"]
        >>> table = fm.invariance_table(net, loss_fn, data, measures=some)
        >>> {name: table.invariant("layer", name) for name in table.measures}
        {'loss L(θ)': True, 'gradient norm ‖∇L‖': False, 'Fisher–Rao norm': True}
    """

    measures: tuple[str, ...]
    values: tuple[float, ...]
    rescaled: dict[str, tuple[float, ...]]
    ratios: dict[str, tuple[float, ...]]
    factor: float
    loss_change: float
    tolerance: float
    notes: tuple[str, ...] = ()

    def invariant(self, kind: str, measure: str) -> bool:
        """Return whether a measure was unchanged by a kind of rescaling, within the tolerance."""
        check_choice("InvarianceTable.invariant", "kind", kind, self.ratios)
        check_choice("InvarianceTable.invariant", "measure", measure, self.measures)
        return self._same(self.ratios[kind][self.measures.index(measure)])

    def _same(self, ratio: float) -> bool:
        return math.isnan(ratio) or abs(ratio - 1) <= self.tolerance

    def _table(self) -> Table:
        kinds = list(self.ratios)
        rows = []
        for i, (name, value) in enumerate(zip(self.measures, self.values, strict=True)):
            cells = []
            for kind in kinds:
                ratio = self.ratios[kind][i]
                cells += ["unchanged" if self._same(ratio) else f"× {format_number(ratio, 3)}"]
            rows.append((name, format_number(value), *cells))
        return Table(
            header=("measure", "value", *(f"per {kind}" for kind in kinds)),
            rows=tuple(rows),
            title=f"The same function, rescaled by {self.factor:g}",
            notes=(
                f"The loss changed by {format_number(self.loss_change, 2)}, relatively. Unchanged: "
                f"within {100 * self.tolerance:g} %.",
                *self.notes,
            ),
        )


def invariance_table(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    data: Any = None,
    *,
    measures: str | Sequence[str] | Mapping[str, Options | Sequence[Options] | None] = "all",
    factor: float = 10.0,
    per: Kind | Sequence[Kind] = ("layer", "neuron"),
    layers: str | Sequence[str] | None = None,
    tolerance: float = SAME,
    seed: Seed = 0,
    progress: bool = True,
    **options: Any,
) -> InvarianceTable:
    """Measure a ReLU net, and the same function with its layers rescaled (Dinh et al. 2017).

    The net is rescaled by [`rescale`][flatminima.rescale], which changes no output, and measured
    with the same seeds (arXiv:1703.04933, section 4). What changes is a property of the
    parametrisation, not of the function: a measure that does can be made as large as one likes.
    Float64 models keep rounding out of the comparison.

    Args:
        model: one that `rescale` takes.
        loss_fn: as of [`sharpness`][flatminima.sharpness].
        data: as of [`sharpness`][flatminima.sharpness].
        measures: as of [`sharpness`][flatminima.sharpness]; Default: all of them.
        factor: of the rescaling.
        per: kinds of rescaling, as of [`rescale`][flatminima.rescale].
        layers: which to rescale, as of [`rescale`][flatminima.rescale].
        tolerance: up to which relative change a measure counts as unchanged.
        seed: of everything random.
        progress: show bars for what takes long.
        **options: of [`sharpness`][flatminima.sharpness], such as `samples` or `batch_size`.

    Returns:
        Each measure with its ratio after each kind of rescaling.

    Raises:
        InvalidArgumentError: the net cannot be rescaled; the message names the layer. Or its loss
            changes under rescaling, which says that it is not what it was taken for.
        FlatMinimaError: whatever `sharpness` refuses.

    Warns:
        FlatMinimaWarning: some layers cannot be rescaled.

    Examples:
        >>> import torch, flatminima as fm
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> data = torch.randn(20, 3), torch.randint(2, (20,))
        >>> table = fm.invariance_table(
        ...     net.double(),
        ...     torch.nn.CrossEntropyLoss(),
        ...     (data[0].double(), data[1]),
        ...     measures={"sam_sharpness": [{"rho": 0.1}, {"rho": 0.1, "adaptive": True}]},
        ... )
        >>> table.ratios["layer"][1] > 1.5, round(table.ratios["layer"][2], 6)
        (True, 1.0)
    """
    call = "invariance_table"
    kinds: list[Kind] = [per] if isinstance(per, str) else list(per)
    if not kinds:
        raise InvalidArgumentError(f"The 'per' argument of {call} is empty; name 'layer' or more.")
    for kind in kinds:
        check_choice(call, "per", kind, ("layer", "neuron"))
    factor = check_positive(call, "factor", factor)
    tolerance = check_positive(call, "tolerance", tolerance)
    if measures is None:
        raise ArgumentTypeError(f"The 'measures' argument of {call} must name measures; got None.")
    number = draw_seed(seed, torch.device("cpu"))
    models = {
        kind: rescale(model, factor=factor, per=kind, layers=layers, seed=number) for kind in kinds
    }

    def measured(net: nn.Module) -> SharpnessReport:
        return sharpness(
            net, loss_fn, data, measures=measures, seed=number, progress=progress, **options
        )

    base = measured(model)
    eps = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    reports: dict[str, SharpnessReport] = {kind: measured(net) for kind, net in models.items()}
    for name, report in reports.items():
        _check_same(call, name, base, report, eps)
    lines = {m.name: m for m in base.measurements()}
    others = {kind: {m.name: m for m in r.measurements()} for kind, r in reports.items()}
    shared = [n for n in lines if all(n in found for found in others.values())]
    dropped = [name for name in lines if name not in shared]
    values = tuple(lines[name].value for name in shared)
    after = {kind: tuple(found[n].value for n in shared) for kind, found in others.items()}
    notes = dict.fromkeys(note for r in (base, *reports.values()) for note in r.notes)
    if dropped:
        notes[f"Not to be had after rescaling, and left out: {', '.join(dropped)}."] = None
    return InvarianceTable(
        measures=tuple(shared),
        values=values,
        rescaled=after,
        ratios={kind: tuple(map(_ratio, found, values)) for kind, found in after.items()},
        factor=factor,
        loss_change=max(_change(r.loss, base.loss) for r in reports.values()),
        tolerance=tolerance,
        notes=(*notes, *_doubts(lines, others)),
    )


def _ratio(after: float, before: float) -> float:
    if before == 0:
        return math.nan if after == 0 else math.inf
    return after / before


def _change(after: float, before: float) -> float:
    """Return Relative; absolute from zero."""
    return abs(after - before) / (abs(before) or 1.0)


def _check_same(
    call: str, kind: str, base: SharpnessReport, report: SharpnessReport, eps: float
) -> None:
    rounding = 1e4 * eps * max(abs(base.loss), 1.0)
    if abs(report.loss - base.loss) > rounding:
        raise InvalidArgumentError(
            f"{call}: after rescaling per {kind} the loss is {report.loss:.6g} instead of "
            f"{base.loss:.6g}, so the function is another one: a part of the loss depends on the "
            "parameters themselves (weight decay), or on hidden layers, or rounding is too coarse "
            "(use float64, or a smaller factor)."
        )


def _doubts(lines: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Return numbers that did not converge in one of the parametrisations."""
    notes = []
    for name in lines:
        for kind, found in (("as it is", lines), *others.items()):
            line = found.get(name)
            if line is not None and line.outcome is not None and line.outcome.doubtful:
                where = kind if kind == "as it is" else f"per {kind}"
                notes.append(f"{name}, {where}: {line.outcome.brief}.")
    return tuple(notes)
