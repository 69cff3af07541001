"""Pictures of measures that tried several sizes of noise or step, and of invariance."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes

from ..measures.critical_sharpness import CriticalSharpnessResult
from ..measures.local_energy import LocalEnergyResult
from ..measures.pac_bayes_sharpness import PacBayesResult
from ..report.invariance import InvarianceTable
from ..results import Outcome
from .axes import BLUE, GREY, SERIES, VERMILLION, label_few_decades, new_axis, with_gaps

__all__ = ["draw_critical", "draw_invariance", "draw_local_energy", "draw_pac_bayes"]


def draw_local_energy(result: LocalEnergyResult, ax: Axes | None) -> Axes:
    """Return the rise at each size of the noise, with two standard errors, from the origin."""
    axis = new_axis(ax, 5.0, 3.4)
    sigmas = np.array([0.0, *result.sigmas])
    rises, errors = with_gaps([0.0, *result.rises]), with_gaps([0.0, *result.standard_errors])
    axis.fill_between(
        sigmas, rises - 2 * errors, rises + 2 * errors, color=BLUE, alpha=0.25, linewidth=0
    )
    axis.plot(sigmas, rises, color=BLUE, marker="o", markersize=3)
    axis.axhline(0, color=GREY, linewidth=0.8, zorder=0)
    axis.set_xlim(0, sigmas[-1])
    axis.set_xlabel("σ, noise relative to each parameter")
    axis.set_ylabel(f"rise of the {result.on}")
    return axis


def draw_pac_bayes(result: PacBayesResult, ax: Axes | None) -> Axes:
    """Return the mean rise at every σ that was tried, the target, and the σ that was found."""
    axis = new_axis(ax, 5.0, 3.4)
    axis.plot(result.sigmas, with_gaps(result.rises), color=BLUE, marker="o", markersize=3)
    axis.axhline(result.target, color=GREY, linewidth=0.8, zorder=0)
    axis.annotate(
        f"target {result.target:g}",
        (0.0, result.target),
        xycoords=("axes fraction", "data"),
        xytext=(3, 3),
        textcoords="offset points",
        color=GREY,
        fontsize="small",
    )
    if result.outcome is not Outcome.NOT_REACHED:
        label = f"σ = {result.sigma:.3g}"
        axis.axvline(result.sigma, color=VERMILLION, linewidth=1, label=label)
        if math.isfinite(result.sigma_error):
            low, high = (result.sigma + s * result.sigma_error for s in (-2, 2))
            axis.axvspan(max(low, 0.0), high, color=VERMILLION, alpha=0.2, linewidth=0)
        axis.legend(frameon=False, fontsize="small", loc="center left")
    axis.set_xscale("log")
    label_few_decades(axis)
    noise = "relative to each parameter" if result.adaptive else "of every parameter"
    axis.set_xlabel(f"σ, noise {noise}")
    axis.set_ylabel(f"rise of the {result.on}")
    return axis


def draw_critical(result: CriticalSharpnessResult, ax: Axes | None) -> Axes:
    """Return the loss at every step that was tried, that at θ, and the critical step."""
    axis = new_axis(ax, 5.0, 3.4)
    axis.plot(
        result.tried_steps, with_gaps(result.tried_losses), color=BLUE, marker="o", markersize=3
    )
    axis.axhline(result.loss, color=GREY, linewidth=0.8, zorder=0)
    axis.annotate(
        "L(θ)",
        (0.0, result.loss),
        xycoords=("axes fraction", "data"),
        xytext=(3, 3),
        textcoords="offset points",
        color=GREY,
        fontsize="small",
    )
    if result.step > 0 and math.isfinite(result.bracket[1]):
        label = f"η = {result.step:.3g}"
        axis.axvline(result.step, color=VERMILLION, linewidth=1, label=label)
        axis.legend(frameon=False, fontsize="small", loc="center left")
    axis.set_xscale("log")
    label_few_decades(axis)
    axis.set_xlabel("η, step along the update")
    axis.set_ylabel("loss")
    return axis


def draw_invariance(result: InvarianceTable, ax: Axes | None) -> Axes:
    """Return the ratio of each measure after rescaling, on a logarithmic axis; 1 is unchanged."""
    axis = new_axis(ax, 7.0, 1.2 + 0.27 * len(result.measures))
    places = np.arange(len(result.measures))
    kinds = list(result.ratios)
    known = [abs(r) for ratios in result.ratios.values() for r in ratios if math.isfinite(r)]
    most = 3 * max([1.0, *known])
    for number, (kind, color) in enumerate(zip(kinds, SERIES, strict=False)):
        # Ratios of zero to zero are unchanged; of other signs only the size can be shown, and
        # infinite ones at the end of the axis.
        raw = [1.0 if math.isnan(r) else abs(r) for r in result.ratios[kind]]
        ratios = np.array([r if r > 0 else math.nan for r in raw])
        endless = np.isinf(ratios)
        ratios[endless] = most
        axis.plot(
            ratios[endless],
            (places + 0.25 * (number - (len(kinds) - 1) / 2))[endless],
            ">",
            color=color,
            markersize=7,
        )
        at = places + 0.25 * (number - (len(kinds) - 1) / 2)
        axis.hlines(at, 1, ratios, color=color, linewidth=1.5)
        axis.plot(ratios, at, "o", color=color, markersize=4, label=f"per {kind}")
    axis.axvline(1, color=GREY, linewidth=0.8, zorder=0)
    axis.set_xscale("log")
    axis.set_yticks(places, result.measures, fontsize="small")
    axis.set_ylim(len(places) - 0.4, -0.6)
    axis.set_xlabel(f"value after rescaling by {result.factor:g} / value before")
    axis.legend(
        frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2
    )
    return axis
