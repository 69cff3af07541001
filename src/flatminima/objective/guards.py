"""How modules and PyTorch are set while a model is evaluated, and put back afterwards."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import random
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..derivatives.hand_written import differentiable_modules
from ..derivatives.torch_private import (
    HOOKS,
    TENSOR_DICTS,
    buffers_of,
    dynamo_is_loaded,
    no_checkpoint_warning,
    uncached_parametrizations,
    version,
)
from ..support.trees import is_record, same_values, walk

__all__ = ["Derivatives", "Guard", "evaluating"]

Derivatives = Literal[0, 1, 2]
"""How many times a loss is going to be differentiated by the parameters."""


@contextlib.contextmanager
def evaluating(
    model: nn.Module,
    criterion: object,
    mode: str,
    derivatives: Derivatives,
    *,
    copies: bool,
    pieces: Collection[str] = (),
) -> Iterator[Guard]:
    """Training flags as `mode` wants them, derivatives possible, compiled code run eagerly.

    Args:
        model: without wrappers.
        criterion: the loss function, guarded too when it is a module.
        mode: as in `Objective`.
        derivatives: how many will be taken.
        copies: give the modules copies of the tensors among their plain attributes, and the
            criterion of its buffers.
        pieces: names of the hand-written derivatives to use.
    """
    modules = list(model.modules())
    judges = list(criterion.modules()) if isinstance(criterion, nn.Module) else []
    guarded = [*modules, *judges]
    bound = _Bound(guarded, copies=copies)
    with contextlib.ExitStack() as stack:
        stack.callback(bound.restore, bound.present())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        twins = _twins([*map(vars, [*modules, *judges]), *map(buffers_of, judges)], copies)
        if mode != "keep":
            # Set one by one: a model's own train() may do more than set flags. Put back the same
            # way, as scripted modules do not have theirs among their attributes.
            for module in modules:
                if module.training != (mode == "train"):
                    stack.callback(setattr, module, "training", module.training)
                    module.training = mode == "train"
        # The fast path of nn.TransformerEncoder is taken only without gradients, and pads in
        # another way: it would make the loss another function than its gradient's.
        stack.callback(
            torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
        )
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(uncached_parametrizations())
        if dynamo_is_loaded():
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if derivatives == 0:
            stack.enter_context(no_checkpoint_warning())
        stack.enter_context(differentiable_modules(modules, derivatives, pieces))
        yield Guard(bound, twins)


class Guard:
    """Undoes, after each batch, what its forward has left in the modules."""

    def __init__(self, bound: _Bound, twins: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._bound, self._present, self._twins = bound, bound.present(), twins

    def restore(self) -> bool:
        """Undo it, so that no batch sees another's.

        What a forward binds to its modules (a recurrent layer's list of weights, the normed
        weight of `spectral_norm`, a cache, a hidden state) was made from replaced parameters.

        Returns:
            Whether tensors that attributes lead to had been written to, if copies were given.
        """
        wrote = self._bound.restore(self._present)
        changed = [(own, twin) for own, twin in self._twins if not same_values(own, twin)]
        with torch.no_grad():
            for own, twin in changed:
                twin.copy_(own)
        return wrote or bool(changed)


def _twins(owners: Sequence[dict[str, Any]], copies: bool) -> list[tuple[Tensor, Tensor]]:
    """Return the tensors bound in `owners`, each with the copy that has taken its place."""
    pairs = []
    for bound in owners if copies else ():
        for name, value in list(bound.items()):
            if isinstance(value, Tensor):
                bound[name] = value.detach().clone()
                pairs.append((value.detach(), bound[name]))
    return pairs


class _Bound:
    """What is bound to modules, and what their attributes lead to.

    That is: what is bound to plain objects (a configuration), what containers hold, tensors and
    arrays within these, and the states of random generators.

    Args:
        modules: with their attributes.
        copies: keep copies of the tensors and arrays, to undo writes to them.
    """

    def __init__(self, modules: Sequence[nn.Module], *, copies: bool) -> None:
        owners = [vars(m) for m in modules]
        values = _reached([v for o in owners for n, v in o.items() if n not in _OF_MODULES])
        own = [o[name] for o in owners for name in TENSOR_DICTS]
        self._bound = [*owners, *own, *(vars(v) for v in values if is_record(v))]
        hooks = [o[name] for o in owners for name in HOOKS if name in o]
        held = [*(v for v in values if isinstance(v, _CONTAINERS)), *hooks]
        self._empty = [v for v in held if not v]
        self._filled: list[tuple[Any, Any]] = [(v, copy.copy(v)) for v in held if v]
        self._thorough = copies
        self._arrays = [(v, v.copy()) for v in values if copies and isinstance(v, np.ndarray)]
        self._tensors = [
            (v, version(v), v.detach().clone())
            for v in values
            if copies and isinstance(v, Tensor) and not v.is_inference()
        ]
        self._generators = [
            (v, _state(v))
            for v in values
            # The system's source of randomness has no state.
            if isinstance(v, _generator_types()) and not isinstance(v, random.SystemRandom)
        ]

    def present(self) -> list[tuple[dict[str, Any], dict[str, Any], list[int]]]:
        """Return what is bound now, for `restore`."""
        return [(d, dict(d), [*map(id, d.values())]) for d in self._bound]

    def restore(self, kept: list[tuple[dict[str, Any], dict[str, Any], list[int]]]) -> bool:
        """Bind what was bound then, and undo the rest; whether tensors had been written to."""
        for bound, before, ids in kept:
            if [*map(id, bound.values())] != ids:
                _refill(bound, before)
        if any(self._empty):
            for held in self._empty:
                held.clear()
        for held, members in self._filled:
            if not _same_members(held, members, thorough=self._thorough):
                _refill(held, members)
        wrote = False
        for array, numbers in self._arrays:
            if array.dtype != object and not np.array_equal(array, numbers):
                array[...] = numbers
                wrote = True
        for number, (tensor, mark, content) in enumerate(self._tensors):
            if version(tensor) != mark:
                with torch.no_grad():
                    tensor.copy_(content)
                self._tensors[number] = (tensor, version(tensor), content)
                wrote = True
        for generator, state in self._generators:
            _set_state(generator, state)
        return wrote


def _refill(held: Any, members: Any) -> None:
    """Make a container hold `members` again; a dictionary in their order."""
    if isinstance(held, dict):
        for key in [k for k in held if k not in members]:
            del held[key]
        held.update(members)
        if list(held) != list(members):
            for key, value in members.items():
                del held[key]
                held[key] = value
        return
    held.clear()
    if isinstance(held, set):
        held.update(members)
    else:
        held.extend(members)


_CONTAINERS = (list, dict, set, collections.deque)
LARGE = 1000
"""Entries from which a container is looked through only while copies are kept."""


# What every module has: bound to it like the rest, but not to be followed.
_OF_MODULES = frozenset(vars(nn.Module()))


def _reached(attributes: Sequence[Any]) -> list[Any]:
    """Return what attributes lead to, but for modules, parameters and tensors bound directly."""
    own = {id(v) for v in attributes if isinstance(v, Tensor)}

    def passes_over(value: Any) -> bool:
        return isinstance(value, (nn.Module, nn.Parameter)) or id(value) in own

    everything = list(attributes)
    found = {id(v): v for v in walk(everything, passes_over, attributes=True)}
    del found[id(everything)]
    return list(found.values())


def _same_members(container: Any, before: Any, *, thorough: bool) -> bool:
    """Return whether it holds the very same objects in the same order."""
    if len(container) != len(before) or (len(before) >= LARGE and not thorough):
        return len(container) == len(before)
    if isinstance(container, dict):
        return [*map(id, container.values())] == [*map(id, before.values())] and (
            list(container) == list(before)
        )
    return [*map(id, container)] == [*map(id, before)]


@functools.cache
def _generator_types() -> tuple[type, ...]:
    """Named when they are first needed: NumPy loads its random numbers only then."""
    return torch.Generator, np.random.Generator, np.random.RandomState, random.Random


def _state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    read = getattr(generator, "getstate", None) or generator.get_state
    return read()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        (getattr(generator, "setstate", None) or generator.set_state)(state)
