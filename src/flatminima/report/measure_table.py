"""The measures that a report can hold in addition to the Hessian's numbers, with their settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import ArgumentTypeError, InvalidArgumentError, closest
from ..measures.average_sharpness import average_sharpness
from ..measures.critical_sharpness import critical_sharpness
from ..measures.epsilon_sharpness import epsilon_sharpness
from ..measures.fisher_rao_norm import fisher_rao_norm
from ..measures.laplace import laplace_log_evidence
from ..measures.local_energy import local_energy
from ..measures.pac_bayes_sharpness import pac_bayes_sharpness
from ..measures.random_sharpness import random_sharpness
from ..measures.relative_flatness import relative_flatness
from ..measures.result import MeasureResult
from ..measures.sam_sharpness import sam_sharpness
from ..support.checks import check_choice

__all__ = ["FAMILY", "Options", "chosen_measures"]

Options = Mapping[str, Any]

FAMILY: dict[str, tuple[Callable[..., MeasureResult], tuple[Options, ...]]] = {
    "epsilon_sharpness": (
        epsilon_sharpness,
        (
            {"epsilon": 1e-3},
            {"epsilon": 5e-4},
            {"epsilon": 1e-3, "subspace": 100},
            {"epsilon": 5e-4, "subspace": 100},
        ),
    ),
    "random_sharpness": (random_sharpness, ({},)),
    "sam_sharpness": (
        sam_sharpness,
        ({}, {"steps": 20}, {"rho": 0.5, "adaptive": True, "steps": 20}),
    ),
    "average_sharpness": (average_sharpness, ({}, {"sigma": 0.1, "adaptive": True})),
    "pac_bayes_sharpness": (pac_bayes_sharpness, ({}, {"adaptive": True})),
    "local_energy": (local_energy, ({},)),
    "fisher_rao_norm": (fisher_rao_norm, ({},)),
    "relative_flatness": (relative_flatness, ({},)),
    "critical_sharpness": (critical_sharpness, ({},)),
    "laplace_log_evidence": (
        laplace_log_evidence,
        # Taking the outliers out makes few probes as good as many.
        ({"prior_precision": "optimise", "probes": 8, "steps": 20, "outliers": 60},),
    ),
}
"""Each measure with the settings that a report takes by default."""

OWN = ("seed", "progress", "return_displacement", "strict")
"""Options that are the report's own, or mean nothing in it."""


def chosen_measures(
    call: str,
    measures: str | Sequence[str] | Mapping[str, Options | Sequence[Options] | None] | None,
    *,
    known: Sequence[str],
    default: Sequence[str],
) -> dict[str, tuple[Options, ...]]:
    """Return the names that were chosen, in the order of `known`, with the settings of each.

    Raises:
        ArgumentTypeError: something that is neither names nor a mapping of names to settings.
        InvalidArgumentError: an unknown measure or setting, or settings for what has none.
    """
    if isinstance(measures, str):
        measures = list(known) if measures == "all" else [measures]
    if measures is None:
        measures = default
    if not isinstance(measures, (Sequence, set, frozenset, Mapping)):
        raise ArgumentTypeError(
            f"The 'measures' argument of {call} must be a list of names, or a mapping of names to "
            f"settings; got {measures!r}."
        )
    for name in measures:
        check_choice(call, "measures", name, known)
    given = measures if isinstance(measures, Mapping) else dict.fromkeys(measures)
    return {name: _settings(call, name, given[name]) for name in known if name in given}


def _settings(call: str, name: str, given: object) -> tuple[Options, ...]:
    function, standard = FAMILY.get(name, (None, ()))
    if given is None:
        return standard
    several = [given] if isinstance(given, Mapping) else given
    if not isinstance(several, Sequence) or isinstance(several, str) or not several:
        raise ArgumentTypeError(
            f"The settings of {name!r} in the 'measures' argument of {call} must be a mapping such "
            f"as {{'rho': 0.1}}, or a list of such; got {given!r}."
        )
    if function is None:
        raise InvalidArgumentError(
            f"{name!r} takes no settings in the 'measures' argument of {call}; use the "
            f"arguments of {call}, or call the function itself."
        )
    parameters = inspect.signature(function).parameters.values()
    options = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in OWN]
    for settings in several:
        if not isinstance(settings, Mapping):
            raise ArgumentTypeError(
                f"The settings of {name!r} in the 'measures' argument of {call} must be a mapping; "
                f"got {settings!r}."
            )
        for option in settings:
            if option not in options:
                raise InvalidArgumentError(
                    f"{name} has no setting {option!r} in a report. {closest(str(option), options)}"
                )
    return tuple(several)
