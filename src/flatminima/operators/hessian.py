"""The Hessian of an objective."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..batches import Batch
from ..errors import DeviceError, InvalidArgumentError, NotCompiledError
from ..evaluation import Prepare
from ..forward import Evaluated, LossOf
from ..kept import CompiledGraph, HessianGraph, KeepGraph
from ..objective import Objective
from ..products import Block, GradientGraph, PerLeaf, central_differences
from ..settings import settings, tensor_identity
from ..tracing import GraphTrace
from .curvature import CurvatureOperator

if TYPE_CHECKING:
    from ..compiled import CompiledProducts

__all__ = ["HessianOperator"]

Method = Literal["auto", "double_backward", "finite_differences", "compile", "cuda_graph"]
METHODS = ("auto", "double_backward", "finite_differences", "compile", "cuda_graph")


class HessianOperator(CurvatureOperator):
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
            "finite_differences" asks for differences; "compile" has PyTorch's Inductor compile
            the product, once for each shape of batch (which takes a C++ compiler, or Triton on a
            GPU, and up to minutes), and check it; "cuda_graph" captures the products on kept
            graphs, which spares small models on a GPU the launching of kernels.
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
            and `method` is none of "auto" and "finite_differences".
        NotCompiledError: from a product with "compile": the product cannot be compiled.
        DeviceError: "cuda_graph" for a model that is not on a CUDA device.
        GraphError: from a product with "cuda_graph": it cannot be captured.

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
        if method == "cuda_graph" and objective.device.type != "cuda":
            raise DeviceError(
                "HessianOperator(method='cuda_graph') needs the model on a CUDA device; it is on "
                f"{objective.device}. Use method='auto'."
            )
        if method == "cuda_graph" and keep_graph is False:
            raise InvalidArgumentError(
                "HessianOperator(method='cuda_graph') captures products on kept graphs; leave "
                "keep_graph=False out."
            )
        self._compiled: CompiledProducts | None = None
        # What the settings that were compiled for know by its identity.
        self._known: dict[Hashable, list[Any]] = {}

    @property
    def compile_seconds(self) -> float:
        """Time that `method="compile"` has spent on tracing, compiling and checking so far."""
        return 0.0 if self._compiled is None else self._compiled.compile_seconds

    def block_product(self, vector: Tensor, blocks: Sequence[Block]) -> Tensor:
        """The product with diagonal blocks of H, those of `blocks`, shape (n,) → (n,).

        Args:
            vector: shape (n,), unchecked.
            blocks: disjoint; each the positions of its parameters in `objective.layout`.
        """
        layout = self.objective.layout

        def part(graph: HessianGraph, keep: bool) -> PerLeaf:
            return graph.block_product(vector, blocks, keep=keep)

        def differences() -> Tensor:
            out = torch.zeros_like(vector)
            for block in blocks:
                inside = layout.mask(block)
                out += self._difference(vector * inside) * inside
            return out[None]

        return self._exact_or(part, differences, rows=1)[0]

    def _preparation(self) -> Prepare | None:
        """What compiles the product of a batch; None where that is not asked for, or not yet."""
        objective = self.objective
        if self.method != "compile" or not self._examined:
            return None
        if not objective.keeps_graphs:
            raise NotCompiledError(
                "batches are evaluated in pieces, or the model writes to its tensors"
            )
        if self._compiled is None:
            # Only now, for a quick start of the library.
            from ..compiled import CompiledProducts

            self._compiled = CompiledProducts()
        compiled = self._compiled
        setting: Hashable = None

        def prepare(
            batch: Batch, loss: LossOf, leaves: dict[str, Tensor], others: dict[str, Tensor]
        ) -> Evaluated:
            nonlocal setting
            if setting is None:
                model, criterion = objective.model, objective.criterion
                found, known = settings(model, criterion, self.device, tensor_identity)
                setting = (objective.mode, found)
                self._known.setdefault(setting, known)
            product = compiled.prepare(
                loss,
                leaves,
                others,
                batch.data,
                setting=setting,
                keep=self._kept.keeps,
            )
            graph = CompiledGraph(product, objective.layout)
            return Evaluated(batch, product.loss, None, None, leaves, graph)

        return prepare

    def _graph(
        self, seen: Evaluated, leaves: list[Tensor], trace: GraphTrace | None
    ) -> HessianGraph:
        return GradientGraph(seen.loss, leaves, self.objective.layout, trace)

    def _quotient(self, vector: Tensor, eps: float) -> tuple[Tensor, float]:
        objective = self.objective
        return central_differences(
            lambda shift: objective.value_and_gradient(shift)[1], vector, objective.point(), eps
        )
