"""Memory that is free, and what PyTorch says where it cannot evaluate a batch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..errors import DeviceMemoryError, FlatMinimaError, GraphError, ShapeError
from .trees import tensors_in

__all__ = ["available_bytes", "explained", "is_out_of_memory"]


_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error says that a device or the host has no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    )


def available_bytes(device: torch.device) -> int:
    """Return memory that is free on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 4 * 2**30


@contextlib.contextmanager
def explained(index: int | None, device: torch.device, data: Any = None) -> Iterator[None]:
    """Turn errors of PyTorch that a user can do something about into the library's own.

    Args:
        index: of the batch in hand, if any.
        device: where it is evaluated.
        data: what the batch holds, when that is known.

    Raises:
        DeviceMemoryError: no memory is left.
        GraphError: the loss reaches into a graph that is not its own.
        ShapeError: input and target differ in length.
    """
    try:
        yield
    except FlatMinimaError:
        raise
    except Exception as error:
        found = _explanation(error, index, device, data)
        if found is None:
            raise
        raise found from error


def _explanation(
    error: Exception, index: int | None, device: torch.device, data: Any
) -> FlatMinimaError | None:
    said = str(error)
    where = "the parameters" if index is None else f"batch {index}"
    if is_out_of_memory(error):
        return DeviceMemoryError(
            f"There is not enough memory on {device} for {where}. Give smaller batches (the "
            "loader's batch_size, or that of Objective), or microbatch='auto', by which batches "
            "are evaluated in as large pieces as fit."
        )
    if "Trying to backward through the graph a second time" in said:
        return GraphError(
            f"The loss of {where} reaches back into a graph that is gone: the model or the loss "
            "keeps tensors with a graph from an earlier forward (a hidden state, a memory bank, "
            "a list of losses). Keep them detached, or start them again in each forward."
        )
    if "nference tensor" in said:
        return GraphError(
            f"The loss of {where} uses tensors made under torch.inference_mode() that are no "
            "parameters or buffers of the model, and they take part in no derivative. Make them "
            "outside of it, under torch.no_grad() for instance."
        )
    lengths = _lengths(data)
    about_shapes = any(word in said.lower() for word in ("size", "shape", "match", "length"))
    if isinstance(error, (RuntimeError, ValueError, IndexError)) and lengths and about_shapes:
        return ShapeError(
            f"Input and target of {where} differ in length ({lengths[0]} and {lengths[1]}), and "
            f"the model or the loss says: {said}"
        )
    return None


def _lengths(data: Any) -> tuple[int, int] | None:
    """Return the lengths of a batch's first two tensors, when they differ."""
    if not (isinstance(data, Mapping) or (isinstance(data, (tuple, list)) and len(data) == 2)):
        return None
    tensors = [t for t in tensors_in(data) if t.dim() > 0][:2]
    if len(tensors) < 2 or tensors[0].shape[0] == tensors[1].shape[0]:
        return None
    return int(tensors[0].shape[0]), int(tensors[1].shape[0])
