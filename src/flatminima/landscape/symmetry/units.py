"""Hidden units that can be put in another order: every tensor that follows a layer's."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...derivatives.torch_private import buffers_of, parameters_of
from ...errors import InvalidArgumentError
from .homogeneous import (
    JOINS,
    LINEAR,
    NORMS,
    UNKNOWN_CHANNELS,
    Channels,
    Paths,
    Stop,
    alone,
    channels_of,
    is_query,
    name_of,
)
from .rescaling import first_line, trace_graph

if TYPE_CHECKING:
    from torch.fx import Graph, Node

__all__ = ["Place", "copied", "unit_groups"]

_TAKES = (
    "It takes chains of linear layers and plain convolutions, with normalisations, elementwise "
    "activations, pooling and flattening between them."
)
_MODULES = (
    *(nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.Mish, nn.ReLU6, nn.Hardtanh, nn.Hardswish),
    *(nn.Hardsigmoid, nn.ELU, nn.SELU, nn.CELU, nn.Softplus, nn.Softsign, nn.Tanhshrink),
    *(nn.Softshrink, nn.Hardshrink, nn.Threshold, nn.LogSigmoid, nn.AlphaDropout),
    nn.FeatureAlphaDropout,
)
_NAMES = (
    "tanh sigmoid gelu silu mish relu6 hardtanh hardswish hardsigmoid elu selu celu softplus "
    "softsign tanhshrink softshrink hardshrink threshold logsigmoid alpha_dropout "
    "feature_alpha_dropout exp expm1 log log1p sqrt rsqrt square abs neg sin cos tan atan asinh "
    "erf sign clamp clip clamp_min clamp_max pow add sub mul div truediv float double half "
    "bfloat16"
)
_PRODUCTS = (
    *("linear", "bilinear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv1d"),
    *("conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    "scaled_dot_product_attention",
)
_KNOWN = (*LINEAR, *NORMS, nn.PReLU)


@dataclasses.dataclass(frozen=True)
class Place:
    """One axis of a tensor that follows the order of a layer's units."""

    tensor: str
    axis: int
    channels: Channels

    def permuted(self, tensor: Tensor, order: Tensor) -> Tensor:
        """Return the tensor with the units in that order."""
        times = self.channels.features // self.channels.count
        if self.channels.order == "apart":
            index = torch.arange(times)[:, None] * self.channels.count + order
        else:
            index = order[:, None] * times + torch.arange(times)
        return tensor.index_select(self.axis, index.reshape(-1).to(tensor.device))

    def rows(self, tensor: Tensor) -> Tensor:
        """Return what belongs to each unit, as a row."""
        front = tensor.movedim(self.axis, 0)
        count, times = self.channels.count, self.channels.features // self.channels.count
        if self.channels.order == "apart":
            return front.reshape(times, count, -1).transpose(0, 1).reshape(count, -1)
        return front.reshape(count, -1)


def unit_groups(call: str, model: nn.Module) -> dict[str, tuple[Place, ...]]:
    """For each layer with hidden units, in the order of calls, every axis that follows them.

    The layer's own weight comes first.

    Raises:
        InvalidArgumentError: there are none, or they cannot be followed; it says where.
    """
    scratch = copied(call, model)  # a forward may change what it finds on the model
    modules = dict(scratch.named_modules())
    found = []
    for training in (False, True):
        for module in modules.values():
            module.training = training
        graph = _graph(call, scratch, training)
        found.append(dict(_Units(graph, modules).groups(call)))
    if found[0] != found[1]:
        raise InvalidArgumentError(
            f"{call} cannot follow the units of {type(model).__name__}: its forward goes other "
            f"ways in training than in evaluation. {_TAKES}"
        )
    if not found[0]:
        raise InvalidArgumentError(
            f"{call} found no hidden units in {type(model).__name__}: no linear layer or "
            f"convolution that another one reads. {_TAKES}"
        )
    return found[0]


def _graph(call: str, model: nn.Module, training: bool) -> Graph:
    try:
        return trace_graph(model, training)
    except InvalidArgumentError as error:
        cause = error.__cause__
        why = first_line(cause) if isinstance(cause, Exception) else str(error)
        raise InvalidArgumentError(
            f"{call} follows the model's forward with torch.fx, which cannot trace that of "
            f"{type(model).__name__}: {why}. Move branches on values out of the forward."
        ) from cause


def copied(call: str, model: nn.Module) -> nn.Module:
    """Return a deep copy; one that cannot be made raises InvalidArgumentError."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise InvalidArgumentError(
            f"{call} works on a copy, and the model ({type(model).__name__}) cannot be copied: "
            f"{first_line(error)}. Make copy.deepcopy(model) work."
        ) from error


class _Units(Paths):
    """What follows the order of a layer's output features, in a traced forward."""

    def __init__(self, graph: Graph, modules: dict[str, nn.Module]) -> None:
        super().__init__(graph, modules, neurons=True)
        self._graph = graph

    def groups(self, call: str) -> Iterator[tuple[str, tuple[Place, ...]]]:
        """Yield the hidden layers, each with its places."""
        called = dict.fromkeys(str(n.target) for n in self._graph.nodes if n.op == "call_module")
        for name in called:
            module = self._modules[name]
            if isinstance(module, LINEAR):
                continue
            if not isinstance(module, _KNOWN) and any(True for _ in module.parameters()):
                raise _refused(call, name, f"it is {type(module).__name__}, which has units inside")
        read = [n for n, m in self._modules.items() if n and isinstance(m, LINEAR)]
        for name in [*(n for n in called if n in read), *(n for n in read if n not in called)]:
            try:
                places = self._places(name)
            except Stop as stop:
                reason = stop.reason.replace(
                    UNKNOWN_CHANNELS, "so that its channels cannot be followed"
                )
                raise _refused(call, name, reason) from None
            if places:
                yield name, places

    def _places(self, name: str) -> tuple[Place, ...]:
        """Return those of a layer; none where its units are the model's outputs."""
        module: Any = self._modules[name]
        unused = name not in self._calls
        if self._is_output(name) or (unused and id(module.weight) not in self._read):
            return ()
        self._check(name)
        if getattr(module, "groups", 1) > 1:
            raise Stop("it is a grouped convolution, whose channels are bound to their groups")
        own = channels_of(module)
        own = dataclasses.replace(own, features=own.count)
        transposed = bool(getattr(module, "transposed", False))
        places = [Place(f"{name}.weight", int(transposed), own)]
        places += [Place(f"{name}.bias", 0, own)] if module.bias is not None else []
        node = self._calls[name][0]
        stack, path, given, hidden = [(node, own)], {node}, False, False
        while stack:
            node, channels = stack.pop()
            for user in node.users:
                target = str(user.target)
                reader: Any = self._modules[target] if user.op == "call_module" else None
                if user.op == "output":
                    given = True
                elif isinstance(reader, LINEAR) and alone(user, node):
                    hidden = True
                    axis = 0 if getattr(reader, "transposed", False) else 1
                    sink = self._sink(target, channels)
                    places.append(Place(f"{target}.weight", axis, sink or channels))
                elif not is_query(user):
                    after = channels
                    if isinstance(reader, (*NORMS, nn.PReLU)) and alone(user, node):
                        places += self._follower(target, channels)
                    else:
                        after = self._after(user, node, channels, path) or channels
                    path.add(user)
                    stack.append((user, after))
        if given and hidden:
            raise Stop("it also gives the model's output, whose order is fixed")
        return tuple(places) if hidden else ()

    def _follower(self, name: str, channels: Channels) -> list[Place]:
        """Those of a normalisation, or of an activation with parameters, on a layer's units."""
        module: Any = self._modules[name]
        try:
            if parameters_of(module).get("weight") is not None:
                self._check(name)
            self._check_forward(name)
        except Stop as stop:
            raise Stop(f"of {name!r}, which works on them, {stop.reason}") from None
        if len(self._calls[name]) != 1:
            raise Stop(f"it feeds {name!r}, which is called more than once")
        last = channels.back == -1
        if isinstance(module, nn.PReLU):
            if module.num_parameters == 1:
                return []
            features, fits = module.num_parameters, channels.front == 1 or last
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            fits = last and len(module.normalized_shape) == 1
            features = module.normalized_shape[0]
        elif isinstance(module, nn.GroupNorm):
            features, fits = module.num_channels, channels.front == 1 or last
            fits = fits and module.num_groups in (1, features) and not channels.order
        else:
            features, fits = module.num_features, channels.front == 1 or last
        times = features // channels.count
        if not fits or features % channels.count or (times > 1 and not channels.order):
            raise Stop(
                f"it feeds {name!r} ({type(module).__name__}), which does not work on its units "
                "one by one or all alike"
            )
        where = dataclasses.replace(channels, features=features)
        tensors = {**parameters_of(module), **buffers_of(module)}
        return [
            Place(f"{name}.{n}", 0, where)
            for n, t in tensors.items()
            if t is not None and t.ndim == 1
        ]

    def _is_output(self, name: str) -> bool:
        """Return whether no layer with units works on what this one gives."""
        seen = set(self._calls.get(name, ()))
        stack = list(seen)
        while stack:
            for user in stack.pop().users:
                called = self._modules[str(user.target)] if user.op == "call_module" else None
                if isinstance(called, LINEAR) or name_of(user) in _PRODUCTS:
                    return False
                if user not in seen:
                    seen.add(user)
                    stack.append(user)
        return name in self._calls

    def _kind(self, node: Node) -> str:
        kind = super()._kind(node)
        if kind == "pointwise" and len(node.all_input_nodes) > 1:
            return ""  # prelu() with one weight for each channel
        if kind:
            return kind
        if node.op == "call_module":
            return "pointwise" if isinstance(self._modules[str(node.target)], _MODULES) else ""
        own = name_of(node).removesuffix("_") in _NAMES.split() and len(node.all_input_nodes) == 1
        return "pointwise" if own and node.op in ("call_method", "call_function") else ""

    def _sink(self, name: str, channels: Channels | None) -> Channels | None:
        if getattr(self._modules[name], "groups", 1) > 1:
            raise Stop(f"{name!r}, which reads it, is a grouped convolution")
        try:
            return super()._sink(name, channels)
        except Stop as stop:
            reason = stop.reason.replace("cannot be divided", "cannot follow its order")
            raise Stop(reason) from None

    def _refusal(self, user: Node) -> Stop:
        if user.op == "call_module":
            kind = type(self._modules[str(user.target)]).__name__
            return Stop(f"it feeds {user.target!r} ({kind}), through which units are not followed")
        name = name_of(user)
        if name in JOINS and len(user.all_input_nodes) > 1:
            return Stop(f"it is {JOINS[name]} another branch")
        return Stop(f"it goes through {name}(), through which units are not followed")


def _refused(call: str, name: str, reason: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{call} cannot permute the units of {name!r}: {reason}. {_TAKES}")
