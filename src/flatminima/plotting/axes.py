"""What pictures have in common: colours, a new axis, gaps."""

from __future__ import annotations

from collections.abc import Sequence
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
    "finite",
    "label_few_decades",
    "new_axis",
    "stacked_axes",
]

# Okabe and Ito's palette: told apart also by colour-blind readers.
BLUE, VERMILLION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6B6B6B"
SERIES = (BLUE, VERMILLION, GREEN, "#CC79A7", "#E69F00", "#56B4E9")


def new_axis(ax: Axes | None, width: float, height: float) -> Axes:
    """`ax`, or where there is none that of a new figure of this size in inches."""
    if ax is not None:
        return ax
    axis: Axes = plt.subplots(figsize=(width, height), layout="constrained")[1]
    return axis


def stacked_axes(width: float, *heights: float) -> list[Axes]:
    """Axes of a new figure, one below the other, in inches."""
    figure = plt.figure(figsize=(width, sum(heights)), layout="constrained")
    axes: list[Axes] = list(figure.subplots(len(heights), height_ratios=heights))
    return axes


def finite(values: Sequence[float]) -> Any:
    """Values as an array in which what is not finite leaves a gap."""
    array = np.array(values, dtype=float)
    return np.where(np.isfinite(array), array, np.nan)


def label_few_decades(axis: Axes) -> None:
    """Label ticks between powers of ten: some within two decades, within half of one all."""
    low, high = axis.get_xlim()
    few, fewest = high < 100 * low, high < 3 * low
    if few:
        axis.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axis.xaxis.set_minor_formatter(lambda v, _: f"{v:g}" if fewest or (few and _leads(v)) else "")


def _leads(value: float) -> bool:
    """Whether a tick is a 2 or a 5 of its decade."""
    return f"{value:.0e}"[0] in "25"
