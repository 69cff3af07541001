"""Directions in parameter space along which a landscape is drawn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentTypeError, InvalidArgumentError, NonFiniteError, ShapeError
from ..objective.objective import Objective
from ..results import Result, Table, format_number
from ..support.vectors import all_finite, check_vector

__all__ = [
    "UNITS",
    "Directions",
    "check_directions",
    "check_independent",
    "finite_point",
    "inner",
    "model_norm",
]

UNITS = {
    "filter": "filter norms",
    "layer": "layer norms",
    "model": "‖θ‖",
    "none": "parameter units",
}
PARALLEL = 1e-3
"""Unit vectors whose smallest singular value is below this share of the largest are dependent."""
BLOCK = 2**20
"""Entries of a vector that are widened to float64 at a time."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Directions(Result):
    """Axes of a landscape around a model: L(θ + Σ a_i d_i) at coordinates a.

    `first + second` joins two of them.

    Attributes:
        vectors: (n, d), the d_i as columns, of the objective's dtype on its device.
        labels: what each axis is, for people.
        units: what 1 on each axis is: "filter norms", "layer norms", "‖θ‖", "parameter units" (a
            unit vector) or "distance to the other model".
        notes: remarks on the computation.

    Examples:
        >>> import torch, flatminima as fm
        >>> from flatminima.landscape.model_directions import (
        ...     difference_direction,
        ...     gradient_direction,
        ... )
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), (torch.eye(2), torch.zeros(2, 1)))
        >>> downhill = gradient_direction(objective, normalize="none")
        >>> both = downhill + difference_direction(objective, torch.tensor([1.0, 3.0]))
        >>> both.labels, both.units
        (('minus the gradient', 'towards the other model'),
         ('parameter units', 'distance to the other model'))
        >>> print(both)
        2 directions of 2 parameters
        axis  direction                unit                         norm
        ────  ───────────────────────  ───────────────────────────  ────
        1     minus the gradient       parameter units                 1
        2     towards the other model  distance to the other model     2
        Note: The cosine between axes 1 and 2 is -0.7071.
        Note: minus the gradient: ‖∇L‖ = 1.414; positive is downhill.
        Note: towards the other model: ‖θ' − θ‖ = 2.
    """

    vectors: Tensor
    labels: tuple[str, ...]
    units: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape, count = tuple(self.vectors.shape), len(self.labels)
        if len(shape) != 2 or shape[1] != count or len(self.units) != count:
            raise ShapeError(
                "Directions takes vectors (n, d) with d labels and d units; got "
                f"{shape}, {count} and {len(self.units)}."
            )

    @property
    def count(self) -> int:
        """Number of directions d."""
        return int(self.vectors.shape[1])

    def gram(self) -> Tensor:
        """Return the cosines between the directions, shape (d, d), in float64 on the host."""
        products = _gram(self.vectors)
        norms = products.diagonal().sqrt()
        scale = torch.where(norms > 0, 1 / norms, 0.0)
        return scale[:, None] * products * scale

    def __add__(self, other: object) -> Directions:
        if not isinstance(other, Directions):
            return NotImplemented
        if other.vectors.shape[0] != self.vectors.shape[0]:
            raise ShapeError(
                f"Directions of {self.vectors.shape[0]} parameters cannot be joined with those of "
                f"{other.vectors.shape[0]}; make both from one objective."
            )
        rows = torch.cat([self.vectors.T, other.vectors.to(self.vectors).T])
        notes = tuple(dict.fromkeys(self.notes + other.notes))
        return Directions(rows.T, self.labels + other.labels, self.units + other.units, notes)

    def _table(self) -> Table:
        norms = _gram(self.vectors).diagonal().sqrt().tolist()
        rows = tuple(
            (str(i), label, unit, format_number(norm))
            for i, (label, unit, norm) in enumerate(
                zip(self.labels, self.units, norms, strict=True), start=1
            )
        )
        cosines = self.gram()
        notes = tuple(
            f"The cosine between axes {i + 1} and {j + 1} is {float(cosines[i, j]):.4g}."
            for i in range(self.count)
            for j in range(i + 1, self.count)
            if abs(cosines[i, j]) > 1e-3
        )
        number = f"{self.count} direction" + "s" * (self.count != 1)
        return Table(
            ("axis", "direction", "unit", "norm"),
            rows,
            title=f"{number} of {self.vectors.shape[0]} parameters",
            notes=notes + self.notes,
        )


def check_directions(call: str, objective: Objective, directions: object) -> Directions:
    """Return `directions` as linearly independent columns for the parameters of an objective.

    Args:
        call: what is named in errors.
        objective: whose parameters they move; its dtype and device are taken.
        directions: `Directions`, a tensor (n,) or (n, d), or a sequence of these.

    Raises:
        ArgumentTypeError: anything else.
        ShapeError: another length than n, or no direction at all.
        DeviceError: a tensor on another device.
        NonFiniteError: NaN or infinity in a column, which is named.
        InvalidArgumentError: columns of zeros, or (nearly) dependent columns, which are named.

    Examples:
        >>> import torch, flatminima as fm
        >>> from flatminima.landscape.directions import check_directions
        >>> objective = fm.Objective(
        ...     torch.nn.Linear(1, 1), torch.nn.MSELoss(), (torch.ones(1, 1), torch.ones(1, 1))
        ... )
        >>> check_directions("surface", objective, torch.tensor([0.0, 2.0])).labels
        ('direction 1',)
        >>> try:
        ...     check_directions("surface", objective, [torch.ones(2), -3 * torch.ones(2)])
        ... except fm.InvalidArgumentError as error:
        ...     print(error)
        The directions 1 and 2 given to surface are parallel (cosine -1); ...
    """
    given = [directions] if isinstance(directions, (Directions, Tensor)) else directions
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        raise ArgumentTypeError(
            f"The 'directions' argument of {call} must be Directions, as from random_directions, a "
            f"tensor (n,) or (n, d), or a list of vectors; got {type(given).__name__}."
        )
    rows: list[Tensor] = []
    labels: list[str] = []
    units: list[str] = []
    notes: list[str] = []
    for item in given:
        if isinstance(item, Directions):
            # Those read from a file lie on the host.
            columns: Tensor = item.vectors.to(objective.device)
            labels += item.labels
            units += item.units
            notes += item.notes
        elif isinstance(item, Tensor):
            columns = item.unsqueeze(1) if item.dim() == 1 else item
            extra = columns.shape[1] if columns.dim() == 2 else 0
            labels += [f"direction {len(labels) + i + 1}" for i in range(extra)]
            units += ["given vector"] * extra
        else:
            raise ArgumentTypeError(
                f"The 'directions' argument of {call} holds a {type(item).__name__}; give tensors "
                "(n,) or Directions."
            )
        if columns.dim() != 2 or columns.shape[0] != objective.size:
            raise ShapeError(
                f"Directions for {call} must have {objective.size} entries, one for each "
                f"parameter of the objective; number {len(rows) + 1} has shape "
                f"{tuple(item.vectors.shape if isinstance(item, Directions) else item.shape)}."
            )
        rows += [
            _column(call, objective, columns[:, i], labels, len(rows) + i)
            for i in range(columns.shape[1])
        ]
    if not rows:
        raise ShapeError(f"{call} needs at least one direction; none was given.")
    vectors = torch.stack(rows).T
    found = Directions(vectors, tuple(labels), tuple(units), tuple(dict.fromkeys(notes)))
    check_independent(call, found)
    return found


def _named(labels: Sequence[str], index: int) -> str:
    plain = f"direction {index + 1}"
    return plain if labels[index] == plain else f"{plain} ({labels[index]!r})"


def _column(
    call: str, objective: Objective, column: Tensor, labels: Sequence[str], index: int
) -> Tensor:
    name = f"The {_named(labels, index)} given to {call}"
    here = column.device == objective.device and not column.is_complex()
    if here and not all_finite(column):
        where = int((~torch.isfinite(column)).nonzero()[0])
        raise NonFiniteError(f"{name} holds NaN or infinity, first at index {where}.")
    vector = check_vector(
        call, column, size=objective.size, dtype=objective.dtype, device=objective.device
    )
    if not bool((vector != 0).any()):
        raise InvalidArgumentError(f"{name} is a vector of zeros; it leads nowhere.")
    if not all_finite(vector):
        raise NonFiniteError(f"{name} has entries beyond the range of {objective.dtype}.")
    return vector


def check_independent(call: str, directions: Directions) -> None:
    """Refuse columns that (nearly) depend on each other, by name."""
    cosines = directions.gram()
    squares, axes = torch.linalg.eigh(cosines)
    if float(squares[0]) >= PARALLEL**2 * float(squares[-1]):
        return
    advice = "give others, or fewer."
    pairs = (cosines - torch.eye(len(cosines), dtype=torch.float64)).abs()
    i, j = sorted(divmod(int(pairs.argmax()), len(cosines)))
    if 1 - float(pairs[i, j]) < 10 * PARALLEL**2:
        cosine = float(cosines[i, j])
        raise InvalidArgumentError(
            f"The {_names(directions, [i, j])} given to {call} are parallel (cosine {cosine:.7g}); "
            + advice
        )
    involved = [k for k, share in enumerate(axes[:, 0].abs().tolist()) if share > 0.05]
    raise InvalidArgumentError(
        f"The {_names(directions, involved)} given to {call} are linearly dependent: one is nearly "
        f"a combination of the others; {advice}"
    )


def _names(directions: Directions, which: Sequence[int]) -> str:
    plain = all(directions.labels[i] == f"direction {i + 1}" for i in which)
    each = [str(i + 1) if plain else f"{i + 1} ({directions.labels[i]!r})" for i in which]
    return "directions " + ", ".join(each[:-1]) + " and " + each[-1]


# ------------------------------------------------------------------------------- sums in float64


def _gram(vectors: Tensor) -> Tensor:
    """Return VᵀV in float64 on the host."""
    total = torch.zeros(vectors.shape[1], vectors.shape[1], dtype=torch.float64)
    for rows in torch.split(vectors, BLOCK):
        # MPS has no float64.
        wide = (rows.cpu() if rows.device.type == "mps" else rows).double()
        total += (wide.T @ wide).cpu()
    return total


def inner(first: Tensor, second: Tensor) -> float:
    """Return the inner product of two vectors, added up in float64."""
    if first is second:
        return float(_gram(first.unsqueeze(1))[0, 0])
    total = 0.0
    for left, right in zip(torch.split(first, BLOCK), torch.split(second, BLOCK), strict=True):
        pair = (left, right) if left.device.type != "mps" else (left.cpu(), right.cpu())
        total += float(torch.dot(pair[0].double(), pair[1].double()))
    return total


def finite_point(call: str, objective: Objective) -> Tensor:
    """Return θ, which holds neither NaN nor infinity."""
    point = objective.point()
    if not all_finite(point):
        names = [n for n, place in objective.layout.slices() if not all_finite(point[place])]
        raise NonFiniteError(f"{call}: the model's parameter {names[0]!r} holds NaN or infinity.")
    return point


def model_norm(call: str, point: Tensor) -> float:
    """Return ‖θ‖, which must not be zero."""
    norm = math.sqrt(inner(point, point))
    if norm == 0:
        raise InvalidArgumentError(
            f"{call}: all parameters of the model are zero, so ‖θ‖ is no unit; use "
            "normalize='none'."
        )
    return norm
