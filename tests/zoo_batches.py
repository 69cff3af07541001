"""What goes in and comes out: graphs, nested batches, outputs of all kinds, physics."""

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from cases import Case, case, cross_entropy, cut, joined, mean_cross_entropy

# ---------------------------------------------------------------------------------------- graphs


class GraphBatch:
    """Several graphs as one, in the way of the graph libraries: an object that moves itself."""

    def __init__(self, x, edge_index, y, batch):
        self.x, self.edge_index, self.y, self.batch = x, edge_index, y, batch

    def to(self, *args, **kwargs):
        moved = (t.to(*args, **kwargs) for t in (self.x, self.edge_index, self.y, self.batch))
        return GraphBatch(*moved)


class GraphNet(nn.Module):
    """Two rounds of messages along the edges, then the mean over each graph's nodes."""

    def __init__(self):
        super().__init__()
        self.messages = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 4)])
        self.own = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 3)

    def forward(self, data):
        x = data.x
        source, target = data.edge_index
        for message, own in zip(self.messages, self.own, strict=True):
            received = torch.zeros(len(x), 4, dtype=x.dtype, device=x.device)
            received = received.index_add(0, target, message(x)[source])
            x = torch.tanh(own(x) + received)
        sums = torch.zeros(len(data.y), 4, dtype=x.dtype, device=x.device)
        counts = torch.bincount(data.batch, minlength=len(data.y))
        return self.head(sums.index_add(0, data.batch, x) / counts[:, None])


def random_graphs(sizes):
    edges, start = [], 0
    for size in sizes:
        ring = torch.arange(size)
        extra = torch.randint(size, (2, size))
        edges.append(start + torch.cat([torch.stack([ring, ring.roll(1)]), extra], 1))
        start += size
    batch = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return GraphBatch(
        torch.randn(start, 3), torch.cat(edges, 1), torch.randint(3, (len(sizes),)), batch
    )


@case("Graph net, batch objects with .to()")
def graph_network(dtype):
    torch.manual_seed(160)

    def full_loss(m, batches):
        scores = []
        for data in batches:
            adjacency = torch.zeros(len(data.x), len(data.x), dtype=data.x.dtype)
            for source, target in data.edge_index.T.tolist():
                adjacency[target, source] += 1
            x = data.x
            for message, own in zip(m.messages, m.own, strict=True):
                x = torch.tanh(own(x) + adjacency @ message(x))
            scores += [m.head(x[data.batch == i].mean(0)) for i in range(len(data.y))]
        return cross_entropy(torch.stack(scores), torch.cat([data.y for data in batches]))

    return Case(
        model=GraphNet(),
        batches=[random_graphs(sizes) for sizes in ((4, 3, 5), (2, 6), (3, 3, 1, 4))],
        batch_loss=lambda m, data: F.cross_entropy(m(data), data.y),
        full_loss=full_loss,
        weight=lambda data: len(data.y),
    )


# ---------------------------------------------------------------------------------------- physics


@case("Physics-informed net")
def physics_informed(dtype):
    """u″ + u² = sin x with u(0) = 1: twice by the input inside a loss that is differentiated."""
    torch.manual_seed(161)
    sizes = (6, 3, 8)
    places = torch.split(4 * torch.rand(sum(sizes), 1) - 2, sizes)
    start = torch.zeros(1, 1)

    def batch_loss(m, batch):
        x = batch["x"].detach().requires_grad_()
        u = m(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        residual = bend + u**2 - torch.sin(x)
        return (residual**2).mean() + (m(start.to(x)) - 1).square().sum()

    def full_loss(m, batches):
        x = joined(batches, "x")
        w, v = m[0].weight[:, 0], m[2].weight[0]
        t = torch.tanh(x * w + m[0].bias)
        u = t @ v + m[2].bias
        bend = (-2 * t * (1 - t**2) * w**2) @ v
        beginning = torch.tanh(m[0].bias) @ v + m[2].bias - 1
        return ((bend + u**2 - torch.sin(x[:, 0])) ** 2).sum() / len(x) + (beginning**2).sum()

    return Case(
        model=nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)),
        batches=[{"x": x} for x in places],
        batch_loss=batch_loss,
        full_loss=full_loss,
    )


# ---------------------------------------------------------------------------------------- outputs


@dataclasses.dataclass
class Output:
    scores: torch.Tensor
    hidden: torch.Tensor | None = None
    note: str = "scores come first"


class Wordy(nn.Module):
    """Gives more than its scores, in a container of the kind asked for."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        hidden = self.body(x)
        return self.kind(self.head(hidden), hidden)


def wordy_case(kind, pick):
    x, y = torch.randn(13, 4), torch.randint(3, (13,))
    return Case(
        model=Wordy(kind),
        batches=cut((x, y), (4, 7, 2)),
        batch_loss=lambda m, batch: F.cross_entropy(pick(m(batch[0])), batch[1]),
        full_loss=lambda m, batches: mean_cross_entropy(nn.Sequential(m.body, m.head), batches),
    )


@case("Model returning a tuple")
def tuple_output(dtype):
    torch.manual_seed(162)
    return wordy_case(lambda scores, hidden: (scores, hidden), lambda output: output[0])


@case("Model returning a mapping")
def mapping_output(dtype):
    torch.manual_seed(163)
    return wordy_case(
        lambda scores, hidden: {"scores": scores, "hidden": hidden, "note": None},
        lambda output: output["scores"],
    )


@case("Model returning a dataclass")
def dataclass_output(dtype):
    torch.manual_seed(164)
    return wordy_case(Output, lambda output: output.scores)


# --------------------------------------------------------------------------------- nested batches


@dataclasses.dataclass
class Sample:
    """A batch of sentences of unequal length, with numbers about each."""

    features: dict[str, Any]
    words: list[torch.Tensor]
    labels: torch.Tensor
    names: list[str]
    mask: torch.Tensor | None = None


class Pair(NamedTuple):
    sample: Sample
    weights: tuple[torch.Tensor, float]


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(6, 4)
        self.numbers = nn.Linear(3, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, sample):
        sentences = torch.stack([self.words(w).mean(0) for w in sample.words])
        return self.head(torch.tanh(sentences + self.numbers(sample.features["dense"]["x"])))


def random_sample(lengths):
    count = len(lengths)
    return Sample(
        features={"dense": {"x": torch.randn(count, 3)}, "kind": "random", "none": None},
        words=[torch.randint(6, (n,)) for n in lengths],
        labels=torch.randint(3, (count,)),
        names=[f"row {i}" for i in range(count)],
    )


def read_by_hand(m, samples):
    bags = torch.stack(
        [F.one_hot(w, 6).to(m.words.weight).sum(0) / len(w) for s in samples for w in s.words]
    )
    numbers = torch.cat([s.features["dense"]["x"] for s in samples])
    return m.head(torch.tanh(bags @ m.words.weight + m.numbers(numbers)))


@case("Dataclass batches: mappings, ragged lists, strings and None")
def dataclass_batches(dtype):
    torch.manual_seed(165)
    return Case(
        model=Reader(),
        batches=[random_sample(lengths) for lengths in ((2, 5, 1), (4, 4, 2, 3), (1,))],
        batch_loss=lambda m, sample: F.cross_entropy(m(sample), sample.labels),
        full_loss=lambda m, batches: cross_entropy(
            read_by_hand(m, batches), torch.cat([b.labels for b in batches])
        ),
        weight=lambda sample: len(sample.labels),
    )


@case("Named tuples of a dataclass and example weights")
def named_tuple_batches(dtype):
    torch.manual_seed(166)

    def batch_loss(m, pair):
        weights, _ = pair.weights
        losses = F.cross_entropy(m(pair.sample), pair.sample.labels, reduction="none")
        return (weights * losses).sum() / weights.sum()

    def full_loss(m, batches):
        scores = read_by_hand(m, [b.sample for b in batches])
        labels = torch.cat([b.sample.labels for b in batches])
        weights = torch.cat([b.weights[0] for b in batches])
        picked = scores.gather(1, labels[:, None])[:, 0]
        return (weights * (scores.logsumexp(1) - picked)).sum() / weights.sum()

    # Eighths are exact in every floating type, so that the objective is the same one in each.
    batches = [
        Pair(random_sample(lengths), (torch.randint(1, 9, (len(lengths),)) / 8, 1.0))
        for lengths in ((3, 1), (2, 2, 6), (5, 1, 4))
    ]
    return Case(
        model=Reader(),
        batches=batches,
        batch_loss=batch_loss,
        full_loss=full_loss,
        weight=lambda pair: pair.weights[0].sum(),
    )
