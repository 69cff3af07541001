"""The trace of an operator, of all of it and of the block of each parameter tensor."""

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
from .leave_one_out import deflated_blocks, xtrace, xtrace_blocks
from .probes import deflated_samples, diagonal_by_unit_vectors, mean_and_spread
from .result import BlockTrace, TraceResult
from .sketch import LEAST, SKETCH_BYTES, Sketch, check_precision
from .stopping import (
    FIRST_LOOK,
    LIMIT,
    PRODUCTS,
    check_rtol,
    conclude,
    is_precise,
    outcome_of,
    schedule_looks,
)

__all__ = ["trace"]

METHODS = ("auto", "hutchinson", "hutch++", "xtrace")


@dataclasses.dataclass
class _Estimate:
    """Samples of the trace, (count,), and of the traces of its blocks, (count, blocks).

    Attributes:
        excess: by which the standard error is larger than that of independent samples.
        rounding: an error that every sample shares.
    """

    method: str
    whole: Tensor
    blocks: Tensor
    excess: float = 1.0
    rounding: float = 0.0

    def of(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard error of what has been sampled along the first axis."""
        mean, error = mean_and_spread(samples)
        return mean, torch.hypot(error * self.excess, torch.tensor(self.rounding).double())


class _Probing:
    """An operator, its blocks, and the products that have been taken with it."""

    def __init__(self, operator: LinearOperator, seed: Seed, tell: Callable[[int], object]) -> None:
        self.operator, self.spent, self._tell = operator, 0, tell
        self.generator = as_generator(seed, operator.device)
        layout = operator.layout
        self.sizes = (operator.shape[0],) if layout is None else layout.sizes

    def step(self, count: int) -> None:
        self.spent += count
        self._tell(count)

    def sketch(self, *, keep: bool) -> Sketch:
        return Sketch(self.operator, self.generator, signs=not keep, keep=keep, step=self.step)

    def exact(self, diagonal: Tensor) -> _Estimate:
        parts = torch.split(
            diagonal.double() if diagonal.device.type != "mps" else diagonal, list(self.sizes)
        )
        blocks = torch.stack([part.sum() for part in parts]).cpu().double()[None]
        return _Estimate("exact", blocks.sum(dim=1), blocks)

    def deflated(self, counts: Iterator[int], sketch: Sketch | None) -> Iterator[_Estimate]:
        """Yield Hutchinson's estimator of what lies outside of the sketch, and the rest exactly."""
        known, total, rounding = torch.zeros(1), torch.zeros(1), 0.0
        project, method = None, "hutchinson"
        if sketch is not None and sketch.columns:
            known, total = deflated_blocks(sketch, self.sizes), torch.trace(sketch.compressed)
            project, method, rounding = sketch.project, "hutch++", sketch.rounding
        samples: list[Tensor] = []
        for count in counts:
            samples.append(
                deflated_samples(
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
        """A third of the products for a sketch, a third for its images, a third for the rest."""
        sketch = self.sketch(keep=False)
        for count in counts:
            more = min((count - self.spent) // 3, most - sketch.columns)
            if more <= 0:
                yield from self.deflated(itertools.chain((count,), counts), sketch)
                return
            sketch.extend(more)
            # New samples: those taken before are of what lay outside of a smaller sketch.
            yield from self.deflated(iter((count,)), sketch)

    def xtrace(self, counts: Iterator[int], most: int) -> Iterator[_Estimate]:
        """Half of the products for a sketch, half for its images; each vector serves twice."""
        sketch = self.sketch(keep=True)
        for count in counts:
            if count // 2 > most:
                yield from self.deflated(itertools.chain((count,), counts), sketch)
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
    """Return the trace from products with random vectors, with its standard error.

    - "hutchinson": the mean of zᵀ A z over Rademacher vectors z (Hutchinson 1989), with variance
      2 (‖A‖_F² − Σ A_ii²) / products. It keeps no vectors.
    - "hutch++" (Meyer et al. 2021, arXiv:2010.09649, algorithm 1): a third of the products finds
      a basis Q of where A is large, a third gives tr(Qᵀ A Q), and the last third is Hutchinson's
      estimator of what lies outside. It keeps 2/3 `products` vectors of length n.
    - "xtrace" (Epperly, Tropp and Webber 2024, arXiv:2301.07825, section 2): half of the products
      for a basis, half for its images; each random vector in turn is left out of the basis and
      tests the rest. Vectors are uniform on a sphere, and what is left of them outside of the
      basis is brought back to its length. It keeps 3/2 `products` vectors of length n.
    - "auto": the diagonal where the operator knows it; all n products with unit vectors where
      that is no more than `products`; otherwise "xtrace" where its vectors fit into 1 GiB, and
      "hutch++" with as many vectors as do where they do not.

    With `rtol` it goes on until the relative standard error is within it. Looks are taken after 24
    products, then 1.5 times as many, and so on (with "hutch++", of whose products only some are
    samples, after 48 and then twice as many). At a look, U is the
    standard error's upper 95 % confidence limit by the χ² distribution, and the search ends when
    U ≤ rtol · (|value| − 2 U): neither a standard error that is small by chance nor a value that
    is large by chance ends it early. With "auto", XTrace's basis grows while it fits; after that
    what lies outside of it is sampled, as by "hutch++". A trace that is zero to its error has
    no relative error; the search then goes on to its limit, and says so.

    Args:
        operator: symmetric. "hutch++" and "xtrace" need float32 or float64.
        method: see above. Where n is no more than `products`, "hutch++" and "xtrace" take n
            products with unit vectors, and the result is exact.
        products: number of products in all, at least 2, and 4 for "hutch++" and "xtrace"; with
            `rtol` their limit. Default: 100, with `rtol` 1000.
        rtol: the relative standard error that is wanted.
        strict: raise instead of warn when the limit comes before `rtol` is reached.
        seed: of the random vectors.
        progress: show a bar if it takes long.

    Returns:
        The estimate with its standard error; for operators of a model also the trace of the
        diagonal block of each parameter tensor and of each module, from the same products.

    Raises:
        InvalidArgumentError: an unknown method, too few products, `rtol` outside (0, 1), or a
            sketch in half precision.
        NonFiniteError: a product holds NaN or infinity.
        DeviceMemoryError: the vectors that "hutch++" or "xtrace" keep do not fit.
        ConvergenceError: with `strict`, when the limit is reached.

    Warns:
        ConvergenceWarning: the limit came before the error was within `rtol`.

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
            value, error = map(float, estimate.of(estimate.whole))
            done = rtol is None or is_precise(value, error, count, rtol)
            if done:
                break
            bar.set_postfix_str(f"± {error:.1e}", refresh=False)
    outcome = outcome_of(exact=estimate.method == "exact", done=done, rtol=rtol)
    tensors, modules = _blocks(operator.layout, estimate)
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
    """Yield an estimate for each look at the error, each from all products so far."""
    operator = probing.operator
    n = operator.shape[0]
    asked = method == "auto" and operator.knows_diagonal
    known = operator.exact_diagonal() if asked else None
    if known is not None:
        yield probing.exact(known)
        return
    # As much as fits, or as much as is given.
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
        yield from probing.deflated(counts, None)
    elif method == "hutch++":
        yield from probing.hutchpp(counts, room // 2)
    else:
        yield from probing.xtrace(counts, room // 3)
    if whole:
        yield probing.exact(diagonal_by_unit_vectors(operator, probing.step))


def _blocks(
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
        values, errors = estimate.of(torch.stack(columns, dim=1))
        found.append(
            tuple(
                BlockTrace(name, sum(layout.sizes[p] for p in positions), value, error)
                for (positions, name), value, error in zip(
                    groups, values.tolist(), errors.tolist(), strict=True
                )
            )
        )
    return found[0], found[1]
