"""The evidence of a model by Laplace's approximation: the posterior mass of a minimum."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from ..algorithms.eigen.result import EigenResult
from ..algorithms.estimators.chains import gauss_quadrature
from ..algorithms.estimators.quadrature import Quadrature, truncation_notes
from ..errors import InvalidArgumentError, NotPositiveDefiniteError
from ..objective.objective import Objective, check_objective
from ..operators.gauss_newton import GaussNewtonOperator
from ..operators.linear import LinearOperator, check_operator
from ..results import Outcome, Table, format_number
from ..support.checks import check_positive
from ..support.randomness import Seed
from .result import Measurement, MeasureResult

__all__ = ["LaplaceResult", "laplace_log_evidence"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LaplaceResult(MeasureResult):
    """The logarithm of the evidence, and its three parts.

    Attributes:
        value: log p(data), natural logarithm: the sum of the three parts.
        standard_error: standard error of `value`, from the spread over the random vectors.
        quadrature_error: an estimate of how much more steps would change.
        log_likelihood: −N L(θ).
        log_prior: −½ τ ‖θ‖² + ½ n log τ.
        log_volume: −½ log det(N G + τ I); the larger, the flatter.
        prior_precision: τ.
        optimised: whether τ was chosen to maximise the evidence.
        effective_parameters: γ = tr N G (N G + τ I)⁻¹, how many of the n parameters the data
            determine.
        observations: N.
        size: n.
        products: number of products with the operator.
        outcome: completed.
        readings: how many times the data were read again; 0 if they are kept on the device.
        notes: remarks on the computation.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = torch.eye(2), torch.ones(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> result = fm.laplace_log_evidence(objective, prior_precision=1.0)
        >>> round(result.value, 4)  # −½ ‖θ‖² − ½ log det(2 I + I)
        -2.0986
    """

    value: float
    standard_error: float
    quadrature_error: float
    log_likelihood: float
    log_prior: float
    log_volume: float
    prior_precision: float
    optimised: bool
    effective_parameters: float
    observations: float
    size: int
    products: int
    outcome: Outcome
    readings: int = 0
    notes: tuple[str, ...] = ()

    def measurements(self) -> tuple[Measurement, ...]:
        """Return the log evidence as one line of a report."""
        prior = "τ optimised" if self.optimised else f"τ = {self.prior_precision:g}"
        name = f"Laplace log evidence, {prior}"
        return self._line(name, f"{self.products} products", self.standard_error, "standard error")

    def _table(self) -> Table:
        error = format_number(self.standard_error, 2)
        how = "optimised" if self.optimised else "given"
        return Table(
            header=("quantity", "value", "standard error"),
            rows=(
                ("log evidence", format_number(self.value), error),
                ("log likelihood", format_number(self.log_likelihood), ""),
                ("log prior", format_number(self.log_prior), ""),
                ("log volume", format_number(self.log_volume), error),
                ("error of the quadrature", format_number(self.quadrature_error, 2), ""),
                (f"prior precision τ ({how})", format_number(self.prior_precision), ""),
                ("effective parameters γ", format_number(self.effective_parameters), ""),
            ),
            title=f"Laplace log evidence: {self.size} parameters, {self.observations:g} "
            f"observations, {self.products} products",
            notes=self._make_notes(),
        )


def laplace_log_evidence(
    objective: Objective,
    *,
    prior_precision: float | Literal["optimise", "optimize"] = 1.0,
    operator: LinearOperator | None = None,
    observations: float | None = None,
    probes: int = 10,
    steps: int = 90,
    outliers: int | EigenResult = 0,
    seed: Seed = 0,
    progress: bool = True,
) -> LaplaceResult:
    """Estimate log p(data) of a model by Laplace's approximation at its current parameters.

    log p(data) ≈ −N L(θ) − ½ τ ‖θ‖² + ½ n log τ − ½ log det(N G + τ I). The prior on the selected
    parameters is N(0, I / τ), N L is a negative log-likelihood summed over N observations, and G
    is the Gauss–Newton matrix (MacKay 1992,
    [doi:10.1162/neco.1992.4.3.448](https://doi.org/10.1162/neco.1992.4.3.448), equations 3.2 and
    4.7; Immer et al. 2021, arXiv:2104.04975). The last term is the volume of the minimum: a flat
    minimum holds more posterior mass. The determinant comes from the quadrature of
    `spectral_density`, matrix-free.

    θ should be a minimum of L + τ ‖θ‖² / 2N. Compare the evidence between models with the same
    data. Unlike sharpness, it has no free scale if τ is optimised; this takes no more products, as
    the maximum is where τ ‖θ‖² = γ.

    Args:
        objective: an objective with `loss_fn`, whose loss is a mean over observations, such as
            cross-entropy.
        prior_precision: τ, or "optimise" (also "optimize") for the τ that maximises the evidence.
        operator: replaces G, for example `FisherOperator(objective)`; it must be positive
            semi-definite. Default: the Gauss–Newton matrix.
        observations: N, if it differs from the count of the loss. Default: Σ w, the number of
            labels for a cross-entropy and of elements for a squared error, which is then a normal
            likelihood of variance ½ without its constant.
        probes: as in `spectral_density`.
        steps: as in `spectral_density`.
        outliers: as in `spectral_density`; taking them out of N G reduces the error.
        seed: seed of the random vectors.
        progress: show a bar if it takes long.

    Returns:
        The log evidence with its errors and parts.

    Raises:
        InvalidArgumentError: the objective has `batch_loss` and no operator is given; τ or N is
            not positive; or τ is to be optimised but all parameters, or G, are zero.
        NotPositiveDefiniteError: N G + τ I is indefinite.
        NonFiniteError: the loss or a product holds NaN or infinity.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(3, 2)
        >>> data = torch.randn(50, 3), torch.randint(2, (50,))
        >>> objective = fm.Objective(model, torch.nn.CrossEntropyLoss(), data)
        >>> result = fm.laplace_log_evidence(objective, prior_precision="optimise")
        >>> 0 < result.effective_parameters < result.size
        True
    """
    call = "laplace_log_evidence"
    check_objective(call, objective)
    optimise = isinstance(prior_precision, str)
    if optimise and prior_precision not in ("optimise", "optimize"):
        raise InvalidArgumentError(
            f"The 'prior_precision' argument of {call} must be a number > 0 or 'optimise'; got "
            f"{prior_precision!r}."
        )
    tau = 1.0 if optimise else check_positive(call, "prior_precision", prior_precision)
    if operator is None:
        operator = GaussNewtonOperator(objective)
    else:
        check_operator(call, operator)
        if operator.shape[0] != objective.size:
            raise InvalidArgumentError(
                f"The 'operator' argument of {call} must act on the {objective.size} parameters of "
                f"the objective; got {operator!r}."
            )
    count = objective.batches.total_weight
    if observations is not None:
        count = check_positive(call, "observations", observations)
    squares = float(torch.linalg.vector_norm(objective.point().double()) ** 2)
    before = objective.batches.readings
    loss = objective.loss()
    found = gauss_quadrature(
        call,
        operator,
        probes=probes,
        steps=steps,
        outliers=outliers,
        seed=seed,
        progress=progress,
    )
    if optimise:
        tau = _optimize_precision(found, count, squares)
    # Negative eigenvalues within rounding are set to zero.
    least = 0.0 if found.smallest >= -found.resolution else -math.inf
    if least < 0 and count * found.smallest + tau <= count * found.resolution:
        needed = -1.01 * count * found.smallest
        raise NotPositiveDefiniteError(
            f"{call} needs N G + {tau:.3g} I to be positive definite, but the operator has an "
            f"eigenvalue of {format_number(found.smallest)} or below, with N = {count:g}. Omit "
            f"operator= to use the Gauss–Newton matrix, or use prior_precision={needed:.4g} or "
            "more.",
            found.smallest,
            tau / count,
        )

    def logarithm(values: Tensor) -> Tensor:
        return (count * values.clamp(min=least) + tau).log()

    total, truncation = found.sum(logarithm), found.truncation(logarithm) / 2
    likelihood = -count * loss
    prior = -0.5 * tau * squares + 0.5 * objective.size * math.log(tau)
    return LaplaceResult(
        value=likelihood + prior - total.value / 2,
        standard_error=total.standard_error / 2,
        quadrature_error=truncation,
        log_likelihood=likelihood,
        log_prior=prior,
        log_volume=-total.value / 2,
        prior_precision=tau,
        optimised=optimise,
        effective_parameters=_count_effective(found, count, tau),
        observations=count,
        size=objective.size,
        products=found.products,
        outcome=Outcome.COMPLETED,
        readings=objective.batches.readings - before,
        notes=found.notes + truncation_notes(truncation, total.standard_error / 2),
    )


def _count_effective(found: Quadrature, count: float, tau: float) -> float:
    """Return γ, with negative eigenvalues set to zero."""
    values = found.sum(lambda v: (count * v).clamp(min=0) / ((count * v).clamp(min=0) + tau))
    return values.value


def _optimize_precision(found: Quadrature, count: float, squares: float) -> float:
    """Return the τ with τ ‖θ‖² = γ(τ), whose left side rises with τ while the right side falls."""
    from scipy.optimize import brentq

    if squares == 0 or _count_effective(found, count, 1e-300) <= 0:
        what = "all parameters are zero" if squares == 0 else "the matrix is zero"
        raise InvalidArgumentError(
            f"laplace_log_evidence cannot optimise the prior precision: {what}, so the evidence "
            "grows without bound. Set prior_precision= to a number."
        )

    def gap(logarithm: float) -> float:
        tau = math.exp(logarithm)
        return tau * squares - _count_effective(found, count, tau)

    # γ lies between 0 and n, so the sign at the upper end is known.
    high = math.log(found.size / squares)
    low = high - 1.0
    while gap(low) > 0 and low > high - 600:
        low -= 2 * (high - low)
    return math.exp(float(brentq(gap, low, high, xtol=1e-10, rtol=1e-12)))
