"""Metrics of a model's output beside its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .errors import LossNotScalarError
from .weights import example_count

__all__ = ["Metric", "accuracy", "label_count", "metric_value"]

Metric = Callable[[Any, Any], "Tensor | float"]
"""`metric(output, target)` → its mean over the batch's examples (or labels ≠ −100)."""


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Fraction of the labels that the largest output names.

    Args:
        output: class scores, shape (N, C) or (N, C, d₁, …); a single column is a binary logit.
        target: labels, shape (N,) or (N, d₁, …); labels of −100 are left out. Floating-point
            targets of the output's shape are read as class probabilities.

    Returns:
        A scalar tensor in [0, 1].

    Examples:
        >>> import torch, flatminima as fm
        >>> scores = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]])
        >>> round(fm.accuracy(scores, torch.tensor([0, 1, 1])).item(), 4)
        0.6667
    """
    if target.dtype.is_floating_point and target.shape == output.shape and output.dim() > 1:
        if output.shape[1] > 1:
            target = target.argmax(dim=1)
        else:
            return ((output > 0) == (target > 0.5)).double().mean()
    if output.dim() == target.dim():
        return ((output > 0) == (target > 0.5)).double().mean()
    kept = target != -100
    guess = (output[:, 0] > 0).to(target.dtype) if output.shape[1] == 1 else output.argmax(dim=1)
    hits: Tensor = (guess == target)[kept]
    return hits.double().mean()


def metric_value(name: str, value: Any) -> float:
    """What the metric `name` gave, as a float."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise LossNotScalarError(
            f"The metric {name!r} gave shape {tuple(value.shape)}, not one value; return its mean "
            "over the batch."
        )
    return float(value.detach() if isinstance(value, Tensor) else value)


def label_count(target: Any) -> float | None:
    """Labels ≠ −100 of integer targets, examples of others; None when they do not tell."""
    if isinstance(target, Tensor) and not target.dtype.is_floating_point:
        return float((target != -100).sum().item())
    return example_count(target)
