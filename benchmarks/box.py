"""What the maximisers of Keskar's metric cost themselves: time and memory, function excluded.

    python -m benchmarks.box            # n = 1e5, 1e6 and 1e7; SciPy up to 1e6
    python -m benchmarks.box --full     # SciPy at 1e7 too, which takes minutes and 5 GB
    python -m benchmarks.box --threads 1 --dtype float64 --device cuda

The function is a separable quadratic, of which the maximum is partly inside the box and partly on
its faces. The time spent in it is measured in the same run and taken off. Each solver makes ten
iterations, as the metric prescribes; the fastest of some runs counts, SciPy's and ours in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import time
import tracemalloc
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flatminima.optimize.box import BoxMaximum, maximize_over_box
from flatminima.optimize.lbfgsb import MEMORY

ITERATIONS = 10
MEMORY_SIZE = 10**6


class Hill:
    """−½ Σ a (x − c)², with the time that was spent in it."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Curvatures spread over two orders of magnitude; half of the maximisers are outside."""
        generator = torch.Generator().manual_seed(0)
        curvature = torch.randn(size, generator=generator).exp()
        self.root = curvature.sqrt_().to(device, dtype)
        self.target = torch.randn(size, generator=generator).mul_(1.5).to(device, dtype)
        self.seconds = 0.0

    def __call__(self, x: Tensor) -> tuple[float, Tensor]:
        """Value and gradient; the value reads them back, so that nothing is left running."""
        start = now(x.device)
        scaled = (self.target - x).mul_(self.root)
        value = -float(torch.dot(scaled, scaled)) / 2
        gradient = scaled.mul_(self.root)
        self.seconds += now(x.device) - start
        return value, gradient


def now(device: torch.device) -> float:
    """The time once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def maximized(hill: Hill, solver: str) -> BoxMaximum:
    """Ten iterations over the unit box."""
    return maximize_over_box(
        hill,
        torch.ones_like(hill.target),
        iterations=ITERATIONS,
        solver="scipy" if solver == "scipy" else "lbfgsb",
        on_evaluation=lambda _: None,
    )


@dataclasses.dataclass
class Cost:
    """Of one solver at one size."""

    seconds: float
    found: BoxMaximum


def own_cost(hill: Hill, solver: str) -> Cost:
    """Seconds of one run, those in the function taken off."""
    hill.seconds = 0.0
    start = now(hill.target.device)
    found = maximized(hill, solver)
    return Cost(now(hill.target.device) - start - hill.seconds, found)


class LiveTensors(TorchDispatchMode):
    """The most bytes that tensors made meanwhile take at a time."""

    def __init__(self) -> None:
        """Nothing is made yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.users: dict[int, int] = {}
        self.bytes = self.most = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation and count what it made."""
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else [made]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage.data_ptr(), storage.nbytes()
                if key not in self.users:
                    self.bytes += size
                    self.most = max(self.most, self.bytes)
                self.users[key] = self.users.get(key, 0) + 1
                weakref.finalize(tensor, self.drop, key, size)
        return made

    def drop(self, key: int, size: int) -> None:
        """One user less of some memory."""
        self.users[key] -= 1
        if not self.users[key]:
            del self.users[key]
            self.bytes -= size


def peak_vectors(hill: Hill, solver: str) -> float:
    """Peak memory of a run, in vectors of the function's type; the box and results included."""
    small = Hill(10, hill.target.dtype, hill.target.device)
    for each in (small, hill):  # the first for what is imported on the way
        # NumPy's memory is traced by tracemalloc, torch's is not.
        tracemalloc.start()
        with LiveTensors() as tensors:
            maximized(each, solver)
        arrays = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return float(tensors.most + arrays) / hill.target.nbytes


def describe(device: torch.device) -> str:
    """Machine and versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return (
        f"{name or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, numpy {np.__version__}, scipy {scipy.__version__}, python "
        f"{platform.python_version()}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="SciPy at n = 1e7 too")
    parser.add_argument("--threads", type=int, help="of torch; its default unless told")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e5, 1e6, 1e7])
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    print(f"{describe(device)}, {options.dtype} on {device}\n")
    print(f"own seconds of {ITERATIONS} iterations")
    print(f"{'n':>10}  {'lbfgsb':>8}  {'scipy':>8}  {'ratio':>6}  evaluations, maxima")
    for size in map(int, options.sizes):
        hill = Hill(size, dtype, device)
        solvers = ["lbfgsb", "scipy"] if size < 10**7 or options.full else ["lbfgsb"]
        runs: dict[str, list[Cost]] = {solver: [] for solver in solvers}
        for number in range(5 if size <= 10**6 else 3):
            for solver in solvers:
                if solver == "lbfgsb" or number * size < 2 * 10**6:
                    runs[solver].append(own_cost(hill, solver))
        best = {s: min(costs, key=lambda cost: cost.seconds) for s, costs in runs.items()}
        mine, theirs = best["lbfgsb"], best.get("scipy")
        counts = ", ".join(f"{c.found.evaluations}: {c.found.value:.6g}" for c in best.values())
        columns = f"{theirs.seconds:8.3f}  {theirs.seconds / mine.seconds:6.1f}" if theirs else ""
        print(f"{size:10d}  {mine.seconds:8.3f}  {columns:16}  {counts}", flush=True)
    print(f"\npeak memory in vectors of n = {MEMORY_SIZE} and {options.dtype} (m = {MEMORY})")
    hill = Hill(MEMORY_SIZE, dtype, device)
    for solver in ("lbfgsb", "scipy"):
        print(f"{solver:>10}  {peak_vectors(hill, solver):8.1f}", flush=True)


if __name__ == "__main__":
    main()
