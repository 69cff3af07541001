"""Sharpness of minima: Hessian products and eigenvalues, Keskar's ε-sharpness, and more."""

from __future__ import annotations

import ast
import importlib
import warnings
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The one table of public names and their homes. Type checkers read it as imports; at run time
# each name is loaded when it is first used. Without source text (a frozen application) all are
# loaded at once.
_SOURCE = globals()["__loader__"].get_source(__name__)
if TYPE_CHECKING or _SOURCE is None:
    from .algorithms.eigen.lanczos import lanczos as lanczos
    from .algorithms.eigen.power_iteration import power_iteration as power_iteration
    from .algorithms.eigen.result import EigenResult as EigenResult
    from .algorithms.estimators.density import SpectralDensity as SpectralDensity
    from .algorithms.estimators.diagonal import DiagonalResult as DiagonalResult
    from .algorithms.estimators.diagonal import diagonal as diagonal
    from .algorithms.estimators.log_determinant import (
        LogDeterminantResult as LogDeterminantResult,
    )
    from .algorithms.estimators.log_determinant import (
        log_determinant as log_determinant,
    )
    from .algorithms.estimators.result import BlockTrace as BlockTrace
    from .algorithms.estimators.result import TraceResult as TraceResult
    from .algorithms.estimators.spectral_density import spectral_density as spectral_density
    from .algorithms.estimators.trace import trace as trace
    from .derivatives.hand_written import pytorch_derivatives as pytorch_derivatives
    from .errors import (
        ArgumentTypeError as ArgumentTypeError,
    )
    from .errors import (
        ConvergenceError as ConvergenceError,
    )
    from .errors import (
        ConvergenceWarning as ConvergenceWarning,
    )
    from .errors import (
        DataChangedError as DataChangedError,
    )
    from .errors import (
        DeviceError as DeviceError,
    )
    from .errors import (
        DeviceMemoryError as DeviceMemoryError,
    )
    from .errors import (
        EmptyDataError as EmptyDataError,
    )
    from .errors import (
        FiniteDifferenceWarning as FiniteDifferenceWarning,
    )
    from .errors import (
        FlatMinimaError as FlatMinimaError,
    )
    from .errors import (
        FlatMinimaWarning as FlatMinimaWarning,
    )
    from .errors import (
        GraphError as GraphError,
    )
    from .errors import (
        InvalidArgumentError as InvalidArgumentError,
    )
    from .errors import (
        LossNotScalarError as LossNotScalarError,
    )
    from .errors import (
        NonFiniteError as NonFiniteError,
    )
    from .errors import (
        NotPositiveDefiniteError as NotPositiveDefiniteError,
    )
    from .errors import (
        NotSymmetricError as NotSymmetricError,
    )
    from .errors import (
        NotTwiceDifferentiableError as NotTwiceDifferentiableError,
    )
    from .errors import (
        OneShotDataError as OneShotDataError,
    )
    from .errors import (
        ParameterSelectionError as ParameterSelectionError,
    )
    from .errors import (
        ShapeError as ShapeError,
    )
    from .errors import (
        StateMismatchError as StateMismatchError,
    )
    from .landscape.connection import Connection as Connection
    from .landscape.connection import connect as connect
    from .landscape.directions import Directions as Directions
    from .landscape.interpolation import (
        Barrier as Barrier,
    )
    from .landscape.interpolation import (
        Curve as Curve,
    )
    from .landscape.interpolation import (
        Interpolation as Interpolation,
    )
    from .landscape.interpolation import (
        interpolate as interpolate,
    )
    from .landscape.model_directions import (
        difference_direction as difference_direction,
    )
    from .landscape.model_directions import (
        eigenvector_directions as eigenvector_directions,
    )
    from .landscape.model_directions import (
        gradient_direction as gradient_direction,
    )
    from .landscape.random_directions import random_directions as random_directions
    from .landscape.surface import Grid as Grid
    from .landscape.surface import Surface as Surface
    from .landscape.surface import surface as surface
    from .landscape.symmetry.matching import (
        Permutations as Permutations,
    )
    from .landscape.symmetry.matching import (
        apply_permutations as apply_permutations,
    )
    from .landscape.symmetry.matching import (
        match_weights as match_weights,
    )
    from .landscape.symmetry.rescaling import rescale as rescale
    from .landscape.trajectory.path_losses import (
        TrajectoryLosses as TrajectoryLosses,
    )
    from .landscape.trajectory.path_losses import (
        path_losses as path_losses,
    )
    from .landscape.trajectory.principal import (
        PrincipalResult as PrincipalResult,
    )
    from .landscape.trajectory.principal import (
        principal_components as principal_components,
    )
    from .landscape.trajectory.trajectory import Trajectory as Trajectory
    from .measures.average_sharpness import (
        AverageSharpnessResult as AverageSharpnessResult,
    )
    from .measures.average_sharpness import (
        average_sharpness as average_sharpness,
    )
    from .measures.critical_sharpness import (
        CriticalSharpnessResult as CriticalSharpnessResult,
    )
    from .measures.critical_sharpness import (
        critical_sharpness as critical_sharpness,
    )
    from .measures.epsilon_sharpness import (
        EpsilonSharpnessResult as EpsilonSharpnessResult,
    )
    from .measures.epsilon_sharpness import (
        epsilon_sharpness as epsilon_sharpness,
    )
    from .measures.fisher_rao_norm import (
        FisherRaoResult as FisherRaoResult,
    )
    from .measures.fisher_rao_norm import (
        fisher_rao_norm as fisher_rao_norm,
    )
    from .measures.gradient_norm import (
        GradientNormResult as GradientNormResult,
    )
    from .measures.gradient_norm import (
        gradient_norm as gradient_norm,
    )
    from .measures.laplace import (
        LaplaceResult as LaplaceResult,
    )
    from .measures.laplace import (
        laplace_log_evidence as laplace_log_evidence,
    )
    from .measures.layerwise import (
        LayerCurvature as LayerCurvature,
    )
    from .measures.layerwise import (
        LayerwiseResult as LayerwiseResult,
    )
    from .measures.layerwise import (
        layerwise as layerwise,
    )
    from .measures.local_energy import (
        LocalEnergyResult as LocalEnergyResult,
    )
    from .measures.local_energy import (
        local_energy as local_energy,
    )
    from .measures.pac_bayes_sharpness import (
        PacBayesResult as PacBayesResult,
    )
    from .measures.pac_bayes_sharpness import (
        pac_bayes_sharpness as pac_bayes_sharpness,
    )
    from .measures.random_sharpness import (
        RandomSharpnessResult as RandomSharpnessResult,
    )
    from .measures.random_sharpness import (
        TensorSharpness as TensorSharpness,
    )
    from .measures.random_sharpness import (
        random_sharpness as random_sharpness,
    )
    from .measures.relative_flatness import (
        LayerFlatness as LayerFlatness,
    )
    from .measures.relative_flatness import (
        RelativeFlatnessResult as RelativeFlatnessResult,
    )
    from .measures.relative_flatness import (
        relative_flatness as relative_flatness,
    )
    from .measures.result import Measurement as Measurement
    from .measures.result import MeasureResult as MeasureResult
    from .measures.sam_sharpness import (
        SamSharpnessResult as SamSharpnessResult,
    )
    from .measures.sam_sharpness import (
        sam_sharpness as sam_sharpness,
    )
    from .objective.metrics import accuracy as accuracy
    from .objective.objective import Objective as Objective
    from .objective.weights import token_weight as token_weight
    from .operators.gauss_newton import (
        FisherOperator as FisherOperator,
    )
    from .operators.gauss_newton import (
        GaussNewtonOperator as GaussNewtonOperator,
    )
    from .operators.given import (
        FunctionOperator as FunctionOperator,
    )
    from .operators.given import (
        MatrixOperator as MatrixOperator,
    )
    from .operators.hessian import HessianOperator as HessianOperator
    from .operators.linear import LinearOperator as LinearOperator
    from .operators.linear import SumOperator as SumOperator
    from .operators.restricted import (
        BlockOperator as BlockOperator,
    )
    from .operators.restricted import (
        PreconditionedOperator as PreconditionedOperator,
    )
    from .operators.restricted import (
        ProjectedOperator as ProjectedOperator,
    )
    from .plotting.interactive import interactive as interactive
    from .plotting.plot import plot as plot
    from .report.comparison import Comparison as Comparison
    from .report.comparison import compare as compare
    from .report.invariance import (
        InvarianceTable as InvarianceTable,
    )
    from .report.invariance import (
        invariance_table as invariance_table,
    )
    from .report.result import SharpnessReport as SharpnessReport
    from .report.sharpness import sharpness as sharpness
    from .results import Estimate as Estimate
    from .results import Outcome as Outcome
    from .results import Result as Result
    from .results import Table as Table

_HOMES = {
    alias.name: f".{node.module}"
    for block in ast.parse(_SOURCE or "").body
    if isinstance(block, ast.If)
    for node in block.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
# Without source text, everything that was imported above.
__all__ = sorted(
    _HOMES
    or [n for n, v in globals().items() if getattr(v, "__module__", "").startswith("flatminima.")]
)


def __getattr__(name: str) -> Any:
    from .results import RENAMED

    if name in RENAMED:
        old, name = name, RENAMED[name]
        warnings.warn(f"{old} is now called {name}.", DeprecationWarning, stacklevel=2)
    if name in globals():
        return globals()[name]
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
