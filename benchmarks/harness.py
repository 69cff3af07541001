"""Options, timing in turns, tables, and what the figures were measured on."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

__all__ = ["arguments", "in_turns", "machine", "now", "print_table", "turns"]

PACKAGES = ("torch", "numpy", "scipy")
PEERS = ("pyhessian", "curvlinops-for-pytorch", "hessian-eigenthings")


def arguments(description: str, *, rounds: int = 5) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--rounds", type=int, default=rounds, help="measurements of each, in turns")
    return parser


def machine(device: str, *, peers: bool = False) -> str:
    """The machine and the versions, in a line."""
    versions = []
    for name in PACKAGES + PEERS * peers:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} not installed")
    chip = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    threads = torch.get_num_threads()
    return (
        f"{chip}, {threads} thread{'s' * (threads > 1)}, Python {platform.python_version()}, "
        + ", ".join(versions)
    )


def _processor() -> str:
    """The processor's name where the system tells it, or its kind."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def now(device: str | torch.device) -> float:
    """The time in seconds once the device has done its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def in_turns(
    tasks: Mapping[str, Callable[[], object]], *, rounds: int, device: str, warm: bool = True
) -> dict[str, float]:
    """The median seconds of each task, by `turns`."""
    seconds = turns(tasks, rounds=rounds, device=device, warm=warm)
    return {name: statistics.median(values) for name, values in seconds.items()}


def turns(
    tasks: Mapping[str, Callable[[], object]], *, rounds: int, device: str, warm: bool = True
) -> dict[str, list[float]]:
    """The seconds of each task in every round, in which they are run one after the other.

    Turns share whatever else the machine is doing, so that ratios hold where times do not. With
    `warm` each task is run once before, which is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + warm):
        for name, task in tasks.items():
            start = now(device)
            task()
            end = now(device)
            if number >= warm:
                seconds[name].append(end - start)
    return seconds


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows as a Markdown table, aligned for reading as it is."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, ["-" * width for width in widths], *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("| " + " | ".join(cells) + " |", flush=True)
