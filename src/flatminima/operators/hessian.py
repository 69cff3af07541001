"""The Hessian of an objective."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..batches import Batch
from ..checks import check_choice
from ..errors import (
    DeviceError,
    FiniteDifferenceWarning,
    InvalidArgumentError,
    NonFiniteError,
    NotCompiledError,
    NotTwiceDifferentiableError,
    warn,
)
from ..evaluation import Prepare
from ..forward import Evaluated, LossOf
from ..kept import CompiledGraph, Graph, KeepGraph, KeptGraphs
from ..objective import Objective, check_objective
from ..precision import precision_notes, working_eps
from ..products import Block, GradientGraph, PerLeaf, central_differences, where
from ..randomness import as_generator, rademacher
from ..settings import settings, tensor_identity
from ..tracing import GraphTrace
from ..vectors import Layout
from .linear import LinearOperator

if TYPE_CHECKING:
    from ..compiled import CompiledProducts

__all__ = ["HessianOperator"]

Part = Callable[[Graph, bool], PerLeaf]
"""What a batch adds, made from its graph, and whether the graph is to serve again."""

Method = Literal["auto", "double_backward", "finite_differences", "compile", "cuda_graph"]
METHODS = ("auto", "double_backward", "finite_differences", "compile", "cuda_graph")


class HessianOperator(LinearOperator):
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
        check_objective("HessianOperator", objective)
        super().__init__(objective.size, objective.dtype, objective.device)
        self.objective = objective
        check_choice("HessianOperator", "method", method, METHODS)
        named = isinstance(keep_graph, str) and keep_graph == "auto"
        if not (isinstance(keep_graph, bool) or named):
            raise InvalidArgumentError(
                "The 'keep_graph' argument of HessianOperator must be True, False or 'auto'; got "
                f"{keep_graph!r}."
            )
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
        self._kept = KeptGraphs(objective, keep_graph, method=method)
        self._compiled: CompiledProducts | None = None
        # What the settings that were compiled for know by its identity.
        self._known: dict[Hashable, list[Any]] = {}
        self._insists = method not in ("auto", "finite_differences")
        self.method = "double_backward" if method == "auto" else method
        self.reason = ""
        # Whether a pass has shown that every operation has a second derivative.
        self._examined = False

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """While it lasts, the graphs of the batches' gradients are kept, as `keep_graph` says.

        The algorithms of this library enter it by themselves. The model should stay as it is
        meanwhile: when its tensors, modules or their attributes, or those of the loss function, are
        found changed, the graphs are built anew. Not noticed are variables that a function closes
        over, and writes through `.data` to frozen parameters and, on CUDA, to any.

        Examples:
            >>> import torch, flatminima as fm
            >>> model = torch.nn.Linear(2, 1, bias=False)
            >>> data = torch.eye(2), torch.zeros(2, 1)
            >>> hessian = fm.HessianOperator(fm.Objective(model, torch.nn.MSELoss(), data))
            >>> with hessian.session():
            ...     products = [hessian @ torch.ones(2) for _ in range(3)]
            >>> products[-1]
            tensor([1., 1.])
        """
        with self._kept.session():
            yield

    @property
    def compile_seconds(self) -> float:
        """Time that `method="compile"` has spent on tracing, compiling and checking so far."""
        return 0.0 if self._compiled is None else self._compiled.compile_seconds

    @property
    def readings(self) -> int:
        """How often the data have been read anew, where they are not kept on the device."""
        return self.objective.batches.readings

    @property
    def notes(self) -> tuple[str, ...]:
        """Autocast and short types in place of float32, where they are on."""
        return precision_notes(self.objective.model, self.device)

    @property
    def layout(self) -> Layout:
        """Which parameters the entries of a vector belong to."""
        return self.objective.layout

    @property
    def kept_bytes(self) -> int:
        """Memory that kept graphs take at present: of the tensors saved for them."""
        return self._kept.bytes

    def _products(self, vectors: Tensor) -> Tensor:
        def part(graph: Graph, keep: bool) -> PerLeaf:
            return graph.products(list(vectors), keep=keep)

        def differences() -> Tensor:
            return torch.stack([self._difference(v) for v in vectors])

        return self._exact_or(part, differences, rows=len(vectors))

    def block_product(self, vector: Tensor, blocks: Sequence[Block]) -> Tensor:
        """The product with diagonal blocks of H, those of `blocks`, shape (n,) → (n,).

        Args:
            vector: shape (n,), unchecked.
            blocks: disjoint; each the positions of its parameters in `objective.layout`.
        """
        layout = self.objective.layout

        def part(graph: Graph, keep: bool) -> PerLeaf:
            return graph.block_product(vector, blocks, keep=keep)

        def differences() -> Tensor:
            out = torch.zeros_like(vector)
            for block in blocks:
                inside = layout.mask(block)
                out += self._difference(vector * inside) * inside
            return out[None]

        return self._exact_or(part, differences, rows=1)[0]

    def _exact_or(self, part: Part, differences: Callable[[], Tensor], *, rows: int) -> Tensor:
        """The exact products where there are any, by `part`, shape (rows, n)."""
        if self.method != "finite_differences":
            try:
                return self._exact_somehow(part, rows)
            except NotTwiceDifferentiableError as error:
                if self._insists:
                    raise
                self.method, self.reason = "finite_differences", str(error).split(". ")[0] + "."
                product = differences()
                self._announce(product)
                return product
        return differences()

    def _exact_somehow(self, part: Part, rows: int) -> Tensor:
        """The exact products, in a plainer way where the model does not bear a faster one."""
        while True:
            try:
                return self._examined_or_exact(part, rows)
            except Exception as error:
                if not self.objective.differentiation.retreat(error):
                    raise

    def _examined_or_exact(self, part: Part, rows: int) -> Tensor:
        if self._examined:
            return self._exact(part, rows)
        with GraphTrace(self.objective.model) as trace:
            product = self._summed(part, rows, trace)
        self._check_functions(trace)
        self._examined = True
        return product

    def _exact(self, part: Part, rows: int) -> Tensor:
        """The product, by graphs that are kept where there are any."""
        served = bool(self._kept.seen)
        try:
            with self._kept.recording():
                return self._summed(part, rows)
        except RuntimeError as error:
            said = f"{error} {error.__cause__}"
            # Transforms of torch.func within the model allow no hooks on what graphs save.
            if "saved tensor hooks" in said:
                self._kept.give_up()
            elif served and "modified by an inplace" in said:
                # Data, or a tensor that is no parameter, has been written to since.
                self._kept.clear()
            else:
                raise
        return self._summed(part, rows)

    def _summed(self, part: Part, rows: int, trace: GraphTrace | None = None) -> Tensor:
        kept, layout = self._kept, self.objective.layout

        def add(seen: Evaluated, leaves: list[Tensor]) -> PerLeaf:
            graph = kept.graph(seen)
            if graph is not None:
                return part(graph, True)
            try:
                graph = seen.prepared or GradientGraph(seen.loss, leaves, layout, trace)
                return part(graph, kept.offer(seen, graph))
            finally:
                if trace is not None:
                    trace.forget()

        loss, product = self.objective.sum_over_batches(
            add, derivatives=2, rows=rows, kept=kept.seen, prepare=self._preparation()
        )
        if not math.isnan(loss):
            # What cancels exactly on paper, such as a bias before batch norm, leaves this much.
            eps = working_eps(self.objective.model, self.device)
            self.floor = max(100 * torch.finfo(self.dtype).eps, eps) * abs(loss)
        return product

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

    def _difference(self, vector: Tensor) -> Tensor:
        objective = self.objective
        eps = working_eps(objective.model, self.device)
        product, error = central_differences(
            lambda shift: objective.value_and_gradient(shift)[1], vector, objective.point(), eps
        )
        length = float(torch.linalg.vector_norm(vector))
        if not math.isfinite(error):
            raise NonFiniteError(
                "A gradient holds NaN or infinity at one of the points θ ± h v that a Hessian "
                "product by finite differences needs."
            )
        self.error = max(self.error, error / length if length > 0 else 0.0)
        return product

    def _check_functions(self, trace: GraphTrace) -> None:
        """Try the user's own autograd functions, whose backward may hide what it depends on."""
        if not trace.functions:
            return
        layout = self.objective.layout
        # Not the caller's vector, in which the functions may have no part.
        probe = rademacher(
            1, self.shape[0], as_generator(0, self.device), dtype=self.dtype, device=self.device
        )[0]
        exact = self._summed(lambda graph, keep: graph.products([probe], keep=keep), 1)[0]
        other = self._difference(probe)
        allowed = 10 * self.error * float(torch.linalg.vector_norm(probe))
        self.error = 0.0
        # Tensor by tensor: what is hidden may be small beside the rest of the model's curvature.
        pieces = [torch.split(v, list(layout.sizes)) for v in (exact - other, other)]
        norms = torch.tensor(
            [[float(torch.linalg.vector_norm(p)) for p in piece] for piece in pieces]
        )
        gaps, sizes = norms.double()
        # The estimate knows of kinks, which differences see and derivatives do not.
        if bool((gaps > (0.01 * sizes).clamp(min=allowed)).any()):
            name, module = next(iter(trace.functions.items()))
            raise NotTwiceDifferentiableError(
                f"The second derivative that PyTorch finds by {name}{where(module)} contradicts "
                "differences of gradients: its backward hides what it depends on. Write it with "
                "differentiable operations, or mark it with once_differentiable.",
                name,
                module,
            )

    def _announce(self, product: Tensor) -> None:
        size = float(torch.linalg.vector_norm(product[0])) or 1.0
        warn(
            f"{self.reason[:-1]}, so Hessian products are central differences of gradients, with "
            f"an estimated error of {self.error:.1e} for unit vectors (the first product has "
            f"norm {size:.1e}). method='double_backward' refuses them.",
            FiniteDifferenceWarning,
        )
