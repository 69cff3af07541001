"""Several profiles in one picture: bands over seeds, one line for each direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ..errors import ArgumentTypeError, InvalidArgumentError
from ..landscape.interpolation import Interpolation
from ..landscape.surface import Surface
from ..results import Result
from .axes import GREY, SERIES, label_few_decades, new_axis, with_gaps

__all__ = ["draw_profiles", "group_profiles"]

Profile = Interpolation | Surface
STYLES = ("-", "--", ":", "-.")


def group_profiles(results: object) -> dict[str, list[Profile]]:
    """Return profiles by what they are of: by the keys of a mapping, or by the direction of each.

    Raises:
        ArgumentTypeError: something in it has no profile.
        InvalidArgumentError: nothing is in it, or those of one group are not alike.
    """
    groups: dict[str, list[Profile]] = {}
    if isinstance(results, Mapping):
        for label, given in results.items():
            several = list(given) if isinstance(given, Sequence) else [given]
            groups[str(label)] = [_checked(each) for each in several]
    elif isinstance(results, Sequence):
        for each in results:
            groups.setdefault(_name(_checked(each)), []).append(each)
    kinds = {type(each) for several in groups.values() for each in several}
    if len(kinds) > 1:
        raise ArgumentTypeError(
            "plot draws interpolations in one picture, or surfaces of one dimension, not both: "
            "their axes are not the same."
        )
    if not groups or not all(groups.values()):
        raise InvalidArgumentError("plot was given an empty list; give one result at least.")
    for label, several in groups.items():
        for each in several[1:]:
            if _ground(each) != _ground(several[0]):
                raise InvalidArgumentError(
                    f"plot draws results of one kind as a band, and those of {label!r} differ in "
                    "their points, units or data sets; evaluate them alike, or give them labels of "
                    "their own in a mapping."
                )
    return groups


def draw_profiles(groups: Mapping[str, Sequence[Profile]], ax: Axes | None) -> Axes:
    """Return the median of each group, and a band from its least to its largest at every point."""
    axis = new_axis(ax, 6.0, 3.8)
    least = np.inf
    several = max(len(results) for results in groups.values())
    for (label, results), color in zip(groups.items(), SERIES * 9, strict=False):
        places = np.array(_places(results[0]))
        order = np.argsort(places)
        for name, style in zip(_sets(results[0]), STYLES * 9, strict=False):
            losses = np.array([with_gaps(_loss(each, name)) for each in results])[:, order]
            middle = np.median(losses, axis=0)
            known = losses[np.isfinite(losses)]
            least = min([least, *known.tolist()])
            shown = f"{label}, {name}" if len(_sets(results[0])) > 1 else label
            axis.plot(places[order], middle, style, color=color, label=shown)
            if len(results) > 1:
                ends = losses.min(axis=0), losses.max(axis=0)
                axis.fill_between(places[order], *ends, color=color, alpha=0.2, linewidth=0)
    first = next(iter(groups.values()))[0]
    for place in (0.0, 1.0) if isinstance(first, Interpolation) else (0.0,):
        axis.axvline(place, color=GREY, linewidth=0.8, zorder=0)
    if 0 < least < np.inf:
        axis.set_yscale("log")
        label_few_decades(axis, vertical=True)
    axis.set_ylabel("loss")
    axis.set_xlabel(_axis_label(groups))
    title = f"median, and least to largest of {several}" if several > 1 else None
    axis.legend(frameon=False, fontsize="small", title=title, title_fontsize="small")
    return axis


def _checked(result: Any) -> Profile:
    if isinstance(result, Interpolation):
        return result
    if isinstance(result, Surface) and len(result.coordinates) == 1:
        return result
    what = type(result).__name__
    if isinstance(result, Surface):
        what = f"Surface of {len(result.coordinates)} dimensions"
    raise ArgumentTypeError(
        f"plot draws several results in one picture when all of them are interpolations or "
        f"surfaces of one dimension; got a {what}."
    )


def _name(result: Profile) -> str:
    return f"{result.path} path" if isinstance(result, Interpolation) else result.labels[0]


def _ground(result: Profile) -> tuple[object, ...]:
    """Return what results must share to be drawn as one band."""
    unit = "" if isinstance(result, Interpolation) else result.units[0]
    return _places(result), _sets(result), unit


def _places(result: Profile) -> tuple[float, ...]:
    return result.alphas if isinstance(result, Interpolation) else result.coordinates[0]


def _sets(result: Profile) -> list[str]:
    return list(result.curves if isinstance(result, Interpolation) else result.grids)


def _loss(result: Profile, name: str) -> Sequence[float]:
    if isinstance(result, Interpolation):
        return result.curves[name].loss
    found: list[float] = result.grids[name].loss.tolist()
    return found


def _axis_label(groups: Mapping[str, Sequence[Profile]]) -> str:
    firsts: list[Result] = [results[0] for results in groups.values()]
    if isinstance(firsts[0], Interpolation):
        return "α"
    labels = {r.labels[0] for r in firsts if isinstance(r, Surface)}
    units = {r.units[0] for r in firsts if isinstance(r, Surface)}
    direction = labels.pop() if len(labels) == 1 else "along each direction"
    return f"{direction} ({units.pop()})" if len(units) == 1 else f"{direction} (own units)"
