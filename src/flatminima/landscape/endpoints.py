"""The tensors of two models and of the points between them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import ArgumentTypeError, InvalidArgumentError, StateMismatchError
from ..objective.modules import unwrap, without_prefix
from ..objective.objective import Objective
from ..support.vectors import check_vector

__all__ = [
    "VARIANCE",
    "Between",
    "Endpoint",
    "State",
    "check_same",
    "checked_points",
    "endpoint_state",
    "mixture",
    "model_state",
]

Endpoint = nn.Module | Mapping[str, Tensor] | Tensor
State = dict[str, Tensor]

VARIANCE = "running_var"
"""How PyTorch's normalisation layers name a buffer that cannot be negative."""


@dataclasses.dataclass(frozen=True)
class Between:
    """Two models, and what becomes of their tensors between them."""

    first: State
    last: State
    mixed: set[str]
    """The names of those that are interpolated; the others are the first model's."""
    buffers: str
    """What becomes of them: "interpolate", "keep" or "recompute"."""
    kept: State
    """Those that stay as the objective's model has them."""

    @classmethod
    def read(
        cls,
        call: str,
        objectives: Mapping[str, Objective],
        start: Endpoint,
        end: Endpoint,
        buffers: str,
    ) -> Between:
        """Read the end points.

        Raises:
            StateMismatchError: they, or the further objectives, do not have the model's tensors.
        """
        objective = objectives["train"]
        model = objective.model
        first, last = (
            endpoint_state(call, objective, end_, n) for end_, n in ((start, "start"), (end, "end"))
        )
        for name, other in list(objectives.items())[1:]:
            owner = f"the model of also[{name!r}]"
            check_same(model_state(other.model), first, call, owner, "start")
        kept: State = {}
        if buffers == "keep":
            # Of a tensor with several names, that which counts is the first.
            held = {n for n, _ in model.named_buffers()}
            kept = {n: t for n, t in model_state(model).items() if n in held}
        mixed = {n for n, t in first.items() if t.dtype.is_floating_point and n not in kept}
        return cls(first, last, mixed, buffers, kept)

    def at(self, alpha: float, path: str) -> State:
        """Return the tensors at a point."""
        return mixture(self.first, self.last, alpha, path, self.mixed) | self.kept

    def notes(self, points: tuple[float, ...], recomputed: set[str]) -> tuple[str, ...]:
        """Return what a reader should know of the buffers at these points.

        Args:
            points: the α.
            recomputed: the names of those that are recomputed at each.
        """
        found = []
        if recomputed:
            found.append(
                "The statistics of batch norm were recomputed at each point from the objective's "
                "own data; the losses at the ends are not those with the models' own."
            )
        variances = {n for n in self.mixed - recomputed if n.endswith(VARIANCE)}
        if variances and (min(points) < 0 or max(points) > 1):
            found.append(
                "Outside [0, 1] the running variances of batch norm are mixed with the absolute "
                "values of the coefficients."
            )
        return tuple(found)


def model_state(model: nn.Module) -> State:
    """Return every parameter and buffer by name, each tensor once."""
    return {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}


def endpoint_state(call: str, objective: Objective, endpoint: Endpoint, argument: str) -> State:
    """The tensors of a module, a state dict or a parameter vector, on the objective's device.

    Raises:
        ArgumentTypeError: it is none of these.
        StateMismatchError: it does not have the tensors of the objective's model.
    """
    own = model_state(objective.model)
    if isinstance(endpoint, nn.Module):
        given = model_state(unwrap(endpoint))
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
            f"{call} ({argument})",
            endpoint,
            size=objective.size,
            dtype=objective.dtype,
            device=objective.device,
        )
        pieces = objective.layout.unflatten(vector)
        given = own | dict(zip(objective.layout.names, pieces, strict=True))
    else:
        raise ArgumentTypeError(
            f"The {argument!r} argument of {call} must be a module, a state dict or a "
            f"parameter vector; got {type(endpoint).__name__}."
        )
    entries: dict[str, object] = dict(endpoint) if isinstance(endpoint, Mapping) else {}
    inner = [name for name, value in entries.items() if isinstance(value, dict)]
    hint = f"a checkpoint? Its entry {inner[0]!r} may be the state dict" if inner else ""
    check_same(own, given, call, "the objective's model", argument, hint)
    return {
        n: given[n].to(objective.device, t.dtype if t.dtype.is_floating_point else None)
        for n, t in own.items()
    }


def check_same(
    own: State, given: State, call: str, owner: str, argument: str, hint: str = ""
) -> None:
    """Refuse tensors that are not those of `owner`, by name and shape.

    Raises:
        StateMismatchError: it says which.
    """
    missing = [n for n in own if n not in given]
    nested = f" ({hint})" if hint and len(missing) == len(own) else ""
    extra = [n for n in given if n not in own]
    shapes = [
        f"{n!r} {tuple(given[n].shape)} instead of {tuple(own[n].shape)}"
        for n in own
        if n in given and given[n].shape != own[n].shape
    ]
    problems = []
    for label, found in (("lacks", missing), ("also has", extra)):
        if found:
            problems.append(f"{label} {_some([repr(n) for n in found])}")
    if shapes:
        problems.append(f"has {_some(shapes)}")
    if problems:
        raise StateMismatchError(
            f"The {argument!r} argument of {call} does not fit {owner}: it "
            + "; it ".join(problems)
            + f". Both endpoints must come from the same architecture{nested}."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def mixture(first: State, last: State, alpha: float, path: str, mixed: set[str]) -> State:
    """Return the tensors at a point of the path; of those that are not `mixed`, the first model's.

    Args:
        first: at α = 0.
        last: at α = 1.
        alpha: the point.
        path: "linear" or "curvilinear".
        mixed: the names of those that move.
    """
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


def checked_points(
    call: str, alphas: Sequence[float] | Tensor | None, default: tuple[float, ...]
) -> tuple[float, ...]:
    """Return the points as finite numbers, one at least."""
    if alphas is None:
        return default
    try:
        points = tuple(float(a) for a in alphas)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(
            f"The 'alphas' argument of {call} must be a sequence of numbers; got {alphas!r}."
        ) from error
    if not points or not all(map(math.isfinite, points)):
        raise InvalidArgumentError(
            f"The 'alphas' argument of {call} must hold finite numbers; got {alphas!r}."
        )
    return points
