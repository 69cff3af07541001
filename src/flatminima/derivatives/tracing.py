"""Which modules made the operations of a graph, and which have no second derivative."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..support.trees import tensors_in
from .torch_private import (
    is_fused_weight_norm,
    is_once_differentiable,
    leaf_of,
    node_function,
    readable_function,
)

__all__ = ["LOSS", "GraphTrace", "operation_name"]

LOSS = "the loss function"
MODEL = "the model itself"


class GraphTrace:
    """A context in which the nodes of a model's graphs are labelled by module.

    Args:
        model: the model; the names of its submodules are the labels.

    Attributes:
        functions: the user's own `autograd.Function` classes seen so far, each with the module
            that applied it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {m: n or MODEL for n, m in model.named_modules()}
        # The nodes themselves, because an id may be reused for another node.
        self._labels: dict[Any, str] = {}
        self._dependent: set[Any] = set()
        self.functions: dict[str, str] = {}

    def __enter__(self) -> GraphTrace:
        # Not a global hook: torch.compile would warn.
        self._hooks: list[RemovableHandle] = []
        try:
            for module in self._names:
                if not isinstance(module, torch.jit.ScriptModule):
                    hook = module.register_forward_hook(self._label, with_kwargs=True)
                    self._hooks.append(hook)
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self.forget()

    def _label(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = self._names[module]
        # Nodes before this module's input belong to other modules.
        border = set(_nodes_of((args, kwargs)))
        self._spread(_nodes_of(output), name, border)

    def _spread(self, start: Sequence[Any], name: str, border: set[Any]) -> None:
        """Label the nodes between `start` and `border` that have no label yet.

        Labelled nodes of inner modules are passed through: nodes of their caller lie behind them.
        """
        seen = set(border)
        waiting = list(start)
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            self._labels.setdefault(node, name)
            waiting += [n for n, _ in node.next_functions]

    def refusal(
        self, loss: Tensor | Sequence[Tensor], leaves: Sequence[Tensor]
    ) -> tuple[str, str] | None:
        """Return an operation without second derivative, and its module, if PyTorch may not say so.

        PyTorch cuts the graph at a function marked as once_differentiable, and silently leaves
        out a part of the second derivative. Functions that do not depend on `leaves` are ignored,
        except for reentrant checkpointing, where the graph does not show it.
        """
        self._spread(_nodes_of(loss), LOSS, set())
        self._dependent = dependent = _leading_to(loss, leaves)
        found = None
        for node, module in self._labels.items():
            function = node_function(node)
            if function is not None and function.__name__ == "CheckpointFunction":
                found = ("torch.utils.checkpoint with use_reentrant=True", module)
            if node not in dependent:
                continue
            if is_fused_weight_norm(node):
                # It would have been replaced if the evaluation had seen it in a module.
                found = ("weight_norm", module)
            if function is None:
                continue
            name, pytorchs = readable_function(function)
            if is_once_differentiable(function):
                found = (function.__name__, module)
            elif not pytorchs and not function.__module__.startswith(f"{__package__}."):
                self.functions[name] = module
        return found

    def place(self, operation: str) -> str:
        """Return the module that called an operation, named by `operation_name`; "" if unknown."""
        wanted = _key(operation)
        places = (m for n, m in self._labels.items() if n in self._dependent)
        names = (_key(n.name()) for n in self._labels if n in self._dependent)
        return next((m for m, key in zip(places, names, strict=True) if key == wanted), "")

    def forget(self) -> None:
        """Release the graph, which the labels keep alive."""
        self._labels.clear()
        self._dependent = set()


def operation_name(said: str) -> str:
    """Return the operation from the name of its derivative, such as `aten::_ctc_loss_backward`."""
    return said.removeprefix("aten::").removesuffix("_backward").strip("_")


def _key(name: str) -> str:
    """The same for `_ctc_loss` and `CtcLossBackward0`."""
    return re.sub(r"backward\d*$", "", name.lower().split("::")[-1].replace("_", ""))


def _leading_to(loss: Tensor | Sequence[Tensor], leaves: Sequence[Tensor]) -> set[Any]:
    """The nodes of a graph that depend on one of the leaves."""
    wanted = {id(leaf) for leaf in leaves}
    order: list[Any] = []
    seen: set[Any] = set()
    waiting = _nodes_of(loss)
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            order.append(node)
            waiting += [n for n, _ in node.next_functions]
    before: dict[Any, list[Any]] = {}
    for node in order:
        for following, _ in node.next_functions:
            before.setdefault(following, []).append(node)
    waiting = [n for n in order if id(leaf_of(n)) in wanted]
    found = set(waiting)
    while waiting:
        for node in before.get(waiting.pop(), ()):
            if node not in found:
                found.add(node)
                waiting.append(node)
    return found


def _nodes_of(data: Any) -> list[Any]:
    return [t.grad_fn for t in _tensors(data) if t.grad_fn is not None]


def _tensors(data: Any) -> Iterator[Tensor]:
    return (t for t in tensors_in(data) if isinstance(t, Tensor))
