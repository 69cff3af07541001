"""One call of the model: the loss of a batch at replaced tensors."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..derivatives.torch_private import replaced_tensors
from ..errors import ArgumentTypeError, LossNotScalarError
from ..support.trees import map_tensors
from .batches import Batch
from .losses import has_closed_form
from .weights import split_pair

__all__ = ["Evaluated", "Forward", "Within"]


@dataclasses.dataclass
class Evaluated:
    """One evaluated batch, shown while the replaced tensors are in the module."""

    batch: Batch
    loss: Tensor
    """ℓ_b, a scalar with its graph; without it where only the output is differentiated."""
    output: Any
    """Of the model; it and the target are None under `batch_loss`."""
    target: Any
    tensors: dict[str, Tensor]
    """The parameters that the loss was computed with."""

    def release(self) -> None:
        """Let the graph go, which would outlive its batch wherever this is still referred to."""
        self.loss = self.loss.detach()
        self.output = self.target = None


Within = Callable[[], AbstractContextManager[object]]
"""Makes what is entered while the model and its loss are computed."""


class Forward:
    """The model and its loss, as a function of the tensors in the model.

    The tensors are replaced inside the model itself, so that a `batch_loss` that calls
    `model.encoder(...)` or reads `model.weight` sees the replaced ones too, and so does activation
    checkpointing, which runs parts of the model again during the derivative.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Any] | None,
        batch_loss: Callable[[nn.Module, Any], Any] | None,
    ) -> None:
        self.model = model
        self.functions = (loss_fn, batch_loss)

    @property
    def criterion(self) -> object:
        """The loss function, of whichever kind it is."""
        return self.functions[1] if self.functions[0] is None else self.functions[0]

    @contextlib.contextmanager
    def replacing(
        self, others: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
    ) -> Iterator[None]:
        """Put these tensors into the model, tied ones in all their places, for a while."""
        with replaced_tensors(self.model, {**others, **parameters}):
            yield

    def evaluate(
        self,
        batch: Batch,
        parameters: dict[str, Tensor],
        within: Within = contextlib.nullcontext,
        *,
        outputs_only: bool = False,
    ) -> Evaluated:
        """Evaluate the batch with the tensors that are in the model now.

        Args:
            batch: on the device.
            parameters: those that are in the model, for `Evaluated.tensors`.
            within: entered meanwhile.
            outputs_only: leave the loss without a graph.
        """
        with within():
            return self._run(batch, parameters, outputs_only=outputs_only)

    def _run(
        self, batch: Batch, parameters: dict[str, Tensor], *, outputs_only: bool = False
    ) -> Evaluated:
        loss_fn, batch_loss = self.functions
        output: Any = None
        target: Any = None
        if batch_loss is not None:
            loss = batch_loss(self.model, batch.data)
        else:
            assert loss_fn is not None
            inputs, target = split_pair(batch.data, batch.index)
            try:
                output = self.model(inputs)
                if not outputs_only:
                    loss = loss_fn(output, target)
                elif has_closed_form(loss_fn):
                    with torch.no_grad():
                        loss = loss_fn(output, target)
                else:
                    # A copy: the loss function may write to its argument.
                    loss = loss_fn(map_tensors(output, torch.clone), target)
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
