"""The ways in which a call can fail, one class for each.

Every class derives from [`FlatMinimaError`][flatminima.FlatMinimaError], and from the built-in
exception that describes it best, so that `except ValueError` keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ArgumentTypeError",
    "ConvergenceError",
    "ConvergenceWarning",
    "DataChangedError",
    "DeviceError",
    "EmptyDataError",
    "FlatMinimaError",
    "FlatMinimaWarning",
    "InvalidArgumentError",
    "LossNotScalarError",
    "NonFiniteError",
    "NotSymmetricError",
    "OneShotDataError",
    "ParameterSelectionError",
    "ShapeError",
    "StateMismatchError",
    "closest",
]


class FlatMinimaError(Exception):
    """Above every exception that this library raises on purpose.

    Example:
        >>> import flatminima as fm
        >>> issubclass(fm.InvalidArgumentError, fm.FlatMinimaError)
        True
    """


class InvalidArgumentError(FlatMinimaError, ValueError):
    """An argument has a value outside what the call accepts."""


class ArgumentTypeError(FlatMinimaError, TypeError):
    """An argument is of a type that the call cannot use."""


class ShapeError(FlatMinimaError, ValueError):
    """A vector or matrix has the wrong shape."""


class DeviceError(FlatMinimaError, ValueError):
    """Model, data or vector lie on different devices."""


class ParameterSelectionError(FlatMinimaError, ValueError):
    """`params=` selects nothing, or something that has no derivative."""


class LossNotScalarError(FlatMinimaError, ValueError):
    """The loss of a batch is not one real number with a graph behind it."""


class NonFiniteError(FlatMinimaError, ValueError):
    """A loss, a product or a vector holds NaN or infinity."""


class EmptyDataError(FlatMinimaError, ValueError):
    """The data hold no batch, or only batches of weight zero."""


class OneShotDataError(FlatMinimaError, TypeError):
    """The data can be read only once, and every measure reads them many times."""


class DataChangedError(FlatMinimaError, RuntimeError):
    """Reading the data again gave other batches than the first time."""


class StateMismatchError(FlatMinimaError, ValueError):
    """Two models, or a model and a state dict, do not have the same tensors."""


class NotSymmetricError(FlatMinimaError, ValueError):
    """An operator that must be symmetric is not."""


class ConvergenceError(FlatMinimaError, RuntimeError):
    """An iterative method ran out of budget and `strict=True` was given.

    Attributes:
        result: what had been reached; the same object that would have been returned.
    """

    def __init__(self, message: str, result: object = None) -> None:
        super().__init__(message)
        self.result = result


class FlatMinimaWarning(UserWarning):
    """Above every warning that this library gives."""


class ConvergenceWarning(FlatMinimaWarning):
    """An iterative method ran out of budget; its result says how far it came."""


def closest(name: str, known: Iterable[str], *, count: int = 3) -> str:
    """A sentence with the names nearest to `name`, or all of them when none is near."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=count, cutoff=0.4)
    if near:
        return "Did you mean " + " or ".join(repr(n) for n in near) + "?"
    shown = ", ".join(repr(n) for n in names[:10])
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"Known names: {shown}{more}."
