"""Functions of PyTorch replaced by ones with hand-written second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .attention import scaled_dot_product_attention
from .batch_norm import batch_norm
from .channels_last import follow
from .convolution import DIMENSIONS, convolution

__all__ = ["REPLACED", "Substitution"]

_BY_NAME: dict[str, dict[Any, Callable[..., Any]]] = {
    "attention": {F.scaled_dot_product_attention: scaled_dot_product_attention},
    "batch_norm": {F.batch_norm: batch_norm},
}

REPLACED = frozenset([*DIMENSIONS, *(f for group in _BY_NAME.values() for f in group)])
"""The functions of PyTorch that something may take the place of."""


class Substitution(TorchFunctionMode):
    """While active, some functions are computed so that products with H cost less.

    Values and derivatives are PyTorch's up to rounding.

    Args:
        pieces: the names of the hand-written derivatives to use. With "channels_last", convolutions
            of images in float32 on the CPU return activations that lie channels last, which
            makes them and their derivatives a third faster.
    """

    def __init__(self, pieces: Collection[str]) -> None:
        super().__init__()
        self._functions = {f: own for n in pieces for f, own in _BY_NAME.get(n, {}).items()}
        self._convolutions = "convolution" in pieces
        available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        self._channels_last = self._convolutions and "channels_last" in pieces and available

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self._channels_last:
            return follow(func, self._called, args, kwargs or {})
        return self._called(func, args, kwargs or {})

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        found = None
        if func in DIMENSIONS:
            if self._convolutions:
                dimensions = DIMENSIONS[func]
                may_lie = self._channels_last and dimensions == 2
                found = convolution(dimensions, may_lie, *args, **kwargs)
        elif func in self._functions:
            found = self._functions[func](*args, **kwargs)
        return func(*args, **kwargs) if found is None else found
