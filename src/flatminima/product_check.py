"""What autograd gives for a product, for a compiled one to be judged by."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .product_graph import Loss, second_order

__all__ = ["Expected", "by_autograd", "signs"]


@dataclasses.dataclass(frozen=True)
class Expected:
    """What autograd gives for the first batch of a shape."""

    loss: float
    gradient: float
    products: Sequence[Tensor | None]

    @property
    def finite(self) -> bool:
        """Whether there is something to judge by."""
        return math.isfinite(self.loss) and math.isfinite(_norm(self.products))

    def difference(self, loss: Tensor, products: Sequence[Tensor | None]) -> str | None:
        """Why the compiled product is not this one, None if it is."""
        pairs = list(zip(self.products, products, strict=True))
        norm = _norm([a for a, _ in pairs])
        error = _norm([a if b is None else b if a is None else a - b for a, b in pairs])
        eps = max(torch.finfo(t.dtype).eps for t in (loss, *self._present(products)))
        tolerance = min(0.03, 1e4 * eps)
        if not math.isfinite(norm) or not math.isfinite(self.loss):
            return "the loss or the product of the first batch is not finite: nothing to check by"
        if abs(float(loss) - self.loss) > tolerance * max(abs(self.loss), eps):
            return (
                f"the traced loss is {float(loss):.6g} where the model's own is {self.loss:.6g}; "
                "it depends on something beside parameters, buffers and batch"
            )
        # A product that is nothing but rounding is measured by the gradient.
        if not error <= tolerance * max(norm, 1e-3 * self.gradient):
            return (
                f"the compiled product differs from autograd's by {error:.2g} of {norm:.2g} "
                f"where rounding explains {tolerance:.2g} of it"
            )
        return None

    @staticmethod
    def _present(products: Sequence[Tensor | None]) -> list[Tensor]:
        return [p for p in products if p is not None]


def _norm(tensors: Sequence[Tensor | None]) -> float:
    squares = [float(t.detach().double().square().sum()) for t in tensors if t is not None]
    return math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.nan


def by_autograd(
    loss: Loss,
    leaves: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    data: Any,
    tensors: Sequence[Tensor],
    vectors: Sequence[Tensor],
) -> Expected:
    """The product by autograd, of copies of everything that a forward may write to."""

    def twin(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    own = {n: t.detach().requires_grad_() for n, t in leaves.items()}
    memo: dict[int, Any] = {id(t): twin(t) for t in tensors}
    rest = {n: twin(t) for n, t in others.items()}
    value = loss(own, rest, copy.deepcopy(data, memo))
    gradients, products = second_order(value, list(own.values()), vectors)
    return Expected(float(value.detach()), _norm(gradients), products)


def signs(leaves: Mapping[str, Tensor]) -> list[Tensor]:
    """A vector of random signs, always the same, cut into pieces."""
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(2, t.shape, generator=generator) for t in leaves.values()]
    return [(2 * d - 1).to(t.device, t.dtype) for d, t in zip(draws, leaves.values(), strict=True)]
