"""Convolutions with a second derivative that runs on ordinary convolution kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .channels_last import is_marked, mark
from .eligibility import are_plain, have_values
from .torch_private import CONVOLUTION, CONVOLUTION_BACKWARD

__all__ = ["DIMENSIONS", "convolution"]

DIMENSIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
"""The functions of PyTorch that `convolution` replaces, with their numbers of dimensions."""


def convolution(
    dimensions: int,
    channels_last: bool,
    input: Any,  # noqa: A002
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """Compute `F.conv1d`, `F.conv2d` or `F.conv3d`.

    PyTorch writes the second derivative by the weight as a convolution with the images as its
    kernels, for which no backend is made. The same number is the ordinary gradient by the weight
    at another input, which is used here.

    Args:
        dimensions: of the images.
        channels_last: whether the result may lie channels last, if that is faster.
        input: as in PyTorch, like the arguments that follow.
        weight: see there.
        bias: see there.
        stride: see there.
        padding: see there.
        dilation: see there.
        groups: see there.

    Returns:
        The result, or None where PyTorch must compute it, or raise its error.
    """
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
    if channels_last and _may_lie_channels_last(input, weight):
        return mark(_forward(input, weight, bias, _ChannelsLast(options)))  # type: ignore[no-any-return]
    return _forward(input, weight, bias, options)


class _ChannelsLast(tuple[Any, ...]):
    """The options of a convolution whose tensors are all to lie channels last."""

    __slots__ = ()


def _may_lie_channels_last(x: Tensor, weight: Tensor) -> bool:
    """Whether channels last is faster, and the user has not chosen another layout."""
    return (
        x.dtype == torch.float32  # no backend has such kernels for another type
        and x.device.type == "cpu"
        and have_values([x, weight])
        and (is_marked(x) or x.is_contiguous())
        and weight.is_contiguous()
    )


class _Convolution(Function):
    """`aten::convolution`; `options` are its arguments after the bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = options
        out: Tensor = CONVOLUTION(x, weight, bias, *options)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        found = _backward(d_out, x, weight, ctx.options, wanted)
        return (*found, None)


class _ConvolutionBackward(Function):
    """`aten::convolution_backward`: the wanted gradients by x, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        d_out: Tensor,
        x: Tensor,
        weight: Tensor,
        options: tuple[Any, ...],
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:
        # The first layer needs no derivative by its input.
        used = (d_out, x, weight) if ctx.needs_input_grad[1] else (None, x, None)
        ctx.save_for_backward(*used)
        ctx.shape = d_out.shape
        ctx.options = options
        ctx.set_materialize_grads(False)
        bias = [weight.shape[0]] if wanted[2] else None
        found = CONVOLUTION_BACKWARD(d_out, x, weight, bias, *options, list(wanted))
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
                g_out = g_bias.view(-1, *[1] * (x.dim() - 2)).expand(ctx.shape)
        found_x = found_weight = None
        if by_x and g_weight is not None:
            only = (True, False, False)
            found_x = _backward(d_out, x, g_weight, options, only)[0]
        if by_weight and g_x is not None:
            only = (False, True, False)
            found_weight = _backward(d_out, g_x, weight, options, only)[1]
        return g_out, found_x, found_weight, None, None


def _laid(options: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the memory layout that the options ask for."""
    if not isinstance(options, _ChannelsLast):
        return tensors
    return tuple(t.contiguous(memory_format=torch.channels_last) for t in tensors)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]) -> Tensor:
    x, weight = _laid(options, x, weight)
    out: Tensor = _Convolution.apply(x, weight, bias, options)  # type: ignore[no-untyped-call]
    return out


def _backward(
    d_out: Tensor, x: Tensor, weight: Tensor, options: tuple[Any, ...], wanted: Any
) -> tuple[Tensor | None, ...]:
    d_out, x, weight = _laid(options, d_out, x, weight)
    found: tuple[Tensor | None, ...] = _ConvolutionBackward.apply(  # type: ignore[no-untyped-call]
        d_out, x, weight, options, wanted
    )
    return found
