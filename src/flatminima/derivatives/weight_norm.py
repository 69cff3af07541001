"""Weight norm with a right second derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

__all__ = ["DifferentiableWeightNorm", "has_weight_norm"]


def has_weight_norm(module: nn.Module) -> bool:
    """Return whether a module is weight-normalised, in the old style or the new."""
    hooks = module._forward_pre_hooks.values()
    return type(module).__name__ == "_WeightNorm" or any(type(h) is WeightNorm for h in hooks)


class DifferentiableWeightNorm(TorchFunctionMode):
    """`torch._weight_norm` written out: PyTorch's second derivative of it is wrong.

    It takes the norms for constants, so that the Hessian is not even symmetric (seen in torch 2.6
    to 2.13; `gradgradcheck` fails).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))
