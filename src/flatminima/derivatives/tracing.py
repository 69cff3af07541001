"""Which module made which operation of a graph, and which of them lack a second derivative."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..support.trees import tensors_in

__all__ = ["LOSS", "GraphTrace", "operation_name"]

LOSS = "the loss function"
MODEL = "the model itself"


class GraphTrace:
    """While it is entered, the nodes of the graphs that a model makes are labelled by module.

    Args:
        model: whose submodules give the labels.

    Attributes:
        functions: the user's own `autograd.Function` classes met so far, each with the module
            that applied it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {m: n or MODEL for n, m in model.named_modules()}
        # The nodes themselves, since an id alone may be given to another node.
        self._labels: dict[Any, str] = {}
        self._dependent: set[Any] = set()
        self.functions: dict[str, str] = {}

    def __enter__(self) -> GraphTrace:
        # Not a global hook, of which torch.compile would warn.
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
        # Nodes before this module's input are some other's.
        border = set(_nodes_of((args, kwargs)))
        self._spread(_nodes_of(output), name, border)

    def _spread(self, start: Sequence[Any], name: str, border: set[Any]) -> None:
        """Label what has no label yet between `start` and `border`.

        Through what an inner module made already, since its caller's own lies behind it too.
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
        """An operation without second derivative that PyTorch may not complain of, and its module.

        Past a function marked as once_differentiable PyTorch prunes the graph, which silently
        leaves out a part of the second derivative. Functions that do not depend on `leaves` are
        passed over; of reentrant checkpointing that cannot be told.
        """
        self._spread(_nodes_of(loss), LOSS, set())
        self._dependent = dependent = _leading_to(loss, leaves)
        found = None
        for node, module in self._labels.items():
            function = getattr(node, "_forward_cls", None)
            if function is not None and function.__name__ == "CheckpointFunction":
                found = ("torch.utils.checkpoint with use_reentrant=True", module)
            if node not in dependent:
                continue
            if node.name() == "WeightNormInterfaceBackward0":
                # Right only where the evaluation could see it coming and has replaced it.
                found = ("weight_norm", module)
            if function is None:
                continue
            if _is_once_differentiable(function):
                found = (function.__name__, module)
            elif not _is_torchs_own(function):
                self.functions[_readable(function)] = module
        return found

    def place(self, operation: str) -> str:
        """The module that called `operation`, a name from `operation_name`; "" if unknown."""
        wanted = _key(operation)
        places = (m for n, m in self._labels.items() if n in self._dependent)
        names = (_key(n.name()) for n in self._labels if n in self._dependent)
        return next((m for m, key in zip(places, names, strict=True) if key == wanted), "")

    def forget(self) -> None:
        """Let the graph go, whose labels hold on to it."""
        self._labels.clear()
        self._dependent = set()


def operation_name(said: str) -> str:
    """The operation in PyTorch's name for its derivative, `aten::_ctc_loss_backward`."""
    return said.removeprefix("aten::").removesuffix("_backward").strip("_")


def _key(name: str) -> str:
    """The same for `_ctc_loss` and `CtcLossBackward0`."""
    return re.sub(r"backward\d*$", "", name.lower().split("::")[-1].replace("_", ""))


def _leading_to(loss: Tensor | Sequence[Tensor], leaves: Sequence[Tensor]) -> set[Any]:
    """The nodes of a graph from which its edges lead to one of the leaves."""
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
    waiting = [n for n in order if id(getattr(n, "variable", None)) in wanted]
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


def _is_torchs_own(function: type) -> bool:
    """Whether PyTorch answers for the derivatives; custom operators are registered in its name."""
    module = function.__module__
    return module.startswith(("torch.", f"{__package__}.")) and "_library" not in module


def _readable(function: type) -> str:
    return function.__name__.removeprefix("GeneratedBackwardFor_")


def _is_once_differentiable(function: type) -> bool:
    backward = getattr(function, "backward", None)
    wrapper = getattr(backward, "__globals__", {}).get("__name__")
    return hasattr(backward, "__wrapped__") and wrapper == "torch.autograd.function"
