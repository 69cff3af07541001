"""What `hessian_spectrum.py` reports: the edge of a spectrum, tables and a figure."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from torch import Tensor

import flatminima as fm

COLOURS = {"small batch": "#009E73", "large batch": "#CC79A7"}
PAIRS = 20
"""How many of the largest eigenvalues are searched for the gap, for any number of classes."""


def widest_gap(eigenvalues: Tensor) -> tuple[int, float]:
    """Return how many eigenvalues lie above the largest ratio of neighbours, and that ratio.

    The eigenvalues must descend; those that are not positive have no ratio.
    """
    kept = eigenvalues[eigenvalues > 0]
    if len(kept) < 2:
        raise ValueError("a gap needs two positive eigenvalues")
    ratios = kept[:-1] / kept[1:]
    place = int(ratios.argmax())
    return place + 1, float(ratios[place])


@dataclasses.dataclass(frozen=True)
class Edge:
    """The largest eigenvalues of a matrix and the widest gap among them."""

    pairs: fm.EigenResult
    outliers: int
    gap: float
    smallest: float

    @classmethod
    def of(cls, operator: fm.LinearOperator, *, seed: int, progress: bool) -> Edge:
        """Compute the largest eigenvalues and the smallest one."""
        pairs = fm.lanczos(operator, k=PAIRS, seed=seed, progress=progress)
        # Tolerances are relative to the largest, of which this is a hundredth.
        low = fm.lanczos(operator, which="SA", tol=1e-4, seed=seed, progress=progress)
        return cls(pairs, *widest_gap(pairs.eigenvalues), float(low.eigenvalues[0]))

    @property
    def above(self) -> fm.EigenResult:
        """Only the outliers."""
        vectors, count = self.pairs.eigenvectors, self.outliers
        assert vectors is not None
        return dataclasses.replace(
            self.pairs,
            eigenvalues=self.pairs.eigenvalues[:count],
            eigenvectors=vectors[:, :count],
            residuals=self.pairs.residuals[:count],
        )

    def ratio(self, place: int) -> float:
        """Return λ_place / λ_{place+1}, counted from 1."""
        return float(self.pairs.eigenvalues[place - 1] / self.pairs.eigenvalues[place])


@dataclasses.dataclass(frozen=True)
class Net:
    """A network when its training loss first reached a given value."""

    loss: float
    gradient_norm: float
    epochs: int
    test_accuracy: float
    edges: dict[str, Edge]
    densities: dict[str, fm.SpectralDensity]

    def numbers(self, name: str) -> dict[str, float]:
        """Return what the table shows of H or G."""
        edge, density = self.edges[name], self.densities[name]
        values = edge.pairs.eigenvalues
        trace = density.size * density.mean().value
        square = density.frobenius_norm().value ** 2
        above = values[: edge.outliers]
        rest = density.size - edge.outliers
        return {
            "training loss": self.loss,
            "gradient norm": self.gradient_norm,
            "epochs": self.epochs,
            "test accuracy (%)": self.test_accuracy,
            "λ₁ largest eigenvalue": float(values[0]),
            "outliers": edge.outliers,
            "λ_k / λ_{k+1} at the gap": edge.gap,
            "bulk's upper edge λ_{k+1}": float(values[edge.outliers]),
            "bulk's root mean square": math.sqrt(max(square - float(above @ above), 0.0) / rest),
            "λₙ smallest eigenvalue": edge.smallest,
            "negative mass (%)": 100 * density.negative_mass().value,
            "trace": trace,
            "share of the outliers in it (%)": 100 * float(above.sum()) / trace,
            "stable rank": density.stable_rank().value,
        }


Runs = dict[int, dict[str, list[dict[float, Net]]]]
"""Nets by number of classes, label of the batch, seed and loss."""


def count_table(runs: Runs, losses: Sequence[float]) -> fm.Table:
    """Tabulate the outliers by classes and loss for each seed, with λ_{C−1} / λ_C."""
    rows = []
    for classes, nets in runs.items():
        for loss in losses:
            cells = []
            for name in ("H", "G"):
                for stages in nets.values():
                    edges = [stage[loss].edges[name] for stage in stages]
                    counts = ", ".join(str(edge.outliers) for edge in edges)
                    ratio = statistics.fmean(edge.ratio(classes - 1) for edge in edges)
                    cells.append(f"{counts} ({ratio:.2g})")
            rows.append((f"{classes}", f"{loss:g}", f"{classes - 1}", *cells))
    header = [f"{name}, {label}" for name in ("H", "G") for label in COLOURS]
    return fm.Table(("classes C", "training loss", "C − 1", *header), tuple(rows))


def spectrum_table(nets: dict[str, list[Net]]) -> fm.Table:
    """Tabulate numbers of the whole spectrum, mean ± standard deviation over the seeds."""
    columns = {
        f"{name}, {label}": [net.numbers(name) for net in found]
        for name in ("H", "G")
        for label, found in nets.items()
    }
    rows = []
    for quantity in next(iter(columns.values()))[0]:
        cells = []
        for runs in columns.values():
            values = [run[quantity] for run in runs]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.4g}{spread}")
        rows.append((quantity, *cells))
    return fm.Table(("quantity", *columns), tuple(rows))


def nesting_table(runs: Runs, losses: Sequence[float]) -> fm.Table:
    """Tabulate whether the small batch's spectrum lies inside the large batch's."""
    rows = []
    for classes, nets in runs.items():
        for loss in losses:
            tops, lows, smaller, within = [], [], [], 0
            for stages in zip(nets["small batch"], nets["large batch"], strict=True):
                small, large = (stage[loss].edges["H"] for stage in stages)
                a, b = small.pairs.eigenvalues, large.pairs.eigenvalues
                tops.append(float(b[0] / a[0]))
                lows.append((small.smallest, large.smallest))
                smaller.append(int((a < b).sum()))
                within += bool(a[0] < b[0]) and small.smallest > large.smallest
            cells = (
                f"{classes}",
                f"{loss:g}",
                f"{statistics.fmean(tops):.3g}",
                ", ".join(str(count) for count in smaller),
                *(f"{statistics.fmean(values):.2g}" for values in zip(*lows, strict=True)),
                f"{within} of {len(tops)}",
            )
            rows.append(cells)
    header = (
        "classes C",
        "training loss",
        "λ₁ large / small",
        f"of {PAIRS} λᵢ, smaller with the small batch",
        "λₙ small",
        "λₙ large",
        "small inside large",
    )
    return fm.Table(header, tuple(rows))


def picture(nets: dict[str, Net], classes: int, title: str) -> Figure:
    """Draw the densities of both Hessians and the largest eigenvalues of H and G."""
    figure = plt.figure(figsize=(11.0, 5.2), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.5, 1))
    densities = {label: net.densities["H"] for label, net in nets.items()}
    # The same width for both makes their heights comparable.
    sigma = max(d.largest - d.smallest for d in densities.values()) / 400
    left = None
    for row, (label, density) in enumerate(densities.items()):
        left = figure.add_subplot(grid[row, 0], sharex=left, sharey=left)
        fm.plot(density.rescaled(sigma=sigma), left)
        legend = left.get_legend()
        if legend is not None:
            legend.remove()
        if row == 0:
            left.set_xlabel("")
        count = nets[label].edges["H"].outliers
        left.set_title(f"Hessian, {label}: {count} outliers (▼)", fontsize="medium", loc="left")
    right = figure.add_subplot(grid[:, 1])
    for label, net in nets.items():
        for name, marker, size in (("G", "o", 8), ("H", ".", 5)):
            values = net.edges[name].pairs.eigenvalues
            right.plot(
                range(1, len(values) + 1),
                values,
                marker,
                color=COLOURS[label],
                markerfacecolor="none" if name == "G" else COLOURS[label],
                markersize=size,
                label=f"{name}, {label}",
            )
    right.axvline(classes - 0.5, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
    right.set_yscale("log")
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_locator(NullLocator())
    right.set_xlabel(f"index i (dashed: after C − 1 = {classes - 1})")
    right.set_ylabel("eigenvalue λᵢ")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.legend(frameon=False, fontsize="small", loc="upper right")
    right.set_title(
        f"the {PAIRS} largest of Hessian and Gauss–Newton matrix", fontsize="medium", loc="left"
    )
    figure.suptitle(title)
    return figure


def eigenvalues(runs: Runs) -> list[dict[str, Any]]:
    """Return the largest eigenvalues of all runs, for a file."""
    return [
        {
            "classes": classes,
            "batch": label,
            "seed": seed,
            "loss": loss,
            "matrix": name,
            "outliers": edge.outliers,
            "gap": edge.gap,
            "largest": edge.pairs.eigenvalues.tolist(),
            "smallest": edge.smallest,
        }
        for classes, nets in runs.items()
        for label, seeds in nets.items()
        for seed, stages in enumerate(seeds)
        for loss, net in stages.items()
        for name, edge in net.edges.items()
    ]
