"""Linear layers and layer norm whose second derivatives cost less than PyTorch's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .eligibility import are_plain, gradients_of

__all__ = ["layer_norm", "linear"]

_TYPES = (torch.float32, torch.float64)

# Names below: d_ is an adjoint of the gradient's own computation, g_ an adjoint of that.


def linear(input: Any, weight: Any, bias: Any = None) -> Tensor | None:  # noqa: A002
    """As `F.linear`; None for what is left to PyTorch, with its messages."""
    given = [t for t in (input, weight, bias) if t is not None]
    if not are_plain(given) or input.dtype not in _TYPES:
        return None
    if not input.numel() or not weight.numel():
        return None
    if weight.dim() != 2 or input.dim() < 2 or input.shape[-1] != weight.shape[1]:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    # Flat outside of the function, so that a copy this may take is made once.
    flat = input.reshape(-1, input.shape[-1])
    out: Tensor = _Linear.apply(flat, weight, bias)  # type: ignore[no-untyped-call]
    return out.view(*input.shape[:-1], weight.shape[0])


class _Linear(Function):
    """(N, in), (out, in), (out,) → (N, out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        found: tuple[Tensor | None, ...] = _LinearBackward.apply(  # type: ignore[no-untyped-call]
            d_out, *ctx.saved_tensors, ctx.needs_input_grad
        )
        return found


class _LinearBackward(Function):
    """The gradients by x, weight and bias that are wanted."""

    @staticmethod
    def forward(
        ctx: Any, d_out: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        # Of the first layer less is wanted.
        used = (d_out, x, weight) if ctx.needs_input_grad[1] else (None, x, None)
        ctx.save_for_backward(*used)
        ctx.set_materialize_grads(False)
        return (
            d_out @ weight if wanted[0] else None,
            d_out.t() @ x if wanted[1] else None,
            d_out.sum(0) if wanted[2] else None,
        )

    @staticmethod
    def backward(
        ctx: Any, g_x: Tensor | None, g_weight: Tensor | None, g_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        d_out, x, weight = ctx.saved_tensors
        by_out, by_x, by_weight = ctx.needs_input_grad[:3]
        g_out = None
        if by_out:
            if g_weight is not None:
                g_out = F.linear(x, g_weight, g_bias)
                if g_x is not None:
                    # Into the same tensor: two products and no addition of their own.
                    g_out.addmm_(g_x, weight.t())
            elif g_x is not None:
                g_out = F.linear(g_x, weight, g_bias)
            elif g_bias is not None:
                g_out = g_bias.expand(len(x), -1)
        return (
            g_out,
            d_out @ g_weight if by_x and g_weight is not None else None,
            d_out.t() @ g_x if by_weight and g_x is not None else None,
            None,
        )


def layer_norm(
    input: Any,  # noqa: A002
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """As `F.layer_norm`; None for what is left to PyTorch, with its messages."""
    given = [t for t in (input, weight, bias) if t is not None]
    if not are_plain(given) or input.dtype not in _TYPES or not input.numel():
        return None
    shape = tuple(normalized_shape)
    if not shape or any(t.shape[t.dim() - len(shape) :] != shape for t in given):
        return None
    if any(t.dim() != len(shape) for t in given[1:]):
        return None
    size = shape[0] if len(shape) == 1 else input[(0,) * (input.dim() - len(shape))].numel()
    flat = [
        input.reshape(-1, size),
        *(None if t is None else t.reshape(size) for t in (weight, bias)),
    ]
    out: Tensor = _LayerNorm.apply(*flat, eps)  # type: ignore[no-untyped-call]
    return out.view(input.shape)


class _LayerNorm(Function):
    """(N, D), (D,), (D,) → (N, D)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        out, mean, rstd = torch.native_layer_norm(x, x.shape[1:], weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        found = _LayerNormBackward.apply(  # type: ignore[no-untyped-call]
            d_out, x, weight, bias, mean, rstd, ctx.eps, ctx.needs_input_grad[:3]
        )
        return (*found, None)


class _LayerNormBackward(Function):
    """The gradients by x, weight and bias that are wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        d_out: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        eps: float,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(d_out, x, weight, bias, mean, rstd)
        ctx.eps, ctx.wanted = eps, wanted
        ctx.set_materialize_grads(False)
        found = torch.ops.aten.native_layer_norm_backward.default(
            d_out.contiguous(), x, x.shape[1:], mean, rstd, weight, bias, list(wanted)
        )
        return tuple(g if w else None for g, w in zip(found, wanted, strict=True))

    @staticmethod
    def backward(
        ctx: Any, g_x: Tensor | None, g_weight: Tensor | None, g_bias: Tensor | None
    ) -> tuple[Any, ...]:
        d_out, x, weight, bias, mean, rstd = ctx.saved_tensors
        given = (g_x, g_weight, g_bias)
        if torch.is_grad_enabled():
            # A derivative more, of which PyTorch takes care.
            def first(d_out: Tensor, x: Tensor, weight: Tensor | None) -> Any:
                def function(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                    return F.layer_norm(x, x.shape[1:], weight, bias, ctx.eps)

                return gradients_of(function, (x, weight, bias), (d_out,), ctx.wanted)

            inputs = (d_out, x, weight)
            found = gradients_of(first, inputs, given, ctx.needs_input_grad[:3])
        else:
            found = _layer_norm_second(d_out, x, weight, mean, rstd, given)
        wanted = ctx.needs_input_grad[:3]
        return (*(g if w else None for g, w in zip(found, wanted, strict=True)), *[None] * 5)


def _layer_norm_second(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    given: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> list[Tensor | None]:
    """The adjoints of d_out, x and the weight.

    With y = r (x − m) the normalised rows and P(u) = r (u − mean u − y mean(u y)), the gradient
    by x is P(d w), that by the weight Σ d y and that by the bias Σ d. P is its own adjoint, the
    derivative of y is P, and that of r is −r² y / D.
    """
    g_x, g_weight, g_bias = given
    size = x.shape[1:]

    def projected(u: Tensor) -> Tensor:
        only = [True, False, False]
        found: Tensor = torch.ops.aten.native_layer_norm_backward.default(
            u.contiguous(), x, size, mean, rstd, None, None, only
        )[0]
        return found

    # In place wherever a tensor is of no further use: these passes wait for memory.
    y = (x - mean).mul_(rstd)
    if g_x is None:
        g_out = None
        if g_weight is not None:
            g_out = y.mul_(g_weight) if g_bias is None else y.mul_(g_weight).add_(g_bias)
        elif g_bias is not None:
            g_out = g_bias.expand_as(d_out)
        return [g_out, None if g_weight is None else projected(d_out * g_weight), None]

    def added_up(rows: Tensor) -> Tensor:
        return (rows.sum(1) if weight is None else rows @ weight).unsqueeze(1)

    g_out = projected(g_x)
    shared = d_out * g_out
    g_weight_of = None if weight is None else shared.sum(0)
    share = added_up(shared)
    along = added_up(torch.mul(d_out, y, out=shared))
    across = torch.mul(g_x, y, out=shared).sum(1, keepdim=True)
    # −r / D times (along · g_x + across · d w), and what comes by the weight's gradient.
    factor = rstd / -x.shape[1]
    inner = shared.copy_(across * factor)
    if weight is not None:
        g_out.mul_(weight)
        inner.mul_(weight)
    if g_weight is not None:
        g_out.addcmul_(y, g_weight)
        inner.add_(g_weight)
    if g_bias is not None:
        g_out.add_(g_bias)
    inner.mul_(d_out).addcmul_(g_x, along * factor)
    return [g_out, projected(inner).addcmul_(y, share * factor), g_weight_of]
