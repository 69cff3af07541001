"""Products with Jᵀ M J for one batch, J the Jacobian of its outputs by the parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...derivatives.missing import not_twice, second_derivative
from ...derivatives.torch_private import edge_of, version
from ...derivatives.tracing import GraphTrace
from ...support.vectors import Layout
from ..outputs.loss_curvature import OutputMatrix, patternless
from .fingerprint import memory_of
from .gradient_graph import PerLeaf

__all__ = ["OutputGraph"]


class OutputGraph:
    """The outputs of a batch with their graph, by which products with Jᵀ M J are taken.

    J is never formed. Jᵀu is linear in u, so that its derivative by u is J (reverse over reverse);
    building its graph costs as much as a gradient, and each product one and a third of it.

    Args:
        outputs: with their graph.
        matrix: M, on the outputs.
        leaves: the parameters.
        layout: how the leaves lie in a vector.
        trace: entered while the outputs were computed, when the graph is to be examined.

    Attributes:
        saved: address and bytes of what the graph of Jᵀu has saved in addition to what was there
            before.

    Raises:
        NotTwiceDifferentiableError: an operation's derivative cannot be differentiated.
    """

    def __init__(
        self,
        outputs: Sequence[Tensor],
        matrix: OutputMatrix,
        leaves: Sequence[Tensor],
        layout: Layout,
        trace: GraphTrace | None = None,
    ) -> None:
        refusal = None if trace is None else trace.refusal(outputs, leaves)
        if refusal is not None:
            raise not_twice(*refusal)
        self._outputs, self._leaves, self._matrix = outputs, leaves, matrix
        self._layout, self._trace = layout, trace
        self.saved: dict[int, int] = {}
        # One number each, since outputs may be as large as a vocabulary.
        self._seeds = [t.new_zeros(()).requires_grad_().expand(t.shape) for t in outputs]
        with second_derivative(trace), self._without_zeros():
            gradients = torch.autograd.grad(
                outputs, leaves, grad_outputs=self._seeds, create_graph=True, allow_unused=True
            )
        self._edges = {
            i: edge_of(g) for i, g in enumerate(gradients) if g is not None and g.requires_grad
        }

    def _without_zeros(self) -> contextlib.AbstractContextManager[Any]:
        """What backpropagates u = 0 is zero and is saved as such: activations need no twins."""

        def pack(tensor: Tensor) -> tuple[Tensor, int]:
            held = tensor.detach()
            if tensor.numel() > 1 and not bool(tensor.any()):
                held = tensor.new_zeros(()).expand(tensor.shape)
            else:
                self.saved.update(memory_of(tensor))
            return held, version(held)

        def unpack(packed: tuple[Tensor, int]) -> Tensor:
            tensor, before = packed
            if version(tensor) != before:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an "
                    "inplace operation"
                )
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def products(self, vectors: Sequence[Tensor], *, keep: bool = False) -> PerLeaf:
        """Return Jᵀ M J v for each of several v of shape (n,).

        Args:
            vectors: v.
            keep: whether the graph is to serve once more.

        Returns:
            For each v a tensor for each leaf, or None for zeros.
        """
        found: list[Tensor | None] = []
        for number, vector in enumerate(vectors, start=1):
            pieces = self._layout.unflatten(vector)
            found += self._product(pieces, keep or number < len(vectors))
        return found

    def _product(self, pieces: Sequence[Tensor], keep: bool) -> PerLeaf:
        if not self._edges:
            return [None] * len(self._leaves)
        tangents = self._tangents(pieces, keep=keep)
        with second_derivative(self._trace):
            cotangents = self._matrix.times(tangents)
        del tangents
        used = [(o, c) for o, c in zip(self._outputs, cotangents, strict=True) if c is not None]
        del cotangents
        if not used:
            return [None] * len(self._leaves)
        return torch.autograd.grad(
            [o for o, _ in used],
            self._leaves,
            grad_outputs=[c for _, c in used],
            retain_graph=keep,
            allow_unused=True,
        )

    def _tangents(self, pieces: Sequence[Tensor], *, keep: bool) -> list[Tensor]:
        """Return J v, a tensor for each output."""
        if not self._edges:
            return [torch.zeros_like(o) for o in self._outputs]
        with second_derivative(self._trace):
            found = torch.autograd.grad(
                list(self._edges.values()),
                self._seeds,
                grad_outputs=[pieces[i] for i in self._edges],
                retain_graph=keep,
                allow_unused=True,
            )
        return [
            torch.zeros_like(o) if t is None else t.detach()
            for t, o in zip(found, self._outputs, strict=True)
        ]

    def adjoint_forms(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Return ⟨u, J v⟩ and ⟨Jᵀ u, v⟩ for a u without a pattern, which keeps the graph.

        They differ where a function's backward hides how it depends on what it is given.
        """
        pieces = self._layout.unflatten(vector)
        tangents, probes = self._tangents(pieces, keep=True), [*map(patternless, self._outputs)]
        left = torch.stack([(t * u).double().sum() for t, u in zip(tangents, probes, strict=True)])
        found = torch.autograd.grad(
            self._outputs, self._leaves, probes, retain_graph=True, allow_unused=True
        )
        pairs = [(g, p) for g, p in zip(found, pieces, strict=True) if g is not None]
        right = torch.stack([(g * p).double().sum() for g, p in pairs])
        return left.sum(), right.sum()
