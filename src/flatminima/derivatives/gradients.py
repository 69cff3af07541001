"""First derivatives where `torch.autograd.grad` does not work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from .torch_private import is_reentrant_checkpoint, leaf_of

__all__ = ["accumulate", "checkpoints_reentrantly", "nodes"]


def checkpoints_reentrantly(loss: Tensor) -> bool:
    """Return whether a graph contains reentrant checkpointing, which supports `.backward()` only.

    `torch.autograd.grad` raises an error only for derivatives by the checkpointed block's input.
    The block's own parameters it silently treats as unused.
    """
    return any(map(is_reentrant_checkpoint, nodes(loss)))


def nodes(*tensors: Tensor) -> Iterator[Any]:
    """Yield the nodes of the graphs of some tensors, each once."""
    seen: set[Any] = set()
    waiting: list[Any] = [t.grad_fn for t in tensors]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [n for n, _ in node.next_functions]


def accumulate(
    loss: Tensor, leaves: Sequence[Tensor], others: Iterable[Tensor], *, keep: bool = False
) -> list[Tensor | None]:
    """Return the gradients by `leaves`, private tensors, computed by `.backward()`.

    Args:
        loss: a scalar with its graph.
        leaves: the tensors to differentiate by.
        others: tensors that the graph may reach inside checkpointed blocks. Their `.grad`, and
            that of every other leaf of the graph, is put back afterwards.
        keep: keep the graph for another use.
    """
    reached = map(leaf_of, nodes(loss))
    tensors = {id(t): t for t in [*others, *reached, *leaves] if isinstance(t, Tensor)}
    kept = [(t, t.grad) for t in tensors.values()]
    try:
        for tensor, _ in kept:
            tensor.grad = None
        loss.backward(retain_graph=keep)  # type: ignore[no-untyped-call]
        return [leaf.grad for leaf in leaves]
    finally:
        for tensor, gradient in kept:
            tensor.grad = gradient
