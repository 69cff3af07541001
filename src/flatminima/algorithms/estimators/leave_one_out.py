"""Estimates that leave one random vector out in turn (Epperly, Tropp and Webber 2024)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .sketch import STRIP, Sketch

__all__ = ["deflated_blocks", "xdiag", "xtrace", "xtrace_blocks"]


ENTRIES = 2048
"""Of a diagonal, from which the correlation of its estimates is taken."""


def xtrace(sketch: Sketch) -> tuple[Tensor, float]:
    """XTrace's estimates of the trace, one for each column of Ω, shape (t,), and their excess.

    With Qᵢ the basis without column ω of Ω, and x = (I − Qᵢ Qᵢᵀ) ω, an estimate is

        tr(Qᵢᵀ A Qᵢ) + xᵀ A x · (n − rank Qᵢ) / ‖x‖²,

    where ω is uniform on a sphere, and so is the direction of x (their section 2.3, for A = Aᵀ).

    The estimates share their vectors, so that their spread alone tells too little of the error of
    their mean. Let eᵢ be the error of estimate i, eᵢ₍ⱼ₎ the same with column j left out of the
    basis as well, and dᵢⱼ = eᵢ − eᵢ₍ⱼ₎. Over vector i, all others given, both have the mean zero;
    eᵢ₍ⱼ₎ does not depend on vector j. Of E eᵢ eⱼ therefore only E dᵢⱼ dⱼᵢ is left, and the mean of
    dᵢⱼ dⱼᵢ over all pairs estimates the covariance without bias. The standard error of the mean is
    that of independent estimates times the factor that comes back, which is 1 at least.
    """
    n, s = sketch.operator.shape[0], sketch.left_out()
    h, r, w = sketch.compressed, sketch.factor, sketch.weights
    inside = w - s * _dots(s, w)
    forms = _dots(w, r) - 2 * _dots(inside, r) + _dots(inside, h @ inside)
    lengths = n - _dots(w, w) + _dots(s, w).square()
    freedom = n - sketch.rank + s.square().sum(dim=0)
    known = torch.trace(h) - _dots(s, h @ s)
    single = known + forms * freedom / lengths
    # For column i without j, in row j and column i, u is what sⱼ adds to sᵢ, of length one.
    second = _Second(s)
    height, form = second.height(w), second.form(h)
    rest = forms + 2 * height * (second.height(r) - second.height(h @ inside)) + height**2 * form
    pair = known - form + rest * (freedom + second.present) / (lengths + height**2)
    return single, _excess(single, single - pair)


class _Second:
    """uⱼᵢ, the direction that a second column j adds to what the basis lacks without i.

    Args:
        directions: S, as the sketch gives it.
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


def _excess(samples: Tensor, differences: Tensor) -> float:
    """Return √(1 + covariance / variance of the mean), from dᵢⱼ in row j and column i."""
    count = len(samples)
    differences = differences.clone().fill_diagonal_(0)
    covariance = float((differences * differences.T).sum()) / (count * (count - 1))
    variance = float(samples.var(correction=1)) / count
    return math.sqrt(1 + max(covariance, 0.0) / variance) if variance > 0 else 1.0


def xtrace_blocks(sketch: Sketch, sizes: tuple[int, ...]) -> Tensor:
    """Return the same for the traces of diagonal blocks of these sizes, shape (t, blocks).

    With P = Qᵢ Qᵢᵀ the diagonal of A is that of P A + A P − P A P, which is known, and that of
    (I − P) A (I − P), of which x ∘ (I − P) A x is an estimate. The blocks add up to `xtrace`.
    """
    device, wide = sketch.basis.device, _wide(sketch)
    s, h, r, w = sketch.left_out(), sketch.compressed, sketch.factor, sketch.weights
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
    for strip in _pieces(sketch, sizes):
        q, z, omega = (_part(rows, strip, wide) for rows in _vectors(sketch))
        missing = directions @ q
        # The diagonal of 2 P A − P A P, with P = Q (I − s sᵀ) Qᵀ.
        known = (q * (2 * z - factor @ q)).sum(dim=0)
        lost = missing * (2 * directions @ z - 2 * pressed @ q + squares[:, None] * missing)
        rest = (omega - inner @ q) * (outer @ q - inner @ z)
        parts.append((known.sum() - lost.sum(dim=1)) + scales * rest.sum(dim=1))
    return _assembled(parts, sketch, sizes)


def deflated_blocks(sketch: Sketch, sizes: tuple[int, ...]) -> Tensor:
    """Return the traces of the diagonal blocks of A − (I − Q Qᵀ) A (I − Q Qᵀ), shape (blocks,)."""
    factor = sketch.compressed.to(sketch.basis.device, _wide(sketch))
    parts = []
    for strip in _pieces(sketch, sizes):
        q, z = (rows[:, strip].to(factor.dtype) for rows in (sketch.basis, sketch.images))
        parts.append((q * (2 * z - factor @ q)).sum().unsqueeze(0))
    return _assembled(parts, sketch, sizes)[0]


def xdiag(sketch: Sketch) -> tuple[Tensor, Tensor]:
    """XDiag's estimate of the diagonal, and its standard error but for Student's t, shape (n,).

    The estimate that leaves out column ω, of signs, is diag(Qᵢ Qᵢᵀ A) + ω ∘ (I − Qᵢ Qᵢᵀ) A ω
    (their section 2.4), and what lies outside of Qᵢ is one direction, since A ω = Q R. The factor
    by which the spread is too small is that of `xtrace`, from a sample of the entries.
    """
    count, wide, s = sketch.columns, _wide(sketch), sketch.left_out()
    device, n = sketch.basis.device, sketch.basis.shape[1]
    directions = s.T.contiguous().to(device, wide)
    heights = _dots(s, sketch.factor).to(device, wide)[:, None]
    mean = torch.empty(n, dtype=sketch.basis.dtype, device=device)
    error = torch.empty_like(mean)
    for strip in _pieces(sketch, (n,)):
        q, z, omega = (_part(rows, strip, wide) for rows in _vectors(sketch))
        missing = directions @ q
        samples = missing * (heights * omega - directions @ z)
        mean[strip] = ((q * z).sum(dim=0) + samples.mean(dim=0)).to(mean.dtype)
        error[strip] = (samples.std(dim=0, correction=1) / count**0.5).to(mean.dtype)
    return mean, error * _xdiag_excess(sketch, s)


def _xdiag_excess(sketch: Sketch, s: Tensor) -> float:
    """By how much the spread of XDiag's estimates is too small, over some of the entries."""
    count, n = sketch.columns, sketch.basis.shape[1]
    chosen = torch.linspace(0, n - 1, min(n, ENTRIES)).long().to(sketch.basis.device)
    q, z, omega = (rows[:, chosen].cpu().double() for rows in _vectors(sketch))
    second = _Second(s)
    reached = second.height(sketch.factor)
    heights = _dots(s, sketch.factor)[:, None]
    missing, moved = s.T @ q, s.T @ z
    variance = (missing * (heights * omega - moved)).var(dim=0, correction=1).sum() / count
    if float(variance) == 0:
        return 1.0
    total = 0.0
    for i in range(count):
        # Of i without j, for every j > i, and of j without i.
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
    """Return ⟨column, column⟩."""
    return (left * right).sum(dim=0)


def _wide(sketch: Sketch) -> torch.dtype:
    return torch.float32 if sketch.basis.device.type == "mps" else torch.float64


def _pieces(sketch: Sketch, sizes: tuple[int, ...]) -> list[slice]:
    """Return the blocks, cut where one is too large to be worked on at once."""
    width = max(1, STRIP // max(1, sketch.columns))
    pieces, start = [], 0
    for size in sizes:
        pieces += [
            slice(begin, min(begin + width, start + size))
            for begin in range(start, start + size, width)
        ]
        start += size
    return pieces


def _assembled(parts: list[Tensor], sketch: Sketch, sizes: tuple[int, ...]) -> Tensor:
    """Return the sums over the pieces of each block, shape (t, blocks), float64 on the host."""
    width = max(1, STRIP // max(1, sketch.columns))
    owners = [block for block, size in enumerate(sizes) for _ in range(-(-size // width))]
    table = torch.stack(parts, dim=1).cpu().double()
    out = torch.zeros(len(table), len(sizes), dtype=torch.float64)
    return out.index_add_(1, torch.tensor(owners), table)
