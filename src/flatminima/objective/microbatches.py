"""Batches in pieces, where they do not fit into memory whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import nn

from ..derivatives.torch_private import BATCH_NORM
from ..errors import DeviceMemoryError, FlatMinimaError, InvalidArgumentError
from ..support.checks import check_integer
from ..support.failures import is_out_of_memory
from ..support.trees import count_examples, cut
from .batches import Batch
from .modules import drops

__all__ = ["Cut", "Microbatch", "Pieces"]

Microbatch = int | Literal["auto"] | None


class Pieces:
    """How batches are cut: not at all, to a given size, or as memory demands.

    A piece's loss is weighted like a batch's, so the pieces of a batch add up to its own loss,
    provided that this is a mean over its examples.

    Args:
        size: as `microbatch` of `Objective`.
        weight: of a piece, given its data and the batch's number.
        is_sum: whether the losses are sums, which add up without weights.
        model: refused if it has batch norm or dropout in training mode.
        mode: as in `Objective`.
    """

    def __init__(
        self,
        size: Microbatch,
        weight: Callable[[Any, int], float],
        *,
        is_sum: bool,
        model: nn.Module,
        mode: str,
    ) -> None:
        if isinstance(size, str) and size != "auto":
            raise InvalidArgumentError(
                "The 'microbatch' argument of Objective must be an integer ≥ 1, 'auto' or None; "
                f"got {size!r}."
            )
        if size is not None and size != "auto":
            size = check_integer("Objective", "microbatch", size, low=1)
        self.auto = size == "auto"
        self.size = None if size is None or size == "auto" else size
        self._weight, self._is_sum = weight, is_sum
        if size is not None:
            _check_modules(model, mode)
        self._to_check = size is not None

    @property
    def whole(self) -> bool:
        """Whether no batch is ever cut."""
        return self.size is None and not self.auto

    def cut(self, batch: Batch) -> Cut:
        """Return the batch, whole or piece by piece, and again in smaller ones after `shrink`."""
        return Cut(self, batch)

    def piece(self, batch: Batch, start: int, end: int, count: int | None) -> Batch:
        """Return examples `start` to `end` of a batch of `count`, with their weight."""
        if count is None:
            raise self.uncuttable(batch, "its tensors differ in length")
        try:
            data = cut(batch.data, start, min(end, count), count)
        except ValueError as error:
            raise self.uncuttable(batch, str(error)) from error
        return Batch(batch.index, data, self._weight(data, batch.index), start)

    def check_mean(
        self, batch: Batch, loss: Callable[[Batch], tuple[float, bool]], tolerance: float
    ) -> None:
        """Once, refuse losses that are no mean over the examples, by trying two of them.

        Args:
            batch: whose first two examples are tried.
            loss: of a piece, and whether computing it drew random numbers.
            tolerance: relative.

        Raises:
            InvalidArgumentError: two pieces together do not have the mean of their losses.
        """
        count = count_examples(batch.data)
        if not self._to_check or count is None or count < 2:
            return
        pair, left, right = (self.piece(batch, a, b, count) for a, b in ((0, 2), (0, 1), (1, 2)))
        if min(pair.weight, left.weight, right.weight) <= 0:
            return
        try:
            found = [loss(piece) for piece in (pair, left, right)]
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:
            if is_out_of_memory(error) and self.auto:
                return
            if is_out_of_memory(error) or isinstance(error, FlatMinimaError):
                raise
            why = f"the model or the loss fails on two examples of it ({error})"
            raise self.uncuttable(batch, why) from error
        values = [value for value, _ in found]
        if any(drew for _, drew in found):
            raise InvalidArgumentError(
                "microbatch= cannot be used here: the model or the loss draws random numbers "
                "(dropout masks in training mode, sampling), which pieces of a batch would draw "
                "otherwise. Use mode='eval', or give smaller batches instead."
            )
        weights = [1.0, 1.0, 1.0] if self._is_sum else [p.weight for p in (pair, left, right)]
        mean = (weights[1] * values[1] + weights[2] * values[2]) / weights[0]
        if math.isfinite(mean) and abs(values[0] - mean) > tolerance * max(map(abs, values)):
            raise InvalidArgumentError(
                "microbatch= cannot be used here: the loss of two examples of batch "
                f"{batch.index} is {values[0]:.6g}, and the mean of their own losses {mean:.6g}. "
                "Either the examples of a batch depend on each other (dropout masks in training "
                "mode, contrastive losses, a first dimension that is not the batch's), or "
                "weight= does not count what the mean runs over. Give smaller batches instead."
            )
        self._to_check = False

    def uncuttable(self, batch: Batch, why: str) -> InvalidArgumentError:
        """Return the error that says why a batch cannot be cut."""
        return InvalidArgumentError(
            f"Batch {batch.index} cannot be cut into pieces for microbatch=: {why}. Give smaller "
            "batches instead."
        )


class Cut:
    """The pieces of one batch in one pass, whose size is shared with what is evaluated later.

    Raises:
        InvalidArgumentError: from the iteration, the batch cannot be cut.
    """

    def __init__(self, pieces: Pieces, batch: Batch) -> None:
        self._pieces, self._batch = pieces, batch
        self._count = count_examples(batch.data)
        self._present: int | None = None
        self._failure: str | None = None

    @property
    def failed(self) -> bool:
        """Whether the piece in hand is going to be cut again."""
        return self._failure is not None

    def __iter__(self) -> Iterator[Batch]:
        pieces, batch, count = self._pieces, self._batch, self._count
        start = 0
        while True:
            size = pieces.size
            whole = size is None or (count is not None and size >= count)
            piece = batch if whole else pieces.piece(batch, start, start + (size or 0), count)
            self._failure = None
            self._present = count if whole else size
            if piece.weight > 0:
                yield piece
            if self.failed:
                if count is None:
                    why = f"its tensors differ in length ({self._failure})"
                    raise pieces.uncuttable(batch, why)
                pieces.size = max(1, (count if whole else size or count) // 2)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            start += size or 0
            if whole or start >= (count or 0):
                return

    def shrink(self, error: Exception) -> bool:
        """Take smaller pieces after an error, if that may help; whether they are taken.

        Raises:
            DeviceMemoryError: not even one example fits into memory.
        """
        if not (self._pieces.auto and is_out_of_memory(error)):
            return False
        if self._count is not None and self._present == 1:
            raise DeviceMemoryError(
                f"One example of batch {self._batch.index} alone needs more memory than there is, "
                "so no smaller piece helps. Select fewer parameters with params=, free memory, or "
                "use another device."
            ) from error
        # Not the error itself, which keeps the graph that is to be given up.
        self._failure = str(error)
        return True


def _check_modules(model: nn.Module, mode: str) -> None:
    for name, module in model.named_modules():
        trains = module.training if mode == "keep" else mode == "train"
        if isinstance(module, BATCH_NORM) and (trains or module.running_mean is None):
            raise InvalidArgumentError(
                f"microbatch= cannot be used here: the batch norm {name!r} works with the "
                "statistics of the whole batch, and pieces of it would have others. Use "
                "mode='eval', or give smaller batches, knowing that they change the loss."
            )
        if trains and drops(module):
            raise InvalidArgumentError(
                f"microbatch= cannot be used here: the dropout of {name!r} draws its mask in "
                "training mode for the whole batch, and pieces of it would have others. Use "
                "mode='eval', or give smaller batches, knowing that they change the masks."
            )
