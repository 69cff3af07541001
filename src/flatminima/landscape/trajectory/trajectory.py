"""The path that training takes through parameter space, recorded snapshot by snapshot."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import (
    ArgumentTypeError,
    FlatMinimaWarning,
    InvalidArgumentError,
    NonFiniteError,
    StateMismatchError,
)
from ...objective.modules import check_model, unwrap
from ...objective.objective import Objective
from ...objective.selection import Selection, select_parameters
from ...support.checks import check_choice, check_instance, check_integer
from ...support.randomness import Seed, as_generator
from ...support.vectors import GaussianSubspace, Layout
from .snapshots import Array, Index, Snapshots, described

__all__ = ["Trajectory"]

HOST = torch.device("cpu")
MAXIMUM_EXPONENT = 15
"""float16 snapshots are scaled by a power of two to lie below 2^15."""
BLOCK_BYTES = 2**26
"""Of differences in float64 that are in memory at a time."""


class Trajectory:
    """Snapshots of a model's parameters, taken in the training loop.

    Recording copies the parameters to the host and touches nothing of the model or the random
    states. A snapshot takes n numbers of the type `dtype`, in memory or, with `path`, in one file
    each, from which `principal_components` reads blocks. In training by several processes, record
    in one of them.

    Args:
        model: the module in training, or an `Objective` of it.
        params: which parameters, as for `Objective`; only with a module.
        every: every how many calls of `record` a snapshot is kept; the first one is.
        dtype: of the snapshots: "float32"; "float64"; or "float16", scaled by a power of two,
            for half the memory. float16 rounds each weight by up to 1 part in 2048, which hides
            steps that are smaller than that.
        path: a folder for the snapshots, as `.npy` files and an index in JSON, written so that
            a crash leaves all that was recorded before. Without it they are kept in memory.
        resume: go on with what the folder holds. Otherwise it must be new or empty.
        sketch: keep only so many random projections of each snapshot, in float64, and the last
            snapshot in full. Distances keep their length up to a relative error of about
            1 / √(2 sketch), but there are no directions to draw along. Each snapshot takes
            n · sketch multiplications, and as many random draws where these do not fit into
            512 MB.
        seed: of the projections.

    Attributes:
        every: as given.
        dtype: as given; "float64" with a sketch.
        sketch: as given.

    Raises:
        InvalidArgumentError: the folder holds a trajectory already, or something else.
        StateMismatchError: with `resume`, the folder holds the trajectory of another model; it
            says what differs.
        ParameterSelectionError: `params` selects nothing.

    Examples:
        >>> import torch, flatminima as fm
        >>> from flatminima.landscape.trajectory.trajectory import Trajectory
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> trajectory = Trajectory(model, every=2)
        >>> for step in range(5):
        ...     loss = model(torch.ones(4, 2)).square().mean()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        ...     kept = trajectory.record(step, loss=loss)
        >>> trajectory.steps
        (0, 2, 4)
        >>> trajectory.point(-1).shape, len(trajectory.numbers["loss"])
        (torch.Size([3]), 3)
    """

    def __init__(
        self,
        model: nn.Module | Objective,
        *,
        params: Selection = None,
        every: int = 1,
        dtype: Literal["float32", "float16", "float64"] = "float32",
        path: str | os.PathLike[str] | None = None,
        resume: bool = False,
        sketch: int | None = None,
        seed: Seed = 0,
    ) -> None:
        call = "Trajectory"
        if isinstance(model, Objective):
            if params is not None:
                raise InvalidArgumentError(
                    f"{call} takes params= with a module; an Objective has its own selection."
                )
            self._model: nn.Module | None = model.model
            self._layout: Layout | None = model.layout
        else:
            advice = "Give the module in training, or an Objective of it."
            check_instance(call, "model", model, nn.Module, advice)
            with warnings.catch_warnings():
                # It is about data, and there are none here.
                warnings.simplefilter("ignore", FlatMinimaWarning)
                self._model = unwrap(model)
            check_model(self._model)
            self._layout = Layout.of(select_parameters(self._model, params))
        self.every = check_integer(call, "every", every, low=1)
        self.dtype: str = check_choice(call, "dtype", dtype, ("float32", "float16", "float64"))
        self.sketch = None if sketch is None else check_integer(call, "sketch", sketch, low=1)
        check_instance(call, "resume", resume, bool, "Give True or False.")
        number = 0
        if self.sketch is not None:
            self.dtype = "float64"
            generator = as_generator(seed, HOST)
            draw = torch.randint(2**62, (), generator=generator, device=generator.device)
            number = int(draw.item())
        self._calls = 0
        self._kept = Snapshots(
            Index(described(self._layout), self._layout.size, self.dtype, self.sketch, number),
            path,
            resume,
        )
        self._calls = self._kept.calls
        self._subspace: GaussianSubspace | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trajectory:
        """The trajectory that a folder holds, for analysis; nothing more can be recorded in it.

        Raises:
            InvalidArgumentError: the folder holds none, or files are missing.

        Examples:
            >>> import tempfile, torch
            >>> from flatminima.landscape.trajectory.trajectory import Trajectory
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     trajectory = Trajectory(torch.nn.Linear(2, 1), path=folder)
            ...     kept = trajectory.record(7)
            ...     again = Trajectory.load(folder)
            ...     again.steps, bool((again.point(0) == trajectory.point(0)).all())
            ((7,), True)
        """
        made = cls.__new__(cls)
        made._kept = Snapshots.load(path)
        made._model = made._layout = made._subspace = None
        made.every, made._calls = 1, made._kept.calls
        made.dtype, made.sketch = made._kept.index.dtype, made._kept.index.sketch
        return made

    def record(self, step: int | None = None, *, force: bool = False, **numbers: Any) -> bool:
        """Take a snapshot of the parameters, on every `every`-th call.

        Args:
            step: the number of the training step, larger than that of the last snapshot; the
                default: the number of calls before this one.
            force: keep this one in any case, such as the last of all. Where the snapshot of this
                very step is kept already, nothing happens.
            numbers: such as `loss=loss`, kept with the snapshot; read only if it is kept.

        Returns:
            Whether it was kept.

        Raises:
            NonFiniteError: a parameter holds NaN or infinity; what was recorded before stays.
            StateMismatchError: the model has other parameters than before.
            InvalidArgumentError: the steps do not increase.
        """
        model, layout = self._model, self._layout
        if model is None or layout is None:
            raise InvalidArgumentError(
                "A trajectory that was loaded has no model to record; use Trajectory(model, "
                "path=..., resume=True) to go on."
            )
        due = self._calls % self.every == 0
        last = self.steps[-1] if len(self) else -1
        if step is None:
            step = max(self._calls, last + 1)
        step = check_integer("Trajectory.record", "step", step, low=0)
        self._calls += 1
        if not (due or force) or (force and step == last):
            return False
        if step <= last:
            raise InvalidArgumentError(
                f"Trajectory.record was given step {step} after step {last}; steps must increase. "
                "For another run make another Trajectory."
            )
        extra = {name: _number(name, value) for name, value in numbers.items()}
        vector = self._vector(model, layout, step)
        if self.sketch is None:
            row, exponent = self._stored(vector)
            self._kept.append(step, row, exponent, extra, self._calls)
        else:
            row = self._projected(vector, self.sketch)
            self._kept.append(step, row, 0, extra, self._calls, vector)
        return True

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def steps(self) -> tuple[int, ...]:
        """The training step of each snapshot."""
        return self._kept.steps

    @property
    def numbers(self) -> dict[str, tuple[float, ...]]:
        """What was recorded with the snapshots, by name; NaN where it was not."""
        names = dict.fromkeys(name for each in self._kept.numbers for name in each)
        return {
            name: tuple(each.get(name, math.nan) for each in self._kept.numbers) for name in names
        }

    @property
    def size(self) -> int:
        """Number of parameters n."""
        return self._kept.index.size

    @property
    def parameters(self) -> tuple[str, ...]:
        """The name and the shape of each parameter tensor, in order."""
        return self._kept.index.layout

    def point(self, index: int) -> Tensor:
        """A snapshot's parameters, shape (n,), on the host; float64 if kept so, else float32.

        Args:
            index: of the snapshot; negative from the last.

        Raises:
            InvalidArgumentError: there is no such snapshot, or only a sketch of it.
        """
        count = len(self)
        if isinstance(index, bool) or not hasattr(index, "__index__"):
            raise ArgumentTypeError(
                f"Trajectory.point takes the number of a snapshot; got {index!r}."
            )
        place = index.__index__() + (count if index < 0 else 0)
        if not 0 <= place < count:
            raise InvalidArgumentError(
                f"Trajectory.point({index}): there are {count} snapshots, counted from 0."
            )
        if self.sketch is None:
            return torch.from_numpy(self._kept.wide(place, slice(None), copy=True))
        if place == count - 1:
            return torch.from_numpy(self._kept.last().copy())
        raise InvalidArgumentError(
            f"Of snapshot {index} a sketch of {self.sketch} numbers is kept; only the last one is "
            "kept in full. Record without sketch= for points and directions."
        )

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield all snapshots, some entries at a time: which, and these of each, (T, b) in float64.

        With a sketch, that of each snapshot, (T, sketch).
        """
        width = self.size if self.sketch is None else self.sketch
        step = max(1, BLOCK_BYTES // (8 * max(1, len(self))))
        for start in range(0, width, step):
            place = slice(start, min(start + step, width))
            rows = np.empty((len(self), place.stop - place.start))
            for row, index in zip(rows, range(len(self)), strict=True):
                row[:] = self._kept.wide(index, place)
            yield place, torch.from_numpy(rows)

    def __repr__(self) -> str:
        steps = f", steps {self.steps[0]} to {self.steps[-1]}" if len(self) else ""
        form = self.dtype if self.sketch is None else f"sketches of {self.sketch}"
        where = "in memory" if self._kept.folder is None else f"in {str(self._kept.folder)!r}"
        return (
            f"Trajectory({len(self)} snapshots of {self.size} parameters{steps}, {form}, {where})"
        )

    def _vector(self, model: nn.Module, layout: Layout, step: int) -> Array:
        """Return the parameters on the host, in float32 or float64."""
        named = dict(model.named_parameters(remove_duplicate=False))
        wide = np.float64 if self.dtype == "float64" else np.float32
        # NumPy's memory: a tensor made in inference mode could not be used outside of it.
        vector = np.empty(layout.size, dtype=wide)
        with torch.no_grad(), HOST:
            target = torch.from_numpy(vector)
            for (name, place), shape in zip(layout.slices(), layout.shapes, strict=True):
                found = named.get(name)
                if found is None or found.shape != shape:
                    now = "is gone" if found is None else f"is {tuple(found.shape)}"
                    raise StateMismatchError(
                        f"The parameter {name!r} was {tuple(shape)} when the Trajectory was made "
                        f"and {now} at step {step}; make another Trajectory."
                    )
                tensor = found.detach()
                dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
                target[place].copy_(dense.reshape(-1))
                if not np.isfinite(vector[place]).all():
                    raise NonFiniteError(
                        f"The parameter {name!r} holds NaN or infinity, or more than "
                        f"{vector.dtype} holds, at step {step}; that snapshot was not recorded."
                    )
        return vector

    def _stored(self, vector: Array) -> tuple[Array, int]:
        """Return a snapshot as it is kept, and the exponent of the power of two that scales it."""
        if self.dtype != "float16":
            return vector, 0
        exponent = MAXIMUM_EXPONENT - math.frexp(float(np.abs(vector).max(initial=0)))[1]
        return np.ldexp(vector, exponent).astype(np.float16), exponent

    def _projected(self, vector: Array, dimension: int) -> Array:
        with torch.no_grad(), HOST:
            if self._subspace is None:
                self._subspace = GaussianSubspace(
                    self.size,
                    dimension,
                    seed=self._kept.index.seed,
                    dtype=torch.float64,
                    device=HOST,
                )
            projected = self._subspace.project(torch.from_numpy(vector))
            found: Array = projected.numpy() / math.sqrt(dimension)
        return found


def _number(name: str, value: Any) -> float:
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(
            f"Trajectory.record keeps numbers with a snapshot; {name}= is {value!r}."
        ) from error
