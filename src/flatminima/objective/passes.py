"""What a pass over the batches carries along: private tensors, and the losses so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import NonFiniteError
from .batches import Batch

__all__ = ["Copies", "Tally"]


class Copies:
    """Private tensors in place of a model's own, made again when a forward has written to them."""

    def __init__(self, make: Callable[[], dict[str, Tensor]]) -> None:
        self._make = make
        self.present: dict[str, Tensor] = {}
        self._versions: list[int] | None = None

    def fresh(self, *, renew: bool = False) -> dict[str, Tensor]:
        """The tensors, made now where there are none yet, or with `renew`."""
        versions = [t._version for t in self.present.values()]
        if renew or versions != self._versions:
            self.present = self._make()
            self._versions = [t._version for t in self.present.values()]
        return self.present


class Tally:
    """The losses of the batches, or of their pieces, at one point."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._weights: list[float] = []
        self._indices: list[int] = []

    def add(self, batch: Batch, loss: Tensor, weight: float) -> None:
        """One more: its loss, left on the device, and what it counts."""
        self._losses.append(loss)
        self._weights.append(weight)
        self._indices.append(batch.index)

    def mean(self, total_weight: float, *, check: bool) -> float:
        """Σ_b w_b ℓ_b over the total weight, in float64.

        Raises:
            NonFiniteError: a loss is not finite, where that is to be checked.
        """
        # One transfer for all batches: reading each loss as it comes would stall a GPU.
        values = torch.stack(self._losses).cpu().double().tolist()
        for index, value in zip(self._indices, values, strict=True):
            if check and not math.isfinite(value):
                raise NonFiniteError(
                    f"The loss of batch {index} is {value}; look for NaN in that batch, a "
                    "diverged model, or a logarithm of zero in the loss."
                )
        return _sum([w * v for w, v in zip(self._weights, values, strict=True)]) / total_weight


def _sum(values: Sequence[float]) -> float:
    """The exact sum; fsum itself refuses infinities of both signs."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
