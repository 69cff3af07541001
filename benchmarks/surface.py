"""A surface around nets for real digits: seconds, and over as many plain passes of the model.

    python -m benchmarks.surface
    python -m benchmarks.surface --points 101

The data are the 1347 training images of the examples, in one batch that is kept on the device; the
directions are random, normalised filter by filter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import nn

import flatminima as fm

from .harness import arguments, machine, now, print_table

WIDTHS = 64, 256


def row(width: int, points: int, device: str) -> list[str]:
    """Parameters, seconds, milliseconds for a point, and the ratio to plain passes."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:1347] / 16, dtype=torch.float32, device=device)
    y = torch.tensor(labels[:1347], device=device)
    model = nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    ).to(device)
    loss_fn = nn.CrossEntropyLoss()
    objective = fm.Objective(model, loss_fn, (x, y), batch_size=len(x))
    directions = fm.random_directions(objective)
    fm.surface(objective, directions, points=3, progress=False)
    start = now(device)
    fm.surface(objective, directions, points=points, progress=False)
    seconds = now(device) - start
    start = now(device)
    passes = 200
    with torch.no_grad():
        for _ in range(passes):
            loss_fn(model(x), y).item()
    plain = (now(device) - start) / passes
    each = seconds / points**2
    return [
        f"64-{width}-{width}-10",
        str(objective.size),
        f"{seconds:.1f}",
        f"{1e3 * each:.2f}",
        f"{each / plain:.2f}",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = arguments("A surface around nets for real digits.", rounds=1)
    parser.add_argument("--points", type=int, default=51, help="along each of two directions")
    parser.add_argument("--quick", action="store_true", help="5 × 5 points")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    points = 5 if options.quick else options.points
    print(machine(options.device), f"{points} × {points} points", sep=", ", end="\n\n")
    rows = [row(width, points, options.device) for width in WIDTHS]
    header = ["net", "parameters", "seconds", "ms for a point", "over plain passes"]
    print_table(header, rows)


if __name__ == "__main__":
    main()
