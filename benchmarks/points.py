"""The loss at many points, and what reading the data anew costs.

    python -m benchmarks.points
    python -m benchmarks.points --device cuda --points 16

Every figure is a time over that of as many plain passes: the model called on the batches at hand,
without gradients, once for each point. "kept": the batches stay on the device; "anew": a
DataLoader is read for them, example by example, as most people have it. Each is measured with a
call of `loss_at` for each point and with one of `losses_at` for all. The last column evaluates all
points of a batch at once, `torch.func.vmap` over stacked parameters; the library does not.

A second table has the parts of a reading that the library adds, in GB/s.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

import flatminima as fm
from flatminima.support.trees import fingerprint

from .harness import arguments, in_turns, machine, print_table
from .models import MODELS, Problem


def small(device: str) -> Problem:
    """A small net with small batches, where calls cost more than arithmetic."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(64, 64, generator=generator), torch.randint(10, (64,), generator=generator))
        for _ in range(16)
    ]
    return Problem(nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)), batches, device)


def ratios(problem: Problem, points: int, rounds: int) -> list[str]:
    """One row: each way's time over that of plain passes."""
    model, loss_fn, batches = problem.model, problem.loss_fn, problem.batches
    examples: ConcatDataset[tuple[Tensor, ...]] = ConcatDataset(
        [TensorDataset(x.cpu(), y.cpu()) for x, y in batches]
    )
    loader = DataLoader(examples, batch_size=len(batches[0][1]))
    kept = fm.Objective(model, loss_fn, batches, progress=False)
    anew = fm.Objective(model, loss_fn, loader, cache=False, progress=False)
    generator = torch.Generator().manual_seed(0)
    shifts = 1e-3 * torch.randn(points, kept.size, generator=generator).to(kept.device)

    def plain() -> list[float]:
        with torch.no_grad():
            return [
                float(torch.stack([loss_fn(model(x), y) for x, y in batches]).mean())
                for _ in range(points)
            ]

    own = {n: p.detach() for n, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    pieces = kept.layout.unflatten
    moved = [dict(zip(own, pieces(kept.point() + s), strict=True)) for s in shifts]
    stacked = {n: torch.stack([state[n] for state in moved]) for n in own}

    def together() -> Tensor:
        with torch.no_grad():
            means = []
            for x, y in batches:

                def loss(state: dict[str, Tensor], x: Tensor = x, y: Tensor = y) -> Tensor:
                    return F.cross_entropy(functional_call(model, (state, buffers), (x,)), y)

                means.append(vmap(loss, randomness="different")(stacked))
            return torch.stack(means).mean(0).cpu()

    tasks: dict[str, Callable[[], object]] = {
        "plain": plain,
        "kept, one by one": lambda: [kept.loss_at(s) for s in shifts],
        "kept, all": lambda: kept.losses_at(shifts),
        "anew, one by one": lambda: [anew.loss_at(s) for s in shifts],
        "anew, all": lambda: anew.losses_at(shifts),
    }
    try:
        together()
        tasks["vmap"] = together
    except RuntimeError:  # no batching rule
        pass
    seconds = in_turns(tasks, rounds=rounds, device=problem.device)
    names = list(tasks)[1:]
    row = [f"{seconds[name] / seconds['plain']:.2f}" for name in names]
    return row if "vmap" in tasks else [*row, "fails"]


def reading(examples: int, width: int, rounds: int) -> list[list[str]]:
    """The speed of a checksum beside those of a CRC and of a copy, in batches of 1024."""
    batches = torch.split(torch.randn(examples, width), 1024)
    tasks = {
        "checksum of the library": lambda: [fingerprint(x) for x in batches],
        "CRC-32 alone": lambda: [zlib.crc32(x.reshape(-1).numpy().data) for x in batches],
        "copy": lambda: [x.clone() for x in batches],
    }
    seconds = in_turns(tasks, rounds=rounds, device="cpu")
    size = 4e-9 * examples * width
    return [[name, f"{size / s:.1f}"] for name, s in seconds.items()]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = arguments("Many points, and readings of the data.", rounds=3)
    parser.add_argument("--points", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="one small model and little data")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    print(machine(options.device), f"{options.points} points", sep=", ", end="\n\n")
    models = {"small MLP": small, **({} if options.quick else MODELS)}
    examples = 10**3 if options.quick else 10**6
    rows = []
    for name, make in models.items():
        rows.append([name, *ratios(make(options.device), options.points, options.rounds)])
    header = ["", "kept, one by one", "kept, all", "anew, one by one", "anew, all", "vmap"]
    print_table(header, rows)
    print()
    print_table(["", "64 floats (GB/s)"], reading(examples, 64, options.rounds))
    print()
    print_table(["", "3072 floats (GB/s)"], reading(examples // 100, 3072, options.rounds))


if __name__ == "__main__":
    main()
