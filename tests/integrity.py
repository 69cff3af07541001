"""The check that a call left model, data and global state bitwise as it found them."""

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@contextlib.contextmanager
def untouched(*things: Any) -> Iterator[None]:
    """Fail when the block changes one of `things`, or the global state, also if it raises.

    Args:
        things: models, tensors, arrays, generators, DataLoaders, Datasets, nested as one likes.
    """
    before = Snapshot(*things)
    try:
        yield
    finally:
        changed = before.differences(Snapshot(*things))
        if changed:
            raise AssertionError("changed by the call: " + ", ".join(changed))


class Snapshot:
    """Everything about `things` and the process that a call could change, as named facts."""

    def __init__(self, *things: Any) -> None:
        self.facts: dict[str, Any] = {}
        # Holding on to what was seen keeps an id from being given to another object.
        self._held: list[Any] = []
        self._seen: set[int] = set()
        self._global_state()
        for number, thing in enumerate(things):
            self._walk(f"{number}", thing)

    def differences(self, after: "Snapshot") -> list[str]:
        names = [n for n in self.facts if n not in after.facts or after.facts[n] != self.facts[n]]
        return names + [f"{n} (new)" for n in after.facts if n not in self.facts]

    def _global_state(self) -> None:
        numpy_state = np.random.get_state()  # noqa: NPY002
        self.facts.update(
            {
                "Python's random state": random.getstate(),
                "NumPy's random state": (
                    numpy_state[0],
                    numpy_state[1].tobytes(),
                    *numpy_state[2:],
                ),
                "torch's random state": torch.get_rng_state().numpy().tobytes(),
                "grad mode": torch.is_grad_enabled(),
                "inference mode": torch.is_inference_mode_enabled(),
                "anomaly mode": torch.is_anomaly_enabled(),
                "default dtype": torch.get_default_dtype(),
                "default device": torch.get_default_device(),
                "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
                "autocast": torch.is_autocast_enabled("cpu"),
                "threads": torch.get_num_threads(),
                "cuDNN": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark),
                "global module hooks": tuple(
                    len(getattr(nn.modules.module, name))
                    for name in ("_global_forward_hooks", "_global_forward_pre_hooks")
                ),
            }
        )
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            states = torch.cuda.get_rng_state_all()
            self.facts["CUDA's random states"] = [s.numpy().tobytes() for s in states]

    def _walk(self, path: str, thing: Any) -> None:
        if isinstance(thing, (str, bytes, int, float, complex, bool, type, type(None))):
            return
        if id(thing) in self._seen:
            self.facts[f"{path} is"] = id(thing)
            return
        self._seen.add(id(thing))
        self._held.append(thing)
        if isinstance(thing, torch.Tensor):
            self._tensor(path, thing)
        elif isinstance(thing, np.ndarray):
            self.facts[path] = (thing.dtype.str, thing.shape, thing.tobytes())
        elif isinstance(thing, torch.Generator):
            self.facts[f"{path} state"] = thing.get_state().numpy().tobytes()
        elif isinstance(thing, nn.Module):
            self._module(path, thing)
        elif isinstance(thing, DataLoader):
            self._walk(f"{path}.dataset", thing.dataset)
            self._walk(f"{path}.generator", thing.generator)
            for owner in ("sampler", "batch_sampler"):
                self._walk(f"{path}.{owner}", getattr(thing, owner, None))
        elif isinstance(thing, Mapping):
            self.facts[f"{path} keys"] = list(thing)
            for key, value in thing.items():
                self._walk(f"{path}[{key!r}]", value)
        elif isinstance(thing, (tuple, list)):
            self.facts[f"{path} length"] = len(thing)
            for number, item in enumerate(thing):
                self._walk(f"{path}[{number}]", item)
        elif hasattr(thing, "__dict__"):
            for name, value in vars(thing).items():
                self._walk(f"{path}.{name}", value)

    def _tensor(self, path: str, tensor: torch.Tensor) -> None:
        self._held.append(tensor)
        self.facts[f"{path} identity"] = id(tensor)
        self.facts[f"{path} kind"] = (
            type(tensor),
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
            tensor.device,
            tensor.requires_grad,
            tensor.is_leaf,
        )
        if tensor.device.type != "meta":
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            self.facts[f"{path} values"] = flat.view(torch.uint8).numpy().tobytes()
            self.facts[f"{path} storage"] = tensor.data_ptr()
        self.facts[f"{path} hooks"] = _members(getattr(tensor, "_backward_hooks", None))
        gradient = tensor.grad if tensor.is_leaf else None
        self.facts[f"{path} has a gradient"] = gradient is not None
        if gradient is not None:
            self._tensor(f"{path}.grad", gradient)

    def _module(self, path: str, model: nn.Module) -> None:
        for name, module in model.named_modules(remove_duplicate=False):
            here = f"{path}.{name}" if name else path
            self.facts[f"{here} identity"] = id(module)
            self.facts[f"{here} training"] = module.training
            self.facts[f"{here} attributes"] = list(vars(module))
            self.facts[f"{here} buffers that are not saved"] = sorted(
                module._non_persistent_buffers_set
            )
            for hooks in _HOOKS:
                self.facts[f"{here} {hooks}"] = _members(getattr(module, hooks))
            for kind in ("_parameters", "_buffers", "_modules"):
                self.facts[f"{here} {kind}"] = list(getattr(module, kind))
        for name, tensor in model.named_parameters(remove_duplicate=False):
            self._tensor(f"{path}.{name}", tensor)
        for name, tensor in model.named_buffers(remove_duplicate=False):
            self._tensor(f"{path}.{name}", tensor)


def _members(hooks: Any) -> list[tuple[int, int]]:
    return [(key, id(hook)) for key, hook in (hooks or {}).items()]
