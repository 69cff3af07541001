"""Chains of Lanczos vectors from random vectors, side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import DeviceMemoryError, NonFiniteError
from ...operators.linear import LinearOperator, check_operator
from ...support.checks import check_integer
from ...support.failures import available_bytes
from ...support.progress import progress_bar
from ...support.randomness import Seed, as_generator
from ..eigen.basis import Basis, check_basis_device
from ..eigen.chain import Floats
from ..eigen.result import ROUNDING, EigenResult
from ..eigen.symmetry import check_symmetry
from .outliers import TakenOut, take_out
from .quadrature import Quadrature, Tridiagonal

__all__ = ["gauss_quadrature"]

ADVICE = "Lower steps=, keep them elsewhere with basis_device='cpu', or select fewer parameters."


def gauss_quadrature(
    call: str,
    operator: LinearOperator,
    *,
    probes: int,
    steps: int,
    outliers: int | EigenResult = 0,
    basis_device: torch.device | str | None = None,
    seed: Seed = 0,
    progress: bool = True,
) -> Quadrature:
    """The chains of `spectral_density`, whose arguments these are; `call` is named in errors."""
    check_operator(call, operator)
    n = operator.shape[0]
    check_integer(call, "probes", probes, low=2)
    check_integer(call, "steps", steps, low=1)
    device = operator.device
    if basis_device is not None:
        device = check_basis_device(call, basis_device)
    generator = as_generator(seed, operator.device)
    before = operator.readings
    with operator.session():
        out = take_out(call, operator, outliers, generator, progress)
        atoms, products = out.atoms, out.products
        count = len(atoms)
        steps = min(steps, n - count)
        chains: list[Tridiagonal] = []
        width = _width(operator, count + steps, device)
        scale = float(np.abs(atoms).max()) if count else 0.0
        with progress_bar(
            call, total=probes * steps, unit="product", show=progress and steps > 0
        ) as bar:
            group: list[_Chain] = []
            while steps and len(chains) < probes:
                group.clear()  # before the next ones take their memory
                group += _chains(
                    operator, out, min(width, probes - len(chains)), steps, device, generator
                )
                _advance(operator, group, scale, bar)
                chains += [chain.tridiagonal() for chain in group]
                products += sum(len(chain.diagonal) for chain in group)
    largest = max([scale, *(float(np.abs(chain.rule()[0]).max()) for chain in chains)])
    rounding = ROUNDING * float(torch.finfo(operator.dtype).eps) * largest
    return Quadrature(
        size=n,
        atoms=torch.from_numpy(atoms),
        chains=tuple(chains),
        probes=probes,
        resolution=max(rounding, operator.error, operator.floor),
        products=products,
        readings=operator.readings - before,
        notes=(*operator.notes, *out.notes),
    )


def _width(operator: LinearOperator, rows: int, device: torch.device) -> int:
    """Return how many chains with so many vectors fit into half of the memory, one at least."""
    n = operator.shape[0]
    vector = n * torch.empty(0, dtype=operator.dtype).element_size()
    # Beside its basis, a chain has a vector, its product and the remainders on their way.
    return max(1, available_bytes(device) // 2 // ((rows + 4) * vector))


class _Chain:
    """A Lanczos chain orthogonal to what was taken out, reorthogonalised twice in full."""

    def __init__(
        self,
        operator: LinearOperator,
        out: TakenOut,
        steps: int,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        n = operator.shape[0]
        self.operator, self.held = operator, len(out.atoms)
        self.basis = Basis(operator, self.held + steps, n, device, advice=ADVICE)
        for row in range(self.held):
            self.basis.put(row, out.vectors[row])
        draw = torch.randn(n, generator=generator, device=generator.device, dtype=operator.dtype)
        start = draw.to(device)
        # Twice, so that little of a vector that lies almost in what was taken out remains there.
        for _ in range(2):
            start = start / torch.linalg.vector_norm(start)
            start = self.basis.remainder(self.held, start)[1]
        self.vector = self.basis.put(self.held, start / torch.linalg.vector_norm(start))
        self.steps, self.ended, self.complete = steps, False, False
        self.diagonal: list[float] = []
        self.below: list[float] = []
        self.rest = start
        self.rounding = ROUNDING * float(torch.finfo(operator.dtype).eps)

    def step(self, product: Tensor) -> Tensor:
        """Return heights and norm of the remainder, on the device."""
        count = self.held + len(self.diagonal) + 1
        numbers, self.rest = self.basis.remainder(count, product.to(self.basis.device))
        return numbers

    def take(self, numbers: Floats, scale: float) -> None:
        """Add the step with these numbers, and put the next vector in its place."""
        if not np.isfinite(numbers).all():
            raise NonFiniteError(f"A product with {self.operator!r} holds NaN or infinity.")
        heights, beta = numbers[self.held : -1], float(numbers[-1])
        gaps = heights[:-1].copy()
        if self.below:
            gaps[-1] -= self.below[-1]
        check_symmetry(self.operator, gaps, max(scale, float(np.abs(numbers).max())), self.rounding)
        self.diagonal.append(float(heights[-1]))
        # What lies along the vectors taken out is rounding, which may be all that there is.
        size = max(np.abs(self.diagonal).max(), max(self.below, default=0.0), np.abs(numbers).max())
        done = len(self.diagonal)
        whole = self.held + done == self.operator.shape[0]
        self.complete = whole or bool(beta <= self.rounding * size)
        self.ended = self.complete or done == self.steps
        if not self.ended:
            self.below.append(beta)
            self.vector = self.basis.put(self.held + done, self.rest / beta)

    def tridiagonal(self) -> Tridiagonal:
        return Tridiagonal(np.array(self.diagonal), np.array(self.below), self.complete)


def _advance(operator: LinearOperator, chains: list[_Chain], scale: float, bar: Any) -> None:
    """Take all chains to their ends, side by side."""
    while alive := [chain for chain in chains if not chain.ended]:
        found = operator._products(torch.stack([chain.vector for chain in alive]))
        numbers = [chain.step(row) for chain, row in zip(alive, found, strict=True)]
        # The only transfer of the step.
        for chain, row in zip(alive, torch.stack(numbers).cpu().double(), strict=True):
            chain.take(row.numpy(), scale)
        bar.update(len(alive))


def _chains(
    operator: LinearOperator,
    out: TakenOut,
    count: int,
    steps: int,
    device: torch.device,
    generator: torch.Generator,
) -> list[_Chain]:
    """Up to `count` chains, as many as memory allows, one at least."""
    chains: list[_Chain] = []
    while len(chains) < count:
        state = generator.get_state()
        try:
            chains.append(_Chain(operator, out, steps, device, generator))
        except DeviceMemoryError:
            generator.set_state(state)
            if not chains:
                raise
            break
    return chains
