"""What a loss depends on apart from parameters, buffers and data, for later comparison."""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...derivatives.torch_private import HOOKS, parts_of_sparse, version
from ...support.trees import SEQUENCES, is_record, members

__all__ = ["described", "memory_of", "settings", "tensor_identity", "tensor_marks"]

LONG = 1000
"""Entries from which a container or an array is compared by identity, not by its contents."""

Mark = Callable[[Tensor], Hashable]
"""What is compared of a tensor."""

# What every module has, and is compared in other ways or not at all.
_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}
_ATOMS = (str, bytes, bool, int, type(None), torch.dtype, torch.device)


def settings(
    model: nn.Module, criterion: object, device: torch.device, mark: Mark
) -> tuple[Hashable, list[Any]]:
    """Return all attributes of the modules, tensors of the loss function's own, and autocast.

    Not seen: variables that a function closes over, what objects without attributes in Python
    hold, and changes within containers of `LONG` entries or more.

    Args:
        model: its modules are looked at, not its parameters and buffers.
        criterion: the loss function, followed if it is a module or a plain object.
        device: whose autocast is looked at.
        mark: what is compared of a tensor.

    Returns:
        As of `described`.
    """
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    values: list[Any] = [autocast]
    for module in model.modules():
        values.append(_of_module(module))
    if isinstance(criterion, nn.Module):
        values += map(_of_module, criterion.modules())
        values += [*criterion.parameters(), *criterion.buffers()]
    else:
        values.append(criterion)
    return described(values, mark)


def _of_module(module: nn.Module) -> list[Any]:
    """Return the module itself, its hooks and its attributes."""
    own = vars(module)
    hooks = [hook for name in HOOKS for hook in own[name].values()]
    return [module, hooks, {n: v for n, v in own.items() if n not in _OF_MODULES}]


def described(value: Any, mark: Mark) -> tuple[Hashable, list[Any]]:
    """A value, with all that containers and plain objects in it hold, as something to compare.

    Args:
        value: anything.
        mark: what is compared of a tensor.

    Returns:
        What is compared, and the objects that it knows by their identity, tensors among them: to
        be held on to, as another object might be given that identity otherwise.
    """
    known: list[Any] = []
    return _described(value, mark, known, frozenset()), known


def _described(value: Any, mark: Mark, known: list[Any], within: frozenset[int]) -> Hashable:
    if isinstance(value, _ATOMS):
        return type(value), value
    if isinstance(value, (float, complex)):
        return type(value), repr(value)  # NaN is not equal to itself
    if isinstance(value, Tensor):
        known.append(value)
        return mark(value)
    if isinstance(value, np.ndarray) and value.size < LONG and value.dtype != object:
        return value.dtype.str, value.shape, value.tobytes()
    if id(value) in within:
        return "again"
    inside = members(value, attributes=True) if _is_compared_by_parts(value) else None
    if inside is None:
        known.append(value)
        return type(value), id(value)
    deeper = within | {id(value)}
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(_described(v, mark, known, deeper) for v in inside)
    if isinstance(value, (dict, types.MappingProxyType)):
        keys: Iterable[Any] = value
    else:
        keys = vars(value) if is_record(value) else ()
    parts = itertools.chain(keys, inside)
    return type(value), tuple(_described(v, mark, known, deeper) for v in parts)


def _is_compared_by_parts(value: Any) -> bool:
    """Return whether an object is compared by what it holds, and not by its identity."""
    if isinstance(value, (Mapping, *SEQUENCES)):
        return len(value) < LONG
    if isinstance(value, functools.partial):
        return True
    return is_record(value) and not (
        callable(value) and type(value).__module__.startswith("torch.")
    )


def tensor_identity(tensor: Tensor) -> Hashable:
    """Return which tensor it is, and all but its values."""
    return id(tensor), tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad


def tensor_marks(tensors: Iterable[Tensor]) -> list[tuple[int, int, tuple[int, ...]]]:
    """Identity, version and memory of tensors: another of these when they have been written to.

    A write through `.data` is not seen.
    """
    return [(id(t), 0 if t.is_inference() else version(t), tuple(memory_of(t))) for t in tensors]


def memory_of(tensor: Tensor) -> dict[int, int]:
    """Address and bytes of the memory that a tensor holds on to; of sparse ones, of their parts."""
    found: dict[int, int] = {}
    for part in parts_of_sparse(tensor) or [tensor]:
        try:
            storage = part.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        except (NotImplementedError, RuntimeError):
            # Tensors without memory that can be named.
            found[id(part)] = 0
    return found
