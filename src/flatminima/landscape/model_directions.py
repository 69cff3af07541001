"""Directions that a model has: eigenvectors, the gradient, and the way to another model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from ..algorithms.eigen.lanczos import lanczos
from ..algorithms.eigen.result import EigenResult
from ..errors import InvalidArgumentError, NonFiniteError, ShapeError
from ..objective.objective import Objective, check_objective
from ..operators.hessian import HessianOperator
from ..operators.linear import LinearOperator, check_operator
from ..results import Outcome, format_number
from ..support.checks import check_choice, check_instance, check_integer
from ..support.randomness import Seed
from ..support.vectors import all_finite, check_vector
from .directions import UNITS, Directions, check_independent, finite_point, inner, model_norm
from .endpoints import Endpoint, endpoint_state, model_state

__all__ = ["difference_direction", "eigenvector_directions", "gradient_direction"]


def eigenvector_directions(
    objective: Objective,
    *,
    ranks: Sequence[int] = (1, 2),
    operator: LinearOperator | None = None,
    result: EigenResult | None = None,
    normalize: Literal["model", "none"] = "model",
    seed: Seed = 0,
    progress: bool = True,
) -> Directions:
    """Return eigenvectors of the Hessian, of chosen ranks.

    The sign of an eigenvector is arbitrary; here the entry of the largest magnitude is positive, so
    that a repetition gives the same picture.

    Args:
        objective: its Hessian is used by default.
        ranks: 1 for the largest eigenvalue (signs count), 2 for the next, −1 for the smallest, −2
            for the next to it.
        operator: another symmetric operator on the same parameters, such as a
            `GaussNewtonOperator`.
        result: eigenpairs that are known already, with their vectors; nothing is computed then.
        normalize: "model": each direction has the norm ‖θ‖; "none": each is a unit vector.
        seed: of `lanczos`.
        progress: show a bar if it takes long.

    Returns:
        The directions, with eigenvalues in the labels and residuals in the notes.

    Raises:
        InvalidArgumentError: a rank of 0, given twice or beyond n; one that `result` does not
            hold; a result without its vectors; ‖θ‖ = 0 for "model".

    Warns:
        ConvergenceWarning: from `lanczos`.

    Examples:
        >>> import torch, flatminima as fm
        >>> from flatminima.landscape.model_directions import eigenvector_directions
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), (x, y))  # H = diag(1, 4)
        >>> found = eigenvector_directions(objective, ranks=(1, -1), normalize="none")
        >>> found.labels
        ('eigenvector 1 (λ = 4)', 'eigenvector −1 (λ = 1)')
        >>> (found.vectors.T @ torch.tensor([0.0, 1.0])).round(decimals=3).abs().tolist()
        [1.0, 0.0]
    """
    call = "eigenvector_directions"
    check_objective(call, objective)
    check_choice(call, "normalize", normalize, ("model", "none"))
    wanted = _check_ranks(call, ranks, objective.size)
    norm = 1.0
    if normalize == "model":
        norm = model_norm(call, finite_point(call, objective))
    if result is None:
        hessian = HessianOperator(objective) if operator is None else check_operator(call, operator)
        if hessian.shape[0] != objective.size:
            raise ShapeError(
                f"The 'operator' argument of {call} is of size {hessian.shape[0]}, the "
                f"objective's parameters are {objective.size}; make it from this objective."
            )
        high, low = max(0, *wanted), max(0, *(-rank for rank in wanted))
        if high + low > objective.size:
            # The ends meet: all counted from the largest.
            high, low = max(_position(rank, objective.size) for rank in wanted), 0
        k: int | tuple[int, int] = (high, low) if high and low else high or low
        which: Literal["LA", "SA", "BE"] = "BE" if high and low else ("LA" if high else "SA")
        found = lanczos(hessian, k=k, which=which, seed=seed, progress=progress)
        order = found.eigenvalues.argsort(descending=True, stable=True).tolist()
        places = [
            order[rank - 1 if rank > 0 else (rank if low else _position(rank, objective.size) - 1)]
            for rank in wanted
        ]
        doubts: tuple[str, ...] = ()
    elif operator is not None:
        raise InvalidArgumentError(f"{call} takes an operator or a result of one, not both.")
    else:
        advice = "fm.lanczos(fm.HessianOperator(objective), k=2) gives one."
        found = check_instance(call, "result", result, EigenResult, advice)
        places, doubts = _places(call, found, wanted, objective.size)
    if found.eigenvectors is None:
        raise InvalidArgumentError(
            f"The 'result' argument of {call} is one whose eigenvectors were dropped; give it as "
            "it was before `without_vectors()`."
        )
    rows, labels = [], []
    notes = [*doubts]
    for rank, place in zip(wanted, places, strict=True):
        vector = check_vector(
            call,
            found.eigenvectors[:, place].to(objective.device),
            size=objective.size,
            dtype=objective.dtype,
            device=objective.device,
        )
        vector = vector / math.sqrt(inner(vector, vector))
        rows.append(vector * (math.copysign(norm, float(vector[vector.abs().argmax()]))))
        value, residual = float(found.eigenvalues[place]), float(found.residuals[place])
        name = f"eigenvector {rank}".replace("-", "−")
        labels.append(f"{name} (λ = {format_number(value, 3)})")
        notes.append(
            f"{name}: λ = {format_number(value, 6)}, residual ‖Hu − λu‖ = "
            f"{format_number(residual, 2)}{_mixed(found, place)}."
        )
    if found.outcome is not Outcome.CONVERGED:
        notes.append(f"Eigenvectors: {found.outcome.value}")
    made = Directions(
        torch.stack(rows).T,
        tuple(labels),
        (UNITS[normalize],) * len(labels),
        tuple(notes) + found.notes,
    )
    check_independent(call, made)
    return made


def _check_ranks(call: str, ranks: object, n: int) -> tuple[int, ...]:
    given = list(ranks) if isinstance(ranks, Sequence) and not isinstance(ranks, str) else [ranks]
    wanted = tuple(check_integer(call, "ranks", rank, low=-n, high=n) for rank in given)
    if not wanted or 0 in wanted:
        raise InvalidArgumentError(
            f"The 'ranks' argument of {call} must be ranks such as (1, 2), 1 for the largest "
            f"eigenvalue and −1 for the smallest; got {ranks!r}."
        )
    if len({_position(rank, n) for rank in wanted}) < len(wanted):
        raise InvalidArgumentError(
            f"The 'ranks' argument of {call} names an eigenvector twice: {ranks!r} (of {n})."
        )
    return wanted


def _position(rank: int, n: int) -> int:
    return rank if rank > 0 else n + 1 + rank


def _places(
    call: str, result: EigenResult, wanted: tuple[int, ...], n: int
) -> tuple[list[int], tuple[str, ...]]:
    """Where the pairs of these ranks are in a given result, and what is not certain of that."""
    count = len(result.eigenvalues)
    order = result.eigenvalues.argsort(descending=True, stable=True).tolist()
    places = []
    for rank in wanted:
        positive = rank > 0
        held = abs(rank) <= count and (
            count == n or result.which not in ("LA", "SA") or positive == (result.which == "LA")
        )
        place = order[rank - 1 if positive else rank] if held else 0
        if held and count < n and result.which == "LM":
            # The largest in magnitude hold the largest of all only where these are positive.
            value = float(result.eigenvalues[place])
            held = value > 0 if positive else value < 0
        if not held:
            raise InvalidArgumentError(
                f"The 'result' argument of {call} does not hold the eigenvector of rank {rank}: it "
                f"has {count} pairs of the end {result.which!r} of the spectrum. Leave it out, or "
                "compute more pairs."
            )
        places.append(place)
    if len(set(places)) < len(places):
        raise InvalidArgumentError(
            f"The ranks {wanted} name one of the {count} pairs of the result twice."
        )
    if result.which == "BE" and count < n and max(map(abs, wanted)) > 1:
        note = "Ranks are counted among the pairs of the result that was given, from both ends."
        return places, (note,)
    return places, ()


def _mixed(result: EigenResult, place: int) -> str:
    """Return a part of a sentence if an eigenvector may be mixed with its neighbour."""
    values = result.eigenvalues.double()
    gaps = (values - values[place]).abs()
    gaps[place] = math.inf
    if float(result.residuals[place]) <= 0.1 * float(gaps.min()):
        return ""
    return ", too large for the gap to the next eigenvalue: vectors of these two may be mixed"


# ------------------------------------------------------------------------- gradient, difference


def gradient_direction(
    objective: Objective, *, normalize: Literal["model", "none"] = "model"
) -> Directions:
    """Return the direction of steepest descent, −∇L: positive is downhill.

    Args:
        objective: its gradient at the model is taken.
        normalize: "model": the direction has the norm ‖θ‖; "none": it is a unit vector.

    Returns:
        One direction.

    Raises:
        InvalidArgumentError: the gradient is zero; or ‖θ‖ = 0 for "model".
        NonFiniteError: the loss or the gradient is NaN or infinite.

    Examples:
        >>> import torch, flatminima as fm
        >>> from flatminima.landscape.model_directions import gradient_direction
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> gradient_direction(objective, normalize="none").vectors
        tensor([[-0.6000],
                [-0.8000]])
    """
    call = "gradient_direction"
    check_objective(call, objective)
    check_choice(call, "normalize", normalize, ("model", "none"))
    norm = 1.0
    if normalize == "model":
        norm = model_norm(call, finite_point(call, objective))
    gradient = objective.gradient()
    size = math.sqrt(inner(gradient, gradient))
    if size == 0:
        raise InvalidArgumentError(
            "The gradient is zero at the model: there is no direction of steepest descent."
        )
    return Directions(
        (gradient.div_(-size) * norm).unsqueeze(0).T,
        ("minus the gradient",),
        (UNITS[normalize],),
        (f"minus the gradient: ‖∇L‖ = {format_number(size)}; positive is downhill.",),
    )


def difference_direction(
    objective: Objective, other: Endpoint, *, normalize: Literal["none", "model"] = "none"
) -> Directions:
    """From the objective's model, at 0, towards another model, at 1.

    Args:
        objective: its model is the start.
        other: a module, a state dict, or a parameter vector (n,) in the objective's order.
        normalize: "none": the other model is at 1; "model": the direction has the norm ‖θ‖.

    Returns:
        One direction. It moves the selected parameters alone; where other tensors of the models
        differ, too (the statistics of batch norm), a note says so.

    Raises:
        StateMismatchError: `other` does not have the model's tensors; it says which.
        InvalidArgumentError: both have the same parameters; or ‖θ‖ = 0 for "model".
        NonFiniteError: a parameter is NaN or infinite.

    Examples:
        >>> import torch, flatminima as fm
        >>> from flatminima.landscape.model_directions import difference_direction
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = torch.ones(1, 1), torch.zeros(1, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> towards = difference_direction(objective, {"weight": torch.tensor([[4.0]])})
        >>> objective.loss_at(towards.vectors[:, 0])
        16.0
    """
    call = "difference_direction"
    check_objective(call, objective)
    check_choice(call, "normalize", normalize, ("none", "model"))
    point = finite_point(call, objective)
    state = endpoint_state(call, objective, other, "other")
    names = objective.layout.names
    vector = objective.layout.flatten(state[name] for name in names).sub_(point)
    if not all_finite(vector):
        raise NonFiniteError(f"The 'other' argument of {call} holds NaN or infinity.")
    distance = math.sqrt(inner(vector, vector))
    if distance == 0:
        raise InvalidArgumentError(
            f"The 'other' argument of {call} has the very parameters of the objective's model: "
            "there is no direction from one to the other."
        )
    own = model_state(objective.model)
    apart = [n for n, t in own.items() if n not in names and not torch.equal(t, state[n])]
    notes = [f"towards the other model: ‖θ' − θ‖ = {format_number(distance)}."]
    if apart:
        notes.append(
            f"The models differ also in {len(apart)} tensors that the direction does not move "
            f"(such as {apart[0]!r}); the landscape at the other model is with those of the "
            "objective's model."
        )
    if normalize == "model":
        vector.mul_(model_norm(call, point) / distance)
    unit = "distance to the other model" if normalize == "none" else UNITS["model"]
    return Directions(vector.unsqueeze(0).T, ("towards the other model",), (unit,), tuple(notes))
