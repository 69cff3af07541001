"""How time and memory grow with the model and with the data.

    python -m benchmarks.scale                  # 1e5 to 1e8 parameters, 1e3 to 1e6 examples
    python -m benchmarks.scale --quick          # a small range, without a figure
    python -m benchmarks.scale --device cuda --figure scale.png

Every point runs in a process of its own, so that its peak memory is its own: the resident memory
beyond what the interpreter takes once everything is imported and has run on a tiny net, or what
PyTorch allocated on a CUDA device.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import flatminima as fm

from .harness import arguments, in_turns, machine, now, print_table

ROOT = Path(__file__).resolve().parents[1]
FIGURE = ROOT / "docs" / "images" / "scale.png"
FEATURES, CLASSES = 64, 10
FEW_EXAMPLES, FEW_PARAMETERS = 64, 1.3e4
PARAMETERS = (1e5, 3e5, 1e6, 3e6, 1e7, 3e7, 1e8)
EXAMPLES = (1e3, 3e3, 1e4, 3e4, 1e5, 3e5, 1e6)
LARGE_END = 3
"""So many points at the large end give the slope."""
MEGABYTE = 2**20


@dataclasses.dataclass(frozen=True)
class Point:
    """One size, measured."""

    parameters: int
    examples: int
    gradient: float
    """Seconds, as the two that follow."""
    product: float
    top: float
    products: int
    """That the top eigenvalue took."""
    product_memory: float
    """Peak in megabytes, of gradients and products."""
    top_memory: float
    """Peak in megabytes of the top eigenvalue as well."""


def net(parameters: float) -> nn.Module:
    """64-w-w-w-10 with ReLU, w such that it has about so many parameters."""
    linear = FEATURES + CLASSES + 3
    width = max(1, round((math.sqrt(linear**2 + 8 * parameters) - linear) / 4))
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs in (FEATURES, width, width):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def objective(parameters: float, examples: float, device: str) -> fm.Objective:
    """A net and images of noise around a mean of each class, in batches of 1024."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (int(examples),), generator=generator)
    means = torch.randn(CLASSES, FEATURES, generator=generator)
    inputs = torch.randn(len(labels), FEATURES, generator=generator)
    # In strips, so that making the data is not what takes the most memory.
    for begin in range(0, len(labels), 2**16):
        inputs[begin : begin + 2**16] += means[labels[begin : begin + 2**16]]
    model = net(parameters).to(device)
    return fm.Objective(model, nn.CrossEntropyLoss(), (inputs, labels), progress=False)


def peak(device: str) -> float:
    """The most memory so far, in megabytes."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / MEGABYTE
    try:
        # Of this program alone; ru_maxrss counts what the parent had before it became this one.
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit / MEGABYTE


def measured(parameters: float, examples: float, options: argparse.Namespace) -> Point:
    """Gradient, product and top eigenvalue at one size."""
    device: str = options.device
    tiny = objective(100, 10, device)
    tiny.gradient()
    fm.lanczos(fm.HessianOperator(tiny), progress=False)
    before = peak(device)
    whole = objective(parameters, examples, device)
    hessian = fm.HessianOperator(whole)
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(whole.size, generator=generator).to(device)
    start = now(device)
    hessian.matvec(vector)
    rounds = 1 if now(device) - start > 2 else options.rounds
    seconds = in_turns(
        {"gradient": whole.gradient, "product": lambda: hessian.matvec(vector)},
        rounds=rounds,
        device=device,
    )
    product_memory = peak(device) - before
    start = now(device)
    found = fm.lanczos(hessian, basis_size=options.basis_size, progress=False)
    return Point(
        parameters=whole.size,
        examples=whole.examples,
        **seconds,
        top=now(device) - start,
        products=found.products,
        product_memory=product_memory,
        top_memory=peak(device) - before,
    )


def in_a_process_of_its_own(
    parameters: float, examples: float, options: argparse.Namespace
) -> Point:
    """`measured` by a fresh interpreter."""
    command = [sys.executable, "-m", "benchmarks.scale", "--device", options.device]
    command += ["--threads", str(options.threads), "--rounds", str(options.rounds)]
    if options.basis_size:
        command += ["--basis-size", str(options.basis_size)]
    command += ["--point", str(parameters), str(examples)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"The point of {parameters:g} parameters and {examples:g} examples ended with code "
            f"{done.returncode}; a negative one is a signal, -9 often that memory ran out."
        )
    return Point(**json.loads(done.stdout))


def slope(points: Sequence[Point], axis: str, quantity: str) -> float:
    """Of log quantity over log size at the large end: 1 where it grows in proportion."""
    end = points[-LARGE_END:]
    sizes, values = ([getattr(p, name) for p in end] for name in (axis, quantity))
    if min(values) <= 0:  # less memory than is told apart
        return math.nan
    x, y = np.log(sizes), np.log(values)
    return float(np.polyfit(x, y, 1)[0])


def table(points: Sequence[Point], axis: str) -> None:
    """One row for each point, and the slopes."""
    other = "examples" if axis == "parameters" else "parameters"
    print(f"\nGrowing the {axis}, with {getattr(points[0], other)} {other}:\n")
    header = (
        axis,
        "gradient (s)",
        "product (s)",
        "top eigenvalue (s)",
        "products",
        "product (MB)",
        "top eigenvalue (MB)",
    )
    rows: list[Sequence[str]] = [
        (
            f"{getattr(p, axis):,}",
            f"{p.gradient:.3g}",
            f"{p.product:.3g}",
            f"{p.top:.3g}",
            str(p.products),
            f"{p.product_memory:,.0f}",
            f"{p.top_memory:,.0f}",
        )
        for p in points
    ]
    if len(points) > 1:
        slopes = {name: f"{slope(points, axis, name):.2f}" for name in QUANTITIES}
        row = ["slope at the large end", *(slopes[n] for n in ("gradient", "product", "top")), ""]
        rows.append((*row, slopes["product_memory"], slopes["top_memory"]))
    print_table(header, rows)


QUANTITIES = {
    # Colours that are told apart without seeing red and green (Okabe and Ito).
    "gradient": ("gradient", "#0072B2", "o"),
    "product": ("Hessian product", "#E69F00", "s"),
    "top": ("top eigenvalue", "#D55E00", "^"),
    "product_memory": ("Hessian product", "#E69F00", "s"),
    "top_memory": ("top eigenvalue", "#D55E00", "^"),
}


def draw(series: dict[str, list[Point]], path: Path) -> None:
    """Time above, memory below; against the parameters and the examples."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots(2, len(series), sharey="row", squeeze=False)
    rows = (
        ("time (s)", ("gradient", "product", "top")),
        ("peak memory (MB)", ("product_memory", "top_memory")),
    )
    for column, (axis, points) in enumerate(series.items()):
        sizes = np.array([getattr(p, axis) for p in points], dtype=float)
        other = "examples" if axis == "parameters" else "parameters"
        axes[0][column].set_title(f"{getattr(points[0], other):,} {other}")
        for row, (label, names) in enumerate(rows):
            panel = axes[row][column]
            for name in names:
                text, colour, marker = QUANTITIES[name]
                values = [getattr(p, name) for p in points]
                panel.plot(sizes, values, color=colour, marker=marker, label=text)
            last = getattr(points[-1], names[-1])
            line = {"color": "0.45", "linestyle": "--", "label": "slope 1"}
            panel.plot(sizes, 2 * last * sizes / sizes[-1], **line)
            panel.set(xscale="log", yscale="log", xlabel=f"number of {axis}")
            # The reference line may leave the panel, which is scaled to what was measured.
            shown = [getattr(p, n) for points in series.values() for p in points for n in names]
            low, high = min(v for v in shown if v > 0), max(shown)
            panel.set_ylim(low / 2, high * 3)
            panel.grid(True, which="major", alpha=0.3)
            if column == 0:
                panel.set_ylabel(label)
                panel.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and draw."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, nargs="*", default=PARAMETERS)
    parser.add_argument("--examples", type=float, nargs="*", default=EXAMPLES)
    parser.add_argument("--basis-size", type=int, help="of Lanczos; its default unless told")
    parser.add_argument("--figure", type=Path, help=f"{FIGURE.relative_to(ROOT)} unless --quick")
    parser.add_argument("--quick", action="store_true", help="two small sizes of each")
    parser.add_argument("--point", type=float, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.point:
        print(json.dumps(dataclasses.asdict(measured(options.point[0], options.point[1], options))))
        return
    if options.quick:
        options.parameters, options.examples = (1e4, 1e5), (1e3, 1e4)
    elif options.figure is None:
        options.figure = FIGURE
    sizes = {"parameters": sorted(options.parameters), "examples": sorted(options.examples)}
    sizes = {axis: values for axis, values in sizes.items() if values}
    place: dict[str, Callable[[float], tuple[float, float]]] = {
        "parameters": lambda size: (size, FEW_EXAMPLES),
        "examples": lambda size: (FEW_PARAMETERS, size),
    }
    basis = options.basis_size or "the default"
    print(f"{machine(options.device)}; {options.device}, float32, basis_size: {basis}")
    series: dict[str, list[Point]] = {}
    with tqdm(total=sum(map(len, sizes.values())), unit="point", leave=False) as bar:
        for axis, values in sizes.items():
            series[axis] = []
            for size in values:
                bar.set_description(f"{size:g} {axis}")
                series[axis].append(in_a_process_of_its_own(*place[axis](size), options))
                bar.update()
    for axis, points in series.items():
        table(points, axis)
    if options.figure is not None:
        draw(series, options.figure)


if __name__ == "__main__":
    main()
