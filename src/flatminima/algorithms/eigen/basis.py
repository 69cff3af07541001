"""The basis of a Krylov space: one contiguous array, on any device and in any floating dtype."""

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
"""Entries of the basis that are copied at a time; on the CPU few enough to stay in its cache."""


class Basis:
    """Orthonormal rows; computations with them use the operator's dtype and the rows' device.

    Args:
        operator: gives dtype and device of the vectors that go in and come out.
        count: number of rows.
        size: n, the length of each row.
        device: device of the rows. Default: that of the operator.
        dtype: dtype of the rows. Default: that of the operator.
        advice: what the error says to do if there is not enough memory.
    """

    def __init__(
        self,
        operator: LinearOperator,
        count: int,
        size: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        advice: str = "Reduce basis_size= or k, store the basis elsewhere or in fewer bytes with "
        "basis_device='cpu' or basis_dtype=torch.bfloat16, or select fewer parameters.",
    ) -> None:
        self.outer, self.wide = operator.device, operator.dtype
        self.device, self.dtype = device or self.outer, dtype or self.wide
        self.narrow = self.dtype != self.wide
        # Float16 has few digits for small entries of long unit vectors; a power of two is exact.
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
        """Store a vector and return it as stored, on the operator's device."""
        self.rows[row] = vector * self.scale if self.narrow else vector
        return self.take(row) if self.narrow else vector.to(self.outer)

    def take(self, row: int) -> Tensor:
        """Return a row in the dtype and on the device of the operator."""
        vector = self.rows[row].to(self.outer).to(self.wide)
        return vector / self.scale if self.narrow else vector

    def first(self, count: int) -> Tensor:
        """Return unit copies of the first rows, in the dtype and on the device of the operator."""
        if not self.narrow:
            return self.rows[:count].to(self.outer, copy=True)
        rows = self.rows[:count].to(self.outer).to(self.wide)
        return rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))

    def coefficients(self, count: int, vector: Tensor, *, begin: int = 0) -> Tensor:
        """Return ⟨row, vector⟩ for the rows `begin` to `count`, on the device of the basis."""
        if not self.narrow:
            return self.rows[begin:count] @ vector
        coefficients = torch.zeros(count - begin, dtype=self.wide, device=self.device)
        for columns in self._strips(count):
            coefficients += self.rows[begin:count, columns].to(self.wide) @ vector[columns]
        return coefficients / self.scale

    def subtract(self, coefficients: Tensor, vector: Tensor, *, begin: int = 0) -> Tensor:
        """Return `vector` minus the rows from `begin` on times these coefficients."""
        count = begin + len(coefficients)
        if not self.narrow:
            return vector - self.rows[begin:count].T @ coefficients
        rest, coefficients = vector.clone(), coefficients / self.scale
        for columns in self._strips(count):
            rest[columns] -= self.rows[begin:count, columns].to(self.wide).T @ coefficients
        return rest

    def orthogonalize(self, count: int, vector: Tensor, *, begin: int = 0) -> tuple[Tensor, Tensor]:
        """Subtract the part of `vector` along the first `count` rows, twice.

        The first time only the rows from `begin` on are used, for a vector that is orthogonal to
        the others up to rounding.

        Returns:
            The coefficients of `vector` on these rows followed by the norm of the remainder,
            shape (count + 1,), and the remainder, both on the device of the basis.
        """
        first = self.coefficients(count, vector, begin=begin)
        vector = self.subtract(first, vector, begin=begin)
        coefficients = self.coefficients(count, vector)
        vector = self.subtract(coefficients, vector)
        coefficients[begin:] += first
        # In float64, since squares of small numbers underflow in float32.
        wide = None if vector.device.type == "mps" else torch.float64
        norm = torch.linalg.vector_norm(vector, dtype=wide).reshape(1)
        return torch.cat([coefficients.to(norm.dtype), norm]), vector

    def rotate(self, coefficients: np.ndarray[Any, np.dtype[np.float64]], count: int) -> None:
        """Replace the first `count` rows by linear combinations of them, a strip at a time."""
        if count == 0:
            return
        # In float64 if possible: PyTorch may be set to multiply float32 matrices in TF32.
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
    """Return the device for the basis of `call`, if it can hold one.

    Raises:
        DeviceError: the device does not exist, or is "meta".
    """
    found = check_device(call, device, "basis_device")
    if found.type == "meta":
        raise DeviceError(
            f"The 'basis_device' argument of {call} is 'meta', which holds no numbers; use 'cpu'."
        )
    return found
