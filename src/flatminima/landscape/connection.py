"""A curve of low loss between two minima."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..errors import InvalidArgumentError
from ..objective.batches import Batch
from ..objective.forward import Forward
from ..objective.metrics import Metric
from ..objective.objective import Objective, check_objective
from ..results import Outcome, Result, Table, format_number, reading_notes
from ..support.checks import check_choice, check_integer, check_positive
from ..support.progress import progress_bar
from ..support.randomness import Seed, as_generator
from ..support.vectors import all_finite
from .buffers import batch_statistics, recomputed_names
from .data_sets import check_metrics, named_objectives
from .endpoints import Between, Endpoint, State, checked_points
from .interpolation import BEZIER, BUFFERS, Barrier, Interpolation, evaluate_path

__all__ = ["Connection", "connect"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Connection(Result):
    """A quadratic Bézier curve between two minima, and the straight line for comparison.

    Attributes:
        curve: losses and metrics along γ(t), its `alphas` the values of t.
        line: the same at the same points of the straight line.
        bend: θ_b of the curve, (n,), in the objective's order.
        history: of each step, the mean of the losses at its points; on its batches, where it has
            not all of them.
        steps: of the training.
        points_per_step: values of t in each.
        learning_rate: with which it began.
        gradients: gradients taken in the training.
        outcome: completed, or completed with values that are not finite.
        notes: remarks on the computation.
        readings: how many times the data were read again; 0 if they are kept on the device.

    Examples:
        >>> import torch, flatminima as fm
        >>> from flatminima.landscape.connection import connect
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> ring = lambda m, batch: ((m.weight**2).sum() - 1) ** 2  # minima on the unit circle
        >>> objective = fm.Objective(model, data=[torch.zeros(1)], batch_loss=ring)
        >>> ends = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> found = connect(objective, *ends, steps=200, learning_rate=0.05)
        >>> found.line_barrier.height, found.barrier.height < 0.01
        (0.25, True)
    """

    curve: Interpolation
    line: Interpolation
    bend: Tensor
    history: tuple[float, ...]
    steps: int
    points_per_step: int
    learning_rate: float
    gradients: int
    outcome: Outcome
    notes: tuple[str, ...] = ()
    readings: int = 0

    @property
    def alphas(self) -> tuple[float, ...]:
        """The values of t at which curve and line were evaluated."""
        return self.curve.alphas

    @property
    def barrier(self) -> Barrier:
        """Of the loss along the curve; others by `curve.barrier(...)`."""
        return self.curve.barrier()

    @property
    def line_barrier(self) -> Barrier:
        """Of the loss along the straight line; others by `line.barrier(...)`."""
        return self.line.barrier()

    def _table(self) -> Table:
        rows = []
        for label, path in (("Bézier curve", self.curve), ("straight line", self.line)):
            for name, curve in path.curves.items():
                barrier = path.barrier(name)
                numbers = (_mean(path.alphas, curve.loss), max(curve.loss, key=_order))
                shown = (*numbers, barrier.height, barrier.alpha)
                rows.append((f"{label}, {name}", *map(format_number, shown)))
        return Table(
            header=("path", "mean loss", "largest loss", "barrier", "at α"),
            rows=tuple(rows),
            title=f"Bézier curve after {self.steps} steps ({self.gradients} gradients)",
            notes=(self.outcome.value, *reading_notes(self.readings), *self.notes),
        )


def connect(
    objective: Objective,
    start: Endpoint,
    end: Endpoint,
    *,
    steps: int = 300,
    learning_rate: float = 0.01,
    points_per_step: int = 1,
    batches_per_step: int | None = None,
    alphas: Sequence[float] | Tensor | None = None,
    metrics: Mapping[str, Metric] | None = None,
    also: Mapping[str, Objective] | None = None,
    buffers: Literal["recompute", "interpolate", "keep"] = "recompute",
    seed: Seed = 0,
    progress: bool = True,
) -> Connection:
    """A quadratic Bézier curve between two models, trained for a low mean loss (Garipov et al.).

    γ(t) = (1 − t)² θ_a + 2 t (1 − t) θ_b + t² θ_c, whose bend θ_b starts halfway between the
    models and is trained to minimise E_t L(γ(t)), t uniform on [0, 1] (Garipov et al. 2018,
    arXiv:1802.10026), by Adam with the paper's learning rates: constant for the first half, then
    falling linearly to a hundredth over the next 40 % of the steps. The values of t are
    stratified, over the points of a step and over the steps. The bend moves the selected
    parameters; the other tensors lie on the straight line.

    Args:
        objective: the loss and data; its model gives the architecture and stays as it is.
        start: the model at t = 0: a module, a state dict, or a parameter vector (n,) in the
            objective's order.
        end: the model at t = 1, in the same form.
        steps: of Adam.
        learning_rate: in the first half of the steps.
        points_per_step: number of t whose gradients a step averages.
        batches_per_step: batches for each step, taken in turn from the data in a random order;
            None takes all.
        alphas: the t at which curve and line are evaluated, within [0, 1] and with both ends; 21
            equally spaced ones by default.
        metrics: `metric(output, target)` by name, such as `{"accuracy": fm.accuracy}`.
        also: further objectives by name, evaluated at the same points.
        buffers: "recompute" trains with the statistics that batch norm has in each batch, and
            evaluates with those of the objective's data at each point; "interpolate" mixes them
            linearly; "keep" has those of the objective's model. All are the same for models
            without buffers.
        seed: an int or a `torch.Generator`, of the t and of the order of the batches.
        progress: show a bar with the loss if it takes long.

    Returns:
        The curve, its bend, the history of the training, and the straight line.

    Raises:
        StateMismatchError: the endpoints do not have the model's tensors; it says which.
        InvalidArgumentError: an option has a value that it cannot have.

    Examples:
        >>> import torch, flatminima as fm
        >>> from flatminima.landscape.connection import connect
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> ring = lambda m, batch: ((m.weight**2).sum() - 1) ** 2
        >>> objective = fm.Objective(model, data=[torch.zeros(1)], batch_loss=ring)
        >>> ends = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> found = connect(objective, *ends, steps=200, learning_rate=0.05, alphas=[0, 0.5, 1])
        >>> found.line.loss, found.curve.loss[1] < 0.01
        ((0.0, 0.25, 0.0), True)
    """
    call = "connect"
    check_objective(call, objective)
    steps = check_integer(call, "steps", steps, low=1)
    rate = check_positive(call, "learning_rate", learning_rate)
    points_per_step = check_integer(call, "points_per_step", points_per_step, low=1)
    check_choice(call, "buffers", buffers, BUFFERS)
    points = checked_points(call, alphas, tuple(i / 20 for i in range(21)))
    if not {0.0, 1.0} <= set(points) or min(points) < 0 or max(points) > 1:
        raise InvalidArgumentError(
            f"The 'alphas' argument of {call} must lie within [0, 1] and hold both 0 and 1; got "
            f"{alphas!r}."
        )
    measures = check_metrics(call, metrics)
    objectives = named_objectives(call, objective, also)
    generator = as_generator(seed, torch.device("cpu"))
    between = Between.read(call, objectives, start, end, buffers)
    batches = _Order(objective, batches_per_step, generator)
    data = {id(o): o.batches for o in objectives.values()}.values()
    before = sum(b.readings for b in data)

    def evaluated(state_at: Callable[[float], State], path: str) -> Interpolation:
        return evaluate_path(
            objectives, points, state_at, measures, path=path, between=between, progress=progress
        )

    line = evaluated(lambda t: between.at(t, "linear"), "linear")
    path = _Bezier(objective, between, recompute=buffers == "recompute")
    times = _times(steps, points_per_step, generator)
    adam, history, lost = _Adam(path.bend), list[float](), 0
    with progress_bar("connection", total=steps, unit="step", show=progress) as bar:
        for step, row in enumerate(times.tolist()):
            function = batches.next()
            values, total = list[float](), torch.zeros_like(path.bend)
            for t in row:
                value, gradient = path.value_and_gradient(function, t)
                values.append(value)
                total += gradient
            history.append(sum(values) / len(values))
            if math.isfinite(history[-1]) and all_finite(total):
                adam.step(total / len(row), rate * _share(step / steps))
            else:
                lost += 1
            bar.set_postfix_str(f"loss {history[-1]:.4g}", refresh=False)
            bar.update()
    curve = evaluated(path.at, BEZIER)

    notes = tuple(dict.fromkeys((*line.notes, *curve.notes)))
    if lost:
        notes += (
            f"{lost} of {steps} steps were left out, for a loss or a gradient that is infinite "
            "or NaN.",
        )
    finite = not lost and Outcome.NON_FINITE_POINTS not in (line.outcome, curve.outcome)
    return Connection(
        curve=curve,
        line=line,
        bend=path.bend.clone(),
        history=tuple(history),
        steps=steps,
        points_per_step=points_per_step,
        learning_rate=rate,
        gradients=steps * points_per_step,
        outcome=Outcome.COMPLETED if finite else Outcome.NON_FINITE_POINTS,
        notes=notes,
        readings=sum(b.readings for b in data) - before,
    )


class _Bezier:
    """The curve γ, and the loss on it with its gradient by the bend."""

    def __init__(self, objective: Objective, between: Between, *, recompute: bool) -> None:
        layout, model = objective.layout, objective.model
        self._layout, self._between = layout, between
        self._start, self._end = (
            layout.flatten([state[n] for n in layout.names])
            for state in (between.first, between.last)
        )
        self.bend = (self._start + self._end) / 2
        self._point = objective.point()
        self._forward = Forward(model, None, None)
        self._recompute = recompute
        own = dict(model.named_parameters()) | dict(model.named_buffers())
        absent = recomputed_names(model) if recompute else set[str]()
        # What else has to be put in place for a gradient: not what the model has already.
        self._others = {
            name
            for name in own
            if name not in {*layout.names, *absent, *between.kept}
            and not all(torch.equal(own[name], s[name]) for s in (between.first, between.last))
        }

    def vector(self, t: float) -> Tensor:
        """Return the selected parameters of γ(t)."""
        left, middle, right = (1 - t) ** 2, 2 * t * (1 - t), t**2
        return left * self._start + middle * self.bend + right * self._end

    def at(self, t: float) -> State:
        """Return the tensors at γ(t)."""
        pieces = self._layout.unflatten(self.vector(t))
        named = dict(zip(self._layout.names, pieces, strict=True))
        return self._between.at(t, "linear") | named

    def value_and_gradient(self, objective: Objective, t: float) -> tuple[float, Tensor]:
        """Return L(γ(t)) and its gradient by the bend."""
        shift = self.vector(t) - self._point
        if not all_finite(shift):
            return math.nan, torch.full_like(shift, math.nan)
        statistics = batch_statistics(objective) if self._recompute else contextlib.nullcontext()
        with statistics:
            if not self._others:
                value, gradient = objective.value_and_gradient(shift)
            else:
                state = self._between.at(t, "linear")
                others = {n: state[n].clone() for n in self._others}
                with self._forward.replacing(others, {}):
                    value, gradient = objective.value_and_gradient(shift)
        return value, 2 * t * (1 - t) * gradient


class _Adam:
    """Adam (Kingma and Ba 2015) with its usual constants, on one vector in place."""

    def __init__(self, point: Tensor) -> None:
        self._point = point
        self._mean, self._square = torch.zeros_like(point), torch.zeros_like(point)
        self._count = 0

    def step(self, gradient: Tensor, rate: float) -> None:
        """One step down the gradient."""
        self._count += 1
        self._mean.lerp_(gradient, 0.1)
        self._square.lerp_(gradient.square(), 0.001)
        mean = self._mean / (1 - 0.9**self._count)
        root = (self._square / (1 - 0.999**self._count)).sqrt_().add_(1e-8)
        self._point.addcdiv_(mean, root, value=-rate)


class _Order:
    """The objective on some of its batches after the other, in an order that is drawn."""

    def __init__(self, objective: Objective, count: int | None, generator: torch.Generator) -> None:
        self._objective, self._generator = objective, generator
        self._count, self._batches = 0, list[Batch]()
        if count is None:
            return
        used = objective.batches.used
        self._count = check_integer("connect", "batches_per_step", count, low=1, high=used)
        if not objective.batches.cached:
            raise InvalidArgumentError(
                "The 'batches_per_step' argument of connect needs batches that are kept on the "
                "device; make the Objective with cache=True, or leave it at None for all data."
            )
        with objective.batches.reading() as stream:
            self._batches = list(stream)
        self._drawn = self._draws()

    def next(self) -> Objective:
        """Return the objective of the next step."""
        if not self._count:
            return self._objective
        chosen = [self._batches[next(self._drawn)] for _ in range(self._count)]
        return self._objective.replaced(batches=chosen)

    def _draws(self) -> Iterator[int]:
        while True:
            device = self._generator.device
            yield from torch.randperm(
                len(self._batches), generator=self._generator, device=device
            ).tolist()


def _times(steps: int, points: int, generator: torch.Generator) -> Tensor:
    """Values of t, shape (steps, points): one in each of `points` parts of [0, 1] at each step.

    Over all steps, those of a part lie one in each of `steps` equal parts of it.
    """
    device = generator.device
    draws = torch.rand(steps, points, generator=generator, device=device, dtype=torch.float64)
    orders = [torch.randperm(steps, generator=generator, device=device) for _ in range(points)]
    within = (torch.stack(orders, dim=1) + draws) / steps
    return ((torch.arange(points, device=device) + within) / points).cpu()


def _share(progress: float) -> float:
    """Return the part of the learning rate that is left at a part of the training."""
    return 1.0 if progress <= 0.5 else max(0.01, 1 - 0.99 * (progress - 0.5) / 0.4)


def _mean(places: Sequence[float], values: Sequence[float]) -> float:
    """Of values at places on [0, 1], by the trapezoidal rule."""
    pairs = sorted(zip(places, values, strict=True))
    return sum((b - a) * (u + v) / 2 for (a, u), (b, v) in itertools.pairwise(pairs))


def _order(value: float) -> float:
    """NaN above all."""
    return math.inf if math.isnan(value) else value
