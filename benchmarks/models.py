"""The models that are measured; they and their data are drawn from a seed."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MODELS", "Problem", "transformer256"]


class Problem:
    """A model, its loss and its batches.

    Args:
        model: moved to the device, in evaluation mode.
        batches: (input, target) pairs.
        device: where.
    """

    def __init__(self, model: nn.Module, batches: list[tuple[Tensor, Tensor]], device: str) -> None:
        self.model = model.to(device).eval()
        self.batches = [(x.to(device), y.to(device)) for x, y in batches]
        self.loss_fn = nn.CrossEntropyLoss()
        self.device = device

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.model.parameters())

    def train(self, steps: int, rate: float = 1e-3) -> None:
        """A few steps of Adam, so that the spectrum is that of a trained net."""
        optimizer = torch.optim.Adam(self.model.parameters(), rate)
        self.model.train()
        for step in range(steps):
            x, y = self.batches[step % len(self.batches)]
            optimizer.zero_grad()
            self.loss_fn(self.model(x), y).backward()
            optimizer.step()
        self.model.eval()

    def gradient(self) -> list[Tensor]:
        """The gradient of the whole data set as a training loop computes it."""
        parameters = list(self.model.parameters())
        total = [torch.zeros_like(p) for p in parameters]
        count = sum(len(y) for _, y in self.batches)
        for x, y in self.batches:
            gradients = torch.autograd.grad(self.loss_fn(self.model(x), y), parameters)
            torch._foreach_add_(total, gradients, alpha=len(y) / count)
        return total


class ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions with batch norm, and a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width)])
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, width, H / stride, W / stride)."""
        out = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(out)) + self.shortcut(x))


class ResNet20(nn.Module):
    """He et al. 2016, for 32 × 32 images."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)]
        layers.append(nn.ReLU())
        channels = 16
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            for number in range(3):
                layers.append(ResidualBlock(channels, width, stride if number == 0 else 1))
                channels = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) → (N, 10)."""
        out: Tensor = self.head(self.body(x).mean((2, 3)))
        return out


class LanguageModel(nn.Module):
    """Token ids (N, T) → scores (N, tokens, T) by an LSTM or a causal transformer."""

    def __init__(self, kind: str, tokens: int = 64, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.head = nn.Linear(width, tokens)
        self.kind = kind
        if kind == "lstm":
            self.body: nn.Module = nn.LSTM(width, width, 2, batch_first=True)
        else:
            layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True)
            self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Scores of the next token at every place."""
        hidden = self.embedding(ids)
        if self.kind == "lstm":
            hidden = self.body(hidden)[0]
        else:
            mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
            hidden = self.body(hidden, mask=mask, is_causal=True)
        out: Tensor = self.head(hidden).transpose(1, 2)
        return out


def _classes(shape: tuple[int, ...], sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Inputs around a mean of each class, as data are that a net can learn."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(10, *shape, generator=generator)
    batches = []
    for size in sizes:
        labels = torch.randint(10, (size,), generator=generator)
        noise = torch.randn(size, *shape, generator=generator)
        batches.append((0.3 * means[labels] + noise, labels))
    return batches


def _tokens(length: int, sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(64, (n, length + 1), generator=generator) for n in sizes]
    # The next token is mostly the present one plus one, which can be learnt.
    sequences = [(d.cumsum(1) % 7 + torch.arange(length + 1)) % 64 for d in draws]
    return [(s[:, :-1].contiguous(), s[:, 1:].contiguous()) for s in sequences]


def mlp(device: str) -> Problem:
    """784-512-512-512-10 with batch norm, in four batches of 256."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for width in (784, 512, 512):
        layers += [nn.Linear(width, 512), nn.BatchNorm1d(512), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(512, 10))
    return Problem(model, _classes((784,), (256,) * 4), device)


def resnet20(device: str) -> Problem:
    """ResNet-20, in two batches of 128 images of 32 × 32."""
    torch.manual_seed(0)
    return Problem(ResNet20(), _classes((3, 32, 32), (128,) * 2), device)


def lstm(device: str) -> Problem:
    """A two-layer LSTM language model, in four batches of 32 sequences of 32 tokens."""
    torch.manual_seed(0)
    return Problem(LanguageModel("lstm"), _tokens(32, (32,) * 4), device)


def transformer(device: str) -> Problem:
    """A two-layer causal transformer, in four batches of 32 sequences of 64 tokens."""
    torch.manual_seed(0)
    return Problem(LanguageModel("transformer"), _tokens(64, (32,) * 4), device)


def transformer256(device: str) -> Problem:
    """The same transformer on sequences of 256 tokens, 8 in a batch."""
    torch.manual_seed(0)
    return Problem(LanguageModel("transformer"), _tokens(256, (8,)), device)


MODELS: dict[str, Callable[[str], Problem]] = {
    f.__name__: f for f in (mlp, resnet20, transformer, lstm)
}
