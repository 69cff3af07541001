"""The door to the hand-written second derivatives, with a switch for each of them."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import ArgumentTypeError, FlatMinimaError, InvalidArgumentError, ShapeError
from ..support.trees import tensors_in
from .attention import multi_head_attention
from .channels_last import is_marked
from .gradients import nodes
from .recurrent import twice_differentiable
from .substitution import REPLACED, Substitution
from .torch_private import (
    checkpoints_noticed,
    has_weight_norm,
    in_transform,
    is_cpp_function,
    node_function,
)
from .weight_norm import DifferentiableWeightNorm

__all__ = [
    "PIECES",
    "Differentiation",
    "HandWritten",
    "Piece",
    "differentiable_modules",
    "is_marked",
    "pytorch_derivatives",
]

Piece = Literal["attention", "batch_norm", "channels_last", "convolution", "lstm"]
"""The name of a hand-written derivative."""

HandWritten = bool | Collection[str]
"""All of them, none, or those with these names."""

PIECES: tuple[Piece, ...] = get_args(Piece)

_off: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar("off", default=frozenset())


@contextlib.contextmanager
def pytorch_derivatives(*names: Piece) -> Iterator[None]:
    """Use PyTorch's own second derivatives instead of the hand-written ones.

    Some layers have second derivatives written by hand, which make products with the Hessian
    faster and equal PyTorch's up to rounding. When a number looks wrong, compute it again inside
    this context manager. If it changes by more than rounding, turn them off one by one to find the
    one to report. Products cost up to twice as much meanwhile.

    It applies to all objectives, in the thread that enters it. `Objective(..., hand_written=False)`
    does the same for one objective. Corrections stay on: PyTorch's second derivative of weight
    norm is wrong, its fused recurrent and attention kernels have none, and those are never used.

    Args:
        names: which ones to turn off. Default: all. "attention" is scaled dot-product attention;
            "batch_norm", batch norm in evaluation mode; "channels_last", the memory layout of
            images on the CPU, which is in use only together with "convolution"; "convolution",
            convolutions in one to three dimensions; "lstm",
            `nn.LSTM`.

    Raises:
        InvalidArgumentError: a name is not one of these.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Sequential(torch.nn.Conv1d(1, 2, 3), torch.nn.Flatten())
        >>> data = torch.ones(4, 1, 3), torch.zeros(4, 2)
        >>> hessian = fm.HessianOperator(fm.Objective(model, torch.nn.MSELoss(), data))
        >>> vector = torch.ones(8)
        >>> product = hessian @ vector
        >>> with fm.pytorch_derivatives():
        ...     torch.allclose(hessian @ vector, product)
        True
        >>> with fm.pytorch_derivatives("convolution"):
        ...     torch.allclose(hessian @ vector, product)
        True
    """
    chosen = _checked("pytorch_derivatives", "names", names) if names else frozenset(PIECES)
    token = _off.set(_off.get() | chosen)
    try:
        yield
    finally:
        _off.reset(token)


def _checked(call: str, argument: str, value: Any) -> frozenset[str]:
    known = ", ".join(map(repr, PIECES))
    names = list(value)
    for name in names:
        if name not in PIECES:
            raise InvalidArgumentError(
                f"The {argument!r} argument of {call} must be among {known}; got {name!r}."
            )
    return frozenset(names)


class Differentiation:
    """How a model is run when it is to be differentiated twice.

    The first whole pass is made in the way that is always right, and records which functions the
    model calls. Later passes use `Substitution` only where it has something to replace, and keep
    activations channels last only where PyTorch's own functions alone meet them.

    Args:
        model: without wrappers.
        criterion: the loss function.
        hand_written: which hand-written derivatives to use, as in `Objective`.

    Attributes:
        chosen: the names of the hand-written derivatives that `hand_written` allows.
        replaces: whether functions may be replaced in this model at all.
    """

    def __init__(
        self, model: nn.Module, criterion: object, hand_written: HandWritten = True
    ) -> None:
        if isinstance(hand_written, bool):
            self.chosen: frozenset[str] = frozenset(PIECES if hand_written else ())
        elif isinstance(hand_written, str) or not isinstance(hand_written, Collection):
            raise ArgumentTypeError(
                "The 'hand_written' argument of Objective must be True, False or a collection of "
                f"names; got {hand_written!r}."
            )
        else:
            self.chosen = _checked("Objective", "hand_written", hand_written)
        judge = [criterion] if isinstance(criterion, nn.Module) else []
        modules = [m for part in (model, *judge) for m in part.modules()]
        self._watched = self._settled = False
        self.replaces = True
        # Functions inside a script cannot be followed.
        self._channels_last = not any(isinstance(m, torch.jit.ScriptModule) for m in modules)
        self._calls_replaced = False

    @property
    def pieces(self) -> frozenset[str]:
        """The names of the hand-written derivatives in use now; graphs depend on them."""
        return self.chosen - _off.get()

    def running(self) -> AbstractContextManager[object]:
        """Return what to enter while the model and its loss are computed."""
        # The LSTM is replaced as a module, not as a function.
        pieces = self.pieces - {"lstm"}
        if not self._settled:
            self._watched = bool(pieces)
        if not pieces or not self.replaces:
            return contextlib.nullcontext()
        if not self._settled:
            return _Watched(self, pieces - {"channels_last"})
        if not self._calls_replaced:
            return contextlib.nullcontext()
        return Substitution(pieces if self._channels_last else pieces - {"channels_last"})

    def see(self, func: Any) -> None:
        """Record a call of a function in the first pass."""
        if func in REPLACED:
            self._calls_replaced = True
        elif getattr(func, "__name__", "") in _GRADIENTS or in_transform():
            self._channels_last = False

    def stop_replacing(self) -> None:
        """Replace no function from now on, because a part of the model is checkpointed.

        When that part runs again, it meets PyTorch's own functions. It must have met them the
        first time too: what is saved then must match.
        """
        self.replaces = False

    def examine(self, result: Any) -> None:
        """Record, in the first pass, which functions the graph of a loss or an output contains."""
        if self._settled or not self._channels_last:
            return
        for node in nodes(*tensors_in(result)):
            function = node_function(node)
            own = function is None or function.__module__.startswith(f"{__package__}.")
            # A function of the user's, in Python or in C++, may look at memory.
            if not own or is_cpp_function(node):
                self._channels_last = False

    def settle(self) -> None:
        """Record that a whole pass is over."""
        self._settled = self._watched

    def retreat(self, error: Exception) -> bool:
        """After an error, give up channels last; return whether that was in use."""
        if isinstance(error, FlatMinimaError) and not isinstance(error, ShapeError):
            return False
        before = self._settled and self._calls_replaced and self.replaces and self._channels_last
        self._channels_last = False
        return before and "channels_last" in self.pieces


class _Watched(Substitution):
    """The first pass: records the functions and checkpoints that the model uses."""

    def __init__(self, watcher: Differentiation, pieces: Collection[str]) -> None:
        super().__init__(pieces)
        self._watcher = watcher

    def __enter__(self) -> Any:
        self._noticing = checkpoints_noticed(self._watcher.stop_replacing)
        self._noticing.__enter__()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *args: Any) -> None:
        self._noticing.__exit__(None, None, None)
        super().__exit__(*args)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self._watcher.see(func)
        if not self._watcher.replaces:
            return func(*args, **(kwargs or {}))
        return self._called(func, args, kwargs or {})


# Functions that hand gradients to the model, which would lie channels last too.
_GRADIENTS = ("register_hook", "grad", "backward")


@contextlib.contextmanager
def differentiable_modules(
    modules: Sequence[nn.Module], derivatives: int, pieces: Collection[str]
) -> Iterator[None]:
    """Make modules differentiable as often as needed, and the same function each time.

    For second derivatives weight norm is corrected, attention runs under the MATH kernel and
    recurrent modules without their fused kernels, which have none. Attention and recurrent modules
    do so wherever a module is in training mode too: each kernel draws dropout in its own way, and
    values, gradients and products must belong to the same function.

    Args:
        modules: all modules of a model.
        derivatives: how many will be taken.
        pieces: names of the hand-written derivatives to use.
    """
    with contextlib.ExitStack() as stack:
        if derivatives == 2 and any(map(has_weight_norm, modules)):
            stack.enter_context(DifferentiableWeightNorm())
        if derivatives == 2 or any(m.training for m in modules):
            stack.enter_context(sdpa_kernel([SDPBackend.MATH]))
            for module in modules:
                forward = _forward(module, pieces if derivatives == 2 else ())
                if forward is not None:
                    # On the instance, so that the user's hooks stay where they are.
                    stack.callback(_put_back, module, vars(module).get("forward"))
                    vars(module)["forward"] = forward
        yield


def _forward(module: nn.Module, pieces: Collection[str]) -> Callable[..., Any] | None:
    """The forward that a module is to have; None for its own."""
    # A forward that somebody has given to the instance is called in any case.
    usual = "forward" not in vars(module)
    if isinstance(module, nn.RNNBase):
        unfused = functools.partial(_unfused, module.forward)
        hand_written = usual and "lstm" in pieces
        return twice_differentiable(module, unfused) if hand_written else unfused
    if type(module) is nn.MultiheadAttention and usual and "attention" in pieces:
        return multi_head_attention(module, module.forward)
    return None


def _put_back(module: nn.Module, forward: Any) -> None:
    if forward is None:
        vars(module).pop("forward", None)
    else:
        vars(module)["forward"] = forward


def _unfused(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A recurrent module's forward without the fused kernels of cuDNN and oneDNN."""
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.mkldnn)
    enabled = [backend.enabled for backend in backends]
    try:
        for backend in backends:
            backend.enabled = False
        return forward(*args, **kwargs)
    finally:
        for backend, flag in zip(backends, enabled, strict=True):
            backend.enabled = flag
