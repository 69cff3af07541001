"""How wide a node is drawn, and where, on a linear and on a logarithmic scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Scale", "default_sigma", "gaussian", "is_resolved", "place_on_axis"]

Scale = Literal["linear", "log"]

OVERLAP = 1 / math.sqrt(8 * math.log(1.25))
"""Of a Gaussian's σ and the distance to the next one, so that two meet at 1/1.25 of their height
(Lin, Saad and Yang 2016)."""

ALONE = 0.01
"""σ of a spectrum without extent, relative to the value; in decades, where that is the scale."""


def place_on_axis(values: Tensor, scale: str, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return places on the axis and the sides of it, which are all alike on a linear scale.

    On a logarithmic one that is log₁₀ |value| and the sign, 0 for what is not `seen`.
    """
    if scale == "linear":
        return values, torch.ones_like(values)
    return torch.where(seen, values.abs(), 1.0).log10(), torch.where(seen, values.sign(), 0.0)


def is_resolved(
    nodes: Tensor, weights: Tensor, complete: Sequence[bool], resolution: float
) -> Tensor:
    """Which of the nodes (probes, steps), ascending in each row, have a place on a log scale.

    Not those within the resolution of zero. Nor, in a chain that has not come to its end, the
    one next to zero on either side where the next one further out is more than twice as far: its
    weight stands for eigenvalues that lie somewhere near.
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
    """N(place; node, σ²) for all nodes and places on the same side, shape (nodes, places)."""
    distance = (places - nodes.unsqueeze(1)) / sigma
    height = (-0.5 * distance.square()).exp() / (sigma * math.sqrt(2 * math.pi))
    return torch.where((signs == sides.unsqueeze(1)) & (signs != 0), height, 0.0)


def default_sigma(
    nodes: Tensor, weights: Tensor, seen: Tensor, scale: str, resolution: float
) -> float:
    """Return σ for the rows of nodes, as `spectral_density` describes it."""
    if scale == "linear":
        extent = float(nodes.max() - nodes.min())
        count = max(1, int((weights > 0).sum(dim=1).max()))
        if extent > resolution:
            return OVERLAP * extent / count
        largest = float(nodes.abs().max())
        return ALONE * largest if largest > 0 else ALONE
    places, sides = place_on_axis(nodes, scale, seen)
    gaps = places.diff(dim=1).abs()
    # A gap belongs to both of its ends; those across zero, and to what is filled up, to none.
    mass = (weights[:, 1:] + weights[:, :-1]) / 2
    mass = torch.where((sides[:, 1:] * sides[:, :-1] > 0) & (gaps > 0), mass, 0.0)
    total = float(mass.sum())
    return OVERLAP * float((mass * gaps).sum()) / total if total > 0 else ALONE
