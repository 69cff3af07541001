"""Paths through positively homogeneous operations: where a layer's scale ends up."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from torch.fx import Graph, Node

from ...derivatives.torch_private import (
    CONVOLUTION_LAYER,
    NORMALIZATION,
    PADDING,
    POOLING,
    has_own_forward,
    parameters_of,
)

__all__ = [
    "JOINS",
    "LAYERS",
    "LINEAR",
    "NORMS",
    "UNKNOWN_CHANNELS",
    "Channels",
    "Paths",
    "Route",
    "Stop",
    "alone",
    "channels_of",
    "is_query",
    "name_of",
]

_UNSEEN = "through which a scale cannot be followed"
UNKNOWN_CHANNELS = "so that its channels cannot be followed (per='layer' does not need them)"

LINEAR = (nn.Linear, CONVOLUTION_LAYER)
NORMS = (NORMALIZATION, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
LAYERS = (*LINEAR, *NORMS)

# What maps αx to α times what it makes of x, for every α > 0, by what it does to the channels.
_MODULES: dict[str, tuple[type[nn.Module], ...]] = {
    "pointwise": (
        *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Identity),
        *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    ),
    "spatial": (
        *POOLING,
        *PADDING,
        *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.Upsample),
    ),
    "flatten": (nn.Flatten,),
    "other": (nn.Unflatten,),
}
_POOLS = ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool")
_NAMES = {
    "pointwise": "relu relu_ leaky_relu leaky_relu_ prelu rrelu dropout dropout1d dropout2d "
    "dropout3d contiguous clone detach",
    "spatial": " ".join(f"{pool}{d}d" for pool in _POOLS for d in (1, 2, 3)),
    "flatten": "flatten",
    "reshape": "view reshape",
    "reduce": "mean sum amax",
    "other": "squeeze unsqueeze permute transpose unflatten",
}
_METHODS = {name: kind for kind, names in _NAMES.items() for name in names.split()}
_FUNCTIONS = {
    getattr(space, name): name
    for space in (nn.functional, torch)
    for name in _METHODS
    if hasattr(space, name)
}
_NOT_HOMOGENEOUS = (
    "tanh sigmoid gelu silu mish relu6 hardtanh hardswish hardsigmoid elu selu celu softplus "
    "softsign tanhshrink softshrink hardshrink threshold logsigmoid softmax log_softmax softmin "
    "alpha_dropout exp log cos sin layer_norm batch_norm group_norm instance_norm"
)
JOINS = dict.fromkeys(("add", "add_", "iadd", "sub", "sub_", "isub"), "added to")
JOINS |= dict.fromkeys(("cat", "concat", "stack"), "concatenated with")
_WHOLE_SHAPES = {("size",), (getattr, "shape")}
_QUERIES = ("size", "dim", "numel", "shape", "ndim", "dtype", "device", "is_cuda")


class Stop(Exception):  # noqa: N818
    """A layer cannot be multiplied; `structural` where the network's shape alone forbids it."""

    def __init__(self, reason: str, structural: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.structural = reason, structural


@dataclasses.dataclass(frozen=True)
class Channels:
    """Along which axis a value has its source's channels; None where an index is not known.

    Once flattened, the features of a channel lie `together`, or a number of channels `apart`.
    """

    count: int
    front: int | None
    back: int | None
    order: Literal["", "together", "apart"] = ""
    features: int = 0

    def spread(self, factors: Tensor) -> Tensor:
        """Return one factor for each feature of the layer that reads the value."""
        times = self.features // self.count
        return factors.repeat(times) if self.order == "apart" else factors.repeat_interleave(times)


@dataclasses.dataclass(frozen=True)
class Route:
    """Where what a layer gives ends up: in layers to divide, in normalisations, or at a stop."""

    sinks: tuple[tuple[str, Channels | None], ...] = ()
    norms: tuple[str, ...] = ()
    stop: str = ""
    structural: bool = False


class Paths:
    """What a traced forward does with what each layer gives."""

    def __init__(self, graph: Graph, modules: dict[str, nn.Module], neurons: bool) -> None:
        self._modules, self._neurons = modules, neurons
        self._calls: dict[str, list[Node]] = {}
        self._order: dict[str, int] = {}
        self._read: set[int] = set()
        for i, node in enumerate(graph.nodes):
            if node.op == "call_module":
                self._calls.setdefault(node.target, []).append(node)
                self._order.setdefault(node.target, i)
            elif node.op == "get_attr" and not all(map(is_query, node.users)):
                self._read.add(id(operator.attrgetter(node.target)(modules[""])))
        tensors = [p for m in modules.values() for p in parameters_of(m).values() if p is not None]
        self._owners = Counter(map(id, tensors))

    def position(self, name: str) -> float:
        """When the layer is called; infinite for one that never is."""
        return self._order.get(name, math.inf)

    def route(self, name: str) -> Route:
        """Return where what the layer gives ends up."""
        try:
            return self._route(name)
        except Stop as stop:
            return Route(stop=stop.reason, structural=stop.structural or self._is_last(name))

    def _is_last(self, name: str) -> bool:
        """Return whether nothing with parameters works on what the layer gives."""
        seen = set(self._calls.get(name, ()))
        stack = list(seen)
        while stack:
            for user in stack.pop().users:
                called = self._modules[str(user.target)] if user.op == "call_module" else nn.ReLU()
                if any(True for _ in called.parameters()):
                    return False
                if any(n.op == "get_attr" for n in user.all_input_nodes):
                    return False
                stack += [user] if user not in seen else []
                seen.add(user)
        return name in self._calls

    def _route(self, name: str) -> Route:
        self._check(name)
        node = self._calls[name][0]
        module = self._modules[name]
        start = channels_of(module, self._feeder(node, module)) if self._neurons else None
        sinks, norms, given = list[tuple[str, Channels | None]](), list[str](), False
        stack, path = [(node, start)], {node}
        while stack:
            node, channels = stack.pop()
            for user in node.users:
                name = str(user.target)
                reader = self._modules[name] if user.op == "call_module" else None
                if user.op == "output":
                    given = True
                elif isinstance(reader, NORMS) and alone(user, node):
                    norms.append(name)
                elif isinstance(reader, LINEAR) and alone(user, node):
                    sinks.append((name, self._sink(name, channels)))
                elif not is_query(user):
                    path.add(user)
                    stack.append((user, self._after(user, node, channels, path)))
        if given:
            reason = "it gives the model's output, in which nothing can be divided"
            raise Stop(reason, structural=not sinks and not norms)
        if norms and sinks:
            raise Stop(f"it feeds {norms[0]!r}, which takes a scale out only up to its eps")
        if not norms and not sinks:
            raise Stop("nothing reads what it gives")
        return Route(tuple(sinks), tuple(norms))

    def _check(self, name: str) -> None:
        """Stop where a layer's weight is not its alone, or works in more than one place."""
        module = self._modules[name]
        weights = [p for p in parameters_of(module).values() if p is not None]
        if parametrize.is_parametrized(module):
            raise Stop("its weight is made by a parametrisation, and is not itself a parameter")
        self._check_forward(name)
        if not type(module).__module__.startswith("torch.nn."):
            raise Stop(f"its class, {type(module).__name__}, is not one of torch.nn")
        if parameters_of(module).get("weight") is None:
            raise Stop("it has no affine parameters")
        if any(self._owners[id(p)] > 1 for p in weights):
            raise Stop("it shares its weight or bias with another module")
        if any(id(p) in self._read for p in weights):
            raise Stop("the forward reads its weight or bias other than by calling it")
        calls = len(self._calls.get(name, ()))
        if calls != 1:
            times = "called more than once" if calls else "not called by itself in the forward"
            raise Stop(f"it is {times}")

    def _check_forward(self, name: str) -> None:
        module = self._modules[name]
        if has_own_forward(module):
            raise Stop(f"{name!r} has a forward hook, which may change what it gives")

    def _sink(self, name: str, channels: Channels | None) -> Channels | None:
        """Return the features of a layer that is to be divided; stops where it cannot be."""
        try:
            self._check(name)
        except Stop as stop:
            raise Stop(f"{name!r}, which reads it, cannot be divided: {stop.reason}") from None
        if channels is None:
            return None
        module: Any = self._modules[name]
        if isinstance(module, nn.Linear):
            features = module.in_features
            fits = channels.back == -1 and features % channels.count == 0
        else:
            features, back = module.in_channels, -1 - len(module.kernel_size)
            fits = channels.front == 1 and channels.back in (None, back)
        if not fits or (features != channels.count and not channels.order):
            raise Stop(f"{name!r} does not read it channel by channel, {UNKNOWN_CHANNELS}")
        return dataclasses.replace(channels, features=features)

    def _kind(self, node: Node) -> str:
        if node.op == "call_module":
            module = self._modules[str(node.target)]
            return next((kind for kind, types in _MODULES.items() if isinstance(module, types)), "")
        known = node.op == "call_method" or node.target in _FUNCTIONS
        return _METHODS.get(name_of(node), "") if known else ""

    def _feeder(self, node: Node, module: Any) -> int | None:
        """Where the layer that feeds a normalisation has its channels, counted from the back."""
        while isinstance(first := _first(node), torch.fx.Node):
            node = first
            if node.op == "call_module":
                fed = self._modules[str(node.target)]
                if isinstance(fed, LINEAR):
                    there = channels_of(fed)
                    return there.back if there.count == module.weight.shape[0] else None
            if self._kind(node) == "flatten" and self._ends(node) == (1, -1):
                return -1
            if self._kind(node) != "pointwise":
                break
        return None

    def _ends(self, node: Node) -> tuple[Any, Any]:
        """Return the first and the last dimension that a flatten merges."""
        if node.op == "call_module":
            module: Any = self._modules[str(node.target)]
            return module.start_dim, module.end_dim
        start, end = (*node.args[1:3], None, None)[:2]
        start = node.kwargs.get("start_dim", 0) if start is None else start
        return start, node.kwargs.get("end_dim", -1) if end is None else end

    def _after(
        self, user: Node, node: Node, channels: Channels | None, path: set[Node]
    ) -> Channels | None:
        """Return the channels behind an operation; stops where it is not positively homogeneous."""
        kind = self._kind(user)
        if not kind or not alone(user, node):
            raise self._refusal(user)
        if user.op == "call_module":
            self._check_forward(str(user.target))
        if channels is None or kind == "pointwise":
            return channels
        name = name_of(user)
        after = None
        if kind == "spatial":
            called = user.op == "call_module"
            last = _digit(type(self._modules[name]).__name__ if called else name) or 1
            after = channels if channels.back is not None and channels.back < -last else None
        elif kind == "flatten":
            after = _flattened(channels, *self._ends(user))
        elif kind == "reshape" and _keeps_batch(user, path):
            after = _flattened(channels, 1, -1)
        elif kind == "reduce":
            after = _reduced(channels, user)
        if after is None:
            raise Stop(f"{name!r} moves or merges dimensions, {UNKNOWN_CHANNELS}")
        return after

    def _refusal(self, user: Node) -> Stop:
        if user.op == "call_module":
            kind = type(self._modules[str(user.target)])
            plain = kind.__module__ == nn.ReLU.__module__ and kind is not nn.MultiheadAttention
            why = "which is not positively homogeneous" if plain else _UNSEEN
            return Stop(f"{user.target!r} is {kind.__name__}, {why}")
        name = name_of(user)
        if name in JOINS and len(user.all_input_nodes) > 1:
            return Stop(f"it is {JOINS[name]} another branch", structural=True)
        plain = name.removesuffix("_") in _NOT_HOMOGENEOUS.split() or name in JOINS
        why = "which is not positively homogeneous" if plain else _UNSEEN
        return Stop(f"it goes through {name}(), {why}")


def channels_of(module: Any, feeder: int | None = None) -> Channels:
    """Where a layer has its output channels; `feeder` tells it of what the input leaves open."""
    if isinstance(module, nn.Linear):
        return Channels(module.out_features, None, -1)
    if isinstance(module, CONVOLUTION_LAYER):
        return Channels(module.out_channels, 1, -1 - len(module.kernel_size))
    count = module.weight.shape[0]
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        if module.weight.ndim != 1:
            raise Stop(f"it normalises over several dimensions, {UNKNOWN_CHANNELS}")
        return Channels(count, None, -1)
    digit, instance = _digit(type(module).__name__), isinstance(module, nn.InstanceNorm1d)
    return Channels(count, 1, feeder if digit < 2 and not instance else -1 - digit)


def _digit(name: str) -> int:
    """Return the dimensions in a name such as MaxPool2d; 0 where there is none."""
    found = re.search(r"(\d)d$", name)
    return int(found[1]) if found else 0


def _flattened(channels: Channels, start: Any, end: Any) -> Channels | None:
    if end == -1 and start == channels.front:
        return dataclasses.replace(channels, back=-1, order=channels.order or "together")
    if end == -1 and channels.back == -1 and channels.order != "together":
        return dataclasses.replace(channels, front=None, order="apart")
    return None


def _reduced(channels: Channels, node: Node) -> Channels | None:
    """Return the channels after a mean, a sum or a maximum over other dimensions that are given."""
    args: tuple[Any, ...] = (*node.args[1:3], None, None)
    dims, keep = args[:2]
    dims = node.kwargs.get("dim") if dims is None else dims
    keep = node.kwargs.get("keepdim", False) if keep is None else keep
    listed: list[Any] = list(dims) if isinstance(dims, (list, tuple)) else [dims]
    front, back = channels.front, channels.back
    if channels.order or back is None or not all(type(d) is int for d in listed) or not listed:
        return None
    if front is None:
        return channels if all(d < back for d in listed) else None
    places = {d % (front - back) for d in listed}
    if front in places:
        return None
    if keep:
        return channels
    before = sum(p < front for p in places)
    return dataclasses.replace(channels, front=front - before, back=back + len(places) - before)


def _keeps_batch(node: Node, path: set[Node]) -> bool:
    """Return whether a view or reshape is that to (x.size(0), -1), of a value on the path."""
    shape: tuple[Any, ...] = node.args[1:] or tuple(node.kwargs.values())
    if len(shape) == 1 and isinstance(shape[0], (list, tuple)):
        shape = tuple(shape[0])
    if len(shape) != 2 or shape[1] != -1 or not isinstance(shape[0], torch.fx.Node):
        return False
    size = shape[0]
    of = _first(size)
    if size.target == "size":
        return of in path and tuple(size.args[1:]) == (0,)
    whole = isinstance(of, torch.fx.Node) and (of.target, *of.args[1:]) in _WHOLE_SHAPES
    return whole and (size.target, size.args[1]) == (operator.getitem, 0) and _first(of) in path


def _first(node: Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")


def alone(user: Node, node: Node) -> bool:
    """Return whether `node` is the first argument, no other, and no dtype asks for other bits."""
    rest = [*user.args[1:], *(v for k, v in user.kwargs.items() if user.args or k != "input")]
    nested = [w for v in rest for w in (v if isinstance(v, (list, tuple)) else [v])]
    return _first(user) is node and not any(v is node or isinstance(v, torch.dtype) for v in nested)


def is_query(node: Node) -> bool:
    """Return whether a node asks a value for its shape or its type, and not for its numbers."""
    if node.op == "call_function":
        return node.target is getattr and node.args[1] in _QUERIES
    return node.op == "call_method" and node.target in _QUERIES


def name_of(node: Node) -> str:
    """Return the name of the function or method that a node calls."""
    target: Any = node.target
    if isinstance(target, str):
        return target
    return _FUNCTIONS.get(target) or str(getattr(target, "__name__", target))
