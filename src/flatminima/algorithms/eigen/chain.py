"""The projection of an operator on a chain of Lanczos vectors, and its small matrices."""

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
    "bound_sum",
    "eigh",
    "multiply",
    "select",
    "transform_gram",
]

Floats = np.ndarray[Any, np.dtype[np.float64]]
R = TypeVar("R")
Steps = Generator[Tensor, Tensor, R]
"""A generator that yields a vector to multiply, is sent the product, and returns R."""

NEAR = 3.0
"""Distance, in tolerances, up to which another Ritz value is a neighbour of the wanted ones."""

REST = 0.1
"""Change in a step, in tolerances, up to which values are at rest."""


@dataclasses.dataclass
class Ritz:
    """Ritz pairs on the held vectors and the chain together."""

    values: Floats
    vectors: Floats
    """A column for each pair: coefficients of the held vectors, then of the chain's vectors."""
    residuals: Floats
    wanted: list[int]
    """Positions of the (up to k) wanted pairs, best first."""
    gram: Floats
    """The Gram matrix of the held vectors' residuals, without their parts along the chain."""
    tie: Floats
    """The residual of each pair along the next vector of the chain."""


class Chain:
    """The projection of the operator on a chain of Lanczos vectors.

    Args:
        rows: number of rows of the basis.
        held: number of those rows that are held, to which the chain is orthogonal.
        share: logarithm of the random part's share of the start vector.
    """

    def __init__(self, rows: int, held: int, share: float = 0.0) -> None:
        self.rows, self.first, self.single = rows, held == 0, False
        self.logs = -share
        """Σ log βⱼ over all steps."""
        self.gone = np.empty(0)
        """Ritz values dropped at restarts."""
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

    def take(self, coefficients: Floats, beta: float, tie: Floats | None, gram: Floats) -> Floats:
        """Add a step and return by how much its coefficients contradict symmetry."""
        held, i = len(self._coupling), self.size
        self._coupling[:, i], column = coefficients[:held], coefficients[held:]
        self._projected[: i + 1, i] = self._projected[i, : i + 1] = column
        gaps = column[:-1].copy()
        if i:
            gaps[-1] -= self.beta
        elif tie is not None:
            slack = np.sqrt(np.maximum(np.diag(gram), 0))
            gaps = np.maximum(np.abs(coefficients[:held] - tie) - slack, 0)
        self.beta = beta
        self.logs += math.log(max(beta, 1e-300))
        self.size += 1
        return gaps

    def restart(self, held: int, gone: Floats) -> None:
        """Restart at the next vector, with `held` vectors held and the values `gone` dropped."""
        self.gone = np.concatenate([self.gone, gone])
        self.restarted = True
        self._empty(held)

    def log_chance(self, sign: int, bound: float, n: int, values: Floats) -> float:
        """Return the logarithm of a bound on the chance of a missed eigenvalue beyond `bound`.

        After j steps from b the next vector is π(A) b / Πβ, where π is the monic polynomial
        whose zeros are the Ritz values. Since it has length one, the component of b along an
        eigenvector of λ is at most Πβ / |π(λ)|. For a random b the probability of this is at most
        √(2n/π) Πβ / |π(λ)| (van Dorsselaer, Hochstenbach and van der Vorst 1999).
        Ritz values dropped at a restart remain zeros of π.
        """
        if not self.first:
            if self.restarted:  # the Ritz values of the chain alone are no longer known
                return math.inf
            values = eigh(self.matrix)[0]
        gaps = bound - sign * np.concatenate([values, self.gone])
        if (gaps <= 0).any():
            return math.inf
        return 0.5 * math.log(2 * n / math.pi) + self.logs - float(np.log(gaps).sum())


class Drift:
    """A test whether Ritz values that have close neighbours have come to rest.

    If more eigenvalues than are wanted lie within a few tolerances of each other, residuals become
    small early: each Ritz vector is then a mixture of them, and the values still grow.
    """

    def __init__(self) -> None:
        self._values, self._moves = np.empty(0), [math.inf] * 2

    def has_ended(self, ritz: Ritz, tolerance: float) -> bool:
        """Return, after one more step, whether the wanted values are isolated or at rest.

        They are isolated if no other Ritz value is near, and at rest if they hardly moved in the
        last two steps.
        """
        values = np.sort(ritz.values[ritz.wanted])
        same = len(values) == len(self._values)
        move = float(np.abs(values - self._values).max()) if same else math.inf
        self._values, self._moves = values, [self._moves[-1], move]
        others = np.delete(ritz.values, ritz.wanted)
        gaps = np.abs(others[:, None] - values)
        return bool((gaps > NEAR * tolerance).all()) or max(self._moves) <= REST * tolerance


def transform_gram(gram: Floats, vectors: Floats) -> Floats:
    """Return VᵀGV."""
    return multiply(vectors.T, multiply(gram, vectors))


def multiply(one: Floats, other: Floats) -> Floats:
    """Return the matrix product, computed by torch as in `eigh`."""
    return (torch.from_numpy(one) @ torch.from_numpy(other)).numpy()


def bound_sum(one: Floats, other: Floats, count: int) -> Floats:
    """Return an upper bound of (A + B)ᵀ (A + B), given AᵀA and BᵀB.

    (1 + t) AᵀA + (1 + 1/t) BᵀB is such a bound for every t > 0. The t chosen is the best one for
    the first `count` columns together.
    """
    a, b = (math.sqrt(max(float(np.trace(m[:count, :count])), 0.0)) for m in (one, other))
    if a == 0 or b == 0:
        return one + other
    return (1 + b / a) * one + (1 + a / b) * other


def eigh(matrix: Floats) -> tuple[Floats, Floats]:
    """Return eigenvalues and eigenvectors by torch, as NumPy's threads compete with torch's."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(matrix))
    return values.numpy(), vectors.numpy()


def select(values: Floats, which: str, count: int, *, top: int | None = None) -> list[int]:
    """Return the positions of the `count` values that `which` selects, best first."""
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
