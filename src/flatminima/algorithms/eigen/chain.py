"""What a chain of Lanczos vectors tells of the operator, and the small algebra with it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Chain",
    "Drift",
    "Floats",
    "Ritz",
    "Steps",
    "congruent",
    "eigh",
    "select",
    "sum_bound",
    "times",
]

Floats = np.ndarray[Any, np.dtype[np.float64]]
R = TypeVar("R")
Steps = Generator[Tensor, Tensor, R]
"""Yields a vector to be multiplied, is sent the product, and returns R."""

NEAR = 3.0
"""Tolerances within which another Ritz value is a neighbour of the wanted ones."""

REST = 0.1
"""Tolerances by which values at rest may move in a step."""


@dataclasses.dataclass
class Ritz:
    """Ritz pairs on the held vectors and the chain together."""

    values: Floats
    vectors: Floats
    """A column for each pair: coefficients of the held vectors, then of the chain's."""
    residuals: Floats
    wanted: list[int]
    """Positions of the (up to k) wanted pairs, best first."""
    gram: Floats
    """Of the held vectors' residuals, less what the chain holds of them."""
    tie: Floats
    """The residual of each pair along the chain's next vector."""


class Chain:
    """What a chain of Lanczos vectors tells of the operator.

    Args:
        rows: of the basis.
        held: of them, those that the chain is orthogonal to.
        share: logarithm of the random part's share in the start vector.
    """

    def __init__(self, rows: int, held: int, share: float = 0.0) -> None:
        self.rows, self.first, self.single = rows, held == 0, False
        self.logs = -share
        """Σ log βⱼ over all steps."""
        self.gone = np.empty(0)
        """Ritz values given up at restarts."""
        self.restarted = False
        self._empty(held)

    def _empty(self, held: int) -> None:
        self.size, self.beta = 0, 0.0
        self._projected = np.zeros((self.rows - held, self.rows - held))
        self._coupling = np.zeros((held, self.rows - held))

    @property
    def matrix(self) -> Floats:
        """Vᵀ A V."""
        return self._projected[: self.size, : self.size]

    @property
    def coupling(self) -> Floats:
        """Uᵀ A V."""
        return self._coupling[:, : self.size]

    def take(self, heights: Floats, beta: float, tie: Floats | None, gram: Floats) -> Floats:
        """Add a step; by how much its heights contradict the symmetry of the operator."""
        held, i = len(self._coupling), self.size
        self._coupling[:, i], column = heights[:held], heights[held:]
        self._projected[: i + 1, i] = self._projected[i, : i + 1] = column
        gaps = column[:-1].copy()
        if i:
            gaps[-1] -= self.beta
        elif tie is not None:
            slack = np.sqrt(np.maximum(np.diag(gram), 0))
            gaps = np.maximum(np.abs(heights[:held] - tie) - slack, 0)
        self.beta = beta
        self.logs += math.log(max(beta, 1e-300))
        self.size += 1
        return gaps

    def restart(self, held: int, gone: Floats) -> None:
        """Restart at the next vector, with `held` Ritz vectors held."""
        self.gone = np.concatenate([self.gone, gone])
        self.restarted = True
        self._empty(held)

    def log_chance(self, sign: int, bound: float, n: int, values: Floats) -> float:
        """Logarithm of a bound on the chance of having missed an eigenvalue beyond `bound`.

        After j steps from b the next vector is π(A) b / Πβ, where π is the monic polynomial
        whose zeros are the Ritz values. It has length one, so that an eigenvector of λ has at
        most Πβ / |π(λ)| in common with b. For a random b that is as rare as
        √(2n/π) Πβ / |π(λ)| (van Dorsselaer, Hochstenbach and van der Vorst 1999).
        Ritz values that a restart gives up remain zeros.
        """
        if not self.first:
            if self.restarted:  # the values of the chain alone are known no more
                return math.inf
            values = eigh(self.matrix)[0]
        gaps = bound - sign * np.concatenate([values, self.gone])
        if (gaps <= 0).any():
            return math.inf
        return 0.5 * math.log(2 * n / math.pi) + self.logs - float(np.log(gaps).sum())


class Drift:
    """Whether Ritz values have come to rest, where neighbours might still take their place.

    Small residuals come early where more eigenvalues than are wanted lie within a few tolerances of
    each other: each Ritz vector is then a mixture of them, and the values still grow.
    """

    def __init__(self) -> None:
        self._values, self._moves = np.empty(0), [math.inf] * 2

    def ended(self, ritz: Ritz, tolerance: float) -> bool:
        """After one more step: no other is near the wanted ones, or two steps hardly moved them."""
        values = np.sort(ritz.values[ritz.wanted])
        same = len(values) == len(self._values)
        move = float(np.abs(values - self._values).max()) if same else math.inf
        self._values, self._moves = values, [self._moves[-1], move]
        others = np.delete(ritz.values, ritz.wanted)
        gaps = np.abs(others[:, None] - values)
        return bool((gaps > NEAR * tolerance).all()) or max(self._moves) <= REST * tolerance


def congruent(gram: Floats, vectors: Floats) -> Floats:
    """VᵀGV."""
    return times(vectors.T, times(gram, vectors))


def times(one: Floats, other: Floats) -> Floats:
    """Return the product, as in `eigh`."""
    return (torch.from_numpy(one) @ torch.from_numpy(other)).numpy()


def sum_bound(one: Floats, other: Floats, count: int) -> Floats:
    """A bound of (A + B)ᵀ (A + B) from AᵀA and BᵀB: (1 + t) AᵀA + (1 + 1/t) BᵀB for any t > 0.

    This t is the best one for the first `count` columns together.
    """
    a, b = (math.sqrt(max(float(np.trace(m[:count, :count])), 0.0)) for m in (one, other))
    if a == 0 or b == 0:
        return one + other
    return (1 + b / a) * one + (1 + a / b) * other


def eigh(matrix: Floats) -> tuple[Floats, Floats]:
    """By torch and not NumPy, whose threads would contend with torch's at every step."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(matrix))
    return values.numpy(), vectors.numpy()


def select(values: Floats, which: str, count: int, *, top: int | None = None) -> list[int]:
    """Return positions of the `count` values that `which` asks for, best first."""
    descending = [int(i) for i in np.argsort(-values, kind="stable")]
    if which == "LA":
        return descending[:count]
    if which == "SA":
        return descending[::-1][:count]
    if which == "LM":
        return [int(i) for i in np.argsort(-np.abs(values), kind="stable")[:count]]
    top = -(-count // 2) if top is None else top
    bottom = max(top, len(values) - (count - top))
    return descending[:top] + descending[bottom:]
