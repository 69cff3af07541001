"""The Hessian of a loss by the model's outputs, in closed form or by differentiating twice."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...derivatives.hand_written import is_marked
from ...derivatives.missing import not_twice
from ...derivatives.tracing import GraphTrace
from ...errors import ArgumentTypeError
from ...objective.losses import criterion_option, is_sum, pytorch_loss
from ...support.trees import map_tensors, tensors_in

__all__ = [
    "Diagonal",
    "Logistic",
    "LossHessian",
    "OutputMatrix",
    "Softmax",
    "closed_form",
    "label_coefficients",
    "lacks",
    "loss_gradient",
    "loss_hessian",
    "outputs_at",
    "patternless",
    "places_in",
]

CHUNK = 2**20
"""Elements of an output that are worked on at once."""

Outputs = Sequence[Tensor]


def places_in(output: Any) -> list[int]:
    """Return where, among all the tensors of a model's output, those with a graph are.

    Raises:
        ArgumentTypeError: some are within objects that are not followed.
    """
    found: list[int] = []
    tensors = _every(output)
    followed = {id(t) for t in tensors}
    if any(t.requires_grad and id(t) not in followed for t in tensors_in(output)):
        raise ArgumentTypeError(
            f"The model's output, a {type(output).__name__}, holds tensors within objects that "
            "are not looked into for a matrix of its outputs. Let the model return a tensor, or "
            "tensors in a tuple, list, dict or dataclass."
        )
    for place, tensor in enumerate(tensors):
        if tensor.requires_grad and all(tensor is not tensors[p] for p in found):
            found.append(place)
    return found


def outputs_at(output: Any, places: Sequence[int]) -> list[Tensor]:
    """Return the tensors at some places of a model's output."""
    tensors = _every(output)
    return [tensors[place] for place in places]


def patternless(tensor: Tensor) -> Tensor:
    """Return numbers without a pattern, like a tensor."""
    steps = torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device)
    return torch.cos(steps.square_().add_(1)).to(tensor.dtype).view(tensor.shape)


def _cut_off(output: Tensor) -> Tensor:
    """Without its graph, and lying in memory as the model would have it."""
    own = output.detach()
    return own.contiguous() if is_marked(output) else own


def _every(output: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(output, note)
    return found


class OutputMatrix(ABC):
    """A symmetric matrix on the outputs of one batch, by its products.

    Attributes:
        positive: whether it is known to be positive semi-definite.
    """

    positive = True

    @abstractmethod
    def times(self, tangents: Outputs) -> list[Tensor | None]:
        """Return the product, a new tensor for each output or None for zeros."""


# ------------------------------------------------------------------------- Hessians of losses


def loss_hessian(
    criterion: Callable[[Any, Any], Tensor],
    output: Any,
    target: Any,
    trace: GraphTrace | None = None,
) -> LossHessian:
    """∇²ℓ by the outputs: in closed form where there is one here, else by differentiating twice.

    Closed forms: cross-entropy, p ↦ c (diag p − ppᵀ) for each label; mean squared error, 2 I; and
    binary cross-entropy on logits, p (1 − p).
    """
    found = closed_form(criterion, output, target)
    return LossHessian(criterion, output, target, trace) if found is None else found


class LossHessian(OutputMatrix):
    """∇²ℓ by differentiating the loss twice at outputs cut off from the model.

    Attributes:
        linear: whether the loss was found linear in the outputs, which leaves no curvature.
    """

    positive = False

    def __init__(
        self,
        criterion: Callable[[Any, Any], Tensor],
        output: Any,
        target: Any,
        trace: GraphTrace | None,
    ) -> None:
        self._leaves, gradients = loss_gradient(
            criterion, output, target, places_in(output), differentiable=True, trace=trace
        )
        self._gradients = {
            i: g for i, g in enumerate(gradients) if g is not None and g.requires_grad
        }
        # Asked once: a gradient may have a graph all the same.
        self.linear = trace is not None and not any(
            t is not None and bool(t.any()) for t in self._curved()
        )

    def times(self, tangents: Outputs) -> list[Tensor | None]:
        """As of `OutputMatrix`."""
        if not self._gradients:
            return [None] * len(self._leaves)
        return list(
            torch.autograd.grad(
                list(self._gradients.values()),
                self._leaves,
                grad_outputs=[tangents[i].to(g.dtype) for i, g in self._gradients.items()],
                retain_graph=True,
                allow_unused=True,
            )
        )

    def _curved(self) -> list[Tensor | None]:
        """Return the product with vectors without a pattern."""
        return self.times([patternless(leaf) for leaf in self._leaves])


def loss_gradient(
    criterion: Callable[[Any, Any], Tensor],
    output: Any,
    target: Any,
    places: Sequence[int],
    *,
    differentiable: bool = False,
    trace: GraphTrace | None = None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The outputs at `places` cut off from the model, and ∇ℓ by each of them, None for zeros.

    Args:
        criterion: the loss function.
        output: of the model.
        target: of the batch.
        places: as from `places_in`.
        differentiable: whether the gradients are to be differentiated once more.
        trace: examines whether they can be.
    """
    originals = outputs_at(output, places)
    leaves = [_cut_off(t).requires_grad_() for t in originals]

    def change(tensor: Tensor) -> Tensor:
        pairs = zip(originals, leaves, strict=True)
        return next((own for t, own in pairs if t is tensor), tensor.detach())

    with torch.enable_grad():
        # Copies, to which the loss function may write.
        loss = criterion(map_tensors(map_tensors(output, change), torch.clone), target)
    if not loss.requires_grad:
        return leaves, [None] * len(leaves)
    refusal = None if trace is None else trace.refusal(loss, leaves)
    if refusal is not None:
        raise not_twice(*refusal)
    found = torch.autograd.grad(loss, leaves, create_graph=differentiable, allow_unused=True)
    return leaves, list(found)


class _Closed(LossHessian):
    """A Hessian that is known without differentiating."""

    positive = True
    linear = False

    def __init__(self) -> None:
        """Nothing is made beforehand."""


class Softmax(_Closed):
    """c (diag p − ppᵀ) for each label (Böhning 1992; Martens 2020, arXiv:1412.1193, section 9).

    The softmax is computed for each product, a few labels at a time, since nothing else may be
    as large as a vocabulary's outputs.
    """

    def __init__(self, output: Tensor, coefficients: Tensor) -> None:
        self.output, self.coefficients = output.detach(), coefficients
        self.axis = 1 if output.dim() > 1 else 0

    def pieces(self) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Yield places along the first dimension, their probabilities and their coefficients."""
        output, coefficients = self.output, self.coefficients.unsqueeze(self.axis)
        wide = torch.promote_types(output.dtype, torch.float32)
        if output.dim() == 1:
            yield ..., torch.softmax(output, 0, dtype=wide), coefficients
            return
        rows = max(1, CHUNK // max(1, output[0].numel()))
        for start in range(0, len(output), rows):
            place = slice(start, start + rows)
            yield place, torch.softmax(output[place], 1, dtype=wide), coefficients[place]

    def times(self, tangents: Outputs) -> list[Tensor | None]:
        """As of `OutputMatrix`."""
        (tangent,) = tangents
        out = torch.empty_like(tangent)
        for place, p, c in self.pieces():
            moved = p * tangent[place]
            moved.sub_(p.mul_(moved.sum(self.axis, keepdim=True)))
            out[place] = moved.mul_(c)
        return [out]


class Diagonal(_Closed):
    """A number for each element of the outputs, or one for all."""

    def __init__(self, diagonal: Tensor | float) -> None:
        """`diagonal` may be negative where weights are."""
        self.diagonal = diagonal
        if isinstance(diagonal, Tensor):
            self.positive = bool((diagonal >= 0).all())

    def times(self, tangents: Outputs) -> list[Tensor | None]:
        """As of `OutputMatrix`."""
        return [t * self.diagonal for t in tangents]


class Logistic(Diagonal):
    """p (1 − p) for each element."""


def closed_form(criterion: Any, output: Any, target: Any) -> LossHessian | None:
    """The closed form for these criteria and their functions, with their options bound or not."""
    if not (isinstance(output, Tensor) and isinstance(target, Tensor)):
        return None
    row = pytorch_loss(criterion)
    if row is None or row.hessian is None:
        return None
    if row.hessian == "softmax":
        coefficients = label_coefficients(criterion, output, target)
        return None if coefficients is None else Softmax(output, coefficients)
    if output.shape != target.shape or output.numel() == 0:
        return None
    share = 1.0 if is_sum(criterion) else 1 / output.numel()
    if row.hessian == "squared":
        return Diagonal(2 * share) if lacks(criterion, "weight") else None
    curvature = _logistic(criterion, output, target) * share
    return Logistic(curvature) if curvature.shape == output.shape else None


def lacks(criterion: Any, name: str) -> bool:
    """Return whether an option of a criterion is not set."""
    return criterion_option(criterion, name, None) is None


def label_coefficients(criterion: Any, output: Tensor, target: Tensor) -> Tensor | None:
    """Return what multiplies diag p − ppᵀ of each label, the mean's divisor included."""
    axis = 1 if output.dim() > 1 else 0
    labels = output.shape[:axis] + output.shape[axis + 1 :]
    classes = output.shape[axis]
    smoothing = float(criterion_option(criterion, "label_smoothing", 0.0))
    weight = criterion_option(criterion, "weight", None)
    if classes == 0 or output.numel() == 0:
        return None
    dtype = output.dtype
    weight = output.new_ones(classes) if weight is None else weight.to(output.device, dtype)
    if target.dtype.is_floating_point:
        if target.shape != output.shape:
            return None
        smooth = target.to(dtype) * (1 - smoothing) + smoothing / classes
        shape = [1] * output.dim()
        shape[axis] = classes
        found = (smooth * weight.view(shape)).sum(axis)
        divisor: Any = found.numel()
    else:
        if target.shape != labels:
            return None
        target = target.long()
        used = target != int(criterion_option(criterion, "ignore_index", -100))
        own = weight[torch.where(used, target, 0)] * used
        found = (1 - smoothing) * own + smoothing * weight.mean() * used
        divisor = own.sum()
    return found if is_sum(criterion) else found / divisor


def _logistic(criterion: Any, output: Tensor, target: Tensor) -> Tensor:
    p = torch.sigmoid(output.detach())
    curvature = p * (1 - p)
    weight = criterion_option(criterion, "weight", None)
    positive = criterion_option(criterion, "pos_weight", None)
    if positive is not None:
        curvature = curvature * ((positive - 1) * target + 1)
    if weight is not None:
        curvature = curvature * weight
    return curvature
