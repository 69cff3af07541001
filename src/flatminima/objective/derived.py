"""Objectives made from another one: on groups of its examples, with its logits normalised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ..errors import InvalidArgumentError
from ..support.failures import explain_errors
from ..support.trees import count_examples, cut
from .batches import Batch, located
from .losses import known_loss
from .objective import Objective

__all__ = ["groups_of", "with_normalized_logits"]


def groups_of(call: str, objective: Objective, size: int) -> Iterator[Objective]:
    """Yield the objective on every `size` examples in turn, in the order of the data.

    What is left at the end is a smaller group. A group that spans batches is made of pieces of
    them, as the objective itself is made of batches. Groups without weight are passed over.

    Raises:
        InvalidArgumentError: a batch does not say where its examples are.
    """
    group: list[Batch] = []
    held = 0
    with objective.batches.reading() as stream:
        for batch in stream:
            count = count_examples(batch.data)
            if count is None:
                raise _uncuttable(call, batch, "its tensors differ in length")
            start = 0
            while start < count:
                end = min(count, start + size - held)
                data = batch.data
                try:
                    data = data if end - start == count else cut(data, start, end, count)
                except ValueError as error:
                    raise _uncuttable(call, batch, str(error)) from error
                with located(batch.index), explain_errors(batch.index, objective.device):
                    weight = objective.weigh(data, batch.index)
                group.append(Batch(batch.index, data, weight, start))
                held, start = held + end - start, end
                if held == size:
                    yield from _weighty(objective, group)
                    group, held = [], 0
    yield from _weighty(objective, group)


def _weighty(objective: Objective, group: list[Batch]) -> Iterator[Objective]:
    if sum(batch.weight for batch in group) > 0:
        yield objective.replaced(batches=group)


def _uncuttable(call: str, batch: Batch, why: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{call}(m=...) cuts the data into groups of m examples, and batch {batch.index} cannot be "
        f"cut: {why}. Make an Objective of each group, and take the mean yourself."
    )


def with_normalized_logits(call: str, objective: Objective) -> Objective:
    """Return the objective with the logits f of each example replaced by f / s.

    s is the standard deviation of the example's own logits about their mean, with the number of
    classes in the denominator (Andriushchenko et al. 2023, arXiv:2302.07011, section 3).

    Raises:
        InvalidArgumentError: the loss is not a cross-entropy.
    """
    loss_fn = objective.loss_fn
    row = known_loss(loss_fn)
    if loss_fn is None or row is None or row.hessian != "softmax":
        raise InvalidArgumentError(
            f"The 'normalize_logits' argument of {call} is for loss_fn=CrossEntropyLoss on logits; "
            f"the loss of this objective is {_name(objective.criterion)}. Leave it out."
        )
    return objective.replaced(loss_fn=_OnNormalizedLogits(loss_fn))


class _OnNormalizedLogits(nn.Module):
    """A module, so that a criterion within it is guarded like one by itself."""

    def __init__(self, loss_fn: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.loss_fn = loss_fn

    def forward(self, output: Tensor, target: Any) -> Tensor:
        """Return the loss."""
        axis = 1 if output.dim() > 1 else 0
        spread = output.std(dim=axis, correction=0, keepdim=True)
        # Equal logits have no scale; they stay as they are.
        return self.loss_fn(output / spread.where(spread > 0, 1), target)


def _name(criterion: object) -> str:
    name = getattr(criterion, "__name__", None)
    return str(name or type(criterion).__name__)
