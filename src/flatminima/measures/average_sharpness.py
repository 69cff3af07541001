"""The average rise of the loss under Gaussian noise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..algorithms.estimators.probes import mean_and_spread
from ..algorithms.estimators.stopping import (
    check_rtol,
    choose_outcome,
    conclude,
    is_precise,
    schedule_looks,
)
from ..errors import ConvergenceError, ConvergenceWarning, warn
from ..objective.derived import with_normalized_logits
from ..objective.objective import Objective, check_objective
from ..results import Outcome, Table, format_number
from ..support.checks import check_integer, check_positive
from ..support.precision import precision_notes, resolution
from ..support.progress import progress_bar
from ..support.randomness import Seed
from .noise import Noise, compute_magnitudes
from .result import Measurement, MeasureResult

__all__ = ["AverageSharpnessResult", "average_sharpness"]

SAMPLES = 50
"""Default number of samples."""
LIMIT = 1000
"""Default limit of samples with `rtol`."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AverageSharpnessResult(MeasureResult):
    """The mean rise of the loss under noise.

    Attributes:
        value: E L(θ + σ c ⊙ z) − L(θ).
        standard_error: standard error of `value`, from the spread of the samples and the rounding
            of L(θ), which all of them share.
        resolution: size up to which a value may be rounding of the loss.
        loss: L(θ).
        sigma: σ.
        adaptive: whether c = |θ|.
        samples: number of draws of z, each used with both signs.
        normalize_logits: whether the logits were normalised.
        evaluations: number of evaluations of the loss.
        outcome: completed, within `rtol` or above it, or why the value should not be trusted.
        readings: how many times the data were read again; 0 if they are kept on the device.
        notes: remarks on the computation.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = torch.eye(2), torch.zeros(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> result = fm.average_sharpness(objective, sigma=0.1, rtol=0.1)
        >>> print(result.outcome.brief, abs(result.value - 0.01) < 3 * result.standard_error)
        within rtol True
    """

    value: float
    standard_error: float
    resolution: float
    loss: float
    sigma: float
    adaptive: bool
    samples: int
    normalize_logits: bool
    evaluations: int
    outcome: Outcome
    readings: int = 0
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the measure, with its settings."""
        how = "adaptive average" if self.adaptive else "average"
        logits = ", normalised logits" if self.normalize_logits else ""
        return f"{how} sharpness, σ = {self.sigma:g}{logits}"

    def measurements(self) -> tuple[Measurement, ...]:
        """Return the mean rise as one line of a report."""
        return self._line(
            self.name, f"{self.evaluations} losses", self.standard_error, "standard error"
        )

    def _table(self) -> Table:
        return Table(
            header=("quantity", "value", "standard error"),
            rows=(
                ("mean rise", format_number(self.value), format_number(self.standard_error, 2)),
                ("loss L(θ)", format_number(self.loss), ""),
                ("losses evaluated", str(self.evaluations), ""),
            ),
            title=self.name[0].upper() + self.name[1:],
            notes=self._make_notes(),
        )


def average_sharpness(
    objective: Objective,
    *,
    sigma: float = 0.01,
    adaptive: bool = False,
    samples: int | None = None,
    rtol: float | None = None,
    normalize_logits: bool = False,
    strict: bool = False,
    seed: Seed = 0,
    progress: bool = True,
) -> AverageSharpnessResult:
    """Estimate the mean rise of the loss under noise: E L(θ + σ c ⊙ z) − L(θ), z ~ N(0, I).

    c is 1, or with `adaptive` |θ| element by element, which makes the measure unchanged by
    rescaling (Andriushchenko et al. 2023, arXiv:2302.07011, average-case sharpness). To second
    order it is ½ σ² Σ c_i² H_ii, exactly so for a quadratic loss. Unlike the trace, it needs no
    derivatives.

    Every z is used with both signs, and the mean of the two losses is one sample. The gradient,
    which would cause most of the noise, thus cancels (antithetic variables).

    With `rtol`, sampling continues until the relative standard error is within it. The error is
    tested after 24 samples, then after 1.5 times as many, and so on, by the rule of `trace`, which
    a standard error or a value that is off by chance rarely satisfies early.

    Args:
        objective: the objective to evaluate.
        sigma: σ, the standard deviation of the noise; with `adaptive` relative to each parameter.
        adaptive: make the noise proportional to |θ|. Parameters that are zero do not move.
        samples: number of draws, at least 2, each of two losses; with `rtol` their limit.
            Default: 50, with `rtol` 1000.
        rtol: the relative standard error to reach.
        normalize_logits: for cross-entropy, first divide the logits of each example by their
            standard deviation. Without this, a classifier that is more confident of the same
            labels looks flatter (Andriushchenko et al. 2023, section 3).
        strict: raise instead of warn if `rtol` is not reached.
        seed: seed of the draws.
        progress: show a bar if it takes long.

    Returns:
        The mean with its standard error.

    Raises:
        InvalidArgumentError: σ ≤ 0, there are too few samples, `rtol` is outside (0, 1),
            `adaptive` meets a tensor of zeros, or `normalize_logits` meets a loss other than
            cross-entropy.
        NonFiniteError: L(θ) is NaN or infinite.
        ConvergenceError: with `strict`, when the limit is reached.

    Warns:
        ConvergenceWarning: the limit was reached before the error was within `rtol`.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), (x, torch.zeros(2, 1)))
        >>> result = fm.average_sharpness(objective, sigma=0.1, samples=1000)
        >>> abs(result.value - 0.5 * 0.1**2 * (4 + 16)) < 3 * result.standard_error < 0.02
        True
    """
    call = "average_sharpness"
    check_objective(call, objective)
    sigma = check_positive(call, "sigma", sigma)
    if samples is not None:
        check_integer(call, "samples", samples, low=2)
    rtol = check_rtol(call, rtol)
    limit = (SAMPLES if rtol is None else LIMIT) if samples is None else samples
    scale = compute_magnitudes(call, objective, adaptive=adaptive)
    before = objective.batches.readings
    if normalize_logits:
        objective = with_normalized_logits(call, objective)
    loss = objective.loss()
    smallest = resolution(objective.model, objective.device, loss)
    draws = Noise(objective, scale, seed).draws(limit)

    def pairs(count: int) -> Iterator[Tensor]:
        for _ in range(count):
            z = next(draws).mul_(sigma)
            for displacement in (z, -z):
                bar.update()
                yield displacement

    rises = torch.empty(0, dtype=torch.float64)
    done = rtol is None
    with progress_bar("average sharpness", total=2 * limit, unit="loss", show=progress) as bar:
        for count in schedule_looks(limit, rtol)[0]:
            found = objective.losses_at(pairs(count - len(rises)))
            losses = torch.tensor(found, dtype=torch.float64)
            rises = torch.cat([rises, losses.view(-1, 2).mean(dim=1) - loss])
            value, error = map(float, mean_and_spread(rises))
            error = math.hypot(error, smallest / 4)
            if rtol is not None and is_precise(value, error, count, rtol):
                done = True
                break
    outcome = choose_outcome(exact=False, done=done, rtol=rtol)
    if not torch.isfinite(rises).all():
        outcome = Outcome.NON_FINITE_POINTS
    elif abs(value) <= smallest:
        outcome = Outcome.BELOW_ROUNDING
    result = AverageSharpnessResult(
        value=value,
        standard_error=error,
        resolution=smallest,
        loss=loss,
        sigma=sigma,
        adaptive=adaptive,
        samples=len(rises),
        normalize_logits=normalize_logits,
        evaluations=2 * len(rises) + 1,
        outcome=outcome,
        readings=objective.batches.readings - before,
        notes=precision_notes(objective.model, objective.device),
    )
    said = f"{value:.4g} ± {error:.2g}"
    if rtol is not None and outcome.doubtful and outcome is not Outcome.ABOVE_RTOL:
        message = f"{call}: the error is not known to be within rtol={rtol:g}. {outcome.value}"
        if strict:
            raise ConvergenceError(message, result)
        warn(message, ConvergenceWarning)
    return conclude(call, result, said, rtol, spent=len(rises), unit="samples", strict=strict)
