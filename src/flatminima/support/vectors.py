"""Vectors of parameters: their layout, checks, and random subspaces."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import (
    ArgumentTypeError,
    DeviceError,
    NonFiniteError,
    ShapeError,
    StateMismatchError,
)
from .randomness import Seed, as_generator

__all__ = [
    "GaussianSubspace",
    "Layout",
    "all_finite",
    "check_vector",
]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The places of named tensors, one after the other, in a vector of length `size`."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensors: dict[str, Tensor] | dict[str, nn.Parameter]) -> Layout:
        """Return the layout of these tensors.

        The dtype of the vector is the widest of theirs, and at least float32.

        Raises:
            DeviceError: the tensors are on several devices.
        """
        devices = {t.device for t in tensors.values()}
        if len(devices) > 1:
            where = {str(d): next(n for n, t in tensors.items() if t.device == d) for d in devices}
            raise DeviceError(
                "The selected parameters are on several devices ("
                + ", ".join(f"{n!r} on {d}" for d, n in sorted(where.items()))
                + "); move the model to one device, or use params= to select those on one device."
            )
        dtype = torch.float32
        for tensor in tensors.values():
            dtype = torch.promote_types(dtype, tensor.dtype)
        return cls(
            names=tuple(tensors),
            shapes=tuple(t.shape for t in tensors.values()),
            dtypes=tuple(t.dtype for t in tensors.values()),
            dtype=dtype,
            device=next(iter(devices)),
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each tensor."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """Length of the vector."""
        return sum(self.sizes)

    def slices(self) -> Iterator[tuple[str, slice]]:
        """Yield each name and its slice of the vector."""
        start = 0
        for name, size in zip(self.names, self.sizes, strict=True):
            yield name, slice(start, start + size)
            start += size

    def pick(self, named: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Return the parameters that belong to this layout, in its order.

        Raises:
            StateMismatchError: one of them is gone, or its shape, dtype or device has changed.
        """
        for name, shape, dtype in zip(self.names, self.shapes, self.dtypes, strict=True):
            now = named.get(name)
            if now is None or (now.shape, now.dtype, now.device) != (shape, dtype, self.device):
                found = "gone" if now is None else f"{tuple(now.shape)}, {now.dtype}, {now.device}"
                raise StateMismatchError(
                    f"The parameter {name!r} was {tuple(shape)}, {dtype}, {self.device} when the "
                    f"Objective was created and is now {found}; create a new Objective."
                )
        return {name: named[name] for name in self.names}

    def mask(self, positions: Iterable[int]) -> Tensor:
        """Return a vector (size,) of ones in the tensors at these positions, zeros elsewhere."""
        out = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        places = [place for _, place in self.slices()]
        for position in positions:
            out[places[position]] = 1
        return out

    def flatten(self, tensors: Iterable[Tensor | None]) -> Tensor:
        """Return a new vector (size,) made of one tensor for each name; None stands for zeros."""
        parts = [
            torch.zeros(math.prod(shape), dtype=self.dtype, device=self.device)
            if tensor is None
            else (tensor if tensor.layout == torch.strided else tensor.to_dense())
            .detach()
            .reshape(-1)
            .to(self.dtype)
            for tensor, shape in zip(tensors, self.shapes, strict=True)
        ]
        return torch.cat(parts)

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """Return the tensors in `vector` (size,): views, or copies where dtypes differ."""
        pieces = self.views(vector)
        return [piece.to(dtype) for piece, dtype in zip(pieces, self.dtypes, strict=True)]

    def views(self, vector: Tensor) -> list[Tensor]:
        """Return views of `vector` (size,) in the shapes of the tensors, in the vector's dtype."""
        pieces = torch.split(vector, list(self.sizes))
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def add(self, total: Tensor, pieces: Sequence[Tensor | None], scale: float) -> None:
        """Add `scale` times the given tensors to the rows of `total`.

        Args:
            total: (rows, size); changed in place.
            pieces: for each row one tensor for each name; None stands for zeros.
            scale: a factor.
        """
        targets = [view for row in total for view in self.views(row)]
        pairs = [
            (target, piece.detach() if piece.layout == torch.strided else piece.to_dense())
            for target, piece in zip(targets, pieces, strict=True)
            if piece is not None
        ]
        if pairs:
            torch._foreach_add_([t for t, _ in pairs], [p for _, p in pairs], alpha=scale)


def all_finite(tensor: Tensor) -> bool:
    """Return whether the tensor holds neither NaN nor infinity."""
    # The sum is cheaper, but can overflow: only then are the elements tested.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def check_vector(
    call: str,
    vector: object,
    *,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    columns: bool = False,
) -> Tensor:
    """Return `vector` in `dtype` after checking its shape, device and values.

    Args:
        call: named in errors.
        vector: a real tensor (size,), or (size, k) with `columns`.
        size: the length of the vector.
        dtype: the dtype to return.
        device: where the vector must be.
        columns: take a matrix whose columns are the vectors.

    Raises:
        ArgumentTypeError: not a real tensor.
        ShapeError: the shape differs.
        DeviceError: the device differs.
        NonFiniteError: the vector holds NaN or infinity.
    """
    wanted = f"({size}, k)" if columns else f"({size},)"
    if not isinstance(vector, Tensor):
        raise ArgumentTypeError(
            f"{call} takes a tensor of shape {wanted}; got {type(vector).__name__}."
        )
    if vector.dim() != (2 if columns else 1) or vector.shape[0] != size:
        raise ShapeError(f"{call} takes shape {wanted}; got {tuple(vector.shape)}.")
    if vector.device != device:
        raise DeviceError(f"{call} works on {device}; the vector is on {vector.device}.")
    if vector.dtype.is_complex:
        raise ArgumentTypeError(f"{call} takes real vectors; got {vector.dtype}.")
    if not all_finite(vector):
        where = int((~torch.isfinite(vector)).reshape(-1).nonzero()[0])
        index = divmod(where, vector.shape[1])[0] if columns else where
        raise NonFiniteError(f"{call} was given a vector with NaN or infinity at index {index}.")
    # A non-contiguous column of a matrix would slow down every operation.
    return vector.detach().to(dtype).contiguous()


class GaussianSubspace:
    """A matrix A ∈ ℝ^{n×p} with independent N(0, 1) entries, stored only if it is small.

    The entries are drawn in float32, a block of rows at a time, each block from its own seed. If
    A does not fit into `budget` bytes, products with A draw the entries again.

    Args:
        size: n.
        dimension: p.
        seed: an int, or a generator from which one is drawn.
        dtype: dtype of the vectors.
        device: device of the vectors.
        budget: bytes that may be used to store A. Default: 2²⁹ (512 MiB).
    """

    BLOCK_ENTRIES = 2**22

    def __init__(
        self,
        size: int,
        dimension: int,
        *,
        seed: Seed,
        dtype: torch.dtype,
        device: torch.device,
        budget: int = 2**29,
    ) -> None:
        self.size, self.dimension, self.dtype, self.device = size, dimension, dtype, device
        generator = as_generator(seed, device)
        draw = torch.randint(2**62, (1,), generator=generator, device=generator.device)
        self._seed = int(draw.item())
        self._rows = max(1, self.BLOCK_ENTRIES // dimension)
        self._kept: list[Tensor] | None = None
        if size * dimension * 4 <= budget:
            self._kept = [block for _, block in self._blocks()]

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        generator = torch.Generator(device=self.device)
        for index, start in enumerate(range(0, self.size, self._rows)):
            rows = slice(start, min(start + self._rows, self.size))
            if self._kept is not None:
                yield rows, self._kept[index]
                continue
            generator.manual_seed(self._seed + index)
            shape = (rows.stop - rows.start, self.dimension)
            yield (
                rows,
                torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32),
            )

    def expand(self, coordinates: Tensor) -> Tensor:
        """Return A z, shape (n,), for `coordinates` z of shape (p,)."""
        z = coordinates.to(device=self.device, dtype=self.dtype)
        out = torch.empty(self.size, dtype=self.dtype, device=self.device)
        for rows, block in self._blocks():
            torch.mv(block.to(self.dtype), z, out=out[rows])
        return out

    def project(self, vector: Tensor) -> Tensor:
        """Return Aᵀ v in float64 on the host, shape (p,), for `vector` v of shape (n,)."""
        total = torch.zeros(self.dimension, dtype=torch.float64)
        for rows, block in self._blocks():
            total += (block.to(self.dtype).T @ vector[rows]).double().cpu()
        return total

    def coordinates(self, vector: Tensor) -> Tensor:
        """Return A⁺ v = (AᵀA)⁻¹ Aᵀ v in float64 on the host, shape (p,), by a p × p solve."""
        gram = torch.zeros(self.dimension, self.dimension, dtype=torch.float64)
        for _, block in self._blocks():
            wide = block.to(torch.float64) if block.device.type != "mps" else block
            gram += (wide.T @ wide).double().cpu()
        solution: Tensor = torch.linalg.solve(gram, self.project(vector))
        return solution
