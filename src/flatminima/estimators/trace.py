"""The trace of an operator, of all of it and of the block of each parameter tensor."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from ..checks import check_choice, check_integer, check_positive
from ..errors import InvalidArgumentError
from ..operators.linear import LinearOperator, check_operator
from ..progress import progress_bar
from ..randomness import Seed, as_generator
from ..results import Outcome, Result, Table, format_number, reading_notes
from .leave_one_out import deflated_blocks, xtrace, xtrace_blocks
from .probes import deflated_samples, diagonal_by_unit_vectors, spread
from .sketch import Sketch
from ..vectors import Layout
from .stopping import FIRST_LOOK, conclude, ended, looks, settled

__all__ = [
    "LEAST",
    "LIMIT",
    "PRODUCTS",
    "SHOWN",
    "SKETCH_BYTES",
    "BlockTrace",
    "TraceResult",
    "check_precision",
    "trace",
]

METHODS = ("auto", "hutchinson", "hutch++", "xtrace")
SKETCH_BYTES = 2**30
"""Of the vectors that `method="auto"` keeps. A fixed number, so that a call gives the same result
on every machine, whatever memory is free there."""
LEAST = 4
"""Products, for a sketch and an error."""
PRODUCTS = 100
LIMIT = 1000
"""Products at most with `rtol`."""
SHOWN = 12
"""Modules in a table."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BlockTrace(Result):
    """The trace of the diagonal block that belongs to a parameter tensor or a module.

    Attributes:
        name: of the tensor or the module; "" for the model's own tensors.
        size: number of its parameters.
        value: the trace of the block.
        standard_error: of `value`.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), (torch.eye(2), torch.ones(2, 1)))
        >>> [(b.name, round(b.value, 3)) for b in fm.trace(fm.HessianOperator(objective)).tensors]
        [('weight', 2.0), ('bias', 2.0)]
    """

    name: str
    size: int
    value: float
    standard_error: float

    def _table(self) -> Table:
        return Table(_HEADER, (_row(self),))


_HEADER = ("quantity", "value", "standard error")


def _row(block: BlockTrace) -> tuple[str, ...]:
    return (
        block.name or "(the model's own)",
        format_number(block.value),
        format_number(block.standard_error, 2),
    )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TraceResult(Result):
    """An estimate of a trace.

    Attributes:
        value: tr A.
        standard_error: of `value`, from the spread of the samples. It is widened by Student's t
            where they are few, so that `value` ± 2 `standard_error` covers tr A in about 95 % of
            the cases. 0 where the value is exact up to rounding.
        size: n; the mean eigenvalue is `value / size`.
        products: with the operator, all of them.
        outcome: completed, exact, or how the search for `rtol` ended.
        method: "hutchinson", "hutch++", "xtrace" or "exact".
        tensors: the trace of the diagonal block of each parameter tensor, from the same products;
            empty for an operator that knows of no parameters. They add up to `value`.
        modules: the same for the modules that own the tensors.
        readings: how often the data were read anew for it; 0 where they are kept on the device.
        notes: what a reader should know about how it was computed.

    Examples:
        >>> import torch, flatminima as fm
        >>> operator = fm.FunctionOperator(lambda v: 2 * v, 1000)
        >>> result = fm.trace(operator, method="hutchinson", products=5)
        >>> result.value, result.standard_error, result.products
        (2000.0, 0.0, 5)
    """

    value: float
    standard_error: float
    size: int
    products: int
    outcome: Outcome
    method: str = "hutchinson"
    tensors: tuple[BlockTrace, ...] = ()
    modules: tuple[BlockTrace, ...] = ()
    readings: int = 0
    notes: tuple[str, ...] = ()

    def _table(self) -> Table:
        mean = self.value / self.size, self.standard_error / self.size
        rows = [
            ("trace", format_number(self.value), format_number(self.standard_error, 2)),
            ("mean eigenvalue", format_number(mean[0]), format_number(mean[1], 2)),
        ]
        largest = sorted(self.modules, key=lambda block: -abs(block.value))[:SHOWN]
        shown = [block for block in self.modules if block in largest]
        rows += [_row(block) for block in shown] if len(self.modules) > 1 else []
        hidden = len(self.modules) - len(shown)
        return Table(
            header=_HEADER,
            rows=tuple(rows),
            title=f"Trace by {_TITLES[self.method]}, {self.products} products",
            notes=(
                self.outcome.value,
                *((f"{hidden} modules with smaller traces are in `modules`.",) if hidden else ()),
                *reading_notes(self.readings),
                *self.notes,
            ),
        )


_TITLES = {
    "hutchinson": "Hutchinson's estimator",
    "hutch++": "Hutch++",
    "xtrace": "XTrace",
    "exact": "its diagonal",
}


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
        """Mean and standard error of what has been sampled along the first axis."""
        mean, error = spread(samples)
        return mean, torch.hypot(error * self.excess, torch.tensor(self.rounding).double())


class _Probing:
    """An operator, its blocks, and the products that have been taken with it."""

    def __init__(
        self, operator: LinearOperator, seed: Seed, tell: Callable[[int], object]
    ) -> None:
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
        parts = torch.split(diagonal.double() if diagonal.device.type != "mps" else diagonal, list(self.sizes))
        blocks = torch.stack([part.sum() for part in parts]).cpu().double()[None]
        return _Estimate("exact", blocks.sum(dim=1), blocks)

    def deflated(self, counts: Iterator[int], sketch: Sketch | None) -> Iterator[_Estimate]:
        """Hutchinson's estimator of what lies outside of the sketch, and the rest exactly."""
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
    """TODO"""
    call = "trace"
    check_operator(call, operator)
    check_choice(call, "method", method, METHODS)
    if products is not None:
        check_integer(call, "products", products, low=2 if method in METHODS[:2] else LEAST)
    if rtol is not None:
        rtol = check_positive(call, "rtol", rtol)
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
            done = rtol is None or settled(value, error, count, rtol)
            if done:
                break
            bar.set_postfix_str(f"± {error:.1e}", refresh=False)
    outcome = ended(exact=estimate.method == "exact", done=done, rtol=rtol)
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
    return conclude(call, result, found, rtol, strict=strict)


def check_precision(call: str, operator: LinearOperator) -> None:
    """Refuse vectors in which no basis can be orthonormal."""
    if torch.finfo(operator.dtype).bits < 32:
        raise InvalidArgumentError(
            f"The 'method' argument of {call} must be 'hutchinson' for products in "
            f"{operator.dtype}: a sketch needs float32 or float64."
        )


def _estimates(
    probing: _Probing, method: str, limit: int, rtol: float | None
) -> Iterator[_Estimate]:
    """An estimate for each look at the error, each from all products so far."""
    operator = probing.operator
    n = operator.shape[0]
    known = operator.exact_diagonal() if method == "auto" else None
    if known is not None:
        yield probing.exact(known)
        return
    # As much as fits, or as much as is asked for.
    room = limit * 3
    if method == "auto":
        room = SKETCH_BYTES // (n * operator.dtype.itemsize)
        short = limit < LEAST or torch.finfo(operator.dtype).bits < 32
        fits = room // 3 >= (limit if rtol is None else FIRST_LOOK) // 2
        method = "hutchinson" if short else "xtrace" if fits else "hutch++"
    counts, whole = looks(
        limit,
        rtol,
        size=None if method == "hutchinson" else n,
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
    """The traces of the tensors and of the modules that own them."""
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
