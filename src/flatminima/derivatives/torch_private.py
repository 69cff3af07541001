"""Everything that this package uses of PyTorch's private parts, and nothing else.

No other file touches a private part of PyTorch. tests/test_torch_private.py has a test for each
name below, which says what broke and what depends on it.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils import parametrize
from torch.nn.utils.stateless import _reparametrize_module
from torch.nn.utils.weight_norm import WeightNorm

__all__ = [
    "BATCH_NORM",
    "BATCH_NORM_BACKWARD",
    "COMPILED_PREFIX",
    "CONVOLUTION",
    "CONVOLUTION_BACKWARD",
    "CONVOLUTION_LAYER",
    "DROPOUT",
    "HOOKS",
    "LOSS",
    "NORMALIZATION",
    "PADDING",
    "POOLING",
    "SAFE_SOFTMAX",
    "SOFTMAX_BACKWARD",
    "TENSOR_DICTS",
    "TRANSPOSED_CONVOLUTION",
    "WEIGHT_NORM",
    "buffers_of",
    "checkpoints_noticed",
    "compiled_inside",
    "dynamo_is_loaded",
    "edge_of",
    "has_backward_hooks",
    "has_equal_sizes",
    "has_own_forward",
    "has_weight_norm",
    "in_transform",
    "is_cpp_function",
    "is_fused_weight_norm",
    "is_once_differentiable",
    "is_pytorchs",
    "is_reentrant_checkpoint",
    "leaf_of",
    "missing_derivative",
    "names_of_weights",
    "no_checkpoint_warning",
    "node_function",
    "parameters_of",
    "parts_of_sparse",
    "readable_function",
    "refuses_saved_tensor_hooks",
    "replaced_tensors",
    "says_written_to",
    "uncached_parametrizations",
    "version",
]

# ---------------------------------------------------------------------------------- operations
# The kernels behind PyTorch's functions: the hand-written derivatives are made of these.

CONVOLUTION = torch.ops.aten.convolution.default
CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default
BATCH_NORM_BACKWARD = torch.ops.aten.native_batch_norm_backward.default
# Gives zeros for rows that are masked as a whole, as attention needs them.
SAFE_SOFTMAX = torch.ops.aten._safe_softmax.default
SOFTMAX_BACKWARD = torch._softmax_backward_data
# What both kinds of weight norm call; its second derivative is wrong.
WEIGHT_NORM = torch._weight_norm

# ------------------------------------------------------------------------------- kinds of module
# PyTorch's own base classes, so that subclasses written by others count too.

BATCH_NORM = nn.modules.batchnorm._BatchNorm
NORMALIZATION = nn.modules.batchnorm._NormBase
CONVOLUTION_LAYER = nn.modules.conv._ConvNd
TRANSPOSED_CONVOLUTION = nn.modules.conv._ConvTransposeNd
DROPOUT = nn.modules.dropout._DropoutNd
POOLING = (
    *(nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd),
    *(nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd),
)
PADDING = (
    *(nn.modules.padding._ReflectionPadNd, nn.modules.padding._ReplicationPadNd),
    nn.modules.padding._CircularPadNd,
)
LOSS = nn.modules.loss._Loss

# ---------------------------------------------------------------------------- insides of modules

# The dictionaries in which every module holds its tensors and submodules.
TENSOR_DICTS = ("_parameters", "_buffers", "_modules")
# The dictionaries in which it holds its hooks.
HOOKS = tuple(n for n, v in vars(nn.Module()).items() if isinstance(v, dict) and "hooks" in n)


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """Return a module's own parameters by name, None included, as they are registered."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """Return a module's own buffers by name, None included; a write to it changes the module."""
    return module._buffers


def has_own_forward(module: nn.Module) -> bool:
    """Return whether hooks, or a forward of the instance, change what calling a module does."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


def has_backward_hooks(module: nn.Module) -> bool:
    """Return whether hooks may change the gradients that a module passes on."""
    return bool(module._backward_hooks)


def names_of_weights(module: nn.RNNBase) -> list[list[str]]:
    """Return the names of a recurrent module's weights, a list for each layer and direction."""
    return module._all_weights


def has_equal_sizes(module: nn.MultiheadAttention) -> bool:
    """Return whether queries, keys and values have one size and so one packed weight."""
    return bool(module._qkv_same_embed_dim)


def has_weight_norm(module: nn.Module) -> bool:
    """Return whether a module is weight-normalised, by a hook or by a parametrization."""
    hooks = module._forward_pre_hooks.values()
    return type(module).__name__ == "_WeightNorm" or any(type(h) is WeightNorm for h in hooks)


def replaced_tensors(
    module: nn.Module, tensors: Mapping[str, Tensor]
) -> contextlib.AbstractContextManager[Any]:
    """Put tensors into a module by name, tied ones in all their places, as functional_call does."""
    found: contextlib.AbstractContextManager[Any] = _reparametrize_module(
        module, dict(tensors), tie_weights=True
    )
    return found


# What `torch.compile` puts before the names of parameters.
COMPILED_PREFIX = "_orig_mod."


def compiled_inside(model: nn.Module) -> nn.Module | None:
    """Return the module inside what `torch.compile` made of it; None for any other module."""
    inner = getattr(model, "_orig_mod", None)
    compiled = type(model).__module__.startswith("torch._dynamo")
    return inner if compiled and isinstance(inner, nn.Module) else None


def is_pytorchs(function: Any, home: Any) -> bool:
    """Return whether a function is the one that PyTorch defines, not a wrapper of another library.

    Args:
        function: what stands under a name of PyTorch now.
        home: the module of PyTorch that defines it.
    """
    # Not __module__, which functools.wraps copies.
    return getattr(function, "__globals__", None) is vars(home)


# --------------------------------------------------------------------------- insides of tensors


def version(tensor: Tensor) -> int:
    """Return a number that grows with each write to a tensor, but for those through `.data`."""
    return tensor._version


def parts_of_sparse(tensor: Tensor) -> list[Tensor]:
    """Return the dense tensors that a sparse tensor consists of; none for a dense one."""
    names: tuple[str, ...] = {
        # The public indices() asks for a coalesced tensor.
        torch.sparse_coo: ("_indices", "_values"),
        torch.sparse_csr: ("crow_indices", "col_indices", "values"),
        torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
        torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
        torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
    }.get(tensor.layout, ())
    return [getattr(tensor.detach(), name)() for name in names]


# ---------------------------------------------------------------------------- nodes of a graph

# Before 2.13 PyTorch crashes when asked for what goes into a node with a result of None.
_EDGES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


def edge_of(gradient: Tensor) -> Any:
    """Return what to differentiate a gradient by: its edge, or itself where that crashes."""
    return get_gradient_edge(gradient) if _EDGES else gradient


def node_function(node: Any) -> type | None:
    """Return the `autograd.Function` class that made a node; None for PyTorch's own operations."""
    return getattr(node, "_forward_cls", None)


def leaf_of(node: Any) -> Tensor | None:
    """Return the leaf into which a node accumulates; None for any other node."""
    return getattr(node, "variable", None)


def is_cpp_function(node: Any) -> bool:
    """Return whether a node was made by an `autograd.Function` written in C++."""
    return bool(node.name().startswith("CppNode"))


def is_fused_weight_norm(node: Any) -> bool:
    """Return whether a node is of weight norm's own kernel, whose second derivative is wrong."""
    return bool(node.name() == "WeightNormInterfaceBackward0")


def is_reentrant_checkpoint(node: Any) -> bool:
    """Return whether a node is of `torch.utils.checkpoint` with `use_reentrant=True`."""
    return bool(node.name() == "CheckpointFunctionBackward")


def is_once_differentiable(function: type) -> bool:
    """Return whether an `autograd.Function` is marked as once_differentiable."""
    backward = getattr(function, "backward", None)
    wrapper = getattr(backward, "__globals__", {}).get("__name__")
    return hasattr(backward, "__wrapped__") and wrapper == "torch.autograd.function"


def readable_function(function: type) -> tuple[str, bool]:
    """Return the name of an `autograd.Function`, and whether PyTorch itself defines it.

    Custom operators are registered in PyTorch's name, but are not PyTorch's.
    """
    own = function.__module__.startswith("torch.") and "_library" not in function.__module__
    return function.__name__.removeprefix("GeneratedBackwardFor_"), own


# -------------------------------------------------------------------------- what errors say

_MISSING = re.compile(
    r"derivative for '?(?P<name>[\w:]+)'? is not implemented|twice.*once_?differentiable"
    r"|(?P<compiled>aot_?autograd does not currently support double backward)",
    re.DOTALL,
)


def missing_derivative(error: Exception) -> str | None:
    """Return the operation that an error says has no second derivative; None for other errors.

    "" stands for a function marked as once_differentiable, which the error does not name.
    """
    found = _MISSING.search(str(error))
    if found is None:
        return None
    return "torch.compile" if found["compiled"] else found["name"] or ""


def refuses_saved_tensor_hooks(error: Exception) -> bool:
    """Return whether a transform of torch.func inside the model allows no saved-tensor hooks."""
    return isinstance(error, RuntimeError) and "saved tensor hooks" in f"{error} {error.__cause__}"


def says_written_to(error: Exception) -> bool:
    """Return whether an error says that a tensor was written to after a graph had saved it."""
    return isinstance(error, RuntimeError) and (
        "modified by an inplace" in f"{error} {error.__cause__}"
    )


# ---------------------------------------------------------------------------- states of PyTorch


def in_transform() -> bool:
    """Return whether a transform of torch.func or forward-mode differentiation is active.

    Neither passes through an `autograd.Function` that has no rule for it.
    """
    level: int = torch.autograd.forward_ad._current_level
    return torch._C._functorch.peek_interpreter_stack() is not None or level >= 0


def dynamo_is_loaded() -> bool:
    """Return whether compiled code may exist: importing the compiler takes a second."""
    return "torch._dynamo" in sys.modules


@contextlib.contextmanager
def uncached_parametrizations() -> Iterator[None]:
    """Turn off `parametrize.cached()`, within which a weight made once would stay as it was."""
    enabled = parametrize._cache_enabled
    parametrize._cache_enabled = 0
    try:
        yield
    finally:
        parametrize._cache_enabled = enabled


@contextlib.contextmanager
def no_checkpoint_warning() -> Iterator[None]:
    """Silence reentrant checkpointing, which warns where no gradients are taken."""
    warn = getattr(torch.utils.checkpoint, "check_backward_validity", None)
    if warn is None:
        yield
        return
    try:
        torch.utils.checkpoint.check_backward_validity = lambda inputs: None  # noqa: ARG005
        yield
    finally:
        torch.utils.checkpoint.check_backward_validity = warn


@contextlib.contextmanager
def checkpoints_noticed(notice: Callable[[], object]) -> Iterator[None]:
    """Call `notice` whenever a part of a model is about to be checkpointed without reentry."""
    own = torch.utils.checkpoint._checkpoint_hook

    class Noticed(own):  # type: ignore[misc, valid-type]
        def __enter__(self) -> Any:
            notice()
            return super().__enter__()

    torch.utils.checkpoint._checkpoint_hook = Noticed  # type: ignore[misc]
    try:
        yield
    finally:
        torch.utils.checkpoint._checkpoint_hook = own  # type: ignore[misc]
