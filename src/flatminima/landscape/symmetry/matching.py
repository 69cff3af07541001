"""Hidden units in the order of another network's: the same function, nearer to the other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InvalidArgumentError, NonFiniteError
from ...objective.modules import check_model, unwrap
from ...results import Outcome, Result, Table, format_number
from ...support.checks import check_instance, check_integer
from ...support.randomness import Seed, as_generator, preserve_random_state
from ...support.trees import tensors_in
from ...support.vectors import all_finite
from ..endpoints import State, check_same, model_state
from .units import Place, copied, unit_groups

__all__ = ["Permutations", "apply_permutations", "match_weights"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Permutations(Result):
    """An order of the hidden units of each layer, found by `match_weights`.

    Attributes:
        permutations: by name of the layer; its unit i is to be the model's own unit p[i].
        distance_before: ‖θ_reference − θ_model‖ over all parameters.
        distance_after: the same with the units in the new order.
        sweeps: through all layers; the last one changed nothing, unless the limit was reached.
        outcome: stopped by itself, or at the limit of sweeps.
        notes: remarks on the computation.

    Examples:
        >>> import torch, flatminima as fm
        >>> from flatminima.landscape.symmetry.matching import match_weights
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(1, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1)
        ... )
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.tensor([[1.0], [2.0]]))
        ...     _ = model[2].weight.copy_(torch.tensor([[3.0, 4.0]]))
        >>> match_weights(model, model)
        Units matched by permutation: distance 0 → 0 in 1 sweep
        layer  units  moved
        ─────  ─────  ─────
        0          2      0
        Note: The maximiser stopped by itself at a point from which it found no ascent.
    """

    permutations: dict[str, tuple[int, ...]]
    distance_before: float
    distance_after: float
    sweeps: int
    outcome: Outcome
    notes: tuple[str, ...] = ()

    def _table(self) -> Table:
        rows = tuple(
            (name, str(len(order)), str(sum(i != p for i, p in enumerate(order))))
            for name, order in self.permutations.items()
        )
        distances = " → ".join(map(format_number, (self.distance_before, self.distance_after)))
        sweeps = f"{self.sweeps} sweep{'s' if self.sweeps > 1 else ''}"
        return Table(
            header=("layer", "units", "moved"),
            rows=rows,
            title=f"Units matched by permutation: distance {distances} in {sweeps}",
            notes=(self.outcome.value, *self.notes),
        )


def match_weights(
    reference: nn.Module, model: nn.Module, *, seed: Seed = 0, max_sweeps: int = 100
) -> Permutations:
    """Return orders of the hidden units of `model` that bring its weights close to `reference`.

    The order of hidden units says nothing about the function, but much about what lies between
    two networks on a straight line. This is the weight matching of Ainsworth et al. (2022,
    arXiv:2209.04836, algorithm 1): layer after layer, in random order, the assignment of units
    that maximises ⟨θ_reference, P θ_model⟩ given all other layers' orders, a linear assignment
    problem in the inner products of incoming and outgoing weights, biases and the parameters of
    normalisations, until no layer gains. What it finds is a local maximum, which depends on the
    order of the layers. `apply_permutations` makes the model with the units in that order.

    Linear layers and plain convolutions are matched, across normalisations, elementwise
    activations of any kind, pooling and flattening. Convolutions and normalisations are taken to
    be called on batches, (N, C, …), and those after a linear layer on (N, C): what a trace cannot
    tell, `apply_permutations(..., inputs=...)` checks.

    Args:
        reference: the network to come close to.
        model: one of the same architecture, whose forward is traced by `torch.fx`.
        seed: an int or a `torch.Generator`, of the order of the layers.
        max_sweeps: through all layers, at most.

    Returns:
        The orders, and the distance before and after.

    Raises:
        StateMismatchError: the networks do not have the same tensors; it says which differ.
        InvalidArgumentError: units cannot be followed (residual additions, attention, recurrent
            layers, grouped convolutions); it says in which layer, and why. Or there are none.
        NonFiniteError: a parameter holds NaN or infinity.

    Examples:
        >>> import torch, flatminima as fm
        >>> from flatminima.landscape.symmetry.matching import apply_permutations, match_weights
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(1, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1)
        ... )
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.tensor([[1.0], [2.0]]))
        ...     _ = model[2].weight.copy_(torch.tensor([[3.0, 4.0]]))
        >>> other = torch.nn.Sequential(
        ...     torch.nn.Linear(1, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1)
        ... )
        >>> with torch.no_grad():
        ...     _ = other[0].weight.copy_(torch.tensor([[2.0], [1.0]]))
        ...     _ = other[2].weight.copy_(torch.tensor([[4.0, 3.0]]))
        >>> found = match_weights(model, other)
        >>> found.permutations
        {'0': (1, 0)}
        >>> apply_permutations(other, found)[2].weight.tolist()
        [[3.0, 4.0]]
    """
    call = "match_weights"
    for argument, given in (("reference", reference), ("model", model)):
        check_instance(call, argument, given, nn.Module, "Give the network itself.")
    max_sweeps = check_integer(call, "max_sweeps", max_sweeps, low=1)
    generator = as_generator(seed, torch.device("cpu"))
    reference, model = unwrap(reference), unwrap(model)
    for given in (reference, model):
        check_model(given)
    check_same(model_state(reference), model_state(model), call, "the reference", "model")
    groups = unit_groups(call, model)
    target, moved = (
        _parameters(call, m, n) for m, n in ((reference, "reference"), (model, "model"))
    )
    before = _distance(target, moved)
    orders = {name: torch.arange(group[0].channels.count) for name, group in groups.items()}
    names, sweeps, settled = list(groups), 0, False
    while not settled and sweeps < max_sweeps:
        settled = True
        sweeps += 1
        drawn = torch.randperm(len(names), generator=generator, device=generator.device)
        for index in drawn.tolist():
            name = names[index]
            found = _assignment(target, moved, groups[name])
            if found is None:
                continue
            settled = False
            orders[name] = orders[name][found]
            for place in groups[name]:
                if place.tensor in moved:
                    moved[place.tensor] = place.permuted(moved[place.tensor], found)
    return Permutations(
        permutations={name: tuple(order.tolist()) for name, order in orders.items()},
        distance_before=before,
        distance_after=_distance(target, moved),
        sweeps=sweeps,
        outcome=Outcome.STATIONARY if settled else Outcome.ITERATION_LIMIT,
    )


def apply_permutations(
    model: nn.Module, permutations: Permutations, *, inputs: Any = None
) -> nn.Module:
    """Return a copy of the model with its hidden units in another order: the same function.

    Args:
        model: that of `match_weights`, or one of the same architecture; it stays as it is.
        permutations: what `match_weights` returned.
        inputs: a batch for the model's forward, with which both are compared in evaluation.

    Returns:
        The copy, without wrappers and gradients. The weights, biases, and the parameters and
        running statistics of normalisations are in the new order; the function is the same up to
        rounding.

    Raises:
        InvalidArgumentError: the permutations are not of this architecture, or the function is
            another one for `inputs`.

    Examples:
        >>> import torch, flatminima as fm
        >>> from flatminima.landscape.symmetry.matching import apply_permutations, match_weights
        >>> nets = [
        ...     torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.GELU(), torch.nn.Linear(5, 2))
        ...     for _ in range(2)
        ... ]
        >>> same = apply_permutations(nets[1], match_weights(*nets))
        >>> inputs = torch.ones(4, 3)
        >>> torch.allclose(same(inputs), nets[1](inputs), atol=1e-6)
        True
    """
    call = "apply_permutations"
    check_instance(call, "model", model, nn.Module, "Give the network itself.")
    advice = "Make them with match_weights(reference, model)."
    check_instance(call, "permutations", permutations, Permutations, advice)
    inner = unwrap(model)
    check_model(inner)
    groups = unit_groups(call, inner)
    given = permutations.permutations
    for name in [*groups, *(n for n in given if n not in groups)]:
        count = groups[name][0].channels.count if name in groups else 0
        if sorted(given.get(name, ())) != list(range(count)):
            found = f"holds {len(given[name])}" if name in given else "has none"
            raise InvalidArgumentError(
                f"The 'permutations' argument of {call} does not fit the model: the layer "
                f"{name!r} has {count} hidden units, of which it {found} in some order. Give the "
                "model, or one of the architecture, that match_weights was called with."
            )
    permuted = copied(call, inner)
    tensors = dict(permuted.named_parameters()) | dict(permuted.named_buffers())
    with torch.no_grad():
        for name, group in groups.items():
            order = torch.tensor(given[name])
            for place in group:
                tensor = tensors[place.tensor]
                tensor.copy_(place.permuted(tensor.detach(), order))
    if inputs is not None:
        _check_function(call, copied(call, inner), permuted, inputs)
    return permuted


def _check_function(call: str, model: nn.Module, permuted: nn.Module, inputs: Any) -> None:
    """Refuse a model whose outputs are others; `model` is a copy, too."""
    flags = [module.training for module in permuted.modules()]
    try:
        with torch.no_grad(), preserve_random_state():
            pairs = [list(tensors_in(net.eval()(inputs))) for net in (model, permuted)]
    finally:
        for module, training in zip(permuted.modules(), flags, strict=True):
            module.training = training
    for one, other in zip(*pairs, strict=True):
        tolerance = 1e3 * torch.finfo(one.dtype).eps if one.is_floating_point() else 0.0
        size = float(one.abs().max()) if one.numel() else 0.0
        if one.numel() and float((one - other).abs().max()) > tolerance * size:
            raise InvalidArgumentError(
                f"{call}: the permuted model has other outputs for these inputs, so that its "
                "layers do not read units where they were taken to: convolutions and norms "
                "must be called on batches, (N, C, …), and those after linear layers on (N, C)."
            )


# ------------------------------------------------------------------------------------ the matching


def _assignment(target: State, moved: State, group: Sequence[Place]) -> Tensor | None:
    """Return the order with the largest inner product; None where the present one has it."""
    from scipy.optimize import linear_sum_assignment

    count = group[0].channels.count
    products = torch.zeros(count, count, dtype=torch.float64)
    for place in group:
        if place.tensor in target:
            products += place.rows(target[place.tensor]) @ place.rows(moved[place.tensor]).T
    _, columns = linear_sum_assignment(products.numpy(), maximize=True)
    order = torch.from_numpy(columns).to(torch.int64)
    present = torch.arange(count)
    gain = float((products[present, order] - products[present, present]).sum())
    # Less is rounding, and could go round in circles.
    return order if gain > 1e-12 * count * float(products.abs().max()) else None


def _parameters(call: str, model: nn.Module, argument: str) -> State:
    """Return every parameter in float64 on the host."""
    found = {n: p.detach().to("cpu", torch.float64) for n, p in model.named_parameters()}
    for name, tensor in found.items():
        if not all_finite(tensor):
            raise NonFiniteError(
                f"The {argument!r} argument of {call} holds NaN or infinity in {name!r}."
            )
    return found


def _distance(first: State, second: State) -> float:
    return math.sqrt(sum(float((t - second[n]).square().sum()) for n, t in first.items()))
