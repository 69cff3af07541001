"""Products that contradict the symmetry of their operator."""

from __future__ import annotations

import numpy as np

from ...errors import NotSymmetricError
from ...operators.linear import LinearOperator
from .chain import Floats

__all__ = ["check_symmetry"]


def check_symmetry(operator: LinearOperator, gaps: Floats, scale: float, rounding: float) -> None:
    """Refuse gaps ⟨u, A v⟩ − ⟨A u, v⟩ of unit vectors that rounding does not explain.

    Args:
        operator: A.
        gaps: as many as there are.
        scale: size of the products.
        rounding: of the products, relative to `scale`.

    Raises:
        NotSymmetricError: one of the gaps is too wide.
    """
    gap = float(np.abs(gaps).max()) if len(gaps) else 0.0
    allowed = max(0.05, 10 * rounding) * scale
    if gap > max(allowed, 20 * operator.error, operator.floor):
        raise NotSymmetricError(
            f"{operator!r} is not symmetric: ⟨u, A v⟩ and ⟨A u, v⟩ differ by {gap:.2e} "
            f"for unit vectors where products are of size {scale:.2e}. Lanczos needs a "
            "symmetric operator that stays the same from product to product."
        )
