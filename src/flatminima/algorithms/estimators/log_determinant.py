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
        standard_error: of `value`, from the spread of the random vectors.
        quadrature_error: an estimate of what more steps would change; 0 where the rules are
            exact. It is not part of the standard error.
        shift: τ.
        size: n; `value / size` is the mean logarithm of an eigenvalue.
        smallest: the smallest Ritz value of A.
        products: with the operator, those for the outliers among them.
        outcome: completed.
        readings: how often the data were read again for it; 0 if they are kept on the device.
        notes: what a reader should know about how it was computed.

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
    """Return log det(A + τ I), by the quadrature of `spectral_density`.

    Log det = tr log(A + τ I) = Σ log(λᵢ + τ), the sum over the eigenvalues taken out and, for
    the others, n − m times the mean of Σⱼ wⱼ log(λⱼ + τ) over the random vectors (Ubaru, Chen and
    Saad 2017, [doi:10.1137/16M1104974](https://doi.org/10.1137/16M1104974)). For several shifts
    take `spectral_density(operator).log_determinant(shift)`, which computes no product.

    The random vectors are uniform on the sphere, so that only the spread of the logarithms
    makes the result uncertain: a multiple of the identity has none. How many steps it takes
    grows as the square root of (λ₁ + τ)/(λₙ + τ); `quadrature_error` tells whether they
    suffice.

    Args:
        operator: symmetric.
        shift: τ, larger than the size of the most negative eigenvalue.
        probes: random vectors, two at least.
        steps: of Lanczos from each, at most n.
        outliers: how many eigenvalues of largest magnitude to take out first, or known pairs, as
            in `spectral_density`, where `basis_device` is described too.
        basis_device: where the chains' vectors are kept.
        seed: of the random vectors.
        progress: show a bar if it takes long.

    Returns:
        The mean with its standard error, and an estimate of the quadrature's own error.

    Raises:
        NotPositiveDefiniteError: A + τ I is indefinite, or is singular to rounding; it says
            how negative the smallest eigenvalue is and which shift would do.
        InvalidArgumentError: `shift` is not finite; fewer than two probes or one step.
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
