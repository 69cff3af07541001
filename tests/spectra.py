"""Matrices on which estimators are judged, as operators that know no more than their products."""

from __future__ import annotations

import torch

import flatminima as fm
from flatminima.support.vectors import Layout
from zoo import matrix_with_spectrum

SIZE = 150


def hidden(matrix: torch.Tensor, layout: Layout | None = None) -> fm.LinearOperator:
    """The matrix, without its diagonal being known; `layout` names its rows."""

    class Hidden(fm.LinearOperator):
        def __init__(self) -> None:
            super().__init__(len(matrix), matrix.dtype, matrix.device)
            self.multiplied = 0
            self.heights: list[int] = []

        @property
        def layout(self) -> Layout | None:
            return layout

        def _products(self, vectors: torch.Tensor) -> torch.Tensor:
            self.multiplied += len(vectors)
            self.heights.append(len(vectors))
            return vectors @ matrix

    return Hidden()


def _spectra() -> dict[str, torch.Tensor]:
    index = torch.arange(1, SIZE + 1).double()
    generator = torch.Generator().manual_seed(5)
    uniform = torch.rand(SIZE, generator=generator, dtype=torch.float64)
    return {
        "decaying": index**-2,
        "exponential": 0.85**index,
        "flat": 1 + uniform,
        "indefinite": torch.linspace(-2, 9, SIZE).double(),
        "heavy-tailed of low rank": torch.where(index <= 70, 1 / uniform, 0),
        "outliers and a bulk": torch.where(index <= 9, 60 - 5 * index, 0.05 * uniform),
    }


MATRICES = {
    name: matrix_with_spectrum(values, 1, torch.float64) for name, values in _spectra().items()
}
MATRICES["dominated by its diagonal"] = (
    torch.diag(torch.arange(1, SIZE + 1).double()) + 0.05 * MATRICES["indefinite"]
)


def low_rank(rank: int, dtype: torch.dtype = torch.float64, size: int = SIZE) -> torch.Tensor:
    """A matrix of this rank with eigenvalues of both signs."""
    values = torch.zeros(size, dtype=dtype)
    values[:rank] = torch.linspace(-1.25, 4, rank, dtype=dtype) if rank > 1 else 4
    return matrix_with_spectrum(values, 2, dtype)


def inside(errors: torch.Tensor, standard_errors: torch.Tensor) -> float:
    """How often the truth lies within two standard errors."""
    return float((errors.abs() <= 2 * standard_errors).double().mean())
