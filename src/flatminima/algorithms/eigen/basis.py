"""The vectors of a Krylov space: one contiguous array, on any device, in any floating type."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import DeviceError, DeviceMemoryError
from ...operators.linear import LinearOperator
from ...support.checks import check_device
from ...support.failures import is_out_of_memory

__all__ = ["Basis", "check_basis_device"]

STRIP, CPU_STRIP = 2**22, 2**17
"""Entries of the basis that are worked on at a time where a copy of them is needed: on the CPU so
few that they stay in its cache."""


class Basis:
    """Orthonormal rows. What is computed with them is of the operator's type, where they lie.

    Args:
        operator: gives type and device of the vectors that go in and come out.
        count: of the rows.
        size: n, of each.
        device: where the rows lie; the operator's when None.
        dtype: of the rows; the operator's when None.
        advice: what to do where memory does not suffice.
    """

    def __init__(
        self,
        operator: LinearOperator,
        count: int,
        size: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        advice: str = "Lower basis_size= or k, keep it elsewhere or in fewer bytes with "
        "basis_device='cpu' or basis_dtype=torch.bfloat16, or select fewer parameters.",
    ) -> None:
        self.outer, self.wide = operator.device, operator.dtype
        self.device, self.dtype = device or self.outer, dtype or self.wide
        self.narrow = self.dtype != self.wide
        # The entries of long unit vectors lie where float16 has few digits; a power of two.
        self.scale = 2.0 ** round(math.log2(size) / 2) if self.dtype == torch.float16 else 1.0
        try:
            self.rows = torch.empty(count, size, dtype=self.dtype, device=self.device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceMemoryError(
                f"There is not enough memory on {self.device} for a basis of {count} vectors of "
                f"length {size}. {advice}"
            ) from error

    def __len__(self) -> int:
        return len(self.rows)

    def put(self, row: int, vector: Tensor) -> Tensor:
        """Store a vector; it comes back as it was stored, on the operator's device."""
        self.rows[row] = vector * self.scale if self.narrow else vector
        return self.take(row) if self.narrow else vector.to(self.outer)

    def take(self, row: int) -> Tensor:
        """Return a row, as the operator takes it."""
        vector = self.rows[row].to(self.outer).to(self.wide)
        return vector / self.scale if self.narrow else vector

    def first(self, count: int) -> Tensor:
        """Return a copy of the first rows, of length one, as the operator takes them."""
        if not self.narrow:
            return self.rows[:count].to(self.outer, copy=True)
        rows = self.rows[:count].to(self.outer).to(self.wide)
        return rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))

    def heights(self, count: int, vector: Tensor, *, begin: int = 0) -> Tensor:
        """Return ⟨row, vector⟩ for the rows from `begin` up to `count`, where the basis lies."""
        if not self.narrow:
            return self.rows[begin:count] @ vector
        heights = torch.zeros(count - begin, dtype=self.wide, device=self.device)
        for columns in self._strips(count):
            heights += self.rows[begin:count, columns].to(self.wide) @ vector[columns]
        return heights / self.scale

    def without(self, heights: Tensor, vector: Tensor, *, begin: int = 0) -> Tensor:
        """`vector` less the combination of the rows from `begin` on with these coefficients."""
        count = begin + len(heights)
        if not self.narrow:
            return vector - self.rows[begin:count].T @ heights
        rest, heights = vector.clone(), heights / self.scale
        for columns in self._strips(count):
            rest[columns] -= self.rows[begin:count, columns].to(self.wide).T @ heights
        return rest

    def remainder(self, count: int, vector: Tensor, *, begin: int = 0) -> tuple[Tensor, Tensor]:
        """Return `vector` less its part along the first `count` rows, taken away twice.

        The first time only along the rows from `begin` on, if it is orthogonal to the others but
        for rounding.

        Returns:
            Its heights over these rows and then the norm of what is left, shape (count + 1,), and
            what is left, both where the basis lies.
        """
        first = self.heights(count, vector, begin=begin)
        vector = self.without(first, vector, begin=begin)
        heights = self.heights(count, vector)
        vector = self.without(heights, vector)
        heights[begin:] += first
        # In float64, as squares of small numbers vanish in float32.
        wide = None if vector.device.type == "mps" else torch.float64
        norm = torch.linalg.vector_norm(vector, dtype=wide).reshape(1)
        return torch.cat([heights.to(norm.dtype), norm]), vector

    def rotate(self, coefficients: np.ndarray[Any, np.dtype[np.float64]], count: int) -> None:
        """Put combinations of the first `count` rows in their place, a strip at a time."""
        if count == 0:
            return
        # In float64 where there is: PyTorch may be set to multiply float32 matrices in less.
        exact = self.wide if self.device.type == "mps" else torch.float64
        small = torch.as_tensor(coefficients.T.copy()).to(self.device, exact)
        for columns in self._strips(count):
            block = self.rows[:count, columns].to(exact)
            self.rows[: len(small), columns] = (small @ block).to(self.dtype)

    def _strips(self, count: int) -> list[slice]:
        entries = min(STRIP, CPU_STRIP) if self.device.type == "cpu" else STRIP
        width = max(1, entries // max(1, count))
        return [slice(begin, begin + width) for begin in range(0, self.rows.shape[1], width)]


def check_basis_device(call: str, device: torch.device | str) -> torch.device:
    """Return the device where the basis of `call` is to lie, when it can."""
    found = check_device(call, device, "basis_device")
    if found.type == "meta":
        raise DeviceError(
            f"The 'basis_device' argument of {call} is 'meta', which holds no numbers; use 'cpu'."
        )
    return found
