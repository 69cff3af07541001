"""One batch at a time: the loss at replaced parameters, by a module that stays as it was."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .batches import Batch, Batches, available_bytes, located
from .errors import ArgumentTypeError, LossNotScalarError, NonFiniteError
from .failures import explained
from .guards import Derivatives, evaluating
from .nested import same_tensors, to_device
from .pieces import Pieces
from .randomness import preserved_random_state, random_state, reseed
from .weights import split_pair

__all__ = ["Evaluated", "Evaluator", "LossOf", "Prepare"]

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
    prepared: Any = None
    """What was made by `prepare` in place of the graph of the loss, which then has none."""


LossOf = Callable[[dict[str, Tensor], dict[str, Tensor], Any], Tensor]
"""(parameters, other parameters and buffers, data of a batch) → ℓ_b with its graph."""

Prepare = Callable[[Batch, LossOf, dict[str, Tensor], dict[str, Tensor]], Evaluated]
"""Evaluates a batch in another way than by running it forward, given all that this needs."""


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
        prepare: Prepare | None = None,
    ) -> float:
        """Σ_b w_b ℓ_b / Σ_b w_b in float64; NaN when some batches are kept, as it is known then.

        Args:
            parameters: makes private tensors to evaluate with, by name; the model's other
                parameters are taken as they are, without a graph.
            buffers: to evaluate with, of which copies are used.
            visit: is shown each batch.
            check: raise for a loss that is not finite.
            derivatives: how many `visit` takes.
            kept: batches that were evaluated before, by number: these are shown to `visit` once
                more, with the tensors in the module that it had then, instead of run forward.
            prepare: evaluates the other batches.
        """
        kept = kept or {}
        losses: list[Tensor] = []
        weights: list[float] = []
        indices: list[int] = []
        watching = self._writes is None
        wrote = False
        still: list[bool] = []
        copies = self._writes is not False
        criterion = self._forward.criterion
        with evaluating(self.model, criterion, self.mode, derivatives, copies=copies) as guard:
            leaves = _Copies(parameters)
            others = _Copies(lambda: self._others(selected, differentiable=derivatives > 0))
            private = _Copies(lambda: {n: b.detach().clone() for n, b in buffers.items()})
            first = next(iter(kept.values()), None)
            # Copies of the parameters are made only once a batch needs them.
            selected = leaves.fresh().keys() if first is None else first.tensors.keys()

            def forward(batch: Batch, data: Any, show: Callable[[Evaluated], None]) -> Tensor:
                nonlocal wrote
                shadows = others.fresh(renew=copies) | private.fresh(renew=self._moving_buffers)
                reseed(batch.index)
                try:
                    own = dataclasses.replace(batch, data=data)
                    # Not renewed for each batch unless it must be: a graph that is kept from one
                    # batch to the next is found out by the leaves that both have.
                    tensors = leaves.fresh(renew=self._writes is True)
                    if prepare is None:
                        return self._forward.evaluate(own, shadows, tensors, show)
                    seen = prepare(own, self._forward.loss_of(own), tensors, shadows)
                    show(seen)
                    return seen.loss
                finally:
                    wrote = guard.restore() or wrote

            def replay(seen: Evaluated) -> None:
                try:
                    shadows = others.fresh() | private.fresh()
                    self._forward.replaced(lambda: visit(seen), shadows, seen.tensors)
                finally:
                    guard.restore()

            def evaluate(batch: Batch) -> None:
                nonlocal wrote
                data = batch.data
                if copies:
                    data = to_device(data, self.batches.device, duplicate=True)
                losses.append(forward(batch, data, visit))
                weights.append(1.0 if self.is_sum else batch.weight)
                indices.append(batch.index)
                if watching:
                    still.append(same_tensors(private.present, dict(buffers)))
                    moved = not same_tensors(leaves.present, parameters())
                    if moved:
                        leaves.fresh(renew=True)
                    wrote = (
                        wrote
                        or moved
                        or not (
                            same_tensors(data, batch.data)
                            and same_tensors(others.present, self._own(others.present))
                        )
                    )

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
                        self.pieces.each(batch, evaluate)
        if watching:
            self._writes, self._moving_buffers = wrote, not all(still)
        if kept:
            return math.nan
        # One transfer for all batches: reading each loss as it comes would stall a GPU.
        values = torch.stack(losses).cpu().double().tolist()
        for index, value in zip(indices, values, strict=True):
            if check and not math.isfinite(value):
                raise NonFiniteError(
                    f"The loss of batch {index} is {value}; look for NaN in that batch, a "
                    "diverged model, or a logarithm of zero in the loss."
                )
        return _sum([w * v for w, v in zip(weights, values, strict=True)]) / (
            self.batches.total_weight
        )

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


class _Copies:
    """Private tensors in place of a model's own, made again when a forward has written to them."""

    def __init__(self, make: Callable[[], dict[str, Tensor]]) -> None:
        self._make = make
        self.present: dict[str, Tensor] = {}
        self._versions: list[int] | None = None

    def fresh(self, *, renew: bool = False) -> dict[str, Tensor]:
        versions = [t._version for t in self.present.values()]
        if renew or versions != self._versions:
            self.present = self._make()
            self._versions = [t._version for t in self.present.values()]
        return self.present


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

        return self.replaced(run, others, parameters)

    def loss_of(self, batch: Batch) -> LossOf:
        """The loss as a function of tensors, to be traced."""

        def loss(parameters: dict[str, Tensor], others: dict[str, Tensor], data: Any) -> Tensor:
            own = dataclasses.replace(batch, data=data)
            return self.replaced(lambda: self._run(own, parameters).loss, others, parameters)

        return loss

    def replaced(
        self, run: Callable[[], R], others: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
    ) -> R:
        """Run something with these tensors in the model."""
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


def _sum(values: Sequence[float]) -> float:
    """The exact sum; fsum itself refuses infinities of both signs."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
