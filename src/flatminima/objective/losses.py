"""What is known of a loss: what its mean runs over, its targets, its Hessian, its likelihood."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import torch.nn.functional as F
from torch import nn

from ..derivatives.torch_private import LOSS, has_backward_hooks, has_own_forward

__all__ = [
    "KnownLoss",
    "criterion_function",
    "criterion_option",
    "has_closed_form",
    "is_known",
    "is_sum",
    "is_unchanged",
    "known_loss",
    "pytorch_loss",
]


@dataclasses.dataclass(frozen=True)
class KnownLoss:
    """One row of the table: a criterion of PyTorch, as a module and as a function."""

    module: type[nn.Module]
    function: Callable[..., Any]
    terms: Literal["labels", "elements", "examples"]
    """What its mean runs over: labels that are not ignored, each with its class weight; elements
    of the target; or entries of the target's first dimension."""
    targets: Literal["classes", "logits", "probabilities", "numbers"] | None = None
    """What outputs and targets say: scores of classes, logits or probabilities of two classes,
    or the numbers of a regression; None where any of these may be."""
    hessian: Literal["softmax", "squared", "logistic"] | None = None
    """The closed form of its Hessian by the outputs."""
    likelihood: Literal["softmax", "log_probabilities", "normal", "logistic"] | None = None
    """The distribution of the targets that it is the negative logarithm of."""


LOSSES = (
    KnownLoss(nn.CrossEntropyLoss, F.cross_entropy, "labels", "classes", "softmax", "softmax"),
    KnownLoss(nn.NLLLoss, F.nll_loss, "labels", "classes", None, "log_probabilities"),
    KnownLoss(nn.MSELoss, F.mse_loss, "elements", "numbers", "squared", "normal"),
    KnownLoss(
        nn.BCEWithLogitsLoss,
        F.binary_cross_entropy_with_logits,
        "elements",
        "logits",
        "logistic",
        "logistic",
    ),
    KnownLoss(nn.BCELoss, F.binary_cross_entropy, "elements", "probabilities"),
    KnownLoss(nn.L1Loss, F.l1_loss, "elements", "numbers"),
    KnownLoss(nn.SmoothL1Loss, F.smooth_l1_loss, "elements", "numbers"),
    KnownLoss(nn.HuberLoss, F.huber_loss, "elements", "numbers"),
    KnownLoss(nn.PoissonNLLLoss, F.poisson_nll_loss, "elements", "numbers"),
    KnownLoss(nn.GaussianNLLLoss, F.gaussian_nll_loss, "examples", "numbers"),
    KnownLoss(nn.SoftMarginLoss, F.soft_margin_loss, "elements"),
    KnownLoss(nn.KLDivLoss, F.kl_div, "elements"),
    KnownLoss(nn.HingeEmbeddingLoss, F.hinge_embedding_loss, "elements"),
)


def criterion_option(loss_fn: Any, name: str, default: Any) -> Any:
    """Return an option of a criterion: an attribute of a module, a keyword bound by `partial`."""
    if isinstance(loss_fn, functools.partial):
        return loss_fn.keywords.get(name, criterion_option(loss_fn.func, name, default))
    return getattr(loss_fn, name, default) if isinstance(loss_fn, nn.Module) else default


def criterion_function(loss_fn: Any) -> Any:
    """Return the criterion inside of `functools.partial`."""
    while isinstance(loss_fn, functools.partial):
        loss_fn = loss_fn.func
    return loss_fn


def known_loss(loss_fn: Any) -> KnownLoss | None:
    """Return the row of a criterion, or of the one that its class derives from."""
    function = criterion_function(loss_fn)
    rows = (r for r in LOSSES if isinstance(function, r.module) or function is r.function)
    return next(rows, None)


def pytorch_loss(loss_fn: Any) -> KnownLoss | None:
    """Return the row of a criterion that is PyTorch's own: no subclass, hook or other forward."""
    row, function = known_loss(loss_fn), criterion_function(loss_fn)
    if row is None or not is_unchanged(loss_fn):
        return None
    return row if type(function) is row.module or function is row.function else None


def is_unchanged(loss_fn: Any) -> bool:
    """Whether calling it does what its class or function says: no hook, no other forward."""
    if isinstance(loss_fn, functools.partial) and loss_fn.args:
        return False
    function = criterion_function(loss_fn)
    if not isinstance(function, nn.Module):
        return True
    return not has_own_forward(function) and not has_backward_hooks(function)


def is_known(loss_fn: Any) -> bool:
    """Return whether it is one of PyTorch's criteria, unchanged."""
    function = criterion_function(loss_fn)
    module = isinstance(function, LOSS) and type(function).__module__.startswith("torch.")
    return is_unchanged(loss_fn) and (module or any(function is r.function for r in LOSSES))


def has_closed_form(loss_fn: Any) -> bool:
    """Return whether its Hessian by the outputs is known without differentiating."""
    row = pytorch_loss(loss_fn)
    return row is not None and row.hessian is not None


def is_sum(loss_fn: Any) -> bool:
    """Return whether the criterion adds up its terms instead of averaging them."""
    # size_average is how reduction was spelled once; the modules translate it themselves.
    if criterion_option(loss_fn, "size_average", None) is False:
        return True
    return bool(criterion_option(loss_fn, "reduction", "mean") == "sum")
