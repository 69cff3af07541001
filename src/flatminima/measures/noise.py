"""Gaussian noise on the parameters, with the same draws for every size of the noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..errors import InvalidArgumentError
from ..objective.metrics import Metric, classification_error
from ..objective.objective import Objective
from ..support.checks import check_choice
from ..support.precision import resolution
from ..support.randomness import Seed, draw_seed

__all__ = ["Noise", "NoisyRise", "compute_magnitudes"]


def compute_magnitudes(call: str, objective: Objective, *, adaptive: bool) -> Tensor | None:
    """Return c = |θ|, shape (n,), if `adaptive`; otherwise None, which stands for ones.

    Raises:
        InvalidArgumentError: a tensor is all zeros, so it would never move.
    """
    if not adaptive:
        return None
    sizes = objective.point().abs_()
    places = {name: place for name, place in objective.layout.slices() if place.stop > place.start}
    largest = torch.stack([sizes[place].max() for place in places.values()]).tolist()
    dead = [name for name, size in zip(places, largest, strict=True) if size == 0]
    if dead:
        shown = ", ".join(repr(name) for name in dead[:3]) + (", …" if len(dead) > 3 else "")
        raise InvalidArgumentError(
            f"{call} with noise or steps proportional to |θ| would never move {shown}, where all "
            "parameters are zero: the number would only be that of the other parameters. Leave "
            f"{'it' if len(dead) == 1 else 'them'} out with params=, or use a measure with "
            "absolute noise or steps."
        )
    return sizes


class Noise:
    """Noise z ~ N(0, I) on the parameters, scaled by c; draw i is the same for every size.

    Args:
        objective: gives the parameters.
        scale: c, shape (n,), or None for ones.
        seed: seed of the draws.
    """

    def __init__(self, objective: Objective, scale: Tensor | None, seed: Seed) -> None:
        self._objective, self._scale = objective, scale
        self._seed = draw_seed(seed, objective.device)

    def draws(self, count: int) -> Iterator[Tensor]:
        """Yield c ⊙ z for the first `count` draws, each a new vector (n,)."""
        own = self._objective
        generator = torch.Generator(device=own.device).manual_seed(self._seed)
        for _ in range(count):
            z = torch.randn(own.size, generator=generator, device=own.device, dtype=own.dtype)
            yield z if self._scale is None else z.mul_(self._scale)

    def displacements(self, sigma: float, count: int) -> Iterator[Tensor]:
        """Yield σ c ⊙ z for the first `count` draws."""
        return (z.mul_(sigma) for z in self.draws(count))


class NoisyRise:
    """The rise of the loss or the classification error under each of several draws of noise.

    Args:
        call: named in messages.
        objective: is evaluated.
        on: "error" or "loss".
        adaptive: make the noise proportional to |θ|.
        samples: number of draws, the same for every σ.
        seed: seed of the draws.

    Attributes:
        base: the error or the loss at θ.
        resolution: size up to which a rise may be rounding of the loss.
        evaluations: number of passes over the data so far.
    """

    def __init__(
        self,
        call: str,
        objective: Objective,
        *,
        on: str,
        adaptive: bool,
        samples: int,
        seed: Seed,
    ) -> None:
        check_choice(call, "on", on, ("error", "loss"))
        self._objective, self._samples = objective, samples
        self._noise = Noise(objective, compute_magnitudes(call, objective, adaptive=adaptive), seed)
        self._metrics: dict[str, Metric] = {}
        if on == "error":
            if objective.loss_fn is None:
                raise InvalidArgumentError(
                    f"{call}(on='error') compares outputs with labels, which batch_loss= does not "
                    "provide; make the objective with loss_fn=, or use on='loss'."
                )
            self._metrics["error"] = classification_error(call, objective.loss_fn)
        loss, metrics = objective.evaluate_state({}, self._metrics)
        if not math.isfinite(loss):
            objective.loss()  # raises an error that names the batch
        self.base = metrics.get("error", loss)
        self.evaluations = 1
        # Classification errors are counted, hence exact.
        self.resolution = (
            0.0 if self._metrics else resolution(objective.model, objective.device, loss)
        )

    def measure(self, sigma: float, report: Callable[[], object]) -> Tensor:
        """Return the rise for each draw at σ, shape (samples,), in float64.

        Args:
            sigma: σ.
            report: called for each draw.
        """
        layout, point = self._objective.layout, self._objective.point()

        def states() -> Iterator[dict[str, Tensor]]:
            for displacement in self._noise.displacements(sigma, self._samples):
                report()
                moved = displacement.add_(point)
                yield dict(zip(layout.names, layout.unflatten(moved), strict=True))

        found = [
            metrics.get("error", loss)
            for loss, metrics in self._objective.evaluate_states(states(), self._metrics)
        ]
        self.evaluations += self._samples
        return torch.tensor(found, dtype=torch.float64) - self.base
