"""The precision that PyTorch computes in, which its settings may make lower than the tensors'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["precision_notes", "resolution", "working_eps"]

SHORT = {"tf32": ("TF32", 2.0**-10), "bf16": ("bfloat16", 2.0**-7)}
"""Types that float32 products may be computed in: PyTorch's name → (name, precision)."""


def precision_notes(model: nn.Module, device: torch.device) -> tuple[str, ...]:
    """Return notes for a result on autocast and on float32 computed in a shorter type.

    The settings of PyTorch are read, never changed. Whether the hardware follows them is unknown.

    Args:
        model: is searched for float32 parameters, convolutions and recurrent layers.
        device: where it computes.

    Returns:
        Sentences; () if neither applies.
    """
    notes = []
    if torch.is_autocast_enabled(device.type):
        name = str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")
        notes.append(f"Computed under autocast, much of it in {name}.")
    found = _short_types(model, device)
    for kind in dict.fromkeys(found.values()):
        operations = [operation for operation, k in found.items() if k == kind]
        notes.append(
            f"float32 {_join(operations)} may be computed in {SHORT[kind][0]}, as "
            "PyTorch's settings allow."
        )
    return tuple(notes)


def _join(names: list[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), names[-1]])


def working_eps(model: nn.Module, device: torch.device) -> float:
    """Return the coarsest precision in which the model may compute, by parameters and settings."""
    types = {p.dtype for p in model.parameters() if p.dtype.is_floating_point}
    if torch.is_autocast_enabled(device.type):
        types.add(torch.get_autocast_dtype(device.type))
    found = [float(torch.finfo(dtype).eps) for dtype in types]
    return max(found + [SHORT[kind][1] for kind in _short_types(model, device).values()])


def _short_types(model: nn.Module, device: torch.device) -> dict[str, str]:
    """Return the short type of each kind of operation that may be computed in one."""
    parameters = list(model.parameters())
    if all(p.dtype != torch.float32 for p in parameters):
        return {}
    b = torch.backends
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (8, 0):
            return {}
        settings = {
            "matrix products": _setting(b.cuda.matmul, lambda: b.cuda.matmul.allow_tf32),
            "convolutions": _setting(b.cudnn, lambda: b.cudnn.allow_tf32, "conv"),
            "recurrent layers": _setting(b.cudnn, lambda: b.cudnn.allow_tf32, "rnn"),
        }
    elif device.type == "cpu":
        # "medium" is the only value of the older setting that affects the CPU.
        older = {"medium": "bf16"}
        settings = {
            "matrix products": _setting(
                b.mkldnn, lambda: older.get(torch.get_float32_matmul_precision()), "matmul"
            ),
            "convolutions": _setting(b.mkldnn, lambda: None, "conv"),
            "recurrent layers": _setting(b.mkldnn, lambda: None, "rnn"),
        }
    else:
        return {}
    present = {
        "matrix products": True,
        # By the shape of the kernels, which also finds convolutions called as functions.
        "convolutions": any(p.dim() > 2 for p in parameters),
        "recurrent layers": any(isinstance(m, nn.RNNBase) for m in model.modules()),
    }
    return {o: kind for o, kind in settings.items() if kind in SHORT and present[o]}


def _setting(backend: Any, older: Callable[[], Any], operation: str = "") -> Any:
    """Return `fp32_precision` of an operation, or `allow_tf32` in releases before 2.9.

    The older setting is only read if the newer is missing: reading it raises once the newer one
    has been set.
    """
    part = getattr(backend, operation, None) if operation else backend
    kind = getattr(part, "fp32_precision", None)
    if kind is None:
        value = older()
        return {True: "tf32", False: None}.get(value, value)
    return kind


def resolution(model: nn.Module, device: torch.device, loss: float) -> float:
    """Return the size up to which a difference of two losses may be rounding."""
    return 8 * working_eps(model, device) * abs(loss)
