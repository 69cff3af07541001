"""Batch norm with fixed statistics, with a second derivative of few passes over the activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .eligibility import are_plain, have_values
from .torch_private import BATCH_NORM_BACKWARD

__all__ = ["batch_norm"]


def batch_norm(
    input: Any,  # noqa: A002
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,  # noqa: ARG001
    eps: float = 1e-5,
) -> Tensor | None:
    """Compute `F.batch_norm` in evaluation mode; None where PyTorch must compute it.

    PyTorch differentiates it twice by the general formula, in some ten passes over the
    activations. With fixed statistics it is a multiplication and an addition.
    """
    given = [t for t in (input, running_mean, running_var, weight, bias) if t is not None]
    if training or running_mean is None or running_var is None or not are_plain(given):
        return None
    if input.dtype not in (torch.float32, torch.float64):
        return None  # PyTorch adds up in a wider type
    if input.dim() < 2 or any(t.shape != input.shape[1:2] for t in given[1:]):
        return None
    constant = not (running_mean.requires_grad or running_var.requires_grad)
    if constant and input.device.type == "cpu" and have_values(given):
        gain = torch.ones_like(running_mean) if weight is None else weight
        shift = torch.zeros_like(running_mean) if bias is None else bias
        found: Tensor = _FixedNorm.apply(  # type: ignore[no-untyped-call]
            input, gain, shift, running_mean, running_var, eps
        )
        return found
    shape = (1, -1, *[1] * (input.dim() - 2))
    scale = torch.rsqrt(running_var + eps)
    if weight is not None:
        scale = weight * scale
    # Centred first: otherwise the sums for the weight's derivative would cancel.
    out: Tensor = (input - running_mean.view(shape)) * scale.view(shape)
    return out if bias is None else out + bias.view(shape)


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
    """The wanted gradients by x, weight and bias."""

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
    """Sums over each channel of d_out · (x − mean) / sqrt(var + eps) and of d_out, in one pass."""
    if not any(wanted):
        return None, None
    _, first, second = BATCH_NORM_BACKWARD(
        d_out, x, weight, mean, var, None, None, False, eps, [False, *wanted]
    )
    return (first if wanted[0] else None), (second if wanted[1] else None)


def _lying_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor in the memory layout of another, so that kernels read both in one pass."""
    if tensor.stride() == other.stride():
        return tensor
    if other.dim() == 4 and not other.is_contiguous():
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.contiguous()
