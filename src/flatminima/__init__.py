"""Sharpness of minima: Hessian products and eigenvalues, Keskar's ε-sharpness, and more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .comparison import Comparison, compare
from .eigen.lanczos import lanczos
from .eigen.power_iteration import power_iteration
from .eigen.result import EigenResult
from .errors import (
    ArgumentTypeError,
    ConvergenceError,
    ConvergenceWarning,
    DataChangedError,
    DeviceError,
    EmptyDataError,
    FlatMinimaError,
    FlatMinimaWarning,
    InvalidArgumentError,
    LossNotScalarError,
    NonFiniteError,
    NotSymmetricError,
    NotTwiceDifferentiableError,
    OneShotDataError,
    ParameterSelectionError,
    ShapeError,
    StateMismatchError,
)
from .estimators.trace import TraceResult, trace
from .landscape.interpolation import Curve, Interpolation, interpolate
from .measures.epsilon_sharpness import SharpnessResult, epsilon_sharpness
from .measures.random_sharpness import RandomSharpnessResult, TensorSharpness, random_sharpness
from .metrics import accuracy
from .objective import Objective
from .operators import FunctionOperator, HessianOperator, LinearOperator, MatrixOperator
from .report import Measurement, SharpnessReport, sharpness
from .results import Outcome, Result, Table

if TYPE_CHECKING:
    from .plotting import plot

__version__ = "0.1.0"

__all__ = [
    "ArgumentTypeError",
    "Comparison",
    "ConvergenceError",
    "ConvergenceWarning",
    "Curve",
    "DataChangedError",
    "DeviceError",
    "EigenResult",
    "EmptyDataError",
    "FlatMinimaError",
    "FlatMinimaWarning",
    "FunctionOperator",
    "HessianOperator",
    "Interpolation",
    "InvalidArgumentError",
    "LinearOperator",
    "LossNotScalarError",
    "MatrixOperator",
    "Measurement",
    "NonFiniteError",
    "NotSymmetricError",
    "NotTwiceDifferentiableError",
    "Objective",
    "OneShotDataError",
    "Outcome",
    "ParameterSelectionError",
    "RandomSharpnessResult",
    "Result",
    "ShapeError",
    "SharpnessReport",
    "SharpnessResult",
    "StateMismatchError",
    "Table",
    "TensorSharpness",
    "TraceResult",
    "accuracy",
    "compare",
    "epsilon_sharpness",
    "interpolate",
    "lanczos",
    "plot",
    "power_iteration",
    "random_sharpness",
    "sharpness",
    "trace",
]


def __getattr__(name: str) -> Any:
    # matplotlib is loaded only by whoever draws.
    if name == "plot":
        from .plotting import plot

        return plot
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
