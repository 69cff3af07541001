"""Pictures with points and lines: along a path, over eigenvalues."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from ..algorithms.eigen.result import EigenResult
from ..algorithms.estimators.broadening import is_resolved
from ..algorithms.estimators.density import SpectralDensity
from ..landscape.interpolation import Interpolation
from .axes import BLUE, GREY, SERIES, VERMILLION, new_axis, with_gaps

__all__ = ["draw_density", "draw_eigenvalues", "draw_interpolation"]

STYLES = ("-", "--", ":", "-.")


def draw_interpolation(result: Interpolation, ax: Axes | None) -> Axes:
    """Return the loss at the left, metrics at the right."""
    left = new_axis(ax, 6.0, 3.8)
    alphas = np.array(result.alphas)
    order = np.argsort(alphas)
    names = list(dict.fromkeys(m for c in result.curves.values() for m in c.metrics))
    right = left.twinx() if names else None
    handles = []
    known = [v for c in result.curves.values() for v in c.loss if math.isfinite(v)]
    for style, (label, curve) in zip(STYLES * 9, result.curves.items(), strict=False):
        losses = with_gaps(curve.loss)[order]
        handles += left.plot(
            alphas[order], losses, style, color=BLUE, marker=_marker(losses), label=f"{label} loss"
        )
        for color, name in zip(SERIES[1:] * 9, names, strict=False):
            if right is not None and name in curve.metrics:
                values = with_gaps(curve.metrics[name])[order]
                handles += right.plot(
                    alphas[order], values, style, color=color, label=f"{label} {name}"
                )
    for place, name in ((0.0, "start"), (1.0, "end")):
        left.axvline(place, color=GREY, linewidth=0.8, zorder=0)
        left.annotate(
            name,
            (place, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            color=GREY,
            fontsize="small",
        )
    left.set_xlabel("α")
    left.set_yscale("log" if known and min(known) > 0 else "linear")
    left.set_ylabel("loss", color=BLUE)
    left.tick_params(axis="y", labelcolor=BLUE)
    if right is not None:
        color = VERMILLION if len(names) == 1 else "black"
        right.set_ylabel(", ".join(names), color=color)
        right.ticklabel_format(useOffset=False)
        _widen(right, 0.1)
        right.tick_params(axis="y", labelcolor=color)
    left.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.18),
        ncols=min(len(handles), 4),
        frameon=False,
        fontsize="small",
    )
    return left


def _marker(values: Any) -> str:
    """Return a marker, since points between two gaps would not show as a line."""
    return "." if np.isnan(values).any() else ""


def _widen(axis: Axes, span: float) -> None:
    """Let the axis span this much at least, so that rounding does not look like a change."""
    low, high = axis.get_ylim()
    if high - low < span:
        axis.set_ylim(high - span, high + span / 20)


def draw_density(result: SpectralDensity, ax: Axes | None) -> Axes:
    """Return the density with its error, and what was taken out."""
    axis = new_axis(ax, 6.0, 3.6)
    logarithmic = result.scale == "log"
    points = _places(result)
    values, errors = (part.numpy() for part in result.density(points))
    # What one eigenvalue adds where it is.
    single = 1 / (result.size * result.sigma * math.sqrt(2 * math.pi))
    floor = 0.1 * single
    hidden = floor / 100
    sides = (points < 0, points > 0) if logarithmic else (np.full(len(points), True),)
    for side in sides:
        low, high = (np.maximum(values[side] + sign * errors[side], hidden) for sign in (-2.0, 2.0))
        axis.fill_between(points[side], low, high, color=BLUE, alpha=0.25, linewidth=0)
        axis.plot(points[side], np.maximum(values[side], hidden), color=BLUE, linewidth=1.2)
    taken = result.eigenvalues.numpy()
    if logarithmic:
        taken = taken[np.abs(taken) > result.resolution]
        _logarithmic_both_ways(axis, points, values > floor)
        share = f"cannot be placed: {100 * result.unplaced_mass().value:.3g} %"
        inner = np.abs(points).min()
        axis.axvspan(-inner, inner, color=GREY, alpha=0.2, linewidth=0, label=share)
    else:
        axis.axvline(0, color=GREY, linewidth=0.8, zorder=0)
    if len(taken):
        heights = result.density(taken.tolist())[0].numpy()
        label = "taken out first"
        axis.plot(taken, heights, "v", color=VERMILLION, markersize=5, label=label)
    axis.set_yscale("log")
    axis.set_ylim(floor, 3 * max(float((values + 2 * errors).max()), single))
    axis.set_xlabel("eigenvalue λ")
    axis.set_ylabel("density per decade" if logarithmic else "density")
    if logarithmic or len(taken):
        axis.legend(frameon=False, fontsize="small", loc="upper right")
    return axis


def _places(result: SpectralDensity) -> Any:
    """Return where the density is computed for its picture: close enough to see every Gaussian."""
    nodes = result.nodes[result.weights > 0].numpy()
    values = np.concatenate([nodes, result.eigenvalues.numpy()])
    shifts = result.sigma * np.linspace(-4, 4, 17)
    if result.scale == "linear":
        grid = np.linspace(values.min() + shifts[0], values.max() + shifts[-1], 1001)
        return np.unique(np.concatenate([grid, np.add.outer(values, shifts).reshape(-1)]))
    seen = is_resolved(result.nodes, result.weights, result.complete, result.resolution)
    sizes = np.abs(np.concatenate([result.nodes[seen].numpy(), result.eigenvalues.numpy()]))
    logs = np.log10(sizes[sizes > result.resolution]) if sizes.any() else np.zeros(1)
    low, high = logs.min() - 2 * result.sigma, logs.max() + shifts[-1]
    places = np.linspace(low, high, math.ceil(max(500, 8 * (high - low) / result.sigma)))
    return np.concatenate([-(10.0 ** places[::-1]), 10.0**places])


def _logarithmic_both_ways(axis: Axes, points: Any, shown: Any) -> None:
    """A logarithmic axis on both sides of zero, as far as something is shown there."""
    inner, outer = np.abs(points).min(), np.abs(points).max()
    shown = shown if shown.any() else np.full(len(points), True)
    axis.set_xscale("symlog", linthresh=inner, linscale=0.5)
    left, right = min(points[shown].min(), -inner), max(points[shown].max(), inner)
    axis.set_xlim(left, right)
    decades = np.arange(math.ceil(math.log10(inner)), math.floor(math.log10(outer)) + 1)
    places = 10.0 ** decades[:: -max(1, math.ceil(len(decades) / 4))]
    ticks = np.concatenate([-places, places])
    axis.set_xticks(ticks[(ticks >= left) & (ticks <= right)])
    axis.xaxis.set_minor_locator(NullLocator())


def draw_eigenvalues(result: EigenResult, ax: Axes | None) -> Axes:
    """Return points with their residuals."""
    axis = new_axis(ax, 4.8, 3.4)
    values = result.eigenvalues.numpy()
    axis.errorbar(
        np.arange(1, len(values) + 1),
        values,
        yerr=result.residuals.numpy(),
        fmt="o",
        color=BLUE,
        ecolor=GREY,
        capsize=3,
        markersize=4,
    )
    axis.axhline(0, color=GREY, linewidth=0.8, zorder=0)
    axis.set_xlabel(f"index ({result.which})")
    axis.set_ylabel("eigenvalue")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not result.converged:
        axis.set_title("not converged", color=VERMILLION, fontsize="small")
    return axis
