"""Tensors inside nested data: tuples, lists, mappings, dataclasses and other objects."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import types
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "count_examples",
    "cut",
    "fingerprint",
    "is_record",
    "map_tensors",
    "members",
    "same_tensors",
    "same_values",
    "tensors_in",
    "to_device",
    "walk",
]


def to_device(
    data: Any,
    device: torch.device,
    *,
    duplicate: bool = False,
    move: Callable[[Tensor], Tensor] | None = None,
) -> Any:
    """Return `data` with every tensor on `device`; the user's containers are never changed.

    Nested tuples, named tuples, lists, mappings and dataclasses are followed, and objects that
    have it are moved by `.to(device)`; anything else is returned as it is.

    Args:
        data: a tensor or nested data.
        device: where the tensors go.
        duplicate: also copy tensors that are already on `device`.
        move: replaces `tensor.to(device)`.
    """
    if isinstance(data, Tensor):
        if duplicate or data.is_inference():
            # Tensors from inference mode cannot take part in derivatives; their copies can.
            twin = data.detach().to(device, non_blocking=True, copy=True)
            return twin.requires_grad_(data.requires_grad)
        return data.to(device, non_blocking=True) if move is None else move(data)
    follow = functools.partial(to_device, device=device, duplicate=duplicate, move=move)
    if callable(getattr(data, "to", None)):
        # A copy, since batch objects such as BatchEncoding move themselves in place.
        return (_duplicate(data) if duplicate else copy.copy(data)).to(device)
    if isinstance(data, dict):
        # A copy, since not every dict can be built from its contents (a defaultdict cannot).
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
    if duplicate and isinstance(data, np.ndarray):
        return data.copy()
    if duplicate and next(tensors_in(data), None) is not None:
        return _duplicate(data)
    return data


def map_tensors(data: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a model's output with every tensor replaced by `change(tensor)`.

    Tuples, named tuples, lists, mappings and dataclasses are followed; anything else is returned
    as it is.
    """
    follow = functools.partial(map_tensors, change=change)
    if isinstance(data, Tensor):
        return change(data)
    if isinstance(data, tuple):
        items = [follow(item) for item in data]
        return type(data)(*items) if hasattr(data, "_fields") else tuple(items)
    if isinstance(data, list):
        return [follow(item) for item in data]
    if isinstance(data, MutableMapping):
        twin = copy.copy(data)
        for key, value in data.items():
            twin[key] = follow(value)
        return twin
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        clone = copy.copy(data)
        for f in dataclasses.fields(data):
            object.__setattr__(clone, f.name, follow(getattr(data, f.name)))
        return clone
    return data


def _duplicate(data: Any) -> Any:
    """Return a copy of an object of any class, with copies of its tensors."""
    twins: dict[int, Any] = {
        id(t): t.detach().clone().requires_grad_(t.requires_grad) for t in tensors_in(data)
    }
    try:
        return copy.deepcopy(data, twins)
    except Exception:  # the class may not support deepcopy
        return copy.copy(data)


def count_examples(data: Any) -> int | None:
    """Return how many examples a batch holds: the common length of its tensors.

    Tensors in lists count only if there are no others, since a list may hold one tensor for each
    example.

    Returns:
        The number of examples, or None if the lengths differ.
    """
    lists: list[Any] = []
    lengths = set(_lengths(list(data) if isinstance(data, tuple) else data, lists, top=True))
    if not lengths and lists:
        lengths = {t.shape[0] for t in tensors_in(lists) if t.dim() > 0}
    return int(lengths.pop()) if len(lengths) == 1 else None


def _lengths(data: Any, lists: list[Any], *, top: bool = False) -> Iterator[int]:
    if isinstance(data, (Tensor, np.ndarray)):
        if data.ndim > 0:
            yield data.shape[0]
    elif isinstance(data, list) and not top:
        lists.append(data)
    elif isinstance(data, Mapping):
        for value in data.values():
            yield from _lengths(value, lists)
    elif isinstance(data, (tuple, list)):
        for item in data:
            yield from _lengths(item, lists)
    elif dataclasses.is_dataclass(data) and not isinstance(data, type):
        for field in dataclasses.fields(data):
            yield from _lengths(getattr(data, field.name), lists)
    else:
        yield from (t.shape[0] for t in tensors_in(data) if t.dim() > 0)


def cut(data: Any, begin: int, end: int, length: int, *, top: bool = True) -> Any:
    """Return the examples `begin` to `end` of a batch of `length` examples.

    Tensors are cut along their first dimension, and lists with one item for each example along
    their length. The parts of other lists, and of the batch, are cut one by one.

    Raises:
        ValueError: a part of the batch does not show where its examples are.
    """
    follow = functools.partial(cut, begin=begin, end=end, length=length, top=False)
    if isinstance(data, (Tensor, np.ndarray)):
        if data.ndim == 0:
            return data
        if data.shape[0] != length:
            raise ValueError(f"one of its tensors has length {data.shape[0]} instead of {length}")
        return data[begin:end]
    if isinstance(data, dict):
        mapping = copy.copy(data)
        mapping.update({key: follow(value) for key, value in data.items()})
        return mapping
    if isinstance(data, Mapping):
        return type(data)({key: follow(value) for key, value in data.items()})  # type: ignore[call-arg]
    if isinstance(data, list) and not top:
        parts = any(isinstance(d, (Tensor, np.ndarray)) and d.shape[:1] == (length,) for d in data)
        if len(data) == length and parts:
            raise ValueError(f"one of its lists, of length {length}, may hold examples or parts")
        if len(data) == length:
            return data[begin:end]
        if data and not parts:
            raise ValueError(f"one of its lists has length {len(data)} instead of {length}")
    if type(data) in (tuple, list):
        return type(data)(follow(item) for item in data)
    if isinstance(data, tuple) and not callable(getattr(data, "to", None)):
        return type(data)(*(follow(item) for item in data))
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        clone = copy.copy(data)
        for f in dataclasses.fields(data):
            object.__setattr__(clone, f.name, follow(getattr(data, f.name)))
        return clone
    if next(tensors_in(data), None) is None:
        return data
    raise ValueError(f"a {type(data).__name__} does not show where its examples are")


def same_tensors(first: Any, second: Any) -> bool:
    """Return whether two batches hold equal tensors with equal `requires_grad`."""
    ones, others = list(tensors_in(first)), list(tensors_in(second))
    return len(ones) == len(others) and all(
        a.requires_grad == b.requires_grad and same_values(a, b)
        for a, b in zip(ones, others, strict=True)
    )


def same_values(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors are equal, NaN equal to NaN.

    Sparse and nested tensors, and those on the meta device, are not compared and count as equal.
    """
    dense = first.layout == second.layout == torch.strided and not first.is_nested
    if not dense or first.device.type == "meta" or torch.equal(first, second):
        return True
    if first.shape != second.shape or not first.dtype.is_floating_point:
        return False
    return bool(((first == second) | (first.isnan() & second.isnan())).all())


_ATOMS = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device)
_CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
SEQUENCES = (list, tuple, set, frozenset, collections.deque)


def is_record(value: Any) -> bool:
    """Return whether attributes make up an object: not so for code, tensors, arrays, modules."""
    if isinstance(value, (Tensor, nn.Module, functools.partial, *_CODE)):
        return False
    return hasattr(value, "__dict__")


def members(value: Any, *, attributes: bool = False) -> Iterable[Any] | None:
    """Return what a container or object holds, one level deep, or None if it cannot hold anything.

    For mappings these are the values, for dataclasses the fields, for other objects the attributes.
    Code (functions, classes, Python modules) holds nothing.

    Args:
        value: any object.
        attributes: take the attributes of dataclasses and of mappings that are no dict, too: all
            the state of an object, without calling any method of its class.
    """
    if isinstance(value, (Tensor, np.ndarray, *_ATOMS, *_CODE)):
        return None
    if isinstance(value, (dict, types.MappingProxyType)):
        return value.values()
    if isinstance(value, SEQUENCES):
        return value
    if isinstance(value, functools.partial):
        return (value.func, value.args, value.keywords)
    if isinstance(value, Mapping) and not attributes:
        return value.values()
    own = vars(value) if hasattr(value, "__dict__") else None
    if dataclasses.is_dataclass(value) and not (attributes and own is not None):
        names = (field.name for field in dataclasses.fields(value))
        return [getattr(value, name) for name in names if hasattr(value, name)]
    return None if own is None else own.values()


def walk(
    value: Any, passes_over: Callable[[Any], bool] | None = None, *, attributes: bool = False
) -> Iterator[Any]:
    """Yield an object and everything it holds, depth first and in order.

    Containers and objects are yielded once, tensors and arrays each time they are held. Strings,
    numbers, dtypes, devices and None are left out.

    Args:
        value: any object.
        passes_over: returns true for objects to skip, together with what they hold.
        attributes: as for `members`.
    """
    seen: set[int] = set()
    # Kept alive, since a new object may get the id of a deleted one.
    held: list[Any] = []
    waiting: list[Iterator[Any]] = [iter((value,))]
    while waiting:
        item = next(waiting[-1], waiting)
        if item is waiting:
            waiting.pop()
            continue
        if isinstance(item, _ATOMS) or (passes_over is not None and passes_over(item)):
            continue
        inside = members(item, attributes=attributes)
        if inside is None:
            yield item
        elif id(item) not in seen:
            seen.add(id(item))
            held.append(item)
            yield item
            waiting.append(iter(inside))


def tensors_in(data: Any) -> Iterator[Tensor]:
    """Yield every tensor inside `data`, also inside objects of unknown classes."""
    if isinstance(data, Tensor):
        yield data
        return
    for value in walk(data):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            yield torch.as_tensor(value)


def fingerprint(data: Any) -> int:
    """Return a checksum of every tensor inside `data`."""
    check = 0
    for tensor in tensors_in(data):
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            continue
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
        check = zlib.crc32(_condense(raw), zlib.crc32(head, check))
    return check


LANES = 2**14
"""32-bit words mixed at a time; mixing pays from four rows of this length."""


def _condense(raw: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes | memoryview:
    """Return about 64 KB that depend on every bit of `raw`, which halves the cost of its CRC.

    Each row of words is mixed into the rows before it by invertible steps (an odd factor, a
    shift), so a change of a single word or row always changes the outcome.
    """
    rows = raw.size // (4 * LANES)
    if rows < 4:
        return raw.data
    lanes = np.zeros(LANES, dtype=np.uint32)
    shifted = np.empty_like(lanes)
    for row in raw[: 4 * rows * LANES].view(np.uint32).reshape(rows, LANES):
        np.add(lanes, row, out=lanes)
        np.multiply(lanes, np.uint32(0x9E3779B9), out=lanes)
        np.right_shift(lanes, np.uint32(15), out=shifted)
        np.bitwise_xor(lanes, shifted, out=lanes)
    return lanes.tobytes() + raw[4 * rows * LANES :].tobytes()
