"""Progress bars: shown only for work that takes a while, and silent when asked."""

from __future__ import annotations

import functools
import warnings
from typing import Any

__all__ = ["progress_bar"]

DELAY_SECONDS = 2.0


def progress_bar(description: str, *, total: int | None, unit: str, show: bool) -> Any:
    """Return a tqdm bar that appears after two seconds of work, or never when `show` is false."""
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
    """Return the kind of bar that fits; loaded when the first is made, for a quick start."""
    from tqdm import TqdmWarning

    with warnings.catch_warnings():
        # A notebook without ipywidgets: tqdm falls back to text, which is what we want there.
        warnings.simplefilter("ignore", TqdmWarning)
        from tqdm.auto import tqdm
    return tqdm
