"""Estimates that leave one random vector out in turn (Epperly, Tropp and Webber 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from .sketch import STRIP, Sketch

__all__ = ["deflated_blocks", "xdiag", "xtrace", "xtrace_blocks"]


def xtrace(sketch: Sketch) -> Tensor:
    """XTrace's estimates of the trace, one for each column of Ω, shape (t,).

    With Qᵢ the basis without column ω of Ω, and x = (I − Qᵢ Qᵢᵀ) ω, it is

        tr(Qᵢᵀ A Qᵢ) + xᵀ A x · (n − rank Qᵢ) / ‖x‖²,

    where ω is uniform on a sphere, and so is x (their section 2.2, with A = Aᵀ).
    """
    r, h, w, s = sketch.factor, sketch.compressed, sketch.weights, sketch.left_out()
    inside = w - s * _dots(s, w)
    forms = _dots(w, r) - 2 * _dots(inside, r) + _dots(inside, h @ inside)
    return torch.trace(h) - _dots(s, h @ s) + forms * _resphered(sketch, s)


def _resphered(sketch: Sketch, directions: Tensor) -> Tensor:
    """(n − rank Qᵢ) / ‖x‖² for each column, shape (t,)."""
    n, w = sketch.operator.shape[0], sketch.weights
    lengths = n - _dots(w, w) + _dots(directions, w).square()
    ranks = sketch.rank - directions.square().sum(dim=0)
    return (n - ranks) / lengths


def xtrace_blocks(sketch: Sketch, sizes: tuple[int, ...]) -> Tensor:
    """The same for the traces of diagonal blocks of these sizes, shape (t, blocks).

    With P = Qᵢ Qᵢᵀ the diagonal of A is that of P A + A P − P A P, which is known, and that of
    (I − P) A (I − P), of which x ∘ (I − P) A x is an estimate. The blocks add up to `xtrace`.
    """
    device, wide = sketch.basis.device, _wide(sketch)
    s, h, r, w = sketch.left_out(), sketch.compressed, sketch.factor, sketch.weights
    inside = w - s * _dots(s, w)
    moved = r - h @ inside
    outside = r - (moved - s * _dots(s, moved))
    scale = _resphered(sketch, s)

    def there(matrix: Tensor) -> Tensor:
        return matrix.T.contiguous().to(device, wide)

    directions, pressed, squares = there(s), there(h @ s), _dots(s, h @ s).to(device, wide)
    inner, outer, factor, scales = there(inside), there(outside), there(h), scale.to(device, wide)
    parts = []
    for strip in _pieces(sketch, sizes):
        q = sketch.basis[:, strip].to(wide)
        z = sketch.images[:, strip].to(wide)
        omega = sketch.tests[:, strip].to(wide)
        missing = directions @ q
        # The diagonal of 2 P A − P A P, with P = Q (I − s sᵀ) Qᵀ.
        known = (q * (2 * z - factor @ q)).sum(dim=0)
        lost = missing * (2 * directions @ z - 2 * pressed @ q + squares[:, None] * missing)
        rest = (omega - inner @ q) * (outer @ q - inner @ z)
        parts.append((known.sum() - lost.sum(dim=1)) + scales * rest.sum(dim=1))
    return _assembled(parts, sketch, sizes)


def deflated_blocks(sketch: Sketch, sizes: tuple[int, ...]) -> Tensor:
    """Traces of the diagonal blocks of A − (I − Q Qᵀ) A (I − Q Qᵀ), shape (blocks,)."""
    factor = sketch.compressed.to(sketch.basis.device, _wide(sketch))
    parts = []
    for strip in _pieces(sketch, sizes):
        q, z = (rows[:, strip].to(factor.dtype) for rows in (sketch.basis, sketch.images))
        parts.append((q * (2 * z - factor @ q)).sum().unsqueeze(0))
    return _assembled(parts, sketch, sizes)[0]


def xdiag(sketch: Sketch) -> tuple[Tensor, Tensor]:
    """Mean and variance over i of XDiag's estimates of the diagonal, both of shape (n,).

    The estimate that leaves out column ω, of signs, is diag(Qᵢ Qᵢᵀ A) + ω ∘ (I − Qᵢ Qᵢᵀ) A ω
    (their section 2.4), and A ω = Q Rᵢ lies outside of Qᵢ along one direction only.
    """
    count, wide = sketch.columns, _wide(sketch)
    s = sketch.left_out()
    device = sketch.basis.device
    directions, heights = s.T.contiguous().to(device, wide), _dots(s, sketch.factor)
    heights = heights.to(device, wide)[:, None]
    mean = torch.empty(sketch.basis.shape[1], dtype=sketch.basis.dtype, device=device)
    variance = torch.empty_like(mean)
    for strip in _pieces(sketch, (len(mean),)):
        q = sketch.basis[:, strip].to(wide)
        z = sketch.images[:, strip].to(wide)
        missing = directions @ q
        samples = missing * (heights * sketch.tests[:, strip].to(wide) - directions @ z)
        mean[strip] = ((q * z).sum(dim=0) + samples.mean(dim=0)).to(mean.dtype)
        variance[strip] = samples.var(dim=0, correction=1).to(mean.dtype)
    return mean, variance


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """⟨column, column⟩."""
    return (left * right).sum(dim=0)


def _wide(sketch: Sketch) -> torch.dtype:
    return torch.float32 if sketch.basis.device.type == "mps" else torch.float64


def _pieces(sketch: Sketch, sizes: tuple[int, ...]) -> list[slice]:
    """The blocks, cut where one is too large to be worked on at once."""
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
    """The sums over the pieces of each block, shape (t, blocks), float64 on the host."""
    width = max(1, STRIP // max(1, sketch.columns))
    owners = [block for block, size in enumerate(sizes) for _ in range(-(-size // width))]
    table = torch.stack(parts, dim=1).cpu().double()
    out = torch.zeros(len(table), len(sizes), dtype=torch.float64)
    return out.index_add_(1, torch.tensor(owners), table)
