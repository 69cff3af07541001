"""Argument checks that word their errors alike."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeVar

import torch

from ..errors import ArgumentTypeError, DeviceError, InvalidArgumentError, closest

__all__ = [
    "check_callables",
    "check_choice",
    "check_device",
    "check_instance",
    "check_integer",
    "check_number",
    "check_positive",
]

T = TypeVar("T")


def _refusal(call: str, argument: str, wanted: str, got: object) -> str:
    return f"The {argument!r} argument of {call} must be {wanted}; got {got!r}."


def check_integer(
    call: str, argument: str, value: object, *, low: int, high: int | None = None
) -> int:
    """Return `value` as an int within [`low`, `high`]; a bool is refused."""
    wanted = f"an integer ≥ {low}" if high is None else f"an integer from {low} to {high}"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ArgumentTypeError(_refusal(call, argument, wanted, value))
    number = value.__index__()
    if number < low or (high is not None and number > high):
        raise InvalidArgumentError(_refusal(call, argument, wanted, value))
    return int(number)


def check_number(call: str, argument: str, value: object, wanted: str = "a finite number") -> float:
    """Return `value` as a finite float."""
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        raise ArgumentTypeError(_refusal(call, argument, wanted, value))
    number = float(value.__float__())
    if not math.isfinite(number):
        raise InvalidArgumentError(_refusal(call, argument, wanted, value))
    return number


def check_positive(call: str, argument: str, value: object) -> float:
    """Return `value` as a finite float greater than zero."""
    wanted = "a finite number > 0"
    number = check_number(call, argument, value, wanted)
    if number <= 0:
        raise InvalidArgumentError(_refusal(call, argument, wanted, value))
    return number


def check_callables(call: str, **functions: object) -> None:
    """Check that each of these arguments is callable or None."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise ArgumentTypeError(
                f"The {name!r} argument of {call} must be callable; got a "
                f"{type(function).__name__}."
            )


def check_choice(call: str, argument: str, value: object, choices: Iterable[str]) -> str:
    """Return `value` when it is one of `choices`."""
    names = list(choices)
    if not isinstance(value, str) or value not in names:
        wanted = "one of " + ", ".join(repr(n) for n in names)
        hint = " " + closest(value, names) if isinstance(value, str) else ""
        raise InvalidArgumentError(_refusal(call, argument, wanted, value) + hint)
    return value


def check_device(call: str, device: torch.device | str, argument: str = "device") -> torch.device:
    """Return the device with its index, if this machine has it."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        # A torch built without CUDA raises AssertionError.
        raise DeviceError(
            f"The {argument!r} argument of {call} is {str(device)!r}, which this machine or this "
            f"build of torch does not support: {error}"
        ) from error


def check_instance(call: str, argument: str, value: object, kind: type[T], advice: str) -> T:
    """Return `value` when it is an instance of `kind`; `advice` says how to get one."""
    if not isinstance(value, kind):
        got = f"{type(value).__module__}.{type(value).__qualname__}"
        raise ArgumentTypeError(
            f"The {argument!r} argument of {call} must be a {kind.__name__}; got {got}. {advice}"
        )
    return value
