"""The one-call face: `sharpness()` measures a model, `compare()` sets reports side by side."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .checks import check_choice, check_integer
from .eigen.lanczos import lanczos
from .eigen.result import EigenResult
from .errors import ArgumentTypeError, InvalidArgumentError
from .estimators.trace import TraceResult, trace
from .measures.epsilon_sharpness import SharpnessResult, epsilon_sharpness
from .measures.random_sharpness import RandomSharpnessResult, random_sharpness
from .objective import Objective
from .operators import HessianOperator
from .progress import progress_bar
from .randomness import Seed
from .results import Result, Table, format_number
from .vectors import Selection

__all__ = ["MEASURES", "Comparison", "Measurement", "SharpnessReport", "compare", "sharpness"]

MEASURES = ("gradient_norm", "epsilon_sharpness", "random_sharpness", "eigenvalues", "trace")
EPSILONS = (1e-3, 5e-4)
SUBSPACE = 100


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Measurement(Result):
    """One line of a report.

    Attributes:
        name: of the measure, with its settings.
        value: the number.
        error: its uncertainty, where it has one.
        error_kind: what `error` is: "residual", "standard error", "rounding" or "".
        diagnosis: how the computation ended.
        cost: what it took.
    """

    name: str
    value: float
    error: float | None
    error_kind: str
    diagnosis: str
    cost: str

    def _table(self) -> Table:
        return Table(_REPORT_HEADER, (_report_row(self),))


_REPORT_HEADER = ("measure", "value", "± error", "diagnosis", "cost")


def _report_row(line: Measurement) -> tuple[str, ...]:
    error = "" if line.error is None else f"{format_number(line.error, 2)} ({line.error_kind})"
    return (line.name, format_number(line.value), error, line.diagnosis, line.cost)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SharpnessReport(Result):
    """What `sharpness` measured; parts that were not asked for are None or empty.

    Attributes:
        model: the class of the model.
        parameters: n, the number of parameters that were varied.
        examples: in the data.
        mode: of the evaluation: "eval", "train" or "keep".
        loss: L(θ).
        gradient_norm: ‖∇L(θ)‖₂.
        epsilon_sharpness: one result for each ε and space.
        random_sharpness: per-tensor random perturbations.
        largest: the largest eigenvalues of the Hessian, without their vectors.
        smallest: the smallest (most negative) eigenvalue, likewise.
        trace: of the Hessian.
        notes: what a reader should know about how it was measured.
    """

    model: str
    parameters: int
    examples: int
    mode: str
    loss: float
    gradient_norm: float | None
    epsilon_sharpness: tuple[SharpnessResult, ...]
    random_sharpness: RandomSharpnessResult | None
    largest: EigenResult | None
    smallest: EigenResult | None
    trace: TraceResult | None
    notes: tuple[str, ...]

    def measurements(self) -> tuple[Measurement, ...]:
        """Every number of the report as a line of its own."""
        lines = [Measurement("loss L(θ)", self.loss, None, "", "", "1 loss")]
        if self.gradient_norm is not None:
            lines.append(
                Measurement("gradient norm ‖∇L‖", self.gradient_norm, None, "", "", "1 gradient")
            )
        for result in self.epsilon_sharpness:
            where = "full space" if result.subspace is None else f"subspace {result.subspace}"
            name = f"ε-sharpness φ (%), ε = {result.epsilon:g}, {where}"
            cost = f"{result.evaluations} gradients"
            lines.append(Measurement(name, result.value, None, "", result.outcome.brief, cost))
        if self.random_sharpness is not None:
            shaken = self.random_sharpness
            lines.append(
                Measurement(
                    f"random-perturbation sharpness, ε = {shaken.epsilon:g}",
                    shaken.value,
                    shaken.resolution,
                    "rounding",
                    shaken.outcome.brief,
                    f"{shaken.evaluations} losses",
                )
            )
        if self.largest is not None:
            lines += _eigen_lines(self.largest, "λ{} largest eigenvalue")
        if self.smallest is not None:
            lines += _eigen_lines(self.smallest, "λₙ smallest eigenvalue")
        if self.trace is not None:
            found = self.trace
            lines.append(
                Measurement(
                    "trace of the Hessian",
                    found.value,
                    found.standard_error,
                    "standard error",
                    found.outcome.brief,
                    f"{found.products} products",
                )
            )
        return tuple(lines)

    def _table(self) -> Table:
        return Table(
            _REPORT_HEADER,
            tuple(_report_row(line) for line in self.measurements()),
            title=f"Sharpness of {self.model}: {self.parameters} parameters, "
            f"{self.examples} examples, mode {self.mode!r}",
            notes=self.notes,
        )


def _eigen_lines(result: EigenResult, name: str) -> list[Measurement]:
    lines = []
    pairs = zip(result.eigenvalues.tolist(), result.residuals.tolist(), strict=True)
    for i, (value, residual) in enumerate(pairs, start=1):
        cost = f"{result.products} products" if i == 1 else ""
        label = name.format(str(i).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")))
        lines.append(Measurement(label, value, residual, "residual", result.outcome.brief, cost))
    return lines


def sharpness(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    data: Any = None,
    *,
    measures: Sequence[str] | None = None,
    eigenvalues: int = 3,
    trace_products: int = 50,
    samples: int = 10,
    params: Selection = None,
    weight: Callable[[Any], float] | None = None,
    mode: Literal["eval", "train", "keep"] = "eval",
    device: torch.device | str | None = None,
    cache: bool | Literal["auto"] = "auto",
    batch_loss: Callable[[nn.Module, Any], Tensor] | None = None,
    batch_size: int = 1024,
    seed: Seed = 0,
    progress: bool = True,
) -> SharpnessReport:
    """How sharp the minimum is that a trained model lies in, in one call.

    It measures the loss, the norm of its gradient, Keskar's ε-sharpness in the full space and in
    a random subspace of dimension 100, each at ε = 1e-3 and 5e-4, the sharpness under random
    perturbations, the largest and the smallest eigenvalues of the Hessian, and its trace. The
    model is left exactly as it was.

    Args:
        model: any module.
        loss_fn: `loss_fn(output, target)` → a scalar.
        data: a tuple of tensors `(inputs, targets)`, a list of batches, a DataLoader or a
            Dataset: the data whose loss is studied, as a rule the training data.
        measures: which to take, of "gradient_norm", "epsilon_sharpness", "random_sharpness",
            "eigenvalues" and "trace"; all of them unless told. The loss is always there.
        eigenvalues: how many of the largest.
        trace_products: samples for the trace.
        samples: random perturbations of each parameter tensor.
        params: as in `Objective`.
        weight: as in `Objective`.
        mode: as in `Objective`.
        device: as in `Objective`.
        cache: as in `Objective`.
        batch_loss: as in `Objective`.
        batch_size: as in `Objective`.
        seed: of everything random; each measure starts from it anew, so that a subset of the
            measures gives the same numbers.
        progress: show bars for what takes long.

    Returns:
        The report: printed, it is a table; in a notebook, a rendered one.

    Raises:
        InvalidArgumentError: an unknown measure (with the closest name), or bad counts.
        FlatMinimaError: whatever `Objective` refuses.

    Warns:
        ConvergenceWarning: eigenvalues did not converge; the report says how far they came.

    Example:
        >>> import torch
        >>> from flatminima import sharpness
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> report = sharpness(model, torch.nn.MSELoss(), (x, y), measures=["gradient_norm"])
        >>> print(report)
        Sharpness of Linear: 2 parameters, 2 examples, mode 'eval'
        measure             value  ± error  diagnosis        cost
        ──────────────────  ─────  ───────  ─────────  ──────────
        loss L(θ)             2.5                          1 loss
        gradient norm ‖∇L‖  4.123                      1 gradient
    """
    call = "sharpness"
    if isinstance(measures, str):
        measures = [measures]
    chosen = MEASURES if measures is None else tuple(measures)
    for name in chosen:
        check_choice(call, "measures", name, MEASURES)
    check_integer(call, "eigenvalues", eigenvalues, low=1)
    check_integer(call, "trace_products", trace_products, low=2)
    check_integer(call, "samples", samples, low=1)
    objective = Objective(
        model,
        loss_fn,
        data,
        params=params,
        weight=weight,
        mode=mode,
        device=device,
        cache=cache,
        batch_loss=batch_loss,
        batch_size=batch_size,
        progress=progress,
    )
    operator = HessianOperator(objective)
    subspace = min(SUBSPACE, objective.size)
    gradient_norm: float | None = None
    boxes: list[SharpnessResult] = []
    shaken: RandomSharpnessResult | None = None
    largest: EigenResult | None = None
    smallest: EigenResult | None = None
    total: TraceResult | None = None
    if isinstance(seed, torch.Generator):
        # One draw, so that every measure starts from the same seed here too.
        seed = int(torch.randint(2**62, (1,), generator=seed, device=seed.device).item())
    shared: dict[str, Any] = {"seed": seed, "progress": progress}
    with progress_bar("sharpness", total=len(chosen), unit="measure", show=progress) as bar:
        loss = objective.loss()
        for name in MEASURES:
            if name not in chosen:
                continue
            bar.set_postfix_str(name, refresh=False)
            if name == "gradient_norm":
                gradient_norm = float(torch.linalg.vector_norm(objective.gradient().double()))
            elif name == "epsilon_sharpness":
                boxes = [
                    epsilon_sharpness(objective, epsilon=epsilon, subspace=p, **shared)
                    for p in (None, subspace)
                    for epsilon in EPSILONS
                ]
            elif name == "random_sharpness":
                shaken = random_sharpness(objective, samples=samples, **shared)
            elif name == "eigenvalues":
                count = min(eigenvalues, objective.size)
                largest = lanczos(operator, k=count, which="LA", **shared).without_vectors()
                # The negative end is small beside the largest eigenvalue, and so is the
                # tolerance that tells it from zero.
                smallest = lanczos(
                    operator, which="SA", tol=1e-4, basis_size=min(40, objective.size), **shared
                ).without_vectors()
            else:
                total = trace(operator, products=trace_products, **shared)
            bar.update()
    return SharpnessReport(
        model=type(model).__name__,
        parameters=objective.size,
        examples=objective.examples,
        mode=mode,
        loss=loss,
        gradient_norm=gradient_norm,
        epsilon_sharpness=tuple(boxes),
        random_sharpness=shaken,
        largest=largest,
        smallest=smallest,
        trace=total,
        notes=_notes(model, mode),
    )


def _notes(model: nn.Module, mode: str) -> tuple[str, ...]:
    kinds = {
        "dropout": nn.modules.dropout._DropoutNd,
        "batch norm": nn.modules.batchnorm._BatchNorm,
    }
    found = [n for n, kind in kinds.items() if any(isinstance(m, kind) for m in model.modules())]
    if not found or mode != "eval":
        return ()
    ways = {"dropout": "dropout off", "batch norm": "batch norm with its running statistics"}
    return ("Evaluation mode: " + " and ".join(ways[n] for n in found) + ".",)


# ------------------------------------------------------------------------------------ comparing


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Comparison(Result):
    """Several models measured alike, side by side.

    Attributes:
        labels: of the models; the ratios are to the first.
        measures: the names of the measurements that all reports share.
        values: for each label, for each measure, the values of all its reports (one for each
            seed).
        ratio_of_means: for each label, for each measure: its mean over the first label's.
    """

    labels: tuple[str, ...]
    measures: tuple[str, ...]
    values: dict[str, tuple[tuple[float, ...], ...]]
    ratio_of_means: dict[str, tuple[float, ...]]

    def mean(self, label: str, measure: str) -> float:
        """Mean over the reports (seeds) of one label."""
        return statistics.fmean(self._reports(label, measure))

    def standard_deviation(self, label: str, measure: str) -> float:
        """Over the reports (seeds) of one label, n − 1 in the denominator; NaN for one."""
        values = self._reports(label, measure)
        return statistics.stdev(values) if len(values) > 1 else math.nan

    def _table(self) -> Table:
        header = ["measure", *self.labels]
        header += [f"{label} / {self.labels[0]}" for label in self.labels[1:]]
        rows = []
        for i, measure in enumerate(self.measures):
            cells = [_mean_and_spread(self.values[label][i]) for label in self.labels]
            ratios = [format_number(self.ratio_of_means[n][i], 3) for n in self.labels[1:]]
            rows.append((measure, *cells, *ratios))
        count = max(len(self.values[label][0]) for label in self.labels)
        notes = (f"Mean ± standard deviation over {count} seeds.",) if count > 1 else ()
        return Table(tuple(header), tuple(rows), notes=notes)

    def _reports(self, label: str, measure: str) -> tuple[float, ...]:
        for argument, name, known in (
            ("label", label, self.labels),
            ("measure", measure, self.measures),
        ):
            check_choice("Comparison", argument, name, known)
        return self.values[label][self.measures.index(measure)]


def _mean_and_spread(values: Sequence[float]) -> str:
    mean = format_number(statistics.fmean(values))
    if len(values) == 1:
        return mean
    return f"{mean} ± {format_number(statistics.stdev(values), 2)}"


def compare(reports: Mapping[str, SharpnessReport | Sequence[SharpnessReport]]) -> Comparison:
    """Reports side by side, with the ratios to the first.

    Args:
        reports: by label, one report or several (of the same training with other seeds), which
            then appear as mean ± standard deviation.

    Returns:
        A table of the measurements that all reports share.

    Raises:
        InvalidArgumentError: fewer than two labels, an empty list, or nothing in common.
        ArgumentTypeError: something that is not a report.

    Example:
        >>> import torch, flatminima as fm
        >>> x, y = torch.eye(2), torch.zeros(2, 1)
        >>> reports = {}
        >>> for name, size in {"small": 1.0, "large": 2.0}.items():
        ...     model = torch.nn.Linear(2, 1, bias=False)
        ...     _ = torch.nn.init.constant_(model.weight, size)
        ...     reports[name] = fm.sharpness(
        ...         model, torch.nn.MSELoss(), (x, y), measures=["gradient_norm"]
        ...     )
        >>> print(fm.compare(reports))
        measure             small  large  large / small
        ──────────────────  ─────  ─────  ─────────────
        loss L(θ)               1      4              4
        gradient norm ‖∇L‖  1.414  2.828              2
    """
    if not isinstance(reports, Mapping):
        raise ArgumentTypeError(
            'compare takes a mapping such as {"small batch": report, "large batch": report}; got '
            f"{type(reports).__name__}."
        )
    if len(reports) < 2:
        raise InvalidArgumentError(f"compare needs two reports at least; got {len(reports)}.")
    series: dict[str, list[SharpnessReport]] = {}
    for label, given in reports.items():
        several = [given] if isinstance(given, SharpnessReport) else list(given)
        if not several:
            raise InvalidArgumentError(f"compare got an empty list for {label!r}.")
        for report in several:
            if not isinstance(report, SharpnessReport):
                raise ArgumentTypeError(
                    f"compare takes reports of sharpness(); {label!r} holds a "
                    f"{type(report).__name__}."
                )
        series[str(label)] = several
    numbers = {
        label: [{m.name: m.value for m in report.measurements()} for report in several]
        for label, several in series.items()
    }
    every = [report for several in numbers.values() for report in several]
    shared = [name for name in every[0] if all(name in report for report in every)]
    values = {
        label: tuple(tuple(report[name] for report in several) for name in shared)
        for label, several in numbers.items()
    }
    labels = tuple(values)
    base = [statistics.fmean(v) for v in values[labels[0]]]
    ratios = {
        label: tuple(
            statistics.fmean(v) / b if b else math.nan
            for v, b in zip(values[label], base, strict=True)
        )
        for label in labels
    }
    return Comparison(labels, tuple(shared), values, ratios)
