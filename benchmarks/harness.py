"""Timing in turns, and what the figures were measured on."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

__all__ = ["arguments", "in_turns", "machine", "print_table"]

PACKAGES = ("torch", "numpy", "scipy", "pyhessian", "curvlinops-for-pytorch", "hessian-eigenthings")


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each, in turns")
    return parser


def machine(device: str) -> str:
    """The machine and the versions, in a line."""
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} not installed")
    chip = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    threads = torch.get_num_threads()
    return f"{chip}, {threads} threads, Python {platform.python_version()}, " + ", ".join(versions)


def in_turns(
    tasks: Mapping[str, Callable[[], object]], *, rounds: int, device: str
) -> dict[str, float]:
    """The median seconds of each task, run one after the other in every round.

    Turns share whatever else the machine is doing, so that ratios hold where times do not. Each
    task is run once before, which is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name, task in tasks.items():
            _wait(device)
            start = time.perf_counter()
            task()
            _wait(device)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows as a Markdown table."""
    print("| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
