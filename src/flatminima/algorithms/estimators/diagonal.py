"""Estimates of the diagonal of an operator, entry by entry."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from ...errors import InvalidArgumentError
from ...operators.linear import LinearOperator, check_operator
from ...results import Outcome, Result, Table, format_number, reading_notes
from ...support.checks import check_choice, check_integer
from ...support.progress import progress_bar
from ...support.randomness import Seed, as_generator, draw_signs
from .leave_one_out import xdiag
from .probes import compute_diagonal, split_rows, t_factor
from .result import SHOWN
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

__all__ = ["DiagonalResult", "diagonal"]

METHODS = ("auto", "hutchinson", "xdiag", "exact")
EXACT_LIMIT = 10_000
"""Default limit of products for `method="exact"`."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DiagonalResult(Result):
    """An estimate of a diagonal.

    Attributes:
        values: A_ii, shape (n,), in the dtype and on the device of the operator.
        standard_error: standard error of each entry, shape (n,), widened by Student's t as for a
            trace; zeros if the values are exact up to rounding.
        products: total number of products with the operator.
        outcome: completed, exact, or whether `rtol` was reached.
        method: "hutchinson", "xdiag" or "exact".
        names: names of the parameter tensors to which the entries belong, in order; empty if the
            operator does not belong to a model.
        shapes: shapes of these tensors.
        readings: how many times the data were read again; 0 if they are kept on the device.
        notes: remarks on the computation.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1)
        >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> hessian = fm.HessianOperator(fm.Objective(model, torch.nn.MSELoss(), data))
        >>> result = fm.diagonal(hessian)  # of 2 XᵀX / N; three products give it exactly
        >>> result.named()["weight"], result.named()["bias"]
        (tensor([[1., 4.]]), tensor([2.]))
    """

    values: Tensor
    standard_error: Tensor
    products: int
    outcome: Outcome
    method: str
    names: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    readings: int = 0
    notes: tuple[str, ...] = ()

    @property
    def relative_error(self) -> float:
        """‖standard errors‖₂ / ‖values‖₂, the expected relative error of all entries together.

        It is 0 if all standard errors are zero.
        """
        error, size = _norm(self.standard_error), _norm(self.values)
        return error / size if error else 0.0

    def named(self) -> dict[str, Tensor]:
        """Return the entries of each parameter tensor as views of its shape; {} without a model."""
        return {
            name: self.values[place].view(shape)
            for (name, place), shape in zip(self._places().items(), self.shapes, strict=True)
        }

    def _places(self) -> dict[str, slice]:
        places, start = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            places[name] = slice(start, start + math.prod(shape))
            start += math.prod(shape)
        return places

    def _table(self) -> Table:
        places = {"all": slice(None), **self._places()}
        rows = [row for name, place in places.items() if (row := self._row(name, place))]
        hidden = max(0, len(rows) - 1 - SHOWN)
        return Table(
            header=("entries", "number", "mean", "smallest", "largest", "± error (rms)"),
            rows=tuple(rows[: 1 + SHOWN]),
            title=f"Diagonal by {_TITLES[self.method]}, {self.products} products",
            notes=(
                self.outcome.value,
                *((f"{hidden} more tensors are in `named()`.",) if hidden else ()),
                *reading_notes(self.readings),
                *self.notes,
            ),
        )

    def _row(self, name: str, place: slice) -> tuple[str, ...]:
        values, errors = self.values[place].cpu(), self.standard_error[place].cpu()
        if len(values) == 0:
            return ()
        values, spread = values.double(), float(errors.double().square().mean().sqrt())
        numbers = (float(values.mean()), float(values.min()), float(values.max()))
        cells = (*map(format_number, numbers), format_number(spread, 2))
        return (name, str(len(values)), *cells)


_TITLES = {"hutchinson": "Hutchinson's estimator", "xdiag": "XDiag", "exact": "its entries"}


def _norm(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector))


@dataclasses.dataclass
class _Estimate:
    """Values, their standard errors, and the number of samples these are based on."""

    method: str
    values: Tensor
    errors: Tensor
    samples: int


def diagonal(
    operator: LinearOperator,
    *,
    method: Literal["auto", "hutchinson", "xdiag", "exact"] = "auto",
    products: int | None = None,
    rtol: float | None = None,
    strict: bool = False,
    seed: Seed = 0,
    progress: bool = True,
) -> DiagonalResult:
    """Estimate the diagonal from products with random vectors, with the error of each entry.

    - "hutchinson": the mean of z ∘ A z over Rademacher vectors z (Bekas, Kokiopoulou and Saad
      2007, doi:10.1016/j.apnum.2007.01.003). The variance of entry i is Σ_{j≠i} A_ij² / products.
      It stores two vectors.
    - "xdiag" (Epperly, Tropp and Webber 2024, arXiv:2301.07825, section 2.4): half of the products
      make a basis of the directions where A is large, the other half its images. Each random
      vector in turn is left out of the basis and tests the rest. It stores 3/2 `products` vectors
      of length n.
    - "exact": the diagonal that the operator knows. Gauss–Newton and Fisher matrices with at most
      64 outputs for each example compute it from the Jacobians of the examples; other operators
      need n products with unit vectors.
    - "auto": "exact" if the operator knows its diagonal or n is at most `products`; otherwise
      "xdiag" if its vectors fit into 1 GiB, else "hutchinson".

    Args:
        operator: a symmetric operator. "xdiag" needs float32 or float64.
        method: see above.
        products: total number of products, at least 2, or 4 for "xdiag"; with `rtol` their limit,
            with "exact" the limit on n. Default: 100, with `rtol` 1000, with "exact" 10 000.
        rtol: the relative standard error to reach, ‖errors‖ / ‖values‖ in the Euclidean norm,
            tested by the rule of [`trace`][flatminima.trace].
        strict: raise instead of warn if the limit is reached before `rtol`.
        seed: seed of the random vectors.
        progress: show a bar if it takes long.

    Returns:
        The entries and their standard errors, as vectors and by parameter tensor.

    Raises:
        InvalidArgumentError: the method is unknown, there are too few products, `rtol` is outside
            (0, 1), "xdiag" is used in half precision, or "exact" needs more products than allowed.
        NonFiniteError: a product holds NaN or infinity.
        DeviceMemoryError: the vectors of "xdiag" do not fit into memory.
        ConvergenceError: with `strict`, when the limit is reached.

    Warns:
        ConvergenceWarning: the limit was reached before the error was within `rtol`.

    Examples:
        >>> import torch, flatminima as fm
        >>> factor = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
        >>> operator = fm.FunctionOperator(lambda v: factor @ (factor.T @ v), 1000)
        >>> result = fm.diagonal(operator, products=20)  # exact, since the rank is 3
        >>> bool(torch.allclose(result.values, factor.square().sum(dim=1), atol=1e-3))
        True
    """
    call = "diagonal"
    check_operator(call, operator)
    check_choice(call, "method", method, METHODS)
    if products is not None:
        check_integer(call, "products", products, low=LEAST if method == "xdiag" else 2)
    rtol = check_rtol(call, rtol)
    if method == "xdiag":
        check_precision(call, operator)
    limit = (PRODUCTS if rtol is None else LIMIT) if products is None else products
    before = operator.readings
    with operator.session():
        asked = method == "exact" or (method == "auto" and operator.knows_diagonal)
        known = operator.exact_diagonal() if asked else None
        n = operator.shape[0]
        if method == "exact" and known is None:
            limit = EXACT_LIMIT if products is None else products
            if n > limit:
                raise InvalidArgumentError(
                    f"The 'method' argument of diagonal is 'exact', which takes {n} products with "
                    f"this operator, more than {limit}. Pass products={n} to allow them, or use "
                    "method='xdiag' or 'hutchinson'."
                )
            limit = n
        spent = 0
        with progress_bar(call, total=limit, unit="product", show=progress) as bar:

            def step(count: int) -> None:
                nonlocal spent
                spent += count
                bar.update(count)

            if known is not None:
                found = iter((_exact(known),))
            else:
                found = _estimates(
                    operator, method, limit, rtol, as_generator(seed, operator.device), step
                )
            for estimate in found:
                size, error = _norm(estimate.values), _norm(estimate.errors)
                done = rtol is None or is_precise(size, error, estimate.samples, rtol)
                if done:
                    break
                bar.set_postfix_str(f"error {error:.1e} of {size:.1e}", refresh=False)
    outcome = choose_outcome(exact=estimate.method == "exact", done=done, rtol=rtol)
    layout = operator.layout
    result = DiagonalResult(
        values=estimate.values,
        standard_error=estimate.errors,
        products=spent,
        outcome=outcome,
        method=estimate.method,
        names=() if layout is None else layout.names,
        shapes=() if layout is None else tuple(tuple(shape) for shape in layout.shapes),
        readings=operator.readings - before,
        notes=operator.notes,
    )
    said = f"the norm of the diagonal is {size:.4g}, with an estimated error of {error:.2g}"
    return conclude(call, result, said, rtol, spent=result.products, strict=strict)


def _estimates(
    operator: LinearOperator,
    method: str,
    limit: int,
    rtol: float | None,
    generator: torch.Generator,
    step: Callable[[int], object],
) -> Iterator[_Estimate]:
    """Yield an estimate each time the error is tested, from all products so far."""
    n = operator.shape[0]
    if method == "exact":
        yield _exact(compute_diagonal(operator, step))
        return
    if method == "auto":
        fits = SKETCH_BYTES // (n * operator.dtype.itemsize) // 3
        short = limit < LEAST or torch.finfo(operator.dtype).bits < 32
        most = limit // 2 if rtol is None else FIRST_LOOK // 2
        method = "hutchinson" if short or fits < most else "xdiag"
        counts, whole = schedule_looks(limit, rtol, size=n)
    else:
        counts, whole = schedule_looks(limit, rtol, size=None if method == "hutchinson" else n)
    if method == "hutchinson":
        yield from _hutchinson(operator, counts, generator, step)
    elif method == "xdiag":
        yield from _xdiag(operator, counts, generator, step)
    if whole:
        yield _exact(compute_diagonal(operator, step))


def _exact(values: Tensor) -> _Estimate:
    return _Estimate("exact", values, torch.zeros_like(values), 2)


def _hutchinson(
    operator: LinearOperator,
    counts: Iterator[int],
    generator: torch.Generator,
    step: Callable[[int], object],
) -> Iterator[_Estimate]:
    """Yield means of z ∘ A z over Rademacher vectors z, with the standard error of each entry."""
    n, dtype, device = operator.shape[0], operator.dtype, operator.device
    mean = torch.zeros(n, dtype=dtype, device=device)
    squares = torch.zeros_like(mean)
    taken = 0
    for count in counts:
        for block in split_rows(operator, count - taken):
            rows = block.stop - block.start
            signs = draw_signs(rows, n, generator, dtype=dtype, device=device)
            terms = signs.mul_(operator._products(signs))
            # Deviations from the mean of the block lose no digits (Chan et al. 1983).
            own = terms.mean(dim=0)
            shift = own - mean
            squares += terms.sub_(own).square_().sum(dim=0)
            squares += shift.square() * (taken * rows / (taken + rows))
            mean += shift * (rows / (taken + rows))
            taken += rows
            step(rows)
        operator._finite(mean)
        factor = t_factor(taken) / math.sqrt(taken * (taken - 1))
        yield _Estimate("hutchinson", mean.clone(), squares.sqrt() * factor, taken)


def _xdiag(
    operator: LinearOperator,
    counts: Iterator[int],
    generator: torch.Generator,
    step: Callable[[int], object],
) -> Iterator[_Estimate]:
    """Yield XDiag's estimates, with half of the products for a sketch and half for its images."""
    sketch = Sketch(operator, generator, signs=True, keep=True, step=step)
    for count in counts:
        sketch.extend(count // 2 - sketch.columns)
        values, errors = xdiag(sketch)
        rounding = sketch.rounding / math.sqrt(operator.shape[0])
        errors = torch.hypot(errors * t_factor(sketch.columns), errors.new_tensor(rounding))
        yield _Estimate("xdiag", values, errors, sketch.columns)
