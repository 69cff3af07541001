"""Tensors inside whatever a batch is: tuples, lists, mappings, dataclasses, objects."""

from __future__ import annotations

import copy
import dataclasses
import functools
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["fingerprint", "tensors_in", "to_device"]


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


def tensors_in(data: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
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
                yield from tensors_in(value, seen)
        elif isinstance(data, (tuple, list)):
            for item in data:
                yield from tensors_in(item, seen)
        elif dataclasses.is_dataclass(data) and not isinstance(data, type):
            for field in dataclasses.fields(data):
                yield from tensors_in(getattr(data, field.name), seen)
        elif hasattr(data, "__dict__"):
            yield from tensors_in(vars(data), seen)


def fingerprint(data: Any) -> int:
    """A checksum of every tensor inside `data`."""
    check = 0
    for tensor in tensors_in(data):
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            continue
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
        check = zlib.crc32(raw.numpy().data, zlib.crc32(head, check))
    return check
