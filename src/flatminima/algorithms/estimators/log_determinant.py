"""The log-determinant of an operator plus a multiple of the identity."""

from __future__ import annotations

import dataclasses

import torch

from ...operators.linear import LinearOperator
from ...results import Outcome, Result, Table, format_number, reading_notes
from ...support.checks import check_number
from ...support.randomness import Seed
from ..eigen.result import EigenResult
from .chains import gauss_quadrature
from .quadrature import check_positive_definite, truncation_notes

__all__ = ["LogDeterminantResult", "log_determinant"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LogDeterminantResult(Result):
    """An estimate of log det(A + τ I).

    Attributes:
        value: log det(A + τ I), natural logarithm.
        standard_error: standard error of `value`, from the spread over the random vectors.
        quadrature_error: an estimate of how much more steps would change; 0 if the rules are
            exact. The standard error does not include it.
        shift: τ.
        size: n; `value / size` is the mean logarithm of an eigenvalue.
        smallest: the smallest Ritz value of A.
        products: number of products with the operator, including those for the outliers.
        outcome: completed.
        readings: how many times the data were read again; 0 if they are kept on the device.
        notes: remarks on the computation.

    Examples:
        >>> import torch, flatminima as fm
        >>> result = fm.log_determinant(fm.MatrixOperator(torch.zeros(3, 3)), shift=2.0)
        >>> round(result.value, 6), result.standard_error, result.quadrature_error
        (2.079442, 0.0, 0.0)
    """

    value: float
    standard_error: float
    quadrature_error: float
    shift: float
    size: int
    smallest: float
    products: int
    outcome: Outcome
    readings: int = 0
    notes: tuple[str, ...] = ()

    def _table(self) -> Table:
        error = format_number(self.standard_error, 2)
        return Table(
            header=("quantity", "value", "standard error"),
            rows=(
                (f"log det(A + {self.shift:g} I)", format_number(self.value), error),
                ("error of the quadrature", format_number(self.quadrature_error, 2), ""),
                ("smallest Ritz value of A", format_number(self.smallest), ""),
            ),
            title=f"Log-determinant of {self.size} eigenvalues, {self.products} products",
            notes=(self.outcome.value, *reading_notes(self.readings), *self.notes),
        )


def log_determinant(
    operator: LinearOperator,
    shift: float,
    *,
    probes: int = 10,
    steps: int = 90,
    outliers: int | EigenResult = 0,
    basis_device: torch.device | str | None = None,
    seed: Seed = 0,
    progress: bool = True,
) -> LogDeterminantResult:
    """Estimate log det(A + τ I) by the quadrature of `spectral_density`.

    log det(A + τ I) = tr log(A + τ I) = Σ log(λᵢ + τ) is the sum over the outliers, plus n − m
    times the mean of Σⱼ wⱼ log(λⱼ + τ) over the random vectors for the other eigenvalues (Ubaru,
    Chen and Saad 2017, [doi:10.1137/16M1104974](https://doi.org/10.1137/16M1104974)). For several
    shifts, use `spectral_density(operator).log_determinant(shift)`, which needs no more products.

    The random vectors are uniform on the sphere, so only the spread of the logarithms makes the
    result uncertain; for a multiple of the identity it is zero. The number of steps needed grows
    as the square root of (λ₁ + τ)/(λₙ + τ); `quadrature_error` shows whether there were enough.

    Args:
        operator: a symmetric operator.
        shift: τ, larger than the size of the most negative eigenvalue.
        probes: number of random vectors, at least two.
        steps: number of Lanczos steps from each vector, at most n.
        outliers: how many eigenvalues of largest magnitude to take out first, or known pairs, as
            in `spectral_density`.
        basis_device: where the vectors of the chains are stored, as in `spectral_density`.
        seed: seed of the random vectors.
        progress: show a bar if it takes long.

    Returns:
        The mean with its standard error, and an estimate of the error of the quadrature.

    Raises:
        NotPositiveDefiniteError: A + τ I is indefinite, or singular up to rounding; the message
            gives the smallest eigenvalue found and a shift that is large enough.
        InvalidArgumentError: `shift` is not finite, or there are fewer than two probes or no step.
        NonFiniteError: a product holds NaN or infinity.
        NotSymmetricError: the products contradict the symmetry of the operator.

    Examples:
        >>> import torch, flatminima as fm
        >>> matrix = torch.diag(torch.linspace(0, 1, 300, dtype=torch.float64))
        >>> exact = torch.linalg.slogdet(matrix + 0.1 * torch.eye(300))[1]
        >>> result = fm.log_determinant(fm.MatrixOperator(matrix), shift=0.1, steps=30)
        >>> bool(abs(result.value - exact) < 3 * result.standard_error)
        True
    """
    call = "log_determinant"
    shift = check_number(call, "shift", shift)
    found = gauss_quadrature(
        call,
        operator,
        probes=probes,
        steps=steps,
        outliers=outliers,
        basis_device=basis_device,
        seed=seed,
        progress=progress,
    )
    check_positive_definite(call, found.smallest, shift, found.resolution)

    def logarithm(values: torch.Tensor) -> torch.Tensor:
        return (values + shift).log()

    total, truncation = found.sum(logarithm), found.truncation(logarithm)
    return LogDeterminantResult(
        value=total.value,
        standard_error=total.standard_error,
        quadrature_error=truncation,
        shift=shift,
        size=found.size,
        smallest=found.smallest,
        products=found.products,
        outcome=Outcome.COMPLETED,
        readings=found.readings,
        notes=found.notes + truncation_notes(truncation, total.standard_error),
    )
