"""Going through long vectors chunk by chunk, and sums over them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["Chunks", "accumulator", "inner_products", "places", "summed"]

CHUNK_PER_THREAD = 2**16
CHUNK = 2**20
"""Entries of a chunk: on a CPU so few that what is computed stays in the cache, elsewhere so
many that launching the kernels does not count."""

PARTS = 16
SHORT = 2**13
"""A vector is cut into so many parts at least, so that the room to compute in is small compared
with it; but a chunk need not be shorter than this."""

GROUP = 64
"""Neighbours that are looked at together where few are looked for."""


class Chunks:
    """The slices of vectors of one length in turn, and room to compute in.

    Attributes:
        length: of a chunk; the last may be shorter.
    """

    def __init__(self, size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        """For vectors of length `size`."""
        length = CHUNK
        if device.type == "cpu":
            length = CHUNK_PER_THREAD * torch.get_num_threads()
        longest = max(SHORT, size // PARTS // GROUP * GROUP)
        self.length = min(size, length, longest)
        self._slices = [slice(a, min(a + self.length, size)) for a in range(0, size, self.length)]
        self._room = torch.empty(4, self.length, dtype=dtype, device=device)

    def __iter__(self) -> Iterator[slice]:
        """The slices."""
        return iter(self._slices)

    def room(self, part: slice) -> Tensor:
        """Four vectors of the length of the slice; what is in them lasts until the next call."""
        return self._room[:, : part.stop - part.start]


def accumulator(device: torch.device) -> torch.dtype:
    """Return the type in which sums are added up on a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def summed(parts: list[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape, as a vector."""
    stack = torch.stack(parts)
    return stack.sum(0, dtype=accumulator(stack.device)).flatten()


def inner_products(rows: Tensor, vectors: Tensor) -> Tensor:
    """Return `rows` @ `vectors`ᵀ for few and long rows of both."""
    # BLAS is slower by far with sixteen rows or more.
    return torch.cat([block @ vectors.T for block in torch.split(rows, 10)])


def places(marks: Tensor) -> Tensor:
    """Return where `marks`, of zeros and ones, is one; fast where that is rare."""
    size = len(marks) // GROUP * GROUP
    groups = marks[:size].view(-1, GROUP).amax(1).nonzero()
    if len(groups) > size // GROUP // 8:
        return marks.nonzero()[:, 0]
    near = (groups * GROUP + torch.arange(GROUP, device=marks.device)).flatten()
    near = torch.cat([near, torch.arange(size, len(marks), device=marks.device)])
    return near[marks.index_select(0, near) != 0]
