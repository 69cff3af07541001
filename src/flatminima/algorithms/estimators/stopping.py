"""When an estimate is good enough, judged so that chance does not end it early."""

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
    "conclude",
    "is_precise",
    "outcome_of",
    "schedule_looks",
]

PRODUCTS = 100
"""Default number of products."""
LIMIT = 1000
"""Default limit with `rtol`."""
FIRST_LOOK = 24
"""Products before the first look at the standard error."""
CONFIDENCE = 0.95
"""With which the true standard error lies below the bound that is compared with `rtol`."""


def schedule_looks(
    limit: int,
    rtol: float | None,
    *,
    size: int | None = None,
    first: int = FIRST_LOOK,
    growth: float = 1.5,
) -> tuple[Iterator[int], bool]:
    """After how many products to look at the error, and whether to compute all entries at last.

    Args:
        limit: the last count; the only one where `rtol` is None.
        rtol: the counts grow by a factor, since each look is a chance to stop too early.
        size: n, where n products with unit vectors may take the place of so many random ones.
        first: the first count.
        growth: the factor.

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
    # With what was spent before it must remain within the limit.
    whole = size is not None and size <= (limit if rtol is None else limit // 2)
    return iter([c for c in counts if not whole or c < (size or 0)]), whole


def check_rtol(call: str, rtol: float | None) -> float | None:
    """Return `rtol` when it says something: from one on, the sign is not even known."""
    if rtol is None:
        return None
    checked = check_positive(call, "rtol", rtol)
    if checked >= 1:
        raise InvalidArgumentError(
            f"The 'rtol' argument of {call} must be below 1, where the error is as large as the "
            f"value; got {rtol!r}."
        )
    return checked


def is_precise(value: float, standard_error: float, samples: int, rtol: float) -> bool:
    """Return whether the error is small enough, measured by the least size the value may have.

    A standard error from few samples may be small by chance, so its upper confidence limit by the
    χ² distribution takes its place, U. The value may be large by chance, so it counts with 2 U
    less: U ≤ rtol · (|value| − 2 U). A value that may be zero never passes.

    Examples:
        >>> is_precise(100.0, 5.0, 1000, 0.1), is_precise(100.0, 5.0, 5, 0.1)
        (True, False)
        >>> is_precise(0.1, 5.0, 10, 0.1)
        False
    """
    from scipy.special import chdtri

    bound = standard_error * math.sqrt((samples - 1) / float(chdtri(samples - 1, CONFIDENCE)))
    return bound <= rtol * (abs(value) - 2 * bound)


def outcome_of(*, exact: bool, done: bool, rtol: float | None) -> Outcome:
    """Return how an estimate ended: `done` says whether the last look was good enough."""
    if exact:
        return Outcome.EXACT
    if rtol is None:
        return Outcome.COMPLETED
    return Outcome.WITHIN_RTOL if done else Outcome.ABOVE_RTOL


class _Ended(Protocol):
    @property
    def outcome(self) -> Outcome: ...


R = TypeVar("R", bound=_Ended)


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
    """Return `result`, after warning (or raising, when `strict`) if it stayed above `rtol`."""
    if result.outcome is not Outcome.ABOVE_RTOL:
        return result
    message = (
        f"{call}: the limit of {spent} {unit} came before the error was known to be "
        f"within rtol={rtol:g}: {found}. Raise {unit}= or rtol=."
    )
    if strict:
        raise ConvergenceError(message, result)
    warn(message, ConvergenceWarning)
    return result
