"""A check that the products of an operator agree with its symmetry."""

from __future__ import annotations

import numpy as np

from ...errors import NotSymmetricError
from ...operators.linear import LinearOperator
from .chain import Floats

__all__ = ["check_symmetry"]


def check_symmetry(operator: LinearOperator, gaps: Floats, scale: float, rounding: float) -> None:
    """Raise if a gap ⟨u, A v⟩ − ⟨A u, v⟩ of unit vectors is larger than rounding explains.

    Args:
        operator: A.
        gaps: any number of gaps.
        scale: size of the products.
        rounding: rounding error of the products, relative to `scale`.

    Raises:
        NotSymmetricError: one of the gaps is too large.
    """
    gap = float(np.abs(gaps).max()) if len(gaps) else 0.0
    allowed = max(0.05, 10 * rounding) * scale
    if gap > max(allowed, 20 * operator.error, operator.floor):
        raise NotSymmetricError(
            f"{operator!r} is not symmetric: ⟨u, A v⟩ and ⟨A u, v⟩ differ by {gap:.2e} "
            f"for unit vectors, while the products have size {scale:.2e}. Lanczos needs a "
            "symmetric operator that does not change between products."
        )
