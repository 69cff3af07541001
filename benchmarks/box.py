"""What the maximisers of Keskar's metric cost themselves: time and memory, function excluded.

    python -m benchmarks.box            # n = 1e5, 1e6 and 1e7; SciPy up to 1e6
    python -m benchmarks.box --full     # SciPy at 1e7 too, which takes minutes and 5 GB
    python -m benchmarks.box --threads 1 --dtype float64 --device cuda

The function is a separable quadratic, of which the maximum is partly inside the box and partly on
its faces. The time spent in it is measured in the same run and taken off. Each solver makes ten
iterations, as the metric prescribes; the fastest of some runs counts, SciPy's and ours in turn.
"""

from __future__ import annotations

import dataclasses
import tracemalloc
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from flatminima.algorithms.optimize.box import BoxMaximum, maximize_over_box
from flatminima.algorithms.optimize.lbfgsb import MEMORY

from .harness import arguments, machine, now, print_table

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


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="SciPy at n = 1e7 too")
    parser.add_argument("--quick", action="store_true", help="n = 1e4 alone")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"))
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e5, 1e6, 1e7])
    options = parser.parse_args(argv)
    if options.quick:
        options.sizes, options.rounds = [1e4], 1
    torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    print(f"{machine(options.device)}; {options.device}, {options.dtype}")
    print(f"\nOwn seconds of {ITERATIONS} iterations, the function's taken off:\n")
    rows = []
    sizes = [int(size) for size in options.sizes]
    for size in tqdm(sizes, unit="size", leave=False):
        hill = Hill(size, dtype, device)
        solvers = ["lbfgsb", "scipy"] if size < 10**7 or options.full else ["lbfgsb"]
        runs: dict[str, list[Cost]] = {solver: [] for solver in solvers}
        for number in range(options.rounds):
            for solver in solvers:
                if solver == "lbfgsb" or number * size < 2 * 10**6:
                    runs[solver].append(own_cost(hill, solver))
        best = {s: min(costs, key=lambda cost: cost.seconds) for s, costs in runs.items()}
        mine, theirs = best["lbfgsb"].seconds, best["scipy"].seconds if len(best) > 1 else None
        other = [f"{theirs:.3g}", f"{theirs / mine:.1f}"] if theirs else ["", ""]
        counts = " and ".join(f"{c.found.evaluations}: {c.found.value:.6g}" for c in best.values())
        rows.append((f"{size:,}", f"{mine:.3g}", *other, counts))
    print_table(("n", "lbfgsb", "scipy", "ratio", "evaluations: maximum"), rows)
    size = min(MEMORY_SIZE, sizes[-1])
    print(f"\nPeak memory in vectors of n = {size:,} (m = {MEMORY}):\n")
    hill = Hill(size, dtype, device)
    peaks = [(solver, f"{peak_vectors(hill, solver):.1f}") for solver in ("lbfgsb", "scipy")]
    print_table(("solver", "vectors"), peaks)


if __name__ == "__main__":
    main()
