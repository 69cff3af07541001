"""Layers with second derivatives that cost less than PyTorch's."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from ..errors import FlatMinimaError, ShapeError
from ..support.trees import tensors_in
from .attention import multi_head_attention, scaled_dot_product_attention
from .batch_norm import fixed_norm, relu
from .channels_last import followed, is_marked, marked
from .eligibility import are_plain, have_values, in_transform
from .gradients import nodes
from .linear_layers import layer_norm, linear

__all__ = ["CheapSecondDerivatives", "Differentiation"]


class Differentiation:
    """How a model is run that is differentiated twice, as what it was seen to do allows.

    The first whole pass is made as it is always right, and shows what the model calls. Later ones
    have `CheapSecondDerivatives` only where it has something to do, and keep activations channels
    last where nobody but PyTorch's own functions meets them.

    Args:
        model: without wrappers.
        criterion: the loss function.

    Attributes:
        replaces: whether functions of this library take the place of PyTorch's.
    """

    def __init__(self, model: nn.Module, criterion: object) -> None:
        judge = [criterion] if isinstance(criterion, nn.Module) else []
        modules = [m for part in (model, *judge) for m in part.modules()]
        self._settled = False
        self.replaces = True
        # Functions within a script cannot be followed.
        self._channels_last = not any(isinstance(m, torch.jit.ScriptModule) for m in modules)
        self._called = False

    def running(self) -> AbstractContextManager[object]:
        """What is entered while the model and its loss are computed."""
        if not self._settled and self.replaces:
            return _Watched(self)
        if self._called and self.replaces:
            return CheapSecondDerivatives(channels_last=self._channels_last)
        return contextlib.nullcontext()

    def see(self, func: Any) -> None:
        """A function is called in the first pass."""
        if func in _DIMENSIONS or func in _OWN or func is F.batch_norm:
            self._called = True
        elif getattr(func, "__name__", "") in _GRADIENTS or in_transform():
            self._channels_last = False

    def stop_replacing(self) -> None:
        """A part of the model is checkpointed.

        When it is run again it meets PyTorch's own functions, and must have met them before: what
        others save may be taken for what these do.
        """
        self.replaces = False

    def examine(self, result: Any) -> None:
        """See, in the first pass, which functions the graph of a loss or an output is made of."""
        if self._settled or not self._channels_last:
            return
        for node in nodes(*tensors_in(result)):
            function = getattr(node, "_forward_cls", None)
            own = function is None or function.__module__.startswith(f"{__package__}.")
            # The user's own functions, in Python or in C++, may look at memory.
            if not own or node.name().startswith("CppNode"):
                self._channels_last = False

    def settle(self) -> None:
        """The first whole pass is over."""
        self._settled = True

    def retreat(self, error: Exception) -> bool:
        """After an error, do less for speed from now on; whether there was something to leave."""
        if isinstance(error, FlatMinimaError) and not isinstance(error, ShapeError):
            return False
        before = self._settled and self._called and self.replaces and self._channels_last
        self._channels_last = False
        return before


class CheapSecondDerivatives(TorchFunctionMode):
    """While it is entered, some functions are computed such that products with H cost less.

    Values and derivatives are PyTorch's own, but for rounding.

    Convolutions: PyTorch writes the second derivative by the weight as a convolution with the
    images as its kernels, for which no backend is made. The same number is the ordinary gradient
    by the weight at another input, which is asked for here.

    Batch norm in evaluation mode: PyTorch differentiates it by the general formula, of some ten
    passes over the activations. With fixed statistics it is a multiplication and an addition.

    Linear layers, layer norm and attention have second derivatives written by hand: those
    of PyTorch are put together from general operations, one pass over the activations for each.

    ReLU: PyTorch writes zeros for the derivative of its mask, and adds them to what there is.

    Args:
        channels_last: let convolutions of images in float32 on the CPU give activations that lie
            channels last, by which they and their derivatives take a third less time.
    """

    def __init__(self, *, channels_last: bool = False) -> None:
        super().__init__()
        self._channels_last = channels_last and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self._channels_last:
            return followed(func, self._called, args, kwargs or {})
        return self._called(func, args, kwargs or {})

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        found = None
        if func in _DIMENSIONS:
            dimensions = _DIMENSIONS[func]
            may_lie = self._channels_last and dimensions == 2
            found = _convolution(dimensions, may_lie, *args, **kwargs)
        elif func is F.batch_norm:
            found = _fixed_batch_norm(*args, **kwargs)
        elif func in _OWN:
            found = _OWN[func](*args, **kwargs)
        return func(*args, **kwargs) if found is None else found


class _Watched(CheapSecondDerivatives):
    def __init__(self, watcher: Differentiation) -> None:
        super().__init__()
        self._watcher = watcher

    def __enter__(self) -> Any:
        watcher, own = self._watcher, torch.utils.checkpoint._checkpoint_hook
        self._hook = own

        class Noted(own):  # type: ignore[misc, valid-type]
            def __enter__(self) -> Any:
                watcher.stop_replacing()
                return super().__enter__()

        torch.utils.checkpoint._checkpoint_hook = Noted  # type: ignore[misc]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *args: Any) -> None:
        torch.utils.checkpoint._checkpoint_hook = self._hook  # type: ignore[misc]
        super().__exit__(*args)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self._watcher.see(func)
        if not self._watcher.replaces:
            return func(*args, **(kwargs or {}))
        return self._called(func, args, kwargs or {})


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
    statistics = not (running_mean.requires_grad or running_var.requires_grad)
    if statistics and input.device.type == "cpu" and have_values(given):
        return fixed_norm(input, weight, bias, running_mean, running_var, eps)
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

# What hands gradients to the model, which would lie channels last too.
_GRADIENTS = ("register_hook", "grad", "backward")
_DIMENSIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


def _convolution(
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
    if channels_last and _may_lie_channels_last(input, weight):
        return marked(_forward(input, weight, bias, _ChannelsLast(options)))  # type: ignore[no-any-return]
    return _forward(input, weight, bias, options)


class _ChannelsLast(tuple[Any, ...]):
    """The options of a convolution that is to be computed with everything channels last."""

    __slots__ = ()


def _may_lie_channels_last(x: Tensor, weight: Tensor) -> bool:
    """Whether the user leaves it open how they lie, and it is faster."""
    return (
        x.dtype == torch.float32  # no backend has kernels for another type
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
        # Of the first layer less is wanted.
        used = (d_out, x, weight) if ctx.needs_input_grad[1] else (None, x, None)
        ctx.save_for_backward(*used)
        ctx.shape = d_out.shape
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
    """The tensors as the options want them to lie in memory."""
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
