"""The structure of the Hessian of a trained classifier: a bulk near zero and a few outliers.

Trains a small network without batch norm on images of 3, 5 and 10 classes, with a small and with
a large batch, from the same start, at the same learning rate, down to the same training loss.
Counts the outliers of the Hessian and of the Gauss–Newton matrix by the widest gap among their
largest eigenvalues, and draws the density of all eigenvalues (Sagun et al. 2017,
arXiv:1706.04454; Papyan 2020, arXiv:2008.11865).

    python examples/hessian_spectrum.py                       # digits, half a minute
    python examples/hessian_spectrum.py --seeds 5
    python examples/hessian_spectrum.py --quick               # seconds
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from torch import Tensor, nn
from tqdm import tqdm

import flatminima as fm
import image_data

QUICK = {"classes": [3, 10], "loss": 0.3, "also": [], "width": 32, "probes": 4, "steps": 40}
COLOURS = {"small batch": "#009E73", "large batch": "#CC79A7"}
PAIRS = 20
"""Largest eigenvalues among which the gap is looked for, for any number of classes."""


@dataclasses.dataclass(frozen=True)
class Edge:
    """The largest eigenvalues of a matrix and the widest gap among them."""

    pairs: fm.EigenResult
    outliers: int
    gap: float
    smallest: float

    @classmethod
    def of(cls, operator: fm.LinearOperator, *, seed: int, progress: bool) -> Edge:
        """Find them."""
        pairs = fm.lanczos(operator, k=PAIRS, seed=seed, progress=progress)
        low = fm.lanczos(operator, which="SA", seed=seed, progress=progress)
        return cls(pairs, *widest_gap(pairs.eigenvalues), float(low.eigenvalues[0]))

    @property
    def above(self) -> fm.EigenResult:
        """The outliers alone."""
        vectors, count = self.pairs.eigenvectors, self.outliers
        assert vectors is not None
        return dataclasses.replace(
            self.pairs,
            eigenvalues=self.pairs.eigenvalues[:count],
            eigenvectors=vectors[:, :count],
            residuals=self.pairs.residuals[:count],
        )

    def ratio(self, place: int) -> float:
        """λ_place / λ_{place+1}, counted from 1."""
        return float(self.pairs.eigenvalues[place - 1] / self.pairs.eigenvalues[place])


@dataclasses.dataclass(frozen=True)
class Net:
    """A network when its training loss first fell below a wanted one."""

    loss: float
    gradient_norm: float
    epochs: int
    test_accuracy: float
    edges: dict[str, Edge]
    densities: dict[str, fm.SpectralDensity]

    def numbers(self, name: str) -> dict[str, float]:
        """What the table shows of H or G."""
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


def widest_gap(eigenvalues: Tensor) -> tuple[int, float]:
    """How many eigenvalues lie above the largest ratio of neighbours, and that ratio.

    Descending eigenvalues; those that are not positive have no ratio.
    """
    kept = eigenvalues[eigenvalues > 0]
    if len(kept) < 2:
        raise ValueError("a gap needs two positive eigenvalues")
    ratios = kept[:-1] / kept[1:]
    place = int(ratios.argmax())
    return place + 1, float(ratios[place])


def network(features: int, classes: int, width: int) -> nn.Sequential:
    """Two hidden layers. No batch norm, which takes the outliers away (Ghorbani et al. 2019)."""
    return nn.Sequential(
        nn.Linear(features, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def restricted(data: image_data.ImageData, classes: int) -> image_data.ImageData:
    """The first few classes alone."""
    train, test = data.train_labels < classes, data.test_labels < classes
    return image_data.ImageData(
        data.name,
        data.train_inputs[train],
        data.train_labels[train],
        data.test_inputs[test],
        data.test_labels[test],
    )


def trained(
    model: nn.Module,
    data: image_data.ImageData,
    losses: Sequence[float],
    *,
    batch_size: int,
    learning_rate: float,
    epochs: int,
    seed: int,
    progress: bool,
) -> Iterator[tuple[int, float]]:
    """Plain SGD; yields whenever the training loss, taken every 10 steps, is below the next one.

    The epoch comes with it. Small batches make so many steps in an epoch that the loss at its end
    would be far below the wanted one.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    inputs, labels = data.train_inputs, data.train_labels
    loss_fn = nn.CrossEntropyLoss()
    wanted, loss = sorted(set(losses), reverse=True), math.inf
    label = f"{data.classes} classes, batch {batch_size}"
    steps = 0
    with tqdm(desc=label, unit="epoch", disable=not progress, leave=False) as bar:
        for epoch in range(1, epochs + 1):
            order = torch.randperm(len(inputs), generator=generator)
            for first in range(0, len(order) - batch_size + 1, batch_size):
                rows = order[first : first + batch_size]
                optimizer.zero_grad()
                loss_fn(model(inputs[rows]), labels[rows]).backward()
                optimizer.step()
                steps += 1
                if steps % 10:
                    continue
                with torch.no_grad():
                    loss = loss_fn(model(inputs), labels).item()
                while wanted and loss <= wanted[0]:
                    yield epoch, wanted.pop(0)
                if not wanted:
                    return
            bar.set_postfix_str(f"loss {loss:.2e}", refresh=False)
            bar.update()
    raise ValueError(
        f"with batches of {batch_size} the training loss on {data.classes} classes came to "
        f"{loss:.3g} in {epochs} epochs, not to {wanted[0]:g}; give more --epochs, another "
        "--learning-rate or a larger --loss"
    )


def settled(
    model: nn.Module, inputs: Tensor, labels: Tensor, steps: int, learning_rate: float
) -> nn.Module:
    """A copy after some steps on all the data, which take out what the noise of batches left."""
    net = copy.deepcopy(model)
    optimizer = torch.optim.SGD(net.parameters(), lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()
    return net


def measured(
    start: nn.Module,
    data: image_data.ImageData,
    batch_size: int,
    seed: int,
    drawn: bool,
    options: argparse.Namespace,
) -> dict[float, Net]:
    """One training: the edges of the spectrum at each loss, all of it at `--loss` if `drawn`."""
    model, progress = copy.deepcopy(start), not options.quiet
    training_set = (data.train_inputs, data.train_labels)
    found = {}
    for epoch, wanted in trained(
        model,
        data,
        (options.loss, *options.also),
        batch_size=batch_size,
        learning_rate=options.learning_rate,
        epochs=options.epochs,
        seed=seed,
        progress=progress,
    ):
        net = settled(model, *training_set, options.settle, options.learning_rate)
        objective = fm.Objective(net, nn.CrossEntropyLoss(), training_set)
        operators: dict[str, fm.LinearOperator] = {
            "H": fm.HessianOperator(objective),
            "G": fm.GaussNewtonOperator(objective),
        }
        edges = {n: Edge.of(o, seed=seed, progress=progress) for n, o in operators.items()}
        densities = {
            name: fm.spectral_density(
                operator,
                probes=options.probes,
                steps=options.steps,
                outliers=edges[name].above,
                seed=seed,
                progress=progress,
            )
            for name, operator in operators.items()
            if drawn and wanted == options.loss
        }
        with torch.no_grad():
            correct = fm.accuracy(net(data.test_inputs), data.test_labels)
        gradient = float(torch.linalg.vector_norm(objective.gradient()))
        found[wanted] = Net(
            objective.loss(), gradient, epoch, 100 * correct.item(), edges, densities
        )
    return found


Runs = dict[int, dict[str, list[dict[float, Net]]]]
"""By number of classes, by the label of the batch, for each seed, by loss."""


def count_table(runs: Runs, losses: Sequence[float]) -> fm.Table:
    """Outliers for each number of classes and each loss, by seed, with λ_{C−1} / λ_C."""
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
    """Numbers of the whole spectrum, mean ± standard deviation over the seeds."""
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
    """Whether the small batch's spectrum lies inside the large batch's, over the seeds."""
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


def picture(nets: dict[str, Net], classes: int, title: str) -> Any:
    """Densities of both Hessians, and the largest eigenvalues of H and G."""
    figure = plt.figure(figsize=(11.0, 5.2), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.5, 1))
    densities = {label: net.densities["H"] for label, net in nets.items()}
    # One width for both, so that their heights can be compared.
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


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", choices=image_data.NAMES, default="digits", help="which images")
    parser.add_argument("--root", type=Path, help="folder with the files of mnist, … , cifar10")
    parser.add_argument(
        "--classes", type=int, nargs="+", default=[3, 5, 10], help="how many, the first ones"
    )
    parser.add_argument("--seeds", type=int, default=1, help="how many trainings of each kind")
    parser.add_argument("--loss", type=float, default=0.1, help="train down to it, draw there")
    parser.add_argument(
        "--also",
        type=float,
        nargs="*",
        default=[0.5, 0.2, 0.02],
        help="losses to count outliers at",
    )
    parser.add_argument("--small-batch", type=int, default=16, help="examples in the small batch")
    parser.add_argument("--large-batch", type=int, help="10 %% of the training set unless told")
    parser.add_argument("--learning-rate", type=float, default=0.1, help="of plain SGD")
    parser.add_argument("--epochs", type=int, default=2000, help="at most")
    parser.add_argument("--settle", type=int, default=0, help="steps on all data before measuring")
    parser.add_argument("--width", type=int, default=64, help="units in a layer")
    parser.add_argument("--probes", type=int, default=10, help="random vectors of a density")
    parser.add_argument("--steps", type=int, default=90, help="of Lanczos from each")
    parser.add_argument("--quick", action="store_true", help="a smaller net, and less of all")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder to write to")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    if parser.parse_args(argv).quick:
        # What is said on the command line still holds.
        parser.set_defaults(**QUICK)
    options = parser.parse_args(argv)
    for name, low in (
        *((n, 1) for n in ("seeds", "epochs", "width", "steps", "small_batch")),
        ("probes", 2),
        ("settle", 0),
    ):
        if getattr(options, name) < low:
            parser.error(f"--{name.replace('_', '-')} must be {low} at least")
    if options.large_batch is not None and options.large_batch < 1:
        parser.error("--large-batch must be 1 at least")
    if min(options.loss, *options.also, options.learning_rate) <= 0:
        parser.error("--loss, --also and --learning-rate must be positive")
    if not 2 <= min(options.classes) <= max(options.classes) < PAIRS:
        parser.error(f"--classes must be between 2 and {PAIRS - 1}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, print and draw."""
    options = arguments(argv)
    mpl.use("Agg")
    try:
        data = image_data.load(options.data, options.root)
        if max(options.classes) > data.classes:
            raise ValueError(f"{data.name} has {data.classes} classes, not {max(options.classes)}")
        runs = all_runs(data, options)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    losses = sorted({options.loss, *options.also}, reverse=True)
    most = max(runs)
    drawn = {label: [s[options.loss] for s in stages] for label, stages in runs[most].items()}
    tables = {
        "Outliers above the widest gap, for each seed (in brackets the mean of λ_{C−1} / λ_C)": count_table(
            runs, losses
        ),
        f"The whole spectrum, {most} classes, training loss {options.loss:g}": spectrum_table(
            drawn
        ),
        "Small batch against large batch": nesting_table(runs, losses),
    }
    for title, table in tables.items():
        print(f"\n{title}\n{table.to_text()}")

    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"hessian_spectrum_{data.name}"
    first = {label: nets[0] for label, nets in drawn.items()}
    size = first["small batch"].densities["H"].size
    title = f"{data.name}, {most} classes, {size} parameters, training loss {options.loss:g}"
    figure = picture(first, most, title)
    figure.savefig(stem.with_suffix(".png"), dpi=130)
    plt.close(figure)
    text = "\n\n".join(f"{title}\n\n{table.to_markdown()}" for title, table in tables.items())
    stem.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    stem.with_suffix(".json").write_text(json.dumps(eigenvalues(runs), indent=1), encoding="utf-8")
    print(f"\nfigure: {stem}.png\ntables: {stem}.md\neigenvalues: {stem}.json")
    return 0


def all_runs(data: image_data.ImageData, options: argparse.Namespace) -> Runs:
    """Every training that was asked for."""
    runs: Runs = {}
    for classes in sorted(set(options.classes)):
        part = restricted(data, classes)
        count = len(part.train_inputs)
        batches = {
            "small batch": options.small_batch,
            "large batch": options.large_batch or round(0.1 * count),
        }
        if max(batches.values()) > count:
            raise ValueError(f"a batch is larger than the {count} images of {classes} classes")
        runs[classes] = {label: [] for label in batches}
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            start = network(part.features, classes, options.width)
            for label, size in batches.items():
                drawn = classes == max(options.classes)
                runs[classes][label].append(measured(start, part, size, seed, drawn, options))
    return runs


def eigenvalues(runs: Runs) -> list[dict[str, Any]]:
    """The largest eigenvalues of everything, for a file."""
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


if __name__ == "__main__":
    raise SystemExit(main())
