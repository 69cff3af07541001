"""What pictures have in common: colours, a new axis, gaps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "SERIES",
    "VERMILLION",
    "figure_size",
    "in_style",
    "label_few_decades",
    "new_axis",
    "stacked_axes",
    "with_gaps",
]

# Okabe and Ito's palette: also for colour-blind readers.
BLUE, VERMILLION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6B6B6B"
SERIES = (BLUE, VERMILLION, GREEN, "#CC79A7", "#E69F00", "#56B4E9")


PAPER: dict[Any, float] = {
    "font.size": 8.0,
    "axes.labelsize": 8.0,
    "axes.titlesize": 8.0,
    "axes.linewidth": 0.6,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "legend.fontsize": 7.0,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.0,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}
COLUMN = 3.3
"""Inches: a column of a page with two of them."""
_wide: ContextVar[bool] = ContextVar("wide", default=True)


@contextlib.contextmanager
def in_style(style: str | None) -> Iterator[None]:
    """Draw as for a column of a paper, or as matplotlib is set."""
    if style is None:
        yield
        return
    token = _wide.set(False)
    try:
        with plt.rc_context(PAPER):
            yield
    finally:
        _wide.reset(token)


def new_axis(ax: Axes | None, width: float, height: float) -> Axes:
    """Return `ax`, or where there is none that of a new figure of this size in inches."""
    if ax is not None:
        return ax
    axis: Axes = plt.subplots(figsize=figure_size(width, height), layout="constrained")[1]
    return axis


def figure_size(width: float, height: float) -> tuple[float, float]:
    """Return Inches, scaled to a column where the style is a paper's."""
    scale = 1.0 if _wide.get() else COLUMN / width
    return width * scale, max(height * scale, min(height, 1.6))


def stacked_axes(width: float, *heights: float) -> list[Axes]:
    """Return axes of a new figure, one below the other, in inches."""
    figure = plt.figure(figsize=figure_size(width, sum(heights)), layout="constrained")
    axes: list[Axes] = list(figure.subplots(len(heights), height_ratios=heights))
    return axes


def with_gaps(values: Sequence[float]) -> Any:
    """Return values as an array in which what is not finite leaves a gap."""
    array = np.array(values, dtype=float)
    return np.where(np.isfinite(array), array, np.nan)


def label_few_decades(axis: Axes, *, vertical: bool = False) -> None:
    """Label ticks between powers of ten: some within two decades, within half of one all."""
    low, high = axis.get_ylim() if vertical else axis.get_xlim()
    each = axis.yaxis if vertical else axis.xaxis
    few, fewest = high < 100 * low, high < 3 * low
    if few:
        each.set_major_formatter(lambda v, _: f"{v:g}")
    each.set_minor_formatter(lambda v, _: f"{v:g}" if fewest or (few and _leads(v)) else "")


def _leads(value: float) -> bool:
    """Return whether a tick is a 2 or a 5 of its decade."""
    return f"{value:.0e}"[0] in "25"
