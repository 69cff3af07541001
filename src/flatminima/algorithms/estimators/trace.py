"""Estimates of the trace of an operator and of its diagonal blocks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from ...operators.linear import LinearOperator, check_operator
from ...support.checks import check_choice, check_integer
from ...support.progress import progress_bar
from ...support.randomness import Seed, as_generator
from ...support.vectors import Layout
from .leave_one_out import trace_known_blocks, xtrace, xtrace_blocks
from .probes import compute_diagonal, mean_and_spread, sample_traces
from .result import BlockTrace, TraceResult
from .sketch import LEAST, SKETCH_BYTES, Sketch, check_precision
from .stopping import (
    FIRST_LOOK,
    LIMIT,
    PRODUCTS,
    check_rtol,
    choose_outcome,
    conclude,
    is_precise,
    schedule_looks,
)

__all__ = ["trace"]

METHODS = ("auto", "hutchinson", "hutch++", "xtrace")


@dataclasses.dataclass
class _Estimate:
    """Samples of the trace and of the traces of its blocks.

    Attributes:
        method: how they were made.
        whole: (count,), samples of the trace.
        blocks: (count, blocks), samples of the traces of the blocks.
        excess: factor by which the standard error exceeds that of independent samples.
        rounding: an error that all samples share.
    """

    method: str
    whole: Tensor
    blocks: Tensor
    excess: float = 1.0
    rounding: float = 0.0

    def summarize(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard error of samples along the first axis."""
        mean, error = mean_and_spread(samples)
        return mean, torch.hypot(error * self.excess, torch.tensor(self.rounding).double())


class _Probing:
    """An operator with its blocks, and the number of products taken with it."""

    def __init__(
        self, operator: LinearOperator, seed: Seed, report: Callable[[int], object]
    ) -> None:
        self.operator, self.spent, self._report = operator, 0, report
        self.generator = as_generator(seed, operator.device)
        layout = operator.layout
        self.sizes = (operator.shape[0],) if layout is None else layout.sizes

    def step(self, count: int) -> None:
        self.spent += count
        self._report(count)

    def sketch(self, *, keep: bool) -> Sketch:
        return Sketch(self.operator, self.generator, signs=not keep, keep=keep, step=self.step)

    def exact(self, diagonal: Tensor) -> _Estimate:
        parts = torch.split(
            diagonal.double() if diagonal.device.type != "mps" else diagonal, list(self.sizes)
        )
        blocks = torch.stack([part.sum() for part in parts]).cpu().double()[None]
        return _Estimate("exact", blocks.sum(dim=1), blocks)

    def sample_rest(self, counts: Iterator[int], sketch: Sketch | None) -> Iterator[_Estimate]:
        """Yield estimates: exact inside the sketch, Hutchinson's estimator outside of it."""
        known, total, rounding = torch.zeros(1), torch.zeros(1), 0.0
        project, method = None, "hutchinson"
        if sketch is not None and sketch.columns:
            known, total = trace_known_blocks(sketch, self.sizes), torch.trace(sketch.compressed)
            project, method, rounding = sketch.project, "hutch++", sketch.rounding
        samples: list[Tensor] = []
        for count in counts:
            samples.append(
                sample_traces(
                    self.operator,
                    count - self.spent,
                    self.generator,
                    self.sizes,
                    self.step,
                    project,
                )
            )
            found = torch.cat(samples)
            yield _Estimate(method, found.sum(dim=1) + total, found + known, 1.0, rounding)

    def hutchpp(self, counts: Iterator[int], most: int) -> Iterator[_Estimate]:
        """Yield Hutch++ estimates.

        A third of the products make a sketch, a third its images, and a third sample the rest.
        """
        sketch = self.sketch(keep=False)
        for count in counts:
            more = min((count - self.spent) // 3, most - sketch.columns)
            if more <= 0:
                yield from self.sample_rest(itertools.chain((count,), counts), sketch)
                return
            sketch.extend(more)
            # New samples, since the earlier ones belong to a smaller sketch.
            yield from self.sample_rest(iter((count,)), sketch)

    def xtrace(self, counts: Iterator[int], most: int) -> Iterator[_Estimate]:
        """Yield XTrace estimates.

        Half of the products make a sketch and half its images; each vector serves twice.
        """
        sketch = self.sketch(keep=True)
        for count in counts:
            if count // 2 > most:
                yield from self.sample_rest(itertools.chain((count,), counts), sketch)
                return
            sketch.extend(count // 2 - sketch.columns)
            whole, excess = xtrace(sketch)
            several = len(self.sizes) > 1
            blocks = xtrace_blocks(sketch, self.sizes) if several else whole[:, None]
            yield _Estimate("xtrace", whole, blocks, excess, sketch.rounding)


def trace(
    operator: LinearOperator,
    *,
    method: Literal["auto", "hutchinson", "hutch++", "xtrace"] = "auto",
    products: int | None = None,
    rtol: float | None = None,
    strict: bool = False,
    seed: Seed = 0,
    progress: bool = True,
) -> TraceResult:
    """Estimate the trace from products with random vectors, with its standard error.

    - "hutchinson": the mean of zᵀ A z over Rademacher vectors z (Hutchinson 1989), with variance
      2 (‖A‖_F² − Σ A_ii²) / products. It stores no vectors.
    - "hutch++" (Meyer et al. 2021, arXiv:2010.09649, algorithm 1): a third of the products make a
      basis Q of the directions where A is large, a third give tr(Qᵀ A Q), and the last third are
      for Hutchinson's estimator of the rest. It stores 2/3 `products` vectors of length n.
    - "xtrace" (Epperly, Tropp and Webber 2024, arXiv:2301.07825, section 2): half of the products
      make a basis, the other half its images. Each random vector in turn is left out of the basis
      and tests the rest. The vectors are uniform on a sphere, and their parts outside of the basis
      are rescaled to the expected length. It stores 3/2 `products` vectors of length n.
    - "auto": the sum of the diagonal if the operator knows it; n products with unit vectors if n
      is at most `products`; otherwise "xtrace" if its vectors fit into 1 GiB, else "hutch++" with
      as many vectors as fit.

    With `rtol`, sampling continues until the relative standard error is within it. The error is
    tested after 24 products, then after 1.5 times as many, and so on ("hutch++", where only some
    of the products are samples: after 48, then after twice as many). Let U be the upper 95 %
    confidence limit of the standard error by the χ² distribution. Sampling ends when
    U ≤ rtol · (|value| − 2 U), a rule that neither a standard error small by chance nor a value
    large by chance can satisfy early. With "auto", the basis of XTrace grows while it fits; after
    that, the rest is sampled as by "hutch++". A trace that is zero within its error has no
    relative error: sampling continues to the limit, and the warning says so.

    Args:
        operator: a symmetric operator. "hutch++" and "xtrace" need float32 or float64.
        method: see above. If n is at most `products`, "hutch++" and "xtrace" take n products with
            unit vectors, and the result is exact.
        products: total number of products, at least 2, or 4 for "hutch++" and "xtrace"; with
            `rtol` their limit. Default: 100, with `rtol` 1000.
        rtol: the relative standard error to reach.
        strict: raise instead of warn if the limit is reached before `rtol`.
        seed: seed of the random vectors.
        progress: show a bar if it takes long.

    Returns:
        The estimate with its standard error; for operators of a model also the traces of the
        diagonal blocks of each parameter tensor and of each module, from the same products.

    Raises:
        InvalidArgumentError: the method is unknown, there are too few products, `rtol` is outside
            (0, 1), or a sketch is to be made in half precision.
        NonFiniteError: a product holds NaN or infinity.
        DeviceMemoryError: the vectors of "hutch++" or "xtrace" do not fit into memory.
        ConvergenceError: with `strict`, when the limit is reached.

    Warns:
        ConvergenceWarning: the limit was reached before the error was within `rtol`.

    Examples:
        >>> import torch, flatminima as fm
        >>> values = 1 / torch.arange(1.0, 2001.0).double() ** 2
        >>> operator = fm.FunctionOperator(lambda v: values * v, 2000, dtype=torch.float64)
        >>> result = fm.trace(operator, products=60)
        >>> abs(result.value - float(values.sum())) < 3 * result.standard_error < 0.02
        True
        >>> fm.trace(operator, rtol=0.01).outcome.brief
        'within rtol'
        >>> fm.trace(fm.MatrixOperator(torch.diag(torch.tensor([1.0, 2.0])))).outcome.brief
        'exact'
    """
    call = "trace"
    check_operator(call, operator)
    check_choice(call, "method", method, METHODS)
    if products is not None:
        check_integer(call, "products", products, low=2 if method in METHODS[:2] else LEAST)
    rtol = check_rtol(call, rtol)
    if method not in METHODS[:2]:
        check_precision(call, operator)
    limit = (PRODUCTS if rtol is None else LIMIT) if products is None else products
    before = operator.readings
    with (
        operator.session(),
        progress_bar("trace", total=limit, unit="product", show=progress) as bar,
    ):
        probing = _Probing(operator, seed, bar.update)
        for estimate in _estimates(probing, method, limit, rtol):
            count = len(estimate.whole)
            value, error = map(float, estimate.summarize(estimate.whole))
            done = rtol is None or is_precise(value, error, count, rtol)
            if done:
                break
            bar.set_postfix_str(f"± {error:.1e}", refresh=False)
    outcome = choose_outcome(exact=estimate.method == "exact", done=done, rtol=rtol)
    tensors, modules = _make_block_traces(operator.layout, estimate)
    result = TraceResult(
        value=value,
        standard_error=error,
        size=operator.shape[0],
        products=probing.spent,
        outcome=outcome,
        method=estimate.method,
        tensors=tensors,
        modules=modules,
        readings=operator.readings - before,
        notes=operator.notes,
    )
    found = f"the trace is {value:.4g} with a standard error of {error:.2g}"
    if abs(value) < 5 * error:
        found += ", too close to zero for a relative error"
    return conclude(call, result, found, rtol, spent=result.products, strict=strict)


def _estimates(
    probing: _Probing, method: str, limit: int, rtol: float | None
) -> Iterator[_Estimate]:
    """Yield an estimate each time the error is tested, from all products so far."""
    operator = probing.operator
    n = operator.shape[0]
    asked = method == "auto" and operator.knows_diagonal
    known = operator.exact_diagonal() if asked else None
    if known is not None:
        yield probing.exact(known)
        return
    # The vectors of a sketch: as many as fit with "auto", otherwise as many as needed.
    room = limit * 3
    if method == "auto":
        room = SKETCH_BYTES // (n * operator.dtype.itemsize)
        short = limit < LEAST or torch.finfo(operator.dtype).bits < 32
        fits = room // 3 >= (limit if rtol is None else FIRST_LOOK) // 2
        method = "hutchinson" if short else "xtrace" if fits else "hutch++"
    counts, whole = schedule_looks(
        limit,
        rtol,
        size=None if method == "hutchinson" else n,
        first=2 * FIRST_LOOK if method == "hutch++" else FIRST_LOOK,
        growth=2.0 if method == "hutch++" else 1.5,
    )
    if method == "hutchinson":
        yield from probing.sample_rest(counts, None)
    elif method == "hutch++":
        yield from probing.hutchpp(counts, room // 2)
    else:
        yield from probing.xtrace(counts, room // 3)
    if whole:
        yield probing.exact(compute_diagonal(operator, probing.step))


def _make_block_traces(
    layout: Layout | None, estimate: _Estimate
) -> tuple[tuple[BlockTrace, ...], tuple[BlockTrace, ...]]:
    """Return the traces of the tensors and of the modules that own them."""
    if layout is None:
        return (), ()
    owners: dict[str, list[int]] = {}
    for position, name in enumerate(layout.names):
        owners.setdefault(name.rpartition(".")[0], []).append(position)
    tensors = [([position], name) for position, name in enumerate(layout.names)]
    modules = [(positions, name) for name, positions in owners.items()]
    found = []
    for groups in (tensors, modules):
        columns = [estimate.blocks[:, positions].sum(dim=1) for positions, _ in groups]
        values, errors = estimate.summarize(torch.stack(columns, dim=1))
        found.append(
            tuple(
                BlockTrace(name, sum(layout.sizes[p] for p in positions), value, error)
                for (positions, name), value, error in zip(
                    groups, values.tolist(), errors.tolist(), strict=True
                )
            )
        )
    return found[0], found[1]
