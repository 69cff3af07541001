"""Attention whose second derivative costs less than that of PyTorch's MATH kernel."""

from __future__ import annotations

import math
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .eligibility import are_plain, gradients_of
from .linear_layers import linear

__all__ = ["multi_head_attention", "scaled_dot_product_attention"]


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """As `F.scaled_dot_product_attention`; None for what is left to PyTorch, with its messages."""
    given = [query, key, value]
    if not are_plain(given) or query.dtype not in (torch.float32, torch.float64):
        return None
    lead, rows, width = query.shape[:-2], query.shape[-2:-1], query.shape[-1:]
    if (
        dropout_p != 0
        or enable_gqa
        or (attn_mask is not None and is_causal)
        or not query.numel()
        or not value.numel()
        or min(t.dim() for t in given) < 3
        or key.shape[:-2] != lead
        or key.shape[-1:] != width
        or value.shape[:-1] != key.shape[:-1]
    ):
        return None
    mask = attn_mask
    if is_causal:
        size = (query.shape[-2], key.shape[-2])
        mask = torch.ones(size, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        mask = _added(mask, query)
        if mask is None or mask.dim() > query.dim():
            return None
        full = (*lead, *rows, key.shape[-2])
        if any(m not in (1, f) for m, f in zip(mask.shape[::-1], full[::-1], strict=False)):
            return None
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    flat = [t.reshape(-1, *t.shape[-2:]) for t in given]
    out: Tensor = _Attention.apply(*flat, mask, factor, lead)[0]  # type: ignore[no-untyped-call]
    return out.view(*lead, *out.shape[-2:])


def _added(mask: Any, query: Tensor) -> Tensor | None:
    """A mask as what is added to the scores."""
    if not isinstance(mask, Tensor) or mask.requires_grad or mask.device != query.device:
        return None
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -math.inf)
    return mask if mask.dtype == query.dtype else None


# Names below: d_ is an adjoint of the gradient's own computation, g_ an adjoint of that. Shapes:
# q (B, L, E), k (B, S, E), v (B, S, V); p, the softmax of α q kᵀ + mask, (B, L, S).


class _Attention(Function):
    """q, k, v → the output, and p, whose adjoint the second derivative has a share in."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
        lead: tuple[int, ...],
    ) -> tuple[Tensor, Tensor]:
        p = _softmax(q, k, mask, scale, lead)
        ctx.save_for_backward(q, k, v, mask, p)
        ctx.scale, ctx.lead = scale, lead
        ctx.set_materialize_grads(False)
        return p @ v, p

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_p: Tensor | None) -> tuple[Any, ...]:
        q, k, v, mask, p = ctx.saved_tensors
        if d_out is None and d_p is None:
            return (None,) * 6
        if torch.is_grad_enabled():
            # Without d_p, which comes of passes without a graph alone.
            found = _AttentionBackward.apply(  # type: ignore[no-untyped-call]
                d_out, q, k, v, p, mask, ctx.scale, ctx.lead
            )
        else:
            turned = v.transpose(1, 2)
            d_v = None
            if d_out is not None:
                d_v = p.transpose(1, 2) @ d_out
                d_p = d_out @ turned if d_p is None else torch.baddbmm(d_p, d_out, turned)
            assert d_p is not None
            d_scores = torch._softmax_backward_data(d_p, p, -1, p.dtype)
            found = (*_by_scores(d_scores, q, k, ctx.scale), d_v)
        return (*found, None, None, None)


def _softmax(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, lead: tuple[int, ...]
) -> Tensor:
    if mask is None:
        return ((q * scale) @ k.transpose(1, 2)).softmax(-1)
    scores = ((q * scale) @ k.transpose(1, 2)).view(*lead, q.shape[1], k.shape[1])
    # Zeros for rows that are masked as a whole, as PyTorch has it.
    p: Tensor = torch.ops.aten._safe_softmax.default(scores + mask, -1)
    return p.view(-1, *p.shape[-2:])


def _by_scores(d_scores: Tensor, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The gradients by q and k."""
    return _scaled(d_scores, k, scale), _scaled(d_scores.transpose(1, 2), q, scale)


def _scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)


class _AttentionBackward(Function):
    """The gradients by q, k and v."""

    @staticmethod
    def forward(
        ctx: Any,
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        p: Tensor,
        mask: Tensor | None,
        scale: float,
        lead: tuple[int, ...],
    ) -> tuple[Tensor | None, ...]:
        centred = d_out @ v.transpose(1, 2)
        centred.sub_((centred * p).sum(-1, keepdim=True))
        d_scores = centred * p
        ctx.save_for_backward(d_out, q, k, v, p, mask, centred, d_scores)
        ctx.scale, ctx.lead = scale, lead
        ctx.set_materialize_grads(False)
        return (*_by_scores(d_scores, q, k, scale), p.transpose(1, 2) @ d_out)

    @staticmethod
    def backward(
        ctx: Any, g_q: Tensor | None, g_k: Tensor | None, g_v: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        d_out, q, k, v, p, mask, centred, d_scores = ctx.saved_tensors
        scale = ctx.scale
        given = (g_q, g_k, g_v)
        if torch.is_grad_enabled():
            # A derivative more, of which PyTorch takes care.
            def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return _softmax(q, k, mask, scale, ctx.lead) @ v

            def first(d_out: Tensor, *inputs: Tensor) -> Any:
                return gradients_of(function, inputs, (d_out,), (True,) * 3)

            wanted = ctx.needs_input_grad[:4]
            return (*gradients_of(first, (d_out, q, k, v), given, wanted), *[None] * 4)
        g_scores = by_q = by_k = by_v = g_out = g_p = None
        if g_q is not None:
            g_scores = _scaled(g_q, k.transpose(1, 2), scale)
            by_k = _scaled(d_scores.transpose(1, 2), g_q, scale)
        if g_k is not None:
            turned = g_k.transpose(1, 2)
            if g_scores is None:
                g_scores = _scaled(q, turned, scale)
            else:
                g_scores.baddbmm_(q, turned, alpha=scale)
            by_q = _scaled(d_scores, g_k, scale)
        if g_scores is not None:
            moved = g_scores * p
            g_scores.sub_(moved.sum(-1, keepdim=True))
            torch.mul(g_scores, p, out=moved)
            g_out, by_v = moved @ v, moved.transpose(1, 2) @ d_out
            # Up to a constant in each row, which has no effect through the softmax.
            g_p = g_scores.mul_(centred)
        if g_v is not None:
            turned = g_v.transpose(1, 2)
            g_out = p @ g_v if g_out is None else g_out.baddbmm_(p, g_v)
            g_p = d_out @ turned if g_p is None else g_p.baddbmm_(d_out, turned)
        return g_out, by_q, by_k, by_v, g_p, None, None, None


def _projected(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    """As PyTorch's, whose gradient fills three tensors with zeros and adds them up."""
    if q is k and k is v:
        return tuple(t.contiguous() for t in _linear(q, weight, bias).chunk(3, -1))
    own: tuple[Tensor, ...] = _PYTORCHS(q, k, v, weight, bias)
    return own


def _linear(*args: Any) -> Tensor:
    found = linear(*args)
    return F.linear(*args) if found is None else found


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    found = scaled_dot_product_attention(*args, **kwargs)
    return F.scaled_dot_product_attention(*args, **kwargs) if found is None else found


_PYTORCHS: Any = getattr(F, "_in_projection_packed", None)
_FORWARD = F.multi_head_attention_forward

multi_head_attention: Any = types.FunctionType(
    _FORWARD.__code__,
    {
        **vars(F),
        "has_torch_function": lambda _: False,
        "_in_projection_packed": _projected,
        "linear": _linear,
        "scaled_dot_product_attention": _attention,
    },
    _FORWARD.__name__,
    _FORWARD.__defaults__,
    _FORWARD.__closure__,
)
"""`F.multi_head_attention_forward` as it is, but for the functions that it calls."""
