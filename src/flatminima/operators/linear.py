"""Symmetric linear operators known by their products with vectors."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import (
    ArgumentTypeError,
    DeviceError,
    InvalidArgumentError,
    NonFiniteError,
    ShapeError,
)
from ..support.checks import check_number
from ..support.progress import progress_bar
from ..support.vectors import Layout, all_finite, check_vector

__all__ = [
    "LinearOperator",
    "Reader",
    "SumOperator",
    "check_operator",
]

DENSE = 20_000
"""Largest n of a dense matrix, of 3.2 GB in float64."""

BLOCK = 64
"""Unit vectors multiplied at once."""


class Reader(Protocol):
    """What counts how often data are read."""

    @property
    def readings(self) -> int:
        """How often, so far."""


class LinearOperator(ABC):
    """A symmetric n × n matrix that is known by its products.

    A subclass says what `shape`, `dtype` and `device` are and computes `_products`; every
    algorithm in `eigen` and `estimators` takes nothing else.

    Attributes:
        shape: (n, n).
        dtype: of the vectors.
        device: of the vectors.
        error: how far a product with a unit vector is known to be off, beyond rounding; an
            operator whose products are not exact raises it as it learns more.
        floor: products with unit vectors shorter than this are lost in rounding; 0 where
            only their own precision limits them.

    Examples:
        >>> import torch, flatminima as fm
        >>> operator = fm.MatrixOperator(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> operator @ torch.tensor([1.0, 1.0])
        tensor([3., 3.])
        >>> operator @ torch.eye(2)
        tensor([[2., 1.],
                [1., 2.]])
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape: tuple[int, int] = (size, size)
        self.dtype = dtype
        self.device = device
        self.error = 0.0
        self.floor = 0.0

    @property
    def readings(self) -> int:
        """How often data that are not kept on the device have been read for it so far."""
        return 0

    @property
    def _readers(self) -> tuple[Reader, ...]:
        """Who counts `readings`: operators made of several ones count each of them once."""
        return (self,)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a result should say of how products are computed at present."""
        return ()

    @property
    def layout(self) -> Layout | None:
        """Which parameters the entries of a vector belong to; None where there are none."""
        return None

    @property
    def parameters(self) -> dict[str, nn.Parameter] | None:
        """The parameters themselves by name, where there are any."""
        return None

    @property
    def knows_diagonal(self) -> bool:
        """Whether `exact_diagonal` gives it, at next to no cost."""
        return False

    def exact_diagonal(self) -> Tensor | None:
        """The diagonal, shape (n,), where there is a way without products; None where not."""
        return None

    @abstractmethod
    def _products(self, vectors: Tensor) -> Tensor:
        """The products with the rows of `vectors` (k, n), as the rows of a new tensor (k, n)."""

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product with `vector`, shape (n,) → (n,).

        Raises:
            ShapeError: `vector` has another shape.
            DeviceError: `vector` lies on another device.
            NonFiniteError: `vector`, or the product, holds NaN or infinity.
        """
        checked = check_vector(
            f"{type(self).__name__}.matvec",
            vector,
            size=self.shape[0],
            dtype=self.dtype,
            device=self.device,
        )
        return self._finite(self._products(checked.unsqueeze(0)))[0]

    def matmat(self, matrix: Tensor) -> Tensor:
        """Return the products with the columns of `matrix`, shape (n, k) → (n, k).

        Raises:
            ShapeError: `matrix` has another shape.
            DeviceError: `matrix` lies on another device.
            NonFiniteError: `matrix`, or a product, holds NaN or infinity.
        """
        checked = check_vector(
            f"{type(self).__name__}.matmat",
            matrix,
            size=self.shape[0],
            dtype=self.dtype,
            device=self.device,
            columns=True,
        )
        if checked.shape[1] == 0:
            return checked.clone()
        return self._finite(self._products(checked.T.contiguous())).T

    def _finite(self, products: Tensor) -> Tensor:
        if not all_finite(products):
            raise NonFiniteError(
                f"A product with {self!r} holds NaN or infinity. Where the loss is finite, half "
                "precision may have overflowed: use bfloat16 or float32."
            )
        return products

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """While it lasts, an operator may keep what makes further products cheaper.

        The algorithms of this library enter it by themselves. It frees everything at its end.
        """
        yield

    def __matmul__(self, other: Tensor) -> Tensor:
        if not isinstance(other, Tensor):
            raise ArgumentTypeError(
                f"{type(self).__name__} @ takes a torch.Tensor of shape (n,) or (n, k); got "
                f"{type(other).__name__}."
            )
        if other.dim() not in (1, 2):
            raise ShapeError(
                f"{type(self).__name__} @ takes shape ({self.shape[0]},) or ({self.shape[0]}, k); "
                f"got {tuple(other.shape)}."
            )
        return self.matvec(other) if other.dim() == 1 else self.matmat(other)

    # numpy's arrays and numbers leave `array * operator` and the like to the operator.
    __array_ufunc__ = None

    def __add__(self, other: LinearOperator) -> LinearOperator:
        """A + B."""
        if not isinstance(other, LinearOperator):
            self._refuse("+", other)
        return SumOperator([self, other])

    def __radd__(self, other: object) -> LinearOperator:
        """For numbers and matrices in front, an error that says what to write."""
        self._refuse("+", other)

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        """A − B."""
        if not isinstance(other, LinearOperator):
            self._refuse("-", other)
        return SumOperator([self, other], [1.0, -1.0])

    def __rsub__(self, other: object) -> LinearOperator:
        """As `__radd__`."""
        self._refuse("-", other)

    def _refuse(self, sign: str, other: object) -> NoReturn:
        raise ArgumentTypeError(
            f"{type(self).__name__} {sign} takes another operator; got {type(other).__name__}. For "
            "a multiple of the identity write operator.shifted(number), for a matrix "
            "fm.MatrixOperator(matrix), and for the sum of a list fm.SumOperator(operators)."
        )

    def __mul__(self, factor: float) -> LinearOperator:
        """C A, also written `c * A`."""
        shape = tuple(getattr(factor, "shape", ()))
        if shape or isinstance(factor, (bool, str)) or not hasattr(factor, "__float__"):
            raise ArgumentTypeError(
                f"{type(self).__name__} * takes a number; got {type(factor).__name__}"
                + (f" of shape {shape}" if shape else "")
                + ". The product with a vector is written operator @ vector."
            )
        return SumOperator([self], [float(factor)])

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> LinearOperator:
        """A / c."""
        return self * (1 / check_number(f"{type(self).__name__} /", "divisor", divisor))

    def __neg__(self) -> LinearOperator:
        """−A."""
        return self * -1.0

    def shifted(self, shift: float) -> LinearOperator:
        """Return a + shift · I.

        Examples:
            >>> import torch, flatminima as fm
            >>> operator = fm.MatrixOperator(torch.eye(2))
            >>> (2 * operator + operator).shifted(0.5) @ torch.ones(2)
            tensor([3.5000, 3.5000])
        """
        return SumOperator([self], shift=check_number("shifted", "shift", shift))

    def to_dense(self, *, progress: bool = True) -> Tensor:
        """Return the matrix itself, shape (n, n), by a product with each unit vector.

        Args:
            progress: show a bar if it takes long.

        Raises:
            InvalidArgumentError: n is above 20000.
            NonFiniteError: a product holds NaN or infinity.

        Examples:
            >>> import torch, flatminima as fm
            >>> fm.FunctionOperator(lambda v: 2 * v, 2).to_dense()
            tensor([[2., 0.],
                    [0., 2.]])
        """
        n = self.shape[0]
        if n > DENSE:
            raise InvalidArgumentError(
                f"{type(self).__name__}.to_dense would make a matrix of {n} × {n} numbers and "
                f"takes n ≤ {DENSE}. Select fewer parameters, or use lanczos, trace, diagonal or "
                "spectral_density, which need products alone."
            )
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        with (
            self.session(),
            progress_bar("dense matrix", total=n, unit="product", show=progress) as bar,
        ):
            for start in range(0, n, BLOCK):
                rows = out[start : start + BLOCK]
                unit = torch.zeros_like(rows)
                unit.diagonal(start).fill_(1)
                rows.copy_(self._products(unit))
                bar.update(len(rows))
        return self._finite(out)

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        """Return ⟨left, right⟩ of two (n,) vectors, a scalar tensor on the device."""
        return torch.dot(left, right)

    def to_scipy(self) -> Any:
        """Return the same operator as a `scipy.sparse.linalg.LinearOperator` on host arrays.

        Examples:
            >>> import torch, flatminima as fm
            >>> from scipy.sparse.linalg import eigsh
            >>> matrix = torch.diag(torch.arange(1.0, 21.0, dtype=torch.float64))
            >>> values = eigsh(fm.MatrixOperator(matrix).to_scipy(), k=1)[0]
            >>> round(float(values[0]), 6)
            20.0
        """
        from scipy.sparse.linalg import LinearOperator as ScipyOperator

        dtype = np.dtype(str(self.dtype).removeprefix("torch."))

        def products(array: Any) -> Any:
            columns = torch.as_tensor(np.array(array.reshape(self.shape[0], -1)))
            out = self.matmat(columns.to(self.device, self.dtype)).cpu().numpy()
            return out.reshape(array.shape)

        return ScipyOperator(
            self.shape,
            matvec=products,
            rmatvec=products,
            matmat=products,
            rmatmat=products,
            dtype=dtype,
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.shape[0]} × {self.shape[1]}, {self.dtype}, {self.device})"
        )


def check_operator(call: str, operator: object) -> LinearOperator:
    """Return `operator` when it is one."""
    if not isinstance(operator, LinearOperator):
        raise ArgumentTypeError(
            f"The 'operator' argument of {call} must be a LinearOperator; got "
            f"{type(operator).__name__}. Use fm.HessianOperator(objective), "
            "fm.MatrixOperator(matrix) or fm.FunctionOperator(function, size)."
        )
    return operator


class SumOperator(LinearOperator):
    """Σ c_i A_i + τ I, which `A + B`, `A - B`, `c * A` and `A.shifted(τ)` make.

    Args:
        operators: A_i, of one size, type and device.
        coefficients: c_i. Default: ones.
        shift: τ.

    Attributes:
        operators: as given, sums among them resolved.
        coefficients: one for each.
        shift: τ in all.

    Raises:
        ShapeError: the sizes differ.
        DeviceError: the devices differ.
        InvalidArgumentError: the types differ, there are none, or a coefficient is not finite.
        ArgumentTypeError: something is no list, no operator or no number.

    Examples:
        >>> import torch, flatminima as fm
        >>> a = fm.MatrixOperator(torch.diag(torch.tensor([1.0, 2.0])))
        >>> b = fm.MatrixOperator(torch.diag(torch.tensor([5.0, 0.0])))
        >>> fm.SumOperator([a, b], [2.0, 1.0], shift=1.0) @ torch.ones(2)
        tensor([8., 5.])
        >>> (2 * a + b).shifted(1.0) @ torch.ones(2)
        tensor([8., 5.])
    """

    def __init__(
        self,
        operators: Iterable[LinearOperator],
        coefficients: Iterable[float] | None = None,
        *,
        shift: float = 0.0,
    ) -> None:
        for name, given in (("operators", operators), ("coefficients", coefficients)):
            if not (isinstance(given, Iterable) or (given is None and name == "coefficients")):
                raise ArgumentTypeError(
                    f"The {name!r} argument of SumOperator must be a list; got "
                    f"{type(given).__name__}."
                )
        terms = [check_operator("SumOperator", o) for o in operators]
        if not terms:
            raise InvalidArgumentError("SumOperator needs one operator at least.")
        given_factors = [1.0] * len(terms) if coefficients is None else coefficients
        factors = [check_number("SumOperator", "coefficients", c) for c in given_factors]
        if len(factors) != len(terms):
            raise InvalidArgumentError(
                f"SumOperator takes a coefficient for each operator; got {len(factors)} for "
                f"{len(terms)} operators."
            )
        first = terms[0]
        for other in terms[1:]:
            if other.shape != first.shape:
                raise ShapeError(
                    f"SumOperator takes operators of one size; got {first!r} and {other!r}."
                )
            if other.device != first.device:
                raise DeviceError(
                    f"SumOperator takes operators on one device; got {first!r} and {other!r}."
                )
            if other.dtype != first.dtype:
                raise InvalidArgumentError(
                    f"SumOperator takes operators of one type; got {first!r} and {other!r}."
                )
        super().__init__(first.shape[0], first.dtype, first.device)
        self._terms = 0.0
        self.operators: list[LinearOperator] = []
        self.coefficients: list[float] = []
        self.shift = check_number("SumOperator", "shift", shift)
        for term, factor in zip(terms, factors, strict=True):
            if isinstance(term, SumOperator):
                self.operators += term.operators
                self.coefficients += [factor * c for c in term.coefficients]
                self.shift += factor * term.shift
            else:
                self.operators.append(term)
                self.coefficients.append(factor)

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """The sessions of all."""
        with contextlib.ExitStack() as stack:
            for operator in self.operators:
                stack.enter_context(operator.session())
            yield

    @property
    def readings(self) -> int:
        """How often the data of all have been read again; those of one objective count once."""
        return sum(reader.readings for reader in self._readers)

    @property
    def _readers(self) -> tuple[Reader, ...]:
        return tuple({id(r): r for o in self.operators for r in o._readers}.values())

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes of all, each once."""
        return tuple(dict.fromkeys(note for o in self.operators for note in o.notes))

    @property
    def layout(self) -> Layout | None:
        """That of the operators, where all have the same."""
        first = self.operators[0].layout
        return first if all(o.layout == first for o in self.operators) else None

    @property
    def parameters(self) -> dict[str, nn.Parameter] | None:
        """Those of the first operator, where all have the same layout."""
        return None if self.layout is None else self.operators[0].parameters

    @property
    def knows_diagonal(self) -> bool:
        """Whether all operators know theirs."""
        return all(operator.knows_diagonal for operator in self.operators)

    def exact_diagonal(self) -> Tensor | None:
        """Return the diagonal where all operators have theirs."""
        total = torch.full((self.shape[0],), self.shift, dtype=self.dtype, device=self.device)
        for factor, operator in zip(self.coefficients, self.operators, strict=True):
            diagonal = operator.exact_diagonal()
            if diagonal is None:
                return None
            total.add_(diagonal, alpha=factor)
        return total

    def _products(self, vectors: Tensor) -> Tensor:
        total = vectors * self.shift
        lengths = torch.linalg.vector_norm(vectors, dim=1)
        terms = lengths * abs(self.shift)
        pairs = list(zip(self.coefficients, self.operators, strict=True))
        for factor, operator in pairs:
            products = operator._products(vectors)
            total.add_(products, alpha=factor)
            terms = terms + abs(factor) * torch.linalg.vector_norm(products, dim=1)
        # Terms may cancel, and leave the rounding of each.
        sizes = terms / lengths.clamp(min=torch.finfo(self.dtype).tiny)
        self._terms = max(self._terms, float(sizes.max()))
        self.error = sum(abs(c) * o.error for c, o in pairs)
        self.floor = sum(abs(c) * o.floor for c, o in pairs)
        self.floor += 10 * torch.finfo(self.dtype).eps * self._terms
        return total
