"""The ways in which a call can fail, one class for each.

Every class derives from [`FlatMinimaError`][flatminima.FlatMinimaError], and from the built-in
exception that describes it best, so that `except ValueError` keeps working.
"""

from __future__ import annotations

import difflib
import math
import os
import sys
import warnings
from collections.abc import Iterable

__all__ = [
    "ArgumentTypeError",
    "ConvergenceError",
    "ConvergenceWarning",
    "DataChangedError",
    "DeviceError",
    "DeviceMemoryError",
    "EmptyDataError",
    "FiniteDifferenceWarning",
    "FlatMinimaError",
    "FlatMinimaWarning",
    "GraphError",
    "InvalidArgumentError",
    "LossNotScalarError",
    "NonFiniteError",
    "NotSymmetricError",
    "NotTwiceDifferentiableError",
    "OneShotDataError",
    "ParameterSelectionError",
    "ShapeError",
    "StateMismatchError",
    "closest",
    "warn",
]


class FlatMinimaError(Exception):
    """Above every exception that this library raises on purpose.

    Examples:
        >>> import flatminima as fm
        >>> issubclass(fm.InvalidArgumentError, fm.FlatMinimaError)
        True
    """


class InvalidArgumentError(FlatMinimaError, ValueError):
    """An argument has a value outside what the call accepts.

    Examples:
        >>> import torch, flatminima as fm
        >>> operator = fm.MatrixOperator(torch.eye(2))
        >>> try:
        ...     fm.lanczos(operator, k=5)
        ... except fm.InvalidArgumentError as error:
        ...     print(error)
        The 'k' argument of lanczos must be an integer from 1 to 2; got 5.
    """


class ArgumentTypeError(FlatMinimaError, TypeError):
    """An argument is of a type that the call cannot use.

    Examples:
        >>> import torch, flatminima as fm
        >>> try:
        ...     fm.lanczos(torch.eye(2))
        ... except fm.ArgumentTypeError as error:
        ...     print(error)
        The 'operator' argument of lanczos must be a LinearOperator; got Tensor. ...
    """


class ShapeError(FlatMinimaError, ValueError):
    """A vector or matrix has the wrong shape.

    Examples:
        >>> import torch, flatminima as fm
        >>> try:
        ...     fm.MatrixOperator(torch.eye(2)) @ torch.ones(3)
        ... except fm.ShapeError as error:
        ...     print(error)
        MatrixOperator.matvec takes shape (2,); got (3,).
    """


class DeviceError(FlatMinimaError, ValueError):
    """Model, data or vector lie on different devices.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(1, 1)
        >>> data = torch.ones(1, 1), torch.ones(1, 1)
        >>> try:
        ...     fm.Objective(model, torch.nn.MSELoss(), data, device="meta")
        ... except fm.DeviceError as error:
        ...     print(error)
        device='meta' was asked for, but the model is on cpu; ...
    """


class ParameterSelectionError(FlatMinimaError, ValueError):
    """`params=` selects nothing, or something that has no derivative.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(1, 1)
        >>> data = torch.ones(1, 1), torch.ones(1, 1)
        >>> try:
        ...     fm.Objective(model, torch.nn.MSELoss(), data, params="wieght")
        ... except fm.ParameterSelectionError as error:
        ...     print(error)
        The pattern 'wieght' matches no parameter. Did you mean 'weight'?
    """


class LossNotScalarError(FlatMinimaError, ValueError):
    """The loss of a batch is not one real number with a graph behind it.

    Examples:
        >>> import torch, flatminima as fm
        >>> model, loss_fn = torch.nn.Linear(1, 1), torch.nn.MSELoss(reduction="none")
        >>> data = torch.ones(3, 1), torch.ones(3, 1)
        >>> try:
        ...     fm.Objective(model, loss_fn, data).loss()
        ... except fm.LossNotScalarError as error:
        ...     print(error)
        The loss of batch 0 has shape (3, 1), not one value; use reduction="mean" ...
    """


class NonFiniteError(FlatMinimaError, ValueError):
    """A loss, a product or a vector holds NaN or infinity.

    Examples:
        >>> import torch, flatminima as fm
        >>> try:
        ...     fm.MatrixOperator(torch.eye(2)) @ torch.tensor([1.0, float("nan")])
        ... except fm.NonFiniteError as error:
        ...     print(error)
        MatrixOperator.matvec was given a vector with NaN or infinity at index 1.
    """


class EmptyDataError(FlatMinimaError, ValueError):
    """The data hold no batch, or only batches of weight zero.

    Examples:
        >>> import torch, flatminima as fm
        >>> try:
        ...     fm.Objective(torch.nn.Linear(1, 1), torch.nn.MSELoss(), [])
        ... except fm.EmptyDataError as error:
        ...     print(error)
        The data hold no batch; ...
    """


class OneShotDataError(FlatMinimaError, TypeError):
    """The data can be read only once, and every measure reads them many times.

    Examples:
        >>> import torch, flatminima as fm
        >>> batches = ((torch.ones(1, 1), torch.ones(1, 1)) for _ in range(3))
        >>> try:
        ...     fm.Objective(torch.nn.Linear(1, 1), torch.nn.MSELoss(), batches)
        ... except fm.OneShotDataError as error:
        ...     print(error)
        data is a generator, which can be read only once, ...
    """


class DataChangedError(FlatMinimaError, RuntimeError):
    """Reading the data again gave other batches than the first time.

    Examples:
        >>> import torch, flatminima as fm
        >>> class Noise(torch.utils.data.Dataset):
        ...     generator = torch.Generator().manual_seed(0)
        ...     def __len__(self):
        ...         return 4
        ...     def __getitem__(self, index):
        ...         return torch.randn(1, generator=self.generator), torch.zeros(1)
        >>> model, loss_fn = torch.nn.Linear(1, 1), torch.nn.MSELoss()
        >>> try:
        ...     fm.Objective(model, loss_fn, Noise(), cache=False).loss()
        ... except fm.DataChangedError as error:
        ...     print(error)
        Reading the data again gave other batches than the first time (batch 0 differs): ...
    """


class StateMismatchError(FlatMinimaError, ValueError):
    """Two models, or a model and a state dict, do not have the same tensors.

    Examples:
        >>> import torch, flatminima as fm
        >>> model, data = torch.nn.Linear(1, 1), (torch.ones(1, 1), torch.ones(1, 1))
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> try:
        ...     fm.interpolate(objective, model, torch.nn.Linear(1, 1, bias=False))
        ... except fm.StateMismatchError as error:
        ...     print(error)
        The 'end' argument of interpolate does not fit the objective's model: it lacks 'bias'. ...
    """


class NotSymmetricError(FlatMinimaError, ValueError):
    """An operator that must be symmetric is not.

    Examples:
        >>> import torch, flatminima as fm
        >>> try:
        ...     fm.MatrixOperator(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
        ... except fm.NotSymmetricError as error:
        ...     print(error)
        MatrixOperator takes a symmetric matrix; this one differs from its transpose by ...
    """


class NotPositiveDefiniteError(FlatMinimaError, ValueError):
    """A + τ I has an eigenvalue that is not positive where all of them must be.

    Attributes:
        smallest: the smallest Ritz value of A; its smallest eigenvalue is at most that.
        shift: the τ that was given.

    Examples:
        >>> import flatminima as fm
        >>> print(fm.NotPositiveDefiniteError("not positive", -0.5, 0.1).smallest)
        -0.5
    """

    def __init__(self, message: str, smallest: float = math.nan, shift: float = math.nan) -> None:
        super().__init__(message)
        self.smallest, self.shift = smallest, shift


class NotTwiceDifferentiableError(FlatMinimaError, RuntimeError):
    """An operation of the model or the loss has no second derivative in PyTorch.

    Attributes:
        operation: the name of the operation, as PyTorch has it.
        module: the name of the module that called it; "the loss function" outside of the model,
            "the model itself" for its outermost forward, and "" where that is not known.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Hardsigmoid())
        >>> data = torch.ones(3, 2), torch.zeros(3, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> try:
        ...     fm.HessianOperator(objective, method="double_backward") @ torch.ones(3)
        ... except fm.NotTwiceDifferentiableError as error:
        ...     print(error.operation, "in", error.module)
        hardsigmoid in 1
    """

    def __init__(self, message: str, operation: str = "", module: str = "") -> None:
        super().__init__(message)
        self.operation, self.module = operation, module


class DeviceMemoryError(FlatMinimaError, RuntimeError):
    """A batch does not fit into the memory of the device; PyTorch's error is its cause.

    Examples:
        >>> import torch, flatminima as fm
        >>> def loss_fn(output, target):
        ...     raise torch.OutOfMemoryError("out of memory")
        >>> data = torch.ones(3, 1), torch.ones(3, 1)
        >>> try:
        ...     fm.Objective(torch.nn.Linear(1, 1), loss_fn, data).loss()
        ... except fm.DeviceMemoryError as error:
        ...     print(error)
        There is not enough memory on cpu for batch 0. Use smaller batches ...
    """


class GraphError(FlatMinimaError, RuntimeError):
    """The loss of a batch depends on tensors whose graph cannot be differentiated.

    Examples:
        >>> import torch, flatminima as fm
        >>> class Remembers(torch.nn.Linear):
        ...     seen = []
        ...     def forward(self, x):
        ...         self.seen.append(super().forward(x))
        ...         return sum(self.seen)
        >>> data = torch.ones(4, 1), torch.ones(4, 1)
        >>> objective = fm.Objective(Remembers(1, 1), torch.nn.MSELoss(), data, batch_size=2)
        >>> try:
        ...     objective.gradient()
        ... except fm.GraphError as error:
        ...     print(error)
        The loss of batch 1 depends on a graph that no longer exists: ...
    """


class ConvergenceError(FlatMinimaError, RuntimeError):
    """An iterative method ran out of budget and `strict=True` was given.

    Attributes:
        result: what had been reached; the same object that would have been returned.

    Examples:
        >>> import torch, flatminima as fm
        >>> operator = fm.MatrixOperator(torch.diag(torch.arange(100.0)))
        >>> try:
        ...     fm.lanczos(operator, max_products=5, strict=True)
        ... except fm.ConvergenceError as error:
        ...     print(error.result.products)
        5
    """

    def __init__(self, message: str, result: object = None) -> None:
        super().__init__(message)
        self.result = result


class FlatMinimaWarning(UserWarning):
    """Above every warning that this library gives.

    Examples:
        >>> import flatminima as fm
        >>> issubclass(fm.ConvergenceWarning, fm.FlatMinimaWarning)
        True
    """


class ConvergenceWarning(FlatMinimaWarning):
    """An iterative method ran out of budget; its result says how far it came.

    Examples:
        >>> import warnings, torch, flatminima as fm
        >>> operator = fm.MatrixOperator(torch.diag(torch.arange(100.0)))
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     result = fm.lanczos(operator, max_products=5)
        >>> print(caught[0].message)
        lanczos: 1 of 1 eigenpairs did not converge within 5 products; ...
    """


class FiniteDifferenceWarning(FlatMinimaWarning):
    """Hessian products are differences of gradients, as an operation has no second derivative.

    Examples:
        >>> import warnings, torch, flatminima as fm
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Hardsigmoid())
        >>> data = torch.ones(3, 2), torch.zeros(3, 1)
        >>> hessian = fm.HessianOperator(fm.Objective(model, torch.nn.MSELoss(), data))
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     product = hessian @ torch.ones(3)
        >>> print(caught[0].message)
        PyTorch has no second derivative of hardsigmoid (in the module '1'), so ...
    """


def warn(message: str, category: type[FlatMinimaWarning]) -> None:
    """Give a warning that points at the first line outside of this package."""
    here = os.path.dirname(__file__)
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(here):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def closest(name: str, known: Iterable[str], *, count: int = 3) -> str:
    """Return a sentence with the names nearest to `name`, or all of them when none is near."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=count, cutoff=0.4)
    if near:
        return "Did you mean " + " or ".join(repr(n) for n in near) + "?"
    shown = ", ".join(repr(n) for n in names[:10])
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"Known names: {shown}{more}."
