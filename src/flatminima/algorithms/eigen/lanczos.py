"""The outermost eigenpairs of a symmetric operator, by thick-restart Lanczos."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from ...errors import ArgumentTypeError, InvalidArgumentError
from ...operators.linear import LinearOperator, check_operator
from ...support.checks import check_choice, check_integer
from ...support.progress import progress_bar
from ...support.randomness import Seed
from ...support.vectors import check_vector
from .basis import check_basis_device
from .chain import Steps
from .krylov import LanczosSteps
from .result import EigenResult, check_basis_type, check_tolerance, finish

__all__ = ["LanczosSteps", "Steps", "lanczos"]

WHICH = ("LA", "SA", "LM", "BE")


def lanczos(
    operator: LinearOperator,
    *,
    k: int | tuple[int, int] = 1,
    which: Literal["LA", "SA", "LM", "BE"] = "LA",
    tol: float = 1e-3,
    max_products: int | None = None,
    seed: Seed = 0,
    initial: EigenResult | Tensor | None = None,
    basis_size: int | None = None,
    basis_device: torch.device | str | None = None,
    basis_dtype: torch.dtype | None = None,
    strict: bool = False,
    progress: bool = True,
) -> EigenResult:
    """Return the k outermost eigenpairs of a symmetric operator.

    The method is thick-restart Lanczos (Wu and Simon 2000, doi:10.1137/S0895479898334605). Full
    reorthogonalisation is done twice, residuals are tested at every step, and the projected
    problem is solved in float64 on the host.

    A small residual shows that there is an eigenvalue, not that it is the outermost one: this
    relies on the random start (Kuczyński and Woźniakowski 1992, doi:10.1137/0613066). The
    iteration continues until the chance of having missed an eigenvalue more than
    10 `tol` · max |Ritz value| further out is below 1 %, by the bound of van Dorsselaer,
    Hochstenbach and van der Vorst (1999, https://ir.cwi.nl/pub/4505), or for
    max(10, −2 log₁₀ `tol`) steps. If other eigenvalues lie within a few tolerances of the last
    wanted ones, values that still drift are followed until they come to rest.

    A Krylov space contains only one direction of each eigenspace. If more than one pair is wanted
    at an end, the space is therefore held, and chains start from new random vectors orthogonal to
    it until they find nothing better. This finds repeated eigenvalues.

    Args:
        operator: a symmetric operator: `HessianOperator`, `MatrixOperator`, `FunctionOperator` or
            another.
        k: number of pairs, 1 ≤ k ≤ n. With "BE" also two numbers, (largest, smallest).
        which: "LA" largest algebraic, "SA" smallest algebraic, "LM" largest magnitude, or "BE"
            both ends (⌈k/2⌉ largest and ⌊k/2⌋ smallest). Signs are always kept.
        tol: a pair has converged when ‖A u − λ u‖ ≤ tol · max |Ritz value|.
        max_products: limit on products with the operator. Default: max(1000, 20 k).
        seed: seed of the random start vectors.
        initial: where to start: an earlier result for this operator with a larger tolerance or
            for a similar operator, or a tensor (n,) or (n, m). A good start saves products and a
            bad one costs few; the answer does not depend on it.
        basis_size: number of vectors of length n in the basis. Default: max(2 k + 10, 20).
        basis_device: device of the basis. Default: that of the operator. "cpu" saves GPU memory:
            each product is then copied to the host and orthogonalised there, and the next vector
            is copied back.
        basis_dtype: dtype of the basis. Default: that of the operator. `torch.bfloat16` and
            `torch.float16` halve the memory. `tol` must then be at least the precision of that
            dtype, 7.8e-3 or 9.8e-4. The returned vectors are orthogonal to that precision, and
            one more product for each measures its residual.
        strict: raise instead of warn when the limit is reached.
        progress: show a bar if it takes long.

    Returns:
        The pairs, best first: in descending order for "LA" and "BE", in ascending order for "SA",
        by descending magnitude for "LM".

    Raises:
        InvalidArgumentError: k is outside [1, n]; `tol` is not positive or is below rounding; the
            limit or the basis is too small; or `initial` is a result without eigenvectors or
            holds a zero vector.
        ShapeError: the length of `initial` is not n.
        NonFiniteError: a product, or `initial`, holds NaN or infinity.
        NotSymmetricError: the products contradict the symmetry of the operator.
        ConvergenceError: with `strict`, when the limit is reached.

    Warns:
        ConvergenceWarning: the limit was reached; the residuals show how far it got.

    Examples:
        >>> import torch, flatminima as fm
        >>> operator = fm.MatrixOperator(torch.diag(torch.arange(100.0)))
        >>> result = fm.lanczos(operator, k=2, tol=1e-5)
        >>> [round(value, 3) for value in result.eigenvalues.tolist()]
        [99.0, 98.0]
        >>> print(result.outcome.value)
        Converged: every residual is within the tolerance.
        >>> again = fm.lanczos(operator, k=2, tol=1e-5, initial=result)
        >>> again.products < result.products
        True
        >>> ends = fm.lanczos(operator, k=(2, 1), which="BE", tol=1e-5)
        >>> [abs(round(value, 3)) for value in ends.eigenvalues.tolist()]
        [99.0, 98.0, 0.0]
    """
    call = "lanczos"
    check_operator(call, operator)
    n = operator.shape[0]
    check_choice(call, "which", which, WHICH)
    counts = _check_count(k, which, n)
    total = counts if isinstance(counts, int) else sum(counts)
    tol = check_tolerance(call, tol, operator.dtype)
    if basis_dtype is not None:
        check_basis_type(call, basis_dtype, operator.dtype, tol)
    limit = max(1000, 20 * total) if max_products is None else max_products
    limit = check_integer(call, "max_products", limit, low=total)
    rows = max(2 * total + 10, 20) if basis_size is None else basis_size
    rows = min(n, check_integer(call, "basis_size", rows, low=min(n, total + 3)))
    solver = LanczosSteps(
        operator,
        n,
        counts,
        which,
        tol,
        limit,
        rows,
        seed,
        initial=None if initial is None else _start_vectors(initial, operator),
        device=None if basis_device is None else check_basis_device(call, basis_device),
        dtype=basis_dtype,
    )
    before = operator.readings
    with (
        operator.session(),
        progress_bar("lanczos", total=limit, unit="product", show=progress) as bar,
    ):
        steps = solver.run()
        vector = next(steps)
        while True:
            try:
                # Not `matvec`, since the step itself tests for NaN.
                vector = steps.send(operator._products(vector.unsqueeze(0))[0])
            except StopIteration as stop:
                result = stop.value
                break
            bar.set_postfix_str(f"largest residual {solver.worst:.1e}", refresh=False)
            bar.update()
    result = dataclasses.replace(result, readings=operator.readings - before, notes=operator.notes)
    return finish(result, call=call, bound=tol * solver.scale, strict=strict)


def _check_count(k: object, which: str, n: int) -> int | tuple[int, int]:
    if not isinstance(k, tuple):
        return check_integer("lanczos", "k", k, low=1, high=n)
    if which != "BE" or len(k) != 2:
        raise InvalidArgumentError(
            "The 'k' argument of lanczos must be a number, or with which='BE' two numbers "
            f"(largest, smallest); got {k!r} with which={which!r}."
        )
    largest, smallest = (check_integer("lanczos", "k", count, low=0) for count in k)
    if not 1 <= largest + smallest <= n:
        raise InvalidArgumentError(
            f"The 'k' argument of lanczos must request 1 to {n} pairs in all; got "
            f"{largest} + {smallest}."
        )
    return largest, smallest


def _start_vectors(initial: object, operator: LinearOperator) -> Tensor:
    """Return the given vectors as the columns of a matrix (n, m)."""
    if isinstance(initial, EigenResult):
        if initial.eigenvectors is None:
            raise InvalidArgumentError(
                "The 'initial' argument of lanczos is a result whose eigenvectors were dropped; "
                "pass the result from before `without_vectors()`."
            )
        initial = initial.eigenvectors.to(operator.device)
    if not isinstance(initial, Tensor):
        raise ArgumentTypeError(
            "The 'initial' argument of lanczos must be an EigenResult or a tensor of shape (n,) "
            f"or (n, m); got {type(initial).__name__}. torch.as_tensor converts an array."
        )
    vectors = check_vector(
        "The 'initial' argument of lanczos",
        initial,
        size=operator.shape[0],
        dtype=operator.dtype,
        device=operator.device,
        columns=initial.dim() != 1,
    ).reshape(operator.shape[0], -1)
    if vectors.shape[1] == 0 or not bool((vectors != 0).any(dim=0).all()):
        raise InvalidArgumentError(
            "The 'initial' argument of lanczos holds a zero vector or no vector at all; omit it "
            "if you have no start vector."
        )
    return vectors
