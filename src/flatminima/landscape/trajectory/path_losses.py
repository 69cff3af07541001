"""The loss along a trajectory, and that of its projection onto a plane."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from torch import Tensor

from ...errors import InvalidArgumentError, StateMismatchError
from ...objective.objective import Objective, check_objective
from ...results import Outcome
from ...support.checks import check_choice, check_instance
from ...support.precision import precision_notes
from ...support.progress import progress_bar
from ..buffers import recomputed_buffers, recomputed_names
from ..endpoints import State
from .principal import PrincipalResult, TrajectoryLosses, principal_components
from .snapshots import check_recorded
from .trajectory import Trajectory

__all__ = ["TrajectoryLosses", "path_losses"]


def path_losses(
    objective: Objective,
    trajectory: Trajectory,
    *,
    principal: PrincipalResult | None = None,
    buffers: Literal["keep", "recompute"] = "keep",
    progress: bool = True,
) -> TrajectoryLosses:
    """Return the loss at each snapshot of a trajectory, and at its projection onto the plane.

    A picture of the plane shows the latter; where both differ, it does not show what training saw.

    Args:
        objective: the loss and data. What is not among the parameters recorded is as in its model
            at every snapshot.
        trajectory: of the same parameters, recorded without a sketch.
        principal: of this trajectory. Default: `principal_components(trajectory)`.
        buffers: "keep", or "recompute" the statistics of batch norm at each point from the
            objective's data, one pass more for each.
        progress: show a bar if it takes long.

    Returns:
        Both losses and the distance of each snapshot; infinite and NaN values are kept.

    Raises:
        StateMismatchError: the objective has other parameters than were recorded, or `principal`
            belongs to another trajectory.
        InvalidArgumentError: only sketches were recorded, or the vectors were dropped.

    Examples:
        >>> import torch, flatminima as fm
        >>> from flatminima.landscape.trajectory.path_losses import path_losses
        >>> from flatminima.landscape.trajectory.principal import principal_components
        >>> from flatminima.landscape.trajectory.trajectory import Trajectory
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = torch.eye(2), torch.zeros(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)  # (x² + y²) / 2
        >>> trajectory = Trajectory(objective)
        >>> for x, y in [(4.0, 0.0), (2.0, 2.0), (1.0, 0.0)]:
        ...     model.weight.data = torch.tensor([[x, y]])
        ...     kept = trajectory.record()
        >>> line = principal_components(trajectory, components=1)
        >>> result = path_losses(objective, trajectory, principal=line)
        >>> result.loss
        (8.0, 4.0, 0.5)
        >>> [round(loss, 2) for loss in result.plane_loss]
        [7.37, 3.15, 0.5]
    """
    call = "path_losses"
    check_objective(call, objective)
    check_choice(call, "buffers", buffers, ("keep", "recompute"))
    advice = "Record one in the training loop with Trajectory(model)."
    check_instance(call, "trajectory", trajectory, Trajectory, advice)
    if trajectory.sketch is not None:
        raise InvalidArgumentError(
            f"{call}: only sketches of {trajectory.sketch} numbers were recorded, which have no "
            "loss; record without sketch=."
        )
    check_recorded(call, trajectory.parameters, objective.layout)
    if principal is None:
        count = min(2, max(1, len(trajectory) - 1))
        principal = principal_components(trajectory, components=count, progress=progress)
    check_instance(call, "principal", principal, PrincipalResult, "principal_components gives one.")
    if principal.steps != trajectory.steps:
        raise StateMismatchError(
            f"The 'principal' argument of {call} belongs to another trajectory: it has "
            f"{len(principal.steps)} snapshots of other steps than these {len(trajectory)}."
        )
    vectors, origin = principal.vectors_for(call, objective)
    before = objective.batches.readings
    coordinates = principal.coordinates

    def points() -> Iterator[Tensor]:
        yield from (trajectory.point(i) for i in range(len(trajectory)))
        for row in coordinates:
            moved = origin.clone()
            for amount, column in zip(row.tolist(), vectors.T, strict=True):
                moved.add_(column, alpha=amount)
            yield moved

    layout = objective.layout
    recomputed = recomputed_names(objective.model) if buffers == "recompute" else set[str]()

    def states() -> Iterator[State]:
        for point in points():
            pieces = layout.unflatten(point.to(layout.device))
            state = dict(zip(layout.names, pieces, strict=True))
            yield state | recomputed_buffers(objective, state) if recomputed else state

    losses, total = [], 2 * len(trajectory)
    with progress_bar("losses along the path", total=total, unit="loss", show=progress) as bar:
        for loss, _ in objective.evaluate_states(states()):
            losses.append(loss)
            bar.update()
    finite = all(map(math.isfinite, losses))
    return TrajectoryLosses(
        steps=trajectory.steps,
        loss=tuple(losses[: len(trajectory)]),
        plane_loss=tuple(losses[len(trajectory) :]),
        distances=tuple(principal.distances.tolist()),
        evaluations=total,
        outcome=Outcome.COMPLETED if finite else Outcome.NON_FINITE_POINTS,
        notes=_held(objective, recomputed)
        + principal.notes
        + precision_notes(objective.model, objective.device),
        readings=objective.batches.readings - before,
    )


def _held(objective: Objective, recomputed: set[str]) -> tuple[str, ...]:
    """Return what of the model does not follow the trajectory, or follows it in another way."""
    notes = []
    if recomputed:
        notes.append(
            "The statistics of batch norm were recomputed at each point from the objective's data."
        )
    names = [n for n, b in objective.model.named_buffers() if b.dtype.is_floating_point]
    names += [n for n, _ in objective.model.named_parameters() if n not in objective.layout.names]
    held = [n for n in names if n not in recomputed]
    if held:
        notes.append(
            f"{len(held)} tensors that were not recorded (such as {held[0]!r}) are those of the "
            "objective's model at every snapshot."
        )
    return tuple(notes)
