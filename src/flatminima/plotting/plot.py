"""`plot()`: the picture of a result, whichever it is."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from matplotlib.axes import Axes

from ..algorithms.eigen.result import EigenResult
from ..algorithms.estimators.density import SpectralDensity
from ..algorithms.estimators.result import TraceResult
from ..errors import ArgumentTypeError, InvalidArgumentError
from ..landscape.interpolation import Interpolation
from ..landscape.surface import Surface
from ..landscape.trajectory.principal import PrincipalResult
from ..measures.critical_sharpness import CriticalSharpnessResult
from ..measures.gradient_norm import GradientNormResult
from ..measures.layerwise import LayerwiseResult
from ..measures.local_energy import LocalEnergyResult
from ..measures.pac_bayes_sharpness import PacBayesResult
from ..measures.random_sharpness import RandomSharpnessResult
from ..measures.relative_flatness import RelativeFlatnessResult
from ..report.comparison import Comparison
from ..report.invariance import InvarianceTable
from ..report.result import SharpnessReport
from ..results import Result
from ..support.checks import check_choice
from .axes import in_style
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
from .profiles import draw_profiles, group_profiles
from .surfaces import KINDS, draw_surface

__all__ = ["plot"]


def plot(
    result: Result | Sequence[Result] | Mapping[str, Result | Sequence[Result]],
    ax: Axes | None = None,
    *,
    kind: Literal["contour", "3d"] = "contour",
    trajectory: PrincipalResult | None = None,
    limits: tuple[float, float] | None = None,
    style: Literal["paper"] | None = None,
) -> Axes:
    """Draw a result, or several profiles in one picture.

    An `Interpolation` is drawn as in Keskar et al. (2017): the loss on a logarithmic axis at the
    left, metrics at the right, the objective's own data solid and others dashed, the two models
    marked. A `SpectralDensity` is drawn as in Ghorbani et al. (2019): both signs, the density on a
    logarithmic axis down to a tenth of what a single eigenvalue adds, two standard errors around
    it, and the eigenvalues that were taken out marked; with `scale="log"` the eigenvalues are on
    a logarithmic axis too, whose middle is zero to rounding. An `EigenResult`, a
    `RandomSharpnessResult`, a `LayerwiseResult`, a `TraceResult`, a `SharpnessReport` and a
    `Comparison` are drawn as points and bars with their errors: of a trace the parts of the
    modules, 20 of them at most, and below the measures of a report, where it has traces of several
    modules and its own figure, those of the Hessian and of the Gauss–Newton matrix side by
    side. So are the tensors of a `GradientNormResult` and the layers of a
    `RelativeFlatnessResult`. A `LocalEnergyResult`, a `PacBayesResult` and a
    `CriticalSharpnessResult` show what was found at every size of noise or step that was tried,
    and an `InvarianceTable` each measure's ratio on a logarithmic axis.

    A `Surface` of two dimensions is drawn as filled contours, with levels on a logarithmic scale
    where the loss spans more than a factor of ten, the model marked by a star, and what is NaN or
    infinite in special colours; with kind="3d" in relief; one of one dimension as a profile. A
    list of profiles (interpolations, or surfaces of one dimension) is drawn as one line for each
    direction, and as a median with a band where several are of the same, as over seeds; a mapping
    says itself what belongs together.

    Args:
        result: what to draw.
        ax: where to draw. Default: a new figure.
        kind: of a surface of two dimensions, "contour" or "3d".
        trajectory: drawn on a surface along its two principal directions, time in colour.
        limits: the least and the largest loss of the levels of a surface, so that several have the
            same colours.
        style: "paper" draws for a column of 3.3 inches, with type of 7 and 8 points. Figures are
            written as vectors by `ax.figure.savefig("figure.pdf")`.

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
    check_choice("plot", "kind", kind, KINDS)
    if style is not None:
        check_choice("plot", "style", style, ("paper",))
    with in_style(style):
        if isinstance(result, Surface):
            return draw_surface(result, ax, kind=kind, trajectory=trajectory, limits=limits)
        given = {"kind": kind != "contour", "trajectory": trajectory, "limits": limits}
        for name, value in given.items():
            if value:
                raise InvalidArgumentError(
                    f"The {name!r} argument of plot is for surfaces; got a {type(result).__name__}."
                )
        if isinstance(result, (list, tuple, Mapping)):
            return draw_profiles(group_profiles(result), ax)
        return _draw(result, ax)


@functools.singledispatch
def _draw(result: Any, ax: Axes | None) -> Axes:  # noqa: ARG001
    kinds = {kind.__name__ for kind in _draw.registry if kind is not object} | {"Surface"}
    raise ArgumentTypeError(
        f"plot has no picture of a {type(result).__name__}; it draws {', '.join(sorted(kinds))}."
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
