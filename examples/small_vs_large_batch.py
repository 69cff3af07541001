"""Small and large batches: does training with a large batch end in a sharper minimum?

Trains the network F1 of Keskar et al. (2017, arXiv:1609.04836), an MLP with five layers of 512
units, batch norm and ReLU, twice with Adam from the same start and for the same number of epochs:
once with a small batch and once with 10 % of the training set per batch. Prints the accuracies,
compares the sharpness, and saves the parametric plot along the line between the two models.

    python examples/small_vs_large_batch.py                      # digits, about a minute
    python examples/small_vs_large_batch.py --data mnist5k --seeds 3
    python examples/small_vs_large_batch.py --data fashion-mnist --root ~/data
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from tqdm import tqdm

import flatminima as fm
import image_data

SMALL_BATCH = {"digits": 16, "mnist5k": 32}
"""Batch sizes for small data sets; 256, as in the paper, is 0.4 % of the paper's data."""


def f1(features: int, classes: int, *, width: int = 512, depth: int = 5) -> nn.Sequential:
    """Return the paper's network F1."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [
            nn.Linear(features if i == 0 else width, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.Linear(width, classes))


def train(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    batch_size: int,
    epochs: int,
    seed: int,
    progress: bool = True,
) -> None:
    """Train with Adam on cross-entropy, without the last, shorter batch of each epoch."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters())
    loss_fn = nn.CrossEntropyLoss()
    model.train()
    with tqdm(total=epochs, desc=f"batch {batch_size}", unit="epoch", disable=not progress) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(inputs), generator=generator)
            for first in range(0, len(order) - batch_size + 1, batch_size):
                rows = order[first : first + batch_size]
                optimizer.zero_grad()
                loss = loss_fn(model(inputs[rows]), labels[rows])
                loss.backward()
                optimizer.step()
            bar.set_postfix_str(f"loss {loss.item():.2e}", refresh=False)
            bar.update()
    model.eval()


def scores(model: nn.Module, data: image_data.ImageData) -> dict[str, float]:
    """Return the accuracies on training and test data in per cent."""
    with torch.no_grad():
        train_accuracy = fm.accuracy(model(data.train_inputs), data.train_labels)
        test_accuracy = fm.accuracy(model(data.test_inputs), data.test_labels)
    return {
        "training accuracy (%)": 100 * train_accuracy.item(),
        "test accuracy (%)": 100 * test_accuracy.item(),
    }


def accuracy_table(results: dict[str, list[dict[str, float]]], batches: dict[str, int]) -> fm.Table:
    """Tabulate batch sizes and accuracies, mean ± standard deviation over the seeds."""
    names = list(next(iter(results.values()))[0])
    rows = []
    for label, runs in results.items():
        cells = [str(batches[label])]
        for name in names:
            values = [run[name] for run in runs]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.2f}{spread}")
        rows.append((label, *cells))
    return fm.Table(("trained with", "batch size", *names), tuple(rows))


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
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each kind")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of every training")
    parser.add_argument("--small-batch", type=int, help="examples in the small batch")
    parser.add_argument("--large-batch", type=int, help="default: 10 %% of the training set")
    parser.add_argument("--width", type=int, default=512, help="units per layer")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder to write to")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(argv)
    for name in ("seeds", "epochs", "width"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    for name in ("small_batch", "large_batch"):
        value = getattr(options, name)
        if value is not None and value < 2:
            parser.error(f"--{name.replace('_', '-')} must be at least 2 (batch norm needs two)")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, print and draw."""
    options = arguments(argv)
    mpl.use("Agg")
    try:
        data = image_data.load(options.data, options.root)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    count = len(data.train_inputs)
    batches = {
        "small batch": options.small_batch or SMALL_BATCH.get(data.name, 256),
        "large batch": options.large_batch or round(0.1 * count),
    }
    if max(batches.values()) > count:
        print(f"error: a batch is larger than the {count} training images", file=sys.stderr)
        return 2
    progress = not options.quiet
    loss_fn = nn.CrossEntropyLoss()
    training_set = (data.train_inputs, data.train_labels)
    reports: dict[str, list[fm.SharpnessReport]] = {label: [] for label in batches}
    accuracies: dict[str, list[dict[str, float]]] = {label: [] for label in batches}
    curve: fm.Interpolation | None = None
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        start = f1(data.features, data.classes, width=options.width)
        models = {label: copy.deepcopy(start) for label in batches}
        for label, model in models.items():
            train(
                model,
                *training_set,
                batch_size=batches[label],
                epochs=options.epochs,
                seed=seed,
                progress=progress,
            )
            accuracies[label].append(scores(model, data))
            report = fm.sharpness(model, loss_fn, training_set, seed=seed, progress=progress)
            reports[label].append(report)
        if curve is None:
            # One pair of models is enough for the figure: the first seed's.
            test = fm.Objective(start, loss_fn, (data.test_inputs, data.test_labels))
            curve = fm.interpolate(
                fm.Objective(start, loss_fn, training_set),
                *models.values(),
                metrics={"accuracy": fm.accuracy},
                also={"test": test},
                progress=progress,
            )
    assert curve is not None

    comparison = fm.compare(reports)
    print(f"\n{data.name}: {count} training and {len(data.test_inputs)} test images\n")
    print(accuracy_table(accuracies, batches).to_text())
    print(f"\n{comparison}\n")
    for note in (*reports["small batch"][0].notes, *curve.notes):
        print(f"Note: {note}")
    if curve.outcome is not fm.Outcome.COMPLETED:
        print(f"Note: {curve.outcome.value} Those points are gaps in the figure.")

    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"small_vs_large_batch_{data.name}"
    figure, ax = plt.subplots(figsize=(6.0, 3.8), layout="constrained")
    fm.plot(curve, ax)
    ax.set_title(f"{data.name}: from small batch (α = 0) to large batch (α = 1)", pad=18)
    picture = stem.with_suffix(".png")
    figure.savefig(picture, dpi=150)
    plt.close(figure)
    table = stem.with_suffix(".md")
    table.write_text(
        accuracy_table(accuracies, batches).to_markdown()
        + "\n\n"
        + comparison.table().to_markdown()
        + "\n",
        encoding="utf-8",
    )
    stem.with_suffix(".json").write_text(comparison.to_json(indent=1), encoding="utf-8")
    print(f"figure: {picture}\ntable: {table}\nnumbers: {stem.with_suffix('.json')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
