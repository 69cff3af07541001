"""The top eigenpairs to a residual of 1e-3: flatminima and other libraries, judged alike.

    python -m benchmarks.eigenpairs
    python -m benchmarks.eigenpairs --models mlp --k 1 10 --threads 1 --device cuda

The nets are trained on real images. Each library computes the k eigenpairs of largest magnitude of
the same Hessian. One judge, which shares no code with any of them, computes ‖H u − λ u‖ / |λ₁| in
float64. Each library other than flatminima is run with its own options from the loosest on, and the
first that passes is timed; flatminima is asked for 1e-3 and not helped further.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import math
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .harness import arguments, in_turns, machine, now, print_table
from .models import Problem
from .peers import METHODS, TOLERANCE, BudgetSpentError, Found, Method
from .trained import TRAINED

HEADER = ("k", "method", "setting", "seconds", "products", "residual", "error of λ", "time ratio")

LONGEST = 1.5
"""Budgets after which a single run is broken off."""


class Judge:
    """Products with the Hessian in float64 by plain double backward, and what they say.

    Args:
        problem: the model and all its data.
        k: as many eigenvalues are computed to compare with.
    """

    def __init__(self, problem: Problem, k: int) -> None:
        model = copy.deepcopy(problem.model).double()
        self.parameters = list(model.parameters())
        self.count = sum(len(y) for _, y in problem.batches)
        self.gradients = []
        for x, y in problem.batches:
            # cuDNN's recurrent kernels have no second derivatives.
            with torch.backends.cudnn.flags(enabled=False):
                loss = problem.loss_fn(model(x.double()), y) * (len(y) / self.count)
            self.gradients.append(torch.autograd.grad(loss, self.parameters, create_graph=True))
        self.device = problem.device
        self.values = self._reference(problem.size, k)
        self.scale = float(self.values[0].abs())

    def product(self, vector: Tensor) -> Tensor:
        """H v in float64, shape (n,) → (n,)."""
        pieces = torch.split(vector, [p.numel() for p in self.parameters])
        shaped = [v.view_as(p) for v, p in zip(pieces, self.parameters, strict=True)]
        out = torch.zeros_like(vector)
        for gradient in self.gradients:
            parts = torch.autograd.grad(gradient, self.parameters, shaped, retain_graph=True)
            out += torch.cat([part.flatten() for part in parts])
        return out

    def _reference(self, size: int, k: int) -> Tensor:
        """The k eigenvalues of largest magnitude, to many more digits than are asked of anyone."""
        from scipy.sparse.linalg import LinearOperator, eigsh

        def multiply(array: Any) -> Any:
            vector = torch.as_tensor(array, dtype=torch.float64, device=self.device).reshape(-1)
            return self.product(vector).cpu().numpy()

        # Errors of eigenvalues go with the square of the residual.
        values = eigsh(
            LinearOperator((size, size), matvec=multiply, dtype=np.float64),
            k=k,
            which="LM",
            tol=1e-6,
            v0=np.random.default_rng(1).standard_normal(size),
            return_eigenvectors=False,
        )
        return _descending(torch.as_tensor(values))[0]

    def verdict(self, found: Found, *, whole: bool = False) -> tuple[float, float]:
        """The largest residual, and the largest error of an eigenvalue, both over |λ₁|.

        Unless the `whole` is asked for it stops at the first pair that is not exact enough.
        """
        values, order = _descending(found.values.double().cpu())
        # By magnitude: +λ and −λ of about the same size may stand in either order.
        gaps = values.abs() - self.values[: len(values)].abs()
        error = float(gaps.abs().max()) / self.scale
        worst = 0.0
        # The last pairs are the least exact.
        for value, column in list(zip(values.tolist(), order.tolist(), strict=True))[::-1]:
            vector = found.vectors[:, column].double().to(self.device)
            vector = vector / torch.linalg.vector_norm(vector)
            residual = torch.linalg.vector_norm(self.product(vector) - value * vector)
            worst = max(worst, float(residual) / self.scale)
            if not whole and not worst <= TOLERANCE:
                break
        return worst, error


def _descending(values: Tensor) -> tuple[Tensor, Tensor]:
    """By magnitude, and where they stood."""
    order = torch.argsort(values.abs(), descending=True)
    return values[order], order


@dataclasses.dataclass
class Entry:
    """What became of one method."""

    method: Method
    fused: bool
    """Whether the kernels of oneDNN (on the CPU) or cuDNN (on CUDA) were on."""
    cuda: bool
    setting: dict[str, Any] | None = None
    seconds: float = math.nan
    residual: float = math.inf
    error: float = math.inf
    products: int = 0
    note: str = ""
    failed: bool = False
    """Whether the library gave an error."""

    @property
    def name(self) -> str:
        """With what was changed for it."""
        library = "cuDNN" if self.cuda else "oneDNN"
        return self.method.name + ("" if self.fused else f", {library} off")

    @property
    def passed(self) -> bool:
        """Whether residuals and eigenvalues are as exact as was asked."""
        return self.residual <= TOLERANCE and self.error <= TOLERANCE

    def kernels(self) -> contextlib.AbstractContextManager[None]:
        """The library's, on or off."""
        if self.fused:
            return contextlib.nullcontext()
        backend: Any = torch.backends.cudnn if self.cuda else torch.backends.mkldnn
        flags: contextlib.AbstractContextManager[None] = backend.flags(enabled=False)
        return flags

    def run(self, problem: Problem, k: int) -> None:
        """Once more, as it was found to be best."""
        assert self.setting is not None
        with self.kernels():
            self.method.solve(problem, k, self.setting)

    def cells(self, k: int, seconds: float, mine: float) -> tuple[str, ...]:
        """The row of the table."""
        setting = ", ".join(f"{key}={value}" for key, value in (self.setting or {}).items())
        over = "" if self.passed else "> "
        if self.setting is None:
            times = ("", "") if self.failed else (f"> {seconds:.3g}", f"> {seconds / mine:.1f}")
            return (str(k), self.name, self.note, times[0], "", "", "", times[1])
        setting += f" ({self.note})" if self.note else ""
        measured = (f"{over}{seconds:.3g}", str(self.products), f"{self.residual:.1e}")
        ratio = f"{over}{seconds / mine:.1f}"
        return (str(k), self.name, setting, *measured, f"{self.error:.1e}", ratio)


def searched(
    entry: Entry, problem: Problem, judge: Judge, k: int, budget: float
) -> Iterator[Entry]:
    """The entry with its loosest setting that passes, or the best; and another if it fails."""
    spent = 0.0
    try:
        with entry.kernels():
            for setting in entry.method.settings(problem, k, budget):
                if spent > budget:
                    entry.note = f"cut off after {spent:.0f} s in all"
                    break
                start = now(problem.device)
                found = entry.method.solve(problem, k, setting, LONGEST * budget)
                seconds = now(problem.device) - start
                spent += seconds
                residual, error = judge.verdict(found)
                passed = residual <= TOLERANCE and error <= TOLERANCE
                if not passed:
                    residual, error = judge.verdict(found, whole=True)
                if passed or max(residual, error) < max(entry.residual, entry.error):
                    entry.setting, entry.seconds, entry.products = setting, seconds, found.products
                    entry.residual, entry.error = residual, error
                if passed:
                    break
    except BudgetSpentError:
        if entry.setting is None:
            entry.seconds = LONGEST * budget
        entry.note = f"cut off after {LONGEST * budget:.0f} s"
    except Exception as error_of_library:
        text = textwrap.shorten(str(error_of_library), 90, placeholder=" …")
        entry.note, entry.failed = f"fails: {text}".replace("|", "¦"), True
        if entry.fused:
            yield entry
            yield from searched(Entry(entry.method, False, entry.cuda), problem, judge, k, budget)
            return
    yield entry


def compared(
    problem: Problem, judge: Judge, k: int, options: argparse.Namespace, failed: set[str]
) -> list[tuple[str, ...]]:
    """The rows for one k; `failed` names those that need fused kernels off."""
    entries = []
    for method in METHODS:
        if method.installed:
            print(f"  k = {k}: {method.name}", file=sys.stderr, flush=True)
            first = Entry(method, method.name not in failed, problem.device.startswith("cuda"))
            found = list(searched(first, problem, judge, k, options.budget))
            failed |= {entry.method.name for entry in found if entry.failed}
            entries += found
    # Those that take long are not run again: their ratios are far from one.
    short = {
        entry.name: functools.partial(entry.run, problem, k)
        for entry in entries
        if entry.passed and entry.seconds * options.rounds <= options.budget
    }
    medians = in_turns(short, rounds=options.rounds, device=problem.device, warm=False)
    seconds = [medians.get(entry.name, entry.seconds) for entry in entries]
    return [e.cells(k, s, seconds[0]) for e, s in zip(entries, seconds, strict=True)]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = arguments(__doc__.splitlines()[0], rounds=3)
    parser.add_argument("--models", nargs="+", choices=TRAINED, default=list(TRAINED))
    parser.add_argument("--k", type=int, nargs="+", default=[1, 5, 10, 50])
    parser.add_argument("--budget", type=float, default=15, help="seconds for each and for each k")
    parser.add_argument("--quick", action="store_true", help="the conv net, k = 1 and 3, one round")
    options = parser.parse_args(argv)
    if options.quick:
        options.models, options.k, options.rounds = ["convnet"], [1, 3], 1
    torch.set_num_threads(options.threads)
    # PyTorch says this whenever oneDNN is switched off and on again.
    warnings.filterwarnings("ignore", "TF32 acceleration on top of oneDNN")
    print(machine(options.device, peers=True))
    for method in METHODS:
        if not method.installed:
            print(f"\n{method.name} is not installed and left out.")
    for name in options.models:
        print(f"{name}: training and reference", file=sys.stderr, flush=True)
        start = time.perf_counter()
        problem = TRAINED[name](options.device)
        judge = Judge(problem, max(options.k))
        print(f"  {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        description = (TRAINED[name].__doc__ or "").rstrip(".")
        values = judge.values.tolist()
        ends = ", ".join(f"λ{i} = {values[i - 1]:.3g}" for i in sorted({1, *options.k}))
        print(f"\n**{name}**: {description}; n = {problem.size}; {ends}\n")
        failed: set[str] = set()
        rows = [row for k in options.k for row in compared(problem, judge, k, options, failed)]
        print_table(HEADER, rows)


if __name__ == "__main__":
    main()
