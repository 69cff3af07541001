"""Sums of a function over the spectrum of an operator, by the Gauss rules of random vectors."""

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
    """The tridiagonal matrix T of one Lanczos chain.

    Attributes:
        diagonal: the diagonal of T.
        below: the entries below the diagonal, one fewer.
        complete: whether the chain reached an invariant space, which makes its rule exact.
    """

    diagonal: Floats
    below: Floats
    complete: bool

    def rule(self, steps: int | None = None) -> tuple[Floats, Floats]:
        """Return nodes, ascending, and weights of the Gauss rule after some or all steps."""
        count = len(self.diagonal) if steps is None else min(steps, len(self.diagonal))
        below = self.below[: count - 1]
        values, vectors = eigh(
            np.diag(self.diagonal[:count]) + np.diag(below, 1) + np.diag(below, -1)
        )
        return values, vectors[0] ** 2


@dataclasses.dataclass(frozen=True)
class Quadrature:
    """The Gauss rules of several random vectors, which give tr f(A) for any f.

    Attributes:
        size: n.
        atoms: (m,) eigenvalues that were taken out, in float64 on the host.
        chains: one for each random vector; () if all eigenvalues were taken out.
        probes: number of random vectors.
        resolution: eigenvalues closer together than this count as one.
        products: number of products with the operator.
        readings: how many times the data were read again.
        notes: remarks on the computation.
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

        Shorter rules are padded with their last node at weight 0.
        """
        return self._all_rules if steps is None else self._fill(steps)

    @functools.cached_property
    def _all_rules(self) -> tuple[Tensor, Tensor]:
        return self._fill(None)

    def _fill(self, steps: int | None) -> tuple[Tensor, Tensor]:
        rules = [chain.rule(steps) for chain in self.chains]
        longest = max((len(values) for values, _ in rules), default=0)
        nodes, weights = np.zeros((2, self.probes, longest))
        for row, (values, parts) in enumerate(rules):
            nodes[row], nodes[row, : len(values)] = values[-1], values
            weights[row, : len(values)] = parts
        return torch.from_numpy(nodes), torch.from_numpy(weights)

    @property
    def smallest(self) -> float:
        """The smallest Ritz value, an upper bound of the smallest eigenvalue."""
        return float(torch.cat([self.rules()[0].flatten(), self.atoms]).min())

    def sum(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """Return tr f(A) = Σ f(λᵢ) over all n eigenvalues, with its standard error.

        Args:
            function: f, applied element by element to a tensor in float64.
        """
        return mean_and_error(self.samples(function))

    def samples(self, function: Callable[[Tensor], Tensor], steps: int | None = None) -> Tensor:
        """Return the estimate of tr f(A) from each random vector, shape (probes,)."""
        return spectral_samples(*self.rules(steps), self.atoms, self.size, function)

    def truncation(self, function: Callable[[Tensor], Tensor]) -> float:
        """Estimate the error of `sum` due to the limited length of the chains.

        Let d be the change made by the last third of the steps, and ρ the rate at which such
        changes shrink from third to third. If further changes shrank at that rate, d ρ / (1 − ρ)
        would be left. The estimate is d √ρ / (1 − √ρ), which is rarely too small. With fewer than
        three steps no rate is known, and it is infinite.
        """
        steps = max((len(chain.diagonal) for chain in self.chains), default=0)
        complete = torch.tensor([chain.complete for chain in self.chains], dtype=torch.bool)
        if bool(complete.all()) or steps < 3:
            return 0.0 if bool(complete.all()) else math.inf
        first, second, last = (
            self.samples(function, count)
            for count in (max(1, steps // 3), max(2, 2 * steps // 3), steps)
        )
        # An exact rule will not change any more, whatever its changes before.
        before = abs(float(torch.where(complete, 0.0, second - first).mean()))
        after = abs(float(torch.where(complete, 0.0, last - second).mean()))
        if after <= 1e-12 * float(last.abs().mean()):
            return after
        rate = min(math.sqrt(after / before), 0.9) if before > 0 else 0.9
        return after * rate / (1 - rate)


def truncation_notes(truncation: float, error: float) -> tuple[str, ...]:
    """Return a note if the error of the quadrature exceeds the standard error, else ()."""
    if truncation <= error:
        return ()
    size = f"{truncation:.1e}" if math.isfinite(truncation) else "an unknown amount"
    return (
        f"The quadrature may be off by {size}, more than the standard error: increase steps, or "
        "take out outliers.",
    )


def spectral_samples(
    nodes: Tensor,
    weights: Tensor,
    atoms: Tensor,
    size: int,
    function: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the estimate of tr f(A) from each row of nodes, shape (probes,)."""
    rest = (weights * function(nodes)).sum(dim=1)
    return function(atoms).sum() + (size - len(atoms)) * rest


def mean_and_error(samples: Tensor) -> Estimate:
    """Return the mean of samples (probes,) and its standard error, widened by Student's t."""
    mean, error = mean_and_spread(samples)
    return Estimate(float(mean), float(error))


def share_below(
    nodes: Tensor, weights: Tensor, complete: Sequence[bool], threshold: float
) -> tuple[Tensor, float]:
    """Return the share of each row below the threshold, and the mean width of its bounds.

    With nodes in ascending order and k of them below the threshold, the share lies between the
    sum of the first k − 1 weights and the sum of the first k + 1 (Chebyshev, Markov, Stieltjes).
    It is interpolated as if half of each weight lay on either side of its node.
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
    # Beyond the outermost nodes there is nothing to interpolate.
    inside = (upper > 1) & (upper <= count)
    between = torch.where(inside, y0 + part * (y1 - y0), sharp.unsqueeze(1))
    widths = torch.where(inside, 2 * (y1 - y0), 0.0)
    exact = torch.tensor(complete).unsqueeze(1)
    share = torch.where(exact, sharp.unsqueeze(1), between)[:, 0]
    return share, float(torch.where(exact, 0.0, widths).mean())


def check_positive_definite(call: str, smallest: float, shift: float, resolution: float) -> None:
    """Raise if A + τ I is indefinite, or singular up to rounding, for a shift τ.

    Raises:
        NotPositiveDefiniteError: gives the smallest eigenvalue found and a shift that suffices.
    """
    if smallest + shift > resolution:
        return
    least = max(2 * resolution, 1e-3 * abs(smallest)) - smallest
    # Rounded up, so that the number printed suffices.
    digit = 10.0 ** (math.floor(math.log10(least)) - 2) if least > 0 else 0.0
    least = math.ceil(least / digit) * digit if digit else 1.0
    what = (
        f"has an eigenvalue of {format_number(smallest)} or below"
        if smallest + shift < -resolution
        else f"+ {shift:g} I is singular up to rounding: its smallest Ritz value is "
        f"{smallest + shift:.1e}, and values below {resolution:.1e} are lost in rounding"
    )
    raise NotPositiveDefiniteError(
        f"{call} needs A + {shift:g} I to be positive definite, but A {what}. By this estimate a "
        f"shift of {least:.3g} or more suffices; lanczos(operator, which='SA') computes the "
        "smallest eigenvalue with its residual. A Gauss–Newton operator has no negative "
        "eigenvalues.",
        smallest,
        shift,
    )
