"""Graphs of gradients kept from product to product, within a budget of memory."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from ...derivatives.torch_private import version
from ...objective.forward import Evaluated
from ...objective.objective import Objective
from ...support.failures import available_bytes
from ...support.trees import same_values, tensors_in
from .fingerprint import memory_of, settings, tensor_marks
from .gradient_graph import PerLeaf

__all__ = ["BatchGraph", "GraphCache", "KeepGraph"]

KeepGraph = bool | Literal["auto"]

SHARE = 4
"""With "auto" the graphs may take this fraction of the memory that is free."""


class BatchGraph(Protocol):
    """What products are taken by, for one batch."""

    saved: dict[int, int]
    """Address and bytes of memory that it holds and that saved-tensor hooks do not see."""

    def products(self, vectors: Sequence[Tensor], *, keep: bool = False) -> PerLeaf:
        """Return the products with vectors of shape (n,), one after the other.

        Args:
            vectors: each of shape (n,).
            keep: whether the graph is to serve once more.

        Returns:
            For each vector a tensor for each leaf, or None for zeros.
        """


G = TypeVar("G", bound=BatchGraph)


class GraphCache(Generic[G]):
    """What a session of Hessian products keeps of each batch: its loss, and its gradient's graph.

    A batch is kept when its graph still fits the budget; of the others the graphs are rebuilt for
    each product. All is let go when tensors or settings of the model or the loss function are
    found to be others than those of the graphs, and at the end of the session.

    Args:
        objective: whose batches they are.
        keep: "auto" for a quarter of the memory that is free when the session begins, True for
            as much as it takes, False for nothing.
    """

    def __init__(self, objective: Objective, keep: KeepGraph) -> None:
        self._objective, self._keep = objective, keep
        self._sessions = 0
        self._budget = 0.0
        self._recording = False
        self._graphs: dict[int, G] = {}
        self._state: _State | None = None
        self._marks: dict[int, list[tuple[int, int, tuple[int, ...]]]] = {}
        # Sizes of the memory held, by address: that of the kept batches, and of the present one.
        self._held: dict[int, int] = {}
        self._packed: dict[int, int] = {}
        self.seen: dict[int, Evaluated] = {}
        """The batches that are kept, by number."""

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """While it lasts, graphs are kept; the end of the outermost session frees them."""
        if self._sessions == 0 and self._keep is not False:
            free = available_bytes(self._objective.device) // SHARE
            self._budget = math.inf if self._keep is True else free
        self._sessions += 1
        try:
            yield
        finally:
            self._sessions -= 1
            if self._sessions == 0:
                self.give_up()

    @property
    def keeps(self) -> bool:
        """Whether there is a session that may keep something."""
        return self._budget > 0

    @property
    def bytes(self) -> int:
        """Memory of the tensors saved for the graphs, apart from the model's and the data's own."""
        return sum(self._held.values())

    def give_up(self) -> None:
        """Let everything go, and keep nothing more in this session."""
        self.clear()
        self._budget = 0.0

    def graph(self, seen: Evaluated) -> G | None:
        """Return the graph of a batch that is kept."""
        return self._graphs[seen.batch.index] if seen is self.seen.get(seen.batch.index) else None

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Around a pass over the batches.

        What was kept of a model that is no longer the same goes. The first pass within a session
        counts the memory that graphs hold.
        """
        if self._state is not None and not (
            self._state.is_that_of(self._objective) and self._data_are_those_of_the_graphs()
        ):
            self.clear()
        if self._state is not None or self._budget == 0 or not self._objective.keeps_graphs:
            yield
            return
        self._state = _State(self._objective)
        self._recording = True
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                yield
        except BaseException:
            self.clear()
            raise
        finally:
            self._recording = False
            self._packed.clear()

    def offer(self, seen: Evaluated, graph: G) -> bool:
        """Keep the batch that was evaluated last, if its graph fits; whether it does."""
        if not self._recording:
            return False
        packed, self._packed = self._packed, {}
        packed |= graph.saved
        batch = seen.batch
        cached = self._objective.batches.cached
        model = self._objective.model
        own = [*seen.tensors.values(), *model.parameters(), *model.buffers()]
        own += tensors_in(batch.data) if cached else ()
        for address in itertools.chain(self._held, *map(memory_of, own)):
            packed.pop(address, None)
        if self.bytes + sum(packed.values()) > self._budget:
            return False
        self._held.update(packed)
        if not cached:
            batch = dataclasses.replace(batch, data=None)
        index = batch.index
        self._marks[index] = tensor_marks(tensors_in(batch.data))
        # Without the loss's own graph, which is not needed any more.
        self.seen[index] = dataclasses.replace(
            seen, batch=batch, loss=seen.loss.detach(), output=None, target=None
        )
        self._graphs[index] = graph
        return True

    def _data_are_those_of_the_graphs(self) -> bool:
        """Return whether nobody has written to the batches that are kept on the device."""
        return all(
            tensor_marks(tensors_in(seen.batch.data)) == self._marks[index]
            for index, seen in self.seen.items()
        )

    def clear(self) -> None:
        """Let everything go, for graphs of the model as it is now."""
        self._graphs.clear()
        self.seen.clear()
        self._marks.clear()
        self._held.clear()
        self._packed.clear()
        self._state = None

    def _pack(self, tensor: Tensor) -> tuple[Tensor, int]:
        self._packed.update(memory_of(tensor))
        # Not the tensor itself, since an operation that saves its own result would never be freed.
        return tensor.detach(), version(tensor)


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    tensor, before = packed
    if version(tensor) != before:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            "operation"
        )
    return tensor


class _State:
    """What the graphs depend on, to be compared with what the model has later."""

    def __init__(self, objective: Objective) -> None:
        self._settings, self._known = _settings(objective)
        self._pieces = objective.differentiation.pieces
        self._marks = _marks(objective)
        # Held, as another tensor might be given the identity of one that is gone.
        self._tensors = [*objective.model.parameters(), *objective.model.buffers()]
        # Versions do not tell of writes through `.data`; to compare numbers would make a GPU wait.
        compared = objective.device.type == "cpu"
        own = [*objective.parameters.values(), *objective.model.buffers()] if compared else []
        self._numbers = [(t, t.detach().clone()) for t in own]

    def is_that_of(self, objective: Objective) -> bool:
        return (
            _marks(objective) == self._marks
            and objective.differentiation.pieces == self._pieces
            and _settings(objective)[0] == self._settings
            and all(same_values(now, before) for now, before in self._numbers)
        )


def _settings(objective: Objective) -> tuple[Hashable, list[Any]]:
    model, criterion = objective.model, objective.criterion
    return settings(model, criterion, objective.device, lambda t: tensor_marks([t])[0])


def _marks(objective: Objective) -> list[tuple[int, int, tuple[int, ...]]]:
    return tensor_marks([*objective.model.parameters(), *objective.model.buffers()])
