"""The structure of the Hessian of a trained classifier: a bulk near zero and a few outliers.

Trains a small network without batch norm on images of 3, 5 and 10 classes, once with a small and
once with a large batch, from the same start, with the same learning rate, to the same training
loss. Counts the outliers of the Hessian and of the Gauss–Newton matrix by the widest gap among
their largest eigenvalues, and draws the density of all eigenvalues (Sagun et al. 2017,
arXiv:1706.04454; Papyan 2020, arXiv:2008.11865).

    python examples/hessian_spectrum.py                       # digits, about a minute
    python examples/hessian_spectrum.py --seeds 5
    python examples/hessian_spectrum.py --quick               # seconds
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from tqdm import tqdm

import flatminima as fm
import image_data
from spectrum_report import (
    PAIRS,
    Edge,
    Net,
    Runs,
    count_table,
    eigenvalues,
    nesting_table,
    picture,
    spectrum_table,
)

QUICK = {"classes": [3, 10], "loss": 0.3, "also": [], "width": 32, "probes": 4, "steps": 40}


def network(features: int, classes: int, width: int) -> nn.Sequential:
    """Return an MLP without batch norm, which removes the outliers (Ghorbani et al. 2019)."""
    return nn.Sequential(
        nn.Linear(features, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def restricted(data: image_data.ImageData, classes: int) -> image_data.ImageData:
    """Return only the images of the first few classes."""
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
    """Train with plain SGD; yield the epoch and each of `losses` once the training loss reaches it.

    The loss is checked every 10 steps: with small batches an epoch has so many steps that the loss
    at its end would be far below the wanted one.
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
        f"with batches of {batch_size} the training loss on {data.classes} classes reached "
        f"{loss:.3g} in {epochs} epochs, not {wanted[0]:g}; give more --epochs, another "
        "--learning-rate or a larger --loss"
    )


def settled(
    model: nn.Module, inputs: Tensor, labels: Tensor, steps: int, learning_rate: float
) -> nn.Module:
    """Return a copy after some steps on all data, which remove the noise of the batches."""
    net = copy.deepcopy(model)
    optimizer = torch.optim.SGD(net.parameters(), lr=learning_rate)
    loss_fn = nn.CrossEntropyLoss()
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(net(inputs), labels).backward()
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
    """Train once; measure the edges of the spectrum at each loss, and all of it if `drawn`."""
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


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", choices=image_data.NAMES, default="digits", help="which images")
    parser.add_argument(
        "--root", type=Path, help="folder with the files of mnist, fashion-mnist or cifar10"
    )
    parser.add_argument(
        "--classes",
        type=int,
        nargs="+",
        default=[3, 5, 10],
        help="numbers of classes, taken in order",
    )
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each kind")
    parser.add_argument(
        "--loss", type=float, default=0.1, help="training loss to draw the spectrum at"
    )
    parser.add_argument(
        "--also",
        type=float,
        nargs="*",
        default=[0.5, 0.2, 0.02],
        help="further losses at which to count outliers",
    )
    parser.add_argument("--small-batch", type=int, default=16, help="examples in the small batch")
    parser.add_argument("--large-batch", type=int, help="default: 10 %% of the training set")
    parser.add_argument("--learning-rate", type=float, default=0.1, help="of plain SGD")
    parser.add_argument("--epochs", type=int, default=2000, help="maximum number of epochs")
    parser.add_argument("--settle", type=int, default=0, help="steps on all data before measuring")
    parser.add_argument("--width", type=int, default=64, help="units per layer")
    parser.add_argument("--probes", type=int, default=10, help="random vectors of a density")
    parser.add_argument("--steps", type=int, default=90, help="Lanczos steps from each")
    parser.add_argument("--quick", action="store_true", help="a smaller net and fewer settings")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder to write to")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    if parser.parse_args(argv).quick:
        # Arguments on the command line override the quick settings.
        parser.set_defaults(**QUICK)
    options = parser.parse_args(argv)
    for name, low in (
        *((n, 1) for n in ("seeds", "epochs", "width", "steps", "small_batch")),
        ("probes", 2),
        ("settle", 0),
    ):
        if getattr(options, name) < low:
            parser.error(f"--{name.replace('_', '-')} must be at least {low}")
    if options.large_batch is not None and options.large_batch < 1:
        parser.error("--large-batch must be at least 1")
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
        "Outliers for each seed, and the mean of λ_{C−1} / λ_C": count_table(runs, losses),
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
    """Run every training on the command line's grid."""
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


if __name__ == "__main__":
    raise SystemExit(main())
