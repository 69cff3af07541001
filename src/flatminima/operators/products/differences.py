"""Products H v by central differences of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Quotients", "central_differences", "extrapolate"]

SHRINKINGS = 2
"""How often a step may be made smaller when the two differences disagree."""


Quotients = Callable[[float], tuple[Tensor, Tensor, float]]
"""h → difference quotients of steps h and h / 2, shape (n,), and the norm of what is rounded."""


def central_differences(
    gradient: Callable[[Tensor], Tensor], vector: Tensor, point: Tensor, eps: float
) -> tuple[Tensor, float]:
    """Return H v from gradients at θ ± h v and θ ± h v / 2, and an estimate of its error.

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

    return extrapolate(quotients, vector, point, eps)


def extrapolate(
    quotients: Quotients, vector: Tensor, point: Tensor, eps: float
) -> tuple[Tensor, float]:
    """Return a derivative along `vector` from central differences, and an estimate of its error.

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
