"""Warm starts of Lanczos from given vectors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .basis import Basis
from .chain import Floats, Steps, eigh, transform_gram

__all__ = ["HeldPairs", "combine_columns", "take_over"]

GOOD = 0.05
"""Vectors are worth their products if residuals are below this fraction of the Ritz values."""

NOISE = 50.0
"""Residuals up to this many units of rounding count as zero."""

PARALLEL = 0.1
"""Two residuals count as parallel if the sine of their angle is below this."""


@dataclasses.dataclass
class HeldPairs:
    """Ritz pairs on the given vectors, in the first rows of the basis, in ascending order."""

    values: Floats
    gram: Floats
    """The Gram matrix of their residuals, without the parts along `start`."""
    tie: Floats
    """The parts of their residuals along `start`."""
    start: Tensor | None
    """The vector from which the chain continues; None if the vectors are eigenvectors."""


def take_over(
    basis: Basis, vectors: Tensor, step: Callable[[int, Tensor], tuple[Floats, Tensor]], tol: float
) -> Steps[HeldPairs | None]:
    """Return the Ritz pairs on the columns of `vectors`, or None if these are of no use.

    Each column takes one product. Vectors from a chain of the same operator have parallel
    residuals, and the chain continues along them as after a restart. Other vectors are more useful
    combined into one start vector: their residuals point in as many directions as there are
    vectors, and each would need a chain of its own. The first two products show which case it is.
    Residuals are stored in the free half of the basis for the time being.
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
            vector = basis.subtract(basis.coefficients(i, vector), vector)
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
        basis.put(last - i, basis.subtract(basis.coefficients(count, rest), rest))
    gram = _gram(basis, count)
    along = eigh(gram)[1][:, -1]
    start = torch.zeros_like(vector)
    for i in range(count):
        start += float(along[i]) * basis.take(last - i).to(basis.device)
    norm = math.sqrt(max(float(along @ gram @ along), 0.0))
    # A residual of rounding errors is no direction to continue in.
    rounding = float(torch.finfo(vectors.dtype).eps) * np.abs(projected).max()
    norm = 0.0 if norm <= NOISE * rounding else norm
    if norm == 0 and count == basis.rows.shape[1]:
        return None
    values, vectors_ = eigh(projected)
    basis.rotate(vectors_, count)
    if norm == 0:
        return HeldPairs(values, np.zeros((count, count)), np.zeros(count), None)
    tie = vectors_.T @ gram @ along / norm
    return HeldPairs(values, transform_gram(gram, vectors_) - np.outer(tie, tie), tie, start / norm)


def _gram(basis: Basis, count: int) -> Floats:
    """Return the Gram matrix of the last `count` rows, from the last one backwards."""
    rows = len(basis)
    columns = [
        basis.coefficients(rows, basis.take(rows - 1 - i).to(basis.device))[rows - count :]
        for i in range(count)
    ]
    gram = torch.stack(columns).flip(1).cpu().double().numpy()
    return np.asarray((gram + gram.T) / 2)


def combine_columns(vectors: Tensor) -> Tensor | None:
    """Return a unit vector with an equal part along each column, or None if the parts cancel."""
    total = torch.zeros_like(vectors[:, 0])
    for i in range(vectors.shape[1]):
        # Scaled by the largest entry first, since squares of small numbers underflow.
        vector = vectors[:, i] / vectors[:, i].abs().amax()
        total += vector / torch.linalg.vector_norm(vector)
    norm = float(torch.linalg.vector_norm(total))
    return total / norm if norm > 1e-3 else None
