"""An orthonormal basis of what an operator makes of random vectors, and what lies outside of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import DeviceMemoryError, InvalidArgumentError
from ...operators.linear import LinearOperator
from ...support.failures import is_out_of_memory
from ...support.randomness import rademacher
from .probes import blocks, products_of

__all__ = ["LEAST", "SKETCH_BYTES", "STRIP", "Sketch", "check_precision"]

STRIP = 2**22
"""Entries of a matrix that are worked on at a time in float64."""
SKETCH_BYTES = 2**30
"""Of the vectors that a sketch keeps by default. A fixed number, so that a call gives
the same result whatever memory happens to be free."""
LEAST = 4
"""Products for a sketch and an error."""


def check_precision(call: str, operator: LinearOperator) -> None:
    """Refuse vectors in which no basis can be orthonormal."""
    if torch.finfo(operator.dtype).bits < 32:
        raise InvalidArgumentError(
            f"The 'method' argument of {call} must be 'hutchinson' for products in "
            f"{operator.dtype}: a sketch needs float32 or float64."
        )


class Sketch:
    """Q with Qᵀ Q = I and A Ω = Q R for random Ω, and Z = A Q, by rows; it can be extended.

    The vectors are of the operator's type, where the operator is; what is computed from them is
    accumulated in float64. Directions of A Ω that rounding alone has made are left out of Q.

    Args:
        operator: A, n × n, of float32 or float64.
        generator: draws Ω.
        signs: Ω has independent entries ±1; otherwise its columns are uniform on the sphere of
            radius √n.
        keep: the columns of Ω, which what leaves them out one by one needs.
        step: called with the size of each block of products.

    Attributes:
        tests: Ωᵀ, shape (t, n); none where they are not kept.
        basis: Qᵀ, shape (r, n), r ≤ t.
        images: Zᵀ, shape (r, n).
        factor: R, shape (r, t), float64 on the host, like those that follow.
        compressed: H = Qᵀ A Q, shape (r, r).
        weights: Qᵀ Ω, shape (r, t), where Ω is kept.
    """

    def __init__(
        self,
        operator: LinearOperator,
        generator: torch.Generator,
        *,
        signs: bool,
        keep: bool,
        step: Callable[[int], object],
    ) -> None:
        self.operator, self._generator, self._step = operator, generator, step
        self._signs, self._keep = signs, keep
        none = torch.empty(0, operator.shape[0], dtype=operator.dtype, device=operator.device)
        self.tests, self.basis, self.images = none, none, none
        empty = torch.empty(0, 0, dtype=torch.float64)
        self.factor, self.compressed, self.weights = empty, empty, empty
        self._scale = 0.0

    @property
    def rank(self) -> int:
        """R."""
        return len(self.basis)

    @property
    def columns(self) -> int:
        """T."""
        return self.factor.shape[1]

    def extend(self, count: int) -> None:
        """Take `count` more columns of Ω: one product for each, one for each new column of Q.

        Raises:
            NonFiniteError: a product holds NaN or infinity.
            DeviceMemoryError: the vectors do not fit.
        """
        try:
            self._extend(count)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceMemoryError(
                f"There is not enough memory on {self.operator.device} for a sketch with "
                f"{self.columns + count} vectors of length {self.operator.shape[0]}. Lower "
                "products=, or use method='hutchinson', which keeps none."
            ) from error

    def _extend(self, count: int) -> None:
        tests = self._draw(count)
        fresh = products_of(self.operator, tests, self._step)
        lengths = torch.linalg.vector_norm(fresh, dim=1)
        self._scale = max(self._scale, float(lengths.max()))
        upper, lower = torch.zeros(self.rank, count).double(), torch.eye(count).double()
        # Twice, since what is left of a vector after the first time may be mostly rounding.
        for _ in range(2 if self.rank else 1):
            inside = gram(self.basis, fresh)
            subtract(fresh, inside, self.basis)
            upper += inside @ lower
            fresh, triangle = _orthonormal(fresh)
            lower = triangle @ lower
        left, sizes, right = torch.linalg.svd(lower)
        floor = 10 * torch.finfo(self.operator.dtype).eps * self._scale
        kept = int((sizes > floor).sum())
        if kept < count:
            fresh = combine(left[:, :kept].T, fresh)
            lower = sizes[:kept, None] * right[:kept]
        images = products_of(self.operator, fresh, self._step)
        across, corner = gram(self.basis, images), gram(fresh, images)
        self.compressed = _join(self.compressed, across, across.T, (corner + corner.T) / 2)
        below = torch.zeros(kept, self.columns).double()
        self.factor = _join(self.factor, upper, below, lower)
        if self._keep:
            self.weights = _join(
                self.weights, gram(self.basis, tests), gram(fresh, self.tests), gram(fresh, tests)
            )
            self.tests = _stack(self.tests, tests)
        self.basis, self.images = _stack(self.basis, fresh), _stack(self.images, images)

    def _draw(self, count: int) -> Tensor:
        operator, generator = self.operator, self._generator
        n, dtype, device = operator.shape[0], operator.dtype, operator.device
        if self._signs:
            signs = torch.empty(count, n, dtype=dtype, device=device)
            for block in blocks(operator, count):
                rows = block.stop - block.start
                signs[block] = rademacher(rows, n, generator, dtype=dtype, device=device)
            return signs
        draw = torch.randn(count, n, generator=generator, device=generator.device, dtype=dtype)
        return torch.nn.functional.normalize(draw.to(device), dim=1).mul_(n**0.5)

    def project(self, rows: Tensor) -> Tensor:
        """Return (I − Q Qᵀ) applied to each row; a new tensor."""
        out = rows.clone()
        subtract(out, gram(self.basis, rows), self.basis)
        return out

    def left_out(self) -> Tensor:
        """Return S, shape (r, t): Q Sᵢ is the direction that Q would lack without column i of Ω.

        Its columns are of length one, or zero where the other columns span the same space. They
        are those of R⁻ᵀ, normalised (Epperly, Tropp and Webber 2024, section 2.1).
        """
        if self.rank == 0:
            return torch.zeros_like(self.factor)
        left, sizes, right = torch.linalg.svd(self.factor, full_matrices=False)
        floor = torch.finfo(torch.float64).eps * float(sizes[0])
        directions: Tensor = left @ (right / sizes.clamp(min=floor)[:, None])
        directions /= torch.linalg.vector_norm(directions, dim=0).clamp(min=1e-300)
        # The rows of `right` reproduce the unit vector of a column that no others replace.
        needed: Tensor = right.square().sum(dim=0) > 1 - 1e-12
        return directions.mul_(needed)

    @property
    def rounding(self) -> float:
        """How far a trace may be off since products are rounded."""
        size = math.sqrt(self.rank) * float(torch.linalg.matrix_norm(self.compressed))
        return 8 * float(torch.finfo(self.operator.dtype).eps) * size


def gram(left: Tensor, right: Tensor) -> Tensor:
    """Return ⟨row, row⟩ for the rows of two matrices (a, n) and (b, n), float64 on the host."""
    total = torch.zeros(len(left), len(right), dtype=_wide(left), device=left.device)
    for strip in _strips(left, right):
        total += left[:, strip].to(total.dtype) @ right[:, strip].to(total.dtype).T
    return total.cpu().double()


def subtract(rows: Tensor, coefficients: Tensor, basis: Tensor) -> None:
    """Rows −= coefficientsᵀ basis, in place; shapes (k, n), (r, k) and (r, n)."""
    small = coefficients.T.to(basis.device, _wide(basis))
    for strip in _strips(rows, basis):
        rows[:, strip] -= (small @ basis[:, strip].to(small.dtype)).to(rows.dtype)


def combine(coefficients: Tensor, rows: Tensor) -> Tensor:
    """Return coefficients @ rows, shapes (a, k) and (k, n)."""
    out = rows.new_zeros(len(coefficients), rows.shape[1])
    subtract(out, -coefficients.T, rows)
    return out


def _orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows that are orthonormal, and R with the given ones as Rᵀ times them, on the host."""
    # Householder's reflections, which need no well-conditioned rows; MPS does not have them.
    there = rows.cpu() if rows.device.type == "mps" else rows
    columns, triangle = torch.linalg.qr(there.T)
    return columns.T.contiguous().to(rows.device), triangle.cpu().double()


def _strips(one: Tensor, other: Tensor) -> list[slice]:
    width = max(1, STRIP // max(1, len(one) + len(other)))
    return [slice(begin, begin + width) for begin in range(0, one.shape[1], width)]


def _wide(like: Tensor) -> torch.dtype:
    # PyTorch may be set to multiply float32 matrices in less.
    return torch.float32 if like.device.type == "mps" else torch.float64


def _join(one: Tensor, two: Tensor, three: Tensor, four: Tensor) -> Tensor:
    """Return [[one, two], [three, four]]."""
    return torch.cat([torch.cat([one, two], dim=1), torch.cat([three, four], dim=1)])


def _stack(one: Tensor, two: Tensor) -> Tensor:
    return torch.cat([one, two]) if len(one) else two
