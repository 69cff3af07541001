"""What `which_sharpness_predicts.py` reports: Kendall's τ, overall and granulated.

Granulated as in Jiang et al. (2020, arXiv:1912.02178, section 2.2): within groups of nets that
differ in a single hyper-parameter, averaged over groups, then over hyper-parameters.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import kendalltau

import flatminima as fm

BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#6B6B6B"
SAME = 1e-3
"""A number with a smaller relative variation over all nets is constant and ranks nothing."""
LEVEL = 0.95

AXES = {
    "batch_size": "batch size",
    "learning_rate": "learning rate",
    "width": "width",
    "weight_decay": "weight decay",
}
"""The hyper-parameters that groups differ in. Every group has a single seed."""

TARGETS = {"error": "test error", "gap": "generalisation gap", "loss": "test loss"}

Run = Mapping[str, Any]
"""The record of a net: its settings ("net"), targets, measures and baselines."""

Array = np.ndarray[Any, np.dtype[np.float64]]


def kendall(x: Sequence[float] | Array, y: Sequence[float] | Array) -> float:
    """Return Kendall's τ-b, which allows for ties.

    It is NaN if y is constant, as there is no order to find, and 0 if only x is.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(y) < 2 or bool((y == y[0]).all()):
        return math.nan
    if bool((x == x[0]).all()):
        return 0.0
    return float(kendalltau(x, y).statistic)


def constant(x: Array) -> bool:
    """Return whether a number is the same for all nets up to rounding."""
    kept = x[np.isfinite(x)]
    return len(kept) == 0 or float(np.ptp(kept)) <= SAME * float(np.abs(kept).max())


def interval(values: Array) -> tuple[float, float]:
    """Return the ends of the middle 95 % of resampled values; NaN without any."""
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def resampled_taus(x: Array, y: Array, resamples: int, seed: int) -> Array:
    """Return τ-b of bootstrap samples of the nets."""
    count = len(y)
    draws = np.random.default_rng(seed).integers(0, count, (resamples, count))
    # How often each net was drawn: τ-b of repeated nets is a ratio of forms in these counts.
    times = np.stack([np.bincount(draw, minlength=count) for draw in draws]).astype(float)
    a, b = (np.sign(v[:, None] - v[None, :]) for v in (x, y))

    def form(matrix: Array) -> Array:
        return np.asarray(((times @ matrix) * times).sum(axis=1))

    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(form(a * b) / np.sqrt(form(a * a) * form(b * b)))


def groups(settings: Sequence[Mapping[str, Hashable]], axis: str) -> list[list[int]]:
    """Return groups, of at least two, of nets that differ in a single hyper-parameter."""
    found: dict[Hashable, list[int]] = {}
    for place, own in enumerate(settings):
        rest = tuple(sorted((name, value) for name, value in own.items() if name != axis))
        found.setdefault(rest, []).append(place)
    return [places for places in found.values() if len(places) > 1]


def group_taus(x: Array, y: Array, members: Sequence[Sequence[int]]) -> Array:
    """Return τ within each group; groups with equal errors have none and are left out."""
    taus = []
    for places in members:
        kept = [place for place in places if math.isfinite(x[place])]
        taus.append(kendall(x[kept], y[kept]))
    return np.array([tau for tau in taus if not math.isnan(tau)])


def resampled_mean(taus: Sequence[Array], resamples: int, seed: int) -> Array:
    """Return Ψ of bootstrap samples of the groups, drawn within each hyper-parameter."""
    rng = np.random.default_rng(seed)
    means = [t[rng.integers(0, len(t), (resamples, len(t)))].mean(axis=1) for t in taus]
    return np.asarray(np.mean(means, axis=0))


@dataclasses.dataclass(frozen=True)
class Correlation:
    """The correlation of one number of a net with the target.

    Attributes:
        name: of the number.
        baseline: whether it is a baseline and no measure of sharpness.
        nets: how many have a finite value.
        tau: overall; NaN for a constant.
        tau_interval: 95 %, over nets.
        psi: the mean over hyper-parameters of the granulated τ.
        psi_interval: 95 %, over groups.
        granulated: the mean τ within groups by each hyper-parameter.
        groups: the number of groups by each hyper-parameter.
    """

    name: str
    baseline: bool
    nets: int
    tau: float
    tau_interval: tuple[float, float]
    psi: float
    psi_interval: tuple[float, float]
    granulated: dict[str, float]
    groups: dict[str, int]


def correlate(
    name: str,
    x: Sequence[float],
    target: Sequence[float],
    settings: Sequence[Mapping[str, Hashable]],
    axes: Sequence[str],
    *,
    baseline: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> Correlation:
    """Correlate a number with the target, overall and granulated, with bootstrap intervals."""
    values, y = np.asarray(x, float), np.asarray(target, float)
    finite = np.isfinite(values)
    undefined = (math.nan, math.nan)
    count = int(finite.sum())
    if constant(values):
        none, zero = dict.fromkeys(axes, math.nan), dict.fromkeys(axes, 0)
        nan = math.nan
        return Correlation(name, baseline, count, nan, undefined, nan, undefined, none, zero)
    taus = {axis: group_taus(values, y, groups(settings, axis)) for axis in axes}
    known = [found for found in taus.values() if len(found)]
    return Correlation(
        name=name,
        baseline=baseline,
        nets=count,
        tau=kendall(values[finite], y[finite]),
        tau_interval=interval(resampled_taus(values[finite], y[finite], resamples, seed)),
        psi=float(np.mean([found.mean() for found in known])) if known else math.nan,
        psi_interval=interval(resampled_mean(known, resamples, seed)) if known else undefined,
        granulated={a: float(t.mean()) if len(t) else math.nan for a, t in taus.items()},
        groups={axis: len(found) for axis, found in taus.items()},
    )


def ranked(found: Sequence[Correlation]) -> list[Correlation]:
    """Sort by decreasing τ, with those without τ last."""
    return sorted(found, key=lambda c: (math.isnan(c.tau), -c.tau if c.tau == c.tau else 0.0))


def shown(value: float) -> str:
    """Format a correlation for a table."""
    return "–" if math.isnan(value) else f"{value:.2f}".replace("-0.00", "0.00")


def correlation_table(found: Sequence[Correlation], axes: Mapping[str, str]) -> fm.Table:
    """Tabulate every number with its correlations, by decreasing τ."""
    rows = []
    for c in ranked(found):
        intervals = [
            "–" if math.isnan(low) else f"{shown(low)} to {shown(high)}"
            for low, high in (c.tau_interval, c.psi_interval)
        ]
        name = f"{c.name} (baseline)" if c.baseline else c.name
        granulated = (shown(c.granulated[axis]) for axis in axes)
        rows.append((name, shown(c.tau), intervals[0], shown(c.psi), intervals[1], *granulated))
    header = ("measure", "τ", "95 %", "granulated Ψ", "95 % of Ψ", *axes.values())
    return fm.Table(header, tuple(rows))


SHORT = {
    "ε-sharpness φ (%)": "ε-sharpness",
    ", full space": "",
    "random-perturbation": "random",
    " (Gauss–Newton)": ", Gauss–Newton",
    "trace of the Gauss–Newton matrix": "trace, Gauss–Newton",
    "trace of the Hessian": "trace, Hessian",
    "magnitude-aware PAC-Bayes sharpness": "magnitude-aware PAC-Bayes",
    "PAC-Bayes sharpness": "PAC-Bayes",
    "normalised logits": "norm. logits",
}
"""Abbreviations for the labels of a figure."""


def label(name: str) -> str:
    """Abbreviate a name for a figure."""
    for long, short in SHORT.items():
        name = name.replace(long, short)
    return name


def picture(
    found: Sequence[Correlation], axes: Mapping[str, str], title: str, target: str
) -> Figure:
    """Draw τ and Ψ with their intervals on the left, τ by hyper-parameter on the right."""
    drawn = [c for c in ranked(found) if not math.isnan(c.tau)]
    places = np.arange(len(drawn))
    # A hyper-parameter with a single value has no groups.
    axes = {a: n for a, n in axes.items() if any(c.groups[a] for c in drawn)}
    figure = plt.figure(figsize=(9.0, 1.9 + 0.29 * len(drawn)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.35, 1))
    series = (
        ("tau", "tau_interval", BLUE, "o", -0.16, "τ, all nets"),
        ("psi", "psi_interval", VERMILLION, "s", 0.16, "Ψ, granulated"),
    )
    for value, bounds, colour, marker, shift, text in series:
        x = np.array([getattr(c, value) for c in drawn])
        ends = np.array([getattr(c, bounds) for c in drawn])
        left.hlines(places + shift, ends[:, 0], ends[:, 1], color=colour, linewidth=1.4)
        left.plot(x, places + shift, marker, color=colour, markersize=4.5, label=text)
    left.axvline(0, color="0.35", linewidth=0.9, zorder=0)
    left.set_xlim(-1, 1)
    left.set_xticks([-1, -0.5, 0, 0.5, 1])
    left.set_xlabel(f"Kendall's τ with the {target},\n95 % bootstrap interval")
    left.set_yticks(places, [label(c.name) for c in drawn])
    left.set_ylim(len(drawn) - 0.5, -0.5)
    left.tick_params(axis="y", length=0, labelsize=8.5)
    for text, c in zip(left.get_yticklabels(), drawn, strict=True):
        if c.baseline:
            text.set(color=GREY, style="italic")
    for place in places[::2]:
        left.axhspan(place - 0.5, place + 0.5, color="0.95", zorder=-1)
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)

    cells = np.array([[c.granulated[axis] for axis in axes] for c in drawn])
    right.imshow(np.ma.masked_invalid(cells), cmap="PuOr_r", vmin=-1, vmax=1, aspect="auto")
    for row, column in np.ndindex(cells.shape):
        tau = float(cells[row, column])
        ink = "white" if abs(tau) > 0.7 else "black"
        right.text(column, row, shown(tau), ha="center", va="center", color=ink, fontsize=8.5)
    names = [name.replace(" ", "\n") for name in axes.values()]
    right.set_xticks(range(len(axes)), names)
    right.tick_params(axis="both", length=0, labelleft=False, labelsize=9)
    right.spines[:].set_visible(False)
    right.set_xlabel("mean τ in groups that differ\nin this alone")
    figure.suptitle(title, fontsize="large")
    if any(c.baseline for c in drawn):
        left.annotate(
            "grey: baselines",
            (0, 1),
            (-8, 7),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="right",
            color=GREY,
            style="italic",
            fontsize=8.5,
        )
    return figure


def level_table(runs: Sequence[Run], against: str) -> fm.Table:
    """Tabulate the target by each value of each hyper-parameter, mean ± standard deviation."""
    scale, unit = (1.0, "") if against == "loss" else (100.0, " (%)")
    rows = []
    for axis, name in AXES.items():
        for level in sorted({run["net"][axis] for run in runs}):
            values = [scale * run[against] for run in runs if run["net"][axis] == level]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            mean = f"{statistics.fmean(values):.3g}{spread}"
            rows.append((name, f"{level:g}", str(len(values)), mean))
    return fm.Table(("hyper-parameter", "value", "nets", TARGETS[against] + unit), tuple(rows))


def correlations(runs: Sequence[Run], against: str, resamples: int) -> list[Correlation]:
    """Correlate every measure and baseline with the target."""
    settings = [run["net"] for run in runs]
    target = [run[against] for run in runs]
    found = []
    for part in ("measures", "baselines"):
        # In the order of the report; one that a net lacks is NaN there.
        names = dict.fromkeys(name for run in runs for name in run[part])
        for name in names:
            values = [run[part].get(name) for run in runs]
            x = [math.nan if value is None else float(value) for value in values]
            how: dict[str, Any] = {"baseline": part == "baselines", "resamples": resamples}
            found.append(correlate(name, x, target, settings, list(AXES), **how))
    return found


def remarks(runs: Sequence[Run], found: Sequence[Correlation]) -> list[str]:
    """Return notes on single numbers of the table."""
    doubts = collections.Counter(name for run in runs for name in run["doubtful"])
    said = [f"{n}: doubtful for {k} of {len(runs)} nets by its outcome" for n, k in doubts.items()]
    for c in found:
        if math.isnan(c.tau):
            said.append(f"{c.name}: the same for all nets, or undefined, and ranks nothing")
        elif c.nets < len(runs):
            said.append(f"{c.name}: finite, and ranked, for {c.nets} of {len(runs)} nets")
    return said


def strict(value: Any) -> Any:
    """Replace NaN, which strict JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report(
    runs: Sequence[Run],
    missed: Sequence[Run],
    numbers: Mapping[str, Any],
    resamples: int,
    stem: Path,
) -> None:
    """Print and write tables, figure and numbers of the nets."""
    against, wanted = numbers["against"], numbers["loss"]
    target = TARGETS[against]
    losses = [run["training_loss"] for run in runs]
    seconds = [math.fsum(part) for part in zip(*(run["seconds"] for run in runs), strict=True)]
    about = [
        f"{numbers['data']}: {len(runs)} nets trained on {numbers['train_images']} images and "
        f"tested on all {numbers['test_images']} others. Training loss {min(losses):.5f} to "
        f"{max(losses):.5f}."
        + (f" Left out, as they did not come to it: {len(missed)}." if missed else ""),
        f"Training took {seconds[0]:.0f} s, measuring {seconds[1]:.0f} s, in all runs together.",
    ]
    found = correlations(runs, against, resamples)
    tables = {
        f"{target.capitalize()}, mean ± standard deviation": level_table(runs, against),
        f"Kendall's τ with the {target}; the last four columns are means within groups": (
            correlation_table(found, AXES)
        ),
    }
    notes = [f"{note}." for note in remarks(runs, found)]
    print("\n" + "\n".join(about))
    for head, table in tables.items():
        print(f"\n{head}\n{table.to_text()}")
    for note in notes:
        print(f"Note: {note}")

    title = f"{numbers['data']}: {len(runs)} nets with a training loss of {wanted:g}"
    figure = picture(found, AXES, title, target)
    figure.savefig(stem.with_suffix(".png"), dpi=130)
    plt.close(figure)
    parts = [" ".join(about), *(f"{h}\n\n{t.to_markdown()}" for h, t in tables.items()), *notes]
    stem.with_suffix(".md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    everything = {
        **numbers,
        "correlations": [dataclasses.asdict(c) for c in found],
        "nets": [*runs, *missed],
    }
    text = json.dumps(strict(everything), indent=1, ensure_ascii=False)
    stem.with_suffix(".json").write_text(text, encoding="utf-8")
    print(f"\nfigure: {stem}.png\ntables: {stem}.md\nnumbers: {stem}.json")
