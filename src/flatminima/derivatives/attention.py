"""Attention with a second derivative that costs less than that of PyTorch's MATH kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from .eligibility import are_plain, gradients_of
from .torch_private import (
    SAFE_SOFTMAX,
    SOFTMAX_BACKWARD,
    has_equal_sizes,
    is_pytorchs,
)

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
    """Compute `F.scaled_dot_product_attention`; None where PyTorch must compute it."""
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
    """Return a mask as numbers to add to the scores."""
    if not isinstance(mask, Tensor) or mask.requires_grad or mask.device != query.device:
        return None
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -math.inf)
    return mask if mask.dtype == query.dtype else None


# Names below: d_ is an adjoint of the gradient's own computation, g_ an adjoint of that. Shapes:
# q (B, L, E), k (B, S, E), v (B, S, V); p, the softmax of α q kᵀ + mask, (B, L, S).


class _Attention(Function):
    """(q, k, v) → the output and p; the second derivative has a term by p."""

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
            # d_p arises only in passes that record no graph.
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
            d_scores = SOFTMAX_BACKWARD(d_p, p, -1, p.dtype)
            found = (*_by_scores(d_scores, q, k, ctx.scale), d_v)
        return (*found, None, None, None)


def _softmax(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, lead: tuple[int, ...]
) -> Tensor:
    if mask is None:
        return ((q * scale) @ k.transpose(1, 2)).softmax(-1)
    scores = ((q * scale) @ k.transpose(1, 2)).view(*lead, q.shape[1], k.shape[1])
    # Zeros for rows that are masked as a whole, as in PyTorch.
    p: Tensor = SAFE_SOFTMAX(scores + mask, -1)
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
            # The third derivative is left to PyTorch.
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
            # Up to a constant in each row, which the softmax ignores.
            g_p = g_scores.mul_(centred)
        if g_v is not None:
            turned = g_v.transpose(1, 2)
            g_out = p @ g_v if g_out is None else g_out.baddbmm_(p, g_v)
            g_p = d_out @ turned if g_p is None else g_p.baddbmm_(d_out, turned)
        return g_out, by_q, by_k, by_v, g_p, None, None, None


def multi_head_attention(
    module: nn.MultiheadAttention, forward: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a forward for `nn.MultiheadAttention` that calls simpler functions of PyTorch.

    PyTorch's own forward calls them inside `F.multi_head_attention_forward`, where a
    `TorchFunctionMode` cannot replace them.

    Args:
        module: the module, examined at each call.
        forward: its own forward, called for everything that is not treated here: attention
            weights, sizes that differ between queries, keys and values, `add_bias_kv`,
            `add_zero_attn`, dropout in training mode, autocast, input without a batch dimension,
            input that does not fit, and functions of PyTorch that another library has wrapped.

    Returns:
        A function with the arguments of `forward`.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        found = _attended(module, args, kwargs) if _is_treated(module) else None
        return forward(*args, **kwargs) if found is None else (found, None)

    return run


def _is_treated(module: nn.MultiheadAttention) -> bool:
    return (
        type(module) is nn.MultiheadAttention
        and is_pytorchs(nn.MultiheadAttention.forward, nn.modules.activation)
        and is_pytorchs(F.multi_head_attention_forward, F)
        and has_equal_sizes(module)
        and module.bias_k is None
        and not module.add_zero_attn
        and not (module.dropout and module.training)
    )


_NAMES = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")
_OTHERS = ("average_attn_weights", "is_causal")


def _attended(
    module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """The output of a call; None where the module's own forward must compute it."""
    given = dict(zip((*_NAMES, *_OTHERS), args, strict=False)) | dict(kwargs)
    if len(args) > len(_NAMES + _OTHERS) or not given.keys() <= {*_NAMES, *_OTHERS}:
        return None
    if given.get("need_weights", True):
        return None
    inputs: list[Any] = [given.get(n) for n in _NAMES[:3]]
    query, key, value = inputs
    if not are_plain([*inputs, module.in_proj_weight]) or any(t.is_nested for t in inputs):
        return None
    time, size = (1 if module.batch_first else 0), module.embed_dim
    if any(t.dim() != 3 or t.shape[2] != size or not t.numel() for t in inputs):
        return None
    count, rows, columns = query.shape[1 - time], query.shape[time], key.shape[time]
    if key.shape != value.shape or key.shape[1 - time] != count:
        return None
    masks = [given.get("attn_mask"), given.get("key_padding_mask")]
    causal = bool(given.get("is_causal", False))
    if causal and masks[0] is None:
        return None
    mask: Any = None
    # PyTorch takes is_causal for a description of attn_mask, where there is no other mask.
    causal = causal and masks[1] is None
    if not causal:
        mask = _merged(masks, (count, module.num_heads, rows, columns), query.dtype)
        if mask is False:
            return None
    q, k, v = _projected(module, inputs, time)
    out = F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal)
    # In the memory layout of PyTorch's own, which views of the output may depend on.
    flat = out.permute(2, 0, 1, 3).reshape(rows * count, size)
    out = F.linear(flat, module.out_proj.weight, module.out_proj.bias).view(rows, count, size)
    return out.transpose(0, 1) if time else out


def _projected(
    module: nn.MultiheadAttention, inputs: Sequence[Tensor], time: int
) -> Sequence[Tensor]:
    """Queries, keys and values, each of shape (batch, heads, time, size of a head)."""
    weight, bias, heads = module.in_proj_weight, module.in_proj_bias, module.num_heads
    if inputs[0] is inputs[1] is inputs[2]:
        packed = F.linear(inputs[0], weight, bias)
        packed = packed.view(*packed.shape[:2], 3, heads, -1)
        return packed.permute(2, 1 - time, 3, time, 4).contiguous().unbind()
    biases = [None] * 3 if bias is None else bias.chunk(3)
    return [
        F.linear(t, w, b).view(*t.shape[:2], heads, -1).permute(1 - time, 2, time, 3)
        for t, w, b in zip(inputs, weight.chunk(3), biases, strict=True)
    ]


def _merged(
    masks: Sequence[Any], shape: tuple[int, int, int, int], dtype: torch.dtype
) -> Tensor | Literal[False] | None:
    """The mask for the heads and the mask for padding as one; False where they do not fit."""
    count, heads, rows, columns = shape
    allowed: list[dict[tuple[int, ...], tuple[int, ...]]] = [
        {(rows, columns): (1, 1, rows, columns), (count * heads, rows, columns): shape},
        {(count, columns): (count, 1, 1, columns)},
    ]
    found: list[Tensor] = []
    kinds = set()
    for mask, shapes in zip(masks, allowed, strict=True):
        if mask is None:
            continue
        if not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, dtype):
            return False
        wanted = shapes.get(tuple(mask.shape))
        if wanted is None:
            return False
        kinds.add(mask.dtype)
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
        found.append(mask.reshape(wanted))
    if len(kinds) > 1:
        return False  # PyTorch warns of it
    return sum(found[1:], found[0]) if found else None
