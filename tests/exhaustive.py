"""Parameters that only the exhaustive suite, `pytest --full`, runs through."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def thinned(
    values: Iterable[Any], one_in: int, *, always: Collection[Any] = (), start: int = 0
) -> list[Any]:
    """Return the parameters of a test, of which one in so many stays in the default suite.

    Args:
        values: for one argument, or tuples for several.
        one_in: how many values there are for each that stays.
        always: values that stay too.
        start: the first one that stays, so that tests can differ in what they keep.
    """
    kept = []
    for position, value in enumerate(values):
        stays = position % one_in == start % one_in or value in always
        arguments = value if isinstance(value, tuple) else (value,)
        kept.append(pytest.param(*arguments, marks=() if stays else pytest.mark.full))
    return kept
