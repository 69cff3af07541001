"""Passes over the batches: the loss of each at replaced parameters, by a model left as it was."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..derivatives.hand_written import Differentiation, HandWritten
from ..derivatives.torch_private import version
from ..errors import LossNotScalarError, NonFiniteError
from ..support.failures import available_bytes, explain_errors
from ..support.randomness import preserve_random_state, read_random_state, reseed
from ..support.trees import same_tensors, same_values, tensors_in, to_device
from .batches import Batch, Batches, located
from .forward import Evaluated, Forward, Within
from .guards import Derivatives, Guard, evaluating
from .microbatches import Cut, Pieces

__all__ = ["Copies", "Evaluator", "Pass", "Point"]


@dataclasses.dataclass(frozen=True)
class Point:
    """What takes the place of the model's own tensors in one evaluation of all batches."""

    parameters: Callable[[], dict[str, Tensor]]
    """Makes private tensors to evaluate with, by name; the model's other parameters are taken as
    they are, without a graph."""
    buffers: Mapping[str, Tensor]
    """Evaluated with as copies."""


class Evaluator:
    """What passes over the batches have in common, and what was learnt from the first one.

    Args:
        model: without wrappers.
        loss_fn: as in `Objective`.
        batch_loss: as in `Objective`.
        mode: as in `Objective`.
        batches: the data.
        is_sum: whether the losses are sums already, not means to be weighted.
        pieces: how batches are cut where they do not fit into memory.
        eps: the precision of the parameters.
        hand_written: as in `Objective`.
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
        hand_written: HandWritten = True,
    ) -> None:
        self.model, self.mode, self.batches = model, mode, batches
        self.is_sum, self.pieces = is_sum, pieces
        # What a loss computed in two ways may differ by, relatively.
        self.tolerance = min(0.03, 1000 * eps)
        self.forward = Forward(model, loss_fn, batch_loss)
        self.differentiation = Differentiation(model, self.forward.criterion, hand_written)
        # None until one whole pass has shown whether the model leaves its tensors alone; until
        # then, and where it does not, each batch gets copies.
        self.writes: bool | None = None
        # Buffers are always copies; where the model writes to them, each batch gets new ones.
        self.moves_buffers = True

    def replaced(self, loss_fn: Callable[[Any, Any], Any] | None, batches: Batches) -> Evaluator:
        """Return the same evaluator with another criterion, on other batches."""
        twin = copy.copy(self)
        twin.batches = batches
        known, batch_loss = self.forward.functions
        if loss_fn is not known:
            twin.forward = Forward(self.model, loss_fn, batch_loss)
            chosen = self.differentiation.chosen
            twin.differentiation = Differentiation(self.model, twin.forward.criterion, chosen)
        return twin

    @property
    def settled(self) -> bool:
        """Whether a whole pass has shown that the model leaves its tensors alone."""
        return self.writes is False

    def own_parameters(self, names: Collection[str]) -> dict[str, Tensor]:
        """Return the model's own parameters of these names, without a graph."""
        return {n: p.detach() for n, p in self.model.named_parameters() if n in names}

    def other_parameters(
        self, selected: Collection[str], *, differentiable: bool
    ) -> dict[str, Tensor]:
        """Return the parameters that are not replaced, as copies if the model may write to them.

        They keep their requires_grad, since reentrant checkpointing gives no gradient at all to
        a block whose input needs none.
        """
        own = {n: p for n, p in self.model.named_parameters() if n not in selected}
        size = sum(p.numel() * p.element_size() for p in own.values())
        # Copies of a backbone that fills the memory would be worse than the risk.
        copied = self.writes is not False and size <= available_bytes(self.batches.device) // 2
        # An inference tensor takes part in derivatives only as a copy.
        twins = {
            n: p.detach().clone() if copied or p.is_inference() else p.detach()
            for n, p in own.items()
        }
        return {
            n: t.requires_grad_(differentiable and own[n].requires_grad) for n, t in twins.items()
        }


class Pass:
    """One reading of the data, at one point or several.

    Batches are pulled, so that a loss is differentiated in the caller's own frame:

        with Pass(evaluator, [point], derivatives=1) as batches:
            for seen in batches:
                with batches.visiting(seen):
                    ...  # differentiate seen.loss
        loss = batches.mean_losses(check=True)[0]

    While the body runs, the replaced tensors are in the model, and everything else is as the
    batch was evaluated. The private tensors of all points are held at once, except for a model
    that may write to them, which gets those of one point at a time.

    Args:
        evaluator: of the objective.
        points: evaluated for each batch, in turn.
        derivatives: how many will be taken.
        kept: batches that were evaluated before, by number: shown again, with the tensors in the
            module that it had then, in place of being run forward.
        outputs_only: whether the outputs alone are differentiated, not the loss.

    Attributes:
        point: the number of the point that the present batch was evaluated at.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        points: Sequence[Point],
        *,
        derivatives: Derivatives,
        kept: Mapping[int, Evaluated] | None = None,
        outputs_only: bool = False,
    ) -> None:
        self._evaluator, self._points = evaluator, points
        self._derivatives, self._outputs_only = derivatives, outputs_only
        self._kept = kept or {}
        self._replays = bool(self._kept) and len(self._kept) == evaluator.batches.used
        self._tallies = [Tally() for _ in points]
        self._watching = evaluator.writes is None
        self._copies = evaluator.writes is not False and not self._replays
        self._wrote = False
        self._still: list[bool] = []
        self._private: dict[int, _Private] = {}
        self._guard: Guard
        self._stream: Iterator[Batch]
        self._shown: Generator[Evaluated, None, None] | None = None
        self.point = 0
        self._cut: Cut | None = None
        twice = derivatives == 2
        self._within: Within = (
            evaluator.differentiation.running if twice else contextlib.nullcontext
        )

    def __enter__(self) -> Pass:
        evaluator = self._evaluator
        with contextlib.ExitStack() as stack:
            self._guard = stack.enter_context(
                evaluating(
                    evaluator.model,
                    evaluator.forward.criterion,
                    evaluator.mode,
                    self._derivatives,
                    copies=self._copies,
                    pieces=evaluator.differentiation.pieces,
                )
            )
            if self._replays:
                stack.enter_context(preserve_random_state())
            else:
                self._stream = stack.enter_context(evaluator.batches.reading())
            self._contexts = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The innermost contexts are those of the batch in hand, in the suspended generator.
        self._contexts.callback(lambda: None if self._shown is None else self._shown.close())
        self._contexts.__exit__(kind, error, trace)

    def __iter__(self) -> Iterator[Evaluated]:
        self._shown = self._replay() if self._replays else self._read()
        return self._shown

    @contextlib.contextmanager
    def visiting(self, seen: Evaluated) -> Iterator[None]:
        """Explain errors by the batch in hand, and let its graph go at the end.

        Where memory runs out and batches may be cut, the error is kept back and the batch comes
        again in smaller pieces: what is added up must be added last.
        """
        batch = seen.batch
        try:
            with self._explaining(batch):
                try:
                    yield
                except Exception as error:
                    if self._cut is None or not self._cut.shrink(error):
                        raise
        finally:
            if self._kept.get(batch.index) is not seen:
                seen.release()

    def mean_losses(self, *, check: bool) -> list[float]:
        """Return Σ_b w_b ℓ_b / Σ_b w_b in float64 at each point; NaN where batches were kept.

        Raises:
            NonFiniteError: a loss is not finite, and `check` is set.
        """
        if self._kept:
            return [math.nan] * len(self._points)
        total = self._evaluator.batches.total_weight
        return [tally.mean(total, check=check) for tally in self._tallies]

    @contextlib.contextmanager
    def _explaining(self, batch: Batch) -> Iterator[None]:
        with (
            located(batch.index),
            explain_errors(batch.index, self._evaluator.batches.device, batch.data),
        ):
            yield

    def _replay(self) -> Generator[Evaluated, None, None]:
        """Show what was kept of every batch, reading no data."""
        evaluator, tensors = self._evaluator, next(iter(self._kept.values())).tensors
        others = evaluator.other_parameters(tensors, differentiable=self._derivatives > 0)
        buffers = _clones(self._points[0].buffers)
        try:
            with evaluator.forward.replacing({**others, **buffers}, tensors):
                yield from self._kept.values()
        finally:
            self._guard.restore()

    def _read(self) -> Generator[Evaluated, None, None]:
        """Show every batch at every point, run forward or as it was kept."""
        evaluator = self._evaluator
        pieces = evaluator.pieces
        for batch in self._stream:
            if batch.index in self._kept:
                yield from self._again(self._kept[batch.index])
                continue
            with self._explaining(batch):
                pieces.check_mean(batch, self._value_of, evaluator.tolerance)
            for number in range(len(self._points)):
                self.point = number
                cut = self._cut = pieces.cut(batch)
                rest = iter(cut)
                while True:
                    with self._explaining(batch):
                        piece = next(rest, None)
                    if piece is None:
                        break
                    yield from self._evaluate(piece, cut)
                self._cut = None
        if self._watching:
            evaluator.writes, evaluator.moves_buffers = self._wrote, not all(self._still)
        if self._derivatives == 2:
            evaluator.differentiation.settle()

    def _evaluate(self, batch: Batch, cut: Cut) -> Generator[Evaluated, None, None]:
        """Show one batch, or a piece of one, and add its loss up."""
        evaluator, data = self._evaluator, batch.data
        with contextlib.ExitStack() as stack:
            with self._explaining(batch):
                try:
                    private = self._turn_to(self.point)
                    if self._copies:
                        data = to_device(data, evaluator.batches.device, duplicate=True)
                    seen = self._run(batch, data, private, stack)
                    self._check_graph(seen)
                except Exception as error:
                    if not cut.shrink(error):
                        raise
                    return
            loss = seen.loss.detach()
            yield seen
            del seen
        if cut.failed:
            return
        self._tallies[self.point].add(batch, loss, 1.0 if evaluator.is_sum else batch.weight)
        if self._watching:
            self._still.append(private.is_still())
            self._wrote = private.has_moved() or self._wrote or not same_tensors(data, batch.data)

    def _run(
        self, batch: Batch, data: Any, private: _Private, stack: contextlib.ExitStack
    ) -> Evaluated:
        """Evaluate a batch; the tensors are in the model until `stack` is left."""
        evaluator = self._evaluator
        shadows = private.others.fresh(renew=self._copies)
        shadows = shadows | private.buffers.fresh(renew=evaluator.moves_buffers)
        reseed(batch.index)
        stack.callback(self._restore)
        # Not renewed for each batch unless it must be: a graph that is kept from one batch to the
        # next is found out by the leaves that both have.
        tensors = private.leaves.fresh(renew=evaluator.writes is True)
        stack.enter_context(evaluator.forward.replacing(shadows, tensors))
        return evaluator.forward.evaluate(
            dataclasses.replace(batch, data=data),
            tensors,
            self._within,
            outputs_only=self._outputs_only,
        )

    def _restore(self) -> None:
        self._wrote = self._guard.restore() or self._wrote

    def _check_graph(self, seen: Evaluated) -> None:
        """Look at the graph of a batch that is to be differentiated."""
        if self._derivatives == 2:
            self._evaluator.differentiation.examine([seen.output, seen.loss])
        differentiated = seen.output if self._outputs_only else seen.loss
        if self._derivatives and not any(t.requires_grad for t in tensors_in(differentiated)):
            raise LossNotScalarError(
                f"The loss of batch {seen.batch.index} does not depend on the selected "
                "parameters: unused, or the graph is cut by detach(), no_grad() or .data."
            )

    def _again(self, seen: Evaluated) -> Generator[Evaluated, None, None]:
        """Show a batch that was kept."""
        private = self._turn_to(self.point)
        try:
            shadows = private.others.fresh() | private.buffers.fresh()
            with self._evaluator.forward.replacing(shadows, seen.tensors):
                yield seen
        finally:
            self._guard.restore()

    def _value_of(self, piece: Batch) -> tuple[float, bool]:
        """Return the loss of a piece, and whether random numbers were drawn for it."""
        data = to_device(piece.data, self._evaluator.batches.device, duplicate=True)
        reseed(piece.index)
        before = read_random_state()
        with contextlib.ExitStack() as stack:
            value = float(self._run(piece, data, self._turn_to(self.point), stack).loss.detach())
        return value, read_random_state() != before

    def _turn_to(self, number: int) -> _Private:
        """Return the private tensors of a point, made when they are first needed."""
        if number not in self._private:
            if self._evaluator.writes is not False:
                self._private.clear()
            self._private[number] = _Private(
                self._evaluator,
                self._points[number],
                next(iter(self._kept.values()), None),
                differentiable=self._derivatives > 0,
            )
        return self._private[number]


class _Private:
    """The private tensors of one point."""

    def __init__(
        self, evaluator: Evaluator, point: Point, first: Evaluated | None, *, differentiable: bool
    ) -> None:
        self._point, self._evaluator = point, evaluator
        self.leaves = Copies(point.parameters)
        self.buffers = Copies(lambda: _clones(point.buffers))
        # Copies of the parameters are made only once a batch needs them.
        selected = self.leaves.fresh().keys() if first is None else first.tensors.keys()
        self.others = Copies(
            lambda: evaluator.other_parameters(selected, differentiable=differentiable)
        )

    def is_still(self) -> bool:
        """Return whether the buffers are what they were."""
        return same_tensors(self.buffers.present, dict(self._point.buffers))

    def has_moved(self) -> bool:
        """Return whether parameters are not what they were."""
        moved = not same_tensors(self.leaves.present, self._point.parameters())
        if moved:
            self.leaves.fresh(renew=True)
        others = self.others.present
        own = self._evaluator.own_parameters(others)
        # Only the values of copies count: they may require grad where these do not.
        return moved or not all(same_values(t, own[name]) for name, t in others.items())


class Copies:
    """Private tensors in place of a model's own, made again when a forward has written to them."""

    def __init__(self, make: Callable[[], dict[str, Tensor]]) -> None:
        self._make = make
        self.present: dict[str, Tensor] = {}
        self._versions: list[int] | None = None

    def fresh(self, *, renew: bool = False) -> dict[str, Tensor]:
        """Return the tensors, made now if there are none yet or with `renew`."""
        versions = [version(t) for t in self.present.values()]
        if renew or versions != self._versions:
            self.present = self._make()
            self._versions = [version(t) for t in self.present.values()]
        return self.present


class Tally:
    """The losses of the batches, or of their pieces, at one point."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._weights: list[float] = []
        self._indices: list[int] = []

    def add(self, batch: Batch, loss: Tensor, weight: float) -> None:
        """Add a batch's loss, left on the device, and its weight."""
        self._losses.append(loss)
        self._weights.append(weight)
        self._indices.append(batch.index)

    def mean(self, total_weight: float, *, check: bool) -> float:
        """Return Σ_b w_b ℓ_b over the total weight, in float64.

        Raises:
            NonFiniteError: a loss is not finite, and `check` is set.
        """
        # One transfer for all batches: reading each loss as it comes would stall a GPU.
        values = torch.stack(self._losses).cpu().double().tolist()
        for index, value in zip(self._indices, values, strict=True):
            if check and not math.isfinite(value):
                raise NonFiniteError(
                    f"The loss of batch {index} is {value}; look for NaN in that batch, a "
                    "diverged model, or a logarithm of zero in the loss."
                )
        return _sum([w * v for w, v in zip(self._weights, values, strict=True)]) / total_weight


def _sum(values: Sequence[float]) -> float:
    """Return the exact sum; fsum itself refuses infinities of both signs."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def _clones(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in tensors.items()}
