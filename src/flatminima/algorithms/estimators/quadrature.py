"""Sums of a function over the spectrum of an operator, by Gauss rules of random vectors."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ...errors import NotPositiveDefiniteError
from ...results import Estimate, format_number
from ..eigen.chain import Floats, eigh
from .probes import mean_and_spread

__all__ = [
    "Quadrature",
    "Tridiagonal",
    "check_positive_definite",
    "mean_and_error",
    "share_below",
    "spectral_samples",
    "truncation_notes",
]


@dataclasses.dataclass(frozen=True)
class Tridiagonal:
    """What one chain of Lanczos vectors makes of the operator.

    Attributes:
        diagonal: of T.
        below: the entries next to it, one fewer.
        complete: whether the chain came to an invariant space, so that its rule is exact.
    """

    diagonal: Floats
    below: Floats
    complete: bool

    def rule(self, steps: int | None = None) -> tuple[Floats, Floats]:
        """Nodes, ascending, and weights of the Gauss rule after so many steps, or all of them."""
        count = len(self.diagonal) if steps is None else min(steps, len(self.diagonal))
        below = self.below[: count - 1]
        values, vectors = eigh(
            np.diag(self.diagonal[:count]) + np.diag(below, 1) + np.diag(below, -1)
        )
        return values, vectors[0] ** 2


@dataclasses.dataclass(frozen=True)
class Quadrature:
    """Gauss rules of several random vectors: f ↦ tr f(A), for as many f as one likes.

    Attributes:
        size: n.
        atoms: (m,) eigenvalues that were taken out, in float64 on the host.
        chains: one for each random vector; none where all eigenvalues were taken out.
        probes: number of random vectors.
        resolution: eigenvalues closer together than this count as one.
        products: with the operator.
        readings: of the data.
        notes: what a reader should know about how it was computed.
    """

    size: int
    atoms: Tensor
    chains: tuple[Tridiagonal, ...]
    probes: int
    resolution: float
    products: int
    readings: int
    notes: tuple[str, ...]

    def rules(self, steps: int | None = None) -> tuple[Tensor, Tensor]:
        """Return nodes and weights, each (probes, steps), in float64 on the host.

        Rules that are shorter than others are filled up with their last node at weight 0.
        """
        return self._whole if steps is None else self._filled(steps)

    @functools.cached_property
    def _whole(self) -> tuple[Tensor, Tensor]:
        return self._filled(None)

    def _filled(self, steps: int | None) -> tuple[Tensor, Tensor]:
        rules = [chain.rule(steps) for chain in self.chains]
        longest = max((len(values) for values, _ in rules), default=0)
        nodes, weights = np.zeros((2, self.probes, longest))
        for row, (values, parts) in enumerate(rules):
            nodes[row], nodes[row, : len(values)] = values[-1], values
            weights[row, : len(values)] = parts
        return torch.from_numpy(nodes), torch.from_numpy(weights)

    @property
    def smallest(self) -> float:
        """The smallest Ritz value; the smallest eigenvalue is at most that."""
        return float(torch.cat([self.rules()[0].flatten(), self.atoms]).min())

    def sum(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """Return tr f(A) = Σ f(λᵢ) over all n eigenvalues, with its standard error.

        Args:
            function: f, of a tensor in float64, element by element.
        """
        return mean_and_error(self.samples(function))

    def samples(self, function: Callable[[Tensor], Tensor], steps: int | None = None) -> Tensor:
        """Return what each random vector says of tr f(A), shape (probes,)."""
        return spectral_samples(*self.rules(steps), self.atoms, self.size, function)

    def truncation(self, function: Callable[[Tensor], Tensor]) -> float:
        """Return how far `sum` may be off because the chains are no longer than they are.

        From what the last third of the steps still changed, d, and the rate ρ at which such
        changes become smaller from third to third: d √ρ / (1 − √ρ). Were the next ones to fall
        at that rate, d ρ / (1 − ρ) would be left; with its root it is rarely too little. It is
        infinite where fewer than three steps say nothing of a rate.
        """
        steps = max((len(chain.diagonal) for chain in self.chains), default=0)
        complete = torch.tensor([chain.complete for chain in self.chains], dtype=torch.bool)
        if bool(complete.all()) or steps < 3:
            return 0.0 if bool(complete.all()) else math.inf
        first, second, last = (
            self.samples(function, count)
            for count in (max(1, steps // 3), max(2, 2 * steps // 3), steps)
        )
        # A rule that is exact will not change any more, whatever it did before.
        before = abs(float(torch.where(complete, 0.0, second - first).mean()))
        after = abs(float(torch.where(complete, 0.0, last - second).mean()))
        if after <= 1e-12 * float(last.abs().mean()):
            return after
        rate = min(math.sqrt(after / before), 0.9) if before > 0 else 0.9
        return after * rate / (1 - rate)


def truncation_notes(truncation: float, error: float) -> tuple[str, ...]:
    """Return what to say where the quadrature's own error exceeds the standard error."""
    if truncation <= error:
        return ()
    size = f"{truncation:.1e}" if math.isfinite(truncation) else "an unknown amount"
    return (
        f"The quadrature may be off by {size}, more than the standard error: raise steps, or "
        "take outliers out.",
    )


def spectral_samples(
    nodes: Tensor,
    weights: Tensor,
    atoms: Tensor,
    size: int,
    function: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return what each row of nodes says of tr f(A), shape (probes,)."""
    rest = (weights * function(nodes)).sum(dim=1)
    return function(atoms).sum() + (size - len(atoms)) * rest


def mean_and_error(samples: Tensor) -> Estimate:
    """Return mean of the samples, (probes,), and its standard error, widened by Student's t."""
    mean, error = mean_and_spread(samples)
    return Estimate(float(mean), float(error))


def share_below(
    nodes: Tensor, weights: Tensor, complete: Sequence[bool], threshold: float
) -> tuple[Tensor, float]:
    """Return the share of each row's measure below the threshold, and the mean width of its bounds.

    With nodes in ascending order and k of them below the threshold, the share lies between the
    sum of the first k − 1 weights and that of k + 1 (Chebyshev, Markov, Stieltjes); it is
    interpolated as if half of each weight lay on either side of its node.
    """
    probes, count = nodes.shape
    sharp = torch.where(nodes < threshold, weights, 0.0).sum(dim=1)
    if count == 0 or all(complete):
        return sharp, 0.0
    middles = weights.cumsum(dim=1) - weights / 2
    ends = torch.zeros(probes, 1, dtype=torch.float64)
    places = torch.cat([nodes[:, :1], nodes, nodes[:, -1:]], dim=1)
    heights = torch.cat([ends, middles, ends + 1], dim=1)
    upper = (places < threshold).sum(dim=1, keepdim=True).clamp(1, count + 1)
    (x0, x1), (y0, y1) = (
        (rows.gather(1, upper - 1), rows.gather(1, upper)) for rows in (places, heights)
    )
    part = ((threshold - x0) / (x1 - x0).clamp(min=1e-300)).clamp(0, 1)
    # Beyond the outermost nodes, where there is nothing to interpolate, all is on one side.
    inside = (upper > 1) & (upper <= count)
    between = torch.where(inside, y0 + part * (y1 - y0), sharp.unsqueeze(1))
    widths = torch.where(inside, 2 * (y1 - y0), 0.0)
    exact = torch.tensor(complete).unsqueeze(1)
    share = torch.where(exact, sharp.unsqueeze(1), between)[:, 0]
    return share, float(torch.where(exact, 0.0, widths).mean())


def check_positive_definite(call: str, smallest: float, shift: float, resolution: float) -> None:
    """Refuse a shift τ for which A + τ I is indefinite, or is singular to rounding.

    Raises:
        NotPositiveDefiniteError: saying how negative, and which shift would do.
    """
    if smallest + shift > resolution:
        return
    least = max(2 * resolution, 1e-3 * abs(smallest)) - smallest
    # Rounded up, so that what is printed would do.
    digit = 10.0 ** (math.floor(math.log10(least)) - 2) if least > 0 else 0.0
    least = math.ceil(least / digit) * digit if digit else 1.0
    what = (
        f"has an eigenvalue of {format_number(smallest)} or below"
        if smallest + shift < -resolution
        else f"+ {shift:g} I is singular to rounding: its smallest Ritz value is "
        f"{smallest + shift:.1e}, and rounding hides what is below {resolution:.1e}"
    )
    raise NotPositiveDefiniteError(
        f"{call} needs A + {shift:g} I to be positive definite, but A {what}. A shift of "
        f"{least:.3g} or more would do for what was found; lanczos(operator, which='SA') finds "
        "the smallest eigenvalue with its residual. A Gauss–Newton operator has no negative ones.",
        smallest,
        shift,
    )
