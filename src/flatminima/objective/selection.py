"""Which parameters make up θ."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from ..errors import ArgumentTypeError, ParameterSelectionError, closest

__all__ = ["Selection", "matching", "select_parameters"]

Selection = str | Sequence[str] | Callable[[str, nn.Parameter], bool] | None


def matching(
    named: Sequence[tuple[str, nn.Parameter]],
    params: str | Sequence[str] | Callable[[str, nn.Parameter], bool],
) -> dict[str, nn.Parameter]:
    """Return those of some named parameters that patterns or a predicate choose, each tensor once.

    Raises:
        ParameterSelectionError: none, or a pattern matches nothing.
    """
    first: dict[int, str] = {}
    for name, parameter in named:
        first.setdefault(id(parameter), name)
    unique = {first[id(p)]: p for _, p in named}
    if callable(params):
        chosen = {n: p for n, p in unique.items() if params(n, p)}
        if not chosen:
            raise ParameterSelectionError("The predicate given as params= selects no parameter.")
        return chosen
    several = isinstance(params, Iterable) and not isinstance(params, str)
    patterns = list(params) if several else [params]
    picked: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ArgumentTypeError(
                "params= takes None, glob patterns on parameter names, or a predicate "
                f"(name, parameter) -> bool; got {pattern!r}."
            )
        hits = {first[id(p)] for n, p in named if fnmatch.fnmatchcase(n, pattern)}
        if not hits:
            raise ParameterSelectionError(
                f"The pattern {pattern!r} matches no parameter. "
                + closest(pattern, [n for n, _ in named])
            )
        picked |= hits
    if not picked:
        raise ParameterSelectionError("params= is an empty list; name at least one parameter.")
    return {n: p for n, p in unique.items() if n in picked}


def select_parameters(model: nn.Module, params: Selection = None) -> dict[str, nn.Parameter]:
    """Return the chosen parameters by name, in the model's order, each tensor once.

    Args:
        model: a tensor reachable under several names (tied weights) is listed under its first.
        params: None for all that require grad; a glob pattern on names, or several
            (`"encoder.*"`); or a predicate `(name, parameter) -> bool`.

    Raises:
        ParameterSelectionError: nothing is selected, a pattern matches nothing (with the names
            closest to it), or a selected parameter is of a type that has no derivative.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    for name, parameter in named:
        first.setdefault(id(parameter), name)
    unique = {first[id(p)]: p for _, p in named}
    if not unique:
        raise ParameterSelectionError(f"{type(model).__name__} has no parameters.")

    if params is None:
        chosen = {n: p for n, p in unique.items() if p.requires_grad}
        if not chosen:
            raise ParameterSelectionError(
                "No parameter requires grad, so none is selected; name them with "
                'params="*" (frozen parameters may be named, and stay frozen).'
            )
    else:
        chosen = matching(named, params)

    if not any(p.numel() for p in chosen.values()):
        raise ParameterSelectionError("The selected parameters have no elements.")
    for name, parameter in chosen.items():
        narrow = parameter.dtype.itemsize < 2
        if narrow or not parameter.dtype.is_floating_point:
            raise ParameterSelectionError(
                f"The parameter {name!r} is of type {parameter.dtype}, along which no derivative "
                "exists here; leave it out with params=."
            )
    return chosen
