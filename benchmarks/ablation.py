"""How much longer a Hessian product takes without each hand-written second derivative.

    python -m benchmarks.ablation
    python -m benchmarks.ablation --models resnet20 --pieces convolution batch_norm --rounds 50

Graphs are kept, on the first batch of each model. Products are taken in turns; a cell is the median
over the rounds of the ratio to the product with everything.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import statistics
from collections.abc import Callable, Sequence

import torch

import flatminima as fm
from flatminima.derivatives.hand_written import PIECES

from .harness import arguments, machine, print_table, turns
from .models import MODELS, Problem, transformer256

# The hand-written derivatives that each model has something to do for.
USED: dict[str, tuple[str, ...]] = {
    "mlp": ("batch_norm",),
    "resnet20": ("batch_norm", "channels_last", "convolution"),
    "transformer": ("attention",),
    "transformer256": ("attention",),
    "lstm": ("lstm",),
}
PROBLEMS = MODELS | {"transformer256": transformer256}
EVERYTHING, NOTHING = "with all", "without any"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = arguments(__doc__ or "", rounds=30)
    parser.add_argument("--models", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--pieces", nargs="+", default=list(PIECES), choices=PIECES)
    parser.add_argument("--quick", action="store_true", help="two small models, one round")
    options = parser.parse_args(argv)
    if options.quick:
        options.models, options.rounds = ["mlp", "lstm"], 1
    torch.set_num_threads(options.threads)
    print(machine(options.device))
    print()
    rows = []
    for name in options.models:
        ratios = _ratios(PROBLEMS[name](options.device), name, options.pieces, options.rounds)
        rows.append([name, *(ratios.get(c, "") for c in (EVERYTHING, *options.pieces, NOTHING))])
    header = ["model", "product (ms)", *(f"without {p}" for p in options.pieces), NOTHING]
    print_table(header, rows)


def _ratios(problem: Problem, name: str, pieces: Sequence[str], rounds: int) -> dict[str, str]:
    chosen = [p for p in pieces if p in USED[name]]
    omitted: dict[str, set[str]] = {EVERYTHING: set(), **{p: {p} for p in chosen}}
    omitted[NOTHING] = set(PIECES)
    tasks: dict[str, Callable[[], object]] = {}
    with contextlib.ExitStack() as sessions:
        for label, without in omitted.items():
            objective = fm.Objective(
                problem.model,
                problem.loss_fn,
                problem.batches[:1],
                hand_written=[p for p in PIECES if p not in without],
            )
            hessian = fm.HessianOperator(objective, keep_graph=True)
            vector = torch.ones(objective.size, device=problem.device)
            sessions.enter_context(hessian.session())
            for _ in range(2):  # the second product keeps the graph
                hessian @ vector
            tasks[label] = functools.partial(operator.matmul, hessian, vector)
        seconds = turns(tasks, rounds=rounds, device=problem.device)
    base = seconds.pop(EVERYTHING)
    found = {EVERYTHING: f"{1e3 * statistics.median(base):.1f}"}
    for label, values in seconds.items():
        ratio = statistics.median(v / b for v, b in zip(values, base, strict=True))
        found[label] = f"{ratio:.2f}"
    return found


if __name__ == "__main__":
    main()
