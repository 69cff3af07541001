"""Worst-case sharpness over a ball: SAM's, its adaptive variant, and m-sharpness."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Generator

from torch import Tensor

from ..algorithms.optimize.ball import BallMaximum, maximize_over_ball
from ..errors import FlatMinimaError, InvalidArgumentError
from ..objective.derived import groups_of, with_normalized_logits
from ..objective.objective import Objective, check_objective
from ..results import Outcome, Table, format_number
from ..support.checks import check_integer, check_positive
from ..support.precision import precision_notes, resolution
from ..support.progress import progress_bar
from ..support.randomness import Seed, as_generator
from .noise import compute_magnitudes
from .result import Measurement, MeasureResult, format_count

__all__ = ["SamSharpnessResult", "sam_sharpness"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SamSharpnessResult(MeasureResult):
    """The rise of the loss within a ball.

    Attributes:
        value: max L(θ + δ) − L(θ), never negative; with m the mean over the groups.
        loss: L(θ).
        first_order: the rise if the loss were linear, ρ ‖c ⊙ ∇L‖_q; with m the mean.
        rho: ρ.
        norm: p, 2 or infinity.
        steps: number of steps from each start.
        restarts: number of further starts.
        adaptive: whether c = |θ|.
        m: number of examples in a group, or None for all data at once.
        groups: number of groups.
        normalize_logits: whether the logits were normalised.
        gradients: number of evaluations of loss and gradient; with m, of single groups.
        losses: number of evaluations of the loss alone.
        outcome: completed for one step, otherwise why the ascent stopped. With m, the first
            doubtful outcome of the groups, or else the most frequent one.
        displacement: δ of the maximum, shape (n,), on request.
        readings: how many times the data were read again; 0 if they are kept on the device.
        notes: remarks on the computation.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = torch.eye(2), torch.zeros(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> result = fm.sam_sharpness(objective, rho=0.1, steps=5)
        >>> print(round(result.value, 4), round(result.first_order, 4), result.outcome.brief)
        0.1464 0.1414 stationary
    """

    value: float
    loss: float
    first_order: float
    rho: float
    norm: float
    steps: int
    restarts: int
    adaptive: bool
    m: int | None
    groups: int
    normalize_logits: bool
    gradients: int
    losses: int
    outcome: Outcome
    displacement: Tensor | None = None
    readings: int = 0
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the measure, with its settings."""
        parts = [
            ("adaptive " if self.adaptive else "") + "SAM sharpness",
            f"ρ = {self.rho:g}" + ("" if self.norm == 2 else " (ℓ∞)"),
            "1 step" if self.steps == 1 else f"{self.steps} steps",
        ]
        parts += [f"{self.restarts} restarts"] if self.restarts else []
        parts += [f"m = {self.m}"] if self.m else []
        parts += ["normalised logits"] if self.normalize_logits else []
        return ", ".join(parts)

    def measurements(self) -> tuple[Measurement, ...]:
        """Return the rise as one line of a report."""
        cost = f"{format_count(self.gradients, 'gradient')}, {format_count(self.losses, 'loss')}"
        return self._line(self.name, cost + (f" of {self.m} examples" if self.m else ""))

    def _table(self) -> Table:
        return Table(
            header=("quantity", "value"),
            rows=(
                ("rise of the loss", format_number(self.value)),
                ("the same to first order", format_number(self.first_order)),
                ("loss L(θ)", format_number(self.loss)),
                ("gradients", str(self.gradients)),
                ("losses alone", str(self.losses)),
            ),
            title=self.name[0].upper() + self.name[1:],
            notes=self._make_notes(*([f"Mean over {self.groups} groups."] if self.m else [])),
        )


def sam_sharpness(
    objective: Objective,
    *,
    rho: float = 0.05,
    norm: float = 2,
    steps: int = 1,
    adaptive: bool = False,
    restarts: int = 0,
    m: int | None = None,
    normalize_logits: bool = False,
    seed: Seed = 0,
    return_displacement: bool = False,
    progress: bool = True,
) -> SamSharpnessResult:
    """Return how far the loss can rise within a ball: max L(θ + δ) − L(θ) over ‖δ ⊘ c‖_p ≤ ρ.

    c is 1, or with `adaptive` |θ| element by element (ASAM, Kwon et al. 2021, arXiv:2102.11600,
    section 3), which makes the measure unchanged by rescaling; parameters that are zero then do
    not move. With one step, δ maximises the linear model of the loss: it is the point from which
    SAM descends (Foret et al. 2021, arXiv:2010.01412, equation 2). With more steps, δ is found by
    projected ascent with a step that adapts to the curvature (see `optimize.ball`);
    Andriushchenko et al. 2023 (arXiv:2302.07011) take 20 steps. The value is that of the best
    point evaluated, including θ itself.

    m-sharpness is the mean, over groups of m examples, of the rise of each group's loss (Foret et
    al. 2021, section 4.1), weighted as the objective weights its batches. Examples are entries of
    the first dimension. Groups are formed in the order of the data, so shuffle data that are
    sorted by class.

    Args:
        objective: the objective to maximise.
        rho: ρ; relative to each parameter with `adaptive`. Foret et al. train with 0.05, Kwon et
            al. with 0.5 in their adaptive variant. For p = ∞ the same effect needs a much
            smaller ρ.
        norm: p, 2 or infinity.
        steps: number of evaluations for each start, in addition to the one at θ.
        adaptive: measure the displacement of each parameter in units of the parameter itself.
        restarts: number of further starts, from random points of the ball's boundary.
        m: number of examples in a group, or None for all data at once.
        normalize_logits: for cross-entropy, first divide the logits of each example by their
            standard deviation. Without this, a classifier that is more confident of the same
            labels looks flatter (Andriushchenko et al. 2023).
        seed: seed of the starts.
        return_displacement: keep δ in the result; cannot be combined with m.
        progress: show a bar if it takes long.

    Returns:
        The rise, its value to first order, and why the ascent stopped.

    Raises:
        InvalidArgumentError: ρ ≤ 0, the norm is unknown, a count is out of range, m exceeds the
            number of examples, `adaptive` meets a tensor of zeros, `normalize_logits` meets a
            loss other than cross-entropy, or batches cannot be cut into groups or evaluated in
            groups.
        NonFiniteError: L(θ) or its gradient is NaN or infinite.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 2.0)
        >>> x = torch.tensor([[3.0, -4.0]])
        >>> objective = fm.Objective(model, lambda out, y: out.mean(), (x, torch.zeros(1, 1)))
        >>> round(fm.sam_sharpness(objective, rho=0.1).value, 3)  # ρ ‖g‖₂
        0.5
        >>> round(fm.sam_sharpness(objective, rho=0.1, norm=float("inf")).value, 3)  # ρ ‖g‖₁
        0.7
        >>> round(fm.sam_sharpness(objective, rho=0.1, adaptive=True).value, 3)  # ρ ‖θ ⊙ g‖₂
        1.0
    """
    call = "sam_sharpness"
    check_objective(call, objective)
    rho = check_positive(call, "rho", rho)
    if isinstance(norm, bool) or norm not in (2, math.inf):
        raise InvalidArgumentError(
            f"The 'norm' argument of {call} must be 2 or infinity (float('inf')); got {norm!r}."
        )
    check_integer(call, "steps", steps, low=1)
    check_integer(call, "restarts", restarts, low=0)
    if m is not None:
        if objective.examples == 0:
            raise InvalidArgumentError(
                f"{call}(m=...) forms groups of examples, but these data do not show what an "
                "example is: their tensors have no first dimension in common."
            )
        m = check_integer(call, "m", m, low=1, high=objective.examples)
        if return_displacement:
            raise InvalidArgumentError(
                f"With m= every group of examples has its own displacement; {call} can return a "
                "displacement only without m=."
            )
    scale = compute_magnitudes(call, objective, adaptive=adaptive)
    before = objective.batches.readings
    batches = objective.batches
    if normalize_logits:
        objective = with_normalized_logits(call, objective)
    generator = as_generator(seed, objective.device)
    found: list[tuple[float, BallMaximum]] = []
    with (
        progress_bar("SAM sharpness", total=None, unit="evaluation", show=progress) as bar,
        contextlib.closing(_split_groups(call, objective, m)) as parts,
    ):
        for part in parts:

            def function(displacement: Tensor, part: Objective = part) -> tuple[float, Tensor]:
                # At θ itself, a loss that is not finite is an error.
                return part.value_and_gradient(displacement if displacement.any() else None)

            try:
                maximum = maximize_over_ball(
                    function,
                    objective.size,
                    dtype=objective.dtype,
                    device=objective.device,
                    scale=scale,
                    radius=rho,
                    norm=float(norm),
                    steps=steps,
                    restarts=restarts,
                    seed=generator,
                    value_only=part.loss_at,
                    on_evaluation=lambda best: bar.update(),  # noqa: ARG005
                )
            except (RuntimeError, ValueError, IndexError) as error:
                if m is None or isinstance(error, FlatMinimaError):
                    raise
                raise InvalidArgumentError(
                    f"{call}(m={m}) evaluates groups of examples separately, and the model or the "
                    f"loss fails on one of {part.examples} ({error}). Use another m, or data "
                    "without a smaller last group."
                ) from error
            found.append((part.batches.total_weight, maximum))
    total = math.fsum(weight for weight, _ in found)
    value = math.fsum(w * (best.value - best.start) for w, best in found) / total
    loss = math.fsum(w * best.start for w, best in found) / total
    first_order = math.fsum(w * best.first_order for w, best in found) / total
    outcome = _combine_outcomes([best.outcome for _, best in found])
    smallest = resolution(objective.model, objective.device, loss)
    if 0 < value <= smallest or (0 < first_order <= smallest and value == 0):
        outcome = Outcome.BELOW_ROUNDING
    return SamSharpnessResult(
        value=value,
        loss=loss,
        first_order=first_order,
        rho=rho,
        norm=float(norm),
        steps=steps,
        restarts=restarts,
        adaptive=adaptive,
        m=m,
        groups=len(found),
        normalize_logits=normalize_logits,
        gradients=sum(best.gradients for _, best in found),
        losses=sum(best.losses for _, best in found),
        outcome=outcome,
        displacement=found[0][1].point if return_displacement else None,
        readings=batches.readings - before,
        notes=precision_notes(objective.model, objective.device),
    )


def _split_groups(
    call: str, objective: Objective, m: int | None
) -> Generator[Objective, None, None]:
    """Yield the objective itself, or its groups of m examples."""
    if m is None:
        yield objective
    else:
        yield from groups_of(call, objective, m)


def _combine_outcomes(outcomes: list[Outcome]) -> Outcome:
    """Return the first doubtful outcome, or the most frequent one if none is doubtful."""
    doubtful = [outcome for outcome in outcomes if outcome.doubtful]
    return doubtful[0] if doubtful else max(outcomes, key=outcomes.count)
