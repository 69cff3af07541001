"""Sharpness by random perturbations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..objective.objective import Objective, check_objective
from ..results import Outcome, Result, Table, format_number, reading_notes
from ..support.checks import check_choice, check_integer, check_positive
from ..support.precision import precision_notes
from ..support.progress import progress_bar
from ..support.randomness import Seed, as_generator
from .result import Measurement, MeasureResult

__all__ = ["RandomSharpnessResult", "TensorSharpness", "random_sharpness"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TensorSharpness(Result):
    """The effect of perturbing one parameter tensor.

    Attributes:
        name: name of the parameter; "all" if all were perturbed at once.
        value: largest |L(θ + δ) − L(θ)| / ε over the samples.
        mean: mean over the samples.
        standard_deviation: standard deviation over the samples (n − 1 in the denominator); NaN
            for a single sample.

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
class RandomSharpnessResult(MeasureResult):
    """Random-perturbation sharpness, overall and for each parameter tensor.

    Attributes:
        value: largest |L(θ + δ) − L(θ)| / ε over all tensors and samples.
        mean: mean over all tensors and samples.
        standard_deviation: standard deviation over all tensors and samples (n − 1 in the
            denominator); NaN for a single sample.
        tensors: the same for each parameter tensor, in the order of the model.
        loss: L(θ).
        epsilon: ε.
        samples: number of samples for each tensor.
        scope: "tensor" or "all".
        relative: whether z was scaled by the root mean square of the tensor.
        resolution: how much rounding of the loss can add to a value; rounding inside the model
            comes on top.
        evaluations: number of evaluations of the loss.
        outcome: completed, or why the value should not be trusted.
        readings: how many times the data were read again; 0 if they are kept on the device.
        notes: remarks on the computation.

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
        Completed: everything was evaluated.
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
    readings: int = 0
    notes: tuple[str, ...] = ()

    def measurements(self) -> tuple[Measurement, ...]:
        """Return the largest value as one line of a report."""
        name = "relative " * self.relative + f"random-perturbation sharpness, ε = {self.epsilon:g}"
        name += "" if self.scope == "tensor" else ", all tensors at once"
        return self._line(name, f"{self.evaluations} losses", self.standard_deviation, "std")

    def _table(self) -> Table:
        whole = TensorSharpness("overall", self.value, self.mean, self.standard_deviation)
        return Table(
            _HEADER,
            (_row(whole), *(_row(t) for t in self.tensors)),
            title=f"Random-perturbation sharpness, ε = {self.epsilon:g}, {self.samples} samples",
            notes=(
                f"{self.outcome.value} Rounding of the loss itself can add "
                f"{format_number(self.resolution, 2)}.",
                *reading_notes(self.readings),
                *self.notes,
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
    """Measure how much a random perturbation changes the loss: max |L(θ + ε z) − L(θ)| / ε.

    For each parameter tensor and each sample, z ~ N(0, I) on that tensor and is zero elsewhere.
    Values can be compared across models of the same architecture; they grow with the square root
    of the size of a tensor.

    Args:
        objective: the objective to evaluate.
        epsilon: ε, the size of the perturbation.
        samples: number of draws for each tensor.
        scope: "tensor" perturbs one tensor at a time, "all" all of them at once.
        relative: scale z by the root mean square of the tensor, which makes ε relative.
        seed: seed of the draws.
        progress: show a bar if it takes long.

    Returns:
        The largest value, mean and standard deviation, overall and for each tensor.

    Raises:
        InvalidArgumentError: ε ≤ 0, there are no samples, or the scope is unknown.
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
    generator = as_generator(seed, objective.device)
    before = objective.batches.readings
    names = objective.layout.names
    places = [(name,) for name in names] if scope == "tensor" else [names]
    loss = objective.loss()
    values = np.empty((len(places), samples))
    total = values.size
    states = (
        _perturb(objective, place, epsilon, relative, generator)
        for place in places
        for _ in range(samples)
    )
    with progress_bar("random sharpness", total=total, unit="loss", show=progress) as bar:
        for number, (moved, _) in enumerate(objective.evaluate_states(states)):
            values.flat[number] = abs(moved - loss) / epsilon
            bar.update()
    resolution = 2 * float(torch.finfo(objective.dtype).eps) * abs(loss) / epsilon
    outcome = Outcome.COMPLETED
    if not np.isfinite(values).all():
        outcome = Outcome.NON_FINITE_POINTS
    elif values.max() <= resolution:
        outcome = Outcome.BELOW_ROUNDING
    whole = _summarize("overall", values)
    labels = names if scope == "tensor" else ("all",)
    return RandomSharpnessResult(
        value=whole.value,
        mean=whole.mean,
        standard_deviation=whole.standard_deviation,
        tensors=tuple(_summarize(name, row) for name, row in zip(labels, values, strict=True)),
        loss=loss,
        epsilon=epsilon,
        samples=samples,
        scope=scope,
        relative=relative,
        resolution=resolution,
        evaluations=total + 1,
        outcome=outcome,
        readings=objective.batches.readings - before,
        notes=precision_notes(objective.model, objective.device),
    )


def _perturb(
    objective: Objective,
    names: Sequence[str],
    epsilon: float,
    relative: bool,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return the named tensors, and only these, with noise from a single draw added."""
    own = objective.parameters
    dtype = objective.dtype
    sizes = [own[name].numel() for name in names]
    draw = torch.randn(sum(sizes), generator=generator, device=generator.device, dtype=dtype)
    noise = torch.split(draw.to(objective.device), sizes)
    state = {}
    for name, z in zip(names, noise, strict=True):
        tensor = own[name].detach()
        dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
        wide = dense.to(dtype)
        amplitude = torch.full((), epsilon, dtype=dtype, device=z.device)
        if relative:
            amplitude *= wide.square().mean().sqrt()
        state[name] = (wide + (z * amplitude).view(wide.shape)).to(tensor.dtype)
    return state


def _summarize(name: str, values: np.ndarray[Any, np.dtype[np.float64]]) -> TensorSharpness:
    with np.errstate(invalid="ignore"):
        spread = float(values.std(ddof=1)) if values.size > 1 else math.nan
        return TensorSharpness(name, float(values.max()), float(values.mean()), spread)
