"""Whatever the user has as data → batches that can be read again and again, with their weights."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from .checks import check_integer
from .errors import (
    ArgumentTypeError,
    DataChangedError,
    DeviceError,
    EmptyDataError,
    FlatMinimaError,
    InvalidArgumentError,
    NonFiniteError,
    OneShotDataError,
)
from .progress import progress_bar
from .randomness import preserved_random_state, reseed

__all__ = [
    "Batch",
    "Batches",
    "check_weight",
    "count_terms",
    "example_count",
    "is_sum",
    "located",
    "to_device",
]

READ_SEED = 2**20
"""Readings are seeded with this plus the batch's number; evaluations with the number alone."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch on the device: its number, what the user's loader gave, and its weight w_b."""

    index: int
    data: Any
    weight: float


@contextlib.contextmanager
def located(index: int) -> Iterator[None]:
    """Errors from the user's data, model, loss or metric say in which batch they arose."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "add_note") and not isinstance(error, FlatMinimaError):
            error.add_note(f"This happened in batch {index} of the data.")
        raise


# --------------------------------------------------------------------------- nested structures


def to_device(data: Any, device: torch.device, *, duplicate: bool = False) -> Any:
    """`data` with every tensor on `device`; the user's own containers are never changed.

    Tensors, nested tuples, named tuples, lists, mappings, dataclasses and objects with
    `.to(device)` are followed; anything else passes through. With `duplicate`, tensors that are
    on `device` already are copied.
    """
    if isinstance(data, Tensor):
        if duplicate or data.is_inference():
            # Tensors from inference mode take no part in derivatives, but copies of them do.
            twin = data.detach().to(device, non_blocking=True, copy=True)
            return twin.requires_grad_(data.requires_grad)
        return data.to(device, non_blocking=True)
    follow = functools.partial(to_device, device=device, duplicate=duplicate)
    if callable(getattr(data, "to", None)):
        # Batch objects such as BatchEncoding move themselves in place, hence the copy.
        return copy.copy(data).to(device)
    if isinstance(data, dict):
        # Not built anew: a defaultdict, for one, does not take its contents first.
        mapping = copy.copy(data)
        mapping.update({key: follow(value) for key, value in data.items()})
        return mapping
    if isinstance(data, Mapping):
        return type(data)({key: follow(value) for key, value in data.items()})  # type: ignore[call-arg]
    if isinstance(data, tuple):
        items = [follow(item) for item in data]
        return type(data)(*items) if hasattr(data, "_fields") else tuple(items)
    if isinstance(data, list):
        return [follow(item) for item in data]
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        clone = copy.copy(data)
        for f in dataclasses.fields(data):
            object.__setattr__(clone, f.name, follow(getattr(data, f.name)))
        return clone
    return data


def _tensors(data: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor inside `data`, also inside objects of classes unknown here."""
    seen = set() if seen is None else seen
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, (str, bytes, int, float, bool, type(None))) or id(data) in seen:
        return
    else:
        seen.add(id(data))
        if isinstance(data, np.ndarray):
            if data.dtype.kind in "biuf":
                yield torch.as_tensor(data)
        elif isinstance(data, Mapping):
            for value in data.values():
                yield from _tensors(value, seen)
        elif isinstance(data, (tuple, list)):
            for item in data:
                yield from _tensors(item, seen)
        elif dataclasses.is_dataclass(data) and not isinstance(data, type):
            for field in dataclasses.fields(data):
                yield from _tensors(getattr(data, field.name), seen)
        elif hasattr(data, "__dict__"):
            yield from _tensors(vars(data), seen)


def _fingerprint(data: Any) -> int:
    check = 0
    for tensor in _tensors(data):
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            continue
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
        check = zlib.crc32(raw.numpy().data, zlib.crc32(head, check))
    return check


# ------------------------------------------------------------------------------------- weights


def example_count(data: Any) -> int | None:
    """Number of examples in a batch: the length its tensors share; None when they share none."""
    lengths = {t.shape[0] for t in _tensors(data) if t.dim() > 0}
    return int(lengths.pop()) if len(lengths) == 1 else None


_CLASS_LOSSES: dict[Any, type[nn.Module]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.nll_loss: nn.NLLLoss,
}
_ELEMENT_LOSSES = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.PoissonNLLLoss,
    nn.SoftMarginLoss,
    nn.KLDivLoss,
)
_ELEMENT_FUNCTIONS = (
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.poisson_nll_loss,
    F.soft_margin_loss,
    F.kl_div,
)


def _option(loss_fn: Any, name: str, default: Any) -> Any:
    """An option of a criterion: an attribute of a module, a keyword bound by `partial`."""
    if isinstance(loss_fn, functools.partial):
        return loss_fn.keywords.get(name, _option(loss_fn.func, name, default))
    return getattr(loss_fn, name, default) if isinstance(loss_fn, nn.Module) else default


def _function(loss_fn: Any) -> Any:
    while isinstance(loss_fn, functools.partial):
        loss_fn = loss_fn.func
    return loss_fn


def is_sum(loss_fn: Any) -> bool:
    """Whether the criterion adds up its terms instead of averaging them."""
    return bool(_option(loss_fn, "reduction", "mean") == "sum")


def count_terms(loss_fn: Any, target: Any) -> float | None:
    """The weight w_b: over how many terms the criterion's mean runs for this target.

    Cross-entropy and NLL: the labels that are not `ignore_index`, each counted with its class
    weight. Element-wise criteria (MSE, BCE, …): the elements of the target. Anything else: the
    target's first dimension. None when the target does not tell.
    """
    function = _function(loss_fn)
    tensor = next(_tensors(target), None)
    if tensor is None:
        return None
    class_loss = function in _CLASS_LOSSES if not isinstance(function, nn.Module) else False
    if class_loss or isinstance(function, (nn.CrossEntropyLoss, nn.NLLLoss)):
        if tensor.dtype.is_floating_point:
            return float(tensor.numel() // tensor.shape[1]) if tensor.dim() > 1 else 1.0
        kept = tensor != _option(loss_fn, "ignore_index", -100)
        weight = _option(loss_fn, "weight", None)
        if weight is None:
            return float(kept.sum().item())
        classes = weight.detach().double().cpu()
        return float(classes[tensor[kept].cpu()].sum().item())
    if isinstance(function, _ELEMENT_LOSSES) or function in _ELEMENT_FUNCTIONS:
        if _option(loss_fn, "reduction", "mean") == "batchmean":
            return float(tensor.shape[0])
        return float(tensor.numel())
    return float(tensor.shape[0]) if tensor.dim() > 0 else 1.0


# ------------------------------------------------------------------------------------- sources


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
    """Whether `data` behaves as a map-style dataset without being a torch Dataset."""
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
    """The generators that a loader and the samplers within it draw from, each once."""
    owners = [source]
    for owner in owners:
        inner = [getattr(owner, name, None) for name in ("sampler", "batch_sampler")]
        owners += [i for i in inner if i is not None and all(i is not o for o in owners)]
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 4 * 2**30


class Batches:
    """Batches that give the same data at every reading.

    Every reading starts from the same random states (Python's, NumPy's, torch's and those of the
    loader's own generators), so that a shuffling loader deals the same cards each time. What
    still differs, such as augmentation drawn from a private generator, is found by a checksum.

    Args:
        data: what the user gave.
        device: where the batches are wanted.
        weight: `batch -> w_b`, called once for each batch.
        cache: True keeps the batches on the device; False reads them anew; "auto" keeps them
            when they take at most a quarter of the memory that is free there.
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

    def __len__(self) -> int:
        return len(self._weights)

    @property
    def cached(self) -> bool:
        """Whether the batches are kept on the device."""
        return self._cached is not None

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
        with preserved_random_state(), self._replayed_generators():
            yield self._cached_batches() if self._cached is not None else self._checked_batches()

    def _cached_batches(self) -> Iterator[Batch]:
        return (batch for batch in self._cached or [] if batch.weight > 0)

    def _checked_batches(self) -> Iterator[Batch]:
        count = 0
        for index, raw in self._raw_batches():
            count = index + 1
            if index >= len(self._marks) or _fingerprint(raw) != self._marks[index]:
                raise self._changed(f"batch {index} differs")
            if self._weights[index] > 0:
                yield Batch(index, self._moved(raw, index), self._weights[index])
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
        """The user's batches, each drawn under a seed of its own."""
        self.readings += 1
        reseed(READ_SEED)
        iterator = iter(self._source)
        end = object()
        for index in itertools.count():
            reseed(READ_SEED + index)
            with located(index):
                raw = next(iterator, end)
            if raw is end:
                return
            yield index, raw

    def _first_reading(
        self, weight: Callable[[Any, int], float], cache: bool | str, progress: bool
    ) -> None:
        in_place = isinstance(self._source, Sequence | _TensorBatches)
        budget = _available_bytes(self.device) // 4
        kept: list[Batch] | None = [] if cache is not False else None
        held = 0
        total = len(self._source) if in_place else None  # type: ignore[arg-type]
        with (
            torch.inference_mode(False),
            preserved_random_state(),
            self._replayed_generators(),
            progress_bar("reading data", total=total, unit="batch", show=progress) as bar,
        ):
            for index, raw in self._raw_batches():
                # A loader may fill the same tensors for each batch, so what is kept is a copy.
                duplicate = kept is not None and not in_place
                moved = self._moved(raw, index, duplicate=duplicate)
                with located(index):
                    self._weights.append(weight(raw, index))
                if cache is not True:
                    self._marks.append(_fingerprint(raw))
                if kept is not None:
                    stays = in_place and all(t.device == self.device for t in _tensors(raw))
                    held += 0 if stays else sum(t.numel() * t.element_size() for t in _tensors(raw))
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

    def _moved(self, raw: Any, index: int, *, duplicate: bool = False) -> Any:
        try:
            return to_device(raw, self.device, duplicate=duplicate)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise DeviceError(
                f"Batch {index} cannot be moved to {self.device}, where the model is: {error}"
            ) from error

    @staticmethod
    def _changed(what: str) -> DataChangedError:
        return DataChangedError(
            f"Reading the data again gave other batches than the first time ({what}): shuffling "
            "or augmentation with a random state of its own. Without the same data there is no "
            "one objective to measure; switch it off, or keep the first reading with cache=True."
        )


def check_weight(value: Any, index: int) -> float:
    """A batch's weight as a float ≥ 0."""
    try:
        number = float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(
            f"weight= gave {value!r} for batch {index}; a weight is one number."
        ) from error
    if not np.isfinite(number) or number < 0:
        raise NonFiniteError(
            f"weight= gave {number} for batch {index}; a weight is finite and ≥ 0."
        )
    return number
