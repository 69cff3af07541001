"""The weight of a batch: over how many terms its mean loss runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..derivatives.torch_private import LOSS
from ..errors import ArgumentTypeError, InvalidArgumentError, NonFiniteError
from ..support.trees import tensors_in
from .losses import criterion_function, criterion_option, known_loss

__all__ = ["BatchWeight", "example_count", "example_weights", "split_pair", "token_weight"]


def token_weight(
    *, shift: bool = False, ignore_index: int = -100, labels: str | int | None = None
) -> Callable[[Any], int]:
    """Return a `weight=` that counts the labels over which a mean token loss runs.

    A language model's loss averages over the tokens that have a label, so batches must count by
    these and not by their sequences, or short batches and padding get too much weight.

    Args:
        shift: whether the model predicts the next token from labels that lie like its input, as
            the causal models of Hugging Face do: the first label of each sequence is then used
            by none. Encoder–decoders (T5) and classifiers do not shift.
        ignore_index: the label that is left out of the mean.
        labels: where a batch has its labels: a key, an attribute or a position. Default: "labels"
            if there are such, and 1 in tuples.

    Returns:
        `batch -> int`, for `Objective(weight=...)`.

    Raises:
        InvalidArgumentError: when called on a batch without such labels.

    Examples:
        >>> import torch, flatminima as fm
        >>> batch = {"labels": torch.tensor([[5, 6, 7, -100], [8, 9, -100, -100]])}
        >>> fm.token_weight()(batch), fm.token_weight(shift=True)(batch)
        (5, 3)
    """

    def weight(batch: Any) -> int:
        place = _labels_place(batch) if labels is None else labels
        found = _integer_labels(batch, place)
        if found is None:
            raise InvalidArgumentError(
                f"token_weight finds no integer labels at {place!r} of a {type(batch).__name__}; "
                "say where they are with labels=."
            )
        used = found[..., 1:] if shift else found
        return int((used != ignore_index).sum().item())

    return weight


def _lengths(data: Any) -> str:
    lengths = [str(t.shape[0]) for t in tensors_in(data) if t.dim() > 0]
    return f"tensors of lengths {', '.join(lengths)}" if lengths else "no tensor in it"


def _labels_place(batch: Any) -> str | int:
    return "labels" if isinstance(batch, Mapping) or hasattr(batch, "labels") else 1


def _integer_labels(batch: Any, place: str | int) -> Tensor | None:
    if isinstance(batch, Tensor):
        return None
    try:
        found = batch[place]
    except (LookupError, TypeError):
        found = getattr(batch, str(place), None)
    return found if isinstance(found, Tensor) and not found.dtype.is_floating_point else None


def example_count(data: Any) -> int | None:
    """Number of examples in a batch: the length its tensors share; None when they share none."""
    lengths = {t.shape[0] for t in tensors_in(data) if t.dim() > 0}
    return int(lengths.pop()) if len(lengths) == 1 else None


def _count_terms(loss_fn: Any, target: Any) -> float | None:
    """Return the weight w_b: over how many terms the criterion's mean runs for this target.

    Cross-entropy and NLL: the labels that are not `ignore_index`, each counted with its class
    weight. Element-wise criteria (MSE, BCE, …): the elements of the target. Anything else: the
    target's first dimension. None when the target does not tell.
    """
    row = known_loss(loss_fn)
    terms = "examples" if row is None else row.terms
    tensor = next(tensors_in(target), None)
    if tensor is None:
        return None
    if terms == "labels":
        if tensor.dtype.is_floating_point:
            return float(tensor.numel() // tensor.shape[1]) if tensor.dim() > 1 else 1.0
        kept = tensor != criterion_option(loss_fn, "ignore_index", -100)
        weight = criterion_option(loss_fn, "weight", None)
        if weight is None:
            return float(kept.sum().item())
        classes = weight.detach().double().cpu()
        return float(classes[tensor[kept].long().cpu()].sum().item())
    if terms == "elements":
        if criterion_option(loss_fn, "reduction", "mean") == "batchmean":
            return float(tensor.shape[0])
        return float(tensor.numel())
    return float(tensor.shape[0]) if tensor.dim() > 0 else 1.0


def example_weights(loss_fn: Any, target: Any) -> Tensor | None:
    """Return the weight w_i of each example of a batch, over how many terms its own mean loss runs.

    The batch's weight in parts, shape (examples,); None when the target does not tell.
    """
    row = known_loss(loss_fn)
    tensor = next(tensors_in(target), None)
    if tensor is None:
        return None
    if tensor.dim() == 0:
        tensor = tensor.unsqueeze(0)
    ones = torch.ones(len(tensor), dtype=torch.float64, device=tensor.device)
    if row is not None and row.terms == "labels" and not tensor.dtype.is_floating_point:
        used = tensor != criterion_option(loss_fn, "ignore_index", -100)
        weight = criterion_option(loss_fn, "weight", None)
        own = used.double()
        if weight is not None:
            classes = weight.detach().to(tensor.device, torch.float64)
            own = own * classes[torch.where(used, tensor, 0).long()]
        found: Tensor = own.reshape(len(tensor), -1).sum(1)
        return found
    total = _count_terms(loss_fn, target)
    return None if total is None else ones * (total / max(1, len(tensor)))


def _check_weight(value: Any, index: int) -> float:
    """Return a batch's weight as a float ≥ 0."""
    try:
        number = float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(
            f"weight= gave {value!r} for batch {index}; a weight is one number."
        ) from error
    if not np.isfinite(number) or number < 0:
        raise NonFiniteError(
            f"weight= gave {number} for batch {index}; a weight is finite and ≥ 0."
        )
    return number


def split_pair(data: Any, index: int) -> tuple[Any, Any]:
    """Return a batch as (input, target).

    Raises:
        ArgumentTypeError: it is none.
    """
    if isinstance(data, (tuple, list)) and len(data) == 2:
        return data[0], data[1]
    length = f" of {len(data)}" if isinstance(data, (tuple, list)) else ""
    raise ArgumentTypeError(
        f"Batch {index} is a {type(data).__name__}{length}, and loss_fn needs (input, target) "
        "pairs; say what to do with it by batch_loss=lambda model, batch: ... in place of "
        "loss_fn. (Two tensors with all inputs and all targets go into a tuple, not a list.)"
    )


class BatchWeight:
    """The weight w_b of a batch: as the user says, or over how many terms its mean loss runs.

    Args:
        loss_fn: as in `Objective`.
        weight: as in `Objective`.
    """

    def __init__(
        self, loss_fn: Callable[[Any, Any], Any] | None, weight: Callable[[Any], Any] | None
    ) -> None:
        self._loss_fn, self._weight = loss_fn, weight
        self._labels_shape: tuple[int, ...] | None = None

    def __call__(self, data: Any, index: int) -> float:
        """The weight of the batch `data`, number `index`.

        Raises:
            InvalidArgumentError: the batch does not tell.
        """
        if self._weight is not None:
            return _check_weight(self._weight(data), index)
        target = None if self._loss_fn is None else split_pair(data, index)[1]
        self._check_labels(data, target, index)
        count = (
            example_count(data) if self._loss_fn is None else _count_terms(self._loss_fn, target)
        )
        if count is None:
            raise InvalidArgumentError(
                f"Batch {index} does not tell how many examples it holds ({_lengths(data)}). If "
                "that is meant, give weight=lambda batch: number of terms that the batch's mean "
                "loss averages over."
            )
        return float(count)

    def _check_labels(self, data: Any, target: Any, index: int) -> None:
        """Refuse token labels whose number is given neither by the user nor by the examples."""
        advice = (
            "so it does not count by its examples; give weight=fm.token_weight(), or "
            "fm.token_weight(shift=True) where the model shifts its labels, as causal language "
            "models do."
        )
        if _hides_labels(self._loss_fn, data, target):
            raise InvalidArgumentError(
                f"Batch {index} has labels of −100, which a mean loss leaves out, {advice}"
            )
        labels = _token_labels(data) if self._loss_fn is None else None
        if labels is not None:
            shape = tuple(labels.shape[1:])
            if self._labels_shape not in (None, shape):
                raise InvalidArgumentError(
                    f"Batch {index} has labels of another length than the batch before "
                    f"({shape} instead of {self._labels_shape}), {advice}"
                )
            self._labels_shape = shape


def _hides_labels(loss_fn: Any, data: Any, target: Any) -> bool:
    """Return whether labels of −100 are in play that nobody has said how to count.

    Known criteria say it themselves; a function of the user's own, or a `batch_loss` (`loss_fn`
    None) on a batch with labels, does not.
    """
    if loss_fn is None:
        labels = _integer_labels(data, _labels_place(data))
    else:
        criterion = isinstance(criterion_function(loss_fn), LOSS)
        labels = None if criterion or known_loss(loss_fn) is not None else target
    if not isinstance(labels, Tensor) or labels.dtype.is_floating_point:
        return False
    return bool((labels == -100).any())


def _token_labels(data: Any) -> Tensor | None:
    """Return the integer "labels" of a mapping when each example has several of them."""
    labels = _integer_labels(data, "labels") if isinstance(data, Mapping) else None
    return None if labels is None or labels.dim() < 2 else labels
