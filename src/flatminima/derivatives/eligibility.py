"""Which calls may go to functions of this package's own in place of PyTorch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["are_plain", "gradients_of", "have_values", "in_transform"]


def in_transform() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is under way.

    Neither goes through an `autograd.Function` that has no rule for it.
    """
    level: int = torch.autograd.forward_ad._current_level
    return torch._C._functorch.peek_interpreter_stack() is not None or level >= 0


def are_plain(tensors: Sequence[Any]) -> bool:
    """Dense tensors of one type and device, without autocast that would change the type."""
    return (
        not in_transform()
        and all(isinstance(t, Tensor) and t.layout == torch.strided for t in tensors)
        and len({(t.dtype, t.device) for t in tensors}) == 1
        and not torch.is_autocast_enabled(tensors[0].device.type)
    )


def have_values(tensors: Sequence[Any]) -> bool:
    """Whether none is of a type of its own, such as those that operations are traced with."""
    return all(type(t) in (Tensor, nn.Parameter) for t in tensors)


def gradients_of(
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Jᵀ u by autograd, as something to be differentiated again.

    Args:
        function: (inputs) → a tensor or several.
        inputs: where.
        cotangents: u, one for each result; None for zeros.
        wanted: which inputs to differentiate by.
    """
    with torch.enable_grad():
        # Views, so that a tensor given twice is two inputs.
        own = [None if t is None else t.view_as(t) for t in inputs]
        found = function(*own)
        results = [found] if isinstance(found, Tensor) else list(found)
        pairs = [
            (r, u)
            for r, u in zip(results, cotangents, strict=True)
            if u is not None and r is not None and r.requires_grad
        ]
        chosen = [t for t, w in zip(own, wanted, strict=True) if w and t is not None]
        if not pairs or not chosen:
            return [None] * len(own)
        given = iter(
            torch.autograd.grad(
                [r for r, _ in pairs],
                chosen,
                [u for _, u in pairs],
                create_graph=True,
                allow_unused=True,
            )
        )
    return [next(given) if w and t is not None else None for t, w in zip(own, wanted, strict=True)]
