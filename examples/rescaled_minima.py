"""Dinh et al.'s argument in numbers: one function, three parametrisations, every measure.

Trains a ReLU network on images, rescales its layers and its neurons by factors that keep every
output (Dinh et al. 2017, arXiv:1703.04933), and measures all three networks. What changes is a
property of the parametrisation, not of the function.

    python examples/rescaled_minima.py                       # digits, about half a minute
    python examples/rescaled_minima.py --factor 100
    python examples/rescaled_minima.py --page docs/invariance.md   # the table on that page
"""

from __future__ import annotations

import argparse
import re
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

MARKS = "<!-- table -->", "<!-- end of table -->"
"""Marks around the table on a page."""

MEASURES = {
    "gradient_norm": None,
    "epsilon_sharpness": None,
    "random_sharpness": [{}, {"relative": True}],
    **dict.fromkeys(
        (
            "eigenvalues",
            "trace",
            "gauss_newton",
            "sam_sharpness",
            "average_sharpness",
            "pac_bayes_sharpness",
            "local_energy",
            "fisher_rao_norm",
            "relative_flatness",
            "critical_sharpness",
            "laplace_log_evidence",
        )
    ),
}
"""All except the density, with absolute and relative random perturbations."""

QUICK = {
    "epsilon_sharpness": {"iterations": 2},
    "random_sharpness": {"samples": 2, "relative": True},
    "fisher_rao_norm": None,
    "critical_sharpness": None,
}


def network(features: int, classes: int, width: int) -> nn.Sequential:
    """Return an MLP in float64, which keeps rounding out of the ratios."""
    return nn.Sequential(
        nn.Linear(features, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    ).double()


def train(
    model: nn.Module, inputs: Tensor, labels: Tensor, *, loss: float, steps: int, progress: bool
) -> None:
    """Train by gradient descent with momentum on all images, to a training loss of `loss`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss_fn = nn.CrossEntropyLoss()
    with tqdm(total=steps, desc="training", unit="step", disable=not progress, leave=False) as bar:
        for _ in range(steps):
            optimizer.zero_grad()
            found = loss_fn(model(inputs), labels)
            found.backward()
            optimizer.step()
            bar.set_postfix_str(f"loss {found.item():.3f}", refresh=False)
            bar.update()
            if found.item() <= loss:
                return
    raise ValueError(
        f"the training loss reached {found.item():.3g} in {steps} steps, not {loss:g}; give "
        "more --steps or a larger --loss"
    )


def write_page(page: Path, table: fm.InvarianceTable) -> None:
    """Write the table between the marks on a page."""
    text = page.read_text(encoding="utf-8")
    start, end = MARKS
    pattern = re.compile(f"{re.escape(start)}.*{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{page} has no {start} … {end} around the place of the table")
    block = f"{start}\n\n{table.table().to_markdown()}\n\n{end}"
    page.write_text(pattern.sub(lambda _: block, text), encoding="utf-8")


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
    parser.add_argument("--images", type=int, default=400, help="training images")
    parser.add_argument("--width", type=int, default=64, help="units per layer")
    parser.add_argument("--loss", type=float, default=0.05, help="training loss to stop at")
    parser.add_argument("--steps", type=int, default=2000, help="maximum number of training steps")
    parser.add_argument("--factor", type=float, default=10.0, help="factor of the rescaling")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--quick", action="store_true", help="only a few measures")
    parser.add_argument("--page", type=Path, help="page to write the table into")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder to write to")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(argv)
    for name in ("images", "width", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    for name in ("loss", "factor"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name} must be above 0")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Train, rescale, measure, print and draw."""
    options = arguments(argv)
    mpl.use("Agg")
    progress = not options.quiet
    torch.manual_seed(options.seed)
    try:
        data = image_data.load(options.data, options.root)
        model = network(data.features, data.classes, options.width)
        inputs = data.train_inputs[: options.images].double()
        labels = data.train_labels[: options.images]
        train(model, inputs, labels, loss=options.loss, steps=options.steps, progress=progress)
        table = fm.invariance_table(
            model,
            nn.CrossEntropyLoss(),
            (inputs, labels),
            measures=QUICK if options.quick else MEASURES,
            factor=options.factor,
            seed=options.seed,
            progress=progress,
        )
        if options.page is not None:
            write_page(options.page, table)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{data.name}: {len(labels)} training images\n\n{table}\n")
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"rescaled_minima_{data.name}"
    fm.plot(table)
    plt.gcf().savefig(stem.with_suffix(".png"), dpi=150)
    plt.close("all")
    stem.with_suffix(".md").write_text(table.table().to_markdown() + "\n", encoding="utf-8")
    stem.with_suffix(".json").write_text(table.to_json(indent=1), encoding="utf-8")
    print(
        f"figure: {stem.with_suffix('.png')}\ntable: {stem.with_suffix('.md')}\n"
        f"numbers: {stem.with_suffix('.json')}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
