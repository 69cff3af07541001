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
    from .landscape.connection import Connection, connect
    from .landscape.directions import Directions
    from .landscape.interpolation import Barrier, Curve, Interpolation, interpolate
    from .landscape.matching import Permutations, apply_permutations, match_weights
    from .landscape.model_directions import (
        difference_direction,
        eigenvector_directions,
        gradient_direction,
    )
    from .landscape.path_losses import TrajectoryLosses, path_losses
    from .landscape.principal import PrincipalResult, principal_components
    from .landscape.random_directions import random_directions
    from .landscape.surface import Grid, Surface, surface
    from .landscape.trajectory import Trajectory
    from .measures.average_sharpness import AverageSharpnessResult, average_sharpness
    from .measures.critical_sharpness import CriticalSharpnessResult, critical_sharpness
    from .measures.epsilon_sharpness import SharpnessResult, epsilon_sharpness
    from .measures.fisher_rao_norm import FisherRaoResult, fisher_rao_norm
    from .measures.gradient_norm import GradientNormResult, gradient_norm
    from .measures.laplace import LaplaceResult, laplace_log_evidence
    from .measures.layerwise import LayerCurvature, LayerwiseResult, layerwise
    from .measures.local_energy import LocalEnergyResult, local_energy
    from .measures.pac_bayes_sharpness import PacBayesResult, pac_bayes_sharpness
    from .measures.random_sharpness import RandomSharpnessResult, TensorSharpness, random_sharpness
    from .measures.relative_flatness import LayerFlatness, RelativeFlatnessResult, relative_flatness
    from .measures.result import Measurement, MeasureResult
    from .measures.sam_sharpness import SamSharpnessResult, sam_sharpness
    from .plotting.interactive import interactive
    from .plotting.plot import plot
    from .report.invariance import InvarianceTable, invariance_table
    from .report.result import SharpnessReport
    from .report.sharpness import sharpness
    from .rescaling import rescale

__version__ = "0.1.0"

__all__ = [
    "ArgumentTypeError",
    "AverageSharpnessResult",
    "Barrier",
    "BlockOperator",
    "BlockTrace",
    "Comparison",
    "Connection",
    "ConvergenceError",
    "ConvergenceWarning",
    "CriticalSharpnessResult",
    "Curve",
    "DataChangedError",
    "DeviceError",
    "DeviceMemoryError",
    "DiagonalResult",
    "Directions",
    "EigenResult",
    "EmptyDataError",
    "Estimate",
    "FiniteDifferenceWarning",
    "FisherOperator",
    "FisherRaoResult",
    "FlatMinimaError",
    "FlatMinimaWarning",
    "FunctionOperator",
    "GaussNewtonOperator",
    "GradientNormResult",
    "GraphError",
    "Grid",
    "HessianOperator",
    "Interpolation",
    "InvalidArgumentError",
    "InvarianceTable",
    "LaplaceResult",
    "LayerCurvature",
    "LayerFlatness",
    "LayerwiseResult",
    "LinearOperator",
    "LocalEnergyResult",
    "LogDeterminantResult",
    "LossNotScalarError",
    "MatrixOperator",
    "MeasureResult",
    "Measurement",
    "NonFiniteError",
    "NotCompiledError",
    "NotPositiveDefiniteError",
    "NotSymmetricError",
    "NotTwiceDifferentiableError",
    "Objective",
    "OneShotDataError",
    "Outcome",
    "PacBayesResult",
    "ParameterSelectionError",
    "Permutations",
    "PreconditionedOperator",
    "PrincipalResult",
    "ProjectedOperator",
    "RandomSharpnessResult",
    "RelativeFlatnessResult",
    "Result",
    "SamSharpnessResult",
    "ShapeError",
    "SharpnessReport",
    "SharpnessResult",
    "SpectralDensity",
    "StateMismatchError",
    "SumOperator",
    "Surface",
    "Table",
    "TensorSharpness",
    "TraceResult",
    "Trajectory",
    "TrajectoryLosses",
    "accuracy",
    "apply_permutations",
    "average_sharpness",
    "compare",
    "connect",
    "critical_sharpness",
    "diagonal",
    "difference_direction",
    "eigenvector_directions",
    "epsilon_sharpness",
    "fisher_rao_norm",
    "gradient_direction",
    "gradient_norm",
    "interactive",
    "interpolate",
    "invariance_table",
    "lanczos",
    "laplace_log_evidence",
    "layerwise",
    "local_energy",
    "log_determinant",
    "match_weights",
    "pac_bayes_sharpness",
    "path_losses",
    "plot",
    "power_iteration",
    "principal_components",
    "random_directions",
    "random_sharpness",
    "relative_flatness",
    "rescale",
    "sam_sharpness",
    "sharpness",
    "spectral_density",
    "surface",
    "token_weight",
    "trace",
]


# Loaded when they are first asked for, for a quick start; matplotlib only by whoever draws.
_LATER = {
    "AverageSharpnessResult": ".measures.average_sharpness",
    "Barrier": ".landscape.interpolation",
    "BlockTrace": ".estimators.result",
    "Comparison": ".comparison",
    "Connection": ".landscape.connection",
    "CriticalSharpnessResult": ".measures.critical_sharpness",
    "Curve": ".landscape.interpolation",
    "DiagonalResult": ".estimators.diagonal",
    "Directions": ".landscape.directions",
    "EigenResult": ".eigen.result",
    "FisherRaoResult": ".measures.fisher_rao_norm",
    "GradientNormResult": ".measures.gradient_norm",
    "Grid": ".landscape.surface",
    "Interpolation": ".landscape.interpolation",
    "InvarianceTable": ".report.invariance",
    "LaplaceResult": ".measures.laplace",
    "LayerCurvature": ".measures.layerwise",
    "LayerFlatness": ".measures.relative_flatness",
    "LayerwiseResult": ".measures.layerwise",
    "LocalEnergyResult": ".measures.local_energy",
    "LogDeterminantResult": ".estimators.log_determinant",
    "MeasureResult": ".measures.result",
    "Measurement": ".measures.result",
    "PacBayesResult": ".measures.pac_bayes_sharpness",
    "Permutations": ".landscape.matching",
    "PrincipalResult": ".landscape.principal",
    "RandomSharpnessResult": ".measures.random_sharpness",
    "RelativeFlatnessResult": ".measures.relative_flatness",
    "SamSharpnessResult": ".measures.sam_sharpness",
    "SharpnessReport": ".report.result",
    "SharpnessResult": ".measures.epsilon_sharpness",
    "SpectralDensity": ".estimators.density",
    "Surface": ".landscape.surface",
    "TensorSharpness": ".measures.random_sharpness",
    "TraceResult": ".estimators.result",
    "Trajectory": ".landscape.trajectory",
    "TrajectoryLosses": ".landscape.path_losses",
    "apply_permutations": ".landscape.matching",
    "average_sharpness": ".measures.average_sharpness",
    "compare": ".comparison",
    "connect": ".landscape.connection",
    "critical_sharpness": ".measures.critical_sharpness",
    "diagonal": ".estimators.diagonal",
    "difference_direction": ".landscape.model_directions",
    "eigenvector_directions": ".landscape.model_directions",
    "epsilon_sharpness": ".measures.epsilon_sharpness",
    "fisher_rao_norm": ".measures.fisher_rao_norm",
    "gradient_direction": ".landscape.model_directions",
    "gradient_norm": ".measures.gradient_norm",
    "interactive": ".plotting.interactive",
    "interpolate": ".landscape.interpolation",
    "invariance_table": ".report.invariance",
    "lanczos": ".eigen.lanczos",
    "laplace_log_evidence": ".measures.laplace",
    "layerwise": ".measures.layerwise",
    "local_energy": ".measures.local_energy",
    "log_determinant": ".estimators.log_determinant",
    "match_weights": ".landscape.matching",
    "pac_bayes_sharpness": ".measures.pac_bayes_sharpness",
    "path_losses": ".landscape.path_losses",
    "plot": ".plotting.plot",
    "power_iteration": ".eigen.power_iteration",
    "principal_components": ".landscape.principal",
    "random_directions": ".landscape.random_directions",
    "random_sharpness": ".measures.random_sharpness",
    "relative_flatness": ".measures.relative_flatness",
    "rescale": ".rescaling",
    "sam_sharpness": ".measures.sam_sharpness",
    "sharpness": ".report.sharpness",
    "spectral_density": ".estimators.spectral_density",
    "surface": ".landscape.surface",
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
