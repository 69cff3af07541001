"""Line search of Moré and Thuente along one direction; it sees numbers, never vectors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

__all__ = ["LineSearch"]

DECREASE = 1e-3
CURVATURE = 0.9
INTERVAL = 0.1
"""The tolerances of L-BFGS-B: sufficient decrease, slope, and relative width of the interval."""


@dataclasses.dataclass
class _Trial:
    """A step with the function's value and slope there."""

    step: float
    value: float
    slope: float

    def tilted(self, slope: float) -> _Trial:
        """Return the same of the function minus a line of that slope."""
        return _Trial(self.step, self.value - self.step * slope, self.slope - slope)


class LineSearch:
    """A step with sufficient decrease and a smaller slope, from a first step of 1.

    The algorithm is that of Moré and Thuente 1994 (doi:10.1145/192115.192132) as MINPACK-2's
    `dcsrch` runs it within L-BFGS-B: an interval with a minimiser of
    f(a) − f(0) − DECREASE · a · f'(0), later of f, is narrowed by cubic and quadratic
    interpolation.

    Attributes:
        step: where value and slope are wanted next; the step taken, once `advance` says so.
    """

    def __init__(self, value: float, slope: float, longest: Callable[[], float]) -> None:
        """Begin at step zero, with a negative slope; `longest` gives the longest step allowed."""
        self.step = 1.0
        self._origin = _Trial(0.0, value, slope)
        self._best = self._other = self._origin
        self._low, self._high = 0.0, 5.0
        self._bracketed = False
        self._first_stage = True
        self._find_longest = longest
        self._longest: float | None = None
        self._widths = (math.inf, math.inf)

    def advance(self, value: float, slope: float) -> bool:
        """Take value and slope at `step`; True when it is the step to take, else it is moved."""
        trial = _Trial(self.step, value, slope)
        tilt = DECREASE * self._origin.slope
        enough = self._origin.value + trial.step * tilt
        if value <= enough and abs(slope) <= -CURVATURE * self._origin.slope:
            return True
        if self._longest is None:
            # It takes a pass over the vectors, which the first step mostly makes unnecessary.
            self._longest = self._find_longest()
            self._widths = (self._longest, 2 * self._longest)
        if value <= enough and slope >= 0:
            self._first_stage = False
        at_end = trial.step == self._longest and value <= enough and slope <= tilt
        if at_end or trial.step == 0 or self._exhausted(trial.step):
            return True
        if self._first_stage and enough < value <= self._best.value:
            best, other = self._best.tilted(tilt), self._other.tilted(tilt)
            best, other, step = self._narrowed(best, other, trial.tilted(tilt))
            self._best, self._other = best.tilted(-tilt), other.tilted(-tilt)
        else:
            self._best, self._other, step = self._narrowed(self._best, self._other, trial)
        self._choose(step)
        return False

    def _exhausted(self, step: float) -> bool:
        """Return whether the interval is too narrow to go on."""
        if not self._bracketed:
            return False
        width = self._high - self._low
        return not self._low < step < self._high or width <= INTERVAL * self._high

    def _choose(self, step: float) -> None:
        """The next step, from the one that interpolation proposes."""
        best, other = self._best.step, self._other.step
        if self._bracketed:
            width = abs(other - best)
            if width >= 0.66 * self._widths[1]:
                step = best + 0.5 * (other - best)
            self._widths = (width, self._widths[0])
            self._low, self._high = min(best, other), max(best, other)
        else:
            self._low = step + 1.1 * (step - best)
            self._high = step + 4.0 * (step - best)
        longest = math.inf if self._longest is None else self._longest
        step = min(max(step, 0.0), longest)
        self.step = best if self._exhausted(step) else step

    def _narrowed(self, best: _Trial, other: _Trial, trial: _Trial) -> tuple[_Trial, _Trial, float]:
        """Return the interval with `trial` taken in, and the next step (MINPACK-2's `dcstep`)."""
        towards = trial.step - best.step
        turned = trial.slope * math.copysign(1.0, best.slope) < 0
        if trial.value > best.value:
            # A higher value: the minimum is bracketed.
            cubic = _cubic(best, trial)
            secant = (best.value - trial.value) / towards + best.slope
            square = best.step + best.slope / secant / 2 * towards
            nearer = abs(cubic - best.step) < abs(square - best.step)
            step = cubic if nearer else cubic + (square - cubic) / 2
            self._bracketed = True
        elif turned:
            # A lower value and a slope of the other sign: the minimum is bracketed.
            cubic = _cubic(trial, best)
            secant = trial.step + trial.slope / (trial.slope - best.slope) * -towards
            step = cubic if abs(cubic - trial.step) > abs(secant - trial.step) else secant
            self._bracketed = True
        elif abs(trial.slope) < abs(best.slope):
            step = self._along_falling_slope(best, other, trial)
        elif self._bracketed:
            step = _cubic(trial, other)
        else:
            step = self._high if towards > 0 else self._low
        if trial.value > best.value:
            return best, trial, step
        return trial, best if turned else other, step

    def _along_falling_slope(self, best: _Trial, other: _Trial, trial: _Trial) -> float:
        """Return the next step after a lower value with a smaller slope of the same sign."""
        forward = trial.step > best.step
        secant = trial.step + trial.slope / (trial.slope - best.slope) * (best.step - trial.step)
        cubic = _cubic(trial, best, beyond=(self._low, self._high))
        nearer = abs(cubic - trial.step) < abs(secant - trial.step)
        if not self._bracketed:
            return max(min(secant if nearer else cubic, self._high), self._low)
        step = cubic if nearer else secant
        limit = trial.step + 0.66 * (other.step - trial.step)
        return min(limit, step) if forward else max(limit, step)


def _cubic(a: _Trial, b: _Trial, beyond: tuple[float, float] | None = None) -> float:
    """Return the minimiser of the cubic with the values and slopes of a and b.

    With `beyond` it is wanted on the far side of a, seen from b; where the cubic has none there,
    the end of that interval on this side stands for it.
    """
    theta = 3 * (b.value - a.value) / (a.step - b.step) + a.slope + b.slope
    size = max(abs(theta), abs(a.slope), abs(b.slope)) or 1.0
    square = (theta / size) ** 2 - (a.slope / size) * (b.slope / size)
    root = size * math.sqrt(max(0.0, square))
    if a.step > b.step:
        root = -root
    curvature = ((root - a.slope) + root) + b.slope
    ratio = ((root - a.slope) + theta) / curvature if curvature else 0.5
    if beyond is None or (ratio < 0 and root != 0):
        return a.step + ratio * (b.step - a.step)
    return beyond[1] if a.step > b.step else beyond[0]
