"""Principal components of a trajectory."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from ...errors import InvalidArgumentError
from ...objective.objective import Objective, check_objective
from ...results import Outcome, Result, Table, format_number, reading_notes
from ...support.checks import check_choice, check_instance, check_integer
from ...support.progress import progress_bar
from ..directions import UNITS, Directions
from .snapshots import check_recorded
from .trajectory import Trajectory

__all__ = ["PrincipalResult", "TrajectoryLosses", "principal_components"]

ROUNDING = {"float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}
"""By how much a type rounds, relative to the number."""
RANK = 1e-14
"""Components whose share of the largest one's variance is below this, times the number of
snapshots, are rounding."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PrincipalResult(Result):
    """The directions in which a trajectory extends most, and the place of each snapshot on them.

    Attributes:
        variance: (k,) mean square of the coordinates along each component, best first.
        total_variance: mean square of the distances of the snapshots from the centre.
        coordinates: (T, k) of each snapshot, relative to the centre, in parameter units.
        distances: (T,) of each snapshot from the plane of the components.
        steps: of training, for each snapshot.
        center: "last" or "mean".
        vectors: (n, k) the components, orthonormal columns on the host; None once dropped, and
            for sketches.
        origin: (n,) the centre; None in the same cases.
        parameters: the name and the shape of each parameter tensor.
        dtype: of the snapshots.
        sketch: the number of random projections that stand for each snapshot, or None.
        notes: remarks on the computation.

    Examples:
        >>> import torch
        >>> from flatminima.landscape.trajectory.principal import principal_components
        >>> from flatminima.landscape.trajectory.trajectory import Trajectory
        >>> model = torch.nn.Linear(2, 1)
        >>> trajectory = Trajectory(model)
        >>> for step in range(4):
        ...     _ = torch.nn.init.constant_(model.weight, (3 - step) / 2**0.5)
        ...     _ = torch.nn.init.constant_(model.bias, 0.1 * (step % 2))
        ...     kept = trajectory.record(step)
        >>> print(principal_components(trajectory, components=1))
        Principal components of 4 snapshots, steps 0 to 3, relative to the last
        component  variance   of all  together
        ─────────  ────────  ───────  ────────
        1             3.503  99.94 %   99.94 %
        Note: The largest distance of a snapshot from them is 0.07138.
    """

    variance: Tensor
    total_variance: float
    coordinates: Tensor
    distances: Tensor
    steps: tuple[int, ...]
    center: str
    vectors: Tensor | None
    origin: Tensor | None
    parameters: tuple[str, ...]
    dtype: str
    sketch: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def explained(self) -> tuple[float, ...]:
        """The share of each component in the total variance, between 0 and 1."""
        return tuple((self.variance / self.total_variance).tolist())

    def without_vectors(self) -> PrincipalResult:
        """Return the same without vectors of length n, for keeping or writing to a file."""
        return dataclasses.replace(self, vectors=None, origin=None)

    def directions(self, objective: Objective) -> Directions:
        """Return the components as axes around the objective's model, unit vectors.

        Where the model is not the centre, a note says how far it is from it.

        Raises:
            InvalidArgumentError: only sketches were recorded, or the vectors were dropped.
            StateMismatchError: the objective has other parameters.
        """
        call = "PrincipalResult.directions"
        vectors, origin = self.vectors_for(call, objective)
        shift = origin - objective.point().cpu().double()
        distance = float(torch.linalg.vector_norm(shift))
        notes = list(self.notes)
        size = float(torch.linalg.vector_norm(origin))
        if distance > 2 * ROUNDING[self.dtype] * size:
            what = {"last": "last snapshot", "mean": "mean"}[self.center]
            notes.append(
                f"The objective's model is not the trajectory's {what}, but at distance "
                f"{format_number(distance)} from it; coordinates_at(objective) are those around "
                "the model."
            )
        columns = vectors.T.to(objective.device, objective.dtype, copy=True).T
        labels = tuple(
            f"principal component {i} ({_percent(share)} of variance)"
            for i, share in enumerate(self.explained, start=1)
        )
        return Directions(columns, labels, (UNITS["none"],) * len(labels), tuple(notes))

    def extents(self, margin: float = 0.1) -> list[tuple[float, float]]:
        """For `surface` on these directions: around all snapshots and 0, and a margin beyond."""
        found = []
        for values in self.coordinates.T:
            low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
            # 0 is within the extent, not at its end.
            room = max(margin, 0.01) * ((high - low) or 1.0)
            found.append((low - room, high + room))
        return found

    def coordinates_at(self, objective: Objective) -> Tensor:
        """Return `coordinates`, (T, k), relative to the objective's model in place of the centre.

        Raises:
            InvalidArgumentError: only sketches were recorded, or the vectors were dropped.
            StateMismatchError: the objective has other parameters.
        """
        vectors, origin = self.vectors_for("PrincipalResult.coordinates_at", objective)
        shift = origin - objective.point().cpu().double()
        return self.coordinates + torch.stack([c.double() @ shift for c in vectors.T])

    def vectors_for(self, call: str, objective: Objective) -> tuple[Tensor, Tensor]:
        """Return the components and the centre, for an objective that they fit."""
        check_objective(call, objective)
        if self.sketch is not None:
            raise InvalidArgumentError(
                f"{call}: only sketches of {self.sketch} numbers were recorded, in which there are "
                "distances but no directions; record without sketch=."
            )
        if self.vectors is None or self.origin is None:
            raise InvalidArgumentError(
                f"{call}: the vectors were dropped; use the result as it was before "
                "without_vectors()."
            )
        check_recorded(call, self.parameters, objective.layout)
        return self.vectors, self.origin.double()

    def _table(self) -> Table:
        together, rows = 0.0, []
        for i, (value, share) in enumerate(
            zip(self.variance.tolist(), self.explained, strict=True), start=1
        ):
            together += share
            rows.append((str(i), format_number(value), _percent(share), _percent(together)))
        centre = {"last": "the last", "mean": "their mean"}[self.center]
        return Table(
            ("component", "variance", "of all", "together"),
            tuple(rows),
            title=f"Principal components of {len(self.steps)} snapshots, steps {self.steps[0]} to "
            f"{self.steps[-1]}, relative to {centre}",
            notes=(
                "The largest distance of a snapshot from them is "
                f"{format_number(float(self.distances.max()))}.",
                *self.notes,
            ),
        )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TrajectoryLosses(Result):
    """The true loss along a trajectory and that of its projection onto a plane.

    Attributes:
        steps: of training, for each snapshot.
        loss: L at the snapshot.
        plane_loss: L at the point of the plane that is nearest to it.
        distances: of the snapshot from the plane.
        evaluations: of the loss.
        outcome: completed, or completed with values that are not finite.
        notes: remarks on the computation.
        readings: how many times the data were read again; 0 if they are kept on the device.

    Examples:
        >>> from flatminima import Outcome
        >>> from flatminima.landscape.trajectory.principal import TrajectoryLosses
        >>> TrajectoryLosses((0, 5), (2.0, 1.0), (1.5, 1.0), (0.3, 0.0), 4, Outcome.COMPLETED)
        Loss along the trajectory
        step  loss  loss in the plane  distance from it
        ────  ────  ─────────────────  ────────────────
        0        2                1.5               0.3
        5        1                  1                 0
        Note: Completed: everything was evaluated.
    """

    steps: tuple[int, ...]
    loss: tuple[float, ...]
    plane_loss: tuple[float, ...]
    distances: tuple[float, ...]
    evaluations: int
    outcome: Outcome
    notes: tuple[str, ...] = ()
    readings: int = 0

    def _table(self) -> Table:
        columns = (self.loss, self.plane_loss, self.distances)
        return Table(
            ("step", "loss", "loss in the plane", "distance from it"),
            tuple(
                (str(step), *map(format_number, row))
                for step, *row in zip(self.steps, *columns, strict=True)
            ),
            title="Loss along the trajectory",
            notes=(self.outcome.value, *reading_notes(self.readings), *self.notes),
        )


def _percent(share: float) -> str:
    value = 100 * share
    digits = f"{value:.2g}" if value < 1 else (f"{value:.0f}" if value < 99 else f"{value:.4g}")
    return f"{digits} %"


def principal_components(
    trajectory: Trajectory,
    *,
    components: int = 2,
    center: Literal["last", "mean"] = "last",
    progress: bool = True,
) -> PrincipalResult:
    """Return the orthogonal directions that hold most of a trajectory.

    With "last" these are the leading singular vectors of the differences θ_i − θ_last (Li et al.
    2018, arXiv:1712.09913, section 7), about the last snapshot and not about the mean, so that the
    picture has the trained model at its centre; with "mean" they are the usual ones. They are found
    from the T × T matrix of inner products, added up in float64 over blocks of the parameters.
    Each component has the sign that makes its coordinate of largest magnitude positive.

    Args:
        trajectory: two snapshots or more.
        components: how many, less than there are snapshots.
        center: "last" or "mean".
        progress: show a bar if it takes long.

    Returns:
        The components with what they explain, and where each snapshot is.

    Raises:
        InvalidArgumentError: too few snapshots, all of them equal, or fewer directions among them
            than components.

    Examples:
        >>> import torch
        >>> from flatminima.landscape.trajectory.principal import principal_components
        >>> from flatminima.landscape.trajectory.trajectory import Trajectory
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> trajectory = Trajectory(model)
        >>> for x, y in [(4.0, 0.0), (2.0, 1.0), (0.0, 0.0)]:
        ...     model.weight.data = torch.tensor([[x, y]])
        ...     kept = trajectory.record()
        >>> result = principal_components(trajectory)
        >>> result.coordinates.norm(dim=1).square().round(decimals=6).tolist()
        [16.0, 5.0, 0.0]
        >>> sum(result.explained), float(result.distances.max()) < 1e-12
        (1.0, True)
    """
    call = "principal_components"
    advice = "Record one in the training loop with Trajectory(model)."
    check_instance(call, "trajectory", trajectory, Trajectory, advice)
    check_choice(call, "center", center, ("last", "mean"))
    check_integer(call, "components", components, low=1)
    count = len(trajectory)
    if count < 2:
        held = "one snapshot" if count else "no snapshot"
        raise InvalidArgumentError(f"{call} needs two snapshots or more; there is {held}.")
    if components >= count:
        raise InvalidArgumentError(
            f"{count} snapshots span {count - 1} directions at most; {call} got components="
            f"{components}. Record more, or set components={count - 1}."
        )
    whole = trajectory.sketch is None
    width = trajectory.size if trajectory.sketch is None else trajectory.sketch
    gram = torch.zeros(count, count, dtype=torch.float64)
    size = 0.0
    with progress_bar(call, total=2 * width, unit="parameter", show=progress) as bar:
        for place, rows in trajectory.blocks():
            size += float(_centered(rows, center).square().sum())
            gram += rows @ rows.T
            bar.update(place.stop - place.start)
        values, axes = _leading(call, gram, components)
        coordinates = axes * values.sqrt()
        largest = coordinates[coordinates.abs().argmax(dim=0), range(components)]
        axes, coordinates = axes * largest.sign(), coordinates * largest.sign()
        # Each component in one piece.
        kind = torch.float64 if trajectory.dtype == "float64" else torch.float32
        columns = torch.empty(components if whole else 0, width, dtype=kind)
        origin = torch.empty(width if whole else 0, dtype=kind)
        squares = torch.zeros(count, dtype=torch.float64)
        for place, rows in trajectory.blocks():
            middle = _centered(rows, center)
            along = axes.T @ rows
            # Not from the sums above, where a difference of squares would lose half the digits.
            squares += (rows - axes @ along).square().sum(dim=1)
            if whole:
                origin[place] = middle
                columns[:, place] = (along / values.sqrt()[:, None]).to(kind)
            bar.update(place.stop - place.start)
    rounding = (ROUNDING[trajectory.dtype] * math.sqrt(size)) ** 2
    return PrincipalResult(
        variance=values / count,
        total_variance=float(gram.trace()) / count,
        coordinates=coordinates,
        distances=squares.sqrt(),
        steps=trajectory.steps,
        center=center,
        vectors=columns.T if whole else None,
        origin=origin if whole else None,
        parameters=trajectory.parameters,
        dtype=trajectory.dtype,
        sketch=trajectory.sketch,
        notes=_notes(trajectory, values / count, rounding),
    )


def _centered(rows: Tensor, center: str) -> Tensor:
    """Take the centre from each of the rows, which are changed, and return it."""
    middle = rows[-1].clone() if center == "last" else rows.mean(dim=0)
    rows.sub_(middle)
    return middle


def _leading(call: str, gram: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues of the inner products, with their eigenvectors."""
    count = len(gram)
    if not bool(gram.diagonal().any()):
        raise InvalidArgumentError(
            f"All {count} snapshots are equal: {call} finds no direction in which they extend."
        )
    ascending, found = torch.linalg.eigh(gram)
    values, axes = ascending.flip(0), found.flip(1)
    rank = int((values > RANK * count * values[0]).sum())
    if rank < components:
        raise InvalidArgumentError(
            f"The {count} snapshots extend in {rank} direction{'s' * (rank != 1)} only; {call} was "
            f"asked for {components}. Set components={rank}."
        )
    return values[:components], axes[:, :components]


def _notes(trajectory: Trajectory, variance: Tensor, rounding: float) -> tuple[str, ...]:
    notes = []
    if trajectory.sketch is not None:
        error = 100 * math.sqrt(1 / (2 * trajectory.sketch))
        notes.append(
            f"From sketches of {trajectory.sketch} numbers: distances are off by about "
            f"{error:.2g} % (one standard deviation), and there are no directions."
        )
    lost = [i for i, value in enumerate(variance.tolist(), start=1) if value < rounding]
    if lost:
        notes.append(
            f"From component {lost[0]} on, the extent is within what rounding the snapshots to "
            f"{trajectory.dtype} adds."
        )
    return tuple(notes)
