"""Sums of operators, with factors and a multiple of the identity."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ..checks import check_number
from ..errors import ArgumentTypeError, DeviceError, InvalidArgumentError, ShapeError
from ..vectors import Layout
from .linear import LinearOperator, Reader, check_operator

__all__ = ["SumOperator"]


class SumOperator(LinearOperator):
    """Σ c_i A_i + τ I, which `A + B`, `A - B`, `c * A` and `A.shifted(τ)` make.

    Args:
        operators: A_i, of one size, type and device.
        coefficients: c_i; ones unless told.
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
        """How often the data of all have been read anew; those of one objective count once."""
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
        """The diagonal where all operators have theirs."""
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
