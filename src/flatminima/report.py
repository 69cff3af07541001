"""The one-call face: `sharpness()` measures a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .checks import check_choice, check_integer
from .eigen.lanczos import lanczos
from .eigen.result import EigenResult
from .errors import ArgumentTypeError
from .estimators.result import TraceResult
from .estimators.trace import trace
from .measures.epsilon_sharpness import SharpnessResult, epsilon_sharpness
from .measures.random_sharpness import RandomSharpnessResult, random_sharpness
from .modules import drops
from .objective import Objective
from .operators.hessian import HessianOperator
from .pieces import Microbatch
from .progress import progress_bar
from .randomness import Seed
from .results import Outcome, Result, Table, format_number, reading_notes
from .vectors import Selection

__all__ = ["MEASURES", "Measurement", "SharpnessReport", "sharpness"]

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
        error_kind: what `error` is: "residual", "standard error", "std" or "".
        outcome: how the computation ended; None for a plain evaluation.
        cost: what it took.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = torch.eye(2), torch.zeros(2, 1)
        >>> report = fm.sharpness(model, torch.nn.MSELoss(), data, measures=["gradient_norm"])
        >>> [(line.name, line.value) for line in report.measurements()][0]
        ('loss L(θ)', 1.0)
    """

    name: str
    value: float
    error: float | None
    error_kind: str
    outcome: Outcome | None
    cost: str

    def _table(self) -> Table:
        return Table(_REPORT_HEADER, (_report_row(self),))


_REPORT_HEADER = ("measure", "value", "± error", "diagnosis", "cost")


def _report_row(line: Measurement) -> tuple[str, ...]:
    error = "" if line.error is None else f"{format_number(line.error, 2)} ({line.error_kind})"
    diagnosis = "" if line.outcome is None else line.outcome.brief
    return (line.name, format_number(line.value), error, diagnosis, line.cost)


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
        smallest: the smallest (most negative) eigenvalue, likewise; from the same products.
        trace: of the Hessian.
        notes: what a reader should know about how it was measured.
        readings: how often the data were read anew after the first time; 0 where they are kept on
            the device.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = torch.eye(2), torch.zeros(2, 1)
        >>> report = fm.sharpness(model, torch.nn.MSELoss(), data, measures=["trace"])
        >>> report.trace.value  # of 2 XᵀX / N
        2.0
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
    readings: int = 0

    def measurements(self) -> tuple[Measurement, ...]:
        """Every number of the report as a line of its own."""
        lines = [Measurement("loss L(θ)", self.loss, None, "", None, "1 loss")]
        if self.gradient_norm is not None:
            lines.append(
                Measurement("gradient norm ‖∇L‖", self.gradient_norm, None, "", None, "1 gradient")
            )
        for result in self.epsilon_sharpness:
            where = "full space" if result.subspace is None else f"subspace {result.subspace}"
            name = f"ε-sharpness φ (%), ε = {result.epsilon:g}, {where}"
            cost = f"{result.evaluations} gradients"
            lines.append(Measurement(name, result.value, None, "", result.outcome, cost))
        if self.random_sharpness is not None:
            shaken = self.random_sharpness
            lines.append(
                Measurement(
                    f"random-perturbation sharpness, ε = {shaken.epsilon:g}",
                    shaken.value,
                    shaken.standard_deviation,
                    "std",
                    shaken.outcome,
                    f"{shaken.evaluations} losses",
                )
            )
        if self.largest is not None:
            cost = f"{self.largest.products} products"
            lines += _eigen_lines(self.largest, "λ{} largest eigenvalue", cost)
        if self.smallest is not None:
            lines += _eigen_lines(self.smallest, "λₙ smallest eigenvalue", "the same")
        if self.trace is not None:
            found = self.trace
            lines.append(
                Measurement(
                    "trace of the Hessian",
                    found.value,
                    found.standard_error,
                    "standard error",
                    found.outcome,
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
            notes=reading_notes(self.readings) + self.notes,
        )


def _eigen_lines(result: EigenResult, name: str, cost: str) -> list[Measurement]:
    lines = []
    pairs = zip(result.eigenvalues.tolist(), result.residuals.tolist(), strict=True)
    for i, (value, residual) in enumerate(pairs, start=1):
        label = name.format(str(i).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")))
        lines.append(
            Measurement(label, value, residual, "residual", result.outcome, cost if i == 1 else "")
        )
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
    microbatch: Microbatch = None,
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
        trace_products: products for the trace.
        samples: random perturbations of each parameter tensor.
        params: as in [`Objective`][flatminima.Objective].
        weight: as in [`Objective`][flatminima.Objective].
        mode: as in [`Objective`][flatminima.Objective].
        device: as in [`Objective`][flatminima.Objective].
        cache: as in [`Objective`][flatminima.Objective].
        batch_loss: as in [`Objective`][flatminima.Objective].
        batch_size: as in [`Objective`][flatminima.Objective].
        microbatch: as in [`Objective`][flatminima.Objective].
        seed: of everything random; each measure starts from it anew, so that a subset of the
            measures gives the same numbers.
        progress: show bars for what takes long.

    Returns:
        The report: printed, it is a table; in a notebook, a rendered one.

    Raises:
        InvalidArgumentError: an unknown measure (with the closest name), or bad counts.
        FlatMinimaError: whatever [`Objective`][flatminima.Objective] refuses.

    Warns:
        ConvergenceWarning: eigenvalues did not converge; the report says how far they came.

    Examples:
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
    if measures is not None and not isinstance(measures, Iterable):
        raise ArgumentTypeError(
            f"The 'measures' argument of sharpness must be a list of names; got {measures!r}."
        )
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
        microbatch=microbatch,
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
    with (
        operator.session(),
        progress_bar("sharpness", total=len(chosen), unit="measure", show=progress) as bar,
    ):
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
                largest, smallest = _both_ends(operator, count, seed, progress)
            else:
                total = trace(operator, products=trace_products, **shared)
            bar.update()
    return SharpnessReport(
        model=type(objective.model).__name__,
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
        notes=_notes(objective, operator),
        readings=objective.batches.readings - 1,
    )


def _both_ends(
    operator: HessianOperator, count: int, seed: Seed, progress: bool
) -> tuple[EigenResult, EigenResult]:
    """The largest eigenvalues and the smallest one, from the same products."""
    # The negative end is small beside the largest eigenvalue, and so is the tolerance that
    # tells it from zero. Its own search meets the largest on the way.
    ends = (count, 1) if count < operator.shape[0] else (count, 0)
    found = lanczos(
        operator,
        k=ends,
        which="BE",
        tol=1e-4,
        basis_size=max(2 * count + 12, 30),
        seed=seed,
        progress=progress,
    ).without_vectors()
    return found.part("LA", count), found.part("SA", 1)


def _notes(objective: Objective, operator: HessianOperator) -> tuple[str, ...]:
    notes = []
    modules = list(objective.model.modules())
    found = {
        "dropout off": any(map(drops, modules)),
        "batch norm with its running statistics": any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
            for m in modules
        ),
    }
    if objective.mode == "eval" and any(found.values()):
        notes.append(f"Evaluation mode: {' and '.join(w for w, is_so in found.items() if is_so)}.")
    if operator.reason:
        notes.append(
            f"{operator.reason[:-1]}: Hessian products are differences of gradients, with an "
            f"estimated error of up to {operator.error:.1e} for unit vectors."
        )
    return (*notes, *operator.notes)
