"""The check that a call left model, data and global state bitwise as it found them."""

import contextlib
import importlib
import random
import signal
import sys
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
import torch.utils.deterministic
from torch import nn
from torch.utils.data import DataLoader

# These add warning filters when they are first loaded, which the calls under test may do.
for _name in ("scipy.optimize", "scipy.sparse.linalg", "torch.fx.experimental.symbolic_shapes"):
    importlib.import_module(_name)

_PLAIN = (str, bytes, int, float, complex, bool, type(None))
# What is looked at by its identity alone: vars() of these is not state, or is endless.
_OPAQUE = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
_CALLED = ("__call__", "__getattr__", "__setattr__", "__delattr__")
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_DEPTH = 3
_DEVICES = ("cpu", "cuda")


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


def bits(result: Any) -> Any:
    """Whatever a call returned, as something that can be compared bitwise."""
    if isinstance(result, torch.Tensor):
        return result.dtype, result.shape, _bytes(result)
    if isinstance(result, np.ndarray):
        return result.dtype.str, result.shape, result.tobytes()
    if isinstance(result, (tuple, list)):
        return [bits(r) for r in result]
    return result


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
        found = []
        for name, fact in self.facts.items():
            now = after.facts.get(name)
            if name in after.facts and type(fact) is type(now) is dict:
                keys = [*fact, *(k for k in now if k not in fact)]
                changed = [k for k in keys if k not in fact or k not in now or fact[k] != now[k]]
                if not changed and list(fact) != list(now):
                    changed = ["order"]
                found += [f"{name}.{key}" for key in changed]
            elif name not in after.facts or fact != now:
                found.append(name)
        return found + [f"{n} (new)" for n in after.facts if n not in self.facts]

    # ------------------------------------------------------------------------- of the process

    def _global_state(self) -> None:
        numpy_state = np.random.get_state()  # noqa: NPY002
        self.facts["random state"] = {
            "of Python": random.getstate(),
            "of NumPy": (numpy_state[0], numpy_state[1].tobytes(), *numpy_state[2:]),
            "of torch": _bytes(torch.get_rng_state()),
        }
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            states = torch.cuda.get_rng_state_all()
            self.facts["random state of CUDA"] = [_bytes(s) for s in states]
        if torch.backends.mps.is_available():
            self.facts["random state of MPS"] = _bytes(torch.mps.get_rng_state())
        self.facts["modes"] = _modes()
        self.facts["backends"] = _backends()
        self.facts["Python"] = {
            "recursion limit": sys.getrecursionlimit(),
            "Ctrl-C": self._id(signal.getsignal(signal.SIGINT)),
            "excepthook": self._id(sys.excepthook),
            "stdout": self._id(sys.stdout),
            "stderr": self._id(sys.stderr),
            "NumPy's errors": np.geterr(),
            "warning filters": self._id(warnings.filters),
            "showwarning": self._id(warnings.showwarning),
        }
        self._contents("warning filters", warnings.filters)
        self.facts["replaced functions"] = {
            "torch._weight_norm": self._id(torch._weight_norm),
            "check_backward_validity": self._id(
                getattr(torch.utils.checkpoint, "check_backward_validity", None)
            ),
        }
        for name, hooks in vars(nn.modules.module).items():
            if name.startswith("_global_"):
                self.facts[name] = self._id(hooks)
                self._contents(name, hooks)

    # ------------------------------------------------------------------------ of what is given

    def _walk(self, path: str, thing: Any) -> None:
        if isinstance(thing, (*_PLAIN, type)):
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
        elif isinstance(thing, _GENERATORS):
            self.facts[f"{path} state"] = _state(thing)
        elif isinstance(thing, nn.Module):
            self._model(path, thing)
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
        # Asking a tensor that is no leaf for its gradient warns.
        gradient = tensor.grad if tensor.is_leaf or tensor.retains_grad else None
        self.facts[path] = {
            "identity": id(tensor),
            "type": type(tensor),
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "device": tensor.device,
            "requires_grad": tensor.requires_grad,
            "graph": self._id(tensor.grad_fn),
            "gradient": self._id(gradient),
            "version": None if tensor.is_inference() else tensor._version,
        }
        if tensor.layout is torch.strided and tensor.device.type != "meta":
            self.facts[f"{path} values"] = (tensor.stride(), tensor.data_ptr(), _bytes(tensor))
        for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks", "__dict__"):
            self._contents(f"{path}.{hooks}", getattr(tensor, hooks))
        if gradient is not None and id(gradient) not in self._seen:
            self._seen.add(id(gradient))
            self._tensor(f"{path}.grad", gradient)

    def _model(self, path: str, model: nn.Module) -> None:
        classes: set[type] = set()
        for name, module in model.named_modules():
            here = f"{path}.{name}" if name else path
            bound = vars(module)
            self._held += bound.values()
            self.facts[f"{here} class"] = self._id(type(module))
            # Hooks, flags, parametrizations, parameters, buffers and submodules are all in here.
            self.facts[here] = {n: id(value) for n, value in bound.items()}
            for attribute, value in bound.items():
                if not isinstance(value, _PLAIN):
                    self._attribute(f"{here}.{attribute}", value)
            classes.update(type(module).__mro__[:-1])
        for kind in classes:
            # Of the others torch.compile replaces some, once for the whole process.
            held = {n: v for n, v in vars(kind).items() if not n.startswith("__") or n in _CALLED}
            self._held += held.values()
            self.facts[f"class {kind.__qualname__}"] = {n: id(v) for n, v in held.items()}

    def _attribute(self, path: str, value: Any, depth: int = 0) -> None:
        """What is behind a module's attribute, whose own identity is known already."""
        if isinstance(value, (nn.Module, *_PLAIN, *_OPAQUE)) or id(value) in self._seen:
            return
        if isinstance(value, torch.Tensor):
            self._seen.add(id(value))
            self._tensor(path, value)
        elif isinstance(value, np.ndarray):
            self.facts[path] = (value.dtype.str, value.shape, value.tobytes())
        elif isinstance(value, _GENERATORS):
            self.facts[f"{path} state"] = _state(value)
        elif depth < _DEPTH:
            items = value if isinstance(value, (Mapping, list, tuple, set, frozenset)) else None
            if items is None:
                items = getattr(value, "__dict__", None)
            if not items:
                return
            self._seen.add(id(value))
            self._held.append(value)
            self._contents(path, items)
            pairs = items.items() if isinstance(items, Mapping) else enumerate(items)
            for key, inner in list(pairs):
                self._attribute(f"{path}[{key!r}]", inner, depth + 1)

    def _contents(self, path: str, container: Any) -> None:
        """The identities of what a mapping, a sequence or a set holds; nothing of an empty one."""
        if not container:
            return
        if isinstance(container, Mapping):
            self._held += container.values()
            self.facts[f"{path} members"] = {k: id(v) for k, v in container.items()}
        elif isinstance(container, Iterable):
            members = list(container)
            self._held += members
            ids = list(map(id, members))
            is_set = isinstance(container, (set, frozenset))
            self.facts[f"{path} members"] = set(ids) if is_set else ids

    def _id(self, thing: Any) -> int:
        self._held.append(thing)
        return id(thing)


def _bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.resolve_neg().resolve_conj().view(torch.uint8).numpy().tobytes()


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return _bytes(generator.get_state())
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return repr(generator.bit_generator.state)
    return repr(generator.get_state(legacy=False))


def _modes() -> dict[str, Any]:
    c = torch._C
    found = {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "anomaly": (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        "forward AD": c._is_fwd_grad_enabled(),
        "multithreaded autograd": c._is_multithreading_enabled(),
        "saved tensor hooks": c._autograd._saved_tensors_hooks_is_enabled(),
        "function modes": c._len_torch_function_stack(),
        "dispatch modes": c._len_torch_dispatch_stack(),
        "functorch level": c._functorch.maybe_current_level(),
        "autocast": [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES],
        "autocast cache": torch.is_autocast_cache_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "deterministic algorithms": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        ),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
    }
    # Loaded late, if at all.
    stance = getattr(sys.modules.get("torch._dynamo.eval_frame"), "_stance", None)
    found["stance of torch.compile"] = getattr(stance, "stance", "default")
    return found


def _backends() -> dict[str, Any]:
    b = torch.backends
    return {
        "cudnn": (
            b.cudnn.enabled,
            b.cudnn.benchmark,
            b.cudnn.deterministic,
            b.cudnn.allow_tf32,
        ),
        "mkldnn": b.mkldnn.enabled,
        "attention": (
            b.cuda.flash_sdp_enabled(),
            b.cuda.mem_efficient_sdp_enabled(),
            b.cuda.math_sdp_enabled(),
            b.cuda.cudnn_sdp_enabled(),
            tuple(torch._C._get_sdp_priority_order()),
        ),
        "mha fast path": b.mha.get_fastpath_enabled(),
        "matmul": (torch.get_float32_matmul_precision(), b.cuda.matmul.allow_tf32),
    }
