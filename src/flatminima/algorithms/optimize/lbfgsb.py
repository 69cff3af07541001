"""L-BFGS-B on the device: minimisation over the unit box."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...results import Outcome
from .cauchy import ProjectedPath
from .chunks import Chunks, inner_products, places, summed
from .line_search import LineSearch
from .pairs import Pairs

__all__ = ["LBFGSB"]

MEMORY = 10
TRIALS = 20
"""Pairs that are remembered, and trials in a line search: SciPy's numbers."""

FEW = 1 / 64
BLOCK = 2**12
"""Share of a chunk up to which the variables that stop or go on are picked out of it, and how
many of them are gathered at a time."""

Function = Callable[[Tensor], tuple[float, Tensor]]


@dataclasses.dataclass(frozen=True)
class _Found:
    """What a line search came to: step, value, gradient, and the slot for the new pair."""

    step: float
    value: float
    gradient: Tensor
    slot: int


class LBFGSB:
    """L-BFGS-B over { u : |u_i| ≤ 1 } (Byrd, Lu, Nocedal, Zhu 1995, doi:10.1137/0916069).

    It makes the iterates of version 3.0 of the authors' code, with the projected subspace step of
    Morales and Nocedal 2011 (doi:10.1145/2049662.2049669), up to rounding. Vectors stay on their
    device and in their type. They are gone through in chunks, so that a chunk is read once for
    all that is to be done with it, and sums over the chunks are added up in float64. Small
    matrices and a few scalars come to the host. With m pairs it holds 2m + 4 vectors.

    Attributes:
        point: (n,), where `minimize` starts, and where it has come to.
    """

    def __init__(self, size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        """At the centre of the box."""
        self.point = torch.zeros(size, dtype=dtype, device=device)
        # The breakpoints of the projected path, and then the point that the line search aims at.
        self._work = torch.empty_like(self.point)
        self._gradient: Tensor
        # One where a variable was stopped at the last Cauchy point, else zero.
        self._stopped = torch.zeros_like(self.point)
        self._pairs = Pairs(MEMORY, size, dtype=dtype, device=device)
        # dᵀd and Wᵀd of the steepest feasible direction d.
        self._energy = 0.0
        self._steepest = torch.zeros(0, dtype=torch.float64)
        # A variable at a bound, and without a slope there, counts as stopped. It does so by
        # itself when this is added to all slopes, outwards; any other slope absorbs it.
        self._outwards = torch.finfo(dtype).tiny ** 0.8
        self._chunks = Chunks(size, dtype=dtype, device=device)

    def minimize(self, function: Function, iterations: int) -> tuple[Outcome, int]:
        """Go down from `point`.

        Args:
            function: u → value and gradient. It must not change u; the gradient is overwritten.
            iterations: at most.

        Returns:
            Why it stopped, one of ITERATION_LIMIT, STATIONARY and UNBOUNDED (a value or gradient
            that is not finite), and the number of iterations.
        """
        self._pairs.forget()
        value, self._gradient = function(self.point)
        steepest = float(torch.linalg.vector_norm(self._gradient, math.inf))
        if not (math.isfinite(value) and math.isfinite(steepest)):
            return Outcome.UNBOUNDED, 0
        self._gradient.sub_(self.point, alpha=self._outwards)
        done = 0
        while True:
            remembered = len(self._pairs)
            slope = self._aim()
            found = self._search(function, value, slope, done) if slope < 0 else None
            if found is None:
                if not remembered:
                    return Outcome.STATIONARY, done
                self._pairs.forget()
            elif not math.isfinite(found.value):
                return Outcome.UNBOUNDED, done
            elif done + 1 == iterations:
                return Outcome.ITERATION_LIMIT, iterations
            else:
                done += 1
                if found.value >= value:
                    return Outcome.STATIONARY, done
                value = found.value
                if not self._accept(found, -slope * found.step):
                    self._pairs.forget()

    def _search(self, function: Function, value: float, slope: float, done: int) -> _Found | None:
        """A step towards the aim that is good enough, or None; NaN where it met no number."""
        search = LineSearch(value, slope, self._longest_step if done else lambda: 1.0)
        slot = self._pairs.open()
        for _ in range(TRIALS):
            reached, gradient = function(self._trial(search.step, slot))
            there = self._slope(gradient)
            if not (math.isfinite(reached) and math.isfinite(there)):
                return _Found(search.step, math.nan, gradient, slot)
            if search.advance(reached, there):
                return _Found(search.step, reached, gradient, slot)
            # Two gradients at a time are enough.
            del gradient
        return None

    def _trial(self, step: float, slot: int) -> Tensor:
        """Return the point at a step from `point` (0) towards the aim (1) or beyond."""
        if step == 1:
            return self._work
        room = self._pairs.columns[slot, 1]
        return torch.lerp(self.point, self._work, step, out=room).clamp_(-1, 1)

    def _slope(self, gradient: Tensor) -> float:
        """Return the slope that a gradient has towards the aim."""
        parts = []
        for part in self._chunks:
            way = torch.sub(self._work[part], self.point[part], out=self._chunks.room(part)[0])
            parts.append(torch.dot(way, gradient[part]))
        return float(summed(parts))

    def _longest_step(self) -> float:
        """Return how far the box reaches towards the aim and beyond, in units of the way to it."""
        shares = []
        for part in self._chunks:
            point = self.point[part]
            shares.append(_shares(point, self._work[part] - point).amax())
        return 1 / float(torch.stack(shares).amax())

    def _accept(self, found: _Found, promised: float) -> bool:
        """Move to the trial that was found, and prepare for the next Cauchy point.

        Args:
            found: by the line search.
            promised: see `Pairs.store`.

        Returns:
            Whether the pairs can be kept.
        """
        rows = self._pairs.rows
        products, squares = [], []
        for part in self._chunks:
            old, new, stopped = self.point[part], self._work[part], self._stopped[part]
            y, s = self._pairs.columns[found.slot, :, part]
            slopes, vectors = found.gradient[part], self._chunks.room(part)
            whole, moving, free_y, free_s = vectors
            torch.sub(new, old, out=whole)
            if found.step != 1:
                whole.mul_(found.step)
                torch.lerp(old, new, found.step, out=new).clamp_(-1, 1)
            slopes.sub_(new, alpha=self._outwards)
            s.copy_(whole)
            torch.addcmul(whole, whole, stopped, value=-1, out=free_s)
            torch.sub(slopes, self._gradient[part], out=y)
            squares.append(torch.dot(y, y))
            torch.addcmul(y, y, stopped, value=-1, out=free_y)
            # The breakpoints, room in the direction −g over |g|, take the place of the old point.
            times = torch.sign(slopes, out=old).add_(new).div_(slopes)
            torch.gt(times, 0, out=moving).mul_(slopes)
            squares.append(torch.dot(moving, moving))
            products.append(inner_products(rows[:, part], vectors))
        self.point, self._work, self._gradient = self._work, self.point, found.gradient
        scalars = torch.cat([summed(squares[0::2]), summed(squares[1::2]), summed(products)])
        scalars = scalars.cpu().double()
        sums = scalars[2:].view(-1, 4)
        self._energy, self._steepest = float(scalars[1]), -sums[:, 1]
        return self._pairs.store(found.slot, sums[:, [0, 2, 3]], float(scalars[0]), promised)

    def _aim(self) -> float:
        """Find where to search, by the quadratic model; the slope there is negative if it can."""
        pairs = self._pairs
        if not len(pairs):
            return self._aim_at(None)
        if self._energy == 0:
            return 0.0
        path = ProjectedPath(
            self._work,
            self._gradient,
            pairs.rows,
            self._chunks,
            middle=pairs.middle,
            theta=pairs.theta,
        )
        cauchy = path.first_minimiser(self._energy, self._steepest)
        self._stop(cauchy.time)
        bent = pairs.middle @ cauchy.moved
        reduced = (1 - pairs.theta * cauchy.time) * cauchy.slope + pairs.free @ bent
        step = pairs.newton_step(reduced)
        if step is None:
            return math.inf
        coefficients = (bent + step / pairs.theta) / pairs.theta
        slope = self._aim_at(coefficients)
        if slope > 0:
            slope = self._aim_within(coefficients, cauchy.time)
        return slope

    def _stop(self, time: float) -> None:
        """Take note of the variables that have stopped at the Cauchy point."""
        rows, changes, few = self._pairs.rows, [], []
        for part in self._chunks:
            stopped, (now, signs, *_) = self._stopped[part], self._chunks.room(part)
            torch.le(self._work[part], time, out=now)
            torch.sub(stopped, now, out=signs)
            if float(torch.dot(signs, signs)) <= FEW * len(now):
                few.append(places(signs.abs_()).add_(part.start))
                continue
            stopped.copy_(now)
            columns = rows[:, part]
            halves = [inner_products(half * signs, columns) for half in columns.chunk(2)]
            changes.append(torch.cat(halves))
        for changed in torch.split(torch.cat(few), BLOCK) if few else ():
            before, columns = self._stopped.index_select(0, changed), rows.index_select(1, changed)
            changes.append(inner_products(columns * (2 * before - 1), columns))
            self._stopped.index_copy_(0, changed, 1 - before)
        if changes:
            self._pairs.free.add_(summed(changes).view(len(rows), -1).cpu())

    def _newton(self, part: slice, coefficients: Tensor | None, out: Tensor) -> Tensor:
        """Return the minimiser of the model over the free variables as if there were no bounds."""
        point, gradient = self.point[part], self._gradient[part]
        torch.sub(point, gradient, alpha=1 / self._pairs.theta, out=out)
        if coefficients is not None:
            out.addmv_(self._pairs.rows[:, part].T, coefficients)
        return out

    def _aim_at(self, coefficients: Tensor | None) -> float:
        """Aim at the projected minimiser over the free variables; the slope on the way there."""
        parts = []
        if coefficients is not None:
            coefficients = coefficients.to(self.point)
        for part in self._chunks:
            gradient = self._gradient[part]
            work = self._newton(part, coefficients, self._work[part])
            if coefficients is not None:
                # What has stopped goes far beyond the bound towards −g.
                work.addcmul_(self._stopped[part], gradient, value=-4 / self._outwards)
            work.clamp_(-1, 1)
            way = torch.sub(work, self.point[part], out=self._chunks.room(part)[0])
            parts.append(torch.dot(way, gradient))
        return float(summed(parts))

    def _aim_within(self, coefficients: Tensor, time: float) -> float:
        """Aim at the first bound between the Cauchy point and that minimiser; the slope there.

        This is the step of 1995; version 3.0 takes it where the projected step leads upwards.
        """
        coefficients = coefficients.to(self.point)
        most = self.point.new_ones(())
        for part in self._chunks:
            most = torch.maximum(most, _shares(*self._leg(part, coefficients, time)).amax())
        for part in self._chunks:
            start, step = self._leg(part, coefficients, time)
            reached = (start + step / most).clamp_(-1, 1)
            binding = (_shares(start, step) == most) & (most > 1)
            self._work[part] = torch.where(binding, step.sign(), reached)
        return self._slope(self._gradient)

    def _leg(self, part: slice, coefficients: Tensor, time: float) -> tuple[Tensor, Tensor]:
        """The Cauchy point, and the step from it to the minimiser over the free variables."""
        point, gradient, stopped = self.point[part], self._gradient[part], self._stopped[part]
        start = torch.sub(point, gradient, alpha=time).clamp_(-1, 1)
        start = torch.lerp(start, -gradient.sign(), stopped)
        step = self._newton(part, coefficients, torch.empty_like(point)).sub_(start)
        return start, step.mul_(1 - stopped)


def _shares(point: Tensor, step: Tensor) -> Tensor:
    """Return what share a step is, upwards from zero, of the way to the bound that it leads to."""
    room = step.sign().sub_(point)
    return torch.div(step, room, out=room).nan_to_num_(0.0, posinf=math.inf)
