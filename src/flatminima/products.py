"""The ways to compute H v: exactly for one batch, and by differences of gradients."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from .errors import NotTwiceDifferentiableError
from .tracing import GraphTrace, operation_name
from .vectors import Layout

__all__ = [
    "Block",
    "GradientGraph",
    "PerLeaf",
    "Quotients",
    "central_differences",
    "edge_of",
    "extrapolated",
    "not_twice",
    "second_derivative",
    "where",
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
        with second_derivative(trace):
            gradients = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        # A gradient without a graph is constant in θ: a linear or an unused parameter. Of the
        # others the edge is enough, so that the gradient's own memory is not held.
        self._edges = {
            i: edge_of(g) for i, g in enumerate(gradients) if g is not None and g.requires_grad
        }

    def products(self, vectors: Sequence[Tensor], *, keep: bool = False) -> PerLeaf:
        """H v for each of several v of shape (n,), one after the other.

        Args:
            vectors: v.
            keep: whether the graph is to serve once more.

        Returns:
            For each v a tensor for each leaf, or None for zeros.

        Raises:
            NotTwiceDifferentiableError: an operation has no second derivative.
        """
        every = range(len(self._leaves))
        last = len(vectors) - 1
        return [
            piece
            for number, vector in enumerate(vectors)
            for piece in self._product(
                self._layout.unflatten(vector), every, keep=keep or number < last
            )
        ]

    def block_product(
        self, vector: Tensor, blocks: Sequence[Block], *, keep: bool = False
    ) -> PerLeaf:
        """The product of a vector with the diagonal blocks of H alone.

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


# Asked for what goes into a node of which some result was None, torch 2.6 crashes.
EDGES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


def edge_of(gradient: Tensor) -> Any:
    """What a gradient is to be differentiated by: its edge, or itself where that is not safe."""
    return get_gradient_edge(gradient) if EDGES else gradient


# What PyTorch says of an operation without a second derivative.
_MISSING = re.compile(
    r"derivative for '?(?P<name>[\w:]+)'? is not implemented|twice.*once_?differentiable"
    r"|(?P<compiled>aot_?autograd does not currently support double backward)",
    re.S,
)


@contextlib.contextmanager
def second_derivative(trace: GraphTrace | None) -> Iterator[None]:
    """PyTorch's complaint that there is none, told with the operation and the way out."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        found = _MISSING.search(str(error))
        if found is None:
            raise
        if found["compiled"]:
            name = "torch.compile"
        elif found["name"]:
            name = operation_name(found["name"])
        else:
            name = "a function marked as once_differentiable"
        raise not_twice(name, "" if trace is None else trace.place(name)) from error


def not_twice(operation: str, module: str) -> NotTwiceDifferentiableError:
    """The error that names an operation without a second derivative, and its module."""
    return NotTwiceDifferentiableError(
        f"PyTorch has no second derivative of {operation}{where(module)}. Replace the "
        "operation, or let method='auto' or 'finite_differences' take differences of gradients. "
        "Measures that need first derivatives alone (ε-sharpness, random perturbations) work as "
        "they are.",
        operation,
        module,
    )


def where(module: str) -> str:
    """A module's name from a trace, as it stands in a sentence."""
    if not module:
        return ""
    return f" (in {module})" if module.startswith("the ") else f" (in the module {module!r})"


SHRINKINGS = 2
"""How often a step may be made smaller when the two differences disagree."""


Quotients = Callable[[float], tuple[Tensor, Tensor, float]]
"""h → difference quotients of steps h and h / 2, shape (n,), and the norm of what is rounded."""


def central_differences(
    gradient: Callable[[Tensor], Tensor], vector: Tensor, point: Tensor, eps: float
) -> tuple[Tensor, float]:
    """H v from gradients at θ ± h v and θ ± h v / 2, and an estimate of its error.

    Args:
        gradient: ∇L(θ + δ), shape (n,), for a displacement δ of shape (n,).
        vector: v, shape (n,).
        point: θ, shape (n,).
        eps: the precision of the parameters.

    Returns:
        H v and the estimated norm of its error.
    """

    def quotients(step: float) -> tuple[Tensor, Tensor, float]:
        scale = 0.0

        def difference(h: float) -> Tensor:
            nonlocal scale
            above, below = gradient(h * vector), gradient(-h * vector)
            scale = max(scale, _norm(above))
            return (above - below).div_(2 * h)

        return difference(step), difference(step / 2), scale

    return extrapolated(quotients, vector, point, eps)


def extrapolated(
    quotients: Quotients, vector: Tensor, point: Tensor, eps: float
) -> tuple[Tensor, float]:
    """A derivative along `vector` from central differences, and an estimate of its error.

    With the quotient D(h) it is (4 D(h/2) − D(h)) / 3, of fourth order in h (Richardson), and
    ‖D(h/2) − D(h)‖ estimates the error, or what rounding adds to it if that is more. The step h is
    such that no parameter moves by more than eps^(1/4) of their root mean square; it is made 16
    times smaller, at most twice, while the two differences disagree by more than 5 % for another
    reason than rounding.
    """
    length = float(vector.abs().max())
    if length == 0:
        return torch.zeros_like(vector), 0.0
    size = _norm(point) / math.sqrt(len(point))
    step = eps**0.25 * (size if size > 0 else 1.0) / length
    best: tuple[Tensor, float] | None = None
    for _ in range(1 + SHRINKINGS):
        wide, narrow, scale = quotients(step)
        error, rounding = _norm(narrow - wide), eps * scale / step
        product = (4 * narrow - wide).div_(3)
        # No difference at all is that of steps too small for the gradient's digits.
        if best is None or 0 < error < best[1]:
            best = product, max(error, rounding)
        if not error > max(0.05 * _norm(product), 10 * rounding):
            break
        step /= 16
    return best  # type: ignore[return-value]


def _norm(tensor: Tensor) -> float:
    """In float64, where the device has it: squares of small numbers vanish in float32."""
    wide = None if tensor.device.type == "mps" else torch.float64
    return float(torch.linalg.vector_norm(tensor, dtype=wide))
