"""What the matrices of second derivatives of an objective have in common."""

from __future__ import annotations

import contextlib
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from ..derivatives.missing import where
from ..derivatives.torch_private import refuses_saved_tensor_hooks, says_written_to
from ..derivatives.tracing import GraphTrace
from ..errors import (
    FiniteDifferenceWarning,
    InvalidArgumentError,
    NonFiniteError,
    NotTwiceDifferentiableError,
    warn,
)
from ..objective.forward import Evaluated
from ..objective.objective import Objective, WeightedSum, check_objective
from ..support.checks import check_choice
from ..support.precision import precision_notes, working_eps
from ..support.randomness import as_generator, draw_signs
from ..support.vectors import Layout
from .linear import LinearOperator, Reader
from .products.gradient_graph import PerLeaf
from .products.graph_cache import BatchGraph, GraphCache, KeepGraph

__all__ = ["CurvatureOperator", "Part"]

G = TypeVar("G", bound=BatchGraph)

Part = Callable[[G, bool], PerLeaf]
"""What a batch adds, made from its graph, and whether the graph is to serve again."""


class CurvatureOperator(LinearOperator, Generic[G]):
    """A matrix made of an objective's derivatives, by products over the whole data set.

    A subclass makes the graph of a batch that products are taken by, and knows what to do where
    an operation has no second derivative.

    Args:
        objective: whose parameters, at their present values, the matrix belongs to.
        method: of the products.
        methods: to choose from.
        keep_graph: what a session may keep.
    """

    def __init__(
        self, objective: Objective, *, method: str, methods: tuple[str, ...], keep_graph: KeepGraph
    ) -> None:
        call = type(self).__name__
        check_objective(call, objective)
        super().__init__(objective.size, objective.dtype, objective.device)
        self.objective = objective
        check_choice(call, "method", method, methods)
        named = isinstance(keep_graph, str) and keep_graph == "auto"
        if not (isinstance(keep_graph, bool) or named):
            raise InvalidArgumentError(
                f"The 'keep_graph' argument of {call} must be True, False or 'auto'; got "
                f"{keep_graph!r}."
            )
        self._cache: GraphCache[G] = GraphCache(objective, keep_graph)
        self._insists = method not in ("auto", "finite_differences")
        self.method = "double_backward" if method == "auto" else method
        self.reason = ""
        # Whether a pass has shown that every operation has a second derivative.
        self._examined = False
        self._announced = False
        # Whether the last pass began with graphs of batches that were kept before.
        self._served = False

    _outputs_only = False
    """Whether graphs are made of a batch's outputs, and not of its loss."""
    _differences = "Hessian products are central differences of gradients"

    @abstractmethod
    def _graph(self, seen: Evaluated, leaves: list[Tensor], trace: GraphTrace | None) -> G:
        """Return what products are taken by, for one batch."""

    @abstractmethod
    def _quotient(self, vector: Tensor, eps: float) -> tuple[Tensor, float]:
        """Return the product by differences, and an estimate of its error."""

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """While it lasts, the graphs of the batches are kept, as `keep_graph` says.

        The algorithms of this library enter it by themselves. The model should stay as it is
        meanwhile: when its tensors, modules or their attributes, or those of the loss function, are
        found changed, the graphs are rebuilt. Not noticed are variables that a function closes
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
        with self._cache.session():
            yield

    @property
    def readings(self) -> int:
        """How often the data have been read again, if they are not kept on the device."""
        return self.objective.batches.readings

    @property
    def _readers(self) -> tuple[Reader, ...]:
        return (self.objective.batches,)

    @property
    def notes(self) -> tuple[str, ...]:
        """Autocast and short types in place of float32, where they are on."""
        return precision_notes(self.objective.model, self.device)

    @property
    def layout(self) -> Layout:
        """Which parameters the entries of a vector belong to."""
        return self.objective.layout

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the entries of a vector belong to, by name."""
        return self.objective.parameters

    @property
    def kept_bytes(self) -> int:
        """Memory that kept graphs take at present: of the tensors saved for them."""
        return self._cache.bytes

    def _products(self, vectors: Tensor) -> Tensor:
        def part(graph: G, keep: bool) -> PerLeaf:
            return graph.products(list(vectors), keep=keep)

        def differences() -> Tensor:
            return torch.stack([self._difference(v) for v in vectors])

        products = self._exact_or(part, differences, rows=len(vectors))
        self._inspect(vectors, products)
        return products

    def _inspect(self, vectors: Tensor, products: Tensor) -> None:
        """Look at products before they are returned, for notes and warnings."""

    def _exact_or(self, part: Part[G], differences: Callable[[], Tensor], *, rows: int) -> Tensor:
        """Return products, exact if there are any, in the fastest way that the model bears.

        Args:
            part: makes the exact products for one batch.
            differences: makes all of them by differences.
            rows: how many there are.

        Returns:
            Shape (rows, n).
        """
        while self.method != "finite_differences":
            # The first product also shows what the graphs are made of.
            trace = None if self._examined else GraphTrace(self.objective.model)
            try:
                with trace or contextlib.nullcontext():
                    product = self._summed(part, rows, trace)
                if trace is not None:
                    self._check_functions(trace)
                    self._examined = True
                return product
            except Exception as error:
                if not self._adapts_to(error):
                    raise
        product = differences()
        if self.reason and not self._announced:
            self._announce(product)
        return product

    def _adapts_to(self, error: Exception) -> bool:
        """Take a plainer way after an error; whether there was one that may help."""
        if isinstance(error, NotTwiceDifferentiableError):
            if not self._insists:
                self.method, self.reason = "finite_differences", str(error).split(". ")[0] + "."
            return not self._insists
        if refuses_saved_tensor_hooks(error) and self._cache.keeps:
            # Transforms of torch.func within the model allow no hooks on what graphs save.
            self._cache.give_up()
            return True
        if says_written_to(error) and self._served:
            # Data, or a tensor that is no parameter, has been written to since.
            self._cache.clear()
            return True
        return self.objective.differentiation.retreat(error)

    def _summed(self, part: Part[G], rows: int, trace: GraphTrace | None = None) -> Tensor:
        """Return the weighted mean of what batches give; graphs are kept from the second on."""
        cache = self._cache
        total = WeightedSum(self.objective, rows)
        with cache.recording() if self._examined else contextlib.nullcontext():
            self._served = bool(cache.seen)
            batches = self.objective.evaluate_batches(
                derivatives=2, kept=cache.seen, outputs_only=self._outputs_only
            )
            with batches:
                for seen in batches:
                    with batches.visiting(seen):
                        total.add(seen, self._batch_product(seen, part, trace))
        loss = batches.mean_losses(check=True)[0]
        if not math.isnan(loss):
            # What cancels exactly on paper, such as a bias before batch norm, leaves this much.
            eps = working_eps(self.objective.model, self.device)
            self.floor = max(100 * torch.finfo(self.dtype).eps, eps) * abs(loss)
        return total.mean()

    def _batch_product(self, seen: Evaluated, part: Part[G], trace: GraphTrace | None) -> PerLeaf:
        """Return what one batch gives, by its graph, kept or built now."""
        graph = self._cache.graph(seen)
        if graph is not None:
            return part(graph, True)
        try:
            graph = self._graph(seen, self.objective.leaves_of(seen), trace)
            return part(graph, self._cache.offer(seen, graph))
        finally:
            if trace is not None:
                trace.forget()

    def _difference(self, vector: Tensor) -> Tensor:
        eps = working_eps(self.objective.model, self.device)
        product, error = self._quotient(vector, eps)
        length = float(torch.linalg.vector_norm(vector))
        if not math.isfinite(error):
            raise NonFiniteError(
                "A gradient, or an output, holds NaN or infinity at one of the points θ ± h v "
                "that a product by finite differences needs."
            )
        self.error = max(self.error, error / length if length > 0 else 0.0)
        return product

    def _check_functions(self, trace: GraphTrace) -> None:
        """Try the user's own autograd functions, whose backward may hide what it depends on."""
        if not trace.functions:
            return
        layout = self.objective.layout
        # Not the caller's vector, in which the functions may have no part.
        probe = draw_signs(
            1, self.shape[0], as_generator(0, self.device), dtype=self.dtype, device=self.device
        )[0]
        exact = self._summed(lambda graph, keep: graph.products([probe], keep=keep), 1)[0]
        other = self._difference(probe)
        allowed = 10 * self.error * float(torch.linalg.vector_norm(probe))
        self.error = 0.0
        # Tensor by tensor: what is hidden may be small compared with the rest of the model's
        # curvature.
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
        self._announced = True
        size = float(torch.linalg.vector_norm(product[0])) or 1.0
        warn(
            f"{self.reason[:-1]}, so {self._differences}, with an "
            f"estimated error of {self.error:.1e} for unit vectors (the first product has "
            f"norm {size:.1e}). method='double_backward' refuses them.",
            FiniteDifferenceWarning,
        )
