"""What `sharpness` returns: every number of a model's report, and each as a line of a table."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence

from ..algorithms.eigen.result import EigenResult
from ..algorithms.estimators.density import SpectralDensity
from ..algorithms.estimators.result import TraceResult
from ..measures.epsilon_sharpness import EpsilonSharpnessResult
from ..measures.random_sharpness import RandomSharpnessResult
from ..measures.result import HEADER, Measurement, MeasureResult
from ..results import Estimate, Outcome, Result, Table, reading_notes

__all__ = ["SharpnessReport"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SharpnessReport(Result):
    """What `sharpness` measured; parts that were not measured are None or empty.

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
        smallest: the smallest (most negative) eigenvalue, from the same products.
        trace: of the Hessian.
        notes: remarks on the computation.
        readings: how many times the data were read again; 0 if they are kept on
            the device.
        gauss_newton_largest: the largest eigenvalue of the Gauss–Newton matrix, without its vector.
        gauss_newton_trace: of the Gauss–Newton matrix.
        density: of the eigenvalues of the Hessian, those of `largest` and `smallest` taken out
            first.
        results: of all measures that are functions of an objective, by name, one for each of their
            settings; `epsilon_sharpness` and `random_sharpness` are among them.

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
    epsilon_sharpness: tuple[EpsilonSharpnessResult, ...]
    random_sharpness: RandomSharpnessResult | None
    largest: EigenResult | None
    smallest: EigenResult | None
    trace: TraceResult | None
    notes: tuple[str, ...]
    readings: int = 0
    gauss_newton_largest: EigenResult | None = None
    gauss_newton_trace: TraceResult | None = None
    density: SpectralDensity | None = None
    results: dict[str, tuple[MeasureResult, ...]] = dataclasses.field(default_factory=dict)

    def measurements(self) -> tuple[Measurement, ...]:
        """Return every number of the report, one in a line."""
        lines = [Measurement("loss L(θ)", self.loss, None, "", None, "1 loss")]
        if self.gradient_norm is not None:
            lines.append(
                Measurement("gradient norm ‖∇L‖", self.gradient_norm, None, "", None, "1 gradient")
            )
        first: dict[str, tuple[MeasureResult, ...]] = {"epsilon_sharpness": self.epsilon_sharpness}
        if self.random_sharpness is not None:
            first["random_sharpness"] = (self.random_sharpness,)
        for results in first.values():
            for result in results:
                lines += result.measurements()
        if self.largest is not None:
            cost = f"{self.largest.products} products"
            lines += _eigen_lines(self.largest, "λ{} largest eigenvalue", cost)
        if self.smallest is not None:
            lines += _eigen_lines(self.smallest, "λₙ smallest eigenvalue", "the same")
        if self.trace is not None:
            cost = f"{self.trace.products} products"
            name = "trace of the Hessian"
            lines.append(_estimate_line(name, self.trace, self.trace.outcome, cost))
        if self.density is not None:
            sums = (
                ("stable rank of the Hessian", self.density.stable_rank()),
                ("negative mass of the Hessian", self.density.negative_mass()),
            )
            cost = f"{self.density.products} products"
            for name, found in sums:
                lines.append(_estimate_line(name, found, self.density.outcome, cost))
                cost = "the same"
        if self.gauss_newton_largest is not None:
            cost = f"{self.gauss_newton_largest.products} products"
            name = "λ{} largest eigenvalue (Gauss–Newton)"
            lines += _eigen_lines(self.gauss_newton_largest, name, cost)
        if self.gauss_newton_trace is not None:
            trace = self.gauss_newton_trace
            name, cost = "trace of the Gauss–Newton matrix", f"{trace.products} products"
            lines.append(_estimate_line(name, trace, trace.outcome, cost))
        for name, others in self.results.items():
            for other in others if name not in first else ():
                lines += other.measurements()
        return tuple(_told_apart(lines))

    def _table(self) -> Table:
        return Table(
            HEADER,
            tuple(line.row for line in self.measurements()),
            title=f"Sharpness of {self.model}: {self.parameters} parameters, "
            f"{self.examples} examples, mode {self.mode!r}",
            notes=reading_notes(self.readings) + self.notes,
        )


def _told_apart(lines: Sequence[Measurement]) -> Iterator[Measurement]:
    """Yield lines whose settings do not show in their names are numbered."""
    seen: Counter[str] = Counter()
    for line in lines:
        seen[line.name] += 1
        number = seen[line.name]
        yield line if number == 1 else dataclasses.replace(line, name=f"{line.name} ({number})")


def _eigen_lines(result: EigenResult, name: str, cost: str) -> list[Measurement]:
    lines = []
    pairs = zip(result.eigenvalues.tolist(), result.residuals.tolist(), strict=True)
    for i, (value, residual) in enumerate(pairs, start=1):
        label = name.format(str(i).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")))
        lines.append(
            Measurement(label, value, residual, "residual", result.outcome, cost if i == 1 else "")
        )
    return lines


def _estimate_line(
    name: str, found: TraceResult | Estimate, outcome: Outcome, cost: str
) -> Measurement:
    return Measurement(name, found.value, found.standard_error, "standard error", outcome, cost)
