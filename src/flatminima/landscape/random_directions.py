"""Random directions, normalised so that pictures of different models compare."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from ..errors import InvalidArgumentError
from ..objective.objective import Objective, check_objective
from ..results import format_number
from ..support.checks import check_choice, check_instance, check_integer
from ..support.randomness import Seed, as_generator
from .directions import UNITS, Directions, check_independent, finite_point, inner, model_norm

__all__ = ["random_directions"]


def random_directions(
    objective: Objective,
    *,
    count: int = 2,
    normalize: Literal["filter", "layer", "model", "none"] = "filter",
    biases: bool = False,
    seed: Seed = 0,
) -> Directions:
    """Return random directions, normalised filter by filter (Li et al. 2018, arXiv:1712.09913).

    Gaussian vectors are made orthogonal to each other first. Then each filter of a direction, a
    row along the first dimension of a tensor with two dimensions or more, gets the norm that this
    filter has in the model, so that a and −a are as large compared with the weights in every layer
    and pictures of models whose weights are scaled differently compare. Scaling turns the
    directions
    a little: the cosine that remains between them is in the notes. Rows of embeddings are filters,
    too; tied weights are moved once. Filters (layers) of norm zero stay as they are.

    Args:
        objective: its model is the point they start from.
        count: how many.
        normalize: "filter"; "layer": each tensor gets the norm of the model's tensor; "model":
            each direction gets ‖θ‖; "none": each is a unit vector.
        biases: move tensors of fewer than two dimensions as well, each as one filter: biases, and
            the weights of normalisation layers. Otherwise these stay where they are, whatever
            `normalize` is.
        seed: of the draws. The first directions of a larger `count` are those of a smaller.

    Returns:
        The directions; 1 on an axis moves each filter (layer, the model) by its own norm.

    Raises:
        InvalidArgumentError: more directions than there are parameters to move, or none of them.
        NonFiniteError: a parameter is NaN or infinite.

    Examples:
        >>> import torch, flatminima as fm
        >>> from flatminima.landscape.random_directions import random_directions
        >>> model = torch.nn.Linear(3, 2)
        >>> data = torch.ones(4, 3), torch.zeros(4, 2)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> directions = random_directions(objective)
        >>> weight, bias = directions.vectors[:6, 0].view(2, 3), directions.vectors[6:, 0]
        >>> torch.allclose(weight.norm(dim=1), model.weight.norm(dim=1)), bias.tolist()
        (True, [0.0, 0.0])
    """
    call = "random_directions"
    check_objective(call, objective)
    check_choice(call, "normalize", normalize, tuple(UNITS))
    check_instance(call, "biases", biases, bool, "Give True or False.")
    check_integer(call, "count", count, low=1)
    point = finite_point(call, objective)
    groups = _groups(objective, normalize, biases)
    scales = _group_norms(objective, point, groups)
    if normalize not in ("filter", "layer"):
        scales = [s.fill_(1.0 if n else 0.0) for s, n in zip(scales, groups, strict=True)]
    mask = torch.cat(_expanded(objective, groups, [(s > 0).to(point) for s in scales]))
    movable = int(mask.sum(dtype=torch.int64))
    if movable < count:
        kept = "" if biases else ", or move biases and other one-dimensional tensors, biases=True"
        raise InvalidArgumentError(
            f"{call} cannot make {count} orthogonal directions: {movable} of {objective.size} "
            f"parameters may move. Ask for fewer{kept}."
        )
    generator = as_generator(seed, objective.device)
    rows = torch.empty(count, objective.size, dtype=point.dtype, device=point.device)
    for row in rows:
        draw = torch.randn(
            objective.size, generator=generator, device=generator.device, dtype=point.dtype
        )
        row.copy_(draw).mul_(mask)
    _orthonormalise(rows)
    if normalize in ("filter", "layer"):
        for row in rows:
            norms = _group_norms(objective, row, groups)
            ratios = [
                torch.where(own > 0, scale / own, 0.0)
                for scale, own in zip(scales, norms, strict=True)
            ]
            row.mul_(torch.cat(_expanded(objective, groups, [r.to(point) for r in ratios])))
    elif normalize == "model":
        rows.mul_(model_norm(call, point))
    found = Directions(
        rows.T,
        tuple(f"random direction {i + 1}" for i in range(count)),
        (UNITS[normalize],) * count,
        _still(objective, groups, scales),
    )
    check_independent(call, found)
    if count == 1 or normalize not in ("filter", "layer"):
        return found
    cosine = float((found.gram() - torch.eye(count, dtype=torch.float64)).abs().max())
    note = (
        f"Random directions were orthogonal before each {normalize} was given its norm; the "
        f"largest |cosine| between them is {format_number(cosine, 2)} after it."
    )
    return dataclasses.replace(found, notes=(note, *found.notes))


def _groups(objective: Objective, normalize: str, biases: bool) -> list[int]:
    """For each tensor, into how many pieces of equal size it is cut; 0 where it stays."""
    return [
        0
        if math.prod(shape) == 0 or (len(shape) < 2 and not biases)
        else (shape[0] if normalize == "filter" and len(shape) > 1 else 1)
        for shape in objective.layout.shapes
    ]


def _group_norms(objective: Objective, vector: Tensor, groups: list[int]) -> list[Tensor]:
    """Return the norms of the pieces of each tensor, in float64 where there is such a type."""
    wide = torch.float32 if vector.device.type == "mps" else torch.float64
    return [
        torch.linalg.vector_norm(vector[place].view(pieces, -1), dim=1, dtype=wide)
        if pieces
        else torch.zeros(1, dtype=wide, device=vector.device)
        for (_, place), pieces in zip(objective.layout.slices(), groups, strict=True)
    ]


def _expanded(objective: Objective, groups: list[int], values: list[Tensor]) -> list[Tensor]:
    """For each tensor, the value of its piece at every entry."""
    return [
        value.repeat_interleave(size // max(pieces, 1))
        for size, pieces, value in zip(objective.layout.sizes, groups, values, strict=True)
    ]


def _orthonormalise(rows: Tensor) -> None:
    """Gram–Schmidt, each row twice against those above it."""
    for index, row in enumerate(rows):
        for earlier in [*rows[:index]] * 2:
            row.sub_(earlier, alpha=inner(earlier, row))
        row.div_(math.sqrt(inner(row, row)))


def _still(objective: Objective, groups: list[int], scales: list[Tensor]) -> tuple[str, ...]:
    """Return what random directions leave where it is."""
    notes = []
    flat = [n for n, pieces in zip(objective.layout.names, groups, strict=True) if not pieces]
    if flat:
        notes.append(
            f"Random directions leave {len(flat)} tensors of fewer than two dimensions (such as "
            f"{flat[0]!r}) where they are."
        )
    zero = sum(int((s == 0).sum()) for s, pieces in zip(scales, groups, strict=True) if pieces)
    if zero:
        notes.append(f"Random directions leave {zero} filters or tensors of norm zero at zero.")
    return tuple(notes)
