"""The trace of an operator."""

from __future__ import annotations

import dataclasses
import math

import torch

from ..checks import check_integer
from ..errors import NonFiniteError
from ..operators.linear import LinearOperator, check_operator
from ..progress import progress_bar
from ..randomness import Seed, as_generator, rademacher
from ..results import Outcome, Result, Table, format_number, reading_notes

__all__ = ["TraceResult", "trace"]

BLOCK_BYTES = 2**28


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TraceResult(Result):
    """An estimate of a trace.

    Attributes:
        value: tr A.
        standard_error: of `value`, from the spread of the samples.
        size: n; the mean eigenvalue is `value / size`.
        products: with the operator, one for each sample.
        outcome: completed.
        readings: how often the data were read anew for it; 0 where they are kept on the device.
        notes: what a reader should know about how it was computed.

    Examples:
        >>> import torch, flatminima as fm
        >>> result = fm.trace(fm.MatrixOperator(torch.eye(3)), products=5)
        >>> result.value, result.standard_error, result.products
        (3.0, 0.0, 5)
    """

    value: float
    standard_error: float
    size: int
    products: int
    outcome: Outcome
    readings: int = 0
    notes: tuple[str, ...] = ()

    def _table(self) -> Table:
        return Table(
            header=("quantity", "value", "standard error"),
            rows=(
                ("trace", format_number(self.value), format_number(self.standard_error, 2)),
                (
                    "mean eigenvalue",
                    format_number(self.value / self.size),
                    format_number(self.standard_error / self.size, 2),
                ),
            ),
            title=f"Trace by Hutchinson's estimator, {self.products} products",
            notes=(self.outcome.value, *reading_notes(self.readings), *self.notes),
        )


def trace(
    operator: LinearOperator,
    *,
    products: int = 100,
    seed: Seed = 0,
    progress: bool = True,
) -> TraceResult:
    """The trace by Hutchinson's estimator: the mean of zᵀ A z over Rademacher vectors z.

    The estimator has variance 2 (‖A‖_F² − Σ A_ii²) / products (Hutchinson 1989).

    Args:
        operator: symmetric.
        products: number of samples, two at least.
        seed: of the vectors.
        progress: show a bar if it takes long.

    Returns:
        The mean with its standard error.

    Raises:
        InvalidArgumentError: fewer than two products.
        NonFiniteError: a product holds NaN or infinity.

    Examples:
        >>> import torch, flatminima as fm
        >>> fm.trace(fm.MatrixOperator(torch.diag(torch.tensor([1.0, 2.0]))), products=4).value
        3.0
    """
    check_operator("trace", operator)
    check_integer("trace", "products", products, low=2)
    n = operator.shape[0]
    generator = as_generator(seed, operator.device)
    itemsize = torch.empty(0, dtype=operator.dtype).element_size()
    width = max(1, min(products, BLOCK_BYTES // (n * itemsize)))
    samples: list[float] = []
    before = operator.readings
    with (
        operator.session(),
        progress_bar("trace", total=products, unit="product", show=progress) as bar,
    ):
        while len(samples) < products:
            count = min(width, products - len(samples))
            signs = rademacher(count, n, generator, dtype=operator.dtype, device=operator.device)
            forms = torch.linalg.vecdot(signs, operator._products(signs))
            samples += forms.cpu().double().tolist()
            bar.update(count)
    if not all(map(math.isfinite, samples)):
        raise NonFiniteError(f"A product with {operator!r} holds NaN or infinity.")
    mean = math.fsum(samples) / products
    variance = math.fsum((s - mean) ** 2 for s in samples) / (products - 1)
    return TraceResult(
        value=mean,
        standard_error=math.sqrt(variance / products),
        size=n,
        products=products,
        outcome=Outcome.COMPLETED,
        readings=operator.readings - before,
        notes=operator.notes,
    )
