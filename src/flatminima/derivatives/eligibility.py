"""Which tensors the hand-written derivatives can be used for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .torch_private import in_transform

__all__ = ["are_plain", "gradients_of", "have_values"]


def are_plain(tensors: Sequence[Any]) -> bool:
    """Return whether these are dense tensors of one type and device, not changed by autocast."""
    return (
        not in_transform()
        and all(isinstance(t, Tensor) and t.layout == torch.strided for t in tensors)
        and len({(t.dtype, t.device) for t in tensors}) == 1
        and not torch.is_autocast_enabled(tensors[0].device.type)
    )


def have_values(tensors: Sequence[Any]) -> bool:
    """Return whether these are ordinary tensors, not of a subclass as in tracing."""
    return all(type(t) in (Tensor, nn.Parameter) for t in tensors)


def gradients_of(
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Return Jᵀ u by autograd, with a graph.

    Args:
        function: maps the inputs to a tensor, or to several.
        inputs: where to differentiate.
        cotangents: u, one for each result; None for zeros.
        wanted: which inputs to differentiate by.
    """
    with torch.enable_grad():
        # Views, so that a tensor given twice counts as two inputs.
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
