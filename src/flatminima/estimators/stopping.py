"""When an estimate is good enough, judged so that chance does not end it early."""

from __future__ import annotations

import math
from collections.abc import Iterator

__all__ = ["FIRST_LOOK", "looks", "settled"]

FIRST_LOOK = 24
"""Products before the first look at the standard error."""
GROWTH = 1.5
CONFIDENCE = 0.95
"""With which the true standard error lies below the bound that is compared with `rtol`."""


def looks(limit: int, growth: float = GROWTH) -> Iterator[int]:
    """The counts of products after which the error is looked at, `limit` last.

    They grow by a factor, since each look is a chance to stop too early.

    Examples:
        >>> list(looks(100))
        [24, 36, 54, 81, 100]
    """
    count = FIRST_LOOK
    while 1.2 * count < limit:
        yield count
        count = int(count * growth)
    yield limit


def settled(value: float, standard_error: float, samples: int, rtol: float) -> bool:
    """Whether the error is small enough beside the smallest size that the value may have.

    A standard error from few samples may be small by chance, so its upper confidence limit by the
    χ² distribution takes its place, U. The value may be large by chance, so it counts with 2 U
    less: U ≤ rtol · (|value| − 2 U). A value that cannot be told from zero never passes.

    Examples:
        >>> settled(100.0, 5.0, 1000, 0.1), settled(100.0, 5.0, 5, 0.1), settled(0.1, 5.0, 10, 0.1)
        (True, False, False)
    """
    from scipy.special import chdtri

    bound = standard_error * math.sqrt((samples - 1) / float(chdtri(samples - 1, CONFIDENCE)))
    return bound <= rtol * (abs(value) - 2 * bound)
