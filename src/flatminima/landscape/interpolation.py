"""The loss along the line, or an arc, between two models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from torch import Tensor

from ..errors import InvalidArgumentError
from ..objective.metrics import Metric
from ..objective.objective import Objective, check_objective
from ..results import Outcome, Result, Table, format_number, reading_notes
from ..support.checks import check_choice
from ..support.precision import precision_notes
from ..support.progress import progress_bar
from .buffers import recomputed_buffers, recomputed_names
from .data_sets import check_metrics, named_objectives
from .endpoints import Between, Endpoint, State, checked_points

__all__ = [
    "BEZIER",
    "BUFFERS",
    "Barrier",
    "Curve",
    "Endpoint",
    "Interpolation",
    "State",
    "evaluate_path",
    "interpolate",
]

BEZIER = "bezier"
BUFFERS = ("interpolate", "keep", "recompute")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Curve(Result):
    """One data set along the path.

    Attributes:
        loss: L at each α.
        metrics: by name, each metric at each α.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = torch.eye(2), torch.zeros(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> line = fm.interpolate(objective, torch.zeros(2), torch.ones(2), alphas=[0, 1])
        >>> line.curves["train"].loss
        (0.0, 1.0)
    """

    loss: tuple[float, ...]
    metrics: dict[str, tuple[float, ...]]

    def _table(self) -> Table:
        header = ("point", "loss", *self.metrics)
        columns = [self.loss, *self.metrics.values()]
        rows = zip(*columns, strict=True)
        return Table(
            header,
            tuple((str(i), *(format_number(v) for v in row)) for i, row in enumerate(rows)),
        )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Barrier(Result):
    """How far a path rises above the straight line between its end values, and where.

    Attributes:
        height: of the highest point above the chord, never negative; for a metric, the deepest
            fall below it. Infinite where a value is NaN or infinite.
        alpha: where that is; 0 where nothing rises.
        quantity: "loss", or the metric's name.
        curve: the name of the data set.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> loss = lambda output, target: (output**2 - 1).square().mean()
        >>> objective = fm.Objective(model, loss, (torch.ones(1, 1), torch.zeros(1, 1)))
        >>> ends = torch.tensor([-1.0]), torch.tensor([1.0])
        >>> fm.interpolate(objective, *ends, alphas=[0, 0.25, 0.5, 1]).barrier()
        Barrier between α = 0 and α = 1
        quantity    height    α
        ──────────  ──────  ───
        train loss       1  0.5
    """

    height: float
    alpha: float
    quantity: str
    curve: str

    def _table(self) -> Table:
        row = (f"{self.curve} {self.quantity}", *map(format_number, (self.height, self.alpha)))
        return Table(("quantity", "height", "α"), (row,), title="Barrier between α = 0 and α = 1")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Interpolation(Result):
    """Losses and metrics along a path between two models: `start` at α = 0, `end` at α = 1.

    Attributes:
        alphas: the points.
        curves: by name of the data set; the objective's own is "train", those of `also` follow.
        path: "linear" or "curvilinear"; "bezier" along the curve of a `Connection`.
        buffers: "interpolate", "keep" or "recompute".
        evaluations: passes over a data set, those in which buffers are recomputed among them.
        outcome: completed, or completed with values that are not finite.
        notes: remarks on the computation.
        readings: how many times the data were read again; 0 if they are kept on the device.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = torch.eye(2), torch.zeros(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> fm.interpolate(objective, torch.zeros(2), torch.ones(2), alphas=[0, 1])
        Linear interpolation, start at α = 0, end at α = 1
        α  train loss
        ─  ──────────
        0           0
        1           1
        Note: Completed: everything was evaluated.
    """

    alphas: tuple[float, ...]
    curves: dict[str, Curve]
    path: str
    buffers: str
    evaluations: int
    outcome: Outcome
    notes: tuple[str, ...] = ()
    readings: int = 0

    @property
    def loss(self) -> tuple[float, ...]:
        """L at each α on the objective's own data."""
        return self.curves["train"].loss

    @property
    def metrics(self) -> dict[str, tuple[float, ...]]:
        """The metrics at each α on the objective's own data."""
        return self.curves["train"].metrics

    def barrier(self, curve: str = "train", metric: str | None = None) -> Barrier:
        """The largest height above the chord, max over α in [0, 1] of L(α) − (1−α) L(0) − α L(1).

        The height above the chord, as in Entezari et al. (2022, arXiv:2110.06296); the error
        barrier of Frankle et al. (2020, arXiv:1912.05671) has the mean of the end values in place
        of the chord, and is the same where these are equal. It is taken over the points that were
        evaluated, so that more of them can only raise it.

        Args:
            curve: which data set.
            metric: by name, in place of the loss. Metrics are taken for better the larger they
                are, as accuracy is: the height is that of the fall below the chord.

        Raises:
            InvalidArgumentError: α = 0 or α = 1 was not evaluated, or there is no such curve or
                metric.

        Examples:
            >>> import torch, flatminima as fm
            >>> model = torch.nn.Linear(1, 1, bias=False)
            >>> objective = fm.Objective(
            ...     model, lambda output, target: -output.square().mean(), (torch.ones(1, 1),) * 2
            ... )
            >>> ends = torch.tensor([0.0]), torch.tensor([2.0])
            >>> found = fm.interpolate(objective, *ends, alphas=[0, 0.25, 0.5, 1]).barrier()
            >>> found.height, found.alpha  # −4α² against the chord −4α
            (1.0, 0.5)
        """
        call = "Interpolation.barrier"
        check_choice(call, "curve", curve, self.curves)
        found = self.curves[curve]
        if metric is not None and not found.metrics:
            raise InvalidArgumentError(
                f"{call} needs {metric!r}, but the {curve!r} curve has no metrics; give "
                'them to interpolate, as metrics={"accuracy": fm.accuracy}.'
            )
        values: Sequence[float] = found.loss
        if metric is not None:
            check_choice(call, "metric", metric, found.metrics)
            values = [-v for v in found.metrics[metric]]
        if not {0.0, 1.0} <= set(self.alphas):
            raise InvalidArgumentError(
                f"{call} needs the values at α = 0 and α = 1, and one or both were not "
                "evaluated; give interpolate alphas= with both, as torch.linspace(0, 1, 21)."
            )
        first, last = (values[self.alphas.index(end)] for end in (0.0, 1.0))
        height = place = 0.0
        for alpha, value in sorted(zip(self.alphas, values, strict=True)):
            if not 0 <= alpha <= 1:
                continue
            if not math.isfinite(value):
                height, place = math.inf, alpha
                break
            # In this form, equal ends are met exactly.
            rise = value - (first + alpha * (last - first))
            if 0 < alpha < 1 and rise > height:
                height, place = rise, alpha
        return Barrier(height, place, metric or "loss", curve)

    def _barriers(self) -> tuple[str, ...]:
        """Return what a table says of them, where something was evaluated between the ends."""
        if not {0.0, 1.0} <= set(self.alphas) or not any(0 < a < 1 for a in self.alphas):
            return ()
        found = [self.barrier(n, m) for n, c in self.curves.items() for m in (None, *c.metrics)]
        said = (
            f"{b.curve} {b.quantity} {format_number(b.height)}"
            + (f" at α = {format_number(b.alpha)}" if b.height else "")
            for b in found
        )
        fall = (
            " (of metrics, the fall below it)"
            if any(c.metrics for c in self.curves.values())
            else ""
        )
        return (f"Barrier above the chord from α = 0 to 1{fall}: {', '.join(said)}.",)

    def _table(self) -> Table:
        header = ["α"]
        columns: list[Sequence[float]] = [self.alphas]
        for name, curve in self.curves.items():
            header += [f"{name} loss", *(f"{name} {m}" for m in curve.metrics)]
            columns += [curve.loss, *curve.metrics.values()]
        title = "Bézier curve" if self.path == BEZIER else f"{self.path.capitalize()} interpolation"
        return Table(
            tuple(header),
            tuple(tuple(format_number(v) for v in row) for row in zip(*columns, strict=True)),
            title=f"{title}, start at α = 0, end at α = 1",
            notes=(
                self.outcome.value,
                *self._barriers(),
                *reading_notes(self.readings),
                *self.notes,
            ),
        )


def interpolate(
    objective: Objective,
    start: Endpoint,
    end: Endpoint,
    *,
    alphas: Sequence[float] | Tensor | None = None,
    path: Literal["linear", "curvilinear"] = "linear",
    metrics: Mapping[str, Metric] | None = None,
    also: Mapping[str, Objective] | None = None,
    buffers: Literal["interpolate", "keep", "recompute"] = "interpolate",
    progress: bool = True,
) -> Interpolation:
    """Loss and metrics at (1 − α) start + α end, the parametric plot of Keskar et al. (2017).

    The curvilinear path is cos(απ/2) start + sin(απ/2) end. All parameters and floating-point
    buffers (the statistics of batch norm) are interpolated, as in the authors' own script, which
    mixes whole state dicts. Outside [0, 1], where a coefficient is negative and would make running
    variances negative, they are mixed with the absolute values of the coefficients.

    Args:
        objective: the loss and data; its model gives the architecture and stays as it is.
        start: the model at α = 0: a module, a state dict, or a parameter vector (n,) in the
            objective's order.
        end: the model at α = 1, in the same form.
        alphas: the points. Default: 25 equally spaced ones on [−1, 2].
        path: "linear" or "curvilinear".
        metrics: `metric(output, target)` by name, such as `{"accuracy": fm.accuracy}`.
        also: further objectives by name (`{"test": test_objective}`), evaluated at the same
            points; their models must have the same tensors.
        buffers: "interpolate"; "keep" those of the objective's model; or "recompute", which
            interpolates them and then recomputes the statistics of batch norm at each point,
            by a pass over the objective's own data (also for the curves of `also`).
        progress: show a bar if it takes long.

    Returns:
        The curves; infinite and NaN values are kept.

    Raises:
        StateMismatchError: the endpoints do not have the model's tensors; it says which.
        InvalidArgumentError: no points, points that are not finite, an unknown path.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> data = torch.ones(1, 1), torch.zeros(1, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> start, end = torch.tensor([0.0]), torch.tensor([2.0])
        >>> fm.interpolate(objective, start, end, alphas=[0.0, 0.5, 1.0]).loss
        (0.0, 1.0, 4.0)
    """
    call = "interpolate"
    check_objective(call, objective)
    check_choice(call, "path", path, ("linear", "curvilinear"))
    check_choice(call, "buffers", buffers, BUFFERS)
    points = checked_points(call, alphas, tuple(-1 + i / 8 for i in range(25)))
    metrics = check_metrics(call, metrics)
    objectives = named_objectives(call, objective, also)
    between = Between.read(call, objectives, start, end, buffers)
    return evaluate_path(
        objectives,
        points,
        lambda alpha: between.at(alpha, path),
        metrics,
        path=path,
        between=between,
        progress=progress,
    )


def evaluate_path(
    objectives: Mapping[str, Objective],
    points: tuple[float, ...],
    state_at: Callable[[float], State],
    metrics: Mapping[str, Metric],
    *,
    path: str,
    between: Between,
    progress: bool,
) -> Interpolation:
    """Return losses and metrics of every objective at each point of a path of state dicts.

    Where buffers are recomputed, the statistics of batch norm are those on the data of "train".
    """
    objective = objectives["train"]
    recomputed = recomputed_names(objective.model) if between.buffers == "recompute" else set[str]()
    statistics: list[State] = []
    data = {id(o): o.batches for o in objectives.values()}.values()
    before = sum(batches.readings for batches in data)
    losses: dict[str, list[float]] = {name: [] for name in objectives}
    values: dict[str, dict[str, list[float]]] = {
        name: {m: [] for m in metrics} for name in objectives
    }
    total = len(points) * (len(objectives) + bool(recomputed))
    with progress_bar("interpolation", total=total, unit="pass", show=progress) as bar:

        def states() -> Iterator[State]:
            for number, alpha in enumerate(points):
                state = state_at(alpha)
                if recomputed and number == len(statistics):
                    statistics.append(recomputed_buffers(objective, state))
                    bar.update()
                yield state | statistics[number] if recomputed else state

        for name, each in objectives.items():
            for loss, measured in each.evaluate_states(states(), metrics):
                losses[name].append(loss)
                for metric_name, value in measured.items():
                    values[name][metric_name].append(value)
                bar.update()
    curves = {
        name: Curve(tuple(losses[name]), {m: tuple(v) for m, v in values[name].items()})
        for name in objectives
    }
    finite = all(math.isfinite(v) for c in losses.values() for v in c)
    return Interpolation(
        alphas=points,
        curves=curves,
        path=path,
        buffers=between.buffers,
        evaluations=total,
        outcome=Outcome.COMPLETED if finite else Outcome.NON_FINITE_POINTS,
        notes=between.notes(points, recomputed)
        + precision_notes(objective.model, objective.device),
        readings=sum(b.readings for b in data) - before,
    )
