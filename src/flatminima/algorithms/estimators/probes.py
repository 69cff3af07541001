"""Products with random vectors, a block at a time, and the mean and error of samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...operators.linear import LinearOperator
from ...support.randomness import draw_signs

__all__ = [
    "BLOCK_BYTES",
    "compute_diagonal",
    "mean_and_spread",
    "multiply_rows",
    "sample_traces",
    "split_rows",
    "t_factor",
]

BLOCK_BYTES = 2**28
"""Size of the vectors that are multiplied at a time."""


def split_rows(operator: LinearOperator, count: int) -> Iterator[slice]:
    """Yield slices of `count` vectors, each of at most `BLOCK_BYTES` or of a single vector."""
    width = max(1, BLOCK_BYTES // (operator.shape[0] * operator.dtype.itemsize))
    for start in range(0, count, width):
        yield slice(start, min(start + width, count))


def multiply_rows(operator: LinearOperator, rows: Tensor, step: Callable[[int], object]) -> Tensor:
    """Return the products with the rows (k, n), block by block.

    Args:
        operator: A.
        rows: (k, n).
        step: called with the size of each block.

    Raises:
        NonFiniteError: a product holds NaN or infinity.
    """
    out = torch.empty_like(rows)
    for block in split_rows(operator, len(rows)):
        out[block] = operator._finite(operator._products(rows[block]))
        step(block.stop - block.start)
    return out


def t_factor(samples: int) -> float:
    """Return the factor by which to widen the standard error of this many samples.

    If σ is known, two standard errors cover the true value in 95.4 % of the cases. If it is
    estimated, Student's t gives the factor by which the interval must be wider.

    Examples:
        >>> round(t_factor(3), 2), round(t_factor(10), 2), round(t_factor(100), 2)
        (2.26, 1.16, 1.01)
    """
    from scipy.special import stdtrit

    return float(stdtrit(samples - 1, 0.5 * (1 + math.erf(math.sqrt(2))))) / 2


def mean_and_spread(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard error of the samples along the first axis, in their dtype.

    A single sample counts as exact. The standard error is widened by `t_factor`.
    """
    count = len(samples)
    if count == 1:
        return samples[0], torch.zeros_like(samples[0])
    deviation = samples.std(dim=0, correction=1)
    return samples.mean(dim=0), deviation * (t_factor(count) / math.sqrt(count))


def sample_traces(
    operator: LinearOperator,
    count: int,
    generator: torch.Generator,
    sizes: tuple[int, ...],
    step: Callable[[int], object],
    project: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return samples of the traces of diagonal blocks by Rademacher vectors g (Hutchinson 1989).

    Args:
        operator: A.
        count: number of samples.
        generator: draws the vectors.
        sizes: sizes of the diagonal blocks.
        step: called with the number of products taken.
        project: an orthogonal projection Π of rows; the blocks are then those of Π A Π.

    Returns:
        gᵦᵀ (Π A Π g)ᵦ for each sample and block β, shape (count, blocks), float64 on the host.
    """
    n = operator.shape[0]
    forms: list[Tensor] = []
    for block in split_rows(operator, count):
        rows = block.stop - block.start
        signs = draw_signs(rows, n, generator, dtype=operator.dtype, device=operator.device)
        vectors = signs if project is None else project(signs)
        products = operator._products(vectors)
        if len(sizes) == 1:
            forms.append(torch.linalg.vecdot(vectors, products).unsqueeze(1))
        else:
            terms = signs * (products if project is None else project(products))
            forms.append(
                torch.stack([t.sum(dim=1) for t in torch.split(terms, list(sizes), dim=1)], dim=1)
            )
        step(rows)
    # One transfer for all samples, with the test for NaN and infinity.
    return operator._finite(torch.cat(forms).cpu().double())


def compute_diagonal(operator: LinearOperator, step: Callable[[int], object]) -> Tensor:
    """Return the diagonal, shape (n,), from n products with unit vectors.

    Raises:
        NonFiniteError: a product holds NaN or infinity.
    """
    n = operator.shape[0]
    out = torch.empty(n, dtype=operator.dtype, device=operator.device)
    for block in split_rows(operator, n):
        rows = torch.arange(block.stop - block.start, device=operator.device)
        units = torch.zeros(len(rows), n, dtype=operator.dtype, device=operator.device)
        units[rows, rows + block.start] = 1
        out[block] = operator._products(units)[rows, rows + block.start]
        step(len(rows))
    return operator._finite(out)
