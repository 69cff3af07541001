"""The loss on a grid around a model, spanned by directions."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike

import torch
from torch import Tensor

from ..errors import ArgumentTypeError, InvalidArgumentError
from ..objective.metrics import Metric
from ..objective.objective import Objective, check_objective
from ..results import Outcome, Result, Table, format_number, reading_notes
from ..support.checks import check_integer, check_number, check_positive
from ..support.precision import precision_notes
from ..support.progress import progress_bar
from .data_sets import check_metrics, named_objectives
from .directions import Directions, check_directions
from .endpoints import model_state
from .grid_file import GridFile

__all__ = ["Grid", "Surface", "surface"]

Extent = float | tuple[float, float]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Grid(Result):
    """One data set on the grid.

    Attributes:
        loss: L at each point, float64, one dimension for each direction.
        metrics: by name, on the same grid.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> data = torch.eye(2), torch.zeros(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> fm.surface(objective, torch.eye(2), points=3).grids["train"].loss
        tensor([[1.0000, 0.5000, 1.0000],
                [0.5000, 0.0000, 0.5000],
                [1.0000, 0.5000, 1.0000]], dtype=torch.float64)
    """

    loss: Tensor
    metrics: dict[str, Tensor]

    def _table(self) -> Table:
        rows = [("loss", *_range(self.loss))]
        rows += [(name, *_range(values)) for name, values in self.metrics.items()]
        return Table(("quantity", "least", "largest", "not finite"), tuple(rows))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Surface(Result):
    """The loss at θ + Σ a_i d_i on a grid of the a_i, θ itself among its points.

    Attributes:
        coordinates: the values of each a_i, ascending.
        grids: by name of the data set; the objective's own is "train", those of `also` follow.
        labels: what each direction is.
        units: what 1 on each axis is.
        evaluations: passes over a data set, without those that a file had the results of.
        outcome: completed, or completed with values that are not finite, which are kept.
        notes: remarks on the computation.
        readings: how many times the data were read again; 0 if they are kept on the device.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = torch.eye(2), torch.zeros(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> result = fm.surface(objective, torch.eye(2), points=5)
        >>> result.center, float(result.loss[result.center]) == objective.loss()
        ((2, 2), True)
    """

    coordinates: tuple[tuple[float, ...], ...]
    grids: dict[str, Grid]
    labels: tuple[str, ...]
    units: tuple[str, ...]
    evaluations: int
    outcome: Outcome
    notes: tuple[str, ...] = ()
    readings: int = 0

    @property
    def loss(self) -> Tensor:
        """L at each point on the objective's own data."""
        return self.grids["train"].loss

    @property
    def metrics(self) -> dict[str, Tensor]:
        """The metrics at each point on the objective's own data."""
        return self.grids["train"].metrics

    @property
    def center(self) -> tuple[int, ...]:
        """Where the model itself is on the grid."""
        return tuple(values.index(0.0) for values in self.coordinates)

    def _table(self) -> Table:
        rows = []
        for name, grid in self.grids.items():
            quantities = {"loss": grid.loss, **grid.metrics}
            for what, values in quantities.items():
                here = format_number(float(values[self.center]))
                rows.append((f"{name} {what}", here, *_range(values)))
        size = " × ".join(str(len(values)) for values in self.coordinates)
        axes = [
            f"{label}: {format_number(values[0])} to {format_number(values[-1])} {unit}"
            for label, unit, values in zip(self.labels, self.units, self.coordinates, strict=True)
        ]
        return Table(
            ("quantity", "at the model", "least", "largest", "not finite"),
            tuple(rows),
            title=f"Surface of {size} points",
            notes=(self.outcome.value, *axes, *reading_notes(self.readings), *self.notes),
        )


def _range(values: Tensor) -> tuple[str, str, str]:
    finite = values[values.isfinite()]
    missing = str(values.numel() - finite.numel())
    if finite.numel() == 0:
        return "–", "–", missing
    return format_number(float(finite.min())), format_number(float(finite.max())), missing


def surface(
    objective: Objective,
    directions: Directions | Tensor | Sequence[Tensor],
    *,
    extent: Extent | Sequence[Extent] = 1.0,
    points: int | Sequence[int] = 25,
    metrics: Mapping[str, Metric] | None = None,
    also: Mapping[str, Objective] | None = None,
    resume: str | PathLike[str] | None = None,
    progress: bool = True,
) -> Surface:
    """Return the loss on a grid around the model: L(θ + Σ a_i d_i), in one, two or more dimensions.

    The grid has θ itself among its points (Li et al. 2018, arXiv:1712.09913, for
    filter-normalised directions). Buffers, such as the statistics of batch norm, stay as the model
    has them. If data are read again each time, a reading serves as many points as fit into a
    budget of memory.

    Args:
        objective: the loss and data; its model is the centre, and stays as it is.
        directions: d_i, as from `random_directions`, `eigenvector_directions` and their like, or a
            tensor (n,) or (n, d), or a list of vectors (n,).
        extent: how far a_i goes, in the unit of its direction, to both sides; or (low, high) with
            0 between them; one end is moved outwards, usually by less than a step, so
            that 0 is on the grid. One for all directions, or a list of one for each.
        points: along each axis, one for all or one for each; an odd number where the extent is
            the same to both sides, so that 0 is among them.
        metrics: `metric(output, target)` by name, such as `{"accuracy": fm.accuracy}`.
        also: further objectives by name (`{"test": test_objective}`), evaluated at the same
            points; their models must have the same tensors, and are given those of the first.
        resume: a file (.npz) to keep what is done in, every few seconds and when interrupted, and
            to go on from. One of another model, direction, grid or loss is refused.
        progress: show a bar, with the time left, if it takes long.

    Returns:
        The grids; infinite and NaN values are kept as they are.

    Raises:
        InvalidArgumentError: an extent of zero, or one that leaves 0 out; an even number of points
            for a symmetric one; directions that are parallel or zero; or a file of another
            surface, with what differs.
        ShapeError: directions of another length than the parameters.
        NonFiniteError: L(θ) is NaN or infinite.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> line = fm.surface(objective, torch.tensor([1.0, 0.0]), extent=1.0, points=3)
        >>> line.coordinates[0], line.loss.tolist()  # 2 ((1 + a)² + 1)
        ((-1.0, 0.0, 1.0), [2.0, 4.0, 10.0])
    """
    call = "surface"
    check_objective(call, objective)
    known = check_directions(call, objective, directions)
    coordinates = _coordinates(call, known.count, extent, points)
    metrics = check_metrics(call, metrics)
    objectives = named_objectives(call, objective, also)
    shape = tuple(map(len, coordinates))
    total = math.prod(shape)
    data = {id(o): o.batches for o in objectives.values()}.values()
    before = sum(batches.readings for batches in data)
    objective.loss()  # which raises where it is not finite
    quantities = ("loss", *metrics)
    file = GridFile(
        resume,
        {
            "the model's parameters": objective.point(),
            "the directions": known.vectors,
            "the grid": [list(values) for values in coordinates],
            "the data sets": list(objectives),
            "the metrics": list(metrics),
            **(_settings(objectives, metrics, known.vectors, coordinates) if resume else {}),
        },
        torch.full((len(objectives), len(quantities), total), math.nan, dtype=torch.float64),
    )
    values, evaluations = file.values, 0
    with (
        file,
        progress_bar("surface", total=total * len(objectives), unit="point", show=progress) as bar,
    ):
        for number, each in enumerate(objectives.values()):
            first = file.done(number)
            evaluations += total - first
            bar.update(first)
            # Another model may differ in what is not varied.
            whole = {} if each.model is objective.model else model_state(objective.model)
            states = (
                whole | state for state in _states(objective, known.vectors, coordinates, first)
            )
            found = each.evaluate_states(states, metrics)
            for place, (loss, measured) in enumerate(found, start=first):
                numbers = [loss, *measured.values()]
                values[number, :, place] = torch.tensor(numbers, dtype=torch.float64)
                file.advance(number)
                bar.update()
    grids = {}
    for number, name in enumerate(objectives):
        parts = [part.reshape(shape).clone() for part in values[number]]
        grids[name] = Grid(parts[0], dict(zip(metrics, parts[1:], strict=True)))
    finite = bool(values[:, 0].isfinite().all())
    return Surface(
        coordinates=coordinates,
        grids=grids,
        labels=known.labels,
        units=known.units,
        evaluations=evaluations,
        outcome=Outcome.COMPLETED if finite else Outcome.NON_FINITE_POINTS,
        notes=known.notes + precision_notes(objective.model, objective.device),
        readings=sum(batches.readings for batches in data) - before,
    )


def _states(
    objective: Objective,
    vectors: Tensor,
    coordinates: tuple[tuple[float, ...], ...],
    first: int,
) -> Iterator[dict[str, Tensor]]:
    """Yield the parameters at each point of the grid, the last axis fastest, from a number on."""
    point, layout = objective.point(), objective.layout
    # Rows, so that each direction is read in one piece.
    rows = vectors.to(point).T.contiguous()
    for place in itertools.islice(itertools.product(*coordinates), first, None):
        moved = point.clone()
        for amount, row in zip(place, rows, strict=True):
            # At the centre the parameters are the model's own to the last bit.
            if amount:
                moved.add_(row, alpha=amount)
        yield dict(zip(layout.names, layout.unflatten(moved), strict=True))


def _settings(
    objectives: Mapping[str, Objective],
    metrics: Mapping[str, Metric],
    vectors: Tensor,
    coordinates: tuple[tuple[float, ...], ...],
) -> dict[str, object]:
    """What tells losses, data, metrics and buffers apart: values at the model and in a corner."""
    first = next(iter(objectives.values()))
    whole = model_state(first.model)
    held = [
        t.double().flatten().cpu() for n, t in sorted(whole.items()) if n not in first.parameters
    ]
    corner = next(_states(first, vectors, coordinates, 0))
    at: dict[str, list[str]] = {"the loss at the model": [], "the loss or metrics in a corner": []}
    for each in objectives.values():
        found = list(each.evaluate_states([whole, whole | corner], metrics))
        # But for what another machine rounds otherwise.
        for (loss, measured), values in zip(found, at.values(), strict=True):
            values += [f"{value:.4e}" for value in (loss, *measured.values())]
    kept = torch.cat(held) if held else torch.zeros(0)
    return {**at, "the model's buffers and other parameters": kept}


def _coordinates(
    call: str, count: int, extent: object, points: object
) -> tuple[tuple[float, ...], ...]:
    """Return the values along each axis, 0 among them."""
    extents = _each(call, "extent", extent, count, pair=True)
    numbers = _each(call, "points", points, count)
    return tuple(
        _axis(call, e, check_integer(call, "points", n, low=3))
        for e, n in zip(extents, numbers, strict=True)
    )


def _each(
    call: str, argument: str, given: object, count: int, *, pair: bool = False
) -> list[object]:
    """Return one entry for each direction, from one for all or from a list."""
    if not isinstance(given, Sequence) or isinstance(given, str):
        return [given] * count
    if pair and isinstance(given, tuple) and len(given) == 2:
        return [given] * count
    entries: list[object] = list(given)
    if len(entries) != count:
        raise InvalidArgumentError(
            f"The {argument!r} argument of {call} must be one for all directions or a list of "
            f"{count}; got {len(entries)}."
        )
    return entries


def _axis(call: str, extent: object, points: int) -> tuple[float, ...]:
    """Return evenly spaced values with exactly 0 among them, over all of the extent."""
    if isinstance(extent, Sequence) and not isinstance(extent, str):
        if len(extent) != 2:
            raise ArgumentTypeError(
                f"The 'extent' argument of {call} must be a number or (low, high); got {extent!r}."
            )
        low, high = (check_number(call, "extent", end) for end in extent)
        if not low < 0 < high:
            raise InvalidArgumentError(
                f"The 'extent' argument of {call} must have 0, the model, between its ends; got "
                f"{extent!r}."
            )
        left = min(max(round(-low / (high - low) * (points - 1)), 1), points - 2)
    else:
        high = check_positive(call, "extent", extent)
        low, left = -high, points // 2
        if points % 2 == 0:
            raise InvalidArgumentError(
                f"With {points} points from {low:g} to {high:g} the model itself is not on the "
                f"grid of {call}; take points={points + 1}."
            )
    right = points - 1 - left
    if low / left == -high / right:
        # Exactly the ends that were given.
        below = [low * (left - i) / left for i in range(left)]
        return (*below, *(high * i / right for i in range(right + 1)))
    step = max(-low / left, high / right)
    return tuple(step * (i - left) if i != left else 0.0 for i in range(points))
