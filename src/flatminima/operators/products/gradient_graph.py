"""The gradient of one batch with its graph, and products with its Hessian."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...derivatives.missing import not_twice, second_derivative
from ...derivatives.torch_private import edge_of
from ...derivatives.tracing import GraphTrace
from ...support.vectors import Layout

__all__ = [
    "Block",
    "GradientGraph",
    "PerLeaf",
]

Block = Sequence[int]
"""Positions of the leaves that make up a diagonal block of the Hessian."""

PerLeaf = Sequence[Tensor | None]
"""For each leaf a tensor of its shape, or None for zeros."""


class GradientGraph:
    """The gradient of a loss with its graph, by which products with the Hessian are taken.

    Building it costs about as much as a gradient, and each product twice that (Pearlmutter 1994,
    reverse over reverse).

    Args:
        loss: scalar with its graph.
        leaves: the parameters it is differentiated by.
        layout: how the leaves lie in a vector.
        trace: entered while the loss was computed, when the graph is to be examined.

    Attributes:
        saved: empty; all that it holds is seen by saved-tensor hooks.

    Raises:
        NotTwiceDifferentiableError: an operation has no second derivative; the error names it,
            and with `trace` the module that called it.
    """

    def __init__(
        self,
        loss: Tensor,
        leaves: Sequence[Tensor],
        layout: Layout,
        trace: GraphTrace | None = None,
    ) -> None:
        refusal = None if trace is None else trace.refusal(loss, leaves)
        if refusal is not None:
            raise not_twice(*refusal)
        self._leaves, self._layout, self._trace = leaves, layout, trace
        self.saved: dict[int, int] = {}
        with second_derivative(trace):
            gradients = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        # A gradient without a graph is constant in θ: a linear or an unused parameter. Of the
        # others the edge is enough, so that the gradient's own memory is not held.
        self._edges = {
            i: edge_of(g) for i, g in enumerate(gradients) if g is not None and g.requires_grad
        }

    def products(self, vectors: Sequence[Tensor], *, keep: bool = False) -> PerLeaf:
        """Return H v for each of several v of shape (n,), one after the other.

        Args:
            vectors: v.
            keep: whether the graph is to serve once more.

        Returns:
            For each v a tensor for each leaf, or None for zeros.

        Raises:
            NotTwiceDifferentiableError: an operation has no second derivative.
        """
        every = range(len(self._leaves))
        found: list[Tensor | None] = []
        for number, vector in enumerate(vectors, start=1):
            pieces = self._layout.unflatten(vector)
            found += self._product(pieces, every, keep=keep or number < len(vectors))
        return found

    def block_product(
        self, vector: Tensor, blocks: Sequence[Block], *, keep: bool = False
    ) -> PerLeaf:
        """Return the product of a vector with the diagonal blocks of H alone.

        For each block only the part of the graph between the block's gradient and the block's
        parameters is gone through.

        Args:
            vector: (n,); entries outside of the blocks are not looked at.
            blocks: disjoint.
            keep: whether the graph is to serve once more.

        Returns:
            A tensor for each leaf, or None for zeros, as there are outside of the blocks.

        Raises:
            NotTwiceDifferentiableError: an operation has no second derivative.
        """
        pieces = self._layout.unflatten(vector)
        out: list[Tensor | None] = [None] * len(self._leaves)
        for number, block in enumerate(blocks, start=1):
            found = self._product(pieces, block, keep=keep or number < len(blocks))
            for index, piece in zip(block, found, strict=True):
                out[index] = piece
        return out

    def _product(
        self, pieces: Sequence[Tensor], block: Block, *, keep: bool
    ) -> Sequence[Tensor | None]:
        """The derivative by the leaves of `block` of the block's gradient times its pieces."""
        edges = {i: self._edges[i] for i in block if i in self._edges}
        if not edges:
            return [None] * len(block)
        with second_derivative(self._trace):
            return torch.autograd.grad(
                list(edges.values()),
                [self._leaves[i] for i in block],
                grad_outputs=[pieces[i] for i in edges],
                retain_graph=keep,
                allow_unused=True,
            )
