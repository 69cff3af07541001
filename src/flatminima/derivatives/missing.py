"""Operations without a second derivative, named in an error."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from ..errors import NotTwiceDifferentiableError
from .tracing import GraphTrace, operation_name

__all__ = ["not_twice", "second_derivative", "where"]

# What PyTorch says of an operation without a second derivative.
_MISSING = re.compile(
    r"derivative for '?(?P<name>[\w:]+)'? is not implemented|twice.*once_?differentiable"
    r"|(?P<compiled>aot_?autograd does not currently support double backward)",
    re.S,
)


@contextlib.contextmanager
def second_derivative(trace: GraphTrace | None) -> Iterator[None]:
    """PyTorch's complaint that there is none, told with the operation and the way out."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        found = _MISSING.search(str(error))
        if found is None:
            raise
        if found["compiled"]:
            name = "torch.compile"
        elif found["name"]:
            name = operation_name(found["name"])
        else:
            name = "a function marked as once_differentiable"
        raise not_twice(name, "" if trace is None else trace.place(name)) from error


def not_twice(operation: str, module: str) -> NotTwiceDifferentiableError:
    """The error that names an operation without a second derivative, and its module."""
    return NotTwiceDifferentiableError(
        f"PyTorch has no second derivative of {operation}{where(module)}. Replace the "
        "operation, or let method='auto' or 'finite_differences' take differences of gradients. "
        "Measures that need first derivatives alone (ε-sharpness, random perturbations) work as "
        "they are.",
        operation,
        module,
    )


def where(module: str) -> str:
    """A module's name from a trace, as it stands in a sentence."""
    if not module:
        return ""
    return f" (in {module})" if module.startswith("the ") else f" (in the module {module!r})"
