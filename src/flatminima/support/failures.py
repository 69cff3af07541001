"""Free memory, and errors of PyTorch turned into errors with advice."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..errors import DeviceMemoryError, FlatMinimaError, GraphError, ShapeError
from .trees import tensors_in

__all__ = ["available_bytes", "explain_errors", "is_out_of_memory"]


_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error means that a device or the host has run out of memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    )


def available_bytes(device: torch.device) -> int:
    """Return the number of free bytes on `device`; 4 GiB on a host that does not report it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 4 * 2**30


@contextlib.contextmanager
def explain_errors(index: int | None, device: torch.device, data: Any = None) -> Iterator[None]:
    """Turn errors of PyTorch that a user can fix into errors of this library.

    Args:
        index: the index of the current batch, or None outside of batches.
        device: where the batch is evaluated.
        data: the contents of the batch, if known.

    Raises:
        DeviceMemoryError: there is not enough memory.
        GraphError: the loss uses a graph from an earlier forward pass, or tensors made in
            inference mode.
        ShapeError: input and target differ in length.
    """
    try:
        yield
    except FlatMinimaError:
        raise
    except Exception as error:
        explained = _explain(error, index, device, data)
        if explained is None:
            raise
        raise explained from error


def _explain(
    error: Exception, index: int | None, device: torch.device, data: Any
) -> FlatMinimaError | None:
    said = str(error)
    where = "the parameters" if index is None else f"batch {index}"
    if is_out_of_memory(error):
        return DeviceMemoryError(
            f"There is not enough memory on {device} for {where}. Use smaller batches (the "
            "batch_size of the loader or of Objective), or microbatch='auto', which evaluates "
            "each batch in pieces as large as fit."
        )
    if "Trying to backward through the graph a second time" in said:
        return GraphError(
            f"The loss of {where} depends on a graph that no longer exists: the model or the loss "
            "keeps tensors with a graph from an earlier forward pass (a hidden state, a memory "
            "bank, a list of losses). Detach them before keeping them, or reset them in each "
            "forward pass."
        )
    if "nference tensor" in said:
        return GraphError(
            f"The loss of {where} uses tensors that were made under torch.inference_mode() and are "
            "not parameters or buffers of the model. Such tensors cannot take part in derivatives. "
            "Create them outside inference mode, for example under torch.no_grad()."
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
    """Return the lengths of the first two tensors of a batch, or None if they are equal."""
    if not (isinstance(data, Mapping) or (isinstance(data, (tuple, list)) and len(data) == 2)):
        return None
    tensors = [t for t in tensors_in(data) if t.dim() > 0][:2]
    if len(tensors) < 2 or tensors[0].shape[0] == tensors[1].shape[0]:
        return None
    return int(tensors[0].shape[0]), int(tensors[1].shape[0])
