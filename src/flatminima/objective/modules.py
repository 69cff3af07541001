"""The user's module: unwrapped, and refused where nothing true can be measured on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..derivatives.torch_private import COMPILED_PREFIX, DROPOUT, compiled_inside
from ..errors import DeviceError, FlatMinimaWarning, ParameterSelectionError, warn

__all__ = ["check_devices", "check_model", "drops", "unwrap", "without_prefix"]

_PREFIXES = (COMPILED_PREFIX, "module.")
_QUANTIZED = (
    "is quantized: its weights are integers, along which no derivative exists; measure the model "
    "as it was before quantization."
)
_SHARDED = (
    "is sharded among processes, for which there are no second derivatives; gather the full model "
    "in one process first."
)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside `torch.compile`, `DataParallel` and `DistributedDataParallel`.

    Compiled code has no second derivative, and the wrappers of data parallelism act in ways
    (replicas, hooks on `.grad`, buffers broadcast) that no evaluation should start.

    Warns:
        FlatMinimaWarning: the wrapper shares the work among several processes, and this one
            sees only its own data.
    """
    while True:
        inner = compiled_inside(model)
        if inner is not None:
            model = inner
        elif isinstance(model, nn.DataParallel):
            model = model.module
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            processes = model.process_group.size()
            if processes > 1:
                warn(
                    f"The model is shared by {processes} processes (DistributedDataParallel); "
                    "the numbers are those of this process's data alone. Give all the data to "
                    "one process for the loss that was trained on.",
                    FlatMinimaWarning,
                )
            model = model.module
        else:
            return model


def without_prefix(name: str) -> str:
    """Return a tensor's name without what `torch.compile` or data parallelism puts before it."""
    found = next((p for p in _PREFIXES if name.startswith(p)), "")
    return name[len(found) :]


def drops(module: nn.Module) -> bool:
    """Whether a module drops anything in training: a dropout layer, or a rate it was given."""
    if isinstance(module, DROPOUT):
        return float(module.p) > 0
    return isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and float(module.dropout) > 0


def check_model(model: nn.Module) -> None:
    """Refuse modules whose tensors are not (yet, or any more) numbers with a derivative.

    Raises:
        ParameterSelectionError: uninitialised, quantized or sharded parameters.
    """
    for name, module in model.named_modules():
        kind = type(module)
        where = f"The module {name!r}" if name else "The model"
        if kind.__module__.startswith("torch.") and ".quantized" in kind.__module__:
            raise ParameterSelectionError(f"{where} ({kind.__name__}) {_QUANTIZED}")
        if kind.__name__ == "FullyShardedDataParallel":
            raise ParameterSelectionError(f"{where} ({kind.__name__}) {_SHARDED}")
    for name, tensor in _tensors(model):
        kind = type(tensor)
        if nn.parameter.is_lazy(tensor):
            raise ParameterSelectionError(
                f"{name!r} is not initialised yet (a lazy module); run the model once on a batch "
                "before measuring it."
            )
        if kind.__name__ == "DTensor":
            raise ParameterSelectionError(f"{name!r} ({kind.__name__}) {_SHARDED}")
        if kind.__module__.split(".")[0] == "torchao" or tensor.is_quantized:
            raise ParameterSelectionError(f"{name!r} ({kind.__name__}) {_QUANTIZED}")


def check_devices(model: nn.Module, device: torch.device) -> None:
    """Refuse a model whose tensors do not all lie on `device`, or hold no numbers.

    Raises:
        DeviceError: on several devices, or on the meta device.
    """
    for name, tensor in _tensors(model):
        if tensor.device.type == "meta":
            raise DeviceError(
                f"{name!r} is on the meta device and holds no numbers; load the weights first, "
                "for instance with model.to_empty(device=...) and load_state_dict."
            )
        if tensor.device != device:
            raise DeviceError(
                f"The model lies on several devices: {name!r} on {tensor.device}, the "
                f"selected parameters on {device}; move it with model.to(...)."
            )


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
