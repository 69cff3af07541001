"""Sharpness of minima: Hessian products and eigenvalues, Keskar's ε-sharpness, and more."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    ArgumentTypeError,
    ConvergenceError,
    ConvergenceWarning,
    DataChangedError,
    DeviceError,
    DeviceMemoryError,
    EmptyDataError,
    FiniteDifferenceWarning,
    FlatMinimaError,
    FlatMinimaWarning,
    GraphError,
    InvalidArgumentError,
    LossNotScalarError,
    NonFiniteError,
    NotCompiledError,
    NotPositiveDefiniteError,
    NotSymmetricError,
    NotTwiceDifferentiableError,
    OneShotDataError,
    ParameterSelectionError,
    ShapeError,
    StateMismatchError,
)
from .metrics import accuracy
from .objective import Objective
from .operators.gauss_newton import FisherOperator, GaussNewtonOperator
from .operators.given import FunctionOperator, MatrixOperator
from .operators.hessian import HessianOperator
from .operators.linear import LinearOperator
from .operators.restricted import BlockOperator, PreconditionedOperator, ProjectedOperator
from .operators.sums import SumOperator
from .results import Estimate, Outcome, Result, Table
from .weights import token_weight

if TYPE_CHECKING:
    from .comparison import Comparison, compare
    from .eigen.lanczos import lanczos
    from .eigen.power_iteration import power_iteration
    from .eigen.result import EigenResult
    from .estimators.density import SpectralDensity
    from .estimators.diagonal import DiagonalResult, diagonal
    from .estimators.log_determinant import LogDeterminantResult, log_determinant
    from .estimators.result import BlockTrace, TraceResult
    from .estimators.spectral_density import spectral_density
    from .estimators.trace import trace
    from .landscape.interpolation import Curve, Interpolation, interpolate
    from .measures.epsilon_sharpness import SharpnessResult, epsilon_sharpness
    from .measures.laplace import LaplaceResult, laplace_log_evidence
    from .measures.layerwise import LayerCurvature, LayerwiseResult, layerwise
    from .measures.random_sharpness import RandomSharpnessResult, TensorSharpness, random_sharpness
    from .plotting.plot import plot
    from .report.result import Measurement, SharpnessReport
    from .report.sharpness import sharpness

__version__ = "0.1.0"

__all__ = [
    "ArgumentTypeError",
    "BlockOperator",
    "BlockTrace",
    "Comparison",
    "ConvergenceError",
    "ConvergenceWarning",
    "Curve",
    "DataChangedError",
    "DeviceError",
    "DeviceMemoryError",
    "DiagonalResult",
    "EigenResult",
    "EmptyDataError",
    "Estimate",
    "FiniteDifferenceWarning",
    "FisherOperator",
    "FlatMinimaError",
    "FlatMinimaWarning",
    "FunctionOperator",
    "GaussNewtonOperator",
    "GraphError",
    "HessianOperator",
    "Interpolation",
    "InvalidArgumentError",
    "LaplaceResult",
    "LayerCurvature",
    "LayerwiseResult",
    "LinearOperator",
    "LogDeterminantResult",
    "LossNotScalarError",
    "MatrixOperator",
    "Measurement",
    "NonFiniteError",
    "NotCompiledError",
    "NotPositiveDefiniteError",
    "NotSymmetricError",
    "NotTwiceDifferentiableError",
    "Objective",
    "OneShotDataError",
    "Outcome",
    "ParameterSelectionError",
    "PreconditionedOperator",
    "ProjectedOperator",
    "RandomSharpnessResult",
    "Result",
    "ShapeError",
    "SharpnessReport",
    "SharpnessResult",
    "SpectralDensity",
    "StateMismatchError",
    "SumOperator",
    "Table",
    "TensorSharpness",
    "TraceResult",
    "accuracy",
    "compare",
    "diagonal",
    "epsilon_sharpness",
    "interpolate",
    "lanczos",
    "laplace_log_evidence",
    "layerwise",
    "log_determinant",
    "plot",
    "power_iteration",
    "random_sharpness",
    "sharpness",
    "spectral_density",
    "token_weight",
    "trace",
]


# Loaded when they are first asked for, for a quick start; matplotlib only by whoever draws.
_LATER = {
    "BlockTrace": ".estimators.result",
    "Comparison": ".comparison",
    "Curve": ".landscape.interpolation",
    "DiagonalResult": ".estimators.diagonal",
    "EigenResult": ".eigen.result",
    "Interpolation": ".landscape.interpolation",
    "LaplaceResult": ".measures.laplace",
    "LayerCurvature": ".measures.layerwise",
    "LayerwiseResult": ".measures.layerwise",
    "LogDeterminantResult": ".estimators.log_determinant",
    "Measurement": ".report.result",
    "RandomSharpnessResult": ".measures.random_sharpness",
    "SharpnessReport": ".report.result",
    "SharpnessResult": ".measures.epsilon_sharpness",
    "SpectralDensity": ".estimators.density",
    "TensorSharpness": ".measures.random_sharpness",
    "TraceResult": ".estimators.result",
    "compare": ".comparison",
    "diagonal": ".estimators.diagonal",
    "epsilon_sharpness": ".measures.epsilon_sharpness",
    "interpolate": ".landscape.interpolation",
    "lanczos": ".eigen.lanczos",
    "laplace_log_evidence": ".measures.laplace",
    "layerwise": ".measures.layerwise",
    "log_determinant": ".estimators.log_determinant",
    "plot": ".plotting.plot",
    "power_iteration": ".eigen.power_iteration",
    "random_sharpness": ".measures.random_sharpness",
    "sharpness": ".report.sharpness",
    "spectral_density": ".estimators.spectral_density",
    "trace": ".estimators.trace",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        found = getattr(importlib.import_module(_LATER[name], __name__), name)
        globals()[name] = found
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
