"""Drawing: the one file that imports matplotlib."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from .comparison import Comparison
from .eigen.result import EigenResult
from .errors import ArgumentTypeError
from .estimators.broadening import resolved
from .estimators.density import SpectralDensity
from .landscape.interpolation import Interpolation
from .measures.layerwise import LayerwiseResult
from .measures.random_sharpness import RandomSharpnessResult
from .report import SharpnessReport
from .results import Result

__all__ = ["plot"]

# Okabe and Ito's palette: told apart also by colour-blind readers.
BLUE, VERMILLION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6B6B6B"
SERIES = (BLUE, VERMILLION, GREEN, "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", ":", "-.")


def plot(result: Result, ax: Axes | None = None) -> Axes:
    """Draw a result.

    An `Interpolation` is drawn as in Keskar et al. (2017): the loss on a logarithmic axis at the
    left, metrics at the right, the objective's own data solid and others dashed, the two models
    marked. A `SpectralDensity` is drawn as in Ghorbani et al. (2019): both signs, the density on a
    logarithmic axis down to a tenth of what a single eigenvalue adds, two standard errors around
    it, and the eigenvalues that were taken out marked; with `scale="log"` the eigenvalues are on
    a logarithmic axis too, whose middle is what cannot be told from zero. An `EigenResult`, a
    `RandomSharpnessResult`, a `LayerwiseResult`, a `SharpnessReport`
    and a `Comparison` are drawn as points and bars with their errors.

    Args:
        result: what to draw.
        ax: where; a new figure unless told.

    Returns:
        The axis with the loss, or the only one; `ax.figure.savefig(...)` writes it. Nothing is
        shown on a screen.

    Raises:
        ArgumentTypeError: there is no picture for this kind of object.

    Examples:
        >>> import matplotlib, torch, flatminima as fm
        >>> matplotlib.use("Agg")
        >>> result = fm.lanczos(fm.MatrixOperator(torch.diag(torch.arange(1.0, 9.0))), k=3)
        >>> fm.plot(result).get_ylabel()
        'eigenvalue'
    """
    if ax is not None and not isinstance(ax, Axes):
        raise ArgumentTypeError(
            f"The 'ax' argument of plot must be a matplotlib axis; got {type(ax).__name__}."
        )
    return _draw(result, ax)


def _axis(ax: Axes | None, width: float, height: float) -> Axes:
    if ax is not None:
        return ax
    axis: Axes = plt.subplots(figsize=(width, height), layout="constrained")[1]
    return axis


@functools.singledispatch
def _draw(result: Any, ax: Axes | None) -> Axes:  # noqa: ARG001
    raise ArgumentTypeError(
        "plot draws an Interpolation, a SpectralDensity, an EigenResult, a "
        "RandomSharpnessResult, a LayerwiseResult, a "
        f" SharpnessReport or a Comparison; got {type(result).__name__}."
    )


@_draw.register
def _(result: Interpolation, ax: Axes | None) -> Axes:
    left = _axis(ax, 6.0, 3.8)
    alphas = np.array(result.alphas)
    order = np.argsort(alphas)
    names = list(dict.fromkeys(m for c in result.curves.values() for m in c.metrics))
    right = left.twinx() if names else None
    handles = []
    finite = [v for c in result.curves.values() for v in c.loss if math.isfinite(v)]
    for style, (label, curve) in zip(STYLES * 9, result.curves.items(), strict=False):
        losses = _finite(curve.loss)[order]
        handles += left.plot(
            alphas[order], losses, style, color=BLUE, marker=_marker(losses), label=f"{label} loss"
        )
        for color, name in zip(SERIES[1:] * 9, names, strict=False):
            if right is not None and name in curve.metrics:
                values = _finite(curve.metrics[name])[order]
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
    left.set_yscale("log" if finite and min(finite) > 0 else "linear")
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


def _finite(values: Sequence[float]) -> Any:
    """Values as an array in which what is not finite leaves a gap."""
    array = np.array(values, dtype=float)
    return np.where(np.isfinite(array), array, np.nan)


def _marker(values: Any) -> str:
    """Points between two gaps would not show as a line."""
    return "." if np.isnan(values).any() else ""


def _leads(value: float) -> bool:
    """Whether a tick is a 2 or a 5 of its decade."""
    return f"{value:.0e}"[0] in "25"


def _widen(axis: Axes, span: float) -> None:
    """Let the axis span this much at least, so that rounding does not look like a change."""
    low, high = axis.get_ylim()
    if high - low < span:
        axis.set_ylim(high - span, high + span / 20)


@_draw.register
def _(result: SpectralDensity, ax: Axes | None) -> Axes:
    axis = _axis(ax, 6.0, 3.6)
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
    """Where the density is computed for its picture: close enough to see every Gaussian."""
    nodes = result.nodes[result.weights > 0].numpy()
    values = np.concatenate([nodes, result.eigenvalues.numpy()])
    shifts = result.sigma * np.linspace(-4, 4, 17)
    if result.scale == "linear":
        grid = np.linspace(values.min() + shifts[0], values.max() + shifts[-1], 1001)
        return np.unique(np.concatenate([grid, np.add.outer(values, shifts).reshape(-1)]))
    seen = resolved(result.nodes, result.weights, result.complete, result.resolution)
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


@_draw.register
def _(result: EigenResult, ax: Axes | None) -> Axes:
    axis = _axis(ax, 4.8, 3.4)
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


@_draw.register
def _(result: RandomSharpnessResult, ax: Axes | None) -> Axes:
    axis = _axis(ax, 6.0, 1.0 + 0.28 * len(result.tensors))
    places = np.arange(len(result.tensors))
    largest = _finite([t.value for t in result.tensors])
    axis.barh(places, largest, color=BLUE, height=0.6, label="largest")
    axis.errorbar(
        _finite([t.mean for t in result.tensors]),
        places,
        xerr=_finite([t.standard_deviation for t in result.tensors]),
        fmt="o",
        color=VERMILLION,
        markersize=3,
        capsize=2,
        label="mean ± std",
    )
    axis.set_yticks(places, [t.name for t in result.tensors], fontsize="small")
    axis.invert_yaxis()
    axis.set_xlabel(f"|L(θ + δ) − L(θ)| / ε, ε = {result.epsilon:g}, {result.samples} samples")
    axis.legend(frameon=False, fontsize="small")
    return axis


@_draw.register
def _(result: LayerwiseResult, ax: Axes | None) -> Axes:
    axis = _axis(ax, 6.0, 1.1 + 0.4 * len(result.layers))
    places = np.arange(len(result.layers))
    bars = (
        ("trace", [(v.trace, v.trace_error) for v in result.layers], BLUE, -0.19),
        (
            "largest eigenvalue",
            [(v.eigenvalue, v.residual) for v in result.layers],
            VERMILLION,
            0.19,
        ),
    )
    for label, pairs, color, offset in bars:
        values, errors = (_finite(column) for column in zip(*pairs, strict=True))
        axis.barh(places + offset, values, 0.36, xerr=errors, color=color, ecolor=GREY, label=label)
    values = [v for layer in result.layers for v in (layer.trace, layer.eigenvalue)]
    sizes = [abs(v) for v in values if v != 0 and math.isfinite(v)]
    # Layers differ by orders of magnitude, and some may be negative.
    if sizes and min(values) > 0:
        axis.set_xscale("log")
        axis.set_xlim(left=min(sizes) / 3)
    elif sizes:
        axis.set_xscale("symlog", linthresh=max(min(sizes), 1e-3 * max(sizes)))
        axis.axvline(0, color=GREY, linewidth=0.8)
    labels = [layer.name or "(own)" for layer in result.layers]
    axis.set_yticks(places, labels, fontsize="small")
    axis.invert_yaxis()
    axis.set_ylabel("module")
    axis.set_xlabel("of the Hessian's diagonal block")
    axis.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize="small"
    )
    return axis


@_draw.register
def _(result: SharpnessReport, ax: Axes | None) -> Axes:
    lines = result.measurements()
    axis = _axis(ax, 7.0, 0.8 + 0.32 * len(lines))
    values = _finite([line.value for line in lines])
    errors = _finite([line.error or 0.0 for line in lines])
    colors = [VERMILLION if v < 0 else BLUE for v in values]
    places = np.arange(len(lines))
    # Measures have units of their own: sizes on a logarithmic axis, the sign in the colour.
    sizes = np.abs(values)
    low = np.minimum(errors, sizes * (1 - 1e-9))
    spread = np.array([low, errors]) if any(errors) else None
    axis.barh(places, sizes, color=colors, xerr=spread, ecolor=GREY, height=0.6)
    axis.set_xscale("log")
    labels = [f"−({line.name})" if line.value < 0 else line.name for line in lines]
    axis.set_yticks(places, labels, fontsize="small")
    axis.invert_yaxis()
    axis.set_xlabel("value (each measure in its own unit)")
    axis.set_title(
        f"{result.model}: {result.parameters} parameters, {result.examples} examples",
        fontsize="medium",
    )
    return axis


@_draw.register
def _(result: Comparison, ax: Axes | None) -> Axes:
    shown = [
        (i, name)
        for i, name in enumerate(result.measures)
        if all(0 < result.ratio_of_means[label][i] < math.inf for label in result.labels)
    ]
    axis = _axis(ax, 7.0, 1.2 + 0.36 * len(shown))
    places = np.arange(len(shown))
    others = result.labels[1:]
    thickness = 0.7 / len(others)
    for number, (color, label) in enumerate(zip(SERIES * 9, others, strict=False)):
        ratios = [result.ratio_of_means[label][i] for i, _ in shown]
        offset = (number - (len(others) - 1) / 2) * thickness
        # Bars grow from 1, where both models are alike.
        axis.barh(
            places + offset, np.array(ratios) - 1, thickness, left=1, color=color, label=label
        )
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yticks(places, [name for _, name in shown], fontsize="small")
    axis.invert_yaxis()
    axis.set_xlabel(f"ratio to {result.labels[0]} (logarithmic)")
    low, high = axis.get_xlim()
    few = high / low < 30
    axis.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axis.xaxis.set_minor_formatter(lambda v, _: f"{v:g}" if few and _leads(v) else "")
    axis.legend(frameon=False, fontsize="small")
    return axis
