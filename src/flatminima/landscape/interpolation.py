"""The loss along the line, or an arc, between two models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..checks import check_choice
from ..errors import ArgumentTypeError, InvalidArgumentError, StateMismatchError
from ..metrics import Metric
from ..modules import unwrapped, without_prefix
from ..objective import Objective, check_objective
from ..precision import precision_notes
from ..progress import progress_bar
from ..results import Outcome, Result, Table, format_number, reading_notes
from ..vectors import check_vector

__all__ = ["Curve", "Interpolation", "interpolate"]

Endpoint = nn.Module | Mapping[str, Tensor] | Tensor
State = dict[str, Tensor]

VARIANCE = "running_var"
"""How PyTorch's normalisation layers name a buffer that cannot be negative."""


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
class Interpolation(Result):
    """Losses and metrics along a path between two models: `start` at α = 0, `end` at α = 1.

    Attributes:
        alphas: the points.
        curves: by name of the data set; the objective's own is "train", those of `also` follow.
        path: "linear" or "curvilinear".
        buffers: "interpolate" or "keep".
        evaluations: passes over a data set.
        outcome: completed, or completed with values that are not finite.
        notes: what a reader should know about how it was computed.
        readings: how often data were read anew for it; 0 where they are kept on the device.

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
        Note: Completed: everything asked for was evaluated.
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

    def _table(self) -> Table:
        header = ["α"]
        columns: list[Sequence[float]] = [self.alphas]
        for name, curve in self.curves.items():
            header += [f"{name} loss", *(f"{name} {m}" for m in curve.metrics)]
            columns += [curve.loss, *curve.metrics.values()]
        return Table(
            tuple(header),
            tuple(tuple(format_number(v) for v in row) for row in zip(*columns, strict=True)),
            title=f"{self.path.capitalize()} interpolation, start at α = 0, end at α = 1",
            notes=(self.outcome.value, *reading_notes(self.readings), *self.notes),
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
    buffers: Literal["interpolate", "keep"] = "interpolate",
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
        end: the model at α = 1, likewise.
        alphas: the points, 25 equally spaced ones on [−1, 2] unless told.
        path: "linear" or "curvilinear".
        metrics: `metric(output, target)` by name, such as `{"accuracy": fm.accuracy}`.
        also: further objectives by name (`{"test": test_objective}`), evaluated at the same
            points; their models must have the same tensors.
        buffers: "interpolate", or "keep" those of the objective's model.
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
    check_choice(call, "buffers", buffers, ("interpolate", "keep"))
    points = _points(alphas)
    for name, mapping, example in (
        ("metrics", metrics, '{"accuracy": fm.accuracy}'),
        ("also", also, '{"test": test_objective}'),
    ):
        if mapping is not None and not isinstance(mapping, Mapping):
            raise ArgumentTypeError(
                f"The {name!r} argument of interpolate must be a mapping such as {example}; got "
                f"{type(mapping).__name__}."
            )
    for name, metric in (metrics or {}).items():
        if not callable(metric):
            raise ArgumentTypeError(f"The metric {name!r} must be callable; got {metric!r}.")
    objectives = {"train": objective}
    for name, other in (also or {}).items():
        check_objective(f"{call} (also[{name!r}])", other)
        if name == "train":
            raise InvalidArgumentError('The name "train" in also= is the objective\'s own.')
        objectives[name] = other
    first, last = (_state(objective, end_, n) for end_, n in ((start, "start"), (end, "end")))
    for name, other in list(objectives.items())[1:]:
        _check_same(_model_state(other.model), first, f"the model of also[{name!r}]", "start")
    frozen = _model_state(objective.model) if buffers == "keep" else {}
    held = {n for n, _ in objective.model.named_buffers()} if buffers == "keep" else set()
    kept = {name: frozen[name] for name in held if name in frozen}
    mixed = {n for n, t in first.items() if t.dtype.is_floating_point and n not in held}

    data = {id(o): o.batches for o in objectives.values()}.values()
    before = sum(batches.readings for batches in data)
    losses: dict[str, list[float]] = {name: [] for name in objectives}
    values: dict[str, dict[str, list[float]]] = {
        name: {m: [] for m in metrics or {}} for name in objectives
    }
    total = len(points) * len(objectives)
    with progress_bar("interpolation", total=total, unit="pass", show=progress) as bar:
        for name, each in objectives.items():
            states = (_mixture(first, last, alpha, path, mixed) | kept for alpha in points)
            for loss, measured in each.evaluate_states(states, metrics):
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
        buffers=buffers,
        evaluations=total,
        outcome=Outcome.COMPLETED if finite else Outcome.NON_FINITE_POINTS,
        notes=_notes(mixed, points) + precision_notes(objective.model, objective.device),
        readings=sum(b.readings for b in data) - before,
    )


def _notes(mixed: set[str], points: tuple[float, ...]) -> tuple[str, ...]:
    if any(n.endswith(VARIANCE) for n in mixed) and (min(points) < 0 or max(points) > 1):
        return (
            "Outside [0, 1] the running variances of batch norm are mixed with the absolute "
            "values of the coefficients.",
        )
    return ()


def _points(alphas: Sequence[float] | Tensor | None) -> tuple[float, ...]:
    if alphas is None:
        return tuple(-1 + i / 8 for i in range(25))
    try:
        points = tuple(float(a) for a in alphas)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(
            f"The 'alphas' argument of interpolate must be a sequence of numbers; got {alphas!r}."
        ) from error
    if not points or not all(map(math.isfinite, points)):
        raise InvalidArgumentError(
            f"The 'alphas' argument of interpolate must hold finite numbers; got {alphas!r}."
        )
    return points


def _model_state(model: nn.Module) -> State:
    """Every parameter and buffer by name, each tensor once."""
    return {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}


def _state(objective: Objective, endpoint: Endpoint, argument: str) -> State:
    own = _model_state(objective.model)
    if isinstance(endpoint, nn.Module):
        given = _model_state(unwrapped(endpoint))
    elif isinstance(endpoint, Mapping):
        given = {n: t.detach() for n, t in endpoint.items() if isinstance(t, Tensor)}
        while not given.keys() & own.keys():
            # Saved from a compiled or a data-parallel model, or from one of both.
            shorter = {without_prefix(n): t for n, t in given.items()}
            if shorter.keys() == given.keys():
                break
            given = shorter
        # A state dict lists tied tensors under every name and leaves out buffers that are not
        # persistent; the model's own names decide.
        persistent = set(objective.model.state_dict())
        given = {n: t for n, t in given.items() if n in own or n not in persistent}
        given = {n: t for n, t in own.items() if n not in persistent} | given
    elif isinstance(endpoint, Tensor):
        vector = check_vector(
            f"interpolate ({argument})",
            endpoint,
            size=objective.size,
            dtype=objective.dtype,
            device=objective.device,
        )
        pieces = objective.layout.unflatten(vector)
        given = own | dict(zip(objective.layout.names, pieces, strict=True))
    else:
        raise ArgumentTypeError(
            f"The {argument!r} argument of interpolate must be a module, a state dict or a "
            f"parameter vector; got {type(endpoint).__name__}."
        )
    entries: dict[str, object] = dict(endpoint) if isinstance(endpoint, Mapping) else {}
    inner = [name for name, value in entries.items() if isinstance(value, dict)]
    hint = f"a checkpoint? Its entry {inner[0]!r} may be the state dict" if inner else ""
    _check_same(own, given, "the objective's model", argument, hint)
    return {
        n: given[n].to(objective.device, t.dtype if t.dtype.is_floating_point else None)
        for n, t in own.items()
    }


def _check_same(own: State, given: State, owner: str, argument: str, hint: str = "") -> None:
    missing = [n for n in own if n not in given]
    nested = f" ({hint})" if hint and len(missing) == len(own) else ""
    extra = [n for n in given if n not in own]
    shapes = [
        f"{n!r} {tuple(given[n].shape)} instead of {tuple(own[n].shape)}"
        for n in own
        if n in given and given[n].shape != own[n].shape
    ]
    problems = []
    for label, found in (("lacks", missing), ("has besides", extra)):
        if found:
            problems.append(f"{label} {_some([repr(n) for n in found])}")
    if shapes:
        problems.append(f"has {_some(shapes)}")
    if problems:
        raise StateMismatchError(
            f"The {argument!r} argument of interpolate does not fit {owner}: it "
            + "; it ".join(problems)
            + f". Both endpoints must come from the same architecture{nested}."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _mixture(first: State, last: State, alpha: float, path: str, mixed: set[str]) -> State:
    if path == "linear":
        left, right = 1 - alpha, alpha
    else:
        left, right = math.cos(alpha * math.pi / 2), math.sin(alpha * math.pi / 2)
        # Exactly the models themselves at whole α, where sine and cosine are off by rounding.
        left, right = (0.0 if abs(c) < 1e-15 else c for c in (left, right))
    state = {}
    for name, tensor in first.items():
        if name in mixed:
            one, two = (abs(left), abs(right)) if name.endswith(VARIANCE) else (left, right)
            wide = torch.promote_types(tensor.dtype, torch.float32)
            point = one * tensor.to(wide) + two * last[name].to(wide)
            state[name] = point.to(tensor.dtype)
        else:
            state[name] = tensor
    return state
