"""Batch norm with given statistics and ReLU, with second derivatives of few passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .eligibility import are_plain, have_values

__all__ = ["fixed_norm", "relu"]


def fixed_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """Batch norm with given statistics, which are taken for constants; (N, C, *)."""
    weight = torch.ones_like(mean) if weight is None else weight
    bias = torch.zeros_like(mean) if bias is None else bias
    out: Tensor = _FixedNorm.apply(x, weight, bias, mean, var, eps)  # type: ignore[no-untyped-call]
    return out


def relu(input: Any, inplace: bool = False) -> Tensor | None:  # noqa: A002
    """As `F.relu`, of what has a derivative; None for what is left to PyTorch."""
    if not (are_plain([input]) and input.requires_grad):
        return None
    if input.dtype not in (torch.float32, torch.float64):
        return None
    # Views and leaves have rules of their own about writing to them.
    if inplace and (not have_values([input]) or input.is_leaf or input._is_view()):
        return None
    out: Tensor = _Relu.apply(input, inplace)  # type: ignore[no-untyped-call]
    return out


class _FixedNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps = eps
        return _normed(x, weight, bias, mean, var, eps)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        wanted = ctx.needs_input_grad[:3]
        found = _FixedNormBackward.apply(d_out, *ctx.saved_tensors, ctx.eps, wanted)  # type: ignore[no-untyped-call]
        return (*found, None, None, None)


class _FixedNormBackward(Function):
    """The gradients that are wanted by x, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        d_out: Tensor,
        x: Tensor,
        weight: Tensor,
        mean: Tensor,
        var: Tensor,
        eps: float,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:
        d_out = _lying_like(d_out, x)
        ctx.save_for_backward(d_out, x, weight, mean, var)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        d_x = d_out * _scale(weight, var, eps, x) if wanted[0] else None
        return d_x, *_sums(d_out, x, weight, mean, var, eps, wanted[1:])

    @staticmethod
    def backward(
        ctx: Any, g_x: Tensor | None, g_weight: Tensor | None, g_bias: Tensor | None
    ) -> tuple[Any, ...]:
        d_out, x, weight, mean, var = ctx.saved_tensors
        by_out, by_x, by_weight = ctx.needs_input_grad[:3]
        eps = ctx.eps
        g_x = None if g_x is None else _lying_like(g_x, x)
        g_out = None
        if by_out and not (g_weight is None and g_bias is None):
            gain, shift = (torch.zeros_like(mean) if g is None else g for g in (g_weight, g_bias))
            g_out = _normed(x, gain, shift, mean, var, eps)
        if by_out and g_x is not None:
            scale = _scale(weight, var, eps, x)
            if g_out is None:
                g_out = g_x * scale
            elif torch.is_grad_enabled():
                g_out = torch.addcmul(g_out, g_x, scale)
            else:
                g_out.addcmul_(g_x, scale)
        found_x = found_weight = None
        if by_x and g_weight is not None:
            found_x = d_out * _scale(g_weight, var, eps, x)
        if by_weight and g_x is not None:
            nothing = torch.zeros_like(mean)
            found_weight = _sums(d_out, g_x, weight, nothing, var, eps, (True, False))[0]
        return g_out, found_x, found_weight, None, None, None, None


def _normed(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False)


def _scale(weight: Tensor, var: Tensor, eps: float, x: Tensor) -> Tensor:
    return (weight * torch.rsqrt(var + eps)).view(1, -1, *[1] * (x.dim() - 2))


def _sums(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """By channel, of d_out · (x − mean) / sqrt(var + eps) and of d_out, in one pass."""
    if not any(wanted):
        return None, None
    _, first, second = torch.ops.aten.native_batch_norm_backward.default(
        d_out, x, weight, mean, var, None, None, False, eps, [False, *wanted]
    )
    return (first if wanted[0] else None), (second if wanted[1] else None)


def _lying_like(tensor: Tensor, other: Tensor) -> Tensor:
    """In the order of memory in which kernels go through both at once."""
    if tensor.stride() == other.stride():
        return tensor
    if other.dim() == 4 and not other.is_contiguous():
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.contiguous()


class _Relu(Function):
    """PyTorch adds the second derivative by the result, which is zero, in two more passes."""

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
    """The first where the second, which is a constant, is above zero."""

    @staticmethod
    def forward(ctx: Any, d_out: Tensor, out: Tensor) -> Tensor:
        ctx.save_for_backward(out)
        found: Tensor = torch.ops.aten.threshold_backward.default(d_out, out, 0)
        return found

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (out,) = ctx.saved_tensors
        return _Masked.apply(g, out), None  # type: ignore[no-untyped-call]
