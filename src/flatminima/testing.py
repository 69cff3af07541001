"""Checks for people who write operators of their own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from .algorithms.eigen.lanczos import lanczos
from .errors import ConvergenceWarning, FlatMinimaError
from .operators.linear import LinearOperator
from .operators.linear import check_operator as _checked
from .support.randomness import Seed, as_generator, read_random_state

__all__ = ["check_operator"]

LARGEST = 2000
"""Size up to which an operator is compared with a dense matrix that nobody gave."""


def check_operator(
    operator: LinearOperator,
    *,
    dense: Tensor | None = None,
    tolerance: float | None = None,
    seed: Seed = 0,
) -> None:
    """Check that an operator does all that the algorithms of this library rely on.

    Products must be those of one symmetric matrix: linear, the same alone and together, in and out
    of a session, again and again. They must be new tensors of the operator's type and device, and
    leave their argument and the global random states alone. Vectors of another shape or device and
    vectors with NaN must be refused. What the operator says of itself (`exact_diagonal`, `error`,
    `notes`) and `to_dense`, `to_scipy` and `lanczos` must agree with it.

    Args:
        operator: of size n; takes some 3 n products for n ≤ 2000, about 60 above.
        dense: the matrix it should be, shape (n, n), made by other means. Default: none; up to
            n = 2000 its own products with unit vectors.
        tolerance: allowed error of a product relative to ‖A‖ ‖v‖, in addition to the error that the
            operator states. Default: 1e-10 in float64, 1e-4 in float32, ten units of
            precision in shorter types.
        seed: of the vectors.

    Raises:
        AssertionError: a check fails; the message says which, and by how much.
        ArgumentTypeError: `operator` is not a `LinearOperator`.

    Examples:
        >>> import torch, flatminima as fm
        >>> from flatminima.testing import check_operator
        >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> check_operator(fm.MatrixOperator(matrix), dense=matrix)
        >>> check_operator(fm.FunctionOperator(lambda v: v.flip(0) * torch.arange(2.0), 2))
        Traceback (most recent call last):
        ...
        AssertionError: FunctionOperator is not symmetric: ⟨u, A v⟩ = ..., ⟨v, A u⟩ = ...
    """
    _checked("check_operator", operator)
    if tolerance is None:
        known = {torch.float64: 1e-10, torch.float32: 1e-4}
        tolerance = known.get(operator.dtype, 10 * torch.finfo(operator.dtype).eps)
    before = read_random_state()
    suite = _Suite(operator, dense, tolerance, seed)
    for check in suite.checks():
        check()
    suite.require(
        read_random_state() == before, "changes the global random states; draw from a generator"
    )


class _Suite:
    """The checks of one operator, with what they share."""

    def __init__(
        self, operator: LinearOperator, dense: Tensor | None, tolerance: float, seed: Seed
    ) -> None:
        self.operator, self.tolerance = operator, tolerance
        self.name, self.n = type(operator).__name__, operator.shape[0]
        generator = as_generator(seed, operator.device)
        self.vectors = torch.randn(
            self.n, 3, generator=generator, dtype=operator.dtype, device=operator.device
        )
        self.products = operator.matmat(self.vectors).clone()
        self.dense = None if dense is None else dense.to(operator.device, torch.float64)
        # The norm of A, from below, where nobody gave A.
        lengths = torch.linalg.vector_norm(self.vectors.double(), dim=0)
        grown = torch.linalg.vector_norm(self.products.detach().double(), dim=0) / lengths
        self.size = float(grown.max() if self.dense is None else self.dense.norm())

    def checks(self) -> Iterator[Callable[[], None]]:
        """Yield the checks, in the order in which failures are easiest to understand."""
        yield self.check_attributes
        yield self.check_products_are_new
        yield self.check_columns
        yield self.check_symmetry
        yield self.check_linearity
        yield self.check_strides_and_types
        yield self.check_no_columns
        yield self.check_refusals
        yield self.check_sessions
        yield self.check_diagonal
        yield self.check_scipy
        if self.dense is not None or self.n <= LARGEST:
            yield self.check_dense
        yield self.check_lanczos

    def require(self, holds: bool, said: str) -> None:
        """Fail with a sentence about the operator."""
        if not holds:
            raise AssertionError(f"{self.name} {said}.")

    def require_close(self, found: Tensor, wanted: Tensor, length: float, said: str) -> None:
        """Fail where two results differ by more than the tolerance and the operator's own error."""
        self.require(
            found.shape == wanted.shape,
            f"{said}: shape {tuple(found.shape)} in place of {tuple(wanted.shape)}",
        )
        gap = float((found.double() - wanted.double()).norm())
        allowed = self.tolerance * self.size * length
        allowed += 10 * self.operator.error * length * math.sqrt(max(1, found.numel() // self.n))
        self.require(gap <= allowed, f"{said}: off by {gap:.3g}, allowed {allowed:.3g}")

    def length(self, vector: Tensor) -> float:
        """‖v‖ in float64."""
        return float(torch.linalg.vector_norm(vector.double()))

    def check_attributes(self) -> None:
        operator = self.operator
        self.require(operator.shape == (self.n, self.n), f"has shape {operator.shape}")
        self.require(self.n > 0, "has size 0")
        self.require(operator.dtype.is_floating_point, f"has the type {operator.dtype}")
        found = self.products
        self.require(
            found.dtype == operator.dtype,
            f"gives products of type {found.dtype}; its dtype is {operator.dtype}",
        )
        self.require(
            found.device == operator.device,
            f"gives products on {found.device}; its device is {operator.device}",
        )
        self.require(
            all(isinstance(note, str) for note in operator.notes), "has notes that are no strings"
        )
        self.require(
            operator.error >= 0 and operator.floor >= 0, "has an error or a floor below zero"
        )

    def check_products_are_new(self) -> None:
        vectors = self.vectors.T.contiguous()
        before = vectors.clone()
        # Algorithms call this one, without the copies that `@` makes of its argument.
        first = self.operator._products(vectors)
        self.require(not self.products.requires_grad, "gives products that require grad")
        self.require(torch.equal(vectors, before), "writes to the vectors it is given")
        kept = first.detach().clone()
        with torch.no_grad():
            first += 1
        self.require(
            torch.equal(vectors, before),
            "gives products that share memory with its argument",
        )
        self.require_close(
            self.operator @ self.vectors,
            kept.T,
            self.length(self.vectors),
            "gives another product after an earlier one was written to",
        )

    def check_columns(self) -> None:
        for column in range(3):
            vector = self.vectors[:, column]
            self.require_close(
                self.operator.matvec(vector),
                self.products[:, column],
                self.length(vector),
                f"matvec differs from column {column} of matmat",
            )

    def check_symmetry(self) -> None:
        u, v = self.vectors[:, 0], self.vectors[:, 1]
        left = float(torch.dot(u.double(), self.products[:, 1].double()))
        right = float(torch.dot(v.double(), self.products[:, 0].double()))
        allowed = (self.tolerance * self.size + 20 * self.operator.error) * (
            self.length(u) * self.length(v)
        )
        self.require(
            abs(left - right) <= allowed,
            f"is not symmetric: ⟨u, A v⟩ = {left:.6g}, ⟨v, A u⟩ = {right:.6g}",
        )

    def check_linearity(self) -> None:
        u, v = self.vectors[:, 0], self.vectors[:, 1]
        for a, b in ((1.0, -1.0), (300.0, 0.02), (0.0, -1e-3)):
            self.require_close(
                self.operator @ (a * u + b * v),
                a * self.products[:, 0] + b * self.products[:, 1],
                abs(a) * self.length(u) + abs(b) * self.length(v),
                f"is not linear: A ({a:g} u + {b:g} v) is not {a:g} A u + {b:g} A v",
            )

    def check_strides_and_types(self) -> None:
        wide = torch.zeros(3, 2 * self.n, dtype=self.vectors.dtype, device=self.vectors.device)
        wide[:, ::2] = self.vectors.T
        self.require_close(
            self.operator @ wide[:, ::2].T,
            self.products,
            self.length(self.vectors),
            "gives another product for vectors that do not lie densely in memory",
        )
        small = torch.arange(self.n, device=self.vectors.device) % 7
        self.require_close(
            self.operator @ small,
            self.operator @ small.to(self.operator.dtype),
            self.length(small),
            "gives another product for a vector of integers",
        )

    def check_no_columns(self) -> None:
        found = self.operator @ self.vectors[:, :0]
        self.require(
            found.shape == (self.n, 0) and found.dtype == self.operator.dtype,
            f"gives {tuple(found.shape)} of {found.dtype} for a matrix without columns",
        )

    def check_refusals(self) -> None:
        long = torch.ones(self.n + 1, device=self.operator.device)
        broken = self.vectors[:, 0].clone()
        broken[-1] = math.nan
        cases: list[tuple[str, Callable[[], object]]] = [
            (f"a vector of length {self.n + 1}", lambda: self.operator.matvec(long)),
            ("a tensor of three dimensions", lambda: self.operator @ self.vectors[None]),
            ("a NumPy array", lambda: self.operator @ np.ones(self.n)),  # type: ignore[operator]
            ("a vector with NaN", lambda: self.operator @ broken),
            ("a vector on the meta device", lambda: self.operator @ broken.to("meta")),
        ]
        for what, call in cases:
            try:
                call()
            except FlatMinimaError:
                continue
            except Exception as error:
                raise AssertionError(
                    f"{self.name} answers {what} with {type(error).__name__} ({error}) and not "
                    "with an error of this library; override _products alone."
                ) from error
            self.require(False, f"does not refuse {what}")

    def check_sessions(self) -> None:
        length = self.length(self.vectors)
        for _ in range(2):
            with self.operator.session(), self.operator.session():
                for _ in range(2):
                    found = self.operator @ self.vectors
                    self.require_close(found, self.products, length, "changes within a session")
            found = self.operator @ self.vectors
            self.require_close(found, self.products, length, "changes after a session")

    def check_diagonal(self) -> None:
        found = self.operator.exact_diagonal()
        if found is None:
            self.require(
                not self.operator.knows_diagonal, "knows its diagonal, and exact_diagonal() is None"
            )
            return
        self.require(found.shape == (self.n,), f"has a diagonal of shape {tuple(found.shape)}")
        places = [0, self.n // 2, self.n - 1]
        unit = torch.zeros(self.n, 3, dtype=self.operator.dtype, device=self.operator.device)
        for column, place in enumerate(places):
            unit[place, column] = 1
        wanted = (self.operator @ unit)[places, range(3)]
        gap = float((found[places].double() - wanted.double()).abs().max())
        allowed = self.tolerance * self.size + 10 * self.operator.error
        self.require(gap <= allowed, f"has an exact_diagonal() that is off by {gap:.3g}")

    def check_scipy(self) -> None:
        seen = self.operator.to_scipy()
        array = self.vectors.detach().cpu().numpy()
        found = torch.as_tensor(np.asarray(seen @ array), device=self.operator.device)
        self.require_close(
            found, self.products, self.length(self.vectors), "to_scipy() gives other products"
        )

    def check_dense(self) -> None:
        own = self.operator.to_dense(progress=False) if self.n <= LARGEST else None
        for matrix, said in (
            (own, "to_dense() does not belong to its products"),
            (self.dense, "is not the matrix given"),
        ):
            if matrix is None:
                continue
            self.require_close(
                self.products,
                matrix.double() @ self.vectors.double(),
                self.length(self.vectors),
                said,
            )
        if own is not None and self.dense is not None:
            self.require_close(
                own, self.dense, math.sqrt(self.n), "to_dense() is not the matrix given"
            )

    def check_lanczos(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            result = lanczos(self.operator, tol=1e-3, max_products=60, progress=False)
        vectors = result.eigenvectors
        assert vectors is not None
        vector = vectors[:, 0]
        gap = self.length(self.operator @ vector - result.eigenvalues[0].to(vector) * vector)
        allowed = 2 * float(result.residuals[0]) + 10 * self.operator.error
        allowed += self.tolerance * max(self.size, abs(float(result.eigenvalues[0])))
        self.require(
            gap <= allowed,
            f"gives lanczos() an eigenpair with a residual of {gap:.3g}; {allowed:.3g} was stated",
        )
