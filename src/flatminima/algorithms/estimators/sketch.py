"""An orthonormal basis of the images of random vectors, and the projection on its complement."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import DeviceMemoryError, InvalidArgumentError
from ...operators.linear import LinearOperator
from ...support.failures import is_out_of_memory
from ...support.randomness import draw_signs
from .probes import multiply_rows, split_rows

__all__ = ["LEAST", "SKETCH_BYTES", "STRIP", "Sketch", "check_precision"]

STRIP = 2**22
"""Entries of a matrix that are processed at a time in float64."""
SKETCH_BYTES = 2**30
"""Default limit for the vectors of a sketch. A fixed number, since results must not depend on how
much memory is free."""
LEAST = 4
"""Smallest number of products for a sketch with a standard error."""


def check_precision(call: str, operator: LinearOperator) -> None:
    """Raise if products are in half precision, in which no basis can be orthonormal."""
    if torch.finfo(operator.dtype).bits < 32:
        raise InvalidArgumentError(
            f"The 'method' argument of {call} must be 'hutchinson' for products in "
            f"{operator.dtype}: a sketch needs float32 or float64."
        )


class Sketch:
    """An extensible basis Q with Qᵀ Q = I and A Ω = Q R for random Ω, and Z = A Q, all by rows.

    The vectors have the dtype and device of the operator; computations with them accumulate in
    float64. Directions of A Ω that are only rounding errors are left out of Q.

    Args:
        operator: A, n × n, in float32 or float64.
        generator: draws Ω.
        signs: draw Ω with independent entries ±1; otherwise its columns are uniform on the sphere
            of radius √n.
        keep: keep Ω, which is needed to leave out its columns one by one.
        step: called with the size of each block of products.

    Attributes:
        tests: Ωᵀ, shape (t, n); (0, n) without `keep`.
        basis: Qᵀ, shape (r, n), r ≤ t.
        images: Zᵀ, shape (r, n).
        factor: R, shape (r, t); float64 on the host, like the following ones.
        compressed: H = Qᵀ A Q, shape (r, r).
        weights: Qᵀ Ω, shape (r, t); (0, 0) without `keep`.
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
        """The number r of basis vectors."""
        return len(self.basis)

    @property
    def columns(self) -> int:
        """The number t of columns of Ω."""
        return self.factor.shape[1]

    def extend(self, count: int) -> None:
        """Add `count` columns of Ω, with one product for each, and one for each new column of Q.

        Raises:
            NonFiniteError: a product holds NaN or infinity.
            DeviceMemoryError: the vectors do not fit into memory.
        """
        try:
            self._extend(count)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceMemoryError(
                f"There is not enough memory on {self.operator.device} for a sketch with "
                f"{self.columns + count} vectors of length {self.operator.shape[0]}. Reduce "
                "products=, or use method='hutchinson', which stores no sketch."
            ) from error

    def _extend(self, count: int) -> None:
        tests = self._draw(count)
        fresh = multiply_rows(self.operator, tests, self._step)
        lengths = torch.linalg.vector_norm(fresh, dim=1)
        self._scale = max(self._scale, float(lengths.max()))
        upper, lower = torch.zeros(self.rank, count).double(), torch.eye(count).double()
        # Twice, since a small remainder after the first time may be mostly rounding.
        for _ in range(2 if self.rank else 1):
            inside = gram(self.basis, fresh)
            subtract(fresh, inside, self.basis)
            upper += inside @ lower
            fresh, triangle = _orthonormalize(fresh)
            lower = triangle @ lower
        left, sizes, right = torch.linalg.svd(lower)
        floor = 10 * torch.finfo(self.operator.dtype).eps * self._scale
        kept = int((sizes > floor).sum())
        if kept < count:
            fresh = combine(left[:, :kept].T, fresh)
            lower = sizes[:kept, None] * right[:kept]
        images = multiply_rows(self.operator, fresh, self._step)
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
            for block in split_rows(operator, count):
                rows = block.stop - block.start
                signs[block] = draw_signs(rows, n, generator, dtype=dtype, device=device)
            return signs
        draw = torch.randn(count, n, generator=generator, device=generator.device, dtype=dtype)
        return torch.nn.functional.normalize(draw.to(device), dim=1).mul_(n**0.5)

    def project(self, rows: Tensor) -> Tensor:
        """Return a new tensor with (I − Q Qᵀ) applied to each row."""
        out = rows.clone()
        subtract(out, gram(self.basis, rows), self.basis)
        return out

    def missing_directions(self) -> Tensor:
        """Return S, shape (r, t): Q Sᵢ is the direction that Q loses without column i of Ω.

        The columns have length one, or zero if the other columns of Ω span the same space. They
        are the normalised columns of R⁻ᵀ (Epperly, Tropp and Webber 2024, section 2.1).
        """
        if self.rank == 0:
            return torch.zeros_like(self.factor)
        left, sizes, right = torch.linalg.svd(self.factor, full_matrices=False)
        floor = torch.finfo(torch.float64).eps * float(sizes[0])
        directions: Tensor = left @ (right / sizes.clamp(min=floor)[:, None])
        directions /= torch.linalg.vector_norm(directions, dim=0).clamp(min=1e-300)
        # Columns that the others replace are not reproduced by the rows of `right`.
        needed: Tensor = right.square().sum(dim=0) > 1 - 1e-12
        return directions.mul_(needed)

    @property
    def rounding(self) -> float:
        """The error of a trace due to rounding of the products."""
        size = math.sqrt(self.rank) * float(torch.linalg.matrix_norm(self.compressed))
        return 8 * float(torch.finfo(self.operator.dtype).eps) * size


def gram(left: Tensor, right: Tensor) -> Tensor:
    """Return the dot products of the rows of (a, n) and (b, n), in float64 on the host."""
    total = torch.zeros(len(left), len(right), dtype=_wide(left), device=left.device)
    for strip in _strips(left, right):
        total += left[:, strip].to(total.dtype) @ right[:, strip].to(total.dtype).T
    return total.cpu().double()


def subtract(rows: Tensor, coefficients: Tensor, basis: Tensor) -> None:
    """Subtract coefficientsᵀ basis from the rows in place; shapes (k, n), (r, k) and (r, n)."""
    small = coefficients.T.to(basis.device, _wide(basis))
    for strip in _strips(rows, basis):
        rows[:, strip] -= (small @ basis[:, strip].to(small.dtype)).to(rows.dtype)


def combine(coefficients: Tensor, rows: Tensor) -> Tensor:
    """Return coefficients @ rows, shapes (a, k) and (k, n)."""
    out = rows.new_zeros(len(coefficients), rows.shape[1])
    subtract(out, -coefficients.T, rows)
    return out


def _orthonormalize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal rows Q, and R on the host, such that the given rows are Rᵀ Q."""
    # Householder reflections, which also suit ill-conditioned rows; MPS lacks them.
    there = rows.cpu() if rows.device.type == "mps" else rows
    columns, triangle = torch.linalg.qr(there.T)
    return columns.T.contiguous().to(rows.device), triangle.cpu().double()


def _strips(one: Tensor, other: Tensor) -> list[slice]:
    width = max(1, STRIP // max(1, len(one) + len(other)))
    return [slice(begin, begin + width) for begin in range(0, one.shape[1], width)]


def _wide(like: Tensor) -> torch.dtype:
    # PyTorch may be set to multiply float32 matrices in TF32.
    return torch.float32 if like.device.type == "mps" else torch.float64


def _join(one: Tensor, two: Tensor, three: Tensor, four: Tensor) -> Tensor:
    """Return [[one, two], [three, four]]."""
    return torch.cat([torch.cat([one, two], dim=1), torch.cat([three, four], dim=1)])


def _stack(one: Tensor, two: Tensor) -> Tensor:
    return torch.cat([one, two]) if len(one) else two
