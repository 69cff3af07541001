"""Batches on their way to a CUDA device, while the device computes with the ones before."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["ReadingAhead"]


class ReadingAhead:
    """Copies of host tensors by a separate stream, from pinned memory.

    Kernels are only launched by the host, which comes back for the next batch while the device
    still computes with the present one. It reads that batch in the meantime, in the same thread,
    since a Dataset may draw from the global random states, and copies it without waiting for the
    kernels before, as a copy from memory that is not pinned would.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _copy_stream(device)
        self._computed: torch.cuda.Event | None = None

    def move(self, tensor: Tensor) -> Tensor:
        """Return `tensor` on the device, for kernels launched after `arrived`."""
        plain = type(tensor) is Tensor and tensor.layout == torch.strided and not tensor.is_nested
        if not plain or tensor.device.type != "cpu" or tensor.requires_grad:
            return tensor.to(self._device, non_blocking=True)
        # A DataLoader may have pinned it already.
        source = tensor if tensor.is_pinned() else tensor.pin_memory()
        with torch.cuda.stream(self._stream):
            moved = source.to(self._device, non_blocking=True)
        # Its memory is not given to the next copy before these kernels are done with it.
        moved.record_stream(torch.cuda.current_stream(self._device))
        return moved

    def arrived(self) -> None:
        """Kernels that are launched from here on find the batch on the device."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def launched(self) -> None:
        """Wait, once a batch's kernels are launched, until the ones of the batch before are done.

        The host would otherwise run ahead by any number of batches, all of them on the device. The
        batch's own copy is waited for too: a loader may fill the same pinned memory again.
        """
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self._device))
        if self._computed is not None:
            self._computed.synchronize()
        self._computed = done
        self._stream.synchronize()


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    # One for the process: PyTorch keeps the memory that a stream has freed for that stream alone.
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
