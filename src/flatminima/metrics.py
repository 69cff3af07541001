"""Metrics of a model's output beside its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ArgumentTypeError, InvalidArgumentError, LossNotScalarError, ShapeError
from .weights import criterion_function, example_count

__all__ = ["Metric", "accuracy", "classification_error", "label_count", "metric_value"]

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
    """The fraction of the labels that the largest output does not name: 1 − `accuracy`.

    Args:
        call: for messages.
        loss_fn: of the objective; its targets must be classes.

    Raises:
        InvalidArgumentError: from the metric itself, the targets are not classes.
    """
    regresses = isinstance(criterion_function(loss_fn), _REGRESSIONS)
    regresses = regresses or criterion_function(loss_fn) in _REGRESSION_FUNCTIONS

    def error(output: Any, target: Any) -> Tensor:
        why = ""
        if not (isinstance(output, Tensor) and isinstance(target, Tensor)):
            why = f"the model returns a {type(output).__name__}, not a tensor of class scores"
        elif not _are_classes(output, target, regresses=regresses):
            why = f"targets {tuple(target.shape)} of {target.dtype} hold values that are no classes"
        if why:
            raise InvalidArgumentError(
                f"{call}(on='error') counts wrong classes, and this model is no classifier: {why}. "
                "Use on='loss'."
            )
        return 1 - accuracy(output, target)

    return error


_REGRESSIONS = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.PoissonNLLLoss,
    nn.GaussianNLLLoss,
)
_REGRESSION_FUNCTIONS = (
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.poisson_nll_loss,
    F.gaussian_nll_loss,
)


def _are_classes(output: Tensor, target: Tensor, *, regresses: bool) -> bool:
    """Whether targets name classes: labels, or for each example its classes' probabilities."""
    single = output.dim() < 2 or output.shape[1] == 1
    kept = target[target != -100]
    if single:
        # One number for each example is as a rule a regression; a logit has labels of 0 and 1.
        within = bool(((kept >= 0) & (kept <= 1)).all())
        return output.numel() == target.numel() and within and not regresses
    if not target.dtype.is_floating_point:
        return True
    if target.shape != output.shape:
        return False
    adds_up = (target.sum(dim=1) - 1).abs() <= 1e-3
    return bool((target >= 0).all()) and bool(adds_up.all())


def metric_value(name: str, value: Any) -> float:
    """What the metric `name` gave, as a float."""
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
    """Labels ≠ −100 of integer targets, examples of others; None when they do not tell."""
    if isinstance(target, Tensor) and not target.dtype.is_floating_point:
        return float((target != -100).sum().item())
    return example_count(target)
