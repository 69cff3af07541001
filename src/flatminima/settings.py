"""What a loss depends on beside parameters, buffers and data, to be compared with later."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["memory_of", "settings", "tensor_kind", "tensor_marks"]

LONG = 1000
"""Entries from which a container, or an array, is told by itself and not by what is in it."""

# What every module has, and is compared in other ways or not at all.
_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = tuple(n for n, v in vars(nn.Module()).items() if isinstance(v, dict) and "hooks" in n)
_ATOMS = (str, bytes, bool, int, type(None), torch.dtype, torch.device)


def settings(
    model: nn.Module, criterion: object, device: torch.device, mark: Callable[[Tensor], Hashable]
) -> tuple[Hashable, list[Any]]:
    """The attributes of all modules, plain objects and containers among them followed; autocast.

    Not seen: variables that a function closes over, and what objects of other languages hold.

    Args:
        model: asked for its modules.
        criterion: the loss function, followed if it is a module or a plain object.
        device: whose autocast is asked for.
        mark: what is compared of a tensor.

    Returns:
        What is compared, and the objects that it knows by their identity: to be held, as another
        object might be given that identity otherwise.
    """
    judges = criterion.modules() if isinstance(criterion, nn.Module) else ()
    known: list[Any] = []
    described: list[Hashable] = [
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    ]
    for module in itertools.chain(model.modules(), judges):
        known.append(module)
        own = vars(module)
        described.append(id(module))
        for name in _HOOKS:
            known += own[name].values()
            described.append(tuple(map(id, own[name].values())))
        attributes = {n: v for n, v in own.items() if n not in _OF_MODULES}
        described.append(_described(attributes, mark, known, set()))
    if isinstance(criterion, nn.Module):
        described.append(tuple(mark(b) for b in criterion.buffers()))
    else:
        described.append(_described(criterion, mark, known, set()))
    return tuple(described), known


def _described(
    value: Any, mark: Callable[[Tensor], Hashable], known: list[Any], within: set[int]
) -> Hashable:
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
    inside: Iterable[Any] | None = None
    if isinstance(value, (list, tuple, dict)) and len(value) < LONG:
        inside = itertools.chain(*value.items()) if isinstance(value, dict) else value
    elif not isinstance(value, nn.Module) and not callable(value) and hasattr(value, "__dict__"):
        inside = vars(value).items()
    if inside is None:
        known.append(value)
        return type(value), id(value)
    deeper = within | {id(value)}
    return type(value), tuple(_described(v, mark, known, deeper) for v in inside)


def tensor_kind(tensor: Tensor) -> Hashable:
    """What can be told of a tensor without its values."""
    return tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad


def tensor_marks(tensors: Iterable[Tensor]) -> list[tuple[int, int, tuple[int, ...]]]:
    """Identity, version and memory of tensors: another of these when they have been written to.

    A write through `.data` is not seen.
    """
    return [(id(t), 0 if t.is_inference() else t._version, tuple(memory_of(t))) for t in tensors]


def memory_of(tensor: Tensor) -> dict[int, int]:
    """Address and bytes of the memory that a tensor holds on to; of sparse ones, of their parts."""
    names = {
        torch.sparse_coo: ("_indices", "_values"),
        torch.sparse_csr: ("crow_indices", "col_indices", "values"),
        torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
        torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
        torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
    }.get(tensor.layout, ())
    found: dict[int, int] = {}
    for part in [getattr(tensor.detach(), name)() for name in names] or [tensor]:
        try:
            storage = part.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        except (NotImplementedError, RuntimeError):
            # Tensors without memory of their own that could be asked for.
            found[id(part)] = 0
    return found
