"""The weight of a batch: over how many terms its mean loss runs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ArgumentTypeError, NonFiniteError
from .nested import tensors_in

__all__ = ["check_weight", "count_terms", "example_count", "hides_labels", "is_sum"]


def example_count(data: Any) -> int | None:
    """Number of examples in a batch: the length its tensors share; None when they share none."""
    lengths = {t.shape[0] for t in tensors_in(data) if t.dim() > 0}
    return int(lengths.pop()) if len(lengths) == 1 else None


_CLASS_LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss)
_CLASS_FUNCTIONS = (F.cross_entropy, F.nll_loss)
_ELEMENT_LOSSES = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.PoissonNLLLoss,
    nn.SoftMarginLoss,
    nn.KLDivLoss,
    nn.HingeEmbeddingLoss,
)
_ELEMENT_FUNCTIONS = (
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.poisson_nll_loss,
    F.soft_margin_loss,
    F.kl_div,
    F.hinge_embedding_loss,
)
_FUNCTIONS = (*_CLASS_FUNCTIONS, *_ELEMENT_FUNCTIONS)


def _option(loss_fn: Any, name: str, default: Any) -> Any:
    """An option of a criterion: an attribute of a module, a keyword bound by `partial`."""
    if isinstance(loss_fn, functools.partial):
        return loss_fn.keywords.get(name, _option(loss_fn.func, name, default))
    return getattr(loss_fn, name, default) if isinstance(loss_fn, nn.Module) else default


def _function(loss_fn: Any) -> Any:
    while isinstance(loss_fn, functools.partial):
        loss_fn = loss_fn.func
    return loss_fn


def is_sum(loss_fn: Any) -> bool:
    """Whether the criterion adds up its terms instead of averaging them."""
    # size_average is how reduction was spelled once; the modules translate it themselves.
    if _option(loss_fn, "size_average", None) is False:
        return True
    return bool(_option(loss_fn, "reduction", "mean") == "sum")


def count_terms(loss_fn: Any, target: Any) -> float | None:
    """The weight w_b: over how many terms the criterion's mean runs for this target.

    Cross-entropy and NLL: the labels that are not `ignore_index`, each counted with its class
    weight. Element-wise criteria (MSE, BCE, …): the elements of the target. Anything else: the
    target's first dimension. None when the target does not tell.
    """
    function = _function(loss_fn)
    tensor = next(tensors_in(target), None)
    if tensor is None:
        return None
    if isinstance(function, _CLASS_LOSSES) or function in _CLASS_FUNCTIONS:
        if tensor.dtype.is_floating_point:
            return float(tensor.numel() // tensor.shape[1]) if tensor.dim() > 1 else 1.0
        kept = tensor != _option(loss_fn, "ignore_index", -100)
        weight = _option(loss_fn, "weight", None)
        if weight is None:
            return float(kept.sum().item())
        classes = weight.detach().double().cpu()
        return float(classes[tensor[kept].long().cpu()].sum().item())
    if isinstance(function, _ELEMENT_LOSSES) or function in _ELEMENT_FUNCTIONS:
        if _option(loss_fn, "reduction", "mean") == "batchmean":
            return float(tensor.shape[0])
        return float(tensor.numel())
    return float(tensor.shape[0]) if tensor.dim() > 0 else 1.0


def check_weight(value: Any, index: int) -> float:
    """A batch's weight as a float ≥ 0."""
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


def hides_labels(loss_fn: Any, data: Any, target: Any) -> bool:
    """Whether labels of −100 are in play that nobody has said how to count.

    Known criteria say it themselves; a function of the user's own, or a `batch_loss` (`loss_fn`
    None) on a batch with "labels", does not.
    """
    if loss_fn is None:
        labels = data.get("labels") if isinstance(data, Mapping) else None
    else:
        function = _function(loss_fn)
        known = function in _FUNCTIONS or isinstance(function, nn.modules.loss._Loss)
        labels = None if known else target
    if not isinstance(labels, Tensor) or labels.dtype.is_floating_point:
        return False
    return bool((labels == -100).any())
