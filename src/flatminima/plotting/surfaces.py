"""Pictures of surfaces: profiles, filled contours, relief, with a trajectory on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator

from ..errors import ArgumentTypeError, InvalidArgumentError
from ..landscape.surface import Surface
from ..landscape.trajectory.principal import PrincipalResult
from ..support.checks import check_instance, check_number
from .axes import BLUE, GREY, SERIES, VERMILLION, figure_size, new_axis, with_gaps

__all__ = ["KINDS", "check_plane", "draw_surface"]

KINDS = ("contour", "3d")
STYLES = ("-", "--", ":", "-.")
LEVELS = 24
OTHERS = ("random direction", "eigenvector", "gradient", "minus gradient", "towards")
"""How the labels of directions begin that are no principal ones."""
LINE = 36
"""Characters of an axis's label before its unit goes into the next line."""
COLORS = "cividis"
"""Perceptually even, also for colour-blind readers, and dark where the loss is low."""
TIME = "plasma"
NOT_A_NUMBER, INFINITE = "#BDBDBD", "#F7E7E4"


def draw_surface(
    result: Surface,
    ax: Axes | None,
    *,
    kind: str = "contour",
    trajectory: PrincipalResult | None = None,
    limits: tuple[float, float] | None = None,
) -> Axes:
    """Return a profile in one dimension, contours or relief in two."""
    dimensions = len(result.coordinates)
    if dimensions > 2:
        raise InvalidArgumentError(
            f"plot draws surfaces of one and two dimensions; this one has {dimensions}. Take a "
            "slice of its grids, or fewer directions."
        )
    if trajectory is not None:
        if kind == "3d":
            raise InvalidArgumentError(
                'plot(kind="3d") draws no trajectory, which the relief would hide; use '
                'kind="contour", or interactive(result, trajectory=...).'
            )
        check_plane("plot", result, trajectory)
    if limits is not None:
        limits = _checked_limits(limits)
    if dimensions == 1:
        return _profile(result, ax)
    if kind == "3d":
        return _relief(result, ax, limits)
    return _contours(result, ax, trajectory, limits)


def check_plane(call: str, result: object, trajectory: object) -> PrincipalResult:
    """Return `trajectory` when it lies on the surface.

    Raises:
        ArgumentTypeError: it is no result of `principal_components`.
        InvalidArgumentError: it lies on another plane, or around another point.
    """
    advice = "Give what principal_components returns."
    trajectory = check_instance(call, "trajectory", trajectory, PrincipalResult, advice)
    count = len(result.coordinates) if isinstance(result, Surface) else 0
    if not isinstance(result, Surface) or count != 2 or trajectory.coordinates.shape[1] != 2:
        raise InvalidArgumentError(
            "A trajectory is drawn on a surface along its two principal directions; got "
            f"{count} directions and {trajectory.coordinates.shape[1]} components."
        )
    if trajectory.center != "last":
        raise InvalidArgumentError(
            "A trajectory is drawn relative to its last snapshot, the model of the surface; take "
            f"principal_components(..., center='last'), not {trajectory.center!r}."
        )
    # Vectors of the user's own may well be the principal ones.
    if any(label.startswith(OTHERS) for label in result.labels):
        raise InvalidArgumentError(
            "A trajectory lies on the surface along its principal directions; this one is of "
            f"{' and '.join(result.labels)}. Take surface(objective, "
            "principal.directions(objective), extent=principal.extents())."
        )
    return trajectory


def _checked_limits(limits: object) -> tuple[float, float]:
    if not isinstance(limits, Sequence) or isinstance(limits, str) or len(limits) != 2:
        raise ArgumentTypeError(
            f"The 'limits' argument of plot must be (least, largest) loss; got {limits!r}."
        )
    low, high = (check_number("plot", "limits", end) for end in limits)
    if not low < high:
        raise InvalidArgumentError(
            f"The 'limits' argument of plot must be the least and then the largest loss; got "
            f"{limits!r}."
        )
    return low, high


def _axis_label(result: Surface, number: int) -> str:
    label, unit = result.labels[number], f"({result.units[number]})"
    return f"{label} {unit}" if len(label) + len(unit) < LINE else f"{label}\n{unit}"


def _profile(result: Surface, ax: Axes | None) -> Axes:
    """Return the loss at the left, metrics at the right, as of an interpolation."""
    left = new_axis(ax, 6.0, 3.6)
    places = np.array(result.coordinates[0])
    names = list(dict.fromkeys(m for grid in result.grids.values() for m in grid.metrics))
    right = left.twinx() if names else None
    handles, least = [], math.inf
    for style, (label, grid) in zip(STYLES * 9, result.grids.items(), strict=False):
        losses = with_gaps(grid.loss.tolist())
        least = min(least, float(np.nanmin(losses)))
        handles += left.plot(places, losses, style, color=BLUE, label=f"{label} loss")
        for color, name in zip(SERIES[1:] * 9, names, strict=False):
            if right is not None and name in grid.metrics:
                values = with_gaps(grid.metrics[name].tolist())
                handles += right.plot(places, values, style, color=color, label=f"{label} {name}")
    left.axvline(0, color=GREY, linewidth=0.8, zorder=0)
    left.set_xlabel(_axis_label(result, 0))
    left.set_yscale("log" if least > 0 else "linear")
    left.set_ylabel("loss", color=BLUE if right is not None else "black")
    if right is not None:
        right.set_ylabel(", ".join(names), color=VERMILLION if len(names) == 1 else "black")
    if len(handles) > 1:
        left.legend(
            handles=handles,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.18),
            ncols=min(len(handles), 4),
            frameon=False,
            fontsize="small",
        )
    return left


def _levels(values: Any, limits: tuple[float, float] | None = None) -> tuple[Any, Any]:
    """Levels and a norm: logarithmic where the values are positive and span a factor of ten."""
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    low, high = limits or (low, high)
    if low == high:
        low, high = low - 0.5, high + 0.5
    if low > 0 and high > 10 * low:
        return np.geomspace(low, high * (1 + 1e-9), LEVELS), LogNorm(low, high)
    return MaxNLocator(LEVELS).tick_values(low, high), Normalize(low, high)


def _beyond(values: Any, levels: Any) -> str:
    """On which sides of the levels there are values, which then have the colour of the end."""
    known = values[np.isfinite(values)]
    below, above = (known < levels[0]).any(), (known > levels[-1]).any()
    return {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[
        (int(below), int(above))
    ]


def _contours(
    result: Surface,
    ax: Axes | None,
    trajectory: PrincipalResult | None,
    limits: tuple[float, float] | None,
) -> Axes:
    axis = new_axis(ax, 5.4 if trajectory is None else 6.4, 4.2)
    x, y = (np.array(values) for values in result.coordinates)
    # The first direction is the horizontal axis, which is the second dimension of a picture.
    values = result.loss.numpy().T
    levels, norm = _levels(values, limits)
    masked = np.ma.masked_invalid(values)
    filled = axis.contourf(
        x, y, masked, levels=levels, norm=norm, cmap=COLORS, extend=_beyond(values, levels)
    )
    axis.contour(x, y, masked, levels=levels[::3], norm=norm, colors="white", linewidths=0.4)
    logarithmic = isinstance(norm, LogNorm)
    bar = axis.figure.colorbar(
        filled, ax=axis, label="loss", ticks=LogLocator(subs=(1, 2, 5)) if logarithmic else None
    )
    if logarithmic:
        bar.ax.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
        bar.ax.minorticks_off()
    handles = _not_finite(axis, x, y, values)
    axis.plot(0, 0, "*", color="white", markeredgecolor="black", markersize=11, zorder=5)
    if trajectory is not None:
        _path(axis, trajectory)
    if handles:
        axis.legend(handles=handles, loc="upper right", fontsize="small")
    for each in (axis.xaxis, axis.yaxis):
        each.set_major_locator(MaxNLocator(5))
    axis.set_xlabel(_axis_label(result, 0))
    axis.set_ylabel(_axis_label(result, 1))
    return axis


def _not_finite(axis: Axes, x: Any, y: Any, values: Any) -> list[Patch]:
    """Return cells around points that are NaN or infinite, in special colours and hatches."""
    handles = []
    for which, color, label in (
        (np.isnan(values), NOT_A_NUMBER, "NaN"),
        (np.isinf(values), INFINITE, "infinite"),
    ):
        if not which.any():
            continue
        edges = [np.concatenate([[v[0]], (v[1:] + v[:-1]) / 2, [v[-1]]]) for v in (x, y)]
        cells = np.ma.masked_where(~which, np.ones_like(values))
        axis.pcolor(*edges, cells, cmap=_single(color), hatch="///", zorder=3, edgecolor=GREY, lw=0)
        handles.append(Patch(facecolor=color, hatch="///", edgecolor=GREY, label=label))
    return handles


def _single(color: str) -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap([color])


def _path(axis: Axes, trajectory: PrincipalResult) -> None:
    """The snapshots, with time in colour."""
    points = trajectory.coordinates.double().numpy()
    across, upwards = axis.get_xlim(), axis.get_ylim()
    axis.plot(*points.T, color="white", linewidth=1.2, zorder=4)
    marks = axis.scatter(
        points[:, 0],
        points[:, 1],
        c=list(trajectory.steps),
        cmap=TIME,
        s=14,
        edgecolors="white",
        linewidths=0.4,
        zorder=5,
    )
    axis.figure.colorbar(marks, ax=axis, label="training step")
    # What lies beyond the surface stays in sight.
    axis.set_xlim(min(across[0], points[:, 0].min()), max(across[1], points[:, 0].max()))
    axis.set_ylim(min(upwards[0], points[:, 1].min()), max(upwards[1], points[:, 1].max()))


def _relief(result: Surface, ax: Axes | None, limits: tuple[float, float] | None) -> Axes:
    """Return the loss as height, on a logarithmic scale where its colours would be."""
    axis: Any = ax
    if axis is None:
        figure = plt.figure(figsize=figure_size(6.0, 4.8), layout="constrained")
        axis = figure.add_subplot(projection="3d")
    elif not hasattr(axis, "plot_surface"):
        raise InvalidArgumentError(
            'plot(kind="3d") needs an axis with projection="3d", as from '
            'plt.figure().add_subplot(projection="3d").'
        )
    x, y = np.meshgrid(*(np.array(values) for values in result.coordinates), indexing="ij")
    values = result.loss.numpy()
    norm = _levels(values, limits)[1]
    logarithmic = isinstance(norm, LogNorm)
    # Gaps where it is not finite.
    heights = np.where(np.isfinite(values), values, np.nan)
    heights = np.log10(heights) if logarithmic else heights
    ends = (math.log10(v) if logarithmic else v for v in (norm.vmin, norm.vmax))
    scale = dict(zip(("vmin", "vmax"), ends, strict=True))
    axis.plot_surface(
        x, y, heights, cmap=COLORS, linewidth=0, antialiased=True, rcount=120, ccount=120, **scale
    )
    here = float(heights[result.center])
    axis.plot([0], [0], [here], "*", color=VERMILLION, markersize=10, zorder=10)
    for each in (axis.xaxis, axis.yaxis, axis.zaxis):
        each.set_major_locator(MaxNLocator(5))
    axis.tick_params(labelsize="small", pad=1)
    axis.set_xlabel(_axis_label(result, 0), labelpad=8, fontsize="small")
    axis.set_ylabel(_axis_label(result, 1), labelpad=8, fontsize="small")
    axis.set_zlabel("log₁₀ loss" if logarithmic else "loss", labelpad=4, fontsize="small")
    axis.view_init(elev=30, azim=-60)
    # Room for the labels, which lie outside of the box.
    axis.set_box_aspect((1, 1, 0.75), zoom=0.82)
    made: Axes = axis
    return made
