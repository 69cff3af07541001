"""The data sets and metrics that are evaluated along a path or on a grid."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import ArgumentTypeError, InvalidArgumentError
from ..objective.metrics import Metric
from ..objective.objective import Objective, check_objective

__all__ = ["check_metrics", "named_objectives"]


def check_metrics(call: str, metrics: Mapping[str, Metric] | None) -> dict[str, Metric]:
    """Return the metrics by name.

    Raises:
        ArgumentTypeError: it is no mapping, or one of them cannot be called.
    """
    _check_mapping(call, "metrics", metrics, '{"accuracy": fm.accuracy}')
    for name, metric in (metrics or {}).items():
        if not callable(metric):
            raise ArgumentTypeError(f"The metric {name!r} must be callable; got {metric!r}.")
    return dict(metrics or {})


def named_objectives(
    call: str, objective: Objective, also: Mapping[str, Objective] | None
) -> dict[str, Objective]:
    """Return the objective as "train", and the further ones.

    Raises:
        ArgumentTypeError: `also` is no mapping to objectives.
        InvalidArgumentError: one of them is named "train" too.
    """
    _check_mapping(call, "also", also, '{"test": test_objective}')
    objectives = {"train": objective}
    for name, other in (also or {}).items():
        check_objective(f"{call} (also[{name!r}])", other)
        if name == "train":
            raise InvalidArgumentError('The name "train" in also= is the objective\'s own.')
        objectives[name] = other
    return objectives


def _check_mapping(call: str, argument: str, given: object, example: str) -> None:
    if given is not None and not isinstance(given, Mapping):
        raise ArgumentTypeError(
            f"The {argument!r} argument of {call} must be a mapping such as {example}; got "
            f"{type(given).__name__}."
        )
