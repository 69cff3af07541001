"""A file that a long evaluation keeps what it has done in, and goes on from."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentTypeError, InvalidArgumentError

__all__ = ["GridFile"]

VERSION = 1
SECONDS = 5.0
"""Between two writings."""


class GridFile:
    """Values of an evaluation point by point, written now and then, all of the file or nothing.

    Used as a context, it writes what there is at the end, also after an exception or Ctrl-C.

    Args:
        path: of an .npz file; None for no file.
        settings: what the evaluation depends on, by a name for people.
        values: (data sets, quantities, points), where nothing is known yet.

    Attributes:
        values: with what the file held already.

    Raises:
        InvalidArgumentError: the file is of another evaluation, or none of ours.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any], values: Tensor
    ) -> None:
        if path is not None and not isinstance(path, (str, os.PathLike)):
            raise ArgumentTypeError(
                f"The 'resume' argument must be the path of a file; got {path!r}."
            )
        self.path = None if path is None else Path(path)
        self.values = values
        self._marks = {name: _mark(setting) for name, setting in settings.items()}
        self._done = [0] * len(values)
        self._written = time.monotonic()
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidArgumentError(
                f"The folder of {self.path} cannot be made ({error}); give another resume=."
            ) from error
        if self.path.exists():
            self._read(self.path)

    def done(self, number: int) -> int:
        """Return how many points of a data set are known."""
        return self._done[number]

    def advance(self, number: int) -> None:
        """One more point of a data set is known."""
        self._done[number] += 1
        if self.path is not None and time.monotonic() - self._written > SECONDS:
            self._write(self.path)

    def __enter__(self) -> GridFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self.path is not None:
            self._write(self.path)

    def _write(self, path: Path) -> None:
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            with part.open("wb") as stream:
                np.savez(
                    stream,
                    version=np.array(VERSION),
                    settings=np.array(json.dumps(self._marks)),
                    done=np.array(self._done),
                    values=self.values.numpy(),
                )
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        self._written = time.monotonic()

    def _read(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as content:
                version, marks = int(content["version"]), json.loads(str(content["settings"]))
                done, values = content["done"].tolist(), torch.from_numpy(content["values"])
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise InvalidArgumentError(
                f"{path} cannot be read as a file of this evaluation ({error}); remove it, or give "
                "another resume=."
            ) from error
        if version != VERSION:
            raise InvalidArgumentError(
                f"{path} is of version {version}, and this release reads {VERSION}; remove it."
            )
        other = [name for name, mark in self._marks.items() if marks.get(name) != mark]
        if other:
            raise InvalidArgumentError(
                f"{path} holds another evaluation; what differs: {', '.join(other)}. Remove it, or "
                "give another resume=."
            )
        self._done, self.values = done, values


def _mark(setting: Any) -> str:
    """Return a checksum of a tensor, or of what JSON can say."""
    if isinstance(setting, Tensor):
        flat = setting.detach().cpu().contiguous()
        text = f"{flat.dtype} {tuple(flat.shape)}".encode()
        raw = flat.flatten().view(torch.uint8).numpy()
        return hashlib.sha256(text + raw.tobytes()).hexdigest()
    return hashlib.sha256(json.dumps(setting).encode()).hexdigest()
