"""`plot()`: the picture of a result, whichever it is."""

from __future__ import annotations

import functools
from typing import Any

from matplotlib.axes import Axes

from ..comparison import Comparison
from ..eigen.result import EigenResult
from ..errors import ArgumentTypeError
from ..estimators.density import SpectralDensity
from ..estimators.result import TraceResult
from ..landscape.interpolation import Interpolation
from ..measures.critical_sharpness import CriticalSharpnessResult
from ..measures.gradient_norm import GradientNormResult
from ..measures.layerwise import LayerwiseResult
from ..measures.local_energy import LocalEnergyResult
from ..measures.pac_bayes_sharpness import PacBayesResult
from ..measures.random_sharpness import RandomSharpnessResult
from ..measures.relative_flatness import RelativeFlatnessResult
from ..report.invariance import InvarianceTable
from ..report.result import SharpnessReport
from ..results import Result
from .bars import (
    draw_comparison,
    draw_gradient_norm,
    draw_layers,
    draw_random_sharpness,
    draw_relative_flatness,
    draw_report,
    draw_trace,
)
from .curves import draw_density, draw_eigenvalues, draw_interpolation
from .measures import draw_critical, draw_invariance, draw_local_energy, draw_pac_bayes

__all__ = ["plot"]


def plot(result: Result, ax: Axes | None = None) -> Axes:
    """Draw a result.

    An `Interpolation` is drawn as in Keskar et al. (2017): the loss on a logarithmic axis at the
    left, metrics at the right, the objective's own data solid and others dashed, the two models
    marked. A `SpectralDensity` is drawn as in Ghorbani et al. (2019): both signs, the density on a
    logarithmic axis down to a tenth of what a single eigenvalue adds, two standard errors around
    it, and the eigenvalues that were taken out marked; with `scale="log"` the eigenvalues are on
    a logarithmic axis too, whose middle is what cannot be told from zero. An `EigenResult`, a
    `RandomSharpnessResult`, a `LayerwiseResult`, a `TraceResult`, a `SharpnessReport` and a
    `Comparison` are drawn as points and bars with their errors: of a trace the parts of the
    modules, 20 of them at most, and below the measures of a report, where it has traces of several
    modules and a figure of its own, those of the Hessian and of the Gauss–Newton matrix side by
    side. So are the tensors of a `GradientNormResult` and the layers of a
    `RelativeFlatnessResult`. A `LocalEnergyResult`, a `PacBayesResult` and a
    `CriticalSharpnessResult` show what was found at every size of noise or step that was tried,
    and an `InvarianceTable` each measure's ratio on a logarithmic axis.

    Args:
        result: what to draw.
        ax: where; a new figure unless told.

    Returns:
        The axis with the loss, that with a report's measures, or the only one;
        `ax.figure.savefig(...)` writes the figure. Nothing is shown on a screen.

    Raises:
        ArgumentTypeError: there is no picture for this kind of object.

    Examples:
        >>> import matplotlib, torch, flatminima as fm
        >>> matplotlib.use("Agg")
        >>> result = fm.lanczos(fm.MatrixOperator(torch.diag(torch.arange(1.0, 9.0))), k=3)
        >>> fm.plot(result).get_ylabel()
        'eigenvalue'
    """
    if ax is not None and not isinstance(ax, Axes):
        raise ArgumentTypeError(
            f"The 'ax' argument of plot must be a matplotlib axis; got {type(ax).__name__}."
        )
    return _draw(result, ax)


@functools.singledispatch
def _draw(result: Any, ax: Axes | None) -> Axes:  # noqa: ARG001
    raise ArgumentTypeError(
        f"plot has no picture of a {type(result).__name__}; it draws "
        f"{', '.join(sorted(kind.__name__ for kind in _draw.registry if kind is not object))}."
    )


_draw.register(Comparison, draw_comparison)
_draw.register(CriticalSharpnessResult, draw_critical)
_draw.register(EigenResult, draw_eigenvalues)
_draw.register(GradientNormResult, draw_gradient_norm)
_draw.register(Interpolation, draw_interpolation)
_draw.register(InvarianceTable, draw_invariance)
_draw.register(LayerwiseResult, draw_layers)
_draw.register(LocalEnergyResult, draw_local_energy)
_draw.register(PacBayesResult, draw_pac_bayes)
_draw.register(RandomSharpnessResult, draw_random_sharpness)
_draw.register(RelativeFlatnessResult, draw_relative_flatness)
_draw.register(SharpnessReport, draw_report)
_draw.register(SpectralDensity, draw_density)
_draw.register(TraceResult, draw_trace)
