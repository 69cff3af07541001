"""Many points of the parameter space, several of them to a reading of the data."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from ..errors import ArgumentTypeError, StateMismatchError, closest
from .evaluator import Evaluator, Pass, Point
from .forward import Evaluated
from .metrics import Metric, label_count, metric_value

__all__ = ["State", "evaluate_states"]

State = Mapping[str, Tensor]
"""Parameters and buffers by name, in place of the model's own."""

HELD_BYTES = 2**28
VECTORS = 4
"""States that are evaluated in one reading take at most `HELD_BYTES` with their private copies, or
the memory of so many parameter vectors where that is more."""


def evaluate_states(
    evaluator: Evaluator, states: Iterable[State], metrics: Mapping[str, Metric]
) -> Iterator[tuple[float, dict[str, float]]]:
    """Yield the loss and the metrics at each state, in order.

    Where the batches are kept on the device, one state is made and evaluated after the other.
    If they are read again each time, each reading serves as many states as fit into a budget of
    memory. Neither changes a number.
    """
    if isinstance(states, Mapping) or not isinstance(states, Iterable):
        raise ArgumentTypeError(
            "Objective.evaluate_states takes several state dicts, such as a list of them; got a "
            f"{type(states).__name__}. For one state dict there is evaluate_state."
        )
    model = evaluator.model
    known = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    # Tied and not persistent ones may be given, too.
    known |= {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    size = sum(_bytes(p) for p in model.parameters())
    budget = 0 if evaluator.batches.cached else max(HELD_BYTES, VECTORS * size)
    for chunk in _chunks(map(functools.partial(_checked, known), states), budget):
        own = {n for n, _ in model.named_parameters()}
        buffers = dict(model.named_buffers())
        means = [_Means(metrics) for _ in chunk]
        points = [
            Point(
                functools.partial(_clones, {n: t for n, t in state.items() if n in own}),
                {n: state.get(n, b) for n, b in buffers.items()},
            )
            for state in chunk
        ]
        losses = _losses(evaluator, points, means)
        del chunk, points
        yield from zip(losses, [mean.values() for mean in means], strict=True)


def _losses(evaluator: Evaluator, points: Sequence[Point], means: Sequence[_Means]) -> list[float]:
    """Return the loss at each point, and add up its metrics."""
    with Pass(evaluator, points, derivatives=0) as batches:
        for seen in batches:
            with batches.visiting(seen):
                means[batches.point].add(seen)
    return batches.mean_losses(check=False)


def _checked(known: Mapping[str, Tensor], state: object) -> State:
    """Return a state dict whose tensors fit the model's own."""
    call = "Objective.evaluate_states"
    if not isinstance(state, Mapping):
        raise ArgumentTypeError(
            f"{call} takes state dicts, tensors by name; got a {type(state).__name__}."
        )
    for name, tensor in state.items():
        own = known.get(name)
        if own is None:
            if not isinstance(tensor, Tensor):
                continue  # what a module keeps in its extra state
            raise StateMismatchError(
                f"{call} was given {name!r}, which the model does not have. "
                + closest(str(name), list(known))
                + " A wrapper's prefix, such as 'module.', must be taken off."
            )
        if not isinstance(tensor, Tensor):
            raise ArgumentTypeError(
                f"{call} takes tensors; {name!r} is a {type(tensor).__name__}. Use torch.as_tensor."
            )
        here, wanted = ((t.shape, t.dtype, t.device) for t in (tensor, own))
        if here != wanted:
            raise StateMismatchError(
                f"{call} was given {name!r} as {tuple(tensor.shape)}, {tensor.dtype}, "
                f"{tensor.device}; the model has {tuple(own.shape)}, {own.dtype}, {own.device}."
            )
    return state


def _chunks(states: Iterable[State], budget: int) -> Iterator[list[State]]:
    """Yield the states in lists of at most `budget` bytes, one state at least."""
    chunk: list[State] = []
    held = 0
    for state in states:
        # With the private copy that is evaluated.
        size = 2 * sum(map(_bytes, state.values()))
        chunk.append(state)
        held += size
        # Not held on to while the next one is made.
        del state
        if held + size > budget:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _clones(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in tensors.items()}


class _Means:
    """The mean of each metric over the batches that it is shown."""

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self._metrics = metrics
        self._sums = dict.fromkeys(metrics, 0.0)
        self._counts = dict.fromkeys(metrics, 0.0)

    def add(self, seen: Evaluated) -> None:
        """One batch, or a piece of one."""
        for name, metric in self._metrics.items():
            # A metric may say itself over how many labels it is a mean.
            count = getattr(metric, "count", label_count)(seen.target)
            count = seen.batch.weight if count is None else count
            if count > 0:
                value = metric_value(name, metric(seen.output, seen.target))
                self._sums[name] += count * value
                self._counts[name] += count

    def values(self) -> dict[str, float]:
        """By name; NaN where nothing was counted."""
        counts = self._counts
        return {n: s / counts[n] if counts[n] else math.nan for n, s in self._sums.items()}
