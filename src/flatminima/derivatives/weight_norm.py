"""Weight norm with a correct second derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .torch_private import WEIGHT_NORM

__all__ = ["DifferentiableWeightNorm"]


class DifferentiableWeightNorm(TorchFunctionMode):
    """Weight norm written out, because PyTorch's second derivative of it is wrong.

    PyTorch treats the norms as constants there, and the Hessian is not even symmetric (seen in
    torch 2.6 to 2.13; `gradgradcheck` fails).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is WEIGHT_NORM:
            return _weight_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))
