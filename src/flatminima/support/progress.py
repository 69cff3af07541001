"""Progress bars, shown only for work that takes a while."""

from __future__ import annotations

import functools
import warnings
from typing import Any

__all__ = ["progress_bar"]

DELAY_SECONDS = 2.0


def progress_bar(description: str, *, total: int | None, unit: str, show: bool) -> Any:
    """Return a tqdm bar that appears after two seconds of work; never if `show` is false."""
    return _tqdm()(
        total=total,
        desc=description,
        unit=unit,
        disable=not show,
        delay=DELAY_SECONDS,
        leave=False,
        dynamic_ncols=True,
    )


@functools.cache
def _tqdm() -> Any:
    """Return tqdm's class for a terminal or notebook, imported late to keep our import fast."""
    from tqdm import TqdmWarning

    with warnings.catch_warnings():
        # Without ipywidgets tqdm warns and falls back to text, which is fine.
        warnings.simplefilter("ignore", TqdmWarning)
        from tqdm.auto import tqdm
    return tqdm
