"""The density of all eigenvalues, by stochastic Lanczos quadrature."""

from __future__ import annotations

import math

import torch

from ...operators.linear import LinearOperator
from ...results import Outcome
from ...support.checks import check_choice, check_positive
from ...support.randomness import Seed
from ..eigen.result import EigenResult
from .broadening import Scale
from .chains import gauss_quadrature
from .density import SpectralDensity, put_on_scale

__all__ = ["spectral_density"]


def spectral_density(
    operator: LinearOperator,
    *,
    probes: int = 10,
    steps: int = 90,
    outliers: int | EigenResult = 0,
    scale: Scale = "linear",
    sigma: float | None = None,
    basis_device: torch.device | str | None = None,
    seed: Seed = 0,
    progress: bool = True,
) -> SpectralDensity:
    """Estimate the density of all eigenvalues by stochastic Lanczos quadrature.

    A Lanczos chain starts from each of several random vectors, uniform on the unit sphere, with
    full reorthogonalisation done twice. Its Ritz values and the squared first components of the
    eigenvectors of T are the nodes and weights of the Gauss rule for the spectral measure of that
    vector. The mean of these measures over all vectors is the density (Golub and Welsch 1969;
    Ghorbani et al. 2019, [arXiv:1901.10159](https://arxiv.org/abs/1901.10159); Papyan 2018,
    [arXiv:1811.07062](https://arxiv.org/abs/1811.07062)). All chains advance together: data that
    are not kept on the device are read once for one step of all chains. A chain that reaches an
    invariant space ends early, and its rule is exact; so is the rule of a chain of n steps.

    A few large eigenvalues can hide the rest: they take up nodes, and their random shares make
    the sums uncertain. With `outliers` they are taken out first. The random vectors are then
    orthogonal to their eigenvectors, the eigenvalues are exact atoms of weight 1/n, and the rest
    of the spectrum has a scale of its own.

    Each chain stores `steps` + m vectors of length n, where m is the number of outliers. All
    chains together take at most half of the free memory. If they do not fit, they run in groups,
    if necessary one by one, with the same result up to rounding.

    Args:
        operator: a symmetric operator.
        probes: number of random vectors, at least two; more make the standard errors smaller.
        steps: number of Lanczos steps from each vector, at most n; more show finer details of the
            density.
        outliers: how many eigenvalues of largest magnitude to take out first, or known eigenpairs
            from `lanczos`, which cost one product each.
        scale: "linear", or "log" for a density per decade of |λ|, separately for each sign; it
            suits spectra that span many orders of magnitude near zero.
        sigma: standard deviation of the Gaussian drawn for each node, in decades with "log".
            Default: with "linear" 0.75 times the range of the nodes divided by their number, by
            which neighbouring nodes form a smooth curve (the rule of Lin, Saad and Yang 2016,
            [arXiv:1308.5467](https://arxiv.org/abs/1308.5467), for Gaussians that meet at 1/1.25
            of their height); with "log" 0.75 times the mean distance of neighbours on that scale,
            weighted by their mass. Outliers do not count.
        basis_device: where the vectors of the chains are stored. Default: the device of the
            operator. "cpu" saves GPU memory but copies each vector and product between devices.
        seed: seed of the random vectors.
        progress: show a bar if it takes long.

    Returns:
        Nodes and weights of each random vector, with methods for what can be computed from them.

    Raises:
        InvalidArgumentError: there are fewer than two probes, no step, or more outliers than n;
            or the pairs do not belong to this operator.
        DeviceMemoryError: not even one chain fits into memory.
        NonFiniteError: a product holds NaN or infinity.
        NotSymmetricError: the products contradict the symmetry of the operator.

    Warns:
        ConvergenceWarning: the computation of the outliers did not converge.

    Examples:
        >>> import torch, flatminima as fm
        >>> bulk = torch.linspace(-1, 1, 198)
        >>> operator = fm.MatrixOperator(torch.diag(torch.cat([torch.tensor([50.0, 20.0]), bulk])))
        >>> result = fm.spectral_density(operator, steps=20, outliers=2)
        >>> [round(value, 2) for value in result.eigenvalues.tolist()]
        [50.0, 20.0]
        >>> value, error = result.density([0.0, 3.0])
        >>> bool(abs(value[0] - 0.5 * 198 / 200) < 3 * error[0]), float(value[1]) < 1e-9
        (True, True)
    """
    call = "spectral_density"
    check_choice(call, "scale", scale, ("linear", "log"))
    if sigma is not None:
        check_positive(call, "sigma", sigma)
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
    nodes, weights = found.rules()
    result = SpectralDensity(
        size=found.size,
        nodes=nodes,
        weights=weights,
        complete=tuple(chain.complete for chain in found.chains) or (True,) * probes,
        eigenvalues=found.atoms,
        sigma=math.nan,
        scale=scale,
        resolution=found.resolution,
        products=found.products,
        outcome=Outcome.COMPLETED,
        readings=found.readings,
        notes=found.notes,
    )
    return put_on_scale(call, result, scale, sigma)
