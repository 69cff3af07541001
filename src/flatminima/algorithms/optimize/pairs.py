"""The steps and gradient differences that L-BFGS remembers, and the small matrices made of them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Pairs"]

LEAST_CURVATURE = float(torch.finfo(torch.float64).eps)
"""A pair is stored when sᵀy is more than this times the descent that the slope promised."""


class Pairs:
    """B = θI − W M Wᵀ, the matrix of L-BFGS; of its parts only W = [y₁ s₁ y₂ s₂ …] is long.

    The compact form is that of Byrd, Nocedal and Schnabel 1994 (doi:10.1007/BF01582063) and of
    Byrd, Lu, Nocedal and Zhu 1995 (doi:10.1137/0916069), who write W = [Y θS] with the pairs by
    age. Here a pair stays in the slot where it was put, θ is moved into M, and the rows and
    columns of M that belong to no pair are zero. All but W is float64 on the host.

    Attributes:
        columns: (slots, 2, n), the columns of W: y and s of each slot.
        theta: θ.
    """

    def __init__(self, slots: int, size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        """Without a pair, B = I."""
        self.columns = torch.empty(slots, 2, size, dtype=dtype, device=device)
        self.theta = 1.0
        self._middle = _zeros(2 * slots, 2 * slots)
        self._free = _zeros(2 * slots, 2 * slots)
        # sᵢᵀyⱼ, right for all j older than i and for j = i, and sᵢᵀsⱼ.
        self._sy = _zeros(slots, slots)
        self._ss = _zeros(slots, slots)
        self._order: list[int] = []
        self._used = 0

    def __len__(self) -> int:
        """How many pairs there are."""
        return len(self._order)

    @property
    def rows(self) -> Tensor:
        """Wᵀ up to the last slot in use, shape (rows, n)."""
        return self.columns.flatten(0, 1)[: 2 * self._used]

    @property
    def middle(self) -> Tensor:
        """M."""
        return self._middle[: 2 * self._used, : 2 * self._used]

    @property
    def free(self) -> Tensor:
        """W_Fᵀ W_F, the inner products over the free variables."""
        return self._free[: 2 * self._used, : 2 * self._used]

    def forget(self) -> None:
        """Drop every pair."""
        self._order.clear()
        self._used = 0
        self.theta = 1.0

    def open(self) -> int:
        """Return the slot for the next pair; where all are taken, the oldest pair is dropped."""
        empty = set(range(len(self.columns))).difference(self._order)
        slot = min(empty) if empty else self._order.pop(0)
        self._used = max(self._used, slot + 1)
        return slot

    def store(self, slot: int, products: Tensor, yy: float, promised: float) -> bool:
        """Take in the pair that was written to `slot`, if its curvature is positive.

        Args:
            slot: the one that `open` gave.
            products: Wᵀ s, W_Fᵀ y and W_Fᵀ s with the new y and s, shape (rows, 3).
            yy: yᵀ y.
            promised: the descent along s that the slope at its beginning promised.

        Returns:
            False where B has become singular to rounding, so that all pairs must go.
        """
        sy = float(products[2 * slot, 0])
        if sy > LEAST_CURVATURE * promised:
            rows, used = len(products), self._used
            self._sy[slot, :used] = products[0::2, 0]
            self._ss[slot, :used] = self._ss[:used, slot] = products[1::2, 0]
            for row, product in ((2 * slot, products[:, 1]), (2 * slot + 1, products[:, 2])):
                self._free[row, :rows] = self._free[:rows, row] = product
            self._order.append(slot)
            self.theta = yy / sy
        return self._form_middle()

    def _form_middle(self) -> bool:
        """Return M from θ and the inner products; False where it does not exist."""
        order = torch.tensor(self._order, dtype=torch.long)
        sy, ss = self._sy[order][:, order], self._ss[order][:, order]
        lower, diagonal = sy.tril(-1), sy.diagonal()
        scaled = lower / diagonal
        factor, failed = torch.linalg.cholesky_ex(self.theta * ss + scaled @ lower.T)
        if failed:
            return False
        inverse = torch.cholesky_inverse(factor)
        side = self.theta * (inverse @ scaled)
        top = scaled.T @ inverse @ scaled - torch.diag(1 / diagonal)
        inner = torch.cat(
            [torch.cat([top, side.T], dim=1), torch.cat([side, self.theta**2 * inverse], dim=1)]
        )
        place = torch.cat([2 * order, 2 * order + 1])
        self._middle.zero_()
        self._middle[place[:, None], place] = inner
        return True

    def newton_step(self, reduced: Tensor) -> Tensor | None:
        """Return the v of the Newton step −B_F⁻¹ r = (−r + W_F v / θ) / θ over the free variables.

        B_F⁻¹ = I/θ + W_F (M⁻¹ − W_Fᵀ W_F / θ)⁻¹ W_Fᵀ / θ² by Sherman, Morrison and Woodbury. The
        matrix in brackets is indefinite, with one block of each sign, and is factored as such
        (Zhu, Byrd, Lu, Nocedal 1997, doi:10.1145/279232.279236).

        Args:
            reduced: −W_Fᵀ r, (rows,).

        Returns:
            (rows,), or None where the matrix is singular to rounding.
        """
        order = torch.tensor(self._order, dtype=torch.long)
        y, s = 2 * order, 2 * order + 1
        sy, ss = self._sy[order][:, order], self._ss[order][:, order]
        corner = torch.diag(sy.diagonal()) + self._free[y[:, None], y] / self.theta
        side = sy.tril(-1) - self._free[s[:, None], y]
        factor, failed = torch.linalg.cholesky_ex(corner)
        if failed:
            return None
        half = torch.linalg.solve_triangular(factor, side.T, upper=False)
        rest = self.theta * (ss - self._free[s[:, None], s]) + half.T @ half
        other, failed = torch.linalg.cholesky_ex(rest)
        if failed:
            return None
        first, second = reduced[y, None], self.theta * reduced[s, None]
        lifted = torch.linalg.solve_triangular(factor, first, upper=False)
        below = torch.cholesky_solve(second + half.T @ lifted, other)
        above = torch.linalg.solve_triangular(factor.T, half @ below - lifted, upper=True)
        step = torch.zeros_like(reduced)
        step[y], step[s] = above[:, 0], self.theta * below[:, 0]
        return step


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)
