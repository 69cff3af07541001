"""Recurrent nets, fused and cell by cell, padded and packed; the oracle unrolls them by hand."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

from cases import (
    Case,
    batch_by_batch,
    case,
    cross_entropy,
    cut,
    joined,
    joined_tokens,
    padded_tokens,
    token_cross_entropy,
)

# ------------------------------------------------------------------------------------- by hand


def lstm_step(x, state, w, u, b, c):
    h, memory = state
    i, f, g, o = (x @ w.T + b + h @ u.T + c).chunk(4, 1)
    memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
    return o.sigmoid() * memory.tanh(), memory


def gru_step(x, state, w, u, b, c):
    (h,) = state
    given, kept = (x @ w.T + b).chunk(3, 1), (h @ u.T + c).chunk(3, 1)
    r, z = (given[0] + kept[0]).sigmoid(), (given[1] + kept[1]).sigmoid()
    return ((1 - z) * (given[2] + r * kept[2]).tanh() + z * h,)


def rnn_step(x, state, w, u, b, c):
    return ((x @ w.T + b + state[0] @ u.T + c).tanh(),)


STEPS = {nn.LSTM: (lstm_step, 2), nn.GRU: (gru_step, 1), nn.RNN: (rnn_step, 1)}


def unrolled(module, x, *, layer=0, reverse=False, lengths=None):
    """One layer in one direction, (N, T, I) → (N, T, H); steps beyond `lengths` do nothing."""
    step, parts = STEPS[type(module)]
    suffix = f"_l{layer}" + ("_reverse" if reverse else "")
    weights = [
        getattr(module, name + suffix) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    ]
    state = (x.new_zeros(len(x), module.hidden_size),) * parts
    times = range(x.shape[1])
    outputs = {}
    for t in reversed(times) if reverse else times:
        after = step(x[:, t], state, *weights)
        if lengths is not None:
            alive = (lengths > t)[:, None]
            after = tuple(torch.where(alive, a, s) for a, s in zip(after, state, strict=True))
        state = after
        outputs[t] = state[0]
    return torch.stack([outputs[t] for t in times], 1)


# -------------------------------------------------------------------------------------- models


class LanguageModel(nn.Module):
    def __init__(self, kind, tokens, width):
        super().__init__()
        self.embedding = nn.Embedding(tokens, 3)
        self.body = kind(3, width, batch_first=True)
        self.head = nn.Linear(width, tokens)

    def forward(self, ids):
        return self.head(self.body(self.embedding(ids))[0]).transpose(1, 2)


def language_model_case(kind, width):
    return Case(
        model=LanguageModel(kind, 6, width),
        batches=padded_tokens(6, [(6, 4, 1), (3, 3), (5, 1, 2)]),
        loss_fn=nn.CrossEntropyLoss(),
        full_loss=token_cross_entropy(lambda m, ids: m.head(unrolled(m.body, m.embedding(ids)))),
    )


@case("LSTM language model")
def lstm_language_model(dtype):
    torch.manual_seed(60)
    return language_model_case(nn.LSTM, 4)


@case("GRU language model")
def gru_language_model(dtype):
    torch.manual_seed(61)
    return language_model_case(nn.GRU, 4)


@case("Vanilla RNN language model")
def rnn_language_model(dtype):
    torch.manual_seed(62)
    return language_model_case(nn.RNN, 5)


class PackedTagger(nn.Module):
    """Reads (ids, lengths) in both directions, so that the padding must not be read."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.body = nn.LSTM(3, 3, batch_first=True, bidirectional=True)
        self.head = nn.Linear(6, 4)

    def forward(self, inputs):
        ids, lengths = inputs
        packed = pack_padded_sequence(
            self.embedding(ids), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        output, _ = pad_packed_sequence(self.body(packed)[0], batch_first=True)
        return self.head(output).transpose(1, 2)


@case("Bidirectional LSTM tagger, packed sequences")
def lstm_packed(dtype):
    torch.manual_seed(63)
    batches = []
    for ids, labels in padded_tokens(5, [(2, 6, 3), (4, 1), (1, 5, 5)]):
        tags = torch.where(labels == -100, labels, labels - 1)
        batches.append(((ids, (labels != -100).sum(1)), tags))

    def full_loss(m, batches):
        ids, tags = joined_tokens([(ids, tags) for (ids, _), tags in batches])
        lengths = torch.cat([lengths for (_, lengths), _ in batches])
        x = m.embedding(ids)
        both = [unrolled(m.body, x, reverse=r, lengths=lengths) for r in (False, True)]
        return cross_entropy(m.head(torch.cat(both, 2)), tags)

    return Case(
        model=PackedTagger(),
        batches=batches,
        loss_fn=nn.CrossEntropyLoss(),
        full_loss=full_loss,
    )


class PackedModel(nn.Module):
    """PackedSequence of ids → scores in the same order."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.body = nn.GRU(3, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, packed):
        order = packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices
        output, _ = self.body(PackedSequence(self.embedding(packed.data), *order))
        return self.head(output.data)


@case("GRU whose batches are PackedSequences")
def packed_batches(dtype):
    torch.manual_seed(64)
    batches = []
    for lengths in ((2, 5, 3), (4, 1), (6,)):
        pair = [
            pack_sequence([torch.randint(5, (n,)) for n in lengths], enforce_sorted=False)
            for _ in range(2)
        ]
        batches.append(tuple(pair))

    def full_loss(m, batches):
        scores, labels = [], []
        for inputs, targets in batches:
            ids, lengths = pad_packed_sequence(inputs, batch_first=True)
            tags, _ = pad_packed_sequence(targets, batch_first=True)
            padded = m.head(unrolled(m.body, m.embedding(ids)))
            for row, length in enumerate(lengths.tolist()):
                scores.append(padded[row, :length])
                labels.append(tags[row, :length])
        return cross_entropy(torch.cat(scores), torch.cat(labels))

    return Case(
        model=PackedModel(),
        batches=batches,
        batch_loss=lambda m, batch: F.cross_entropy(m(batch[0]), batch[1].data),
        full_loss=full_loss,
        weight=lambda batch: len(batch[1].data),
    )


class DeepLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.LSTM(2, 3, num_layers=2, dropout=0.4)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.body(x.transpose(0, 1))[0][-1])


@case("Two-layer LSTM with dropout")
def lstm_dropout_train(dtype):
    torch.manual_seed(65)
    x, y = torch.randn(12, 4, 2), torch.randint(3, (12,))

    def loss(m, batch):
        x, y = batch
        first = unrolled(m.body, x)
        # The library draws for (T, N, H), in that order.
        kept = F.dropout(torch.ones_like(first.transpose(0, 1).contiguous()), 0.4)
        return cross_entropy(
            m.head(unrolled(m.body, first * kept.transpose(0, 1), layer=1)[:, -1]), y
        )

    return Case(
        model=DeepLSTM(),
        batches=cut((x, y), (5, 4, 3)),
        loss_fn=nn.CrossEntropyLoss(),
        full_loss=batch_by_batch(loss),
        mode="train",
    )


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTMCell(2, 4), nn.Linear(4, 3)

    def forward(self, x):
        state = None
        for part in x.unbind(1):
            state = self.cell(part, state)
        return self.head(state[0])


@case("LSTMCell in a loop")
def lstm_cell(dtype):
    torch.manual_seed(66)
    x, y = torch.randn(11, 4, 2), torch.randint(3, (11,))

    def full_loss(m, batches):
        x = joined(batches, 0)
        state = (x.new_zeros(len(x), 4),) * 2
        cell = m.cell
        for part in x.unbind(1):
            state = lstm_step(
                part, state, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh
            )
        return cross_entropy(m.head(state[0]), joined(batches, 1))

    return Case(
        model=Cells(),
        batches=cut((x, y), (4, 6, 1)),
        loss_fn=nn.CrossEntropyLoss(),
        full_loss=full_loss,
    )


class ConvolvedLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.front = nn.Conv1d(2, 3, 3, padding=1)
        self.body = nn.LSTM(3, 3, batch_first=True)
        self.head = nn.Conv1d(3, 3, 1)

    def forward(self, x):
        hidden, _ = self.body(torch.tanh(self.front(x)).transpose(1, 2))
        return self.head(hidden.transpose(1, 2)).mean(2)


@case("Convolutions around an LSTM")
def conv_lstm(dtype):
    torch.manual_seed(67)
    x, y = torch.randn(10, 2, 5), torch.randint(3, (10,))

    def full_loss(m, batches):
        x = torch.tanh(m.front(joined(batches, 0))).transpose(1, 2)
        hidden = unrolled(m.body, x).transpose(1, 2)
        return cross_entropy(m.head(hidden).sum(2) / 5, joined(batches, 1))

    return Case(
        model=ConvolvedLSTM(),
        batches=cut((x, y), (2, 5, 3)),
        loss_fn=nn.CrossEntropyLoss(),
        full_loss=full_loss,
    )
