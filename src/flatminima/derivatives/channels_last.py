"""Activations kept channels last in memory, hidden from everything that depends on their layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["follow", "is_marked", "mark"]

_MARK = "_flatminima_channels_last"


def is_marked(tensor: Tensor) -> bool:
    """Return whether this library, not the user, made a tensor channels last."""
    return getattr(tensor, _MARK, False)


def mark(out: Any, given: Iterable[Any] = ()) -> Any:
    """Return what a function computed from activations that lie channels last, marked as such.

    Args:
        out: a tensor, or tensors in tuples.
        given: the arguments of the function, which may be among its results.
    """
    if isinstance(out, (tuple, list)):
        return type(out)(mark(t, given) for t in out)
    if not isinstance(out, Tensor) or out.is_contiguous() or any(out is t for t in given):
        return out
    if not out.is_contiguous(memory_format=torch.channels_last):
        return out.contiguous()
    setattr(out, _MARK, True)
    return out


def follow(
    func: Any,
    compute: Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Call a function of PyTorch so that marked activations change nothing but the time.

    Elementwise functions and those of images get them channels last. For any other function the
    usual layout is restored first, so that views, strides and random numbers drawn for each entry
    are the usual ones. The tensor itself is changed, so that writes to its views reach it.

    Args:
        func: the function.
        compute: calls the function, or its replacement, given `func`, `args` and `kwargs`.
        args: its arguments.
        kwargs: its keyword arguments.
    """
    if func in _BLIND or (func in _DROPOUTS and _is_idle(*args, **kwargs)):
        return compute(func, args, kwargs)
    given = _tensors((*args, *kwargs.values()))
    own = [t for t in given if is_marked(t)]
    if not own:
        return compute(func, args, kwargs)
    # Together with a tensor in a third layout, results would not have their usual one.
    if func not in _FOLLOWING or "out" in kwargs or any(_is_strange(t) for t in given):
        for tensor in own:
            _lay_out(tensor)
        return compute(func, args, kwargs)
    return mark(compute(func, args, kwargs), given)


def _lay_out(tensor: Tensor) -> None:
    """Restore the usual layout; the graph, and what it has saved of the tensor, do not change."""
    tensor.data = tensor.detach().contiguous()
    setattr(tensor, _MARK, False)


def _is_strange(tensor: Tensor) -> bool:
    return not is_marked(tensor) and not tensor.is_contiguous()


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _tensors(value)
        elif isinstance(value, dict):
            found += _tensors(value.values())
    return found


def _is_idle(
    input: Any = None,  # noqa: A002, ARG001
    p: Any = 0.5,  # noqa: ARG001
    training: Any = True,
    inplace: Any = False,  # noqa: ARG001
) -> bool:
    """Whether dropout returns its argument unchanged."""
    return training is False


def _named(names: str, *places: Any) -> list[Any]:
    return [getattr(place, n) for n in names.split() for place in places if hasattr(place, n)]


# Functions that do not depend on the layout.
_BLIND = frozenset(
    [
        *_named(
            "size dim ndimension numel nelement __len__ is_floating_point is_complex "
            "requires_grad_",
            Tensor,
        ),
        *(
            attribute.__get__
            for attribute in _named(
                "shape ndim dtype device layout grad_fn requires_grad is_leaf is_cuda is_sparse",
                Tensor,
            )
        ),
    ]
)

# Functions that return the same numbers up to rounding, draw none, and return no views.
_FOLLOWING = frozenset(
    [
        *_named("conv2d batch_norm max_pool2d avg_pool2d adaptive_avg_pool2d", F),
        *_named(
            "relu relu_ relu6 leaky_relu leaky_relu_ elu elu_ selu celu silu gelu mish softplus "
            "hardtanh hardtanh_ hardswish hardsigmoid sigmoid sigmoid_ tanh tanh_ exp log abs neg "
            "square sqrt rsqrt pow clamp add add_ sub sub_ mul mul_ div div_ mean sum",
            F,
            torch,
            Tensor,
        ),
        *_named("__radd__ __rsub__ __rmul__ __rtruediv__ __iadd__ __imul__", Tensor),
        torch.cat,
    ]
)

_DROPOUTS = frozenset(_named("dropout dropout1d dropout2d dropout3d", F))
