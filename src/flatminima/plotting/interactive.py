"""`interactive()`: a page with a surface to turn around, in one file that needs no network."""

from __future__ import annotations

import html
import math
import os
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator

from ..errors import ArgumentTypeError, InvalidArgumentError
from ..landscape.interpolation import Interpolation
from ..landscape.surface import Surface
from ..landscape.trajectory.path_losses import TrajectoryLosses
from ..landscape.trajectory.principal import PrincipalResult
from ..results import Result
from ..support.checks import check_instance
from .axes import GREY, SERIES, VERMILLION
from .surfaces import check_plane

__all__ = ["interactive"]

COLORS, TIME = "Cividis", "Plasma"
DASHES = ("solid", "dash", "dot", "dashdot")
# Plotly's own button to share a picture would send it to a server.
CONFIG = {"displaylogo": False, "responsive": True, "showSendToCloud": False, "plotlyServerURL": ""}
# The browser is set to ask no server for anything; the rest is in the page.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; \
img-src data: blob:; font-src data:; worker-src blob:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
html, body {{ height: 100%; margin: 0; background: white; color: #222; }}
body {{ display: flex; flex-direction: column; font: 14px/1.4 system-ui, sans-serif; }}
#picture {{ flex: 1 1 0; min-height: 320px; }}
#picture > div {{ height: 100%; }}
#notes {{ order: 1; margin: 0; padding: 0 1.2em 0.6em; color: #555; font-size: 12px; }}
</style>
</head>
<body>
<p id="notes">{notes}</p>
<div id="picture">{picture}</div>
</body>
</html>
"""


class _Page(str):
    """A page that a notebook shows instead of printing five million characters."""

    def __repr__(self) -> str:
        return f"<interactive page, {len(self) / 1e6:.1f} MB of HTML>"

    def _repr_html_(self) -> str:
        page = html.escape(str(self))
        look = 'title="interactive picture" style="width:100%;height:560px;border:0"'
        return f'<iframe srcdoc="{page}" {look}></iframe>'


def interactive(
    result: Result,
    path: str | os.PathLike[str] | None = None,
    *,
    trajectory: PrincipalResult | None = None,
    losses: TrajectoryLosses | None = None,
    title: str | None = None,
) -> str:
    """Return a page with a picture to turn, zoom and read off, which opens without a network.

    A `Surface` of two directions is a relief, and at the press of a button a map. Height and colour
    are logarithmic where all losses are positive and span more than a factor of ten, with ticks
    that are losses. Losses that are NaN or infinite leave gaps, marked in two colours; the page
    says how many. A `Surface` of one direction and an `Interpolation` are lines.

    The page holds the plotly library itself, some five megabytes, and forbids the browser to ask
    any server for anything. It needs an extra: `pip install "flatminima[interactive]"`.

    Args:
        result: a surface of one or two directions, or an interpolation.
        path: a file to write it to as well, all of it or nothing.
        trajectory: what `principal_components` returned, on a surface of its two directions around
            its centre; the snapshots are coloured by the training step.
        losses: what `path_losses` returned for it, to draw the snapshots at their true losses; else
            they are drawn at the height of the surface.
        title: above the picture and of the page.

    Returns:
        The page, as HTML. At the end of a cell of a notebook it is shown.

    Raises:
        ArgumentTypeError: there is no page for this kind of object.
        InvalidArgumentError: plotly is not installed, the surface has more than two dimensions, or
            the trajectory is not one of its two directions.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = torch.eye(2), torch.zeros(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> page = fm.interactive(fm.surface(objective, torch.eye(2), points=5))
        >>> page[:15], "</html>" in page
        ('<!DOCTYPE html>', True)
    """
    if not isinstance(result, (Surface, Interpolation)):
        raise ArgumentTypeError(
            f"interactive has no page for a {type(result).__name__}; it takes a Surface or an "
            "Interpolation. plot() draws other results."
        )
    for name, given, kinds in (("path", path, (str, os.PathLike)), ("title", title, (str,))):
        if given is not None and not isinstance(given, kinds):
            raise ArgumentTypeError(
                f"The {name!r} argument of interactive must be a string; got {given!r}."
            )
    dimensions = len(result.coordinates) if isinstance(result, Surface) else 1
    if dimensions > 2:
        raise InvalidArgumentError(
            f"interactive draws surfaces of one and two dimensions; this one has {dimensions}. "
            "Take a slice of its grids, or fewer directions."
        )
    if trajectory is not None or losses is not None:
        _check_trajectory(result, trajectory, losses)
    go, to_html = _plotly()
    if isinstance(result, Surface) and dimensions == 2:
        heading = title or "Loss surface"
        figure, notes = _relief(go, result, trajectory, losses)
    else:
        heading = title or ("Loss profile" if isinstance(result, Surface) else "Loss along a path")
        figure, notes = _lines(go, result)
    figure.update_layout(
        title={"text": _text(heading), "x": 0.02, "y": 0.97},
        template="plotly_white",
        margin={"l": 10, "r": 10, "t": 70, "b": 10},
        font={"family": "system-ui, sans-serif"},
    )
    parts = {"include_plotlyjs": True, "include_mathjax": False, "full_html": False}
    size = {"default_width": "100%", "default_height": "100%"}
    picture = to_html(figure, config=CONFIG, div_id="flatminima", **parts, **size)
    said = " ".join(html.escape(note) for note in (*notes, result.outcome.value, *result.notes))
    page = _Page(PAGE.format(title=html.escape(heading), picture=picture, notes=said))
    if path is not None:
        _write(Path(path), page)
    return page


def _plotly() -> tuple[Any, Any]:
    try:
        import plotly.graph_objects as go
        from plotly.io import to_html
    except ImportError as error:
        raise InvalidArgumentError(
            'interactive needs plotly, which is an extra: pip install "flatminima[interactive]".'
        ) from error
    return go, to_html


def _check_trajectory(result: object, trajectory: object, losses: object) -> None:
    call = "interactive"
    given = check_plane(call, result, trajectory)
    if losses is not None:
        advice = "Give what path_losses returns."
        if check_instance(call, "losses", losses, TrajectoryLosses, advice).steps != given.steps:
            raise InvalidArgumentError("The losses= of interactive are of another trajectory.")


def _write(path: Path, page: str) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(page, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _text(words: str) -> str:
    """Return words that plotly shows as they are: it reads tags, and %{} in what hovers."""
    return html.escape(words, quote=False).replace("%{", "% {")


def _titled(words: str) -> dict[str, Any]:
    return {"title": {"text": words}}


def _known(values: Any, *, positive: bool = False) -> list[Any]:
    """Return nested lists of numbers, None where there is nothing to draw."""
    shown: Any = np.where(np.isfinite(values) & ((values > 0) | (not positive)), values, None)
    return list(shown.tolist())


def _is_logarithmic(values: Any) -> bool:
    known = values[np.isfinite(values)]
    return bool(known.size and known.min() > 0 and known.max() > 10 * known.min())


def _ticks(values: Any) -> list[float]:
    """Return some losses to label a logarithmic axis with."""
    known = values[np.isfinite(values)]
    low, high = float(known.min()), float(known.max())
    subs = (1, 2, 5) if high < 1e3 * low else (1,)
    ticks = LogLocator(subs=subs, numticks=9).tick_values(low, high)
    inside = [float(t) for t in ticks if low <= t <= high]
    return inside or [low, high]


def _relief(
    go: Any,
    result: Surface,
    trajectory: PrincipalResult | None,
    losses: TrajectoryLosses | None,
) -> tuple[Any, list[str]]:
    """Draw relief and map of the same losses, one of them hidden, and what to say about them."""
    x, y = (list(values) for values in result.coordinates)
    # The first direction is the horizontal axis, which is the second dimension of a picture.
    values = result.loss.double().cpu().numpy().T
    logarithmic = _is_logarithmic(values)
    axes = [f"{n} ({u})" for n, u in zip(result.labels, result.units, strict=True)]
    colors = np.full_like(values, np.nan)
    finite = np.isfinite(values)
    colors[finite] = np.log10(values[finite]) if logarithmic else values[finite]
    bar: dict[str, Any] = {**_titled("loss"), "len": 0.8, "thickness": 14}
    scale = _titled("loss")
    if logarithmic:
        marks = _ticks(values)
        names = [f"{mark:g}" for mark in marks]
        bar |= {"tickvals": [math.log10(mark) for mark in marks], "ticktext": names}
        scale |= {"type": "log", "tickvals": marks, "ticktext": names}
    hover = "".join(
        f"{_text(label)}: %{{{axis}:.4g}} {_text(unit)}<br>"
        for label, unit, axis in zip(result.labels, result.units, "xy", strict=True)
    )
    shown = [result.loss, *result.metrics.values()]
    named = enumerate(["loss", *result.metrics])
    hover += "<br>".join(f"{_text(n)}: %{{customdata[{i}]:.5g}}" for i, n in named)
    custom = np.stack([v.double().cpu().numpy().T for v in shown], axis=-1)
    common = {
        "x": x,
        "y": y,
        "customdata": _known(custom),
        "hovertemplate": hover + "<extra></extra>",
        "colorscale": COLORS,
        "colorbar": bar,
    }
    light = {"ambient": 0.75, "diffuse": 0.6, "specular": 0.05}
    solid = [go.Surface(z=_known(values), surfacecolor=_known(colors), lighting=light, **common)]
    flat = [go.Contour(z=_known(colors), ncontours=24, line={"width": 0.4}, **common)]
    notes: list[str] = []

    def add(points: Any, heights: Any, name: str, hover: str, look: str, **settings: Any) -> None:
        """The same points on the relief and on the map; `look` is their shape on the map."""
        place = {"x": _known(points[:, 0]), "y": _known(points[:, 1]), "name": name}
        place |= {"hovertemplate": f"{hover}<extra></extra>"}
        marker = settings.pop("marker")
        z = _known(heights, positive=logarithmic)
        solid.append(go.Scatter3d(z=z, marker=marker, **place, **settings))
        on_map = {**marker, "size": 1.8 * marker["size"], "symbol": look}
        flat.append(go.Scatter(marker=on_map, **place, **settings))

    for what, where, color, shape in (
        ("infinite", np.isinf(values), VERMILLION, "diamond"),
        ("NaN", np.isnan(values), GREY, "square"),
    ):
        if not where.any():
            continue
        count = int(where.sum())
        points = np.array([(x[column], y[row]) for row, column in np.argwhere(where).tolist()])
        top = np.full(count, values[finite].max())
        marker = {"color": color, "size": 4, "symbol": shape}
        name = f"{what} loss ({count})"
        add(points, top, name, f"{what} loss", shape, mode="markers", marker=marker)
        notes.append(f"The loss is {what} at {count} of {values.size} points: gaps, with marks.")
    if trajectory is not None:
        points = trajectory.coordinates.double().cpu().numpy()
        heights = _heights(result, points) if losses is None else np.array(losses.loss)
        of = "that of the surface" if losses is None else "their own loss, off the plane"
        hidden = int((~np.isfinite(heights)).sum())
        notes.append(f"Snapshots are projected on the plane; their height is {of}.")
        if hidden:
            notes.append(f"{hidden} of {len(points)} have none and are on the map only.")
        steps = list(trajectory.steps)
        timed = {**_titled("training step"), "x": 1.14, "len": 0.8, "thickness": 14}
        add(
            points,
            heights,
            "snapshots",
            "step %{customdata[0]}<br>loss: %{customdata[1]:.5g}",
            "circle",
            mode="lines+markers",
            customdata=list(zip(steps, _known(heights), strict=True)),
            line={"color": GREY, "width": 3},
            marker={"size": 4, "color": steps, "colorscale": TIME, "colorbar": timed},
        )
    here = float(result.loss[result.center])
    add(
        np.zeros((1, 2)),
        np.array([here]),
        "the model",
        f"the model<br>loss: {here:.5g}",
        "star",
        mode="markers",
        marker={"color": VERMILLION, "size": 7, "symbol": "diamond", "line": {"width": 1}},
    )
    for trace in flat:
        trace.visible = False
    figure = go.Figure([*solid, *flat])
    views = [
        {
            "label": label,
            "method": "update",
            "args": [
                {"visible": [not on_map] * len(solid) + [on_map] * len(flat)},
                {"xaxis.visible": on_map, "yaxis.visible": on_map},
            ],
        }
        for label, on_map in (("relief", False), ("map", True))
    ]
    eye = {"eye": {"x": -1.65, "y": -1.95, "z": 1.1}, "center": {"z": -0.1}}
    first, second = (_titled("<br>".join(textwrap.wrap(axis, 22))) for axis in axes)
    scene = {"xaxis": first, "yaxis": second, "zaxis": scale}
    above = {"y": 1.0, "yanchor": "bottom"}
    figure.update_layout(
        scene={**scene, "aspectmode": "cube", "camera": eye},
        xaxis={**_titled(_text(axes[0])), "visible": False, "automargin": True},
        yaxis={**_titled(_text(axes[1])), "visible": False, "automargin": True},
        showlegend=True,
        legend={**above, "orientation": "h", "x": 0.5, "xanchor": "center"},
        updatemenus=[{**above, "type": "buttons", "direction": "right", "buttons": views, "x": 0}],
    )
    figure.layout.updatemenus[0].xanchor = "left"
    return figure, notes


def _heights(result: Surface, points: Any) -> Any:
    """Return the surface between its points, NaN beyond it and in gaps."""
    from scipy.interpolate import RegularGridInterpolator

    values = result.loss.double().cpu().numpy()
    logarithmic = _is_logarithmic(values)
    grid = np.log(values) if logarithmic else values
    at = RegularGridInterpolator(result.coordinates, grid, bounds_error=False)(points)
    return np.exp(at) if logarithmic else at


def _lines(go: Any, result: Surface | Interpolation) -> tuple[Any, list[str]]:
    """Return the loss at the left, metrics at the right."""
    curves: dict[str, tuple[Any, dict[str, Any]]]
    if isinstance(result, Surface):
        places, axis = result.coordinates[0], f"{result.labels[0]} ({result.units[0]})"
        curves = {n: (g.loss, g.metrics) for n, g in result.grids.items()}
        marks = [0.0]
    else:
        places, axis = result.alphas, "α"
        curves = {n: (c.loss, c.metrics) for n, c in result.curves.items()}
        marks = [0.0, 1.0]
    figure = go.Figure()
    names = list(dict.fromkeys(m for _, metrics in curves.values() for m in metrics))
    for dash, (label, (loss, metrics)) in zip(DASHES * 9, curves.items(), strict=False):
        for number, what in enumerate(["loss", *names]):
            if number and what not in metrics:
                continue
            values = np.array([float(v) for v in (metrics[what] if number else loss)])
            figure.add_scatter(
                x=list(places),
                y=_known(values),
                mode="lines",
                name=_text(f"{label} {what}"),
                line={"color": SERIES[number % len(SERIES)], "dash": dash},
                yaxis="y2" if number else "y",
                hovertemplate="%{y:.5g}",
            )
    for mark in marks:
        figure.add_vline(x=mark, line={"color": GREY, "width": 1})
    losses = np.array([[float(v) for v in loss] for loss, _ in curves.values()])
    finite = losses[np.isfinite(losses)]
    positive = bool(finite.size and finite.min() > 0)
    figure.update_layout(
        xaxis={**_titled(_text(axis)), "automargin": True},
        yaxis={**_titled("loss"), "type": "log" if positive else "linear", "automargin": True},
        hovermode="x unified",
        showlegend=True,
        legend={"orientation": "h", "y": -0.15},
    )
    if names:
        right = {"overlaying": "y", "side": "right", "automargin": True, "showgrid": False}
        figure.update_layout(yaxis2={**_titled(_text(", ".join(names))), **right})
    missing = losses.size - finite.size
    return figure, [f"{missing} losses are not finite: gaps."] if missing else []
