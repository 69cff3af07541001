"""Lanczos chains from random start vectors, run side by side."""

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
from .outliers import Outliers, separate_outliers
from .quadrature import Quadrature, Tridiagonal

__all__ = ["gauss_quadrature"]

ADVICE = "Reduce steps=, store them elsewhere with basis_device='cpu', or select fewer parameters."


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
    """Run the chains of `spectral_density` and return their quadrature.

    The arguments are those of `spectral_density`; `call` is named in errors.
    """
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
        out = separate_outliers(call, operator, outliers, generator, progress)
        atoms, products = out.atoms, out.products
        count = len(atoms)
        steps = min(steps, n - count)
        chains: list[Tridiagonal] = []
        width = _count_fitting(operator, count + steps, device)
        scale = float(np.abs(atoms).max()) if count else 0.0
        with progress_bar(
            call, total=probes * steps, unit="product", show=progress and steps > 0
        ) as bar:
            group: list[_Chain] = []
            while steps and len(chains) < probes:
                group.clear()  # frees memory for the next chains
                group += _start_chains(
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


def _count_fitting(operator: LinearOperator, rows: int, device: torch.device) -> int:
    """Return how many chains of `rows` vectors fit into half of the free memory, at least one."""
    n = operator.shape[0]
    vector = n * torch.empty(0, dtype=operator.dtype).element_size()
    # A chain also needs a vector, its product and two remainders.
    return max(1, available_bytes(device) // 2 // ((rows + 4) * vector))


class _Chain:
    """A Lanczos chain orthogonal to the outliers, with full reorthogonalisation done twice."""

    def __init__(
        self,
        operator: LinearOperator,
        out: Outliers,
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
        # Twice, in case the vector lies almost in the span of the outliers.
        for _ in range(2):
            start = start / torch.linalg.vector_norm(start)
            start = self.basis.orthogonalize(self.held, start)[1]
        self.vector = self.basis.put(self.held, start / torch.linalg.vector_norm(start))
        self.steps, self.ended, self.complete = steps, False, False
        self.diagonal: list[float] = []
        self.below: list[float] = []
        self.rest = start
        self.rounding = ROUNDING * float(torch.finfo(operator.dtype).eps)

    def step(self, product: Tensor) -> Tensor:
        """Return coefficients and norm of the remainder of a product, on the device."""
        count = self.held + len(self.diagonal) + 1
        numbers, self.rest = self.basis.orthogonalize(count, product.to(self.basis.device))
        return numbers

    def take(self, numbers: Floats, scale: float) -> None:
        """Add a step with these coefficients and norm, and store the next vector."""
        if not np.isfinite(numbers).all():
            raise NonFiniteError(f"A product with {self.operator!r} holds NaN or infinity.")
        coefficients, beta = numbers[self.held : -1], float(numbers[-1])
        gaps = coefficients[:-1].copy()
        if self.below:
            gaps[-1] -= self.below[-1]
        check_symmetry(self.operator, gaps, max(scale, float(np.abs(numbers).max())), self.rounding)
        self.diagonal.append(float(coefficients[-1]))
        # Includes the coefficients on the outliers, which are rounding and may be all there is.
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
    """Run all chains to their ends, side by side."""
    while alive := [chain for chain in chains if not chain.ended]:
        found = operator._products(torch.stack([chain.vector for chain in alive]))
        numbers = [chain.step(row) for chain, row in zip(alive, found, strict=True)]
        # One transfer to the host for each step.
        for chain, row in zip(alive, torch.stack(numbers).cpu().double(), strict=True):
            chain.take(row.numpy(), scale)
        bar.update(len(alive))


def _start_chains(
    operator: LinearOperator,
    out: Outliers,
    count: int,
    steps: int,
    device: torch.device,
    generator: torch.Generator,
) -> list[_Chain]:
    """Return up to `count` new chains, as many as memory allows, at least one."""
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
