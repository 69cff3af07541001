"""The place and width of each node's Gaussian, on a linear and on a logarithmic scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Scale", "default_sigma", "gaussian", "is_resolved", "place_on_axis"]

Scale = Literal["linear", "log"]

OVERLAP = 1 / math.sqrt(8 * math.log(1.25))
"""Ratio of σ to the distance of two Gaussians that meet at 1/1.25 of their height (Lin, Saad and
Yang 2016)."""

ALONE = 0.01
"""σ of a spectrum without extent, relative to its value; on a logarithmic scale in decades."""


def place_on_axis(values: Tensor, scale: str, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the place of each value on the axis, and its side.

    On a linear scale the place is the value, and all sides are 1. On a logarithmic scale the place
    is log₁₀ |value| and the side is the sign; the side of values that are not `seen` is 0.
    """
    if scale == "linear":
        return values, torch.ones_like(values)
    return torch.where(seen, values.abs(), 1.0).log10(), torch.where(seen, values.sign(), 0.0)


def is_resolved(
    nodes: Tensor, weights: Tensor, complete: Sequence[bool], resolution: float
) -> Tensor:
    """Return which nodes have a place on a logarithmic scale.

    Nodes within the resolution of zero have none. In an incomplete chain, neither has the node
    next to zero on either side if the next one further out is more than twice as far: its weight
    stands for eigenvalues of unknown size near zero.

    Args:
        nodes: (probes, steps), ascending in each row.
        weights: (probes, steps).
        complete: for each row, whether its chain is complete.
        resolution: size below which an eigenvalue has no sign.
    """
    seen = (nodes.abs() > resolution) & (weights > 0)
    negative = (nodes < 0).sum(dim=1).tolist()
    for row, last in enumerate(negative):
        if complete[row]:
            continue
        for near, far in ((last, last + 1), (last - 1, last - 2)):
            if 0 <= far < nodes.shape[1] and abs(nodes[row, far]) > 2 * abs(nodes[row, near]):
                seen[row, near] = False
    return seen


def gaussian(places: Tensor, signs: Tensor, nodes: Tensor, sides: Tensor, sigma: float) -> Tensor:
    """Return N(place; node, σ²) for nodes and places on the same side, shape (nodes, places)."""
    distance = (places - nodes.unsqueeze(1)) / sigma
    height = (-0.5 * distance.square()).exp() / (sigma * math.sqrt(2 * math.pi))
    return torch.where((signs == sides.unsqueeze(1)) & (signs != 0), height, 0.0)


def default_sigma(
    nodes: Tensor, weights: Tensor, seen: Tensor, scale: str, resolution: float
) -> float:
    """Return the default σ for these nodes, as described in `spectral_density`."""
    if scale == "linear":
        extent = float(nodes.max() - nodes.min())
        count = max(1, int((weights > 0).sum(dim=1).max()))
        if extent > resolution:
            return OVERLAP * extent / count
        largest = float(nodes.abs().max())
        return ALONE * largest if largest > 0 else ALONE
    places, sides = place_on_axis(nodes, scale, seen)
    gaps = places.diff(dim=1).abs()
    # A gap counts half for either end; gaps across zero or to padding do not count.
    mass = (weights[:, 1:] + weights[:, :-1]) / 2
    mass = torch.where((sides[:, 1:] * sides[:, :-1] > 0) & (gaps > 0), mass, 0.0)
    total = float(mass.sum())
    return OVERLAP * float((mass * gaps).sum()) / total if total > 0 else ALONE
