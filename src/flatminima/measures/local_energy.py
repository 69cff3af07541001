"""Local energy: the rise of the training error with multiplicative noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch

from ..algorithms.estimators.probes import mean_and_spread
from ..errors import ArgumentTypeError, InvalidArgumentError
from ..objective.objective import Objective, check_objective
from ..results import Outcome, Table, format_number
from ..support.checks import check_integer, check_positive
from ..support.precision import precision_notes
from ..support.progress import progress_bar
from ..support.randomness import Seed
from .noise import NoisyRise
from .result import Measurement, MeasureResult

__all__ = ["LocalEnergyResult", "local_energy"]

SIGMAS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LocalEnergyResult(MeasureResult):
    """The mean rise of the error at each size of multiplicative noise.

    Attributes:
        value: the mean of the curve over σ from 0 to the largest, by the trapezoid rule.
        standard_error: standard error of `value`, from the spread of the draws.
        sigmas: σ, ascending.
        rises: E error(θ + σ z ⊙ θ) − error(θ) at each σ.
        standard_errors: standard errors of `rises`.
        on: "error" or "loss".
        base: the error or the loss at θ.
        samples: number of draws of z, the same at every σ.
        evaluations: number of passes over the data.
        outcome: completed; not finite at some points; or below rounding, if all rises are within
            the rounding of the loss.
        readings: how many times the data were read again; 0 if they are kept on the device.
        notes: remarks on the computation.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = torch.eye(2), torch.zeros(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> fm.local_energy(objective, on="loss").sigmas[-1]
        0.5
    """

    value: float
    standard_error: float
    sigmas: tuple[float, ...]
    rises: tuple[float, ...]
    standard_errors: tuple[float, ...]
    on: str
    base: float
    samples: int
    evaluations: int
    outcome: Outcome
    readings: int = 0
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the measure, with its settings."""
        sizes = f"≤ {self.sigmas[-1]:g}"
        if self.sigmas != SIGMAS:
            sizes = "= " + ", ".join(f"{s:g}" for s in self.sigmas)
        return f"local energy ({self.on}), σ {sizes}"

    def measurements(self) -> tuple[Measurement, ...]:
        """Return the mean of the curve as one line of a report."""
        return self._line(
            self.name, f"{self.evaluations} losses", self.standard_error, "standard error"
        )

    def _table(self) -> Table:
        curve = zip(self.sigmas, self.rises, self.standard_errors, strict=True)
        return Table(
            header=("σ", f"rise of the {self.on}", "standard error"),
            rows=(
                ("mean", format_number(self.value), format_number(self.standard_error, 2)),
                *((f"{s:g}", format_number(r), format_number(e, 2)) for s, r, e in curve),
            ),
            title=f"Local energy, {self.samples} draws, {self.on} at θ {format_number(self.base)}",
            notes=self._make_notes(),
        )


def local_energy(
    objective: Objective,
    *,
    sigmas: Sequence[float] = SIGMAS,
    on: Literal["error", "loss"] = "error",
    samples: int = 20,
    seed: Seed = 0,
    progress: bool = True,
) -> LocalEnergyResult:
    """Estimate the rise of the training error under noise proportional to each parameter.

    δE(σ) = E error(θ + σ z ⊙ θ) − error(θ) with z ~ N(0, I) is low in wide valleys (Pittorino et
    al. 2021, arXiv:2006.07897; Baldassi et al. 2020, doi:10.1073/pnas.1908636117). The value
    returned is the mean of the curve over σ: a curve that rises later counts as flatter. The same
    draws are used for every σ.

    Args:
        objective: a classifier with `loss_fn` on its training data; with on="loss" any objective.
        sigmas: sizes of the noise, relative to each parameter.
        on: "error", the fraction of wrong labels, or "loss".
        samples: number of draws of z, at least 2.
        seed: seed of the draws.
        progress: show a bar if it takes long.

    Returns:
        The curve, with a standard error at each σ, and its mean.

    Raises:
        InvalidArgumentError: a σ is not positive or given twice, there are too few samples, a
            tensor is all zeros, or on="error" is used for a model that is not a classifier.
        NonFiniteError: L(θ) is NaN or infinite.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = 2 * torch.eye(2), 2 * torch.ones(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> result = fm.local_energy(objective, on="loss", samples=2000, sigmas=[0.1, 0.2])
        >>> [round(r, 2) for r in result.rises]  # ½ σ² Σ θ_i² H_ii
        [0.04, 0.16]
    """
    call = "local_energy"
    check_objective(call, objective)
    sizes = _check_sigmas(call, sigmas)
    check_integer(call, "samples", samples, low=2)
    before = objective.batches.readings
    rise = NoisyRise(call, objective, on=on, adaptive=True, samples=samples, seed=seed)
    total = len(sizes) * samples
    with progress_bar("local energy", total=total, unit="loss", show=progress) as bar:
        rises = np.array([rise.measure(sigma, bar.update).numpy() for sigma in sizes])
    # The curve begins at the origin.
    steps = np.diff(sizes, prepend=0.0)
    weights = (steps + np.append(steps[1:], 0.0)) / 2 / sizes[-1]
    value, error = (float(part) for part in mean_and_spread(torch.from_numpy(weights @ rises)))
    means, errors = mean_and_spread(torch.from_numpy(rises.T))
    outcome = Outcome.COMPLETED
    if not np.isfinite(rises).all():
        outcome = Outcome.NON_FINITE_POINTS
    elif np.abs(rises).max() <= rise.resolution:
        outcome = Outcome.BELOW_ROUNDING
    return LocalEnergyResult(
        value=value,
        standard_error=error,
        sigmas=sizes,
        rises=tuple(means.tolist()),
        standard_errors=tuple(errors.tolist()),
        on=on,
        base=rise.base,
        samples=samples,
        evaluations=rise.evaluations,
        outcome=outcome,
        readings=objective.batches.readings - before,
        notes=precision_notes(objective.model, objective.device),
    )


def _check_sigmas(call: str, sigmas: object) -> tuple[float, ...]:
    """Return `sigmas` in ascending order, if they are positive and different."""
    if isinstance(sigmas, str) or not isinstance(sigmas, Iterable):
        raise ArgumentTypeError(
            f"The 'sigmas' argument of {call} must be a list of numbers; got {sigmas!r}."
        )
    sizes = sorted(check_positive(call, "sigmas", s) for s in sigmas)
    if not sizes or len(set(sizes)) < len(sizes):
        raise InvalidArgumentError(
            f"The 'sigmas' argument of {call} must hold one or more different numbers; got "
            f"{sigmas!r}."
        )
    return tuple(sizes)
