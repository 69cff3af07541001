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
from .chain import Chain, Drift, Floats, Ritz, Steps, congruent, eigh, select, sum_bound, times
from .result import ROUNDING, EigenResult
from .symmetry import check_symmetry
from .warm_start import combine_columns, take_over

__all__ = ["LanczosSteps", "Steps"]


CHANCE = 0.01
"""The search for what was missed ends when the chance that it missed something is below this."""

MARGIN = 10.0
"""In tolerances: how far beyond the pairs at hand that chance is computed. Nearer to them a missed
eigenvalue changes the answer by less than this, and is hard to tell from what was found."""

PATIENCE = 3
"""Times as many steps as a search has, for which converged values that still drift are followed."""

RANDOM_SHARE = 0.1
"""Length of the random part of a start vector that is given, relative to the rest."""


class LanczosSteps:
    """The iteration, which asks for its products, so that several can advance together.

    It holds Ritz vectors U with A U = U Λ + R + v sᵀ, where the columns of R are known by an
    upper bound of RᵀR and v is the vector that the chain starts from. A restart is no special
    case: the best Ritz vectors of U and the chain together become U, and the chain goes on from
    its next vector. Neither is the search for missed pairs: its chain starts from a random v,
    and s is zero.

    Args:
        operator: gives type, device, name and error of the products.
        size: n, of the vectors.
        k: number of pairs; for "BE" those at the upper and at the lower end.
        which: as in `lanczos`, and so are the others; `rows` is its basis_size.
        tol: the tolerance.
        limit: on products.
        rows: vectors that are kept.
        seed: of the random start vectors.
        initial: (n, m), its columns where to look first, or None.
        device: of the basis.
        dtype: of the basis.
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
        # What is zero to rounding, relative to the largest Ritz value.
        self.rounding = ROUNDING * self.eps
        if self.basis.narrow:
            self.rounding = max(self.rounding, float(torch.finfo(self.basis.dtype).eps))
        self.initial = initial
        self.values = np.empty(0)
        """Of the held pairs, best first: at least the k wanted ones once they are found."""
        self.gram = np.empty((0, 0))
        """An upper bound of RᵀR."""
        self.residuals = np.empty(0)
        """Of the held pairs: ‖A u − θ u‖ or a bound on it."""
        self.products = 0
        self.worst = math.inf
        """The largest residual at present."""
        self.largest = 0.0
        """Largest |Ritz value| so far, a lower bound of ‖A‖."""
        # Most steps of a search for what the held pairs have missed: more of them the more
        # exact the answer is meant to be.
        self.probe_steps = max(10, math.ceil(-2 * math.log10(tol)))

    def run(self) -> Steps[EigenResult]:
        """Return the whole iteration."""
        probing, certain, checked = False, False, not self.basis.narrow
        start, tie, share = yield from self._first_start()
        chain = Chain(len(self.basis), len(self.values), share)
        while True:
            before = self.values[: self.k]
            ritz, ended, moved = yield from self._chain(start, tie, chain, probing)
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
                # What rounding the basis adds to a residual shows only in a product.
                self.residuals[: self.k] = math.inf
                checked = True
            if self.products >= self.limit:
                break
            late = yield from self._residual_start()
            if late is not None:
                (start, tie), probing, checked = late, False, not self.basis.narrow
            else:
                drawn = None if certain else self._random_start()
                if drawn is None or self.products >= self.limit:
                    certain = drawn is None
                    break
                start, tie, probing = drawn, None, len(self.values) >= self.k
            chain = Chain(len(self.basis), len(self.values))
        return self._result(certain)

    def _result(self, certain: bool) -> EigenResult:
        count = min(self.k, len(self.values))
        values, residuals = self.values[:count], self.residuals[:count]
        outcome = Outcome.PRODUCT_LIMIT
        shown = self._honest(residuals) + self.operator.error
        if certain and count == self.k and not self._late(residuals):
            # Where all is noise, zero is as true as any other value within the residual.
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

    def _first_start(self) -> Steps[tuple[Tensor, Floats | None, float]]:
        """Start, s, and the logarithm of the random part's share in the start."""
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
        drawn = self._random_start()
        assert drawn is not None
        direction = None if given is None else combine_columns(given)
        if direction is None:
            return drawn, None, 0.0
        # A random part is always there: that nothing was missed rests on it.
        start = direction.to(drawn) + RANDOM_SHARE * drawn
        norm = float(torch.linalg.vector_norm(start))
        return start / norm, None, math.log(RANDOM_SHARE / norm)

    def _residual_start(self) -> Steps[tuple[Tensor, Floats] | None]:
        """The residual of a wanted pair whose bound is above the tolerance; None without one."""
        for i in range(min(self.k, len(self.values))):
            if not self._late(self.residuals[i : i + 1]) or self.products >= self.limit:
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
                raise self._not_finite()
            if self._late(self.residuals[i : i + 1]):
                start = self._unit_complement((error / norm).to(self.basis.device))
                if start is not None:
                    # All of this residual is along the start now.
                    self.gram[i] = self.gram[:, i] = 0
                    return start, self.residuals[i] * np.eye(len(self.values))[i]
        return None

    def _random_start(self) -> Tensor | None:
        draw = torch.randn(
            self.n, generator=self.generator, device=self.generator.device, dtype=self.dtype
        ).to(self.basis.device)
        return self._unit_complement(draw / torch.linalg.vector_norm(draw))

    def _unit_complement(self, vector: Tensor) -> Tensor | None:
        """The part orthogonal to the held vectors, of length one; None where there is none."""
        held = len(self.values)
        for _ in range(2):
            vector = self.basis.without(self.basis.heights(held, vector), vector)
        norm = float(torch.linalg.vector_norm(vector))
        return None if norm < 10 * self.eps else vector / norm

    # ----------------------------------------------------------------------------------- chain

    def _chain(
        self, vector: Tensor, tie: Floats | None, chain: Chain, probing: bool
    ) -> Steps[tuple[Ritz, bool, bool]]:
        """Lanczos from `vector`, orthogonal to the held ones, until what is wanted converged.

        It ends early on an invariant space, and at the product limit, which shows in
        the first False; the second bool tells whether the held vectors changed meanwhile.
        """
        chain.single = chain.first and max(self.ends) == 1
        searching, moved, steps, idle = probing or chain.single, False, 0, 0
        drift = Drift()
        while True:
            held = len(self.values)
            count = held + chain.size + 1
            product = yield self.basis.put(count - 1, vector)
            # Symmetry leaves the product of a lone chain a part along its last two vectors only.
            alone = held == 0 and not self.basis.narrow
            numbers, remainder = self._step(count, product, begin=max(0, count - 2) if alone else 0)
            heights, beta = numbers[:-1], float(numbers[-1])
            self._check_symmetry(
                chain.take(heights, beta, tie, self.gram), float(np.abs(heights).max())
            )
            steps += 1
            scale = max(self.largest, beta, float(np.abs(chain.matrix).max()))
            exhausted = held + chain.size == self.n or beta <= self.rounding * scale
            ritz = self._ritz(chain, 0 if exhausted else beta, tie is not None)
            worst = ritz.residuals[ritz.wanted]
            self.worst = float(worst.max())
            # What is left of the held vectors' residuals is not along this chain and will not
            # fall any more: `_residual_start` goes on from there.
            stuck = held > 0 and not self._late(2 * np.abs(ritz.tie[ritz.wanted]))
            done = stuck or not self._late(worst)
            idle += done and len(worst) == self.k
            resting = drift.ended(ritz, self.tol * self.scale)
            ended = exhausted
            if idle and not ended:
                if searching:
                    tired = (steps if probing else idle) >= self.probe_steps
                    ended = tired or self._nothing_missed(chain, ritz)
                else:
                    ended = resting or idle >= PATIENCE * self.probe_steps
            if ended or self.products >= self.limit:
                return ritz, ended, moved
            if held + chain.size == len(self.basis):
                order = self._order(ritz)
                kept = order[: self._kept(len(order))]
                gone = ritz.values[order[len(kept) :]]
                self.gram = congruent(ritz.gram, ritz.vectors[:held, kept])
                self._hold(ritz, kept)
                tie, moved = ritz.tie[kept], True
                chain.restart(len(kept), gone)
            vector = remainder / beta

    def _step(self, count: int, product: Tensor, *, begin: int = 0) -> tuple[Floats, Tensor]:
        """The product's heights over the first rows, its remainder's norm, and the remainder.

        Orthogonal twice; the first time to the rows from `begin` on, if it is so to the others but
        for rounding.
        """
        self.products += 1
        lying = product.to(self.basis.device)
        found, remainder = self.basis.remainder(count, lying, begin=begin)
        numbers = found.cpu().double().numpy()  # the only transfer of the step
        if not np.isfinite(numbers).all():
            raise self._not_finite()
        return numbers, remainder

    def _kept(self, size: int) -> int:
        """Return how many Ritz vectors of a full basis to go on with."""
        return min(size - 1, self.k + max(1, (size - self.k) // 2))

    def _nothing_missed(self, chain: Chain, ritz: Ritz) -> bool:
        """Whether the chance that the chain has not seen an eigenvalue further out is small."""
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

    def _not_finite(self) -> NonFiniteError:
        return NonFiniteError(
            f"Product number {self.products} with {self.operator!r} holds NaN or infinity."
        )

    def _check_symmetry(self, gaps: Floats, scale: float) -> None:
        check_symmetry(self.operator, gaps, max(scale, self.largest), self.rounding)

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

    def _ritz(self, chain: Chain, beta: float, tied: bool) -> Ritz:
        """Rayleigh–Ritz on the held vectors U and the chain V."""
        held = len(self.values)
        coupling = chain.coupling
        whole = np.block([[np.diag(self.values), coupling], [coupling.T, chain.matrix]])
        values, vectors = eigh(whole)
        self.largest = max(self.largest, float(np.abs(values).max()))
        # Rᵀ V is the coupling Uᵀ A V, less sᵀ for the first vector of the chain.
        found = coupling[:, 1:] if tied else coupling
        gram = self.gram - times(found, found.T)
        left = np.einsum("ij,ij->j", vectors[:held], times(gram, vectors[:held]))
        tie = beta * vectors[-1]
        residuals = np.abs(tie) + np.sqrt(np.maximum(left, 0))
        return Ritz(values, vectors, residuals, self._select(values), gram, tie)

    def _select(self, values: Floats) -> list[int]:
        return select(values, self.which, self.k, top=self.ends[0])

    def _order(self, ritz: Ritz) -> list[int]:
        """Return all pairs: those wanted, then from both ends in turn.

        At the far end large values would come up again after every restart, at the cost of
        products; kept, they stay found.
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

        The more of the space is held, the less a search has to see through to what was missed.
        """
        kept = self._order(ritz)[: max(self.k, len(self.basis) - self.probe_steps)]
        old = congruent(ritz.gram, ritz.vectors[: len(self.values), kept])
        tie = ritz.tie[kept]
        self.gram = sum_bound(old, np.outer(tie, tie), self.k)
        self._hold(ritz, kept)
