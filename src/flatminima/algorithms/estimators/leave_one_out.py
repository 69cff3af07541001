"""Estimates that leave out each random vector in turn (Epperly, Tropp and Webber 2024)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .sketch import STRIP, Sketch

__all__ = ["trace_known_blocks", "xdiag", "xtrace", "xtrace_blocks"]


ENTRIES = 2048
"""Number of diagonal entries from which the correlation of the estimates is computed."""


def xtrace(sketch: Sketch) -> tuple[Tensor, float]:
    """Return XTrace's estimates of the trace and the factor of their standard error.

    Let Qᵢ be the basis without column ω of Ω, and x = (I − Qᵢ Qᵢᵀ) ω. Estimate i is

        tr(Qᵢᵀ A Qᵢ) + xᵀ A x · (n − rank Qᵢ) / ‖x‖²,

    where ω is uniform on a sphere, and so is the direction of x (their section 2.3, for A = Aᵀ).

    The estimates share their vectors, so their spread alone underestimates the error of their
    mean. Let eᵢ be the error of estimate i, eᵢ₍ⱼ₎ that with column j also left out of the basis,
    and dᵢⱼ = eᵢ − eᵢ₍ⱼ₎. Over vector i, given all others, both errors have mean zero, and eᵢ₍ⱼ₎
    does not depend on vector j. Therefore E eᵢ eⱼ = E dᵢⱼ dⱼᵢ, and the mean of dᵢⱼ dⱼᵢ over all
    pairs is an unbiased estimate of the covariance.

    Returns:
        The estimates, one for each column of Ω, shape (t,), and the factor, at least 1, by which
        the standard error of their mean exceeds that of independent estimates.
    """
    n, s = sketch.operator.shape[0], sketch.missing_directions()
    h, r, w = sketch.compressed, sketch.factor, sketch.weights
    inside = w - s * _dots(s, w)
    forms = _dots(w, r) - 2 * _dots(inside, r) + _dots(inside, h @ inside)
    lengths = n - _dots(w, w) + _dots(s, w).square()
    freedom = n - sketch.rank + s.square().sum(dim=0)
    known = torch.trace(h) - _dots(s, h @ s)
    single = known + forms * freedom / lengths
    # Row j and column i: estimate i without column j.
    second = _SecondDirection(s)
    height, form = second.height(w), second.form(h)
    rest = forms + 2 * height * (second.height(r) - second.height(h @ inside)) + height**2 * form
    pair = known - form + rest * (freedom + second.present) / (lengths + height**2)
    return single, _compute_excess(single, single - pair)


class _SecondDirection:
    """uⱼᵢ, the unit direction that the basis without column i loses if column j is left out too.

    Args:
        directions: S, from `Sketch.missing_directions`.
    """

    def __init__(self, directions: Tensor) -> None:
        self._s = directions
        self.overlap = directions.T @ directions
        self.length = (1 - self.overlap.square()).clamp(min=1e-12).sqrt()
        self.present = directions.square().sum(dim=0)[:, None].expand_as(self.overlap)

    def height(self, vectors: Tensor) -> Tensor:
        """Return uⱼᵢ · vᵢ for the columns of `vectors`, shape (t, t)."""
        return (self._s.T @ vectors - self.overlap * _dots(self._s, vectors)) / self.length

    def form(self, matrix: Tensor) -> Tensor:
        """Return uⱼᵢᵀ M uⱼᵢ for a symmetric M, shape (t, t)."""
        both = self._s.T @ matrix @ self._s
        own = both.diagonal()
        return (own[:, None] - 2 * self.overlap * both + self.overlap**2 * own) / self.length**2


def _compute_excess(samples: Tensor, differences: Tensor) -> float:
    """Return √(1 + covariance / variance of the mean), given dᵢⱼ in row j and column i."""
    count = len(samples)
    differences = differences.clone().fill_diagonal_(0)
    covariance = float((differences * differences.T).sum()) / (count * (count - 1))
    variance = float(samples.var(correction=1)) / count
    return math.sqrt(1 + max(covariance, 0.0) / variance) if variance > 0 else 1.0


def xtrace_blocks(sketch: Sketch, sizes: tuple[int, ...]) -> Tensor:
    """Return XTrace's estimates for diagonal blocks of these sizes, shape (t, blocks).

    With P = Qᵢ Qᵢᵀ, the diagonal of A is the sum of two: that of P A + A P − P A P, which is
    known, and that of (I − P) A (I − P), which x ∘ (I − P) A x estimates. The blocks add up to
    `xtrace`.
    """
    device, wide = sketch.basis.device, _wide(sketch)
    s, h, r, w = sketch.missing_directions(), sketch.compressed, sketch.factor, sketch.weights
    inside = w - s * _dots(s, w)
    moved = r - h @ inside
    outside = r - (moved - s * _dots(s, moved))
    n = sketch.operator.shape[0]
    lengths = n - _dots(w, w) + _dots(s, w).square()
    scale = (n - sketch.rank + s.square().sum(dim=0)) / lengths

    def there(matrix: Tensor) -> Tensor:
        return matrix.T.contiguous().to(device, wide)

    directions, pressed, squares = there(s), there(h @ s), _dots(s, h @ s).to(device, wide)
    inner, outer, factor, scales = there(inside), there(outside), there(h), scale.to(device, wide)
    parts = []
    for strip in _split_blocks(sketch, sizes):
        q, z, omega = (_part(rows, strip, wide) for rows in _vectors(sketch))
        missing = directions @ q
        # The diagonal of 2 P A − P A P, with P = Q (I − s sᵀ) Qᵀ.
        known = (q * (2 * z - factor @ q)).sum(dim=0)
        lost = missing * (2 * directions @ z - 2 * pressed @ q + squares[:, None] * missing)
        rest = (omega - inner @ q) * (outer @ q - inner @ z)
        parts.append((known.sum() - lost.sum(dim=1)) + scales * rest.sum(dim=1))
    return _assemble(parts, sketch, sizes)


def trace_known_blocks(sketch: Sketch, sizes: tuple[int, ...]) -> Tensor:
    """Return the block traces of A − (I − Q Qᵀ) A (I − Q Qᵀ), the part known, shape (blocks,)."""
    factor = sketch.compressed.to(sketch.basis.device, _wide(sketch))
    parts = []
    for strip in _split_blocks(sketch, sizes):
        q, z = (rows[:, strip].to(factor.dtype) for rows in (sketch.basis, sketch.images))
        parts.append((q * (2 * z - factor @ q)).sum().unsqueeze(0))
    return _assemble(parts, sketch, sizes)[0]


def xdiag(sketch: Sketch) -> tuple[Tensor, Tensor]:
    """Return XDiag's estimate of the diagonal and its standard error, each of shape (n,).

    The estimate without column ω, a vector of signs, is diag(Qᵢ Qᵢᵀ A) + ω ∘ (I − Qᵢ Qᵢᵀ) A ω
    (their section 2.4). Only one direction lies outside of Qᵢ, since A ω = Q R. The standard error
    contains the factor described in `xtrace`, from a sample of the entries, but not yet that of
    Student's t.
    """
    count, wide, s = sketch.columns, _wide(sketch), sketch.missing_directions()
    device, n = sketch.basis.device, sketch.basis.shape[1]
    directions = s.T.contiguous().to(device, wide)
    heights = _dots(s, sketch.factor).to(device, wide)[:, None]
    mean = torch.empty(n, dtype=sketch.basis.dtype, device=device)
    error = torch.empty_like(mean)
    for strip in _split_blocks(sketch, (n,)):
        q, z, omega = (_part(rows, strip, wide) for rows in _vectors(sketch))
        missing = directions @ q
        samples = missing * (heights * omega - directions @ z)
        mean[strip] = ((q * z).sum(dim=0) + samples.mean(dim=0)).to(mean.dtype)
        error[strip] = (samples.std(dim=0, correction=1) / count**0.5).to(mean.dtype)
    return mean, error * _compute_xdiag_excess(sketch, s)


def _compute_xdiag_excess(sketch: Sketch, s: Tensor) -> float:
    """Return by which factor the spread of XDiag's estimates is too small, from some entries."""
    count, n = sketch.columns, sketch.basis.shape[1]
    chosen = torch.linspace(0, n - 1, min(n, ENTRIES)).long().to(sketch.basis.device)
    q, z, omega = (rows[:, chosen].cpu().double() for rows in _vectors(sketch))
    second = _SecondDirection(s)
    reached = second.height(sketch.factor)
    heights = _dots(s, sketch.factor)[:, None]
    missing, moved = s.T @ q, s.T @ z
    variance = (missing * (heights * omega - moved)).var(dim=0, correction=1).sum() / count
    if float(variance) == 0:
        return 1.0
    total = 0.0
    for i in range(count):
        # Estimate i without column j, for every j > i, and estimate j without column i.
        later = slice(i + 1, None)
        g, nu = second.overlap[i, later, None], second.length[i, later, None]
        one = (missing[later] - g * missing[i]) / nu
        one_moved = (moved[later] - g * moved[i]) / nu
        other = (missing[i] - g * missing[later]) / nu
        other_moved = (moved[i] - g * moved[later]) / nu
        here = one * (one_moved - reached[later, i, None] * omega[i])
        there = other * (other_moved - reached[i, later, None] * omega[later])
        total += 2 * float((here * there).sum())
    covariance = total / (count * (count - 1))
    return math.sqrt(1 + max(covariance, 0.0) / float(variance))


def _vectors(sketch: Sketch) -> tuple[Tensor, Tensor, Tensor]:
    return sketch.basis, sketch.images, sketch.tests


def _part(rows: Tensor, strip: slice, dtype: torch.dtype) -> Tensor:
    return rows[:, strip].to(dtype)


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """Return the dot products of the columns of two matrices."""
    return (left * right).sum(dim=0)


def _wide(sketch: Sketch) -> torch.dtype:
    return torch.float32 if sketch.basis.device.type == "mps" else torch.float64


def _split_blocks(sketch: Sketch, sizes: tuple[int, ...]) -> list[slice]:
    """Return slices of the blocks, with large blocks split into several."""
    width = max(1, STRIP // max(1, sketch.columns))
    pieces, start = [], 0
    for size in sizes:
        pieces += [
            slice(begin, min(begin + width, start + size))
            for begin in range(start, start + size, width)
        ]
        start += size
    return pieces


def _assemble(parts: list[Tensor], sketch: Sketch, sizes: tuple[int, ...]) -> Tensor:
    """Add up the slices of each block, shape (t, blocks), in float64 on the host."""
    width = max(1, STRIP // max(1, sketch.columns))
    owners = [block for block, size in enumerate(sizes) for _ in range(-(-size // width))]
    table = torch.stack(parts, dim=1).cpu().double()
    out = torch.zeros(len(table), len(sizes), dtype=torch.float64)
    return out.index_add_(1, torch.tensor(owners), table)
