"""ReLU with a second derivative that does not add up zeros."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .eligibility import are_plain, have_values
from .torch_private import THRESHOLD_BACKWARD, is_view

__all__ = ["relu"]


def relu(input: Any, inplace: bool = False) -> Tensor | None:  # noqa: A002
    """Compute `F.relu` of what has a derivative; None where PyTorch must compute it."""
    if not (are_plain([input]) and input.requires_grad):
        return None
    if input.dtype not in (torch.float32, torch.float64):
        return None
    # Views and leaves have their own rules about writing to them.
    if inplace and (not have_values([input]) or input.is_leaf or is_view(input)):
        return None
    out: Tensor = _Relu.apply(input, inplace)  # type: ignore[no-untyped-call]
    return out


class _Relu(Function):
    """PyTorch fills the second derivative by the result with zeros and adds it: two passes more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
        out = x.relu_() if inplace else x.relu()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        (out,) = ctx.saved_tensors
        return _Masked.apply(d_out, out.detach()), None  # type: ignore[no-untyped-call]


class _Masked(Function):
    """d_out where out, which is a constant, is above zero."""

    @staticmethod
    def forward(ctx: Any, d_out: Tensor, out: Tensor) -> Tensor:
        ctx.save_for_backward(out)
        found: Tensor = THRESHOLD_BACKWARD(d_out, out, 0)
        return found

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (out,) = ctx.saved_tensors
        return _Masked.apply(g, out), None  # type: ignore[no-untyped-call]
