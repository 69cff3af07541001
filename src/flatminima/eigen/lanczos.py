"""Thick-restart Lanczos with locking."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checks import check_choice, check_integer
from ..errors import DeviceMemoryError, NonFiniteError, NotSymmetricError
from ..failures import is_out_of_memory
from ..operators.linear import LinearOperator, check_operator
from ..progress import progress_bar
from ..randomness import Seed, as_generator
from ..results import Outcome
from .result import ROUNDING, EigenResult, check_tolerance, finish

__all__ = ["LanczosSteps", "lanczos"]

Floats = NDArray[np.float64]
R = TypeVar("R")

WHICH = ("LA", "SA", "LM", "BE")


def lanczos(
    operator: LinearOperator,
    *,
    k: int = 1,
    which: Literal["LA", "SA", "LM", "BE"] = "LA",
    tol: float = 1e-3,
    max_products: int | None = None,
    seed: Seed = 0,
    basis_size: int | None = None,
    strict: bool = False,
    progress: bool = True,
) -> EigenResult:
    """The k outermost eigenpairs of a symmetric operator.

    Thick-restart Lanczos (Wu and Simon 2000, doi:10.1137/S0895479898334605) with full
    reorthogonalisation done twice, the residual test at every step, and the projected problem in
    float64 on the host. A Krylov space holds one direction of each eigenspace, so converged
    pairs are locked and a new random vector, orthogonal to them, is sent out a few steps more
    until it brings nothing better: this is what finds repeated eigenvalues.

    Args:
        operator: symmetric; `HessianOperator`, `MatrixOperator`, `FunctionOperator` or another.
        k: number of pairs, 1 ≤ k ≤ n.
        which: "LA" largest algebraic, "SA" smallest algebraic, "LM" largest magnitude, or "BE"
            both ends (⌈k/2⌉ largest and ⌊k/2⌋ smallest). Signs are kept everywhere.
        tol: a pair is converged when ‖A u − λ u‖ ≤ tol · max |Ritz value|.
        max_products: limit on products with the operator; max(1000, 20 k) unless told.
        seed: of the random start vectors.
        basis_size: vectors of length n that are kept, max(2 k + 10, 20) unless told.
        strict: raise instead of warn when the limit is reached.
        progress: show a bar if it takes long.

    Returns:
        Best first: descending for "LA" and "BE", ascending for "SA", by descending magnitude
        for "LM".

    Raises:
        InvalidArgumentError: k outside [1, n], tol ≤ 0 or below what rounding hides,
            a limit or basis too small.
        NonFiniteError: a product holds NaN or infinity.
        NotSymmetricError: the products contradict the symmetry of the operator.
        ConvergenceError: with `strict`, when the limit is reached.

    Warns:
        ConvergenceWarning: the limit was reached; the result says how far it came.

    Examples:
        >>> import torch, flatminima as fm
        >>> operator = fm.MatrixOperator(torch.diag(torch.arange(100.0)))
        >>> result = fm.lanczos(operator, k=2, tol=1e-5)
        >>> [round(value, 3) for value in result.eigenvalues.tolist()]
        [99.0, 98.0]
        >>> print(result.outcome.value)
        Converged: every residual is within the tolerance.
    """
    check_operator("lanczos", operator)
    n = operator.shape[0]
    k = check_integer("lanczos", "k", k, low=1, high=n)
    check_choice("lanczos", "which", which, WHICH)
    tol = check_tolerance("lanczos", tol, operator.dtype)
    limit = max(1000, 20 * k) if max_products is None else max_products
    limit = check_integer("lanczos", "max_products", limit, low=k)
    rows = max(2 * k + 10, 20) if basis_size is None else basis_size
    rows = min(n, check_integer("lanczos", "basis_size", rows, low=min(n, k + 3)))
    solver = LanczosSteps(operator, n, k, which, tol, limit, rows, seed)
    before = operator.readings
    with (
        operator.session(),
        progress_bar("lanczos", total=limit, unit="product", show=progress) as bar,
    ):
        steps = solver.run()
        vector = next(steps)
        while True:
            try:
                # Not `matvec`: NaN is found with the step's own transfer.
                vector = steps.send(operator._products(vector.unsqueeze(0))[0])
            except StopIteration as stop:
                result = stop.value
                break
            bar.set_postfix_str(f"largest residual {solver.worst:.1e}", refresh=False)
            bar.update()
    result = dataclasses.replace(result, readings=operator.readings - before, notes=operator.notes)
    return finish(result, call="lanczos", bound=tol * solver.scale, strict=strict)


@dataclasses.dataclass
class _Ritz:
    """Ritz pairs on the locked vectors and the chain together."""

    values: Floats
    vectors: Floats
    """A column for each pair: coefficients of the locked vectors, then of the chain's."""
    residuals: Floats
    wanted: list[int]
    """Positions of the (up to k) pairs asked for, best first."""


Steps = Generator[Tensor, Tensor, R]
"""Yields a vector to be multiplied, is sent the product, and returns R."""


class LanczosSteps:
    """The iteration, which asks for its products, so that several can advance together.

    Args:
        operator: gives type, device, name and error of the products.
        size: n, of the vectors.
        k: as in `lanczos`, and so are the others; `rows` is its basis_size.
        which: which end.
        tol: the tolerance.
        limit: on products.
        rows: vectors that are kept.
        seed: of the random start vectors.
    """

    def __init__(
        self,
        operator: LinearOperator,
        size: int,
        k: int,
        which: str,
        tol: float,
        limit: int,
        rows: int,
        seed: Seed,
    ) -> None:
        self.operator, self.k, self.which = operator, k, which
        self.tol, self.limit = tol, limit
        self.n, self.dtype, self.device = size, operator.dtype, operator.device
        self.generator = as_generator(seed, self.device)
        self.eps = float(torch.finfo(self.dtype).eps)
        # Locked vectors first, then the chain: one contiguous array, one row for each vector.
        try:
            self.basis = torch.empty(rows, self.n, dtype=self.dtype, device=self.device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceMemoryError(
                f"There is not enough memory on {self.device} for a basis of {rows} vectors of "
                f"length {self.n}. Lower basis_size= or k, or select fewer parameters."
            ) from error
        self.values = np.empty(0)
        """Of the locked pairs, best first."""
        self.residuals = np.empty(0)
        """Of the locked pairs: ‖A u − θ u‖ or a bound on it."""
        self.products = 0
        self.worst = math.inf
        """The largest residual at present."""
        self.largest = 0.0
        """Largest |Ritz value| so far, a lower bound of ‖A‖."""
        # Steps of a chain that looks for what the locked pairs have missed: more of them the
        # more exact the answer is meant to be.
        self.probe_steps = max(6, math.ceil(-2 * math.log10(tol)))

    def run(self) -> Steps[EigenResult]:
        """The whole iteration."""
        certain = False
        """Whether a search for missed pairs has ended with none."""
        while not certain and self.products < self.limit:
            start = yield from self._residual_start()
            complete = len(self.values) == self.k and start is None
            if start is None:
                start = self._random_start()
            if start is None or self.products >= self.limit:
                certain = start is None
                break
            minimum = self.probe_steps if complete else 1
            ritz, ended = yield from self._chain(start, minimum=minimum)
            values = ritz.values[ritz.wanted]
            if complete and np.abs(values - self.values).max() <= self.tol * self.scale:
                certain = ended
            else:
                self._lock(ritz)
                certain = len(self.values) == self.n
        outcome = Outcome.PRODUCT_LIMIT
        residuals = self._honest(self.residuals) + self.operator.error
        if certain and len(self.values) == self.k and not self._late(self.residuals):
            # Where all is noise, zero is as true as any other value within the residual.
            noise = self.largest <= max(10 * self.operator.error, self.operator.floor)
            exact = noise or bool((residuals <= self.tol * self.scale).all())
            outcome = Outcome.CONVERGED if exact else Outcome.INEXACT_PRODUCTS
        return EigenResult(
            eigenvalues=torch.as_tensor(self.values),
            eigenvectors=self.basis[: len(self.values)].clone().T,
            residuals=torch.as_tensor(residuals),
            outcome=outcome,
            products=self.products,
            which=self.which,
            tol=self.tol,
            method="lanczos",
        )

    # ---------------------------------------------------------------------------------- starts

    def _residual_start(self) -> Steps[Tensor | None]:
        """The residual of a locked pair whose bound is above the tolerance; None without one."""
        for i in range(len(self.values)):
            if not self._late(self.residuals[i : i + 1]) or self.products >= self.limit:
                continue
            vector = self.basis[i]
            self.products += 1
            error = (yield vector) - float(self.values[i]) * vector
            norm = float(torch.linalg.vector_norm(error))
            if not math.isfinite(norm):
                raise self._not_finite()
            self.residuals[i] = norm
            if self._late(self.residuals[i : i + 1]):
                start = self._unit_complement(error / norm)
                if start is not None:
                    return start
        return None

    def _random_start(self) -> Tensor | None:
        draw = torch.randn(
            self.n, generator=self.generator, device=self.generator.device, dtype=self.dtype
        ).to(self.device)
        return self._unit_complement(draw / torch.linalg.vector_norm(draw))

    def _unit_complement(self, vector: Tensor) -> Tensor | None:
        """The part orthogonal to the locked vectors, of length one; None where there is none."""
        locked = self.basis[: len(self.values)]
        for _ in range(2):
            vector = vector - locked.T @ (locked @ vector)
        norm = float(torch.linalg.vector_norm(vector))
        return None if norm < 10 * self.eps else vector / norm

    # ----------------------------------------------------------------------------------- chain

    def _chain(self, start: Tensor, *, minimum: int) -> Steps[tuple[_Ritz, bool]]:
        """Lanczos from `start`, orthogonal to the locked vectors, until what is wanted converged.

        It ends early on an invariant space, and at the product limit, which is then told by False.
        """
        first = len(self.values)
        capacity = len(self.basis) - first
        projected = np.zeros((capacity, capacity))
        coupling = np.zeros((first, capacity))
        expected = np.zeros(0)
        vector, size, steps = start, 0, 0
        while True:
            self.basis[first + size] = vector
            present = self.basis[: first + size + 1]
            self.products += 1
            remainder = yield vector
            heights = present @ remainder
            remainder = remainder - present.T @ heights
            correction = present @ remainder
            remainder -= present.T @ correction
            # In float64, as squares of small numbers vanish in float32.
            wide = None if self.device.type == "mps" else torch.float64
            norm = torch.linalg.vector_norm(remainder, dtype=wide).reshape(1)
            # The only transfer of the step.
            numbers = (
                torch.cat([(heights + correction).to(norm.dtype), norm]).cpu().double().numpy()
            )
            if not np.isfinite(numbers).all():
                raise self._not_finite()
            column, beta = numbers[first:-1], float(numbers[-1])
            coupling[:, size] = numbers[:first]
            projected[: size + 1, size] = projected[size, : size + 1] = column
            self._check_symmetry(column[:size] - expected, float(np.abs(column).max()))
            size += 1
            steps += 1
            scale = max(self.largest, beta, float(np.abs(projected[:size, :size]).max()))
            exhausted = first + size == self.n or beta <= ROUNDING * self.eps * scale
            ritz = self._ritz(projected[:size, :size], coupling[:, :size], 0 if exhausted else beta)
            worst = ritz.residuals[ritz.wanted]
            self.worst = float(worst.max())
            converged = len(worst) == self.k and not self._late(worst)
            ended = (converged and steps >= minimum) or exhausted
            if ended or self.products >= self.limit:
                return ritz, ended
            expected = np.zeros(size)
            expected[-1] = beta
            if size == capacity:
                values, vectors = _eigh(projected)
                kept = select(values, self.which, self._kept(size))
                expected = beta * vectors[-1, kept]
                self._rotate(vectors[:, kept], first, size)
                coupling[:, : len(kept)] = coupling @ vectors[:, kept]
                size = len(kept)
                projected[:] = 0
                projected[range(size), range(size)] = values[kept]
            vector = remainder / beta

    def _kept(self, size: int) -> int:
        """How many Ritz vectors of a full chain to go on with: about half."""
        return min(size - 1, max(self.k - len(self.values) + 1, size // 2 + 1))

    def _not_finite(self) -> NonFiniteError:
        return NonFiniteError(
            f"Product number {self.products} with {self.operator!r} holds NaN or infinity."
        )

    def _check_symmetry(self, gaps: Floats, scale: float) -> None:
        scale = max(scale, self.largest)
        gap = float(np.abs(gaps).max()) if len(gaps) else 0.0
        if gap > max(0.05 * scale, 20 * self.operator.error, self.operator.floor):
            raise NotSymmetricError(
                f"{self.operator!r} is not symmetric: ⟨u, A v⟩ and ⟨A u, v⟩ differ by {gap:.2e} "
                f"for unit vectors where products are of size {scale:.2e}. Lanczos needs a "
                "symmetric operator that stays the same from product to product."
            )

    # -------------------------------------------------------------------------------- algebra

    def _late(self, residuals: Floats) -> bool:
        return bool((self._honest(residuals) > self.tol * self.scale).any())

    @property
    def scale(self) -> float:
        """What the tolerance is relative to."""
        return max(self.largest, self.operator.floor)

    def _honest(self, residuals: Floats) -> Floats:
        """Residuals from the recurrence, not below what rounding of the products adds to them."""
        return np.maximum(residuals, ROUNDING * self.eps * self.largest)

    def _ritz(self, projected: Floats, coupling: Floats, beta: float) -> _Ritz:
        """Rayleigh–Ritz on locked vectors U and chain V, with A V = U C + V T + β r eᵀ.

        A U = U Λ + R with known column norms of R, of which Vᵀ R = Cᵀ; what is left of R bounds
        what the locked vectors add to a residual.
        """
        first = len(self.values)
        whole = np.block([[np.diag(self.values), coupling], [coupling.T, projected]])
        values, vectors = _eigh(whole)
        self.largest = max(self.largest, float(np.abs(values).max()))
        left = np.sqrt(np.maximum(self.residuals**2 - (coupling**2).sum(axis=1), 0))
        residuals = beta * np.abs(vectors[-1]) + left @ np.abs(vectors[:first])
        return _Ritz(values, vectors, residuals, select(values, self.which, self.k))

    def _rotate(self, coefficients: Floats, first: int, count: int) -> None:
        """Replace `count` rows from `first` on by combinations of them, a strip at a time."""
        small = torch.as_tensor(coefficients.T.copy()).to(self.device, self.dtype)
        strip = max(1, 2**22 // count)
        for begin in range(0, self.n, strip):
            columns = slice(begin, begin + strip)
            block = self.basis[first : first + count, columns]
            self.basis[first : first + len(small), columns] = small @ block

    def _lock(self, ritz: _Ritz) -> None:
        """Make the wanted pairs the locked ones, best first."""
        self._rotate(ritz.vectors[:, ritz.wanted], 0, len(ritz.values))
        self.values = ritz.values[ritz.wanted]
        self.residuals = ritz.residuals[ritz.wanted]


def _eigh(matrix: Floats) -> tuple[Floats, Floats]:
    """By torch and not NumPy, whose threads would contend with torch's at every step."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(matrix))
    return values.numpy(), vectors.numpy()


def select(values: Floats, which: str, count: int) -> list[int]:
    """Positions of the `count` values that `which` asks for, best first."""
    descending = [int(i) for i in np.argsort(-values, kind="stable")]
    if which == "LA":
        return descending[:count]
    if which == "SA":
        return descending[::-1][:count]
    if which == "LM":
        return [int(i) for i in np.argsort(-np.abs(values), kind="stable")[:count]]
    top = -(-count // 2)
    bottom = max(top, len(values) - count // 2)
    return descending[:top] + descending[bottom:]
