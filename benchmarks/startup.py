"""What `from flatminima import sharpness` adds to `import torch`, in fresh interpreters.

python -m benchmarks.startup
python -m benchmarks.startup --rounds 20 --modules 25
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

import flatminima

from .harness import arguments, machine, print_table

TIMED = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
from flatminima import sharpness
print(middle - start, time.perf_counter() - middle)
"""
ALONE = """
import time
start = time.perf_counter()
from flatminima import sharpness
print(time.perf_counter() - start)
"""


@dataclasses.dataclass(frozen=True)
class Module:
    """One that is loaded after torch, and what it costs without those it loads itself."""

    name: str
    seconds: float


def interpreter(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh one, which finds the library that this one found."""
    path = [str(Path(flatminima.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=True
    )


def seconds(script: str) -> list[float]:
    """The numbers that a script prints."""
    return [float(word) for word in interpreter("-c", script).stdout.split()]


def modules() -> list[Module]:
    """What flatminima loads beyond torch, dearest first."""
    statement = "import torch; from flatminima import sharpness"
    report = interpreter("-X", "importtime", "-c", statement).stderr
    lines = [line.removeprefix("import time:").split("|") for line in report.splitlines()]
    own = [(name.rstrip(), cost) for cost, _, name in (line for line in lines if len(line) == 3)]
    # Two spaces for each level; modules are reported once all that they load is there.
    torch_is_there = next(i for i, (name, _) in enumerate(own) if name == " torch")
    found = [Module(name.strip(), int(cost) / 1e6) for name, cost in own[torch_is_there + 1 :]]
    return sorted(found, key=lambda module: -module.seconds)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = arguments(__doc__.splitlines()[0], rounds=15)
    parser.add_argument("--modules", type=int, default=12, help="so many of the dearest are named")
    parser.add_argument("--quick", action="store_true", help="one round")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds = 1
    print(machine("cpu"))
    columns: dict[str, list[float]] = {name: [] for name in ("torch", "flatminima", "whole")}
    if not options.quick:
        seconds(TIMED)  # what is read from the disk for the first time
    for _ in tqdm(range(options.rounds), unit="round", leave=False):
        torch, more = seconds(TIMED)
        columns["torch"].append(torch)
        columns["flatminima"].append(more)
        columns["whole"] += seconds(ALONE)
    medians = {name: statistics.median(values) for name, values in columns.items()}
    loaded = modules()
    print()
    texts = {
        "torch": "`import torch`",
        "flatminima": "`from flatminima import sharpness` after it",
        "whole": "`from flatminima import sharpness` alone",
    }
    rows = [
        (text, f"{medians[name]:.3f}", f"{medians[name] / medians['torch']:.3f}")
        for name, text in texts.items()
    ]
    print_table(("statement", "seconds (median)", "of torch"), rows)
    total = sum(module.seconds for module in loaded)
    print(f"\nIt loads {len(loaded)} modules that torch has not, the dearest of them:\n")
    print_table(
        ("module", "own milliseconds", "share"),
        [
            (f"`{m.name}`", f"{1000 * m.seconds:.1f}", f"{100 * m.seconds / total:.0f} %")
            for m in loaded[: options.modules]
        ],
    )


if __name__ == "__main__":
    main()
