"""The ways to compute H v for one batch."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .errors import NotTwiceDifferentiableError
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

    Raises:
        NotTwiceDifferentiableError: an operation has no second derivative; the message names it.
    """
    with _second_derivative():
        return _double_backward(loss, leaves, vectors, layout)


# What PyTorch says of an operation without a second derivative.
_MISSING = re.compile(
    r"derivative for '?(?P<name>[\w:]+)'? is not implemented|twice.*once_?differentiable", re.S
)


@contextlib.contextmanager
def _second_derivative() -> Iterator[None]:
    """PyTorch's complaint that there is none, told with the operation and the way out."""
    try:
        yield
    except RuntimeError as error:
        found = _MISSING.search(str(error))
        if found is None:
            raise
        name = found["name"] or "a function marked as once_differentiable"
        raise NotTwiceDifferentiableError(
            f"PyTorch has no second derivative of {name}. For attention, run under "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH); for recurrent layers on CUDA, under "
            "torch.backends.cudnn.flags(enabled=False); otherwise replace the operation. Measures "
            "that take first derivatives (ε-sharpness, random perturbations) work as they are."
        ) from error


def _double_backward(
    loss: Tensor, leaves: Sequence[Tensor], vectors: Sequence[Tensor], layout: Layout
) -> list[Tensor]:
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
