"""The ways to compute H v for one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .vectors import Layout

__all__ = ["double_backward"]


def double_backward(
    loss: Tensor, leaves: Sequence[Tensor], vectors: Sequence[Tensor], layout: Layout
) -> list[Tensor]:
    """H v for each of several v by reverse over reverse (Pearlmutter 1994).

    The graph of the gradient is built once and serves all the vectors.

    Args:
        loss: scalar with its graph.
        leaves: the parameters it is differentiated by.
        vectors: each of shape (n,).
        layout: how the leaves lie in a vector.

    Returns:
        One new (n,) tensor for each vector; zeros where the gradient is constant.
    """
    gradients = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
    # A gradient without a graph is constant in θ: a linear or an unused parameter.
    kept = [i for i, g in enumerate(gradients) if g is not None and g.requires_grad]
    outputs = [g for g in (gradients[i] for i in kept) if g is not None]
    products = []
    for number, vector in enumerate(vectors, start=1):
        if not outputs:
            products.append(layout.flatten([None] * len(leaves)))
            continue
        pieces = layout.unflatten(vector)
        products.append(
            layout.flatten(
                torch.autograd.grad(
                    outputs,
                    leaves,
                    grad_outputs=[pieces[i] for i in kept],
                    retain_graph=number < len(vectors),
                    allow_unused=True,
                )
            )
        )
    return products
