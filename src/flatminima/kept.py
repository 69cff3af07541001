"""Graphs of gradients kept from product to product, within a budget of memory."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from .batches import available_bytes
from .evaluation import Evaluated
from .nested import tensors_in
from .objective import Objective
from .products import GradientGraph

__all__ = ["KeepGraph", "KeptGraphs"]

KeepGraph = bool | Literal["auto"]

SHARE = 4
"""With "auto" the graphs may take this fraction of the memory that is free."""


class KeptGraphs:
    """What a session of Hessian products keeps of each batch: its loss, and its gradient's graph.

    A batch is kept when its graph still fits the budget; of the others the graphs are rebuilt for
    each product. All is let go when the model's tensors or training flags are found to be others
    than those of the graphs, and at the end of the session.

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
        self._graphs: dict[int, GradientGraph] = {}
        self._state: _State | None = None
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
    def bytes(self) -> int:
        """Memory of the tensors saved for the graphs, beside the model's and the data's own."""
        return sum(self._held.values())

    @property
    def complete(self) -> bool:
        """Whether every batch is kept."""
        return len(self.seen) == self._objective.batches.used

    def give_up(self) -> None:
        """Let everything go, and keep nothing more in this session."""
        self._clear()
        self._budget = 0.0

    def graph(self, seen: Evaluated) -> GradientGraph | None:
        """The graph of a batch that is kept."""
        return self._graphs[seen.batch.index] if seen is self.seen.get(seen.batch.index) else None

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Around a pass over the batches.

        What was kept of a model that is no longer the same goes. The first pass within a session
        counts the memory that graphs hold.
        """
        if self._state is not None and not self._state.is_that_of(self._objective):
            self._clear()
        if self._state is not None or self._budget == 0 or not self._objective.keeps_graphs:
            yield
            return
        self._state = _State(self._objective)
        self._recording = True
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                yield
        except BaseException:
            self._clear()
            raise
        finally:
            self._recording = False
            self._packed.clear()

    def offer(self, seen: Evaluated, graph: GradientGraph) -> bool:
        """Keep the batch that was evaluated last, if its graph fits; whether it does."""
        if not self._recording:
            return False
        packed, self._packed = self._packed, {}
        batch = seen.batch
        cached = self._objective.batches.cached
        own = [*seen.tensors.values(), *(tensors_in(batch.data) if cached else ())]
        for address in {*self._held, *(t.untyped_storage().data_ptr() for t in own)}:
            packed.pop(address, None)
        if self.bytes + sum(packed.values()) > self._budget:
            return False
        self._held.update(packed)
        if not cached:
            batch = dataclasses.replace(batch, data=None)
        index = batch.index
        self.seen[index] = dataclasses.replace(seen, batch=batch, output=None, target=None)
        self._graphs[index] = graph
        return True

    def _clear(self) -> None:
        self._graphs.clear()
        self.seen.clear()
        self._held.clear()
        self._packed.clear()
        self._state = None

    def _pack(self, tensor: Tensor) -> tuple[Tensor, int]:
        storage = tensor.untyped_storage()
        self._packed[storage.data_ptr()] = storage.nbytes()
        # Not the tensor itself, since an operation that saves its own result would never be freed.
        return tensor.detach(), tensor._version


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    tensor, version = packed
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            "operation"
        )
    return tensor


class _State:
    """What the graphs depend on, to be compared with what the model has later."""

    def __init__(self, objective: Objective) -> None:
        model = objective.model
        self._flags = [module.training for module in model.modules()]
        self._marks = _marks(objective)
        # Versions do not tell of writes through `.data`; to compare numbers would make a GPU wait.
        compared = objective.device.type == "cpu"
        tensors = [*objective.parameters.values(), *model.buffers()] if compared else []
        self._numbers = [(t, t.detach().clone()) for t in tensors]

    def is_that_of(self, objective: Objective) -> bool:
        flags = [module.training for module in objective.model.modules()]
        return (
            flags == self._flags
            and _marks(objective) == self._marks
            and all(torch.equal(now, before) for now, before in self._numbers)
        )


def _marks(objective: Objective) -> list[tuple[int, int, int]]:
    tensors = [*objective.model.parameters(), *objective.model.buffers()]
    return [
        (id(t), 0 if t.is_inference() else t._version, t.untyped_storage().data_ptr())
        for t in tensors
    ]
