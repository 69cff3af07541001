"""Records of trained nets by their hyper-parameters, one JSON file each."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rank_correlation import TARGETS


@dataclasses.dataclass(frozen=True)
class Net:
    """The hyper-parameters of one net."""

    batch_size: int
    learning_rate: float
    width: int
    weight_decay: float
    seed: int

    def __str__(self) -> str:
        return (
            f"batch {self.batch_size}, learning rate {self.learning_rate:g}, width {self.width}, "
            f"weight decay {self.weight_decay:g}, seed {self.seed}"
        )


class Cache:
    """One file per net, used only if all settings agree.

    Args:
        folder: where the files are.
        shared: settings that all nets have in common.
    """

    def __init__(self, folder: Path, shared: Mapping[str, Any]) -> None:
        self.folder = folder
        self._shared = dict(shared)

    def settings(self, net: Net) -> dict[str, Any]:
        """Return everything a net depends on, in the form that JSON gives back."""
        everything = {**self._shared, "net": dataclasses.asdict(net)}
        found: dict[str, Any] = json.loads(json.dumps(everything))
        return found

    def path(self, net: Net) -> Path:
        """Return the path of the file for a net with these settings."""
        text = json.dumps(self.settings(net), sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        return self.folder / f"batch{net.batch_size}-width{net.width}-seed{net.seed}-{key}.json"

    def read(self, net: Net) -> dict[str, Any] | None:
        """Return the record of a net, or None; print why if a file cannot be used."""
        path = self.path(net)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["settings"] != self.settings(net):
                raise ValueError("it is of a net with other settings")
            record: dict[str, Any] = content["record"]
            needed = {"reached", "steps", "training_loss"}
            numbers: list[Any] = []
            if record.get("reached"):
                needed |= {*TARGETS, "measures", "doubtful", "baselines", "seconds"}
                numbers = [*record["measures"].values(), *record["baselines"].values()]
                numbers = [v for v in numbers if v is not None] + [record[t] for t in TARGETS]
            if not needed <= set(record) or not all(isinstance(v, (int, float)) for v in numbers):
                raise ValueError("it is incomplete")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            what = error if isinstance(error, ValueError) else type(error).__name__
            print(f"ignored: {path} ({what}); training the net again")
            return None
        return record

    def write(self, net: Net, record: Mapping[str, Any]) -> None:
        """Write the record of a net, completely or not at all."""
        path = self.path(net)
        part = path.with_suffix(f".{os.getpid()}.part")
        content = {"settings": self.settings(net), "record": record}
        try:
            part.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
