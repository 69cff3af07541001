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
    """Return the density of all eigenvalues, by stochastic Lanczos quadrature.

    From each of several random vectors, uniform on the unit sphere, a chain of Lanczos vectors
    with full reorthogonalisation done twice. Its Ritz values and the squared first components of
    T's eigenvectors are the nodes and weights of the Gauss rule for the vector's own spectral
    measure, whose mean over all vectors is the density (Golub and Welsch 1969; Ghorbani et al.
    2019, [arXiv:1901.10159](https://arxiv.org/abs/1901.10159); Papyan 2018,
    [arXiv:1811.07062](https://arxiv.org/abs/1811.07062)). All chains advance together, so that
    data which are not kept on the device are read once for a step of all of them. A chain that
    meets an invariant space ends early, and its rule is exact; so is one of n steps.

    Few large eigenvalues hide the rest: nodes go to them, and their shares of the random vectors
    make the sums uncertain. With `outliers` they are taken out first. The random vectors are
    then orthogonal to their eigenvectors, the eigenvalues enter as exact atoms of weight 1/n,
    and the bulk has its own scale.

    Args:
        operator: symmetric.
        probes: random vectors, two at least; their number makes the standard errors small.
        steps: of Lanczos from each, at most n; their number makes details of the density visible.
        outliers: how many eigenvalues of largest magnitude to take out first, or eigenpairs that
            are known already, as `lanczos` returned them, at the price of a product for each.
        scale: "linear"; or "log", where the density is one per decade of |λ|, for both signs
            apart, as a bulk of many orders of magnitude near zero asks for.
        sigma: standard deviation of the Gaussian that a node is drawn as, in decades with
            "log". Default: for "linear" 0.75 times the range of the nodes divided by their
            number, which makes a smooth curve of neighbouring nodes (the rule of Lin, Saad and
            Yang 2016, [arXiv:1308.5467](https://arxiv.org/abs/1308.5467), for Gaussians that
            meet at 1/1.25 of their height); for "log" 0.75 times the mean distance of neighbours
            on that scale, weighted by their mass. Eigenvalues taken out do not count.
        basis_device: where the chains' vectors are kept. Default: the operator's device.
            "cpu" spares the memory of a GPU at the price of a copy to and fro for each product.
        seed: of the random vectors.
        progress: show a bar if it takes long.

    Returns:
        Nodes and weights of each random vector, with everything that can be computed from them.

    Memory: `steps` + m vectors of length n for each chain, m of them taken out, in half of the
    memory that is free. Where that does not hold all chains they are run in groups, at worst one
    after another, with the same result but for rounding.

    Raises:
        InvalidArgumentError: fewer than two probes or one step, more outliers than n, or pairs
            that are not those of this operator.
        DeviceMemoryError: not even one chain fits.
        NonFiniteError: a product holds NaN or infinity.
        NotSymmetricError: the products contradict the symmetry of the operator.

    Warns:
        ConvergenceWarning: the outliers that were to be found did not converge.

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
