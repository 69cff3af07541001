"""One batch at a time: the loss at replaced parameters, by a module that stays as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.func import functional_call

from .batches import Batch, Batches, available_bytes, located
from .errors import ArgumentTypeError, LossNotScalarError
from .failures import explained
from .guards import Derivatives, evaluating
from .nested import same_tensors, to_device
from .passes import Copies, Tally
from .pieces import Pieces
from .randomness import preserved_random_state, random_state, reseed
from .weights import split_pair

__all__ = ["Evaluated", "Evaluator", "Point"]

R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What became of one batch, shown while the replaced tensors are still in the module."""

    batch: Batch
    loss: Tensor
    """ℓ_b, a scalar with its graph."""
    output: Any
    """Of the model, and the target: None under `batch_loss`."""
    target: Any
    tensors: dict[str, Tensor]
    """The parameters that the loss was computed with."""


@dataclasses.dataclass(frozen=True)
class Point:
    """What takes the place of the model's own tensors in one evaluation of all batches."""

    parameters: Callable[[], dict[str, Tensor]]
    """Makes private tensors to evaluate with, by name; the model's other parameters are taken as
    they are, without a graph."""
    buffers: Mapping[str, Tensor]
    """To evaluate with, of which copies are used."""
    visit: Callable[[Evaluated], None]
    """Is shown each batch."""


class Evaluator:
    """The loop over the batches, with everything that keeps the user's things from harm.

    Args:
        model: without wrappers.
        loss_fn: as in `Objective`.
        batch_loss: as in `Objective`.
        mode: as in `Objective`.
        batches: the data.
        is_sum: whether the losses are sums already, not means to be weighted.
        pieces: how batches are cut where they do not fit into memory.
        eps: the precision of the parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Any] | None,
        batch_loss: Callable[[nn.Module, Any], Any] | None,
        *,
        mode: str,
        batches: Batches,
        is_sum: bool,
        pieces: Pieces,
        eps: float,
    ) -> None:
        self.model, self.mode, self.batches = model, mode, batches
        self.is_sum, self.pieces = is_sum, pieces
        # What a loss computed in two ways may differ by, relatively.
        self.tolerance = min(0.03, 1000 * eps)
        self._forward = _Forward(model, loss_fn, batch_loss)
        # None until one whole pass has shown whether the model leaves these alone; until then,
        # and where it does not, each batch gets copies.
        self._writes: bool | None = None
        # Buffers have copies always; these are made anew for each batch where need be.
        self._moving_buffers = True

    @property
    def settled(self) -> bool:
        """Whether a whole pass has shown that the model leaves its tensors alone."""
        return self._writes is False

    def mean_loss(
        self,
        parameters: Callable[[], dict[str, Tensor]],
        buffers: Mapping[str, Tensor],
        visit: Callable[[Evaluated], None],
        *,
        check: bool,
        derivatives: Derivatives,
        kept: Mapping[int, Evaluated] | None = None,
        value: bool = True,
    ) -> float:
        """Σ_b w_b ℓ_b / Σ_b w_b in float64.

        Args:
            parameters: as in `Point`.
            buffers: as in `Point`.
            visit: as in `Point`.
            check: raise for a loss that is not finite.
            derivatives: how many `visit` takes.
            kept: batches that were evaluated before, by number: these are shown to `visit` once
                more, with the tensors in the module that it had then, instead of run forward.
            value: False leaves the loss on the device, where nothing waits for it, and gives NaN.
        """
        return self.mean_losses(
            [Point(parameters, buffers, visit)],
            check=check,
            derivatives=derivatives,
            kept=kept,
            value=value,
        )[0]

    def mean_losses(
        self,
        points: Sequence[Point],
        *,
        check: bool,
        derivatives: Derivatives,
        kept: Mapping[int, Evaluated] | None = None,
        value: bool = True,
    ) -> list[float]:
        """The mean loss at each of several points, in one reading of the data.

        The numbers are those of as many calls of `mean_loss`. The private tensors of all points are
        held at once, but for a model that may write to them: then those of one point at a time.
        """
        kept = kept or {}
        tallies = [Tally() for _ in points]
        watching = self._writes is None
        wrote = False
        still: list[bool] = []
        copies = self._writes is not False
        criterion = self._forward.criterion
        with evaluating(self.model, criterion, self.mode, derivatives, copies=copies) as guard:
            first = next(iter(kept.values()), None)
            made: dict[int, _Present] = {}

            def turn_to(number: int) -> _Present:
                if number not in made:
                    if self._writes is not False:
                        made.clear()
                    made[number] = _Present(
                        self, points[number], first, differentiable=derivatives > 0
                    )
                return made[number]

            present = turn_to(0)

            def forward(batch: Batch, data: Any, show: Callable[[Evaluated], None]) -> Tensor:
                nonlocal wrote
                shadows = present.others.fresh(renew=copies)
                shadows |= present.buffers.fresh(renew=self._moving_buffers)
                reseed(batch.index)
                try:
                    own = dataclasses.replace(batch, data=data)
                    # Not renewed for each batch unless it must be: a graph that is kept from one
                    # batch to the next is found out by the leaves that both have.
                    tensors = present.leaves.fresh(renew=self._writes is True)
                    return self._forward.evaluate(own, shadows, tensors, show)
                finally:
                    wrote = guard.restore() or wrote

            def replay(seen: Evaluated, tally: Tally) -> None:
                tally.add(seen.batch, seen.loss.detach(), 1.0 if self.is_sum else seen.batch.weight)
                try:
                    shadows = present.others.fresh() | present.buffers.fresh()
                    self._forward.replay(seen, shadows, present.point.visit)
                finally:
                    guard.restore()

            def evaluate(batch: Batch, tally: Tally) -> None:
                nonlocal wrote
                data = batch.data
                if copies:
                    data = to_device(data, self.batches.device, duplicate=True)
                loss = forward(batch, data, present.point.visit)
                tally.add(batch, loss, 1.0 if self.is_sum else batch.weight)
                if watching:
                    still.append(present.still())
                    wrote = present.moved() or wrote or not same_tensors(data, batch.data)

            def value_of(piece: Batch) -> tuple[float, bool]:
                data = to_device(piece.data, self.batches.device, duplicate=True)
                reseed(piece.index)
                before = random_state()
                value = float(forward(piece, data, lambda seen: None))  # noqa: ARG005
                return value, random_state() != before

            with self._reading(kept) as stream:
                for batch in stream:
                    with (
                        located(batch.index),
                        explained(batch.index, self.batches.device, batch.data),
                    ):
                        if batch.index in kept:
                            replay(kept[batch.index], tallies[0])
                            continue
                        self.pieces.check_mean(batch, value_of, self.tolerance)
                        for number, tally in enumerate(tallies):
                            present = turn_to(number)
                            self.pieces.each(batch, functools.partial(evaluate, tally=tally))
        if watching:
            self._writes, self._moving_buffers = wrote, not all(still)
        if not value:
            return [math.nan] * len(points)
        return [tally.mean(self.batches.total_weight, check=check) for tally in tallies]

    @contextlib.contextmanager
    def _reading(self, kept: Mapping[int, Evaluated]) -> Iterator[Iterator[Batch]]:
        """The batches; where all are kept the user's data need not be read."""
        if len(kept) < self.batches.used:
            with self.batches.reading() as stream:
                yield stream
        else:
            with preserved_random_state():
                yield (seen.batch for seen in kept.values())

    def _own(self, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self.model.named_parameters() if n in names}

    def _others(self, selected: Collection[str], *, differentiable: bool) -> dict[str, Tensor]:
        """The parameters that are not replaced: copies as long as the model may write to them.

        They keep their requires_grad, since reentrant checkpointing gives no gradient at all to
        a block whose input needs none.
        """
        own = {n: p for n, p in self.model.named_parameters() if n not in selected}
        size = sum(p.numel() * p.element_size() for p in own.values())
        # Copies of a backbone that fills the memory would be worse than the risk.
        copied = self._writes is not False and size <= available_bytes(self.batches.device) // 2
        # An inference tensor takes part in derivatives only as a copy.
        twins = {
            n: p.detach().clone() if copied or p.is_inference() else p.detach()
            for n, p in own.items()
        }
        return {
            n: t.requires_grad_(differentiable and own[n].requires_grad) for n, t in twins.items()
        }


class _Present:
    """The private tensors of the point that is being evaluated."""

    def __init__(
        self, evaluator: Evaluator, point: Point, first: Evaluated | None, *, differentiable: bool
    ) -> None:
        self.point, self._evaluator = point, evaluator
        self.leaves = Copies(point.parameters)
        self.buffers = Copies(lambda: {n: b.detach().clone() for n, b in point.buffers.items()})
        # Copies of the parameters are made only once a batch needs them.
        selected = self.leaves.fresh().keys() if first is None else first.tensors.keys()
        self.others = Copies(lambda: evaluator._others(selected, differentiable=differentiable))

    def still(self) -> bool:
        """Whether the buffers are what they were."""
        return same_tensors(self.buffers.present, dict(self.point.buffers))

    def moved(self) -> bool:
        """Whether parameters are not what they were."""
        moved = not same_tensors(self.leaves.present, self.point.parameters())
        if moved:
            self.leaves.fresh(renew=True)
        others = self.others.present
        return moved or not same_tensors(others, self._evaluator._own(others))


class _Forward(nn.Module):
    """Around the model, so that `functional_call` reaches all of it.

    The tensors are replaced inside the model itself while this runs, so that a `batch_loss` that
    calls `model.encoder(...)` or reads `model.weight` sees the replaced ones too, and so does
    activation checkpointing, which runs parts of the model again during the derivative.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Any] | None,
        batch_loss: Callable[[nn.Module, Any], Any] | None,
    ) -> None:
        super().__init__()
        self.model = model
        # Wrapped, so that a criterion that is a module is not taken for a part of the model.
        self._functions = (loss_fn, batch_loss)

    @property
    def criterion(self) -> object:
        """The loss function, of whichever kind it is."""
        return self._functions[1] if self._functions[0] is None else self._functions[0]

    def evaluate(
        self,
        batch: Batch,
        others: Mapping[str, Tensor],
        parameters: dict[str, Tensor],
        visit: Callable[[Evaluated], None],
    ) -> Tensor:
        """ℓ_b without its graph, after `visit` has seen it."""

        def run() -> Tensor:
            seen = self._run(batch, parameters)
            visit(seen)
            return seen.loss.detach()

        return self._replaced(run, others, parameters)

    def replay(
        self, seen: Evaluated, others: Mapping[str, Tensor], visit: Callable[[Evaluated], None]
    ) -> None:
        """Show `visit` what was seen before, for checkpointing with the tensors in place."""
        self._replaced(lambda: visit(seen), others, seen.tensors)

    def _replaced(
        self, run: Callable[[], R], others: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
    ) -> R:
        replaced = {f"model.{n}": t for n, t in [*others.items(), *parameters.items()]}
        result: R = functional_call(self, replaced, (run,))
        return result

    def forward(self, run: Callable[[], R]) -> R:
        return run()

    def _run(self, batch: Batch, parameters: dict[str, Tensor]) -> Evaluated:
        loss_fn, batch_loss = self._functions
        output: Any = None
        target: Any = None
        if batch_loss is not None:
            loss = batch_loss(self.model, batch.data)
        else:
            assert loss_fn is not None
            inputs, target = split_pair(batch.data, batch.index)
            try:
                output = self.model(inputs)
                loss = loss_fn(output, target)
            except (TypeError, AttributeError) as error:
                strange = next((v for v in (inputs, output) if _is_structured(v)), None)
                if strange is None:
                    raise
                raise ArgumentTypeError(
                    f"loss_fn(model(input), target) fails with {type(error).__name__}: {error}. "
                    f"The {'input' if strange is inputs else 'output'} is a "
                    f"{type(strange).__name__}; say what to do with it by batch_loss=lambda "
                    "model, batch: ..., for instance model(**batch).loss."
                ) from error
        return Evaluated(batch, _checked_loss(loss, batch), output, target, parameters)


def _is_structured(value: Any) -> bool:
    return value is not None and not isinstance(value, Tensor)


def _checked_loss(loss: Any, batch: Batch) -> Tensor:
    if not isinstance(loss, Tensor):
        raise LossNotScalarError(
            f"The loss of batch {batch.index} is a {type(loss).__name__}, not a tensor; "
            "return the loss tensor itself, without .item() or float()."
        )
    if loss.numel() != 1:
        raise LossNotScalarError(
            f"The loss of batch {batch.index} has shape {tuple(loss.shape)}, not one value; "
            'use reduction="mean" (or "sum"), or average it yourself.'
        )
    if not loss.dtype.is_floating_point:
        raise LossNotScalarError(
            f"The loss of batch {batch.index} is of type {loss.dtype}; it must be real."
        )
    scalar: Tensor = loss.reshape(())
    return scalar
