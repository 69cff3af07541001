"""Layers: convolutions, normalisations, activations, embeddings, and operations whose second
derivative PyTorch does not have, written out by hand for the oracle.
"""

import torch
import torch.nn.functional as F
from torch import nn

from cases import (
    Case,
    batch_by_batch,
    case,
    cross_entropy,
    cut,
    joined,
    mean_cross_entropy,
    mean_squared_error,
    settle_batch_norm,
)


class ResidualBlock(nn.Module):
    def __init__(self, inputs, outputs, stride, activation):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            activation(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.last = activation()

    def forward(self, x):
        return self.last(self.body(x) + self.shortcut(x))


def small_resnet(activation):
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, bias=False),
        nn.BatchNorm2d(2),
        activation(),
        ResidualBlock(2, 2, 1, activation),
        ResidualBlock(2, 3, 2, activation),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 3),
    )


def image_case(model, shape, sizes, **options):
    """Random images in three classes."""
    x, y = torch.randn(sum(sizes), *shape), torch.randint(3, (sum(sizes),))
    settle_batch_norm(model, x)
    return Case(
        model=model,
        batches=cut((x, y), sizes),
        loss_fn=nn.CrossEntropyLoss(),
        **{"full_loss": mean_cross_entropy, **options},
    )


@case("ResNet with ReLU and batch norm")
def resnet(dtype):
    torch.manual_seed(225)  # no unit is within 5e-4 of a kink
    return image_case(small_resnet(nn.ReLU), (1, 6, 6), (5, 4, 2))


@case("ResNet with SiLU and batch norm")
def resnet_train(dtype):
    torch.manual_seed(31)
    return image_case(
        small_resnet(nn.SiLU),
        (1, 6, 6),
        (5, 4, 2),
        mode="train",
        full_loss=batch_by_batch(lambda m, batch: cross_entropy(m(batch[0]), batch[1])),
    )


@case("Conv1d with max pooling")
def conv1d(dtype):
    torch.manual_seed(32)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1),
        nn.Mish(),
        nn.MaxPool1d(2),
        nn.Conv1d(4, 4, 3, dilation=2, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    return image_case(model, (2, 10), (4, 6, 3))


@case("Conv3d")
def conv3d(dtype):
    torch.manual_seed(33)
    model = nn.Sequential(
        nn.Conv3d(1, 3, 2), nn.Tanh(), nn.AvgPool3d(2), nn.Flatten(), nn.Linear(3, 3)
    )
    return image_case(model, (1, 3, 3, 3), (4, 1, 5))


@case("Transposed convolution and bilinear upsampling")
def upsampling(dtype):
    torch.manual_seed(34)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1),
        nn.Softplus(),
        nn.ConvTranspose2d(3, 2, 2, stride=2),
        nn.ELU(),
        nn.Upsample(scale_factor=1.5, mode="bilinear"),
        nn.Conv2d(2, 1, 3, padding=1),
    )
    x, y = torch.randn(7, 1, 4, 4), torch.randn(7, 1, 6, 6)
    return Case(
        model=model,
        batches=cut((x, y), (3, 4)),
        loss_fn=nn.MSELoss(),
        full_loss=mean_squared_error,
    )


@case("Conv net in channels_last format")
def channels_last(dtype):
    torch.manual_seed(35)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.Conv2d(4, 3, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 3),
    ).to(memory_format=torch.channels_last)
    made = image_case(model, (2, 4, 4), (5, 3, 2))
    made.batches = [(x.to(memory_format=torch.channels_last), y) for x, y in made.batches]
    return made


@case("MLP with LayerNorm and GELU")
def layer_norm(dtype):
    torch.manual_seed(42)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 5), nn.RMSNorm(5), nn.Linear(5, 3)
    )
    return image_case(model, (4,), (9, 2, 6))


@case("Conv net with GroupNorm and SiLU")
def group_norm(dtype):
    torch.manual_seed(37)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nn.Conv2d(4, 2, 2),
        nn.InstanceNorm2d(2, affine=True),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    return image_case(model, (1, 5, 5), (3, 6, 1))


@case("Embedding with padding_idx")
def embedding_padding(dtype):
    torch.manual_seed(38)

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 4, padding_idx=2)
            self.head = nn.Linear(4, 3)

        def forward(self, ids):
            kept = (ids != 2)[..., None]
            return self.head((torch.tanh(self.embedding(ids)) * kept).sum(1))

    model = Mean()
    nn.init.normal_(model.embedding.weight)  # the row of the padding too
    ids, y = torch.randint(7, (12, 5)), torch.randint(3, (12,))

    def full_loss(m, batches):
        ids = joined(batches, 0)
        table = torch.tanh(m.embedding.weight)
        counts = F.one_hot(ids, 7).sum(1) * (torch.arange(7) != 2)
        scores = m.head(counts.to(table) @ table)
        return cross_entropy(scores, joined(batches, 1))

    return Case(
        model=model,
        batches=cut((ids, y), (7, 5)),
        loss_fn=nn.CrossEntropyLoss(),
        full_loss=full_loss,
    )


# ------------------------------------------------- operations without a second derivative


class BagClassifier(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.bag = nn.EmbeddingBag(8, 4, mode=mode)
        self.head = nn.Sequential(nn.Tanh(), nn.Linear(4, 3))

    def forward(self, ids, offsets):
        return self.head(self.bag(ids, offsets))


def bag_case(mode, reduce):
    """`reduce` makes one vector (C,) of a bag's rows (K, C)."""
    batches = []
    for lengths in ((3, 1, 4), (2, 5), (1, 3, 2, 2)):
        ids = torch.randint(8, (sum(lengths),))
        offsets = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))])
        batches.append({"ids": ids, "offsets": offsets, "y": torch.randint(3, (len(lengths),))})

    def full_loss(m, batches):
        bags = []
        for batch in batches:
            sizes = torch.diff(batch["offsets"], append=torch.tensor([len(batch["ids"])]))
            bags += torch.split(m.bag.weight[batch["ids"]], sizes.tolist())
        return cross_entropy(m.head(torch.stack([reduce(b) for b in bags])), joined(batches, "y"))

    return Case(
        model=BagClassifier(mode),
        batches=batches,
        batch_loss=lambda m, batch: F.cross_entropy(m(batch["ids"], batch["offsets"]), batch["y"]),
        full_loss=full_loss,
        weight=lambda batch: len(batch["y"]),
    )


@case("EmbeddingBag, sums", approximate="_embedding_bag_backward")
def embedding_bag_sum(dtype):
    torch.manual_seed(39)
    return bag_case("sum", lambda rows: rows.sum(0))


@case("EmbeddingBag, means", approximate="_embedding_bag_backward")
def embedding_bag_mean(dtype):
    torch.manual_seed(40)
    return bag_case("mean", lambda rows: rows.sum(0) / len(rows))


@case("EmbeddingBag, maxima", approximate="_embedding_bag_backward")
def embedding_bag_max(dtype):
    torch.manual_seed(207)  # no two rows come close in a maximum
    return bag_case("max", lambda rows: rows.max(0).values)


@case("MLP with Hardsigmoid", approximate="hardsigmoid_backward", dtypes=(torch.float32,))
def hardsigmoid(dtype):
    # Its gradient in PyTorch is a sixth rounded to float32, also in float64.
    torch.manual_seed(223)  # no unit is within 0.3 of a kink
    model = nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Hardsigmoid(), nn.Linear(6, 3)
    )
    with torch.no_grad():
        model[2].weight *= 6  # some units reach the flat ends

    def full_loss(m, batches):
        hidden = torch.clamp(m[2](torch.tanh(m[0](joined(batches, 0)))) / 6 + 0.5, 0, 1)
        return cross_entropy(m[4](hidden), joined(batches, 1))

    return image_case(model, (4,), (6, 3, 7), full_loss=full_loss)


@case("Distances by cdist", approximate="_cdist_backward")
def cdist(dtype):
    torch.manual_seed(43)

    class Prototypes(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
            self.centres = nn.Parameter(torch.randn(3, 2))

        def forward(self, x):
            return -torch.cdist(self.body(x), self.centres)

    def full_loss(m, batches):
        between = m.body(joined(batches, 0))[:, None] - m.centres
        return cross_entropy(-between.square().sum(-1).sqrt(), joined(batches, 1))

    return image_case(Prototypes(), (4,), (5, 5, 3), full_loss=full_loss)


def ctc_by_hand(log_probs, labels):
    """−log of the sum over all alignments of `labels`; log_probs (T, C) of one sequence."""
    never = torch.full((), -1e30, dtype=log_probs.dtype)  # −∞ would give NaN derivatives
    states = [0]
    for label in labels.tolist():
        states += [label, 0]
    alpha = [log_probs[0, states[0]], log_probs[0, states[1]]] + [never] * (len(states) - 2)
    for t in range(1, len(log_probs)):
        before, alpha = alpha, []
        for s, state in enumerate(states):
            paths = before[max(s - 1, 0) : s + 1]
            if s >= 2 and state not in (0, states[s - 2]):
                paths = before[s - 2 : s + 1]
            alpha.append(torch.stack(paths).logsumexp(0) + log_probs[t, state])
    return -torch.stack(alpha[-2:]).logsumexp(0)


@case("CTC loss", approximate="_ctc_loss_backward")
def ctc_loss(dtype):
    torch.manual_seed(44)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.LogSoftmax(dim=2))
    batches = []
    for lengths in (((6, 2), (4, 1), (5, 3)), ((3, 1), (5, 2))):
        long, wide = (max(lengths, key=lambda pair: pair[i])[i] for i in (0, 1))
        batches.append(
            {
                "x": torch.randn(len(lengths), long, 3),
                "labels": torch.randint(1, 4, (len(lengths), wide)),
                "x_lengths": torch.tensor([i for i, _ in lengths]),
                "label_lengths": torch.tensor([j for _, j in lengths]),
            }
        )
    batches[0]["labels"][0] = 2  # a repeated label needs a blank in between

    def batch_loss(m, batch):
        log_probs = m(batch["x"]).transpose(0, 1)
        return F.ctc_loss(log_probs, batch["labels"], batch["x_lengths"], batch["label_lengths"])

    def full_loss(m, batches):
        terms = [
            ctc_by_hand(m(x[None, :i])[0], labels[:j]) / j
            for b in batches
            for x, labels, i, j in zip(
                b["x"],
                b["labels"],
                b["x_lengths"].tolist(),
                b["label_lengths"].tolist(),
                strict=True,
            )
        ]
        return sum(terms) / len(terms)

    return Case(
        model=model,
        batches=batches,
        batch_loss=batch_loss,
        full_loss=full_loss,
        weight=lambda batch: len(batch["labels"]),
    )


class SpatialTransformer(nn.Module):
    """Shifts and turns each image before it is classified."""

    def __init__(self):
        super().__init__()
        self.locate = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Tanh(), nn.Linear(3, 6))
        with torch.no_grad():
            self.locate[3].weight *= 0.3
            self.locate[3].bias.copy_(torch.tensor([0.9, 0.1, 0.2, -0.1, 1.1, -0.2]))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))

    def forward(self, x):
        grid = F.affine_grid(self.locate(x).view(-1, 2, 3), x.shape, align_corners=False)
        return self.head(F.grid_sample(x, grid, align_corners=False))


def sampled_by_hand(images, grid):
    """Bilinear, zeros outside; images (N, 1, H, W), grid (N, H', W', 2) → (N, 1, H', W')."""
    n, _, height, width = images.shape
    x = ((grid[..., 0] + 1) * width - 1) / 2
    y = ((grid[..., 1] + 1) * height - 1) / 2
    left, top = x.detach().floor(), y.detach().floor()
    rows = torch.arange(n)[:, None, None]
    total = 0
    for i in (0, 1):
        for j in (0, 1):
            column, row = (left + i).long(), (top + j).long()
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            values = images[rows, 0, row.clamp(0, height - 1), column.clamp(0, width - 1)]
            weight = (1 - (x - (left + i)).abs()) * (1 - (y - (top + j)).abs())
            total = total + torch.where(inside, values * weight, 0.0)
    return total[:, None]


def _grid_sample_once():
    """The operation's name where this PyTorch has no second derivative of it."""
    image = torch.ones(1, 1, 2, 2)
    grid = torch.full((1, 1, 1, 2), 0.1, requires_grad=True)
    sample = F.grid_sample(image, grid, align_corners=False).square().sum()
    (gradient,) = torch.autograd.grad(sample, grid, create_graph=True)
    try:
        torch.autograd.grad(gradient.sum(), grid)
    except RuntimeError:
        return "grid_sampler_2d"
    return None


@case("Spatial transformer by grid_sample", approximate=_grid_sample_once())
def grid_sample(dtype):
    torch.manual_seed(237)  # no point is within 0.01 of a pixel's edge

    def full_loss(m, batches):
        x = joined(batches, 0)
        theta = m.locate(x).view(-1, 2, 3)
        centres = (2 * torch.arange(4, dtype=x.dtype) + 1) / 4 - 1
        base = torch.stack(
            [centres.repeat(4), centres.repeat_interleave(4), torch.ones(16, dtype=x.dtype)]
        )
        grid = (theta @ base).transpose(1, 2).view(-1, 4, 4, 2)
        return cross_entropy(m.head(sampled_by_hand(x, grid)), joined(batches, 1))

    return image_case(SpatialTransformer(), (1, 4, 4), (5, 2, 4), full_loss=full_loss)


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        sigmoid = torch.sigmoid(x)
        return gradient * (sigmoid + x * sigmoid * (1 - sigmoid))


def swish_by_hand(x):
    return x / (1 + torch.exp(-x))


class OwnFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.second(Swish.apply(self.first(x)))


@case("Custom autograd.Function, once differentiable", approximate="once_differentiable")
def once_differentiable(dtype):
    torch.manual_seed(46)

    def full_loss(m, batches):
        scores = m.second(swish_by_hand(m.first(joined(batches, 0))))
        return cross_entropy(scores, joined(batches, 1))

    return image_case(OwnFunction(), (4,), (3, 8, 5), full_loss=full_loss)


@case("Custom loss, once differentiable", approximate="once_differentiable")
def once_differentiable_loss(dtype):
    """Nothing but a mean comes after the function, so that its incoming gradient is constant.

    PyTorch does not complain then: it takes the function's own gradient for a constant.
    """
    torch.manual_seed(47)
    x, y = torch.randn(13, 4), torch.randn(13, 2)
    return Case(
        model=nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)),
        batches=cut((x, y), (6, 7)),
        loss_fn=lambda output, target: Swish.apply((output - target) ** 2).mean(),
        full_loss=lambda m, batches: (
            swish_by_hand((m(joined(batches, 0)) - joined(batches, 1)) ** 2).sum() / 26
        ),
    )
