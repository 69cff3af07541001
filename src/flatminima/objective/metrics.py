"""Metrics of a model's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import ArgumentTypeError, InvalidArgumentError, LossNotScalarError, ShapeError
from .losses import criterion_option, known_loss
from .weights import example_count

__all__ = ["Metric", "accuracy", "classification_error", "label_count", "metric_value"]

Metric = Callable[[Any, Any], "Tensor | float"]
"""`metric(output, target)` → its mean over the batch's examples (or labels ≠ −100)."""


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Return the fraction of the labels that the largest output names.

    Args:
        output: class scores, shape (N, C) or (N, C, d₁, …); a single column is a binary logit.
        target: labels, shape (N,) or (N, d₁, …); labels of −100 are left out. Floating-point
            targets of the output's shape are read as class probabilities.

    Returns:
        A scalar tensor in [0, 1].

    Raises:
        ShapeError: the labels do not fit the scores.

    Examples:
        >>> import torch, flatminima as fm
        >>> scores = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]])
        >>> round(fm.accuracy(scores, torch.tensor([0, 1, 1])).item(), 4)
        0.6667
    """
    binary = output.dim() == 1 or output.shape[1] == 1
    if binary and target.numel() == output.numel():
        # One logit for each example: labels of 0 and 1, or their probabilities.
        flat = target.reshape(output.shape)
        kept = flat != -100
        return ((output > 0) == (flat > 0.5))[kept].double().mean()
    if target.dtype.is_floating_point and target.shape == output.shape:
        target = target.argmax(dim=1)
    if target.dim() == output.dim() and target.shape[1] == 1:
        target = target.squeeze(1)
    wanted = output.shape[:1] + output.shape[2:]
    if output.dim() < 2 or target.dtype.is_floating_point or target.shape != wanted:
        raise ShapeError(
            f"accuracy takes scores (N, C, ...) and labels (N, ...); got {tuple(output.shape)} "
            f"and {tuple(target.shape)} of {target.dtype}."
        )
    hits: Tensor = (output.argmax(dim=1) == target)[target != -100]
    return hits.double().mean()


def classification_error(call: str, loss_fn: Any) -> Metric:
    """Return the fraction of the labels that the largest output does not name: 1 − `accuracy`.

    Args:
        call: for messages.
        loss_fn: of the objective; its targets must be classes.

    Raises:
        InvalidArgumentError: from the metric itself, the targets are not classes.
    """
    return _ClassificationError(call, loss_fn)


class _ClassificationError:
    def __init__(self, call: str, loss_fn: Any) -> None:
        row = known_loss(loss_fn)
        self._call, self._targets = call, None if row is None else row.targets
        self._ignored = criterion_option(loss_fn, "ignore_index", -100)

    @property
    def _is_binary(self) -> bool:
        return self._targets in ("logits", "probabilities")

    def __call__(self, output: Any, target: Any) -> Tensor:
        """1 − accuracy over the labels that count."""
        if not (isinstance(output, Tensor) and isinstance(target, Tensor)):
            self._refuse(f"the model returns a {type(output).__name__}, not one tensor of scores")
        shapes = f"outputs {tuple(output.shape)} and targets {tuple(target.shape)}"
        single = output.dim() < 2 or output.shape[1] == 1
        wanted = output.shape[:1] + output.shape[2:]
        if self._targets == "numbers" and (single or not _sum_to_one(output, target)):
            self._refuse("its loss is that of a regression")
        if single:
            kept = target[target != -100]
            # A number for each example is usually a regression; labels of a logit are 0 and 1.
            labels = bool(((kept == 0) | (kept == 1)).all())
            if output.numel() != target.numel() or not (labels or self._is_binary):
                self._refuse(f"{shapes} of {target.dtype} hold values that are no two classes")
            return 1 - accuracy(
                output - 0.5 if self._targets == "probabilities" else output, target
            )
        if target.dtype.is_floating_point:
            if not _sum_to_one(output, target):
                self._refuse(f"{shapes} of {target.dtype} hold values that are no classes")
        elif target.shape not in (wanted, (wanted[0], 1, *wanted[1:])):
            self._refuse(f"{shapes} are not scores (N, C, …) and labels (N, …)")
        return 1 - accuracy(output, self._known(target))

    def count(self, target: Any) -> float | None:
        """Return the number of labels that count."""
        return label_count(self._known(target) if isinstance(target, Tensor) else target)

    def _known(self, target: Tensor) -> Tensor:
        """Return labels with −100 where the criterion ignores them."""
        if target.dtype.is_floating_point:
            return target
        return torch.where(target == self._ignored, -100, target)

    def _refuse(self, why: str) -> NoReturn:
        raise InvalidArgumentError(
            f"{self._call}(on='error') counts wrong classes, and this model is no classifier: "
            f"{why}. Use on='loss'."
        )


def _sum_to_one(output: Tensor, target: Tensor) -> bool:
    """Return whether targets are for each example the probabilities of its classes."""
    if not target.dtype.is_floating_point or target.shape != output.shape:
        return False
    adds_up = (target.sum(dim=1) - 1).abs() <= 1e-3
    return bool((target >= 0).all()) and bool(adds_up.all())


def metric_value(name: str, value: Any) -> float:
    """Return what the metric `name` gave, as a float."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise LossNotScalarError(
            f"The metric {name!r} gave shape {tuple(value.shape)}, not one value; return its mean "
            "over the batch."
        )
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(f"The metric {name!r} gave {value!r}, not a number.") from error


def label_count(target: Any) -> float | None:
    """Return the number of labels ≠ −100, or of examples; None where the target does not tell."""
    if isinstance(target, Tensor) and not target.dtype.is_floating_point:
        return float((target != -100).sum().item())
    return example_count(target)
