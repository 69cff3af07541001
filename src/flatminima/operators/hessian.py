"""The Hessian of an objective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..derivatives.tracing import GraphTrace
from ..objective.forward import Evaluated
from ..objective.objective import Objective
from .curvature import CurvatureOperator
from .products.differences import central_differences
from .products.gradient_graph import Block, GradientGraph, PerLeaf
from .products.graph_cache import KeepGraph

__all__ = ["HessianOperator"]

Method = Literal["auto", "double_backward", "finite_differences"]
METHODS = ("auto", "double_backward", "finite_differences")


class HessianOperator(CurvatureOperator[GradientGraph]):
    """H = ∇²L(θ), by products over the whole data set.

    Products are exact, reverse over reverse: counting operations, one costs three gradients, the
    gradient with its graph and twice as much to differentiate it. `matmat` reads each batch and
    builds that graph once for all columns; within a `session` it is kept from product to product,
    so that each costs two gradients. Attention runs under the MATH kernel meanwhile, and
    recurrent modules without their fused kernels, which have no second derivatives.

    Where an operation has none in any form, products are central differences of gradients, four
    gradients each, with an estimate of their error.

    Args:
        objective: what is differentiated twice, at the model's present parameters.
        method: "auto": exact where possible; "double_backward" insists on it;
            "finite_differences" asks for differences.
        keep_graph: what a session may keep: "auto" for graphs of as many batches as fit into a
            quarter of the memory that is free at its beginning, True for all, False for none.
            Models that write to their tensors, and batches in pieces, have theirs rebuilt.

    Attributes:
        objective: as given.
        method: the one in use: as given, or for "auto" either "double_backward" or
            "finite_differences".
        error: the largest error of a product with a unit vector that has been estimated so far;
            0 where products are exact.
        floor: 100 units of precision of the loss, from the first product on; one unit of the
            type that PyTorch's settings or autocast let the model compute in, if that is more.
        reason: why products are differences, a sentence; "" where they are exact or were asked
            to be differences.

    Raises:
        NonFiniteError: from a product, when the loss of a batch is not finite.
        NotTwiceDifferentiableError: from a product, when an operation has no second derivative
            and `method` is "double_backward".

    Warns:
        FiniteDifferenceWarning: from the first product, when "auto" falls back to differences;
            it names the operation and the module that called it.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> hessian = fm.HessianOperator(fm.Objective(model, torch.nn.MSELoss(), (x, y)))
        >>> hessian @ torch.tensor([1.0, 1.0])  # 2 XᵀX / N = diag(1, 4)
        tensor([1., 4.])
    """

    def __init__(
        self,
        objective: Objective,
        *,
        method: Method = "auto",
        keep_graph: KeepGraph = "auto",
    ) -> None:
        super().__init__(objective, method=method, methods=METHODS, keep_graph=keep_graph)

    def block_product(self, vector: Tensor, blocks: Sequence[Block]) -> Tensor:
        """Return the product with diagonal blocks of H, those of `blocks`, shape (n,) → (n,).

        Args:
            vector: shape (n,), unchecked.
            blocks: disjoint; each the positions of its parameters in `objective.layout`.
        """
        layout = self.objective.layout

        def part(graph: GradientGraph, keep: bool) -> PerLeaf:
            return graph.block_product(vector, blocks, keep=keep)

        def differences() -> Tensor:
            out = torch.zeros_like(vector)
            for block in blocks:
                inside = layout.mask(block)
                out += self._difference(vector * inside) * inside
            return out[None]

        return self._exact_or(part, differences, rows=1)[0]

    def _graph(
        self, seen: Evaluated, leaves: list[Tensor], trace: GraphTrace | None
    ) -> GradientGraph:
        return GradientGraph(seen.loss, leaves, self.objective.layout, trace)

    def _quotient(self, vector: Tensor, eps: float) -> tuple[Tensor, float]:
        objective = self.objective
        return central_differences(
            lambda shift: objective.value_and_gradient(shift)[1], vector, objective.point(), eps
        )
