"""The generalised Cauchy point: the first minimiser of a quadratic along a projected gradient."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .chunks import Chunks, accumulator, places

__all__ = ["CauchyPoint", "ProjectedPath"]

BLOCK = 2**11
"""Sorted breakpoints that are taken at once."""

PIECES = 32
SAMPLE = 2**12
"""The breakpoints are sorted in about so many pieces, which a sample of that size tells apart."""


@dataclasses.dataclass(frozen=True)
class CauchyPoint:
    """The first minimiser, P(x − t g).

    Attributes:
        time: t.
        slope: W_Fᵀ d, where d = −g and F are the variables that are free there; float64, host.
        moved: Wᵀ (P(x − t g) − x); float64, host.
    """

    time: float
    slope: Tensor
    moved: Tensor


@dataclasses.dataclass(frozen=True)
class _Place:
    """What the derivative of the quadratic at a point of the path is made of; on the host.

    Attributes:
        time: t.
        energy: dᵀd, of the variables that still move.
        slope: Wᵀd, of these.
        stopped: Wᵀ (P(x − t g) − x), of the others.
    """

    time: float
    energy: float
    slope: Tensor
    stopped: Tensor


class ProjectedPath:
    """t ↦ P(x − t g) into the unit box, and the quadratic gᵀz + ½ zᵀBz along it.

    With B = θI − W M Wᵀ and d = −g on what still moves, the derivative is −(1 − θt) dᵀd − pᵀMc,
    where p = Wᵀd and c = Wᵀz. Only such sums over the variables enter, and they change where a
    variable stops: cumulative sums over sorted breakpoints give the derivative at all of them
    (the generalised Cauchy point of Byrd, Lu, Nocedal and Zhu 1995, section 4). Most breakpoints
    lie beyond the minimiser, so they are sorted piece by piece, the first piece being those up
    to twice the time at which the minimum would be reached if nothing stopped.
    """

    def __init__(
        self,
        times: Tensor,
        gradient: Tensor,
        rows: Tensor,
        chunks: Chunks,
        *,
        middle: Tensor,
        theta: float,
    ) -> None:
        """Nothing is computed yet.

        Args:
            times: the breakpoints, (n,): zero for what cannot move, infinite where g is zero.
            gradient: g, (n,).
            rows: Wᵀ, (rows, n).
            chunks: the parts in which to go through the vectors.
            middle: M, float64 on the host.
            theta: θ.
        """
        self.times, self.gradient, self.rows, self.chunks = times, gradient, rows, chunks
        self.wide = accumulator(times.device)
        self.middle = middle.to(device=times.device, dtype=self.wide)
        self.theta = theta
        self.least = 0.0
        self.last = float(torch.finfo(times.dtype).max)

    def first_minimiser(self, energy: float, slope: Tensor) -> CauchyPoint:
        """Return the first local minimiser from x, where dᵀd is `energy` and Wᵀd is `slope`."""
        self.least = float(torch.finfo(torch.float64).eps) * self.theta * energy
        place = _Place(0.0, energy, slope, torch.zeros_like(slope))
        for cut in self._cuts(place):
            place, found = self._pass(place, self._between(place.time, cut), cut)
            if found:
                moved = place.time * place.slope + place.stopped
                return CauchyPoint(place.time, place.slope, moved)
        return CauchyPoint(place.time, torch.zeros_like(slope), place.stopped)

    def _cuts(self, start: _Place) -> list[float]:
        """Up to which times to look in turn."""
        device = self.times.device
        values = torch.tensor([start.time, start.energy], dtype=self.wide, device=device)
        slope = start.slope.to(values)
        first, second = self._derivatives(values[0], values[1], slope, torch.zeros_like(slope))
        few = min(self.last, float(-2 * first / second))
        sample = self.times[:: 1 + len(self.times) // SAMPLE].sort().values
        sample = sample[:: 1 + len(sample) // PIECES]
        return sorted({t for t in [few, *sample.tolist(), self.last] if 0 < t <= self.last})

    def _derivatives(
        self, time: Tensor, energy: Tensor, slope: Tensor, stopped: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the first and second derivative right of `time`."""
        bent = self.middle @ slope
        along = (slope * bent).sum(0)
        first = (self.theta * time - 1) * energy - time * along - (stopped * bent).sum(0)
        return first, (self.theta * energy - along).clamp(min=self.least)

    def _pass(self, place: _Place, index: Tensor, end: float) -> tuple[_Place, bool]:
        """Go on from `place` over the breakpoints of `index`, which are all that lie up to `end`.

        Returns the first minimiser and True, or the last breakpoint and False.
        """
        times, order = self.times[index].sort()
        index = index[order]
        blocks = list(zip(torch.split(times, BLOCK), torch.split(index, BLOCK), strict=True))
        for number, (block, where) in enumerate(blocks, start=1):
            direction = -self.gradient[where].to(self.wide)
            steps = self.rows.index_select(1, where).to(self.wide) * direction
            block = block.to(self.wide)
            # At `place`, and after each breakpoint.
            start = torch.cat([place.slope, place.stopped]).to(steps)[:, None]
            changes = torch.cat([-steps, steps * block]).cumsum(1)
            slope, stopped = torch.cat([start, start + changes], dim=1).chunk(2)
            energy = torch.nn.functional.pad(-direction.square().cumsum(0), (1, 0)) + place.energy
            left = torch.cat([block.new_tensor([place.time]), block])
            right = torch.cat([block, left[-1:]])
            if number == len(blocks) and end < self.last:
                right[-1] = end
            first, second = self._derivatives(left, energy, slope, stopped)
            ahead = -first / second
            hit = ahead < right - left
            found = hit.any()
            at = torch.where(found, hit.int().argmax(), len(block)).reshape(1)
            time = left[at] + found * ahead[at].clamp(min=0)
            parts = [found.to(left)[None], time, energy[at], slope[:, at], stopped[:, at]]
            numbers = torch.cat([t.flatten() for t in parts]).cpu().double()
            place = _Place(float(numbers[1]), float(numbers[2]), *numbers[3:].chunk(2))
            if numbers[0]:
                return place, True
        return place, False

    def _between(self, low: float, high: float) -> Tensor:
        """Return the indices of the breakpoints in (low, high]."""
        found = []
        for part in self.chunks:
            times, (inside, late, *_) = self.times[part], self.chunks.room(part)
            torch.le(times, high, out=inside).mul_(torch.gt(times, low, out=late))
            found.append(places(inside).add_(part.start))
        return torch.cat(found)
