"""When to stop sampling: rules that chance rarely makes stop too early."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol, TypeVar

from ...errors import ConvergenceError, ConvergenceWarning, InvalidArgumentError, warn
from ...results import Outcome
from ...support.checks import check_positive

__all__ = [
    "FIRST_LOOK",
    "LIMIT",
    "PRODUCTS",
    "check_rtol",
    "choose_outcome",
    "conclude",
    "is_precise",
    "schedule_looks",
]

PRODUCTS = 100
"""Default number of products."""
LIMIT = 1000
"""Default limit of products with `rtol`."""
FIRST_LOOK = 24
"""Number of products before the standard error is tested for the first time."""
CONFIDENCE = 0.95
"""Confidence that the true standard error is below the bound that is compared with `rtol`."""


def schedule_looks(
    limit: int,
    rtol: float | None,
    *,
    size: int | None = None,
    first: int = FIRST_LOOK,
    growth: float = 1.5,
) -> tuple[Iterator[int], bool]:
    """Return the numbers of products at which to test the error, and whether to end exactly.

    The numbers grow by a factor, since each test is a chance to stop too early.

    Args:
        limit: the last number; the only one if `rtol` is None.
        rtol: the relative error to reach, or None.
        size: n, if n products with unit vectors may replace as many random ones.
        first: the first number.
        growth: the factor.

    Returns:
        The numbers, and whether n products with unit vectors follow the last one.

    Examples:
        >>> list(schedule_looks(100, 0.1)[0]), list(schedule_looks(100, None)[0])
        ([24, 36, 54, 81, 100], [100])
        >>> counts, whole = schedule_looks(1000, 0.1, size=50)
        >>> list(counts), whole
        ([24, 36], True)
    """
    counts, count = [], first
    while rtol is not None and 1.2 * count < limit:
        counts.append(count)
        count = int(count * growth)
    counts.append(limit)
    # With `rtol`, random products come first, and all must remain within the limit.
    whole = size is not None and size <= (limit if rtol is None else limit // 2)
    return iter([c for c in counts if not whole or c < (size or 0)]), whole


def check_rtol(call: str, rtol: float | None) -> float | None:
    """Return `rtol` if it is between 0 and 1; from 1 on, not even the sign would be known."""
    if rtol is None:
        return None
    checked = check_positive(call, "rtol", rtol)
    if checked >= 1:
        raise InvalidArgumentError(
            f"The 'rtol' argument of {call} must be below 1, since an error as large as the value "
            f"leaves its sign unknown; got {rtol!r}."
        )
    return checked


def is_precise(value: float, standard_error: float, samples: int, rtol: float) -> bool:
    """Return whether the relative error is within `rtol`, with a margin for chance.

    A standard error from few samples may be small by chance; its upper confidence limit U by the
    χ² distribution replaces it. The value may be large by chance; it is reduced by 2 U. The
    condition is U ≤ rtol · (|value| − 2 U), which a value that may be zero never meets.

    Examples:
        >>> is_precise(100.0, 5.0, 1000, 0.1), is_precise(100.0, 5.0, 5, 0.1)
        (True, False)
        >>> is_precise(0.1, 5.0, 10, 0.1)
        False
    """
    from scipy.special import chdtri

    bound = standard_error * math.sqrt((samples - 1) / float(chdtri(samples - 1, CONFIDENCE)))
    return bound <= rtol * (abs(value) - 2 * bound)


def choose_outcome(*, exact: bool, done: bool, rtol: float | None) -> Outcome:
    """Return the outcome of an estimate; `done` is whether the last test was passed."""
    if exact:
        return Outcome.EXACT
    if rtol is None:
        return Outcome.COMPLETED
    return Outcome.WITHIN_RTOL if done else Outcome.ABOVE_RTOL


class _HasOutcome(Protocol):
    @property
    def outcome(self) -> Outcome: ...


R = TypeVar("R", bound=_HasOutcome)


def conclude(
    call: str,
    result: R,
    found: str,
    rtol: float | None,
    *,
    spent: int,
    unit: str = "products",
    strict: bool,
) -> R:
    """Return `result`; if its error stayed above `rtol`, warn first, or raise if `strict`.

    Args:
        call: named in the message.
        result: the result.
        found: says what was found, for the message.
        rtol: the relative error to reach.
        spent: the number of products or samples taken.
        unit: "products" or "samples".
        strict: raise instead of warn.

    Raises:
        ConvergenceError: with `strict`, if the error stayed above `rtol`.
    """
    if result.outcome is not Outcome.ABOVE_RTOL:
        return result
    message = (
        f"{call}: the limit of {spent} {unit} was reached before the error was known to be "
        f"within rtol={rtol:g}: {found}. Increase {unit}= or rtol=."
    )
    if strict:
        raise ConvergenceError(message, result)
    warn(message, ConvergenceWarning)
    return result
