"""Whatever the user has as data → batches that can be read again and again."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ..errors import (
    ArgumentTypeError,
    DataChangedError,
    DeviceError,
    EmptyDataError,
    FlatMinimaError,
    InvalidArgumentError,
    OneShotDataError,
)
from ..support.checks import check_integer
from ..support.failures import available_bytes, explain_errors
from ..support.progress import progress_bar
from ..support.randomness import preserve_random_state, reseed
from ..support.trees import fingerprint, tensors_in, to_device
from .read_ahead import ReadingAhead

__all__ = ["Batch", "Batches", "located"]

READ_SEED = 2**20
"""Readings are seeded with this plus the batch's number; evaluations with the number alone."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch on the device: its number, what the user's loader gave, and its weight w_b."""

    index: int
    data: Any
    weight: float
    start: int = 0
    """Of a piece of a batch, the number of its first example."""


@contextlib.contextmanager
def located(index: int) -> Iterator[None]:
    """Errors from the user's data, model, loss or metric say in which batch they arose."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "add_note") and not isinstance(error, FlatMinimaError):
            error.add_note(f"This happened in batch {index} of the data.")
        raise


def _as_iterable(data: Any, batch_size: int) -> Iterable[Any]:
    if type(data) is TensorDataset:  # a subclass may do more in __getitem__
        data = tuple(data.tensors)
    if isinstance(data, Tensor | np.ndarray):
        raise ArgumentTypeError(
            "data is a single tensor; give a tuple of tensors (inputs, targets), a list of "
            "batches, a DataLoader or a Dataset."
        )
    if isinstance(data, tuple) and data and all(isinstance(d, Tensor | np.ndarray) for d in data):
        tensors = [torch.as_tensor(d) for d in data]
        if any(t.dim() == 0 for t in tensors):
            raise InvalidArgumentError(
                "The data tuple holds a tensor without dimensions; the first dimension of each "
                "counts the examples."
            )
        lengths = [t.shape[0] for t in tensors]
        if len(set(lengths)) > 1:
            raise InvalidArgumentError(
                "The tensors of the data tuple differ in length: "
                + ", ".join(str(n) for n in lengths)
                + "; the first dimension counts the examples."
            )
        return _TensorBatches(tensors, batch_size)
    if isinstance(data, IterableDataset | DataLoader):
        return data if isinstance(data, DataLoader) else DataLoader(data, batch_size=batch_size)
    if isinstance(data, Dataset) or _is_indexed(data):
        return DataLoader(data, batch_size=batch_size)
    if isinstance(data, Mapping):
        raise ArgumentTypeError(
            "data is one mapping; a single batch goes into a list, data=[batch], and is read by "
            "batch_loss=."
        )
    if isinstance(data, str | bytes) or not hasattr(data, "__iter__"):
        raise ArgumentTypeError(
            f"data is a {type(data).__name__}; give a tuple of tensors, a list of batches, a "
            "DataLoader or a Dataset."
        )
    if isinstance(data, Iterator):
        raise OneShotDataError(
            f"data is a {type(data).__name__}, which can be read only once, and every measure "
            "reads the data many times; give list(data), a DataLoader or a Dataset."
        )
    iterable: Iterable[Any] = data
    return iterable


def _is_indexed(data: Any) -> bool:
    """Return whether `data` behaves as a map-style dataset without being a torch Dataset."""
    if isinstance(data, Mapping | list | tuple | str | bytes):
        return False
    indexed = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return indexed and (not hasattr(data, "__iter__") or hasattr(data, "set_format"))


class _TensorBatches:
    """Tensors of equal length, cut into batches."""

    def __init__(self, tensors: Sequence[Tensor], batch_size: int) -> None:
        self.tensors, self.batch_size = tensors, batch_size

    def __len__(self) -> int:
        return -(-self.tensors[0].shape[0] // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for start in range(0, self.tensors[0].shape[0], self.batch_size):
            yield tuple(t[start : start + self.batch_size] for t in self.tensors)


def _generators(source: Any) -> list[torch.Generator]:
    """Return the generators that a loader and the samplers within it draw from, each once."""
    owners = [source]
    for owner in owners:
        inner = [getattr(owner, name, None) for name in ("sampler", "batch_sampler")]
        owners += [i for i in inner if i is not None and all(i is not o for o in owners)]
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


class Batches:
    """Batches that give the same data at every reading.

    Every reading starts from the same random states (Python's, NumPy's, torch's and those of the
    loader's own generators), so that a shuffling loader deals the same cards each time. What
    still differs, such as augmentation drawn from a private generator, is found by a checksum.

    Args:
        data: what the user gave.
        device: where the batches are wanted.
        weight: `batch -> w_b`, called once for each batch.
        cache: True keeps the batches on the device; False reads them again each time; "auto" keeps
            them when they take at most a quarter of the memory that is free there.
        batch_size: for tuples of tensors and Datasets, which come without one.
        progress: show a bar while the data are read for the first time.
    """

    def __init__(
        self,
        data: Any,
        *,
        device: torch.device,
        weight: Callable[[Any, int], float],
        cache: bool | str = "auto",
        batch_size: int = 1024,
        progress: bool = True,
    ) -> None:
        if not (isinstance(cache, bool) or cache == "auto"):
            raise InvalidArgumentError(
                f"The 'cache' argument of Objective must be True, False or 'auto'; got {cache!r}."
            )
        check_integer("Objective", "batch_size", batch_size, low=1)
        self.device = device
        self._source = _as_iterable(data, batch_size)
        self._generators = _generators(self._source)
        self._generator_states = [g.get_state() for g in self._generators]
        self._cached: list[Batch] | None = None
        self._marks: list[int] = []
        self._weights: list[float] = []
        self.readings = 0
        """How often the user's data have been read."""
        self._first_reading(weight, cache, progress)

    @classmethod
    def holding(cls, batches: Sequence[Batch], device: torch.device) -> Batches:
        """Return batches that lie on the device already, with their weights."""
        own = cls.__new__(cls)
        own.device, own.readings = device, 0
        own._generators, own._generator_states = [], []
        own._cached, own._weights = list(batches), [batch.weight for batch in batches]
        return own

    def __len__(self) -> int:
        return len(self._weights)

    @property
    def cached(self) -> bool:
        """Whether the batches are kept on the device."""
        return self._cached is not None

    @property
    def used(self) -> int:
        """How many batches have a weight above zero."""
        return sum(weight > 0 for weight in self._weights)

    @property
    def total_weight(self) -> float:
        """Σ_b w_b."""
        return float(np.sum(self._weights))

    @contextlib.contextmanager
    def reading(self) -> Iterator[Iterator[Batch]]:
        """The batches with a weight above zero, in order; random states are put back after it.

        Raises:
            DataChangedError: the data, when they are not cached, differ from the first reading.
        """
        with preserve_random_state(), self._replayed_generators():
            yield self._cached_batches() if self._cached is not None else self._checked_batches()

    def _cached_batches(self) -> Iterator[Batch]:
        return (batch for batch in self._cached or [] if batch.weight > 0)

    def _checked_batches(self) -> Iterator[Batch]:
        count = 0
        ahead = ReadingAhead(self.device) if self.device.type == "cuda" else None
        for index, raw in self._raw_batches():
            count = index + 1
            if index >= len(self._marks) or fingerprint(raw) != self._marks[index]:
                raise self._changed(f"batch {index} differs")
            if self._weights[index] <= 0:
                continue
            if ahead is None:
                yield Batch(index, self._moved(raw, index), self._weights[index])
                continue
            moved = self._moved(raw, index, move=ahead.move)
            ahead.arrived()
            yield Batch(index, moved, self._weights[index])
            ahead.launched()
        if count != len(self._marks):
            raise self._changed(f"{count} batches came instead of {len(self._marks)}")

    @contextlib.contextmanager
    def _replayed_generators(self) -> Iterator[None]:
        """The loader's own generators start from where they were first, and are put back."""
        users = [g.get_state() for g in self._generators]
        for generator, state in zip(self._generators, self._generator_states, strict=True):
            generator.set_state(state)
        try:
            yield
        finally:
            for generator, state in zip(self._generators, users, strict=True):
                generator.set_state(state)

    def _raw_batches(self) -> Iterator[tuple[int, Any]]:
        """Yield the user's batches, each drawn under its own seed."""
        self.readings += 1
        reseed(READ_SEED)
        iterator = iter(self._source)
        end = object()
        for index in itertools.count():
            reseed(READ_SEED + index)
            with located(index), explain_errors(index, self.device):
                raw = next(iterator, end)
            if raw is end:
                return
            yield index, raw

    def _first_reading(
        self, weight: Callable[[Any, int], float], cache: bool | str, progress: bool
    ) -> None:
        in_place = isinstance(self._source, Sequence | _TensorBatches)
        budget = available_bytes(self.device) // 4
        kept: list[Batch] | None = [] if cache is not False else None
        held = 0
        total = len(self._source) if in_place else None  # type: ignore[arg-type]
        with (
            torch.inference_mode(False),
            preserve_random_state(),
            self._replayed_generators(),
            progress_bar("reading data", total=total, unit="batch", show=progress) as bar,
        ):
            for index, raw in self._raw_batches():
                # A loader may fill the same tensors for each batch, so what is kept is a copy.
                duplicate = kept is not None and not in_place
                moved = self._moved(raw, index, duplicate=duplicate)
                with located(index), explain_errors(index, self.device):
                    self._weights.append(weight(raw, index))
                if cache is not True:
                    self._marks.append(fingerprint(raw))
                if kept is not None:
                    stays = in_place and all(t.device == self.device for t in tensors_in(raw))
                    held += (
                        0 if stays else sum(t.numel() * t.element_size() for t in tensors_in(raw))
                    )
                    kept.append(Batch(index, moved, self._weights[index]))
                    if cache == "auto" and held > budget:
                        kept = None
                bar.update()
        if not self._weights:
            raise EmptyDataError(
                "The data hold no batch; a DataLoader with drop_last=True drops data shorter "
                "than one batch."
            )
        if self.total_weight <= 0:
            raise EmptyDataError(
                f"All {len(self)} batches have weight zero (every label is ignored, or weight= "
                "returned 0), so there is nothing to average."
            )
        self._cached = kept

    def _moved(
        self,
        raw: Any,
        index: int,
        *,
        duplicate: bool = False,
        move: Callable[[Tensor], Tensor] | None = None,
    ) -> Any:
        try:
            with explain_errors(index, self.device):
                moved = to_device(raw, self.device, duplicate=duplicate, move=move)
                if duplicate and self.device.type == "cuda":
                    # A loader may fill the same pinned memory again for the next batch.
                    torch.cuda.current_stream(self.device).synchronize()
                return moved
        except FlatMinimaError:
            raise
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise DeviceError(
                f"Batch {index} cannot be moved to {self.device}, where the model is: {error}"
            ) from error

    @staticmethod
    def _changed(what: str) -> DataChangedError:
        return DataChangedError(
            f"Reading the data again gave other batches than the first time ({what}): shuffling "
            "or augmentation with its own random state, or persistent worker processes. "
            "Without the same data there is no one objective to measure; switch it off, or keep "
            "the first reading with cache=True."
        )
