"""One batch at a time: the loss at replaced parameters, by a module that stays as it was."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..derivatives.substitution import Differentiation
from ..support.failures import available_bytes, explained
from ..support.randomness import preserved_random_state, random_state, reseed
from ..support.trees import same_tensors, same_values, to_device
from .batches import Batch, Batches, located
from .forward import Evaluated, Forward, Within
from .guards import Derivatives, evaluating
from .microbatches import Pieces
from .passes import Copies, Tally

__all__ = ["Evaluator", "Point"]


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
        self._forward = Forward(model, loss_fn, batch_loss)
        self.differentiation = Differentiation(model, self._forward.criterion)
        # None until one whole pass has shown whether the model leaves these alone; until then,
        # and where it does not, each batch gets copies.
        self._writes: bool | None = None
        # Buffers have copies always; these are made anew for each batch where need be.
        self._moving_buffers = True

    def replaced(self, loss_fn: Callable[[Any, Any], Any] | None, batches: Batches) -> Evaluator:
        """The same with another criterion, on other batches."""
        twin = copy.copy(self)
        twin.batches = batches
        known, batch_loss = self._forward.functions
        if loss_fn is not known:
            twin._forward = Forward(self.model, loss_fn, batch_loss)
            twin.differentiation = Differentiation(self.model, twin._forward.criterion)
        return twin

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
        outputs_only: bool = False,
    ) -> float:
        """Σ_b w_b ℓ_b / Σ_b w_b in float64; NaN when some batches are kept, as it is known then.

        Args:
            parameters: as in `Point`.
            buffers: as in `Point`.
            visit: as in `Point`.
            check: raise for a loss that is not finite.
            derivatives: how many `visit` takes.
            kept: batches that were evaluated before, by number: these are shown to `visit` once
                more, with the tensors in the module that it had then, instead of run forward.
            outputs_only: whether `visit` differentiates the outputs alone, and not the loss.
        """
        return self.mean_losses(
            [Point(parameters, buffers, visit)],
            check=check,
            derivatives=derivatives,
            kept=kept,
            outputs_only=outputs_only,
        )[0]

    def mean_losses(
        self,
        points: Sequence[Point],
        *,
        check: bool,
        derivatives: Derivatives,
        kept: Mapping[int, Evaluated] | None = None,
        outputs_only: bool = False,
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
        twice = derivatives == 2
        within: Within = self.differentiation.running if twice else contextlib.nullcontext
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
                others = present.others.fresh(renew=copies)
                shadows = others | present.buffers.fresh(renew=self._moving_buffers)
                reseed(batch.index)
                try:
                    own = dataclasses.replace(batch, data=data)
                    # Not renewed for each batch unless it must be: a graph that is kept from one
                    # batch to the next is found out by the leaves that both have.
                    tensors = present.leaves.fresh(renew=self._writes is True)
                    return self._forward.evaluate(
                        own, shadows, tensors, show, within, outputs_only=outputs_only
                    )
                finally:
                    wrote = guard.restore() or wrote

            def visit(seen: Evaluated) -> None:
                if twice:
                    self.differentiation.examine([seen.output, seen.loss])
                present.point.visit(seen)

            def replay(seen: Evaluated) -> None:
                try:
                    shadows = present.others.fresh() | present.buffers.fresh()
                    run = functools.partial(present.point.visit, seen)
                    self._forward.replaced(run, shadows, seen.tensors)
                finally:
                    guard.restore()

            def evaluate(batch: Batch, tally: Tally) -> None:
                nonlocal wrote
                data = batch.data
                if copies:
                    data = to_device(data, self.batches.device, duplicate=True)
                loss = forward(batch, data, visit)
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

            with self.batches.reading() as stream:
                for batch in stream:
                    with (
                        located(batch.index),
                        explained(batch.index, self.batches.device, batch.data),
                    ):
                        if batch.index in kept:
                            replay(kept[batch.index])
                            continue
                        self.pieces.check_mean(batch, value_of, self.tolerance)
                        for number, tally in enumerate(tallies):
                            present = turn_to(number)
                            self.pieces.each(batch, functools.partial(evaluate, tally=tally))
        if watching:
            self._writes, self._moving_buffers = wrote, not all(still)
        if twice:
            self.differentiation.settle()
        if kept:
            return [math.nan] * len(points)
        return [tally.mean(self.batches.total_weight, check=check) for tally in tallies]

    def replay(
        self,
        kept: Mapping[int, Evaluated],
        buffers: Mapping[str, Tensor],
        visit: Callable[[Evaluated], None],
        *,
        derivatives: Derivatives,
    ) -> None:
        """Show `visit` every batch once more, as `mean_loss` does with `kept`, reading no data."""
        criterion = self._forward.criterion
        first = next(iter(kept.values()))

        def run() -> None:
            for seen in kept.values():
                with located(seen.batch.index), explained(seen.batch.index, self.batches.device):
                    visit(seen)

        with (
            evaluating(self.model, criterion, self.mode, derivatives, copies=False) as guard,
            preserved_random_state(),
        ):
            shadows = self._others(first.tensors, differentiable=derivatives > 0)
            shadows |= {n: b.detach().clone() for n, b in buffers.items()}
            try:
                self._forward.replaced(run, shadows, first.tensors)
            finally:
                guard.restore()

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
        own = self._evaluator._own(others)
        # Of copies only the values count: they may require grad where these do not.
        return moved or not all(same_values(t, own[name]) for name, t in others.items())
