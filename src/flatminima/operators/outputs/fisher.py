"""Fisher matrices of a model's outputs: expected, of labels drawn, and of the labels given."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidArgumentError
from ...objective.losses import criterion_option, is_known, is_sum, known_loss, pytorch_loss
from ...objective.weights import example_weights
from ...support.trees import cut, map_tensors, tensors_in
from .loss_curvature import (
    Diagonal,
    Logistic,
    OutputMatrix,
    Outputs,
    Softmax,
    closed_form,
    label_coefficients,
    lacks,
    loss_gradient,
    outputs_at,
    places_in,
)

__all__ = ["ScoreMatrix", "check_examples", "drawn_scores", "given_scores", "likelihood_curvature"]


@dataclasses.dataclass
class ScoreMatrix(OutputMatrix):
    """Σ_s c_i s sᵀ over score vectors s, each of one example: what all outputs of it share."""

    scores: Sequence[Tensor | None]
    """For each output (samples, examples, …)."""
    coefficients: Tensor
    """(examples,)"""

    def times(self, tangents: Outputs) -> list[Tensor | None]:
        """As of `OutputMatrix`."""
        pairs = [(s, t) for s, t in zip(self.scores, tangents, strict=True) if s is not None]
        size = (*pairs[0][0].shape[:2], -1) if pairs else ()
        inner: Any = sum((s * t).reshape(size).sum(2) for s, t in pairs)
        inner = (inner * self.coefficients).unsqueeze(2) if pairs else inner
        return [
            None if s is None else (s.reshape(size) * inner).sum(0).reshape(t.shape).to(t.dtype)
            for s, t in zip(self.scores, tangents, strict=True)
        ]


class _DrawnLabels(Softmax):
    """Σ c (p − e_y)(p − e_y)ᵀ for labels y drawn from p; only the labels are kept."""

    def __init__(self, exact: Softmax, samples: int, generator: torch.Generator) -> None:
        super().__init__(exact.output, exact.coefficients)
        drawn = []
        for _, p, _ in self.pieces():
            rows = p.movedim(self.axis, -1)
            flat = rows.reshape(-1, rows.shape[-1])
            labels = torch.multinomial(flat, samples, replacement=True, generator=generator)
            drawn.append(labels.view(*rows.shape[:-1], samples).movedim(-1, self.axis))
        self._labels = drawn
        """For each piece, the classes' dimension replaced by the samples'."""

    def times(self, tangents: Outputs) -> list[Tensor | None]:
        """As of `OutputMatrix`."""
        (tangent,) = tangents
        out = torch.empty_like(tangent)
        for (place, p, c), labels in zip(self.pieces(), self._labels, strict=True):
            own = tangent[place]
            inner = (p * own).sum(self.axis, keepdim=True) - own.gather(self.axis, labels)
            moved = p.mul_(inner.sum(self.axis, keepdim=True))
            moved.scatter_add_(self.axis, labels, -inner)
            out[place] = moved.mul_(c / labels.shape[self.axis])
        return [out]


def likelihood_curvature(criterion: Any, output: Any, target: Any) -> OutputMatrix | None:
    """Return the Fisher matrix of the outputs, where the criterion is a negative log-likelihood.

    Of softmax and logistic outputs and the squared error it is the Hessian of the loss; of
    log-probabilities under NLLLoss, which is linear in them, diag p. None for other criteria.
    """
    row = pytorch_loss(criterion)
    if row is None or row.likelihood is None:
        return None
    if row.likelihood != "log_probabilities":
        return closed_form(criterion, output, target) if lacks(criterion, "pos_weight") else None
    coefficients = label_coefficients(criterion, output, target)
    return None if coefficients is None else _LogProbabilities(output.detach(), coefficients)


class _LogProbabilities(Diagonal):
    """c diag p for each label: the score of a label is its unit vector."""

    def __init__(self, output: Tensor, coefficients: Tensor) -> None:
        self._axis = 1 if output.dim() > 1 else 0
        self._p, self._coefficients = output.exp(), coefficients.unsqueeze(self._axis)
        super().__init__(self._p * self._coefficients)

    def drawn(self, samples: int, generator: torch.Generator) -> Diagonal:
        """Return the same with labels drawn from p."""
        rows = self._p.movedim(self._axis, -1)
        flat = rows.reshape(-1, rows.shape[-1])
        labels = torch.multinomial(flat, samples, replacement=True, generator=generator)
        share = flat.new_full(labels.shape, 1 / samples)
        counts = torch.zeros_like(flat).scatter_add_(1, labels, share)
        return Diagonal(counts.view(rows.shape).movedim(-1, self._axis) * self._coefficients)


def drawn_scores(
    criterion: Any, output: Any, target: Any, *, samples: int, generator: torch.Generator
) -> OutputMatrix | None:
    """Scores of labels drawn from the likelihood that the criterion is the negative logarithm of.

    Softmax and logistic outputs draw classes, the squared error has normal observations of
    variance ½. None for any other criterion.
    """
    exact = likelihood_curvature(criterion, output, target)
    if isinstance(exact, Softmax):
        return _DrawnLabels(exact, samples, generator)
    if isinstance(exact, _LogProbabilities):
        return exact.drawn(samples, generator)
    if not isinstance(exact, Diagonal):
        return None
    output = output.detach()
    share = 1.0 if is_sum(criterion) else 1 / output.numel()
    shape = (samples, *(output.shape or (1,)))
    if isinstance(exact, Logistic):
        p = torch.sigmoid(output)
        weight = criterion_option(criterion, "weight", None)
        scale = 1.0 if weight is None else torch.as_tensor(weight).sqrt()
        scores = (p - torch.bernoulli(p.expand(shape), generator=generator)) * scale
    else:
        share *= 2
        scores = torch.randn(shape, generator=generator, device=output.device, dtype=output.dtype)
    return ScoreMatrix([scores], output.new_full((shape[1],), share / samples))


def check_examples(criterion: Any, output: Any, target: Any) -> None:
    """Refuse losses that are not the mean of their examples' own, or their sum where they say so.

    Asked of functions of the user's own, with the first two examples.

    Raises:
        InvalidArgumentError: it is another.
    """
    if is_known(criterion):
        return
    places = places_in(output)
    tensors = [t for t in outputs_at(output, places) if t.dim() > 0]
    count = len(tensors[0]) if tensors else 0
    if count < 2:
        return
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of examples that are too few
            both, first, second = (
                float(
                    criterion(
                        map_tensors(output, lambda t, a=a, b=b: t[a:b].clone()),  # type: ignore[misc]
                        cut(target, a, b, count),
                    )
                )
                for a, b in ((0, 2), (0, 1), (1, 2))
            )
    except (RuntimeError, ValueError, IndexError) as error:
        raise InvalidArgumentError(
            f"{_APART} The loss of two of them fails ({error}). Let outputs and targets have the "
            "examples first, or use GaussNewtonOperator."
        ) from error
    expected = first + second if is_sum(criterion) else (first + second) / 2
    if not abs(both - expected) <= 1e-3 * max(abs(both), abs(first), abs(second)):
        raise InvalidArgumentError(
            f"{_APART} The loss of two of them is {both:.6g}, and the mean of their own losses "
            f"{(first + second) / 2:.6g}: either they depend on each other, or the loss adds up "
            "without saying so by reduction='sum'."
        )


_APART = "The empirical Fisher matrix needs the mean loss of each example."


def given_scores(criterion: Any, output: Any, target: Any) -> ScoreMatrix:
    """Return Σ (w_i / Σw) ∇ℓ_i ∇ℓ_iᵀ over the examples, each with its own mean loss ℓ_i.

    Raises:
        InvalidArgumentError: the examples of the batch cannot be separated.
    """
    _, gradients = loss_gradient(criterion, output, target, places_in(output))
    weights = example_weights(criterion, target)
    labels = next(tensors_in(target), None)
    probabilities = labels is not None and labels.dtype.is_floating_point
    row = known_loss(criterion)
    classes = row is not None and row.hessian == "softmax" and probabilities
    single = labels is not None and labels.dim() == (1 if classes else 0)
    if single and weights is not None:
        weights = torch.ones_like(weights[:1])
    scores = [g if g is None or not single else g.unsqueeze(0) for g in gradients]
    if weights is None or any(g is not None and g.shape[:1] != weights.shape for g in scores):
        raise InvalidArgumentError(
            "The empirical Fisher matrix needs the loss of each example, and outputs and targets "
            "of this batch do not have one dimension of the same length first, that of the "
            "examples. Let model and data have them so, or use GaussNewtonOperator."
        )
    total: Any = 1.0 if is_sum(criterion) else weights.sum()
    coefficients = torch.where(weights > 0, total / weights, 0)
    dtype = next((g.dtype for g in scores if g is not None), coefficients.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    return ScoreMatrix(
        [None if g is None else g.unsqueeze(0) for g in scores], coefficients.to(dtype)
    )
