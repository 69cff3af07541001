"""What a Hessian product over the data set costs, in gradients of the same data.

    python -m benchmarks.products
    python -m benchmarks.products --models mlp lstm --methods kept rebuilt

The gradient is that of a plain training loop. Times are medians of measurements taken in turns.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import flatminima as fm

from .harness import arguments, in_turns, machine, print_table
from .models import MODELS, Problem

COLUMNS = 8
METHODS = ("kept", "rebuilt", "columns", "batched", "gauss_newton")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--quick", action="store_true", help="one small model")
    options = parser.parse_args(argv)
    if options.quick:
        options.models, options.rounds = ["mlp"], 1
    torch.set_num_threads(options.threads)
    print(machine(options.device))
    print()
    rows = []
    for name in options.models:
        torch.manual_seed(0)
        problem = MODELS[name](options.device)
        rows.append(_row(name, problem, options.methods, options.rounds))
    header = ["model", "parameters", "gradient (ms)", "Objective.gradient"]
    names = {
        "kept": "product, graph kept",
        "rebuilt": "product, graph rebuilt",
        "columns": f"each of {COLUMNS} columns, graph kept",
        "batched": f"each of {COLUMNS}, batched autograd",
        "gauss_newton": "Gauss–Newton product, graph kept",
    }
    header += [names[m] for m in options.methods]
    print_table([*header, "graphs kept (MiB)"], rows)


def _row(name: str, problem: Problem, methods: Sequence[str], rounds: int) -> list[str]:
    objective = fm.Objective(problem.model, problem.loss_fn, problem.batches)
    generator = torch.Generator(problem.device).manual_seed(0)
    shape = (objective.size, COLUMNS)
    block = torch.randn(shape, generator=generator, device=problem.device)
    vector = block[:, 0].contiguous()
    kept = fm.HessianOperator(objective, keep_graph=True)
    rebuilt = fm.HessianOperator(objective, keep_graph=False)
    newton = fm.GaussNewtonOperator(objective, keep_graph=True)
    tasks: dict[str, Callable[[], object]] = {
        "gradient": problem.gradient,
        "own": objective.gradient,
        "kept": lambda: kept @ vector,
        "rebuilt": lambda: rebuilt @ vector,
        "columns": lambda: kept @ block,
        "gauss_newton": lambda: newton @ vector,
    }
    wanted = {n: t for n, t in tasks.items() if n in {"gradient", "own", *methods}}
    with contextlib.ExitStack() as sessions:
        if "gauss_newton" in methods:
            sessions.enter_context(newton.session())
        sessions.enter_context(kept.session())
        if "batched" in methods:
            wanted["batched"] = _batched(problem, block)
        seconds = in_turns(wanted, rounds=rounds, device=problem.device)
        held = kept.kept_bytes / 2**20
    unit = seconds["gradient"]
    cells = []
    for method in methods:
        share = seconds[method] / unit / (COLUMNS if method in ("columns", "batched") else 1)
        cells.append(f"{share:.2f}")
    own = f"{seconds['own'] / unit:.2f}"
    return [name, f"{problem.size}", f"{unit * 1e3:.1f}", own, *cells, f"{held:.0f}"]


def _batched(problem: Problem, block: Tensor) -> Callable[[], object]:
    """Products with several vectors by batched autograd on kept graphs, without this library."""
    parameters = list(problem.model.parameters())
    pieces = torch.split(block.T, [p.numel() for p in parameters], dim=1)
    columns = [c.reshape(-1, *p.shape) for c, p in zip(pieces, parameters, strict=True)]
    graphs = []
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for x, y in problem.batches:
            loss = problem.loss_fn(problem.model(x), y)
            graphs.append(torch.autograd.grad(loss, parameters, create_graph=True))

    def products() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operations that are done one by one
            for gradients in graphs:
                torch.autograd.grad(
                    gradients, parameters, columns, retain_graph=True, is_grads_batched=True
                )

    return products


if __name__ == "__main__":
    main()
