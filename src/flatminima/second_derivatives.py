"""Layers with second derivatives that cost less than PyTorch's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from .attention import multi_head_attention, scaled_dot_product_attention
from .dense import layer_norm, linear, relu
from .plain import are_plain

__all__ = ["CheapSecondDerivatives"]


class CheapSecondDerivatives(TorchFunctionMode):
    """While it is entered, some functions are computed such that products with H cost less.

    Values and derivatives are PyTorch's own, but for rounding.

    Convolutions: PyTorch writes the second derivative by the weight as a convolution with the
    images as its kernels, for which no backend is made. The same number is the ordinary gradient
    by the weight at another input, which is asked for here.

    Batch norm in evaluation mode: PyTorch differentiates it by the general formula, of some ten
    passes over the activations. With fixed statistics it is a multiplication and an addition.

    Linear layers, ReLU, layer norm and attention have second derivatives written by hand: those
    of PyTorch are put together from general operations, one pass over the activations for each.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        found = None
        if func in _DIMENSIONS:
            found = _convolution(_DIMENSIONS[func], *args, **kwargs)
        elif func is F.batch_norm:
            found = _fixed_batch_norm(*args, **kwargs)
        elif func in _OWN:
            found = _OWN[func](*args, **kwargs)
        return func(*args, **kwargs) if found is None else found


def _fixed_batch_norm(
    input: Any,  # noqa: A002
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,  # noqa: ARG001
    eps: float = 1e-5,
) -> Tensor | None:
    """Batch norm with given statistics; None where it is another or does not fit."""
    given = [t for t in (input, running_mean, running_var, weight, bias) if t is not None]
    if training or running_mean is None or running_var is None or not are_plain(given):
        return None
    if input.dtype not in (torch.float32, torch.float64):
        return None  # PyTorch adds up in a wider type
    if input.dim() < 2 or any(t.shape != input.shape[1:2] for t in given[1:]):
        return None
    shape = (1, -1, *[1] * (input.dim() - 2))
    scale = torch.rsqrt(running_var + eps)
    if weight is not None:
        scale = weight * scale
    # Centred first: the sums for the weight's derivative would cancel otherwise.
    out: Tensor = (input - running_mean.view(shape)) * scale.view(shape)
    return out if bias is None else out + bias.view(shape)


_OWN: dict[Any, Any] = {
    F.linear: linear,
    F.relu: relu,
    torch.relu: relu,
    Tensor.relu: relu,
    F.layer_norm: layer_norm,
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    F.multi_head_attention_forward: multi_head_attention,
}

_DIMENSIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


def _convolution(
    dimensions: int,
    input: Any,  # noqa: A002
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """The convolution; None for what is left to PyTorch, with its messages."""
    tensors = [t for t in (input, weight, bias) if t is not None]
    if isinstance(padding, str) or not are_plain(tensors) or input.dim() != dimensions + 2:
        return None
    lists = [
        [v] * dimensions if isinstance(v, int) else list(v) for v in (stride, padding, dilation)
    ]
    if any(len(v) not in (1, dimensions) for v in lists):
        return None
    lists = [v * dimensions if len(v) == 1 else v for v in lists]
    options = (*lists, False, [0] * dimensions, groups)
    return _forward(input, weight, bias, options)


class _Convolution(Function):
    """`aten::convolution`; `options` are its arguments after the bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = options
        out: Tensor = torch.ops.aten.convolution.default(x, weight, bias, *options)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        found = _backward(d_out, x, weight, ctx.options, wanted)
        return (*found, None)


class _ConvolutionBackward(Function):
    """`aten::convolution_backward`, the gradients that are wanted by x, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        d_out: Tensor,
        x: Tensor,
        weight: Tensor,
        options: tuple[Any, ...],
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(d_out, x, weight)
        ctx.options = options
        ctx.set_materialize_grads(False)
        bias = [weight.shape[0]] if wanted[2] else None
        found = torch.ops.aten.convolution_backward.default(
            d_out, x, weight, bias, *options, list(wanted)
        )
        return tuple(g if w else None for g, w in zip(found, wanted, strict=True))

    @staticmethod
    def backward(
        ctx: Any, g_x: Tensor | None, g_weight: Tensor | None, g_bias: Tensor | None
    ) -> tuple[Any, ...]:
        d_out, x, weight = ctx.saved_tensors
        by_out, by_x, by_weight = ctx.needs_input_grad[:3]
        options = ctx.options
        g_out = None
        if by_out:
            # The derivative is linear in all three, each through one convolution.
            if g_x is not None:
                g_out = _forward(g_x, weight, g_bias, options)
            if g_weight is not None:
                bias = None if g_x is not None else g_bias
                other = _forward(x, g_weight, bias, options)
                g_out = other if g_out is None else g_out + other
            if g_x is None and g_weight is None and g_bias is not None:
                g_out = g_bias.view(-1, *[1] * (x.dim() - 2)).expand_as(d_out)
        found_x = found_weight = None
        if by_x and g_weight is not None:
            only = (True, False, False)
            found_x = _backward(d_out, x, g_weight, options, only)[0]
        if by_weight and g_x is not None:
            only = (False, True, False)
            found_weight = _backward(d_out, g_x, weight, options, only)[1]
        return g_out, found_x, found_weight, None, None


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]) -> Tensor:
    out: Tensor = _Convolution.apply(x, weight, bias, options)  # type: ignore[no-untyped-call]
    return out


def _backward(
    d_out: Tensor, x: Tensor, weight: Tensor, options: tuple[Any, ...], wanted: Any
) -> tuple[Tensor | None, ...]:
    found: tuple[Tensor | None, ...] = _ConvolutionBackward.apply(  # type: ignore[no-untyped-call]
        d_out, x, weight, options, wanted
    )
    return found
