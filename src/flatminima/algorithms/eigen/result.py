"""The result of an eigensolver."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from ...errors import ConvergenceError, ConvergenceWarning, InvalidArgumentError, warn
from ...results import Outcome, Result, Table, format_number, reading_notes
from ...support.checks import check_choice, check_integer, check_positive

__all__ = ["EigenResult"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class EigenResult(Result):
    """Eigenpairs of a symmetric operator, best first, each with its residual.

    Attributes:
        eigenvalues: (k,) with their signs, in float64 on the host.
        eigenvectors: (n, k) orthonormal columns, in the dtype and on the device of the operator;
            None once dropped.
        residuals: (k,) ‖A u − λ u‖ in float64. An eigenvalue lies within this distance of λ.
        outcome: converged, stopped at the product limit, or as exact as the products allow.
        products: number of products with the operator.
        which: the end of the spectrum, as given.
        tol: the tolerance, as given, relative to the largest |Ritz value|.
        method: the name of the solver.
        readings: how many times the data were read again; 0 if they are kept on the device.
        notes: remarks on the computation.

    Examples:
        >>> import torch, flatminima as fm
        >>> operator = fm.MatrixOperator(torch.diag(torch.tensor([4, -7, 1])))
        >>> print(fm.lanczos(operator, k=2, which="LM", tol=1e-6))
        2 eigenpairs (LM) by lanczos
        pair  eigenvalue  residual
        ────  ──────────  ────────
        1             -7  3.11e-14
        2              4  3.11e-14
        Note: Converged: every residual is within the tolerance. 4 products.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor | None
    residuals: Tensor
    outcome: Outcome
    products: int
    which: str
    tol: float
    method: str
    readings: int = 0
    notes: tuple[str, ...] = ()

    @property
    def converged(self) -> bool:
        """Whether every residual is within the tolerance."""
        return self.outcome is Outcome.CONVERGED

    def without_vectors(self) -> EigenResult:
        """Return the same result without its eigenvectors, to save memory or disk space."""
        return dataclasses.replace(self, eigenvectors=None)

    def part(self, which: Literal["LA", "SA"], count: int) -> EigenResult:
        """Return the `count` largest ("LA") or smallest ("SA") pairs, best first.

        The number of products is that of the whole result. So is the outcome, with one exception:
        if inexact products kept some residuals above the tolerance, and none of these is among
        the pairs returned, the part has converged.

        Raises:
            InvalidArgumentError: `count` exceeds the number of pairs.

        Examples:
            >>> import torch, flatminima as fm
            >>> operator = fm.MatrixOperator(torch.diag(torch.tensor([4.0, -7.0, 1.0, 2.0])))
            >>> both = fm.lanczos(operator, k=(2, 1), which="BE", tol=1e-5)
            >>> [round(value) for value in both.part("LA", 2).eigenvalues.tolist()]
            [4, 2]
            >>> [round(value) for value in both.part("SA", 1).eigenvalues.tolist()]
            [-7]
        """
        check_choice("EigenResult.part", "which", which, ("LA", "SA"))
        check_integer("EigenResult.part", "count", count, low=1, high=len(self.eigenvalues))
        order = self.eigenvalues.argsort(descending=which == "LA", stable=True)[:count]
        vectors, outcome = self.eigenvectors, self.outcome
        bound = self.tol * float(self.eigenvalues.abs().max())
        if outcome is Outcome.INEXACT_PRODUCTS and bool((self.residuals[order] <= bound).all()):
            outcome = Outcome.CONVERGED
        return dataclasses.replace(
            self,
            outcome=outcome,
            eigenvalues=self.eigenvalues[order],
            eigenvectors=None if vectors is None else vectors[:, order.to(vectors.device)],
            residuals=self.residuals[order],
            which=which,
        )

    def _table(self) -> Table:
        rows = tuple(
            (str(i), format_number(value, 6), format_number(residual, 3))
            for i, (value, residual) in enumerate(
                zip(self.eigenvalues.tolist(), self.residuals.tolist(), strict=True), start=1
            )
        )
        return Table(
            header=("pair", "eigenvalue", "residual"),
            rows=rows,
            title=f"{len(rows)} eigenpairs ({self.which}) by {self.method}",
            notes=(
                f"{self.outcome.value} {self.products} products.",
                *reading_notes(self.readings),
                *self.notes,
            ),
        )


ROUNDING = 20
"""Residuals below this many units of the operator's precision are rounding errors."""


def check_tolerance(call: str, tol: float, dtype: torch.dtype) -> float:
    """Return `tol` if products in `dtype` are exact enough to reach it."""
    tol = check_positive(call, "tol", tol)
    least = ROUNDING * float(torch.finfo(dtype).eps)
    if tol < least:
        raise InvalidArgumentError(
            f"The 'tol' argument of {call} must be at least {least:.1e} for products in {dtype}; "
            f"got {tol!r}. Rounding hides smaller residuals; use a float64 model for more."
        )
    return tol


BASIS_TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_basis_type(call: str, dtype: torch.dtype, wide: torch.dtype, tol: float) -> None:
    """Raise if the dtype of the basis is wider than that of the products, or too narrow for `tol`.

    Raises:
        InvalidArgumentError: `dtype` or `tol` does not suit.
    """
    if dtype not in BASIS_TYPES or torch.finfo(dtype).eps < torch.finfo(wide).eps:
        raise InvalidArgumentError(
            f"The 'basis_dtype' argument of {call} must be a floating type no wider than that of "
            f"the products, {wide}: torch.bfloat16, torch.float16 or torch.float32; got {dtype!r}."
        )
    least = float(torch.finfo(dtype).eps)
    if dtype != wide and tol < least:
        raise InvalidArgumentError(
            f"The 'tol' argument of {call} must be at least {least:.1e} with a basis in {dtype}; "
            f"got {tol!r}. A vector rounded to that type has larger residuals; use "
            "basis_device='cpu' to save memory on a GPU without rounding."
        )


def finish(result: EigenResult, *, call: str, bound: float, strict: bool) -> EigenResult:
    """Return `result`; if it has not converged, warn first, or raise if `strict`.

    Args:
        result: the result.
        call: named in the message.
        bound: the tolerance of the residuals.
        strict: raise instead of warn.

    Raises:
        ConvergenceError: with `strict`, if `result` has not converged.
    """
    if result.converged:
        return result
    late = int((result.residuals > bound).sum())
    worst = (
        f"the largest residual is {float(result.residuals.max()):.2e}, the tolerance {bound:.2e}"
    )
    if result.outcome is Outcome.INEXACT_PRODUCTS:
        message = (
            f"{call}: the products are differences of gradients, and their estimated error keeps "
            f"{late} of {len(result.eigenvalues)} residuals above the tolerance; {worst}. "
            "Increase tol, or use a float64 model."
        )
    elif late:
        message = (
            f"{call}: {late} of {len(result.eigenvalues)} eigenpairs did not converge within "
            f"{result.products} products; {worst}. Increase max_products or tol, or compute fewer "
            "pairs."
        )
    else:
        message = (
            f"{call}: the limit of {result.products} products was reached before the search for "
            f"missed pairs had ended; {worst}. Increase max_products."
        )
    if strict:
        raise ConvergenceError(message, result)
    warn(message, ConvergenceWarning)
    return result
