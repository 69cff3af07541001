"""Results: frozen, comparable, readable, and written to JSON and back without a pickle."""

from __future__ import annotations

import base64
import collections.abc
import dataclasses
import enum
import json
import math
import sys
import types
import typing
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from .errors import InvalidArgumentError, closest

__all__ = ["Estimate", "Outcome", "Result", "Table", "format_number", "reading_notes"]

R = TypeVar("R", bound="Result")

_REGISTRY: dict[str, type[Result]] = {}

RENAMED = {"SharpnessResult": "EpsilonSharpnessResult"}
"""Names of the first release that are others now; its files can still be read."""


class Outcome(enum.Enum):
    """How a computation ended; the value is the sentence to read.

    Examples:
        >>> import flatminima as fm
        >>> fm.Outcome.CONVERGED.value
        'Converged: every residual is within the tolerance.'
    """

    COMPLETED = "Completed: everything was evaluated."
    CONVERGED = "Converged: every residual is within the tolerance."
    PRODUCT_LIMIT = (
        "Not converged: the product limit was reached before every pair was found to the tolerance."
    )
    INEXACT_PRODUCTS = (
        "As far as the products allow: they are differences of gradients or outputs, whose "
        "estimated error is above the tolerance; the error given includes it."
    )
    ITERATION_LIMIT = (
        "Stopped after the given number of iterations, as the metric prescribes; "
        "the true maximum may be higher."
    )
    STATIONARY = "The maximiser stopped by itself at a point from which it found no ascent."
    NO_ASCENT = "No evaluated point has a larger loss than the model itself."
    NO_DESCENT = "The loss is lower at no step along the update that was tried."
    UNBOUNDED = "The loss is infinite or NaN at a point of the region; the best finite one is kept."
    BELOW_ROUNDING = (
        "The differences are within the rounding error of the loss; use float64 or a larger step."
    )
    NOT_REACHED = (
        "The target level was not met within the range that was searched; the value is a bound."
    )
    NON_FINITE_POINTS = "Completed; the loss is infinite or NaN at some points."
    EXACT = "Exact up to rounding: the whole diagonal was computed."
    WITHIN_RTOL = "Converged: the estimated relative error is within rtol."
    ABOVE_RTOL = (
        "Not converged: the product limit was reached before the estimated relative error was "
        "within rtol."
    )

    @property
    def doubtful(self) -> bool:
        """Whether the number should not be used as it is."""
        return self in (
            Outcome.PRODUCT_LIMIT,
            Outcome.NO_DESCENT,
            Outcome.UNBOUNDED,
            Outcome.BELOW_ROUNDING,
            Outcome.NON_FINITE_POINTS,
            Outcome.NOT_REACHED,
            Outcome.ABOVE_RTOL,
        )

    @property
    def brief(self) -> str:
        """The same in a word or two, for a column of a table."""
        return {
            Outcome.ITERATION_LIMIT: "all iterations used",
            Outcome.PRODUCT_LIMIT: "NOT CONVERGED",
            Outcome.BELOW_ROUNDING: "BELOW ROUNDING",
            Outcome.NON_FINITE_POINTS: "NOT FINITE EVERYWHERE",
            Outcome.NO_DESCENT: "NO DESCENT",
            Outcome.UNBOUNDED: "UNBOUNDED",
            Outcome.NOT_REACHED: "NOT REACHED",
            Outcome.ABOVE_RTOL: "ABOVE RTOL",
        }.get(self, self.name.replace("_", " ").lower())


def format_number(value: float | None, digits: int = 4) -> str:
    """Return `value` with `digits` significant digits, as people write it.

    Examples:
        >>> format_number(0.00012345), format_number(1234567.0), format_number(2.5)
        ('1.234e-04', '1.235e+06', '2.5')
    """
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{digits}g}"


def reading_notes(readings: int) -> tuple[str, ...]:
    """Return what a table says of data that had to be read again.

    Examples:
        >>> reading_notes(0), reading_notes(27)
        ((), ('The data were read 27 times, since they are not kept on the device.',))
    """
    if readings == 0:
        return ()
    times = "once" if readings == 1 else f"{readings} times"
    return (f"The data were read {times}, since they are not kept on the device.",)


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text under a header, for a terminal and for a notebook.

    Examples:
        >>> import flatminima as fm
        >>> print(fm.Table(("name", "value"), (("a", "1"), ("b", "12"))).to_text())
        name  value
        ────  ─────
        a         1
        b        12
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    notes: tuple[str, ...] = ()

    def to_text(self) -> str:
        """Columns aligned: the first to the left, numbers to the right, sentences to the left."""
        grid = [self.header, *self.rows]
        widths = [max(len(row[c]) for row in grid) for c in range(len(self.header))]
        right = [self._numeric(c) for c in range(len(self.header))]
        lines = [self.title] if self.title else []
        for i, row in enumerate(grid):
            cells = [
                cell.rjust(w) if r else cell.ljust(w)
                for cell, w, r in zip(row, widths, right, strict=True)
            ]
            lines.append("  ".join(cells).rstrip())
            if i == 0:
                lines.append("  ".join("─" * w for w in widths))
        lines += [f"Note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_html(self) -> str:
        """Return the same table for a notebook, escaped."""
        import html

        def line(cells: Sequence[str], tag: str) -> str:
            parts = []
            for column, cell in enumerate(cells):
                align = "right" if self._numeric(column) else "left"
                parts.append(f'<{tag} style="text-align:{align}">{html.escape(cell)}</{tag}>')
            return "<tr>" + "".join(parts) + "</tr>"

        caption = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        body = "".join(line(row, "td") for row in self.rows)
        notes = "".join(f"<p><small>{html.escape(note)}</small></p>" for note in self.notes)
        return (
            f"<table>{caption}<thead>{line(self.header, 'th')}</thead>"
            f"<tbody>{body}</tbody></table>{notes}"
        )

    def to_markdown(self) -> str:
        """Return the same table for a README or a docs page."""
        marks = ["---:" if self._numeric(c) else "---" for c in range(len(self.header))]
        lines = [self.header, tuple(marks), *self.rows]
        table = "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines
        )
        notes = "".join(f"\n\n{note}" for note in self.notes)
        return (f"**{self.title}**\n\n" if self.title else "") + table + notes

    def _numeric(self, column: int) -> bool:
        cells = [row[column] for row in self.rows if row[column]]
        return column > 0 and bool(cells) and all(c[0] in "0123456789-−–∞N×" for c in cells)


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What every measurement returns: a frozen record that prints itself and goes to JSON.

    Two results are equal when every field is, NaN equal to NaN and tensors bit for bit, so
    `a == b` is the test that a repetition gave the same numbers.

    Examples:
        >>> import torch, flatminima as fm
        >>> result = fm.lanczos(fm.MatrixOperator(torch.diag(torch.tensor([3.0, 1.0]))), k=1)
        >>> fm.EigenResult.from_json(result.to_json()) == result
        True
    """

    JSON_VERSION: ClassVar[int] = 1

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known = _REGISTRY.setdefault(cls.__name__, cls)
        if known.__module__ != cls.__module__:
            raise TypeError(
                f"A Result named {cls.__name__!r} exists in {known.__module__}; names must differ, "
                "because saved results are found by them."
            )
        _REGISTRY[cls.__name__] = cls

    def table(self) -> Table:
        """Return the result as a table for people."""
        return self._table()

    def _table(self) -> Table:
        raise NotImplementedError

    def __repr__(self) -> str:
        return self.table().to_text()

    def _repr_html_(self) -> str:
        return self.table().to_html()

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return isinstance(other, Result) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, numbers and strings, with the class under `"type"`.

        Vectors of float64 become lists; other tensors a dict of dtype, shape and base64 bytes.
        Infinities and NaN become the strings `"inf"`, `"-inf"` and `"nan"`.
        """
        fields = {f.name: _encode(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"type": type(self).__name__, "version": self.JSON_VERSION, **fields}

    def to_json(self, *, indent: int | None = None) -> str:
        """Return [`to_dict`][flatminima.Result.to_dict] as strict JSON."""
        return json.dumps(self.to_dict(), allow_nan=False, indent=indent, ensure_ascii=False)

    @classmethod
    def from_dict(cls: type[R], data: dict[str, Any]) -> R:
        """Return the result that [`to_dict`][flatminima.Result.to_dict] was made from.

        Called on `Result` itself it takes any kind of result.

        Raises:
            InvalidArgumentError: `data` is not of this class, of an unknown version, or lacks
                a field.
        """
        if not isinstance(data, dict) or "type" not in data:
            raise InvalidArgumentError(
                f"{cls.__name__}.from_dict takes what to_dict() gave, a dict with a 'type'; "
                f"got {str(data)[:80]!r}."
            )
        name = str(data["type"])
        name = RENAMED.get(name, name)
        if name not in _REGISTRY:
            # Files are loaded when a name of theirs is first asked of the package.
            getattr(sys.modules[__package__], name, None)
        kind = _REGISTRY.get(name)
        if kind is None or not issubclass(kind, cls):
            known = [n for n, c in _REGISTRY.items() if issubclass(c, cls)]
            raise InvalidArgumentError(
                f"This is the data of {name!r}, not of {cls.__name__}. {closest(name, known)}"
            )
        if data.get("version") != cls.JSON_VERSION:
            raise InvalidArgumentError(
                f"{name} data of version {data.get('version')!r}; this release reads version "
                f"{cls.JSON_VERSION}."
            )
        hints = typing.get_type_hints(kind)
        names = [f.name for f in dataclasses.fields(kind)]
        missing = [n for n in names if n not in data]
        if missing:
            raise InvalidArgumentError(f"{name} data without {', '.join(missing)}.")
        fields = {}
        for field in names:
            try:
                fields[field] = _decode(data[field], hints[field])
            except InvalidArgumentError:
                raise
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                raise InvalidArgumentError(
                    f"{name} data whose {field!r} cannot be read: {str(data[field])[:80]!r}."
                ) from error
        return kind(**fields)

    @classmethod
    def from_json(cls: type[R], text: str) -> R:
        """Return the result that [`to_json`][flatminima.Result.to_json] wrote."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise InvalidArgumentError(
                f"{cls.__name__}.from_json takes what to_json() gave: {error}."
            ) from error
        return cls.from_dict(data)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Estimate(Result):
    """A number from random samples, and its standard error.

    Attributes:
        value: the mean of the samples.
        standard_error: of `value`, from their spread.

    Examples:
        >>> import torch, flatminima as fm
        >>> operator = fm.MatrixOperator(torch.diag(torch.tensor([1.0, 2.0, 6.0])))
        >>> mean = fm.spectral_density(operator, probes=200, steps=3).mean()
        >>> abs(mean.value - 3) < 4 * mean.standard_error < 1
        True
    """

    value: float
    standard_error: float

    def _table(self) -> Table:
        return Table(
            header=("value", "standard error"),
            rows=((format_number(self.value), format_number(self.standard_error, 2)),),
        )


def _encode(value: Any) -> Any:
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, torch.Tensor):
        return _encode_tensor(value)
    if isinstance(value, dict):
        return {str(k): _encode(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_encode(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


def _encode_tensor(tensor: torch.Tensor) -> Any:
    if tensor.dtype == torch.float64 and tensor.dim() == 1:
        return [_encode(v) for v in tensor.tolist()]
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "base64": base64.b64encode(raw).decode("ascii"),
    }


def _decode_tensor(value: Any) -> torch.Tensor:
    if isinstance(value, list):
        return torch.tensor([float(v) for v in value], dtype=torch.float64)
    raw = np.frombuffer(base64.b64decode(value["base64"]), dtype=np.uint8).copy()
    dtype = getattr(torch, value["dtype"])
    if raw.size == 0:  # no bytes, which view() refuses
        return torch.empty(value["shape"], dtype=dtype)
    return torch.from_numpy(raw).view(dtype).reshape(value["shape"])


def _decode(value: Any, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _decode(value, next(a for a in arguments if a is not type(None)))
    if origin is tuple:
        return tuple(_decode(v, arguments[0]) for v in value)
    if origin in (dict, collections.abc.Mapping):
        return {k: _decode(v, arguments[1]) for k, v in value.items()}
    if hint is torch.Tensor:
        return _decode_tensor(value)
    if hint is float:
        return float(value)
    if isinstance(hint, type) and issubclass(hint, Result):
        return hint.from_dict(value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint[value]
    return value
