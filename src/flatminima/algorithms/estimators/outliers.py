"""Outliers, which are taken out of a spectrum before the rest of it is estimated."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from ...errors import ArgumentTypeError, InvalidArgumentError, NonFiniteError
from ...operators.linear import LinearOperator
from ...support.checks import check_integer
from ...support.vectors import check_vector
from ..eigen.basis import Basis
from ..eigen.chain import Floats, eigh
from ..eigen.lanczos import lanczos
from ..eigen.result import ROUNDING, EigenResult

__all__ = ["Outliers", "separate_outliers"]

OUTLIER_TOL = 1e-4
"""Tolerance for outliers that are computed; the error of the eigenvalues is its square."""


@dataclasses.dataclass(frozen=True)
class Outliers:
    """An invariant space: orthonormal rows, and the operator's eigenvalues on their span."""

    vectors: Tensor
    atoms: Floats
    products: int
    notes: tuple[str, ...] = ()


def separate_outliers(
    call: str,
    operator: LinearOperator,
    outliers: int | EigenResult,
    generator: torch.Generator,
    progress: bool,
) -> Outliers:
    """Return the outliers by Rayleigh–Ritz on eigenvectors, which are given or computed."""
    n, spent = operator.shape[0], 0
    nothing = Outliers(torch.empty(0, n, dtype=operator.dtype), np.empty(0), 0)
    if isinstance(outliers, EigenResult):
        pairs = outliers
    elif isinstance(outliers, (Tensor, np.ndarray, list, tuple, float)):
        raise ArgumentTypeError(
            f"The 'outliers' argument of {call} must be the number of eigenpairs to compute first, "
            f"or an EigenResult of lanczos; got {type(outliers).__name__}."
        )
    else:
        count = check_integer(call, "outliers", outliers, low=0, high=n)
        if count == 0:
            return nothing
        tol = max(OUTLIER_TOL, 2 * ROUNDING * float(torch.finfo(operator.dtype).eps))
        pairs = lanczos(operator, k=count, which="LM", tol=tol, seed=generator, progress=progress)
        spent = pairs.products
    notes = () if pairs.converged else (f"The outliers: {pairs.outcome.value}",)
    vectors = _vectors(call, operator, pairs)
    count = len(vectors)
    if count == 0:
        return dataclasses.replace(nothing, products=spent, notes=notes)
    basis = Basis(operator, count, n, advice="Take out fewer outliers.")
    for row, column in enumerate(vectors):
        # Vectors from a basis in half precision are orthonormal only to that precision.
        coefficients, vector = basis.orthogonalize(row, column)
        if not float(coefficients[-1]) > 0.5:
            raise InvalidArgumentError(
                f"The 'outliers' argument of {call} holds eigenvectors that are not orthonormal."
            )
        basis.put(row, vector / torch.linalg.vector_norm(vector))
    images = operator._products(basis.rows)
    found = [basis.orthogonalize(count, image)[0] for image in images]
    numbers = torch.stack(found).cpu().double().numpy()
    if not np.isfinite(numbers).all():
        raise NonFiniteError(f"A product with {operator!r} holds NaN or infinity.")
    small, rests = numbers[:, :-1], numbers[:, -1]
    atoms = eigh((small + small.T) / 2)[0][::-1].copy()
    _check_invariance(call, operator, pairs, atoms, float(np.linalg.norm(rests)))
    return Outliers(basis.rows, atoms, spent + count, notes)


def _vectors(call: str, operator: LinearOperator, pairs: EigenResult) -> Tensor:
    """Return the eigenvectors as rows, in the dtype and on the device of the operator."""
    if pairs.eigenvectors is None:
        raise InvalidArgumentError(
            f"The 'outliers' argument of {call} is a result whose eigenvectors were dropped; pass "
            "the result from before `without_vectors()`."
        )
    columns = check_vector(
        f"The 'outliers' argument of {call}",
        pairs.eigenvectors.to(operator.device),
        size=operator.shape[0],
        dtype=operator.dtype,
        device=operator.device,
        columns=True,
    )
    return columns.T


def _check_invariance(
    call: str, operator: LinearOperator, pairs: EigenResult, atoms: Floats, rest: float
) -> None:
    """Raise if the pairs belong to another operator, or the model was trained in the meantime."""
    claimed = float(torch.linalg.vector_norm(pairs.residuals))
    values = np.sort(pairs.eigenvalues.double().cpu().numpy())[::-1]
    scale = max(float(np.abs(atoms).max()), float(np.abs(values).max()))
    eps = float(torch.finfo(operator.dtype).eps)
    noise = math.sqrt(len(atoms)) * (
        2 * ROUNDING * eps * scale + 2 * operator.error + operator.floor
    )
    off = max(rest, float(np.abs(atoms - values).max()))
    if off > 10 * claimed + noise:
        raise InvalidArgumentError(
            f"The 'outliers' argument of {call} holds pairs that are not those of {operator!r}: "
            f"they are off by {off:.1e}, while their residuals are {claimed:.1e}. Was the model "
            "trained in the meantime? Compute them again, or pass their number."
        )
