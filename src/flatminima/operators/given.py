"""Operators that the user has at hand: a matrix, or a function that multiplies by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import (
    ArgumentTypeError,
    DeviceError,
    InvalidArgumentError,
    NonFiniteError,
    NotSymmetricError,
    ShapeError,
)
from ..support.checks import check_device, check_integer
from .linear import LinearOperator

__all__ = ["FunctionOperator", "MatrixOperator"]


class MatrixOperator(LinearOperator):
    """A symmetric matrix that is at hand.

    Args:
        matrix: (n, n), a tensor or an array; it must be symmetric.

    Raises:
        ArgumentTypeError: complex.
        ShapeError: not square.
        NonFiniteError: NaN or infinity in it.
        NotSymmetricError: it differs from its transpose by more than rounding.

    Examples:
        >>> import torch, flatminima as fm
        >>> operator = fm.MatrixOperator(torch.diag(torch.tensor([1.0, 5.0])))
        >>> round(fm.lanczos(operator).eigenvalues.item(), 4)
        5.0
    """

    def __init__(self, matrix: Tensor | np.ndarray[Any, Any]) -> None:
        tensor = torch.as_tensor(matrix).detach()
        if tensor.dim() != 2 or tensor.shape[0] != tensor.shape[1] or tensor.shape[0] == 0:
            raise ShapeError(f"MatrixOperator takes shape (n, n); got {tuple(tensor.shape)}.")
        if tensor.dtype.is_complex:
            raise ArgumentTypeError(f"MatrixOperator takes a real matrix; got {tensor.dtype}.")
        if not tensor.dtype.is_floating_point:
            tensor = tensor.to(torch.float64)
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError("MatrixOperator was given a matrix with NaN or infinity.")
        scale = float(tensor.abs().max())
        skew = float((tensor - tensor.T).abs().max())
        if skew > 100 * torch.finfo(tensor.dtype).eps * scale:
            raise NotSymmetricError(
                f"MatrixOperator takes a symmetric matrix; this one differs from its transpose "
                f"by {skew:.2e}. Give (A + A.T) / 2 if that is what is meant."
            )
        super().__init__(tensor.shape[0], tensor.dtype, tensor.device)
        self.matrix = tensor

    @property
    def knows_diagonal(self) -> bool:
        """It does."""
        return True

    def exact_diagonal(self) -> Tensor:
        """Return the diagonal of the matrix, a new tensor of shape (n,)."""
        return torch.diagonal(self.matrix).clone()

    def _products(self, vectors: Tensor) -> Tensor:
        return vectors @ self.matrix


class FunctionOperator(LinearOperator):
    """A symmetric matrix given by a function that multiplies by it.

    Args:
        function: (n,) tensor → (n,) tensor, linear and symmetric.
        size: n.
        dtype: of the vectors that `function` takes.
        device: of the vectors that `function` takes.

    Raises:
        ArgumentTypeError: `function` is not callable.
        InvalidArgumentError: `size` is below 1.
        DeviceError: there is no such device.

    Examples:
        >>> import torch, flatminima as fm
        >>> double = fm.FunctionOperator(lambda v: 2 * v, 3)
        >>> double @ torch.tensor([1.0, 2.0, 3.0])
        tensor([2., 4., 6.])
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if not callable(function):
            raise ArgumentTypeError(
                f"The 'function' argument of FunctionOperator must be callable; got {function!r}."
            )
        if not dtype.is_floating_point:
            raise InvalidArgumentError(f"FunctionOperator needs a floating dtype; got {dtype}.")
        check_integer("FunctionOperator", "size", size, low=1)
        super().__init__(size, dtype, check_device("FunctionOperator", device))
        self.function = function

    def _products(self, vectors: Tensor) -> Tensor:
        products = torch.empty_like(vectors)
        for vector, out in zip(vectors, products, strict=True):
            product = self.function(vector.clone())
            if not isinstance(product, Tensor) or product.shape != vector.shape:
                got = tuple(product.shape) if isinstance(product, Tensor) else type(product)
                raise ShapeError(
                    f"The function of a FunctionOperator must return shape ({self.shape[0]},); "
                    f"it gave {got}."
                )
            if product.device != self.device:
                raise DeviceError(
                    f"The function of a FunctionOperator works on {self.device}; its product lies "
                    f"on {product.device}."
                )
            # Copied at once: the function may write its next product into the same tensor.
            out.copy_(product.detach())
        return products
