"""Vectors kept one after the other, in memory or as files of a folder, without a pickle."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ArgumentTypeError, InvalidArgumentError, StateMismatchError
from ...support.vectors import Layout

__all__ = ["Array", "Index", "Snapshots", "check_recorded", "described", "difference"]

Array = NDArray[Any]

INDEX = "index.json"
FORMAT = "flatminima trajectory"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Index:
    """What all snapshots have in common.

    Attributes:
        layout: the name and shape of each parameter tensor.
        size: number of parameters n.
        dtype: of the files.
        sketch: numbers in each file where they are sketches; None where they are whole.
        seed: of the sketch.
    """

    layout: tuple[str, ...]
    size: int
    dtype: str
    sketch: int | None
    seed: int


def described(layout: Layout) -> tuple[str, ...]:
    """Return the name and the shape of each tensor, to be compared and shown."""
    return tuple(
        f"{name} {tuple(shape)}" for name, shape in zip(layout.names, layout.shapes, strict=True)
    )


def difference(recorded: Sequence[str], given: Sequence[str]) -> str:
    """Return what tells two lists of tensors apart, a part of a sentence; "" where nothing does."""
    if tuple(recorded) == tuple(given):
        return ""
    parts = []
    for label, one, other in (
        ("recorded", recorded, given),
        ("here", given, recorded),
    ):
        alone = [name for name in one if name not in set(other)]
        if alone:
            more = f" and {len(alone) - 4} more" if len(alone) > 4 else ""
            parts.append(f"only {label}: {', '.join(alone[:4])}{more}")
    return "; ".join(parts) or "the same tensors in another order"


def check_recorded(call: str, recorded: Sequence[str], layout: Layout) -> None:
    """Refuse an objective of other parameters than were recorded, saying what differs."""
    found = difference(recorded, described(layout))
    if found:
        raise StateMismatchError(
            f"{call}: the objective has other parameters than were recorded ({found})."
        )


class Snapshots:
    """Snapshots with their steps and numbers; the index is written after each, all or nothing.

    Args:
        index: what they have in common.
        path: a folder, or None to keep them in memory.
        resume: whether the folder may hold some already.

    Attributes:
        index: as given.
        folder: where they are, or None.
        calls: of `Trajectory.record` until the last snapshot.
        numbers: for each snapshot.
    """

    def __init__(
        self, index: Index, path: str | os.PathLike[str] | None, resume: bool = False
    ) -> None:
        self.index, self.calls = index, 0
        self.folder = None if path is None else _folder(path)
        self.numbers: list[dict[str, float]] = []
        self._steps: list[int] = []
        self._exponents: list[int] = []
        # Of a folder, each file mapped into memory once it has been read.
        self._arrays: list[Array | None] = []
        self._last: Array | None = None
        if self.folder is None:
            if resume:
                raise InvalidArgumentError("Trajectory(resume=True) needs the path of a folder.")
            return
        if self.folder.is_dir() and any(self.folder.iterdir()):
            self._join(self.folder, resume)
        elif self.folder.exists() and not self.folder.is_dir():
            raise InvalidArgumentError(f"{str(self.folder)!r} is a file; give a folder as path=.")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Snapshots:
        """Return those of a folder, none of whose files is missing."""
        folder = _folder(path)
        data = _read(folder)
        made = cls(_common(folder, data), None)
        made.folder = folder
        made._take(data)
        for number in range(len(made)):
            made._array(number)
        return made

    def append(
        self,
        step: int,
        row: Array,
        exponent: int,
        numbers: dict[str, float],
        calls: int,
        whole: Array | None = None,
    ) -> None:
        """Keep one more.

        Args:
            step: of training.
            row: which is held on to.
            exponent: of the power of two by which it is multiplied.
            numbers: kept with it.
            calls: until then.
            whole: the vector that `row` is a sketch of, in place of the last one.
        """
        number = len(self)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_array(self.folder / _file(number), row)
            if whole is not None:
                _write_array(self.folder / _whole(number), whole)
        self._steps.append(step)
        self._exponents.append(exponent)
        self.numbers.append(numbers)
        self._arrays.append(row if self.folder is None else None)
        self.calls = calls
        if self.folder is None:
            self._last = whole
            return
        try:
            self._write_index(self.folder)
        except BaseException:
            # What the index does not name was never recorded.
            for entries in (self._steps, self._exponents, self.numbers, self._arrays):
                del entries[number]
            raise
        if whole is not None and number:
            (self.folder / _whole(number - 1)).unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def steps(self) -> tuple[int, ...]:
        """Of training, for each."""
        return tuple(self._steps)

    def wide(self, number: int, place: slice, *, copy: bool = False) -> Array:
        """Return the entries of a snapshot in float32, or float64 where they are."""
        part = self._array(number)[place]
        if part.dtype == np.float16:
            found: Array = np.ldexp(part.astype(np.float32), -self._exponents[number])
            return found
        return np.array(part) if copy else part

    def last(self) -> Array:
        """Return the last vector in full, where sketches are kept."""
        if self.folder is not None:
            return _read_array(self.folder / _whole(len(self) - 1), self.index.size, "float64")
        last = self._last
        assert last is not None
        return last

    def _array(self, number: int) -> Array:
        array, folder = self._arrays[number], self.folder
        if array is not None:
            return array
        assert folder is not None
        width = self.index.size if self.index.sketch is None else self.index.sketch
        # Mapped again each time: a process may hold few files open.
        return _read_array(folder / _file(number), width, self.index.dtype)

    def _join(self, folder: Path, resume: bool) -> None:
        """Go on with what the folder holds, after comparing."""
        data = _read(folder)
        held = _common(folder, data)
        found = difference(held.layout, self.index.layout)
        settings = [
            f"{name} {getattr(held, name)!r} instead of {getattr(self.index, name)!r}"
            for name in ("dtype", "sketch", "seed")
            if getattr(held, name) != getattr(self.index, name)
        ]
        if found:
            raise StateMismatchError(
                f"The folder {str(folder)!r} holds the trajectory of another model "
                f"({found}); give another path."
            )
        if settings:
            raise StateMismatchError(
                f"The folder {str(folder)!r} holds a trajectory with {', '.join(settings)}; "
                "give the same, or another path."
            )
        self._take(data)
        if not resume:
            raise InvalidArgumentError(
                f"The folder {str(folder)!r} holds a trajectory already, {len(self)} "
                "snapshots; give another path, or resume=True to go on with it."
            )

    def _take(self, data: dict[str, Any]) -> None:
        entries = data["snapshots"]
        self.calls = int(data["calls"])
        self._steps = [int(entry["step"]) for entry in entries]
        self._exponents = [int(entry["exponent"]) for entry in entries]
        self.numbers = [{n: float(v) for n, v in entry["numbers"].items()} for entry in entries]
        self._arrays = [None] * len(entries)

    def _write_index(self, folder: Path) -> None:
        entries = zip(self._steps, self._exponents, self.numbers, strict=True)
        data = {
            "format": FORMAT,
            "version": VERSION,
            **dataclasses.asdict(self.index),
            "calls": self.calls,
            "snapshots": [
                {
                    "step": step,
                    "exponent": exponent,
                    # Strict JSON has no word for these.
                    "numbers": {n: v if math.isfinite(v) else repr(v) for n, v in numbers.items()},
                }
                for step, exponent, numbers in entries
            ],
        }
        text = json.dumps(data, allow_nan=False, ensure_ascii=False)
        _replace(folder / INDEX, lambda file: file.write(text.encode("utf-8")))


def _file(number: int) -> str:
    return f"snapshot-{number:06d}.npy"


def _whole(number: int) -> str:
    return f"last-{number:06d}.npy"


def _folder(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentTypeError(f"The 'path' of a Trajectory must be a folder's; got {path!r}.")
    return Path(path)


def _read(folder: Path) -> dict[str, Any]:
    """Return the index of a folder."""
    try:
        data = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        data = None
    except ValueError as error:
        raise InvalidArgumentError(
            f"The index of the folder {str(folder)!r} cannot be read: {error}."
        ) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise InvalidArgumentError(
            f"The folder {str(folder)!r} does not hold a trajectory ({INDEX} is missing, or "
            "something else); give a new folder, or that of a trajectory."
        )
    if data.get("version") != VERSION:
        raise InvalidArgumentError(
            f"The trajectory in {str(folder)!r} is of version {data.get('version')!r}; this "
            f"release reads version {VERSION}."
        )
    return data


def _common(folder: Path, data: dict[str, Any]) -> Index:
    names = [field.name for field in dataclasses.fields(Index)]
    missing = [n for n in (*names, "calls", "snapshots") if n not in data]
    if missing:
        raise InvalidArgumentError(
            f"The index of the folder {str(folder)!r} lacks {', '.join(missing)}."
        )
    return Index(**{n: data[n] for n in names} | {"layout": tuple(data["layout"])})


def _read_array(path: Path, width: int, dtype: str) -> Array:
    """Return a file's numbers, mapped into memory."""
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(
            f"The snapshot {str(path)!r}, which the index names, cannot be read: {error}"
        ) from error
    if array.shape != (width,) or array.dtype != np.dtype(dtype):
        raise InvalidArgumentError(
            f"The snapshot {str(path)!r} is {array.shape} of {array.dtype}, not the ({width},) of "
            f"{dtype} that the index names."
        )
    return array


def _write_array(path: Path, array: Array) -> None:
    _replace(path, lambda file: np.save(file, array, allow_pickle=False))


def _replace(path: Path, write: Any) -> None:
    """Write a file so that there is either the old one or the new one."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
