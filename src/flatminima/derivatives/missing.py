"""Errors that name an operation without a second derivative."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..errors import NotTwiceDifferentiableError
from .torch_private import missing_derivative
from .tracing import GraphTrace, operation_name

__all__ = ["not_twice", "second_derivative", "where"]


@contextlib.contextmanager
def second_derivative(trace: GraphTrace | None) -> Iterator[None]:
    """Turn PyTorch's error for a missing second derivative into one that says what to do."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        found = missing_derivative(error)
        if found is None:
            raise
        name = operation_name(found) or "a function marked as once_differentiable"
        raise not_twice(name, "" if trace is None else trace.place(name)) from error


def not_twice(operation: str, module: str) -> NotTwiceDifferentiableError:
    """Return the error that names an operation without a second derivative, and its module."""
    return NotTwiceDifferentiableError(
        f"PyTorch has no second derivative of {operation}{where(module)}. Replace the "
        "operation, or let method='auto' or 'finite_differences' take differences of gradients. "
        "Measures that need first derivatives alone (ε-sharpness, random perturbations) work as "
        "they are.",
        operation,
        module,
    )


def where(module: str) -> str:
    """Return a module's name from a trace, as part of a sentence."""
    if not module:
        return ""
    return f" (in {module})" if module.startswith("the ") else f" (in the module {module!r})"
