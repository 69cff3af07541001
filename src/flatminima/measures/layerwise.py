"""The curvature of the loss for each module of a model."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ..algorithms.eigen.lanczos import LanczosSteps, Steps
from ..algorithms.eigen.result import EigenResult, check_tolerance
from ..algorithms.estimators.probes import mean_and_spread, sample_traces
from ..errors import ConvergenceWarning, warn
from ..objective.objective import Objective, check_objective
from ..operators.hessian import HessianOperator
from ..results import Outcome, Result, Table, format_number, reading_notes
from ..support.checks import check_integer
from ..support.progress import progress_bar
from ..support.randomness import Seed, as_generator

__all__ = ["LayerCurvature", "LayerwiseResult", "layerwise"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LayerCurvature(Result):
    """The curvature of the loss along the parameters of one module.

    Attributes:
        name: name of the module, as in `model.named_modules()`; "" for parameters of the model
            itself.
        parameters: number of its selected parameters.
        trace: trace of its diagonal block of the Hessian.
        trace_error: standard error of `trace`.
        eigenvalue: largest eigenvalue of the block.
        residual: ‖H u − λ u‖ in the block; an eigenvalue of the block lies within this distance
            of λ.
        products: number of products with the block, for the eigenvalue.
        outcome: outcome of the computation of the eigenvalue.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> data = torch.eye(2), torch.zeros(2, 1)
        >>> result = fm.layerwise(fm.Objective(model, torch.nn.MSELoss(), data))
        >>> [(layer.name, layer.parameters) for layer in result.layers]
        [('0', 9), ('1', 4)]
    """

    name: str
    parameters: int
    trace: float
    trace_error: float
    eigenvalue: float
    residual: float
    products: int
    outcome: Outcome

    def _table(self) -> Table:
        return Table(_HEADER, (_row(self),))


_HEADER = ("module", "parameters", "trace", "± error", "largest eigenvalue", "residual", "outcome")


def _row(layer: LayerCurvature) -> tuple[str, ...]:
    return (
        layer.name or "(the model's own)",
        str(layer.parameters),
        format_number(layer.trace),
        format_number(layer.trace_error, 2),
        format_number(layer.eigenvalue),
        format_number(layer.residual, 2),
        layer.outcome.brief,
    )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LayerwiseResult(Result):
    """Trace and largest eigenvalue of the Hessian's diagonal block of each module.

    Attributes:
        layers: one entry for each module, in the order of the model.
        trace: trace of the whole Hessian, the sum of the traces of the blocks.
        trace_products: number of products with the whole Hessian, for the traces.
        passes: number of passes over the data, for the eigenvalues of all blocks together.
        outcome: converged if the eigenvalue of every block has; otherwise the first other outcome.
        notes: remarks on the computation.
        readings: how many times the data were read again; 0 if they are kept on the device.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> data = torch.eye(2), torch.zeros(2, 1)
        >>> result = fm.layerwise(fm.Objective(model, torch.nn.MSELoss(), data))
        >>> result.outcome.brief
        'converged'
    """

    layers: tuple[LayerCurvature, ...]
    trace: float
    trace_products: int
    passes: int
    outcome: Outcome
    notes: tuple[str, ...]
    readings: int = 0

    def _table(self) -> Table:
        cost = f"{self.trace_products} products for the traces, {self.passes} passes over the data"
        return Table(
            header=_HEADER,
            rows=tuple(map(_row, self.layers)),
            title="Curvature of each module: diagonal blocks of the Hessian",
            notes=(
                f"{self.outcome.value} {cost} for all eigenvalues together.",
                *reading_notes(self.readings),
                *self.notes,
            ),
        )


def layerwise(
    objective: Objective,
    *,
    depth: int | None = None,
    trace_products: int = 50,
    tol: float = 1e-2,
    max_products: int = 200,
    seed: Seed = 0,
    progress: bool = True,
) -> LayerwiseResult:
    """Compute trace and largest eigenvalue of each module's diagonal block of the Hessian.

    All traces come from the same Rademacher vectors (Hutchinson 1989). For a random vector z, the
    part of zᵀ H z in a block is an unbiased estimate of the trace of that block, so one product
    with each vector serves all blocks. The eigenvalues come from one Lanczos iteration for each
    block, and all iterations advance together. Each pass reads a batch once and builds the graph
    of its gradient once; for each unfinished block it then differentiates only the part of the
    graph between the gradient and the parameters of that block.

    Args:
        objective: the objective; its selected parameters are grouped by the modules that own them.
        depth: number of parts of a module's name that distinguish modules: with 1,
            `encoder.0.weight` and `encoder.1.weight` both belong to "encoder". None treats every
            module separately.
        trace_products: number of random vectors, at least two.
        tol: the eigenvalue of a block has converged when ‖H u − λ u‖ ≤ tol · max |Ritz value|.
        max_products: limit on products with each block.
        seed: seed of the random vectors and start vectors.
        progress: show a bar if it takes long.

    Returns:
        One entry for each module, each number with its error.

    Raises:
        InvalidArgumentError: a count or the tolerance is out of range.
        NonFiniteError: a product holds NaN or infinity.

    Warns:
        ConvergenceWarning: some eigenvalues did not converge; the result shows which.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1)
        >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data, params="weight")
        >>> layer = fm.layerwise(objective).layers[0]  # H = diag(1, 4)
        >>> round(layer.trace, 3), round(layer.eigenvalue, 3)
        (5.0, 4.0)
    """
    call = "layerwise"
    check_objective(call, objective)
    if depth is not None:
        check_integer(call, "depth", depth, low=1)
    check_integer(call, "trace_products", trace_products, low=2)
    tol = check_tolerance(call, tol, objective.dtype)
    check_integer(call, "max_products", max_products, low=1)
    operator = HessianOperator(objective)
    before = operator.readings
    groups = _group_by_module(objective, depth)
    generator = as_generator(seed, objective.device)
    with operator.session():
        traces, errors = _estimate_traces(operator, groups, trace_products, generator, progress)
        solvers, passes = _compute_eigenvalues(
            operator, groups, tol, max_products, generator, progress
        )
    layers = []
    for (name, block), value, error, solver in zip(
        groups.items(), traces, errors, solvers, strict=True
    ):
        layers.append(
            LayerCurvature(
                name=name,
                parameters=sum(objective.layout.sizes[i] for i in block),
                trace=value,
                trace_error=error,
                eigenvalue=float(solver.eigenvalues[0]),
                residual=float(solver.residuals[0]),
                products=solver.products,
                outcome=solver.outcome,
            )
        )
    late = [layer for layer in layers if layer.outcome is not Outcome.CONVERGED]
    if late:
        warn(
            f"layerwise: the largest eigenvalue did not converge in {len(late)} of {len(layers)} "
            f"modules ({', '.join(repr(layer.name) for layer in late[:3])}"
            f"{', ...' if len(late) > 3 else ''}); see their outcomes. "
            "Increase max_products or tol.",
            ConvergenceWarning,
        )
    return LayerwiseResult(
        layers=tuple(layers),
        trace=math.fsum(layer.trace for layer in layers),
        trace_products=trace_products,
        passes=passes,
        outcome=late[0].outcome if late else Outcome.CONVERGED,
        notes=((operator.reason,) if operator.reason else ()) + operator.notes,
        readings=operator.readings - before,
    )


def _group_by_module(objective: Objective, depth: int | None) -> dict[str, list[int]]:
    """Return the positions in the layout of the parameters of each module."""
    groups: dict[str, list[int]] = {}
    for position, name in enumerate(objective.layout.names):
        if objective.layout.sizes[position] == 0:
            continue
        owner = name.split(".")[:-1]
        groups.setdefault(".".join(owner[:depth]), []).append(position)
    return groups


def _estimate_traces(
    operator: HessianOperator,
    groups: dict[str, list[int]],
    products: int,
    generator: torch.Generator,
    progress: bool,
) -> tuple[list[float], list[float]]:
    """Return the traces of the groups' blocks, and their standard errors."""
    with progress_bar("layerwise: traces", total=products, unit="product", show=progress) as bar:
        sizes = operator.objective.layout.sizes
        samples = sample_traces(operator, products, generator, sizes, bar.update)
    values, errors = mean_and_spread(
        torch.stack([samples[:, g].sum(dim=1) for g in groups.values()], dim=1)
    )
    return values.tolist(), errors.tolist()


def _compute_eigenvalues(
    operator: HessianOperator,
    groups: dict[str, list[int]],
    tol: float,
    limit: int,
    generator: torch.Generator,
    progress: bool,
) -> tuple[list[EigenResult], int]:
    """Return the largest eigenpair of each group's block, and the number of passes taken."""
    places = [place for _, place in operator.objective.layout.slices()]
    results: dict[str, EigenResult] = {}
    waiting: dict[str, tuple[Steps[EigenResult], Tensor]] = {}
    for name, block in groups.items():
        size = sum(operator.objective.layout.sizes[i] for i in block)
        rows = min(size, 20)
        steps = LanczosSteps(operator, size, 1, "LA", tol, limit, rows, generator).run()
        waiting[name] = steps, next(steps)
    passes = 0
    with progress_bar("layerwise: eigenvalues", total=None, unit="pass", show=progress) as bar:
        while waiting:
            whole = torch.zeros(operator.shape[0], dtype=operator.dtype, device=operator.device)
            for name, (_, vector) in waiting.items():
                own = [places[i] for i in groups[name]]
                pieces = torch.split(vector, [place.stop - place.start for place in own])
                for place, piece in zip(own, pieces, strict=True):
                    whole[place] = piece
            product = operator.block_product(whole, [groups[name] for name in waiting])
            passes += 1
            for name, (steps, _) in list(waiting.items()):
                part = torch.cat([product[places[i]] for i in groups[name]])
                try:
                    waiting[name] = steps, steps.send(part)
                except StopIteration as stop:
                    results[name] = stop.value
                    del waiting[name]
            bar.set_postfix_str(f"{len(waiting)} of {len(groups)} modules left", refresh=False)
            bar.update()
    return [results[name] for name in groups], passes
