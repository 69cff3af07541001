"""Pictures with bars: of measures, of modules, of parameter tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator

from ..algorithms.estimators.result import TraceResult
from ..measures.gradient_norm import GradientNormResult
from ..measures.layerwise import LayerwiseResult
from ..measures.random_sharpness import RandomSharpnessResult
from ..measures.relative_flatness import RelativeFlatnessResult
from ..report.comparison import Comparison
from ..report.result import SharpnessReport
from .axes import (
    BLUE,
    GREEN,
    GREY,
    SERIES,
    VERMILLION,
    label_few_decades,
    new_axis,
    stacked_axes,
    with_gaps,
)

__all__ = [
    "draw_comparison",
    "draw_gradient_norm",
    "draw_layers",
    "draw_random_sharpness",
    "draw_relative_flatness",
    "draw_report",
    "draw_trace",
]

MODULES = 20
"""With bars in a picture, at most."""
LONGEST = 36
"""Characters of a module's name."""
WHOLE = "(all parameters)"
"""In the place of a module, where an operator knows of none."""


def draw_random_sharpness(result: RandomSharpnessResult, ax: Axes | None) -> Axes:
    """Return the largest of each tensor, its mean and spread."""
    axis = new_axis(ax, 6.0, 1.0 + 0.28 * len(result.tensors))
    places = np.arange(len(result.tensors))
    largest = with_gaps([t.value for t in result.tensors])
    axis.barh(places, largest, color=BLUE, height=0.6, label="largest")
    axis.errorbar(
        with_gaps([t.mean for t in result.tensors]),
        places,
        xerr=with_gaps([t.standard_deviation for t in result.tensors]),
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


def draw_layers(result: LayerwiseResult, ax: Axes | None) -> Axes:
    """Trace and largest eigenvalue of each module."""
    axis = new_axis(ax, 6.0, 1.1 + 0.4 * len(result.layers))
    layers = result.layers
    traces = Column("trace", [(v.trace, v.trace_error) for v in layers], BLUE)
    eigenvalues = [(v.eigenvalue, v.residual) for v in layers]
    top = Column("largest eigenvalue", eigenvalues, VERMILLION)
    _module_bars(axis, [layer.name for layer in layers], [traces, top])
    axis.set_ylabel("module")
    axis.set_xlabel("of the Hessian's diagonal block")
    return axis


def draw_gradient_norm(result: GradientNormResult, ax: Axes | None) -> Axes:
    """Return the norm of the gradient by each parameter tensor."""
    axis = new_axis(ax, 6.0, 1.0 + 0.28 * len(result.tensors))
    norms = Column("", [(norm, 0.0) for norm in result.tensors.values()], BLUE)
    _module_bars(axis, list(result.tensors), [norms])
    axis.set_xlabel("gradient norm by the parameter")
    return axis


def draw_relative_flatness(result: RelativeFlatnessResult, ax: Axes | None) -> Axes:
    """Draw relative flatness of each weight matrix."""
    axis = new_axis(ax, 6.0, 1.0 + 0.28 * len(result.layers))
    values = [(layer.value, layer.standard_error) for layer in result.layers]
    _module_bars(axis, [layer.name for layer in result.layers], [Column("", values, BLUE)])
    axis.set_xlabel("relative flatness (larger is sharper)")
    return axis


def draw_trace(result: TraceResult, ax: Axes | None) -> Axes:
    """Return what each module has of the trace, or the whole where no modules are known."""
    traces = {"": result}
    shown = _shown(traces)
    axis = new_axis(ax, 6.0, 1.0 + 0.28 * len(shown))
    _draw_traces(axis, traces, shown)
    return axis


class Column(NamedTuple):
    """A number of each module, with the colour of its bars, and its name where it needs one."""

    label: str
    pairs: Sequence[tuple[float, float]]
    color: str


def _module_bars(axis: Axes, names: Sequence[str], columns: Sequence[Column]) -> None:
    """For each module a bar of every column, with its error."""
    places = np.arange(len(names))
    thickness = 0.76 / len(columns)
    for number, (label, pairs, color) in enumerate(columns):
        values, errors = (with_gaps(part) for part in zip(*pairs, strict=True))
        at = places + (number - (len(columns) - 1) / 2) * thickness
        height = 0.95 * thickness
        axis.barh(at, values, height, xerr=errors, color=color, ecolor=GREY, label=label)
    numbers = [value for column in columns for value, _ in column.pairs]
    sizes = [abs(v) for v in numbers if v != 0 and math.isfinite(v)]
    # Layers differ by orders of magnitude, and some may be negative.
    if sizes and min(numbers) > 0:
        axis.set_xscale("log")
        axis.set_xlim(left=min(sizes) / 3)
        label_few_decades(axis)
    elif sizes:
        least = math.floor(math.log10(max(min(sizes), 1e-3 * max(sizes))))
        axis.set_xscale("symlog", linthresh=10.0**least, linscale=0.5)
        most = math.ceil(math.log10(max(sizes))) + 1
        # The least lies close to zero where there are many.
        last = least - 1 if most - least <= 3 else least
        decades = 10.0 ** np.arange(most, last, -math.ceil((most - least) / 4))
        axis.xaxis.set_major_locator(FixedLocator([*-decades, 0.0, *decades]))
        axis.axvline(0, color=GREY, linewidth=0.8)
    axis.set_yticks(places, _short(names), fontsize="small")
    # The first at the top, and little room around many.
    axis.set_ylim(len(names) - 0.4, -0.6)
    if columns[0].label:
        axis.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize="small"
        )


def _short(names: Sequence[str]) -> list[str]:
    """Return long names by their ends, as long as these tell them apart."""
    short = []
    for name in names:
        end = name[1 - LONGEST :]
        # From the beginning of one of its parts, where there is one.
        short.append(name if len(name) <= LONGEST else f"…{end[end.find('.') + 1 :]}")
    chosen = short if len(set(short)) == len(set(names)) else names
    return [name or "(own)" for name in chosen]


def _shown(traces: Mapping[str, TraceResult]) -> list[str]:
    """The modules with the largest traces by any of the operators, in the order of the model."""
    sizes: dict[str, float] = {}
    for found in traces.values():
        for block in found.modules:
            size = abs(block.value) if math.isfinite(block.value) else 0.0
            sizes[block.name] = max(size, sizes.get(block.name, 0.0))
    largest = sorted(sizes, key=lambda name: -sizes[name])[:MODULES]
    return [name for name in sizes if name in largest] or [WHOLE]


def _draw_traces(axis: Axes, traces: Mapping[str, TraceResult], shown: Sequence[str]) -> None:
    columns = []
    # Vermillion is for negative numbers.
    for (label, found), color in zip(traces.items(), (BLUE, GREEN), strict=False):
        blocks = {b.name: (b.value, b.standard_error) for b in found.modules}
        blocks[WHOLE] = found.value, found.standard_error
        missing = math.nan, math.nan
        columns.append(Column(label, [blocks.get(name, missing) for name in shown], color))
    _module_bars(axis, shown, columns)
    count = max(len(found.modules) for found in traces.values())
    if count == 0:
        axis.set_xlabel("trace")
        return
    axis.set_ylabel("module")
    rest = f"\n(the {len(shown)} largest of {count} modules)" if count > len(shown) else ""
    axis.set_xlabel(f"trace of the module's diagonal block{rest}")


def draw_report(result: SharpnessReport, ax: Axes | None) -> Axes:
    """Return a bar for each measure; below, on a new figure, the traces module by module."""
    lines = result.measurements()
    known = {"Hessian": result.trace, "Gauss–Newton matrix": result.gauss_newton_trace}
    traces = {name: found for name, found in known.items() if found is not None}
    shown = _shown(traces)
    heights = 0.8 + 0.32 * len(lines), 1.1 + 0.2 * len(shown) * len(traces)
    if ax is None and len(shown) > 1:
        axis, below = stacked_axes(7.0, *heights)
        _draw_traces(below, traces, shown)
    else:
        axis = new_axis(ax, 7.0, heights[0])
    values = with_gaps([line.value for line in lines])
    errors = with_gaps([line.error or 0.0 for line in lines])
    colors = [VERMILLION if v < 0 else BLUE for v in values]
    places = np.arange(len(lines))
    # Measures have different units: sizes on a logarithmic axis, the sign in the colour.
    sizes = np.abs(values)
    low = np.minimum(errors, sizes * (1 - 1e-9))
    spread = np.array([low, errors]) if any(errors) else None
    axis.barh(places, sizes, color=colors, xerr=spread, ecolor=GREY, height=0.6)
    axis.set_xscale("log")
    labels = [f"−({line.name})" if line.value < 0 else line.name for line in lines]
    axis.set_yticks(places, labels, fontsize="small")
    axis.invert_yaxis()
    axis.set_xlabel("value (each measure in its own unit)")
    label_few_decades(axis)
    axis.set_title(
        f"{result.model}: {result.parameters} parameters, {result.examples} examples",
        fontsize="medium",
    )
    return axis


def draw_comparison(result: Comparison, ax: Axes | None) -> Axes:
    """Return ratios to the first label."""
    shown = [
        (i, name)
        for i, name in enumerate(result.measures)
        if all(0 < result.ratio_of_means[label][i] < math.inf for label in result.labels)
    ]
    axis = new_axis(ax, 7.0, 1.2 + 0.36 * len(shown))
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
    axis.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    label_few_decades(axis)
    axis.legend(frameon=False, fontsize="small")
    return axis
