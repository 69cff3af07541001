"""What the matrices of second derivatives of an objective have in common."""

from __future__ import annotations

import contextlib
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..derivatives.missing import where
from ..derivatives.tracing import GraphTrace
from ..errors import (
    FiniteDifferenceWarning,
    InvalidArgumentError,
    NonFiniteError,
    NotTwiceDifferentiableError,
    warn,
)
from ..objective.forward import Evaluated
from ..objective.objective import Objective, check_objective
from ..support.checks import check_choice
from ..support.precision import precision_notes, working_eps
from ..support.randomness import as_generator, rademacher
from ..support.vectors import Layout
from .linear import LinearOperator, Reader
from .products.gradient_graph import PerLeaf
from .products.graph_cache import Graph, KeepGraph, KeptGraphs

__all__ = ["CurvatureOperator", "Part"]

Part = Callable[[Any, bool], PerLeaf]
"""What a batch adds, made from its graph, and whether the graph is to serve again."""


class CurvatureOperator(LinearOperator):
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
        self._kept = KeptGraphs(objective, keep_graph)
        self._insists = method not in ("auto", "finite_differences")
        self.method = "double_backward" if method == "auto" else method
        self.reason = ""
        # Whether a pass has shown that every operation has a second derivative.
        self._examined = False

    _outputs_only = False
    """Whether graphs are made of a batch's outputs, and not of its loss."""
    _differences = "Hessian products are central differences of gradients"

    @abstractmethod
    def _graph(self, seen: Evaluated, leaves: list[Tensor], trace: GraphTrace | None) -> Graph:
        """What products are taken by, for one batch."""

    @abstractmethod
    def _quotient(self, vector: Tensor, eps: float) -> tuple[Tensor, float]:
        """The product by differences, and an estimate of its error."""

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """While it lasts, the graphs of the batches are kept, as `keep_graph` says.

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
    def readings(self) -> int:
        """How often the data have been read anew, where they are not kept on the device."""
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
        return self._kept.bytes

    def _products(self, vectors: Tensor) -> Tensor:
        def part(graph: Graph, keep: bool) -> PerLeaf:
            return graph.products(list(vectors), keep=keep)

        def differences() -> Tensor:
            return torch.stack([self._difference(v) for v in vectors])

        return self._exact_or(part, differences, rows=len(vectors))

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
        kept = self._kept

        def add(seen: Evaluated, leaves: list[Tensor]) -> PerLeaf:
            graph = kept.graph(seen)
            if graph is not None:
                return part(graph, True)
            try:
                graph = seen.prepared or self._graph(seen, leaves, trace)
                return part(graph, kept.offer(seen, graph))
            finally:
                if trace is not None:
                    trace.forget()

        loss, product = self.objective.sum_over_batches(
            add,
            derivatives=2,
            rows=rows,
            kept=kept.seen,
            outputs_only=self._outputs_only,
        )
        if not math.isnan(loss):
            # What cancels exactly on paper, such as a bias before batch norm, leaves this much.
            eps = working_eps(self.objective.model, self.device)
            self.floor = max(100 * torch.finfo(self.dtype).eps, eps) * abs(loss)
        return product

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
            f"{self.reason[:-1]}, so {self._differences}, with an "
            f"estimated error of {self.error:.1e} for unit vectors (the first product has "
            f"norm {size:.1e}). method='double_backward' refuses them.",
            FiniteDifferenceWarning,
        )
