"""The generalised Gauss–Newton matrix and the Fisher matrices of an objective."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import functional_call

from ..derivatives.gradients import accumulate, checkpoints_reentrantly
from ..derivatives.missing import where
from ..derivatives.torch_private import no_checkpoint_warning
from ..derivatives.tracing import LOSS, GraphTrace
from ..errors import FlatMinimaWarning, InvalidArgumentError, NotTwiceDifferentiableError, warn
from ..objective.forward import Evaluated
from ..objective.objective import BatchPart, Objective, WeightedSum, check_objective
from ..objective.weights import split_pair
from ..support.checks import check_choice, check_integer
from ..support.randomness import Seed, as_generator, draw_signs, reseed
from ..support.trees import map_tensors, to_device
from .curvature import CurvatureOperator
from .outputs.fisher import check_examples, drawn_scores, given_scores, likelihood_curvature
from .outputs.jacobians import jacobian_diagonal
from .outputs.loss_curvature import (
    OutputMatrix,
    loss_gradient,
    loss_hessian,
    outputs_at,
    places_in,
)
from .products.differences import extrapolate
from .products.gradient_graph import PerLeaf
from .products.graph_cache import KeepGraph
from .products.output_graph import OutputGraph

__all__ = ["FisherOperator", "GaussNewtonOperator"]

Method = Literal["auto", "double_backward", "finite_differences"]
METHODS = ("auto", "double_backward", "finite_differences")
LINEAR = "The loss is linear in the model's outputs, so that its Gauss–Newton matrix is zero."


class _OutputOperator(CurvatureOperator[OutputGraph]):
    """Jᵀ M J, with M on the outputs of each batch."""

    _outputs_only = True
    _differences = "products with the outputs' Jacobian are central differences of outputs"

    def __init__(self, objective: Objective, *, method: str, keep_graph: KeepGraph) -> None:
        call = type(self).__name__
        check_objective(call, objective)
        if objective.loss_fn is None:
            raise InvalidArgumentError(
                f"{call} looks between the model's outputs and the loss, and an objective with "
                "batch_loss= does not show them. Make it as fm.Objective(model, loss_fn, data) "
                "with loss_fn(output, target) and (input, target) batches; a model that takes "
                "several inputs gets them from a small module around it whose forward(input) "
                "returns what the loss is made of, such as model(**input).logits."
            )
        super().__init__(objective, method=method, methods=METHODS, keep_graph=keep_graph)

    @abstractmethod
    def _matrix(self, seen: Evaluated, trace: GraphTrace | None) -> OutputMatrix:
        """Return M for one batch."""

    def _graph(
        self, seen: Evaluated, leaves: list[Tensor], trace: GraphTrace | None
    ) -> OutputGraph:
        matrix = self._matrix(seen, trace)
        outputs = outputs_at(seen.output, places_in(seen.output))
        return OutputGraph(outputs, matrix, leaves, self.objective.layout, trace)

    def _sum_over_outputs(self, part: BatchPart, *, rows: int) -> Tensor:
        """Return the weighted mean of what `part` makes of each batch's outputs, (rows, n)."""
        objective, total = self.objective, WeightedSum(self.objective, rows)
        with objective.evaluate_batches(derivatives=1, outputs_only=True) as batches:
            for seen in batches:
                with batches.visiting(seen):
                    total.add(seen, part(seen, objective.leaves_of(seen)))
        batches.mean_losses(check=True)
        return total.mean()

    def exact_diagonal(self) -> Tensor | None:
        """Return the diagonal, shape (n,), by the Jacobian of each example.

        Writes and reads a Jacobian of n numbers for each output of each example, which takes some
        20 times as long as as many gradients. None where an example has more than 64 outputs, the
        outputs are no single tensor with the examples first, or examples depend on each other.
        """
        possible = True

        def part(seen: Evaluated, leaves: list[Tensor]) -> PerLeaf:
            nonlocal possible
            found = None
            if possible:
                named = dict(zip(self.objective.layout.names, leaves, strict=True))
                inputs = split_pair(seen.batch.data, seen.batch.index)[0]
                matrix = self._matrix(seen, trace)
                found = jacobian_diagonal(self.objective.model, inputs, seen.output, matrix, named)
            possible = found is not None
            return [None] * len(leaves) if found is None else found

        try:
            with GraphTrace(self.objective.model) as trace:
                total = self._sum_over_outputs(part, rows=1)
        except NotTwiceDifferentiableError:
            return None
        return total[0] if possible else None

    def _check_functions(self, trace: GraphTrace) -> None:
        """Try the user's own functions: J and Jᵀ must belong to each other, whatever J is.

        So also of functions whose backward is meant to be another's (straight-through estimators).
        """
        if not trace.functions:
            return
        if LOSS in trace.functions.values():
            super()._check_functions(trace)
            return
        forms: list[tuple[Tensor, Tensor]] = []
        probe = draw_signs(
            1, self.shape[0], as_generator(0, self.device), dtype=self.dtype, device=self.device
        )[0]

        def part(graph: OutputGraph, keep: bool) -> PerLeaf:  # noqa: ARG001
            forms.append(graph.adjoint_forms(probe))
            return [None] * len(self.objective.layout.names)

        self._summed(part, 1)
        for left, right in ((float(one), float(other)) for one, other in forms):
            if abs(left - right) > 0.01 * max(abs(left), abs(right)):
                name, module = next(iter(trace.functions.items()))
                raise NotTwiceDifferentiableError(
                    f"The derivative of the outputs that PyTorch finds by {name}{where(module)} "
                    "contradicts its transpose: its backward hides what it depends on. Write it "
                    "with differentiable operations, or mark it with once_differentiable.",
                    name,
                    module,
                )

    # ------------------------------------------------------------------ by differences

    def _quotient(self, vector: Tensor, eps: float) -> tuple[Tensor, float]:
        """Return J v by differences of outputs, Jᵀ by one backward pass."""
        objective = self.objective
        own = list(objective.model.parameters())

        def quotients(step: float) -> tuple[Tensor, Tensor, float]:
            def part(seen: Evaluated, leaves: list[Tensor]) -> PerLeaf:
                outputs = outputs_at(seen.output, places_in(seen.output))

                def pulled(above: Any, below: Any, scale: float) -> PerLeaf:
                    change = zip(outputs, self._change(seen, above, below), strict=True)
                    pairs = [(o, c * scale) for o, c in change if c is not None]
                    return _pulled(pairs, leaves, own)

                found: list[Tensor | None] = []
                for h in (step, step / 2):
                    above, below = (self._output(seen, s * vector) for s in (h, -h))
                    found += pulled(above, below, 1 / (2 * h))
                # What rounding of the outputs is magnified from.
                nothing = map_tensors(seen.output, torch.zeros_like)
                return found + list(pulled(map_tensors(seen.output, Tensor.detach), nothing, 1.0))

            wide, narrow, size = self._sum_over_outputs(part, rows=3)
            return wide, narrow, float(torch.linalg.vector_norm(size))

        return extrapolate(quotients, vector, objective.point(), eps)

    def _output(self, seen: Evaluated, shift: Tensor) -> Any:
        """Return the model's output for the same batch at θ + δ, without a graph."""
        layout = self.objective.layout
        moved = {
            name: seen.tensors[name] + piece
            for name, piece in zip(layout.names, layout.unflatten(shift), strict=True)
        }
        data = to_device(seen.batch.data, self.device, duplicate=True)
        reseed(seen.batch.index)
        with torch.no_grad(), no_checkpoint_warning():
            return functional_call(
                self.objective.model, moved, (split_pair(data, seen.batch.index)[0],)
            )

    @abstractmethod
    def _change(self, seen: Evaluated, above: Any, below: Any) -> Sequence[Tensor | None]:
        """Return what M makes of the difference of two outputs."""


def _pulled(
    pairs: Sequence[tuple[Tensor, Tensor]], leaves: list[Tensor], own: Sequence[Tensor]
) -> PerLeaf:
    """Return Σ Jᵀ c over pairs of an output and its cotangent, the graph being kept."""
    if not pairs:
        return [None] * len(leaves)
    total = torch.stack([(o * c).sum() for o, c in pairs]).sum()
    if checkpoints_reentrantly(total):
        return accumulate(total, leaves, own, keep=True)
    return torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)


class GaussNewtonOperator(_OutputOperator):
    """G = (1/Σw) Σ Jᵀ ∇²ℓ J, the generalised Gauss–Newton matrix, by products over all data.

    J is the Jacobian of the model's outputs by the parameters and ∇²ℓ the Hessian of the loss by
    the outputs (Schraudolph 2002; Martens 2020, arXiv:1412.1193, section 8). It is the Hessian
    less what the curvature of the model itself adds, positive semi-definite for losses that are
    convex in the outputs, and equals the Fisher matrix for cross-entropy and squared errors.

    No Jacobian is formed: J v is the derivative of Jᵀu by u. Within a `session` the graphs are
    kept, and a product costs one and a third of a gradient, otherwise two and a third. ∇²ℓ is
    known in closed form for `CrossEntropyLoss`, `MSELoss` and `BCEWithLogitsLoss` and their
    functions, and differentiated for any other loss.

    Where PyTorch cannot differentiate twice, J v is a central difference of outputs, with an
    estimate of its error.

    Args:
        objective: with `loss_fn`, as the outputs are looked at.
        method: "auto": exact where possible; "double_backward" insists on it;
            "finite_differences" asks for differences.
        keep_graph: what a session may keep, as for `HessianOperator`.

    Attributes:
        objective, method, error, floor, reason: as of `HessianOperator`.

    Raises:
        InvalidArgumentError: the objective has `batch_loss`.
        NotTwiceDifferentiableError: from a product with "double_backward".

    Warns:
        FiniteDifferenceWarning: from the first product, when "auto" falls back to differences.
        FlatMinimaWarning: the loss is linear in the outputs, so that G = 0. This is so for
            `NLLLoss` on log-probabilities: give logits to `CrossEntropyLoss` instead.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), (x, y))
        >>> fm.GaussNewtonOperator(objective) @ torch.tensor([1.0, 1.0])  # of a linear model, H
        tensor([1., 4.])
    """

    def __init__(
        self, objective: Objective, *, method: Method = "auto", keep_graph: KeepGraph = "auto"
    ) -> None:
        super().__init__(objective, method=method, keep_graph=keep_graph)
        # Of all batches that were looked at; None while none was.
        self._linear: bool | None = None
        self._told = False
        # Whether the loss is known to be convex; else the least and largest Rayleigh quotients.
        self._convex = True
        self._quotients: Tensor | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """Beyond autocast and short types: that G is zero, or not positive semi-definite."""
        found = super().notes
        if self._linear:
            found += (LINEAR,)
        low, size = (0.0, 0.0) if self._quotients is None else self._quotients.tolist()
        if low < -max(1e-4 * size, self.floor):
            found += (
                "The loss is not convex in the model's outputs: its Gauss–Newton matrix is "
                "not positive semi-definite.",
            )
        return found

    def _matrix(self, seen: Evaluated, trace: GraphTrace | None) -> OutputMatrix:
        loss_fn = self.objective.loss_fn
        assert loss_fn is not None
        matrix = loss_hessian(loss_fn, seen.output, seen.target, trace)
        if trace is not None:
            self._linear = matrix.linear and self._linear is not False
        self._convex = self._convex and matrix.positive
        return matrix

    def _inspect(self, vectors: Tensor, products: Tensor) -> None:
        self._warn_if_linear()
        if not self._convex:
            lengths = torch.linalg.vecdot(vectors, vectors)
            found = torch.linalg.vecdot(vectors, products) / lengths.clamp(min=1e-30)
            low, size = found.min(), found.abs().max()
            old = (low, size) if self._quotients is None else self._quotients
            self._quotients = torch.stack([torch.minimum(low, old[0]), torch.maximum(size, old[1])])

    def exact_diagonal(self) -> Tensor | None:
        """As of other operators on outputs; zeros where the loss is linear."""
        found = super().exact_diagonal()
        self._warn_if_linear()
        return found

    def _warn_if_linear(self) -> None:
        if self._linear and not self._told:
            self._told = True
            warn(
                f"{LINEAR} If the outputs are log-probabilities, let the model return logits and "
                "use CrossEntropyLoss, or take FisherOperator.",
                FlatMinimaWarning,
            )

    def _change(self, seen: Evaluated, above: Any, below: Any) -> Sequence[Tensor | None]:
        """By gradients of the loss at both, which needs no second derivative of it."""
        loss_fn = self.objective.loss_fn
        assert loss_fn is not None
        places = places_in(seen.output)
        ends = [loss_gradient(loss_fn, at, seen.target, places)[1] for at in (above, below)]
        return [None if a is None or b is None else a - b for a, b in zip(*ends, strict=True)]


class FisherOperator(_OutputOperator):
    """A Fisher information matrix of an objective, by products over all data.

    With ℓ the negative logarithm of a likelihood p(y | x, θ):

    * "exact" (type 2): E over x from the data and y from the model of ∇ℓ ∇ℓᵀ, without drawing.
      For cross-entropy, squared errors and logistic outputs it equals the Gauss–Newton matrix
      (Martens 2020, arXiv:1412.1193, section 9).
    * "monte_carlo": the same with `samples` labels drawn for each example, the same ones in every
      product. Its rank is at most samples × examples.
    * "empirical": (1/N) Σ ∇ℓ_i ∇ℓ_iᵀ with the labels of the data, which is another matrix
      (Kunstner et al. 2019, arXiv:1905.12558): it vanishes where all examples are fitted. An
      example is an entry of the first dimension, ℓ_i its own mean loss, and N counts with the
      weight of each.

    Args:
        objective: with `loss_fn`. For "exact" and "monte_carlo" `CrossEntropyLoss`, `NLLLoss` on
            log-probabilities, `MSELoss` (normal observations of variance ½) or
            `BCEWithLogitsLoss`. For "empirical" a mean or a sum over examples.
        kind: which one.
        samples: labels drawn for each example.
        seed: of the draws.
        method: as of `GaussNewtonOperator`.
        keep_graph: as of `GaussNewtonOperator`.

    Attributes:
        objective, method, error, floor, reason: as of `HessianOperator`.
        kind: as given.
        samples: as given.

    Raises:
        InvalidArgumentError: the objective has `batch_loss`; from a product, the loss is no
            likelihood that is known here, or the examples of a batch cannot be separated.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [1.0]])
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), (x, y))
        >>> fm.FisherOperator(objective) @ torch.ones(1)  # 2 (1² + 2²) / 2
        tensor([5.])
        >>> fm.FisherOperator(objective, kind="empirical") @ torch.ones(1)  # ((2·3)² + (2·2)²) / 2
        tensor([26.])
    """

    def __init__(
        self,
        objective: Objective,
        *,
        kind: Literal["exact", "monte_carlo", "empirical"] = "exact",
        samples: int = 1,
        seed: Seed = 0,
        method: Method = "auto",
        keep_graph: KeepGraph = "auto",
    ) -> None:
        super().__init__(objective, method=method, keep_graph=keep_graph)
        self.kind = check_choice(
            "FisherOperator", "kind", kind, ("exact", "monte_carlo", "empirical")
        )
        self.samples = check_integer("FisherOperator", "samples", samples, low=1)
        generator = as_generator(seed, torch.device("cpu"))
        # One number of it, so that every product sees the same labels.
        self._seed = int(
            torch.randint(2**62, (), generator=generator, device=generator.device).item()
        )

    def _matrix(self, seen: Evaluated, trace: GraphTrace | None) -> OutputMatrix:
        loss_fn, output, target = self.objective.loss_fn, seen.output, seen.target
        if self.kind == "empirical":
            if trace is not None:
                check_examples(loss_fn, output, target)
            return given_scores(loss_fn, output, target)
        if self.kind == "exact":
            found = likelihood_curvature(loss_fn, output, target)
        else:
            # Odd factors, as generators on the CPU look at 32 bits of a seed alone.
            place = 0x9E3779B1 * seen.batch.index + 0x85EBCA77 * seen.batch.start
            generator = torch.Generator(self.device).manual_seed((self._seed + place) % 2**32)
            found = drawn_scores(loss_fn, output, target, samples=self.samples, generator=generator)
        if found is None:
            raise InvalidArgumentError(
                f"FisherOperator(kind={self.kind!r}) needs the likelihood that the loss is the "
                "negative logarithm of, and knows those of CrossEntropyLoss, NLLLoss, MSELoss and "
                "BCEWithLogitsLoss (without pos_weight) on one output tensor. Use "
                "GaussNewtonOperator, or kind='empirical'."
            )
        return found

    def _change(self, seen: Evaluated, above: Any, below: Any) -> Sequence[Tensor | None]:
        places = places_in(seen.output)
        ends = zip(outputs_at(above, places), outputs_at(below, places), strict=True)
        return self._matrix(seen, None).times([a - b for a, b in ends])
