"""Deflated power iteration."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import NonFiniteError
from ...operators.linear import LinearOperator, check_operator
from ...results import Outcome
from ...support.checks import check_integer
from ...support.progress import progress_bar
from ...support.randomness import Seed, as_generator
from .result import ROUNDING, EigenResult, check_tolerance, finish

__all__ = ["power_iteration"]


def power_iteration(
    operator: LinearOperator,
    *,
    k: int = 1,
    tol: float = 1e-3,
    max_products: int | None = None,
    seed: Seed = 0,
    strict: bool = False,
    progress: bool = True,
) -> EigenResult:
    """Return the k eigenpairs of largest magnitude by power iteration, one after the other.

    Each iterate is kept orthogonal to the pairs already found. At the end the k vectors are
    rotated among themselves (Rayleigh–Ritz), which takes no further product. The method is
    provided because the literature uses it, and as a check: `lanczos` needs far fewer products.

    Args:
        operator: a symmetric operator.
        k: number of pairs, 1 ≤ k ≤ n.
        tol: a pair has converged when ‖A u − λ u‖ ≤ tol · max |λ|.
        max_products: limit on products for all pairs together. Default: 1000 k.
        seed: seed of the random start vectors.
        strict: raise instead of warn when the limit is reached.
        progress: show a bar if it takes long.

    Returns:
        The pairs by descending magnitude, with their signs and true residuals.

    Raises:
        InvalidArgumentError: k is outside [1, n]; `tol` is not positive or is below rounding.
        NonFiniteError: a product holds NaN or infinity.
        ConvergenceError: with `strict`, when the limit is reached.

    Warns:
        ConvergenceWarning: the limit was reached; the residuals show how far it got. Two
            eigenvalues of equal size and opposite sign never converge.

    Examples:
        >>> import torch, flatminima as fm
        >>> operator = fm.MatrixOperator(torch.diag(torch.tensor([2, -5, 1])))
        >>> result = fm.power_iteration(operator, k=2, tol=1e-6)
        >>> [round(value, 4) for value in result.eigenvalues.tolist()]
        [-5.0, 2.0]
    """
    check_operator("power_iteration", operator)
    n = operator.shape[0]
    k = check_integer("power_iteration", "k", k, low=1, high=n)
    tol = check_tolerance("power_iteration", tol, operator.dtype)
    limit = 1000 * k if max_products is None else max_products
    limit = check_integer("power_iteration", "max_products", limit, low=k)
    generator = as_generator(seed, operator.device)
    found = torch.zeros(k, n, dtype=operator.dtype, device=operator.device)
    images = torch.zeros_like(found)
    products, scale, before = 0, 0.0, operator.readings
    with (
        operator.session(),
        progress_bar("power iteration", total=limit, unit="product", show=progress) as bar,
    ):
        for index in range(k):
            # One product is reserved for each of the pairs to come.
            budget = limit - products - (k - 1 - index)
            spent, scale = _iterate(
                operator, found, images, index, tol, budget, scale, generator, bar
            )
            products += spent
    result = _rotate_pairs(found, images, products, tol, operator.error)
    result = dataclasses.replace(result, readings=operator.readings - before, notes=operator.notes)
    bound = tol * float(result.eigenvalues.abs().max())
    return finish(result, call="power_iteration", bound=bound, strict=strict)


def _iterate(
    operator: LinearOperator,
    found: Tensor,
    images: Tensor,
    index: int,
    tol: float,
    budget: int,
    scale: float,
    generator: torch.Generator,
    bar: Any,
) -> tuple[int, float]:
    """Iterate on row `index` of `found`, orthogonal to the rows above it.

    Args:
        operator: A.
        found: (k, n), vectors; row `index` is written.
        images: (k, n), their products; row `index` is written.
        index: which pair.
        tol: the tolerance.
        budget: the largest number of products.
        scale: the largest |value| so far.
        generator: draws the start vector.
        bar: is updated after each product.

    Returns:
        The number of products, and the largest |value| so far.
    """
    earlier = found[:index]
    draw = torch.randn(
        found.shape[1], generator=generator, device=generator.device, dtype=found.dtype
    )
    vector = _orthonormalize(draw.to(found.device), earlier)
    spent = 0
    while spent < budget:
        spent += 1
        image = operator._products(vector.unsqueeze(0))[0]
        remainder = image - earlier.T @ (earlier @ image)
        value = operator.inner(vector, remainder)
        residual = torch.linalg.vector_norm(remainder - value * vector)
        size = torch.linalg.vector_norm(remainder)
        numbers = torch.stack([value, residual, size]).cpu().double().tolist()
        if not np.isfinite(numbers).all():
            raise NonFiniteError(f"A product with {operator!r} holds NaN or infinity.")
        found[index], images[index] = vector, image
        scale = max(scale, abs(numbers[0]))
        bar.set_postfix_str(f"pair {index + 1}, residual {numbers[1]:.1e}", refresh=False)
        bar.update()
        # Half the tolerance, since the rotation in the end may increase the residuals.
        if numbers[1] <= 0.5 * tol * scale or numbers[2] == 0:
            break
        vector = _orthonormalize(remainder, earlier)
    return spent, scale


def _orthonormalize(vector: Tensor, earlier: Tensor) -> Tensor:
    vector = vector / torch.linalg.vector_norm(vector)
    for _ in range(2):
        vector = vector - earlier.T @ (earlier @ vector)
    unit: Tensor = vector / torch.linalg.vector_norm(vector)
    return unit


def _rotate_pairs(
    found: Tensor, images: Tensor, products: int, tol: float, error: float
) -> EigenResult:
    """Return the Ritz pairs on the span of `found`, given its products `images`."""
    small = (found @ images.T).cpu().double()
    ascending, rotation = torch.linalg.eigh((small + small.T) / 2)
    order = ascending.abs().argsort(descending=True, stable=True)
    values = ascending[order]
    turn = rotation[:, order].T.to(found)
    vectors = turn @ found
    errors = turn @ images - values.to(found).unsqueeze(1) * vectors
    residuals = torch.linalg.vector_norm(errors, dim=1).double().cpu()
    scale = float(values.abs().max())
    floor = ROUNDING * torch.finfo(found.dtype).eps * scale
    residuals = residuals.clamp(min=floor)
    outcome = Outcome.CONVERGED
    if not bool((residuals <= tol * scale).all()):
        outcome = Outcome.PRODUCT_LIMIT
    elif not bool((residuals + error <= tol * scale).all()):
        outcome = Outcome.INEXACT_PRODUCTS
    return EigenResult(
        eigenvalues=values,
        eigenvectors=vectors.T,
        residuals=residuals + error,
        outcome=outcome,
        products=products,
        which="LM",
        tol=tol,
        method="power_iteration",
    )
