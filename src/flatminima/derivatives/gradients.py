"""First derivatives where `torch.autograd.grad` is refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

__all__ = ["accumulated", "checkpoints_reentrantly", "nodes"]


def checkpoints_reentrantly(loss: Tensor) -> bool:
    """Whether reentrant checkpointing took part, which knows `.backward()` alone.

    `torch.autograd.grad` complains of it only on the way to the checkpointed block's input; the
    block's own parameters it silently takes for unused.
    """
    return any(node.name() == "CheckpointFunctionBackward" for node in nodes(loss))


def nodes(*tensors: Tensor) -> Iterator[Any]:
    """The nodes of the graphs of some tensors."""
    seen: set[Any] = set()
    waiting: list[Any] = [t.grad_fn for t in tensors]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [n for n, _ in node.next_functions]


def accumulated(
    loss: Tensor, leaves: Sequence[Tensor], others: Iterable[Tensor], *, keep: bool = False
) -> list[Tensor | None]:
    """The gradients by `leaves`, private tensors, through `.backward()` and their `.grad`.

    Args:
        loss: scalar with its graph.
        leaves: what it is differentiated by.
        others: tensors that the graph may reach unseen, inside of what is checkpointed. Their
            `.grad`, and that of every other leaf of the graph, is put aside meanwhile.
        keep: whether the graph is to serve once more.
    """
    reached = (getattr(node, "variable", None) for node in nodes(loss))
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
