"""Sharpness under random perturbations."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ..checks import check_choice, check_integer, check_positive
from ..objective import Objective, check_objective
from ..progress import progress_bar
from ..randomness import Seed, as_generator
from ..results import Outcome, Result, Table, format_number

__all__ = ["RandomSharpnessResult", "TensorSharpness", "random_sharpness"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TensorSharpness(Result):
    """What perturbing one parameter tensor did.

    Attributes:
        name: of the parameter; "all" where all were perturbed at once.
        value: largest |L(θ + δ) − L(θ)| / ε over the samples.
        mean: over the samples.
        standard_deviation: over the samples (n − 1 in the denominator); NaN for one.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = torch.eye(2), torch.zeros(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> fm.random_sharpness(objective, samples=3).tensors[0].name
        'weight'
    """

    name: str
    value: float
    mean: float
    standard_deviation: float

    def _table(self) -> Table:
        return Table(_HEADER, (_row(self),))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RandomSharpnessResult(Result):
    """Random-perturbation sharpness, with the breakdown per parameter tensor.

    Attributes:
        value: the largest |L(θ + δ) − L(θ)| / ε of all tensors and samples.
        mean: over all of them.
        standard_deviation: over all of them (n − 1 in the denominator); NaN for one.
        tensors: the same per parameter tensor, in the model's order.
        loss: L(θ).
        epsilon: ε.
        samples: for each tensor.
        scope: "tensor" or "all".
        relative: whether z was scaled by the tensor's root-mean-square.
        resolution: what rounding of the loss itself can add to a value; rounding inside the model
            comes on top of it.
        evaluations: of the loss.
        outcome: completed, or why the value should not be trusted.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = torch.eye(2), torch.zeros(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> result = fm.random_sharpness(objective, samples=3)
        >>> result.value == max(t.value for t in result.tensors)
        True
        >>> print(result.outcome.value)
        Completed: everything asked for was evaluated.
    """

    value: float
    mean: float
    standard_deviation: float
    tensors: tuple[TensorSharpness, ...]
    loss: float
    epsilon: float
    samples: int
    scope: str
    relative: bool
    resolution: float
    evaluations: int
    outcome: Outcome

    def _table(self) -> Table:
        whole = TensorSharpness("overall", self.value, self.mean, self.standard_deviation)
        return Table(
            _HEADER,
            (_row(whole), *(_row(t) for t in self.tensors)),
            title=f"Random-perturbation sharpness, ε = {self.epsilon:g}, {self.samples} samples",
            notes=(
                f"{self.outcome.value} Rounding of the loss itself can add "
                f"{format_number(self.resolution, 2)}.",
            ),
        )


_HEADER = ("parameter", "largest", "mean", "std")


def _row(t: TensorSharpness) -> tuple[str, ...]:
    numbers = (t.value, t.mean, t.standard_deviation)
    return (t.name, *(format_number(v) for v in numbers))


def random_sharpness(
    objective: Objective,
    *,
    epsilon: float = 1e-3,
    samples: int = 10,
    scope: Literal["tensor", "all"] = "tensor",
    relative: bool = False,
    seed: Seed = 0,
    progress: bool = True,
) -> RandomSharpnessResult:
    """How much the loss moves when one parameter tensor is shaken: max |L(θ + ε z) − L(θ)| / ε.

    For every parameter tensor and every sample z ~ N(0, I) on that tensor and is zero elsewhere.
    Values compare across models of the same architecture; they grow with the square root of a
    tensor's size.

    Args:
        objective: what is evaluated.
        epsilon: ε, the size of the perturbation.
        samples: draws for each tensor.
        scope: "tensor" perturbs one tensor at a time, "all" all of them at once.
        relative: scale z by the tensor's root-mean-square, so that ε is relative.
        seed: of the draws.
        progress: show a bar if it takes long.

    Returns:
        The largest value, mean and standard deviation, overall and for each tensor.

    Raises:
        InvalidArgumentError: ε ≤ 0, no samples, an unknown scope.
        NonFiniteError: L(θ) is NaN or infinite.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1)
        >>> x, y = torch.eye(2), torch.zeros(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), (x, y))
        >>> result = fm.random_sharpness(objective, samples=3)
        >>> [t.name for t in result.tensors]
        ['weight', 'bias']
        >>> result == fm.random_sharpness(objective, samples=3)
        True
    """
    call = "random_sharpness"
    check_objective(call, objective)
    epsilon = check_positive(call, "epsilon", epsilon)
    check_integer(call, "samples", samples, low=1)
    check_choice(call, "scope", scope, ("tensor", "all"))
    layout = objective.layout
    generator = as_generator(seed, objective.device)
    point = objective.point()
    amplitude = torch.full_like(point, epsilon)
    if relative:
        for _, place in layout.slices():
            amplitude[place] *= point[place].square().mean().sqrt()
    places = list(layout.slices()) if scope == "tensor" else [("all", slice(0, layout.size))]
    displacement = torch.zeros_like(point)
    loss = objective.loss()
    values = np.empty((len(places), samples))
    total = values.size
    with progress_bar("random sharpness", total=total, unit="loss", show=progress) as bar:
        for i, (_, place) in enumerate(places):
            for j in range(samples):
                draw = torch.randn(
                    place.stop - place.start,
                    generator=generator,
                    device=generator.device,
                    dtype=point.dtype,
                )
                displacement[place] = draw.to(point.device) * amplitude[place]
                values[i, j] = abs(objective.loss_at(displacement) - loss) / epsilon
                bar.update()
            displacement[place] = 0
    resolution = 2 * float(torch.finfo(objective.dtype).eps) * abs(loss) / epsilon
    outcome = Outcome.COMPLETED
    if not np.isfinite(values).all():
        outcome = Outcome.NON_FINITE_POINTS
    elif values.max() <= resolution:
        outcome = Outcome.BELOW_ROUNDING
    whole = _summary("overall", values)
    return RandomSharpnessResult(
        value=whole.value,
        mean=whole.mean,
        standard_deviation=whole.standard_deviation,
        tensors=tuple(_summary(name, row) for (name, _), row in zip(places, values, strict=True)),
        loss=loss,
        epsilon=epsilon,
        samples=samples,
        scope=scope,
        relative=relative,
        resolution=resolution,
        evaluations=total + 1,
        outcome=outcome,
    )


def _summary(name: str, values: NDArray[np.float64]) -> TensorSharpness:
    with np.errstate(invalid="ignore"):
        spread = float(values.std(ddof=1)) if values.size > 1 else math.nan
        return TensorSharpness(name, float(values.max()), float(values.mean()), spread)
