"""Relative flatness: the curvature of a layer's weights, relative to these weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..algorithms.estimators.trace import trace
from ..derivatives.torch_private import TRANSPOSED_CONVOLUTION
from ..errors import InvalidArgumentError
from ..objective.objective import Objective, check_objective
from ..objective.selection import matching
from ..operators.hessian import HessianOperator
from ..operators.linear import LinearOperator
from ..operators.restricted import BlockOperator
from ..results import Outcome, Result, Table, format_number
from ..support.checks import check_integer
from ..support.progress import progress_bar
from ..support.randomness import Seed, as_generator
from .result import Measurement, MeasureResult

__all__ = ["LayerFlatness", "RelativeFlatnessResult", "relative_flatness"]

_HEADER = ("weights", "relative flatness", "standard error", "products", "diagnosis")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LayerFlatness(Result):
    """Relative flatness of one weight matrix.

    Attributes:
        name: name of the parameter.
        rows: number of neurons or filters.
        columns: number of inputs to each of them.
        value: Σ_{s,s'} ⟨w_s, w_s'⟩ tr H_{s,s'}.
        standard_error: standard error of `value`; 0 if it is exact.
        products: number of products with the Hessian.
        outcome: exact, completed, or as exact as the products allow.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = torch.eye(2), torch.zeros(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> layer = fm.relative_flatness(objective).layers[0]
        >>> layer.name, layer.rows, layer.columns, layer.outcome.brief
        ('weight', 1, 2, 'exact')
    """

    name: str
    rows: int
    columns: int
    value: float
    standard_error: float
    products: int
    outcome: Outcome

    @property
    def row(self) -> tuple[str, ...]:
        """The cells of its row in a table."""
        error = format_number(self.standard_error, 2)
        spent, brief = str(self.products), self.outcome.brief
        return (self.name, format_number(self.value), error, spent, brief)

    def _table(self) -> Table:
        return Table(_HEADER, (self.row,))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RelativeFlatnessResult(MeasureResult):
    """Relative flatness of each layer, and their sum.

    Attributes:
        value: the sum over the layers.
        standard_error: standard error of `value`; if products are finite differences, it includes
            their error.
        layers: one entry for each weight matrix, in the order of the model.
        products: total number of products with the Hessian.
        whole: whether these are all weight matrices among the selected parameters.
        outcome: exact if all layers are exact, completed, or as exact as the products allow.
        readings: how many times the data were read again; 0 if they are kept on the device.
        notes: remarks on the computation.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> data = torch.eye(2), torch.zeros(2, 1)
        >>> result = fm.relative_flatness(fm.Objective(model, torch.nn.MSELoss(), data))
        >>> [layer.name for layer in result.layers]
        ['0.weight', '1.weight']
    """

    value: float
    standard_error: float
    layers: tuple[LayerFlatness, ...]
    products: int
    whole: bool
    outcome: Outcome
    readings: int = 0
    notes: tuple[str, ...] = ()

    def measurements(self) -> tuple[Measurement, ...]:
        """Return the sum as one line of a report."""
        cost = f"{self.products} products"
        name = "relative flatness"
        if not self.whole:
            name += " of " + ", ".join(layer.name for layer in self.layers)
        return self._line(name, cost, self.standard_error, "standard error")

    def _table(self) -> Table:
        error = format_number(self.standard_error, 2)
        whole = ("sum", format_number(self.value), error, str(self.products), self.outcome.brief)
        return Table(
            header=_HEADER,
            rows=(whole, *(layer.row for layer in self.layers)),
            title="Relative flatness (larger is sharper)",
            notes=self._make_notes(),
        )


def relative_flatness(
    objective: Objective,
    *,
    layers: str | Sequence[str] | None = None,
    products: int = 50,
    seed: Seed = 0,
    progress: bool = True,
) -> RelativeFlatnessResult:
    """Compute traces of each layer's Hessian blocks, weighted by inner products of its neurons.

    κ = Σ_{s,s'} ⟨w_s, w_s'⟩ tr H_{s,s'}, where w_s are the rows of a layer's weight matrix W, and
    H_{s,s'} is the block of the Hessian for the rows s and s' (Petzka et al. 2021,
    arXiv:2001.00939, definition 3). Despite the name, larger is sharper. κ is unchanged when whole
    layers are rescaled.

    κ is the trace of M ↦ Aᵀ H[A M] over matrices M with as many columns as W, where A Aᵀ = W Wᵀ
    and A is the smaller of W and (W Wᵀ)^½. The trace is exact if that takes at most `products`
    products; otherwise it is estimated by XTrace, as by [`trace`][flatminima.trace].

    Args:
        objective: the objective to differentiate.
        layers: glob patterns on the names of weights. Default: all selected parameters with two
            or more dimensions. The rows of convolutions are their filters. In embeddings and
            transposed convolutions, the second dimension counts the neurons. A tied weight is
            treated as by its first owner.
        products: limit on products with the Hessian for each layer, at least 4.
        seed: seed of the random vectors.
        progress: show a bar if it takes long.

    Returns:
        κ of each layer with its standard error, and the sum.

    Raises:
        InvalidArgumentError: no selected parameter has two dimensions, or there are too few
            products.
        ParameterSelectionError: a pattern matches no weight.
        NonFiniteError: a product holds NaN or infinity.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1)
        >>> _ = torch.nn.init.constant_(model.weight, 3.0)
        >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> round(fm.relative_flatness(objective).value, 3)  # ‖w‖² tr diag(1, 4)
        90.0
    """
    call = "relative_flatness"
    check_objective(call, objective)
    check_integer(call, "products", products, low=4)
    generator = as_generator(seed, objective.device)
    parameters = objective.parameters
    weights = {n: p for n, p in parameters.items() if p.dim() > 1 and p.numel() > 0}
    if not weights:
        raise InvalidArgumentError(
            f"{call} needs weight matrices, and no selected parameter has two dimensions; select "
            "some with params= of the objective."
        )
    every = set(weights)
    if layers is not None:
        weights = matching(list(weights.items()), layers)
    whole = set(weights) == every
    before = objective.batches.readings
    hessian = HessianOperator(objective)
    found = []
    with (
        hessian.session(),
        progress_bar("relative flatness", total=len(weights), unit="layer", show=progress) as bar,
    ):
        for name, weight in weights.items():
            operator = _LayerOperator(
                hessian, name, weight, _has_neurons_second(objective.model, name)
            )
            estimate = trace(operator, products=products, seed=generator, progress=progress)
            rows, columns = operator.matrix
            found.append(
                LayerFlatness(
                    name=name,
                    rows=rows,
                    columns=columns,
                    value=estimate.value,
                    # The trace sums n products, each with this error at most.
                    standard_error=math.hypot(
                        estimate.standard_error, operator.error * operator.shape[0]
                    ),
                    products=estimate.products,
                    outcome=Outcome.INEXACT_PRODUCTS if operator.error else estimate.outcome,
                )
            )
            bar.update()
    outcomes = [layer.outcome for layer in found]
    outcome = next((o for o in outcomes if o is not Outcome.EXACT), Outcome.EXACT)
    return RelativeFlatnessResult(
        value=math.fsum(layer.value for layer in found),
        standard_error=math.hypot(*(layer.standard_error for layer in found)),
        layers=tuple(found),
        products=sum(layer.products for layer in found),
        whole=whole,
        outcome=outcome,
        readings=objective.batches.readings - before,
        notes=((hessian.reason,) if hessian.reason else ()) + hessian.notes,
    )


_NEURONS_SECOND = (nn.Embedding, nn.EmbeddingBag, TRANSPOSED_CONVOLUTION)


def _has_neurons_second(model: nn.Module, name: str) -> bool:
    """Return whether the second dimension of a weight counts its neurons."""
    owner, _, attribute = name.rpartition(".")
    return attribute == "weight" and isinstance(model.get_submodule(owner), _NEURONS_SECOND)


class _LayerOperator(LinearOperator):
    """The operator M ↦ Aᵀ H[A M], whose trace is κ; M has as many rows as A has columns."""

    def __init__(
        self, hessian: HessianOperator, name: str, weight: Tensor, transposed: bool
    ) -> None:
        self._block = BlockOperator(hessian, lambda other, _: other == name)
        self._shape, self._transposed = weight.shape, transposed
        matrix = self._as_matrix(weight.detach().to(hessian.dtype).reshape(1, -1))[0]
        self.matrix = (matrix.shape[0], matrix.shape[1])
        if matrix.shape[0] > matrix.shape[1]:
            self._factor = matrix
        else:
            # The symmetric root, since it does not depend on the signs of singular vectors.
            u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
            self._factor = (u * s) @ u.T
        super().__init__(self._factor.shape[1] * self.matrix[1], hessian.dtype, hessian.device)
        self._size = float(torch.linalg.matrix_norm(self._factor, 2)) ** 2

    @property
    def readings(self) -> int:
        """The number of readings of the Hessian."""
        return self._block.readings

    def _as_matrix(self, flat: Tensor) -> Tensor:
        """Return weights (k, n) as matrices (k, rows, columns)."""
        weights = flat.view(-1, *self._shape)
        return (weights.transpose(1, 2) if self._transposed else weights).flatten(2)

    def _as_weights(self, matrices: Tensor) -> Tensor:
        """Return matrices (k, rows, columns) as weights (k, n)."""
        shape = list(self._shape)
        if not self._transposed:
            return matrices.reshape(len(matrices), -1)
        shape[0], shape[1] = shape[1], shape[0]
        return matrices.reshape(-1, *shape).transpose(1, 2).reshape(len(matrices), -1)

    def _products(self, vectors: Tensor) -> Tensor:
        inner = vectors.view(len(vectors), -1, self.matrix[1])
        products = self._block._products(self._as_weights(self._factor @ inner))
        self.error = self._block.error * self._size
        self.floor = self._block.floor * self._size
        return (self._factor.T @ self._as_matrix(products)).reshape(len(vectors), -1)
