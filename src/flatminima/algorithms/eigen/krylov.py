"""The iteration of `lanczos`, one product at a time."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ...errors import NonFiniteError
from ...operators.linear import LinearOperator
from ...results import Outcome
from ...support.randomness import Seed, as_generator
from .basis import Basis
from .chain import (
    Chain,
    Drift,
    Floats,
    Ritz,
    Steps,
    bound_sum,
    eigh,
    multiply,
    select,
    transform_gram,
)
from .result import ROUNDING, EigenResult
from .symmetry import check_symmetry
from .warm_start import combine_columns, take_over

__all__ = ["LanczosSteps", "Steps"]


CHANCE = 0.01
"""The search for missed pairs ends when the chance of having missed one is below this."""

MARGIN = 10.0
"""Distance beyond the pairs found, in tolerances, at which that chance is computed. A missed
eigenvalue that is closer changes the answer by less, and is hard to tell from those found."""

PATIENCE = 3
"""Converged values that still drift are followed for this many times the steps of a search."""

RANDOM_SHARE = 0.1
"""Length of the random part added to a given start vector, relative to that vector."""


class LanczosSteps:
    """The Lanczos iteration as a generator of vectors, so that several can advance together.

    It holds Ritz vectors U with A U = U Λ + R + v sᵀ. Of R only an upper bound of RᵀR is known;
    v is the start vector of the chain. A restart is not a special case: the best Ritz vectors of
    U and the chain together become the new U, and the chain continues from its next vector. Nor
    is the search for missed pairs: its chain starts from a random v, and s is zero.

    The arguments are those of `lanczos`, if not described here.

    Args:
        operator: gives dtype, device, name and error of the products.
        size: n, the length of the vectors.
        k: number of pairs; for "BE" also the numbers at the upper and at the lower end.
        which: the end of the spectrum.
        tol: the tolerance.
        limit: the largest number of products.
        rows: number of vectors in the basis, `basis_size` in `lanczos`.
        seed: seed of the random start vectors.
        initial: (n, m), whose columns are tried first, or None.
        device: device of the basis. Default: that of the operator.
        dtype: dtype of the basis. Default: that of the operator.
    """

    def __init__(
        self,
        operator: LinearOperator,
        size: int,
        k: int | tuple[int, int],
        which: str,
        tol: float,
        limit: int,
        rows: int,
        seed: Seed,
        *,
        initial: Tensor | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.operator, self.which = operator, which
        if isinstance(k, int):
            k = {"BE": (-(-k // 2), k // 2), "SA": (0, k)}.get(which, (k, 0))
        self.ends, self.k = k, sum(k)
        self.tol, self.limit = tol, limit
        self.n, self.dtype = size, operator.dtype
        self.generator = as_generator(seed, operator.device)
        self.eps = float(torch.finfo(self.dtype).eps)
        self.basis = Basis(operator, rows, size, device, dtype)
        # Numbers below this, relative to the largest Ritz value, are zero up to rounding.
        self.rounding = ROUNDING * self.eps
        if self.basis.narrow:
            self.rounding = max(self.rounding, float(torch.finfo(self.basis.dtype).eps))
        self.initial = initial
        self.values = np.empty(0)
        """Ritz values of the held pairs, best first; at least the k wanted ones once found."""
        self.gram = np.empty((0, 0))
        """An upper bound of RᵀR."""
        self.residuals = np.empty(0)
        """‖A u − θ u‖ of the held pairs, or a bound on it."""
        self.products = 0
        self.worst = math.inf
        """The largest residual at present."""
        self.largest = 0.0
        """Largest |Ritz value| so far, a lower bound of ‖A‖."""
        # The limit of steps in a search for missed pairs grows with the accuracy wanted.
        self.probe_steps = max(10, math.ceil(-2 * math.log10(tol)))

    def run(self) -> Steps[EigenResult]:
        """Yield every vector to multiply, and return the result in the end."""
        probing, certain, checked = False, False, not self.basis.narrow
        start, tie, share = yield from self._make_start()
        chain = Chain(len(self.basis), len(self.values), share)
        while True:
            before = self.values[: self.k]
            ritz, ended, moved = yield from self._run_chain(start, tie, chain, probing)
            values = ritz.values[ritz.wanted]
            same = len(before) == len(values) == self.k and bool(
                np.abs(values - before).max() <= self.tol * self.scale
            )
            if moved or not (same and probing):
                self._lock(ritz)
            certain = ended and (
                len(self.values) == self.n
                or (same and (probing or certain))
                or (chain.single and len(self.values) >= self.k)
            )
            if certain and not checked:
                # The error from rounding the basis shows only in a further product.
                self.residuals[: self.k] = math.inf
                checked = True
            if self.products >= self.limit:
                break
            late = yield from self._restart_from_residual()
            if late is not None:
                (start, tie), probing, checked = late, False, not self.basis.narrow
            else:
                drawn = None if certain else self._draw_start()
                if drawn is None or self.products >= self.limit:
                    certain = drawn is None
                    break
                start, tie, probing = drawn, None, len(self.values) >= self.k
            chain = Chain(len(self.basis), len(self.values))
        return self._make_result(certain)

    def _make_result(self, certain: bool) -> EigenResult:
        count = min(self.k, len(self.values))
        values, residuals = self.values[:count], self.residuals[:count]
        outcome = Outcome.PRODUCT_LIMIT
        shown = self._raise_to_rounding(residuals) + self.operator.error
        if certain and count == self.k and not self._above_tolerance(residuals):
            # If all products are noise, zero is as true as any other value within the residual.
            noise = self.largest <= max(10 * self.operator.error, self.operator.floor)
            exact = noise or bool((shown <= self.tol * self.scale).all())
            outcome = Outcome.CONVERGED if exact else Outcome.INEXACT_PRODUCTS
        return EigenResult(
            eigenvalues=torch.as_tensor(values.copy()),
            eigenvectors=self.basis.first(count).T,
            residuals=torch.as_tensor(shown),
            outcome=outcome,
            products=self.products,
            which=self.which,
            tol=self.tol,
            method="lanczos",
        )

    # ---------------------------------------------------------------------------------- starts

    def _make_start(self) -> Steps[tuple[Tensor, Floats | None, float]]:
        """Return start vector, s, and the logarithm of the random part's share of the start."""
        given, self.initial = self.initial, None
        if given is not None and self.products + given.shape[1] < self.limit:
            held = yield from take_over(self.basis, given, self._step, self.tol)
            if held is not None:
                order = select(held.values, self.which, len(held.values), top=self.ends[0])
                self.values, self.gram = held.values[order], held.gram[np.ix_(order, order)]
                self.largest = float(np.abs(self.values).max())
                squares = np.diag(held.gram) + held.tie**2
                self.residuals = np.sqrt(np.maximum(squares, 0))[order]
                self.basis.rotate(np.eye(len(order))[:, order], len(order))
                if held.start is not None:
                    return held.start, held.tie[order], 0.0
                given = None
        drawn = self._draw_start()
        assert drawn is not None
        direction = None if given is None else combine_columns(given)
        if direction is None:
            return drawn, None, 0.0
        # The bound on missed eigenvalues relies on a random part.
        start = direction.to(drawn) + RANDOM_SHARE * drawn
        norm = float(torch.linalg.vector_norm(start))
        return start / norm, None, math.log(RANDOM_SHARE / norm)

    def _restart_from_residual(self) -> Steps[tuple[Tensor, Floats] | None]:
        """Return the residual of a wanted pair that is above the tolerance, and s; or None."""
        for i in range(min(self.k, len(self.values))):
            if not self._above_tolerance(self.residuals[i : i + 1]) or self.products >= self.limit:
                continue
            vector = self.basis.take(i)
            self.products += 1
            product = yield vector
            if self.basis.narrow:
                norm = torch.linalg.vector_norm(vector)
                vector, product = vector / norm, product / norm
                self.values[i] = float(vector @ product)
            error = product - float(self.values[i]) * vector
            norm = torch.linalg.vector_norm(error)
            self.residuals[i] = float(norm)
            if not math.isfinite(self.residuals[i]):
                raise self._not_finite_error()
            if self._above_tolerance(self.residuals[i : i + 1]):
                start = self._unit_complement((error / norm).to(self.basis.device))
                if start is not None:
                    # The start vector now accounts for all of this residual.
                    self.gram[i] = self.gram[:, i] = 0
                    return start, self.residuals[i] * np.eye(len(self.values))[i]
        return None

    def _draw_start(self) -> Tensor | None:
        draw = torch.randn(
            self.n, generator=self.generator, device=self.generator.device, dtype=self.dtype
        ).to(self.basis.device)
        return self._unit_complement(draw / torch.linalg.vector_norm(draw))

    def _unit_complement(self, vector: Tensor) -> Tensor | None:
        """Return the unit vector along the part orthogonal to the held vectors, or None."""
        held = len(self.values)
        for _ in range(2):
            vector = self.basis.subtract(self.basis.coefficients(held, vector), vector)
        norm = float(torch.linalg.vector_norm(vector))
        return None if norm < 10 * self.eps else vector / norm

    # ----------------------------------------------------------------------------------- chain

    def _run_chain(
        self, vector: Tensor, tie: Floats | None, chain: Chain, probing: bool
    ) -> Steps[tuple[Ritz, bool, bool]]:
        """Run Lanczos from `vector`, orthogonal to the held vectors, until the pairs converge.

        Returns:
            The Ritz pairs; whether the chain ended, by convergence or on an invariant space (False
            at the product limit); and whether the held vectors have changed.
        """
        chain.single = chain.first and max(self.ends) == 1
        searching, moved, steps, idle = probing or chain.single, False, 0, 0
        drift = Drift()
        while True:
            held = len(self.values)
            count = held + chain.size + 1
            product = yield self.basis.put(count - 1, vector)
            # By symmetry, a product of a chain without held vectors has parts along the last two.
            alone = held == 0 and not self.basis.narrow
            numbers, remainder = self._step(count, product, begin=max(0, count - 2) if alone else 0)
            coefficients, beta = numbers[:-1], float(numbers[-1])
            self._check_symmetry(
                chain.take(coefficients, beta, tie, self.gram), float(np.abs(coefficients).max())
            )
            steps += 1
            scale = max(self.largest, beta, float(np.abs(chain.matrix).max()))
            exhausted = held + chain.size == self.n or beta <= self.rounding * scale
            ritz = self._solve_projected(chain, 0 if exhausted else beta, tie is not None)
            worst = ritz.residuals[ritz.wanted]
            self.worst = float(worst.max())
            # The rest of the held vectors' residuals is not along this chain and will not fall
            # any more; `_restart_from_residual` continues with it.
            stuck = held > 0 and not self._above_tolerance(2 * np.abs(ritz.tie[ritz.wanted]))
            done = stuck or not self._above_tolerance(worst)
            idle += done and len(worst) == self.k
            resting = drift.has_ended(ritz, self.tol * self.scale)
            ended = exhausted
            if idle and not ended:
                if searching:
                    tired = (steps if probing else idle) >= self.probe_steps
                    ended = tired or self._is_likely_complete(chain, ritz)
                else:
                    ended = resting or idle >= PATIENCE * self.probe_steps
            if ended or self.products >= self.limit:
                return ritz, ended, moved
            if held + chain.size == len(self.basis):
                order = self._order_pairs(ritz)
                kept = order[: self._count_kept(len(order))]
                gone = ritz.values[order[len(kept) :]]
                self.gram = transform_gram(ritz.gram, ritz.vectors[:held, kept])
                self._hold(ritz, kept)
                tie, moved = ritz.tie[kept], True
                chain.restart(len(kept), gone)
            vector = remainder / beta

    def _step(self, count: int, product: Tensor, *, begin: int = 0) -> tuple[Floats, Tensor]:
        """Count a product and return it as coefficients, norm of the remainder, and remainder.

        The arguments are those of `Basis.orthogonalize`.

        Returns:
            The coefficients on the first rows followed by the norm of the remainder, on the host,
            and the remainder.
        """
        self.products += 1
        lying = product.to(self.basis.device)
        found, remainder = self.basis.orthogonalize(count, lying, begin=begin)
        numbers = found.cpu().double().numpy()  # the only transfer of the step
        if not np.isfinite(numbers).all():
            raise self._not_finite_error()
        return numbers, remainder

    def _count_kept(self, size: int) -> int:
        """Return how many Ritz vectors of a full basis to keep at a restart."""
        return min(size - 1, self.k + max(1, (size - self.k) // 2))

    def _is_likely_complete(self, chain: Chain, ritz: Ritz) -> bool:
        """Return whether the chance that an eigenvalue further out was missed is small."""
        values = ritz.values[ritz.wanted]
        margin = MARGIN * self.tol * self.scale
        if self.which == "LM":
            bounds = [(sign, float(np.abs(values).min())) for sign in (1, -1)]
        else:
            up, down = self.ends
            bounds = [(1, float(values[:up].min()))] if up else []
            bounds += [(-1, float(-values[up:].max()))] if down else []
        return all(
            chain.log_chance(sign, bound + margin, self.n, ritz.values) <= math.log(CHANCE)
            for sign, bound in bounds
        )

    def _not_finite_error(self) -> NonFiniteError:
        return NonFiniteError(
            f"Product number {self.products} with {self.operator!r} holds NaN or infinity."
        )

    def _check_symmetry(self, gaps: Floats, scale: float) -> None:
        check_symmetry(self.operator, gaps, max(scale, self.largest), self.rounding)

    # -------------------------------------------------------------------------------- algebra

    def _above_tolerance(self, residuals: Floats) -> bool:
        return bool((self._raise_to_rounding(residuals) > self.tol * self.scale).any())

    @property
    def scale(self) -> float:
        """The size of the operator, to which the tolerance is relative."""
        return max(self.largest, self.operator.floor)

    def _raise_to_rounding(self, residuals: Floats) -> Floats:
        """Return residuals from the recurrence, raised to the rounding error of the products."""
        return np.maximum(residuals, ROUNDING * self.eps * self.largest)

    def _solve_projected(self, chain: Chain, beta: float, tied: bool) -> Ritz:
        """Return the Ritz pairs on the span of the held vectors U and the chain V."""
        held = len(self.values)
        coupling = chain.coupling
        whole = np.block([[np.diag(self.values), coupling], [coupling.T, chain.matrix]])
        values, vectors = eigh(whole)
        self.largest = max(self.largest, float(np.abs(values).max()))
        # Rᵀ V is the coupling Uᵀ A V, minus sᵀ for the first vector of the chain.
        found = coupling[:, 1:] if tied else coupling
        gram = self.gram - multiply(found, found.T)
        left = np.einsum("ij,ij->j", vectors[:held], multiply(gram, vectors[:held]))
        tie = beta * vectors[-1]
        residuals = np.abs(tie) + np.sqrt(np.maximum(left, 0))
        return Ritz(values, vectors, residuals, self._select(values), gram, tie)

    def _select(self, values: Floats) -> list[int]:
        return select(values, self.which, self.k, top=self.ends[0])

    def _order_pairs(self, ritz: Ritz) -> list[int]:
        """Return the positions of all pairs: the wanted ones, then from both ends in turn.

        Large values at the far end are kept, since they would otherwise return after each restart
        and cost products.
        """
        rest = sorted(set(range(len(ritz.values))) - set(ritz.wanted))  # ascending
        if self.which != "SA":
            rest.reverse()
        middle = (len(rest) + 1) // 2
        near, far = rest[:middle], rest[middle:][::-1]
        turns = [i for pair in zip(near, far, strict=False) for i in pair]
        return ritz.wanted + turns + near[len(far) :]

    def _hold(self, ritz: Ritz, kept: list[int]) -> None:
        self.basis.rotate(ritz.vectors[:, kept], len(ritz.values))
        self.values = ritz.values[kept]
        self.residuals = ritz.residuals[kept]

    def _lock(self, ritz: Ritz) -> None:
        """Hold the wanted pairs, and as many others as leave room for a search.

        The larger the held space, the sooner a search finds what was missed.
        """
        kept = self._order_pairs(ritz)[: max(self.k, len(self.basis) - self.probe_steps)]
        old = transform_gram(ritz.gram, ritz.vectors[: len(self.values), kept])
        tie = ritz.tie[kept]
        self.gram = bound_sum(old, np.outer(tie, tie), self.k)
        self._hold(ritz, kept)
