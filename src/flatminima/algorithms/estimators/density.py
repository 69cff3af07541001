"""The result of `spectral_density`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...errors import ArgumentTypeError, InvalidArgumentError
from ...results import Estimate, Outcome, Result, Table, format_number, reading_notes
from ...support.checks import check_choice, check_number, check_positive
from .broadening import Scale, default_sigma, gaussian, is_resolved, place_on_axis
from .probes import mean_and_spread
from .quadrature import (
    check_positive_definite,
    mean_and_error,
    share_below,
    spectral_samples,
)

__all__ = ["SpectralDensity", "put_on_scale"]

CHUNK = 4096
"""Number of points at which the density is computed at a time."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SpectralDensity(Result):
    """The distribution of the n eigenvalues of an operator, with outliers kept apart.

    Every random vector has its own Gauss rule. The density is the mean over these rules, and its
    standard error comes from their spread. Sums over the spectrum are computed from the same nodes
    at no further cost, each with its standard error: `mean`, `second_moment`, `frobenius_norm`,
    `stable_rank`, `effective_dimension`, `negative_mass`, `log_determinant`, and any other with
    `sum`.

    Attributes:
        size: n.
        nodes: (probes, steps) Ritz values in float64 on the host, ascending; rows of chains that
            ended early are padded with their last node at weight 0.
        weights: (probes, steps) weights of the nodes; each row sums to 1.
        complete: (probes,) whether the chain reached an invariant space. Its rule is then the
            spectral measure of the random vector itself, not just a quadrature of it.
        eigenvalues: (m,) outliers taken out first, exact up to their residuals, descending. The
            nodes stand for the other n − m.
        sigma: standard deviation of the Gaussian drawn for each node, in units of the eigenvalues,
            or in decades with `scale="log"`.
        scale: "linear", or "log" for a density per decade of |λ|, separately for each sign.
        resolution: the effect of rounding, or of the error of the products: eigenvalues closer to
            zero than this have no sign.
        products: number of products with the operator, including those for the outliers.
        outcome: completed.
        readings: how many times the data were read again; 0 if they are kept on the device.
        notes: remarks on the computation.

    Examples:
        >>> import torch, flatminima as fm
        >>> operator = fm.MatrixOperator(torch.diag(torch.tensor([9.0, 2.0, 1.0, 0.0])))
        >>> result = fm.spectral_density(operator, probes=5, steps=4, outliers=1)
        >>> [round(value, 4) for value in result.eigenvalues.tolist()], result.probes, result.steps
        ([9.0], 5, 3)
        >>> fm.SpectralDensity.from_json(result.to_json()) == result
        True
    """

    size: int
    nodes: Tensor
    weights: Tensor
    complete: tuple[bool, ...]
    eigenvalues: Tensor
    sigma: float
    scale: str
    resolution: float
    products: int
    outcome: Outcome
    readings: int = 0
    notes: tuple[str, ...] = ()

    @property
    def probes(self) -> int:
        """Number of random vectors."""
        return self.nodes.shape[0]

    @property
    def steps(self) -> int:
        """Number of Lanczos steps in the longest chain."""
        return self.nodes.shape[1]

    @property
    def smallest(self) -> float:
        """The smallest Ritz value, an upper bound of the smallest eigenvalue."""
        return float(self._values().min())

    @property
    def largest(self) -> float:
        """The largest Ritz value, a lower bound of the largest eigenvalue."""
        return float(self._values().max())

    # ------------------------------------------------------------------------------ density

    def density(self, points: Tensor | Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return the density φ at the points, and its standard error over the probes.

        φ(t) = (1/n) Σᵢ N(t; μᵢ, σ²) + (1 − m/n) Σⱼ wⱼ N(t; λⱼ, σ²), averaged over the probes,
        where μ are the eigenvalues taken out, and λ and w the nodes and weights. With
        `scale="log"` the formula holds over log₁₀ |t|, with the eigenvalues that have the sign
        of t: a density per decade.

        Args:
            points: t, any number of points in any order; not zero with `scale="log"`.

        Returns:
            Two tensors of the shape of `points`, in float64 on the host. On a linear scale φ
            integrates to 1. On a logarithmic scale the integrals over both signs and
            [`unplaced_mass`][flatminima.SpectralDensity.unplaced_mass] add up to 1.

        Raises:
            ArgumentTypeError: `points` are not numbers.
            InvalidArgumentError: a point is NaN or infinite, or zero with `scale="log"`.

        Examples:
            >>> import torch, flatminima as fm
            >>> operator = fm.MatrixOperator(torch.diag(torch.arange(1.0, 51.0)))
            >>> result = fm.spectral_density(operator, steps=30)
            >>> points = torch.linspace(-50, 100, 3001)
            >>> round(float(torch.trapezoid(result.density(points)[0], points)), 4)
            1.0
        """
        call = "SpectralDensity.density"
        try:
            wanted = torch.as_tensor(points, dtype=torch.float64, device="cpu").detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentTypeError(
                f"The 'points' argument of {call} must be a tensor or a sequence of numbers; got "
                f"{type(points).__name__}."
            ) from error
        if not bool(torch.isfinite(wanted).all()):
            raise InvalidArgumentError(f"The 'points' argument of {call} holds NaN or infinity.")
        if self.scale == "log" and bool((wanted == 0).any()):
            raise InvalidArgumentError(
                f"The 'points' argument of {call} contains zero, which has no place on a "
                "logarithmic scale."
            )
        parts = torch.split(wanted.reshape(-1), CHUNK)
        values, spreads = zip(*(self._density(part) for part in parts), strict=True)
        return torch.cat(values).reshape(wanted.shape), torch.cat(spreads).reshape(wanted.shape)

    def _density(self, points: Tensor) -> tuple[Tensor, Tensor]:
        nodes, sides = place_on_axis(self.nodes, self.scale, self._is_seen())
        places, signs = place_on_axis(points, self.scale, points != 0)
        atoms, ends = place_on_axis(
            self.eigenvalues, self.scale, self.eigenvalues.abs() > self.resolution
        )
        rows = torch.zeros(self.probes, len(points), dtype=torch.float64)
        for row, (values, side, weights) in enumerate(zip(nodes, sides, self.weights, strict=True)):
            rows[row] = weights @ gaussian(places, signs, values, side, self.sigma)
        rows *= (self.size - len(atoms)) / self.size
        rows += gaussian(places, signs, atoms, ends, self.sigma).sum(dim=0) / self.size
        return mean_and_spread(rows)

    def rescaled(self, *, scale: Scale = "linear", sigma: float | None = None) -> SpectralDensity:
        """Return the same nodes on another scale, or with another width.

        Args:
            scale: as in `spectral_density`.
            sigma: as in `spectral_density`. Default: chosen from the data.

        Raises:
            InvalidArgumentError: `scale` is unknown, or `sigma` is not positive.

        Examples:
            >>> import torch, flatminima as fm
            >>> operator = fm.MatrixOperator(torch.diag(10.0 ** torch.arange(-3.0, 3.0)))
            >>> result = fm.spectral_density(operator, probes=4)
            >>> result.rescaled(scale="log", sigma=0.2).sigma
            0.2
        """
        return put_on_scale("SpectralDensity.rescaled", self, scale, sigma)

    # ----------------------------------------------------------------------- sums over all

    def sum(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """Return tr f(A) = Σ f(λᵢ) over all n eigenvalues.

        For polynomials of degree below 2 `steps` the only error is that of the random vectors,
        given by the standard error. Other functions are approximated by such a polynomial.

        Args:
            function: f, applied element by element to a tensor in float64.

        Examples:
            >>> import torch, flatminima as fm
            >>> operator = fm.MatrixOperator(torch.diag(torch.tensor([1.0, 1.0, 4.0])))
            >>> result = fm.spectral_density(operator, outliers=3)
            >>> round(result.sum(torch.sqrt).value, 4)
            4.0
        """
        return mean_and_error(self._samples(function))

    def mean(self) -> Estimate:
        """Return the mean eigenvalue, tr A / n.

        Like the trace, it shows how much random noise on all parameters raises the loss.
        """
        return _divide(self.sum(lambda values: values), self.size)

    def second_moment(self) -> Estimate:
        """Return the mean of the squared eigenvalues, ‖A‖_F² / n."""
        return _divide(self.sum(torch.square), self.size)

    def frobenius_norm(self) -> Estimate:
        """Return ‖A‖_F = √Σ λᵢ², the size of all curvature together, regardless of sign.

        It bounds every eigenvalue. For the difference of two Hessians, it is their distance. The
        standard error follows from that of the square, to first order.
        """
        square = self.sum(torch.square)
        norm = math.sqrt(max(square.value, 0.0))
        return Estimate(norm, square.standard_error / (2 * norm) if norm > 0 else 0.0)

    def stable_rank(self) -> Estimate:
        """Return ‖A‖_F² / ‖A‖₂²: how many directions carry the curvature, weighted by their share.

        It is at most the rank, but does not count nearly flat directions. For ‖A‖₂ it takes the
        largest |Ritz value|, which a few steps find. It is 0 for A = 0.
        """
        top = max(abs(self.smallest), abs(self.largest))
        if top <= 0:
            return Estimate(0.0, 0.0)
        return self.sum(lambda values: (values / top) ** 2)

    def effective_dimension(self, tau: float) -> Estimate:
        """Return Σ λᵢ / (λᵢ + τ): how many parameters the data determine.

        This is MacKay's number of well-determined parameters γ (1992,
        [doi:10.1162/neco.1992.4.3.448](https://doi.org/10.1162/neco.1992.4.3.448)); Maddox et al.
        2020 ([arXiv:2003.02139](https://arxiv.org/abs/2003.02139)) relate it to generalisation.
        A direction whose curvature is far above τ counts as one, a direction far below τ as zero.
        For the posterior, A is the Hessian of the summed loss (N times that of the mean) and τ
        the precision of the prior; with the Hessian of the mean loss, use τ / N.

        Args:
            tau: τ > 0, larger than the size of the most negative eigenvalue. Instead of an
                indefinite Hessian, use the Gauss–Newton matrix.

        Raises:
            InvalidArgumentError: `tau` is not positive.
            NotPositiveDefiniteError: A + τ I is indefinite, or singular up to rounding.
        """
        call = "SpectralDensity.effective_dimension"
        tau = check_positive(call, "tau", tau)
        check_positive_definite(call, self.smallest, tau, self.resolution)
        return self.sum(lambda values: values / (values + tau))

    def negative_mass(self, threshold: float | None = None) -> Estimate:
        """Return the share of eigenvalues below −threshold: how far this is from a minimum.

        It is the index of a critical point divided by n (Dauphin et al. 2014,
        [arXiv:1406.2572](https://arxiv.org/abs/1406.2572)), and falls during training (Ghorbani
        et al. 2019). A step is the hardest function for a quadrature: for an incomplete chain, the
        weights of the nodes on both sides of the step give bounds on the share (the inequalities
        of Chebyshev, Markov and Stieltjes). The value is interpolated between the bounds, and the
        standard error includes their width, as that of a uniform distribution. If many eigenvalues
        lie near zero, the bounds are wide until there are enough steps.

        Args:
            threshold: the distance from zero. Default: the resolution, since eigenvalues closer
                to zero have no sign.

        Raises:
            InvalidArgumentError: `threshold` is negative.
        """
        call = "SpectralDensity.negative_mass"
        bound, wanted = self.resolution, "a finite number ≥ 0"
        if threshold is not None:
            bound = check_number(call, "threshold", threshold, wanted)
        if bound < 0:
            raise InvalidArgumentError(
                f"The 'threshold' argument of {call} must be {wanted}; got {threshold!r}."
            )
        rest, width = share_below(self.nodes, self.weights, self.complete, -bound)
        exact = float((self.eigenvalues < -bound).sum())
        left = self.size - len(self.eigenvalues)
        found = mean_and_error((exact + left * rest) / self.size)
        slack = left / self.size * width / math.sqrt(12)
        return Estimate(found.value, math.hypot(found.standard_error, slack))

    def log_determinant(self, shift: float) -> Estimate:
        """Return log det(A + τ I), for any shift τ.

        The function [`log_determinant`][flatminima.log_determinant] also estimates the error of
        the quadrature.

        Args:
            shift: τ.

        Raises:
            InvalidArgumentError: `shift` is not finite.
            NotPositiveDefiniteError: A + τ I is indefinite, or singular up to rounding.
        """
        call = "SpectralDensity.log_determinant"
        shift = check_number(call, "shift", shift)
        check_positive_definite(call, self.smallest, shift, self.resolution)
        return self.sum(lambda values: (values + shift).log())

    def unplaced_mass(self) -> Estimate:
        """Return the share of eigenvalues without a place on a logarithmic scale.

        They lie within `resolution` of zero, or belong to nodes next to zero whose weight stands
        for eigenvalues of unknown magnitude. More steps place more of them.
        """
        hidden = torch.where(self._is_seen(), 0.0, self.weights).sum(dim=1)
        atoms = float((self.eigenvalues.abs() <= self.resolution).sum())
        rest = (self.size - len(self.eigenvalues)) * hidden
        return mean_and_error((atoms + rest) / self.size)

    def _is_seen(self) -> Tensor:
        return is_resolved(self.nodes, self.weights, self.complete, self.resolution)

    def _samples(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        return spectral_samples(self.nodes, self.weights, self.eigenvalues, self.size, function)

    def _values(self) -> Tensor:
        return torch.cat([self.nodes.flatten(), self.eigenvalues])

    def _table(self) -> Table:
        shown = (
            ("mean eigenvalue", self.mean()),
            ("Frobenius norm", self.frobenius_norm()),
            ("stable rank", self.stable_rank()),
            ("negative mass", self.negative_mass()),
        )
        taken = len(self.eigenvalues)
        return Table(
            header=("quantity", "value", "standard error"),
            rows=(
                ("largest Ritz value", format_number(self.largest), ""),
                ("smallest Ritz value", format_number(self.smallest), ""),
                *(
                    (name, format_number(e.value), format_number(e.standard_error, 2))
                    for name, e in shown
                ),
            ),
            title=f"Spectral density of {self.size} eigenvalues"
            + (f", {taken} of them taken out" if taken else ""),
            notes=(
                f"{self.outcome.value} {self.products} products: {self.probes} probes, "
                f"{self.steps} steps each.",
                *reading_notes(self.readings),
                *self.notes,
            ),
        )


def put_on_scale(
    call: str, density: SpectralDensity, scale: str, sigma: float | None
) -> SpectralDensity:
    """Return the density with this scale and width; `call` is named in errors."""
    check_choice(call, "scale", scale, ("linear", "log"))
    if sigma is not None:
        chosen = check_positive(call, "sigma", sigma)
    else:
        nodes, weights, seen = density.nodes, density.weights, density._is_seen()
        if density.steps == 0:
            nodes = density.eigenvalues.unsqueeze(0).flip(1)
            weights = torch.ones_like(nodes) / density.size
            seen = nodes.abs() > density.resolution
        chosen = default_sigma(nodes, weights, seen, scale, density.resolution)
    return dataclasses.replace(density, scale=scale, sigma=chosen)


def _divide(total: Estimate, size: int) -> Estimate:
    return Estimate(total.value / size, total.standard_error / size)
