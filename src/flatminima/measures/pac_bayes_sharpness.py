"""PAC-Bayes sharpness: how much noise a classifier tolerates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import numpy as np
from torch import Tensor

from ..algorithms.estimators.probes import mean_and_spread
from ..errors import InvalidArgumentError
from ..objective.objective import Objective, check_objective
from ..results import Outcome, Table, format_number
from ..support.checks import check_integer, check_positive
from ..support.precision import precision_notes
from ..support.progress import progress_bar
from ..support.randomness import Seed
from .noise import NoisyRise
from .result import Measurement, MeasureResult

__all__ = ["PacBayesResult", "pac_bayes_sharpness"]

DOUBLINGS, HALVINGS = 12, 30
"""Limits, from the first σ. Beyond 400 times the size of the parameters, these hardly matter and
the error rises no further; towards zero there is no such end."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PacBayesResult(MeasureResult):
    """The largest noise that raises the error by no more than a target.

    Attributes:
        value: 1 / σ².
        standard_error: standard error of `value`, due to the small number of draws; NaN if it is
            unknown.
        sigma: σ.
        sigma_error: standard error of `sigma`.
        upper: the smallest σ found to be too large, an upper bound of σ; infinity if there is
            none.
        rise: the mean rise at σ, at most the target.
        target: the rise that is allowed.
        on: "error" or "loss".
        base: the error or the loss at θ.
        adaptive: whether the noise is proportional to |θ|.
        samples: number of draws of the noise.
        sigmas: every σ that was tried, ascending.
        rises: the mean rise at each σ.
        evaluations: number of passes over the data.
        outcome: completed; not reached, if no σ tried was too large, or none small enough; or
            below rounding, if the target is not larger than the rounding error of the loss.
        readings: how many times the data were read again; 0 if they are kept on the device.
        notes: remarks on the computation.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = torch.eye(2), torch.zeros(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> result = fm.pac_bayes_sharpness(objective, on="loss")
        >>> result.rise <= 0.1 < result.rises[result.sigmas.index(result.upper)]
        True
    """

    value: float
    standard_error: float
    sigma: float
    sigma_error: float
    upper: float
    rise: float
    target: float
    on: str
    base: float
    adaptive: bool
    samples: int
    sigmas: tuple[float, ...]
    rises: tuple[float, ...]
    evaluations: int
    outcome: Outcome
    readings: int = 0
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the measure, with its settings."""
        how = "magnitude-aware PAC-Bayes" if self.adaptive else "PAC-Bayes"
        return f"{how} sharpness 1/σ², {self.on} + {self.target:g}"

    def measurements(self) -> tuple[Measurement, ...]:
        """Return 1 / σ² as one line of a report."""
        error = None if math.isnan(self.standard_error) else self.standard_error
        return self._line(self.name, f"{self.evaluations} losses", error, "standard error")

    def _table(self) -> Table:
        return Table(
            header=("quantity", "value", "standard error"),
            rows=(
                (
                    "sharpness 1/σ²",
                    format_number(self.value),
                    format_number(self.standard_error, 2),
                ),
                ("σ", format_number(self.sigma), format_number(self.sigma_error, 2)),
                (f"mean rise of the {self.on} at σ", format_number(self.rise), ""),
                (f"{self.on} at θ", format_number(self.base), ""),
            ),
            title=self.name[0].upper() + self.name[1:],
            notes=self._make_notes(f"{len(self.sigmas)} values of σ, {self.samples} draws each."),
        )


def pac_bayes_sharpness(
    objective: Objective,
    *,
    target: float = 0.1,
    on: Literal["error", "loss"] = "error",
    adaptive: bool = False,
    samples: int = 20,
    tol: float = 0.01,
    seed: Seed = 0,
    progress: bool = True,
) -> PacBayesResult:
    """Estimate 1 / σ² for the largest Gaussian noise that raises the error by at most `target`.

    σ = max { σ : E error(θ + σ c ⊙ z) − error(θ) ≤ target }, z ~ N(0, I) (Jiang et al. 2020,
    arXiv:1912.02178, where 1 / σ² is the sharpness in PAC-Bayes bounds). c is 1, or with
    `adaptive` |θ| element by element: the magnitude-aware variant, without the small constant that
    the paper adds to keep zeros moving.

    The expectation uses the same draws of z for every σ, so the rise changes smoothly with σ.
    Starting from a tenth of the parameters' root mean square (with `adaptive` from 0.1), σ is
    doubled or halved until the target is crossed. The crossing is then enclosed by bisection of
    log σ. If the rise is not monotone, it is one of several crossings.

    Args:
        objective: a classifier with `loss_fn` on its training data; with on="loss" any objective.
        target: the rise that is allowed; 0.1 is ten percentage points of error.
        on: "error", the fraction of wrong labels, or "loss".
        adaptive: make the noise proportional to |θ|. Parameters that are zero do not move.
        samples: number of draws of z, at least 2.
        tol: relative width of the last bracket of σ, below 1.
        seed: seed of the draws.
        progress: show a bar if it takes long.

    Returns:
        1 / σ² and σ, with errors due to the small number of draws, and every σ that was tried.

    Raises:
        InvalidArgumentError: `target` or `tol` is out of range, there are too few samples,
            `adaptive` meets a tensor of zeros, or on="error" is used for a model that is not a
            classifier.
        NonFiniteError: L(θ) is NaN or infinite.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> x = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), (x, torch.zeros(2, 1)))
        >>> result = fm.pac_bayes_sharpness(objective, on="loss", samples=1000)
        >>> abs(result.value - 0.5 * (4 + 16) / 0.1) < 3 * result.standard_error  # tr H / 2 target
        True
    """
    call = "pac_bayes_sharpness"
    check_objective(call, objective)
    target = check_positive(call, "target", target)
    tol = check_positive(call, "tol", tol)
    if tol >= 1:
        raise InvalidArgumentError(f"The 'tol' argument of {call} must be below 1; got {tol!r}.")
    check_integer(call, "samples", samples, low=2)
    before = objective.batches.readings
    rise = NoisyRise(call, objective, on=on, adaptive=adaptive, samples=samples, seed=seed)
    # Adaptive noise is already relative to the parameters; otherwise their size sets the start.
    start = 0.1
    if not adaptive:
        start *= float(objective.point().double().square().mean().sqrt()) or 1.0
    tried: dict[float, Tensor] = {}
    with progress_bar("PAC-Bayes sharpness", total=None, unit="loss", show=progress) as bar:

        def too_large(sigma: float) -> bool:
            tried[sigma] = rise.measure(sigma, bar.update)
            bar.set_postfix_str(f"σ = {sigma:.3g}", refresh=False)
            # Not ">", since NaN must count as too large.
            return not _mean(tried[sigma]) <= target

        low, high = _find_bracket(too_large, start)
        while low > 0 and high < math.inf and high > (1 + tol) * low:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if too_large(middle) else (middle, high)
    sigmas = sorted(tried)
    reached = low > 0 and high < math.inf
    # If none was small enough, the smallest one is an upper bound of σ.
    sigma = low if low > 0 else high
    error = _estimate_error(tried, sigma, target) if reached else math.nan
    outcome = Outcome.COMPLETED if reached else Outcome.NOT_REACHED
    if target <= rise.resolution:
        outcome = Outcome.BELOW_ROUNDING
    return PacBayesResult(
        value=sigma**-2,
        standard_error=2 * error / sigma**3,
        sigma=sigma,
        sigma_error=error,
        upper=high,
        rise=_mean(tried[sigma]),
        target=target,
        on=on,
        base=rise.base,
        adaptive=adaptive,
        samples=samples,
        sigmas=tuple(sigmas),
        rises=tuple(_mean(tried[s]) for s in sigmas),
        evaluations=rise.evaluations,
        outcome=outcome,
        readings=objective.batches.readings - before,
        notes=precision_notes(objective.model, objective.device),
    )


def _find_bracket(too_large: Callable[[float], bool], start: float) -> tuple[float, float]:
    """Return a small enough σ, or 0 if there is none, and twice that σ, too large, or infinity."""
    if too_large(start):
        high = start
        for _ in range(HALVINGS):
            if not too_large(high / 2):
                return high / 2, high
            high /= 2
        return 0.0, high
    low = start
    for _ in range(DOUBLINGS):
        if too_large(2 * low):
            return low, 2 * low
        low *= 2
    return low, math.inf


def _mean(rises: Tensor) -> float:
    return float(rises.mean())


def _estimate_error(tried: dict[float, Tensor], sigma: float, target: float) -> float:
    """Return the standard error of σ: that of the rise, divided by the slope near the target.

    The slope is that of a power law in σ, fitted to the points around the target.
    """
    points = [(s, _mean(r)) for s, r in tried.items()]
    near = [(math.log(s), math.log(r)) for s, r in points if target / 3 <= r <= 3 * target]
    if len(near) < 2:
        return math.nan
    x, y = np.array(near).T
    power = float(np.polyfit(x - x.mean(), y, 1)[0])
    if power <= 0:
        return math.nan
    _, error = mean_and_spread(tried[sigma])
    return sigma * float(error) / (power * target)
