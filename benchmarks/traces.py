"""Errors of traces and diagonals at the same number of products, method by method.

    python -m benchmarks.traces
    python -m benchmarks.traces --models mlp --products 50 --seeds 40

The nets are trained on real images. Every method is unbiased, so that the spread over seeds is its
error; beside it stands the standard error that the results themselves tell.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import flatminima as fm

from .harness import arguments, machine, print_table
from .models import Problem
from .trained import TRAINED

__all__ = ["measure"]

HEADER = ("products", "quantity", "method", "relative error", "standard error told")

Call = Callable[[fm.LinearOperator, int, int], tuple[Tensor, Tensor]]


def _trace(method: Any) -> Call:
    def call(operator: fm.LinearOperator, products: int, seed: int) -> tuple[Tensor, Tensor]:
        found = fm.trace(operator, method=method, products=products, seed=seed, progress=False)
        return torch.tensor([found.value]), torch.tensor([found.standard_error])

    return call


def _diagonal(method: Any) -> Call:
    def call(operator: fm.LinearOperator, products: int, seed: int) -> tuple[Tensor, Tensor]:
        found = fm.diagonal(operator, method=method, products=products, seed=seed, progress=False)
        return found.values, found.standard_error

    return call


CALLS: dict[tuple[str, str], Call] = {
    **{("trace", method): _trace(method) for method in ("hutchinson", "hutch++", "xtrace")},
    **{("diagonal", method): _diagonal(method) for method in ("hutchinson", "xdiag")},
}


def measure(problem: Problem, products: Sequence[int], seeds: int) -> list[tuple[str, ...]]:
    """A row for each number of products and each method."""
    objective = fm.Objective(problem.model, problem.loss_fn, problem.batches)
    operator = fm.HessianOperator(objective)
    rows: list[tuple[str, ...]] = []
    with operator.session():
        for count in products:
            for (quantity, method), call in CALLS.items():
                print(f"  {count} products, {quantity}, {method}", file=sys.stderr)
                found = [call(operator, count, seed) for seed in range(seeds)]
                values = torch.stack([value for value, _ in found]).double()
                told = torch.stack([error for _, error in found]).double()
                size = float(values.mean(dim=0).norm())
                met = math.sqrt(float(values.var(dim=0).sum())) / size
                mean = math.sqrt(float(told.square().sum()) / seeds) / size
                rows.append((str(count), quantity, method, f"{met:.2%}", f"{mean:.2%}"))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=TRAINED, default=list(TRAINED))
    parser.add_argument("--products", nargs="+", type=int, default=[50, 100])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="one net, few seeds")
    options = parser.parse_args(argv)
    if options.quick:
        options.models, options.products, options.seeds = ["lstm"], [12], 2
    torch.set_num_threads(options.threads)
    print(f"{machine(options.device)}\n")
    for name in options.models:
        problem = TRAINED[name](options.device)
        print(f"**{name}**, {problem.size} parameters: {TRAINED[name].__doc__}\n")
        print_table(HEADER, measure(problem, options.products, options.seeds))
        print()


if __name__ == "__main__":
    main()
