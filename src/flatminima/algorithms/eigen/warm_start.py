"""Vectors that are given to start from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .basis import Basis
from .chain import Floats, Steps, congruent, eigh

__all__ = ["Held", "combine_columns", "take_over"]

GOOD = 0.05
"""Residuals below this part of the Ritz values are worth the products that take vectors over."""

NOISE = 50.0
"""Residuals up to so many units of rounding are none."""

PARALLEL = 0.1
"""Sine below which two residuals count as of one direction."""


@dataclasses.dataclass
class Held:
    """Ritz pairs of the given vectors, in the first rows of the basis, in ascending order."""

    values: Floats
    gram: Floats
    """Of their residuals, less what lies along `start`."""
    tie: Floats
    """Of their residuals along `start`."""
    start: Tensor | None
    """None where the vectors are eigenvectors, without a residual."""


def take_over(
    basis: Basis, vectors: Tensor, step: Callable[[int, Tensor], tuple[Floats, Tensor]], tol: float
) -> Steps[Held | None]:
    """Rayleigh–Ritz on the columns of `vectors`, a product for each; None where it is no use.

    Vectors from a chain of the same operator have residuals of one direction, and the chain
    goes on from there as after a restart. Others do better as a start vector: their residuals
    point in as many directions as there are vectors, and each would need its own chain.
    The first two products tell. Residuals are kept meanwhile in the free half of the basis.
    """
    count, last = vectors.shape[1], len(basis) - 1
    if basis.narrow or not 1 < count <= len(basis) // 2:
        return None
    projected = np.zeros((count, count))
    for i in range(count):
        vector = vectors[:, i].to(basis.device)
        vector = vector / vector.abs().amax()
        for _ in range(2):
            vector = vector / torch.linalg.vector_norm(vector)
            vector = basis.without(basis.heights(i, vector), vector)
        length = torch.linalg.vector_norm(vector)
        if not float(length) > 0.5:
            return None
        vector = vector / length
        numbers, remainder = step(i + 1, (yield basis.put(i, vector)))
        basis.put(last - i, remainder)
        projected[: i + 1, i] = projected[i, : i + 1] = numbers[:-1]
        if numbers[-1] > GOOD * np.abs(projected).max():
            return None
        if i == 1:
            gram = _gram(basis, 2)
            second = np.linalg.det(gram) / max(np.trace(gram), 1e-300)
            small = max(tol * np.abs(projected).max(), PARALLEL * math.sqrt(gram.diagonal().min()))
            if second > small**2:
                return None
    for i in range(count):
        rest = basis.take(last - i).to(basis.device)
        basis.put(last - i, basis.without(basis.heights(count, rest), rest))
    gram = _gram(basis, count)
    along = eigh(gram)[1][:, -1]
    start = torch.zeros_like(vector)
    for i in range(count):
        start += float(along[i]) * basis.take(last - i).to(basis.device)
    norm = math.sqrt(max(float(along @ gram @ along), 0.0))
    # Rounding of the products has no direction to go on in.
    rounding = float(torch.finfo(vectors.dtype).eps) * np.abs(projected).max()
    norm = 0.0 if norm <= NOISE * rounding else norm
    if norm == 0 and count == basis.rows.shape[1]:
        return None
    values, vectors_ = eigh(projected)
    basis.rotate(vectors_, count)
    if norm == 0:
        return Held(values, np.zeros((count, count)), np.zeros(count), None)
    tie = vectors_.T @ gram @ along / norm
    return Held(values, congruent(gram, vectors_) - np.outer(tie, tie), tie, start / norm)


def _gram(basis: Basis, count: int) -> Floats:
    """Of the last `count` rows, from the last one backwards."""
    rows = len(basis)
    columns = [
        basis.heights(rows, basis.take(rows - 1 - i).to(basis.device))[rows - count :]
        for i in range(count)
    ]
    gram = torch.stack(columns).flip(1).cpu().double().numpy()
    return np.asarray((gram + gram.T) / 2)


def combine_columns(vectors: Tensor) -> Tensor | None:
    """Return a unit vector with an equal part along each column; None where they cancel."""
    total = torch.zeros_like(vectors[:, 0])
    for i in range(vectors.shape[1]):
        # The largest entry first: squares of small numbers vanish.
        vector = vectors[:, i] / vectors[:, i].abs().amax()
        total += vector / torch.linalg.vector_norm(vector)
    norm = float(torch.linalg.vector_norm(total))
    return total / norm if norm > 1e-3 else None
