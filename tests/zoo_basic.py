"""Plain models: regression, MLPs, small conv nets, and what may be said about their loss."""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from cases import (
    Case,
    Transposed,
    batch_by_batch,
    case,
    cross_entropy,
    cut,
    joined,
    matrix_with_spectrum,
    mean_cross_entropy,
    mean_squared_error,
    padded_tokens,
    quadratic_case,
    settle_batch_norm,
    token_cross_entropy,
)


class TiedAutoencoder(nn.Module):
    """Token ids → scores over the same tokens, with one matrix for both ends."""

    def __init__(self, tokens, width):
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.hidden = nn.Linear(width, width)
        self.decoder = nn.Linear(width, tokens, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, ids):
        return self.decoder(torch.tanh(self.hidden(self.embedding(ids))))


class WithUnused(nn.Module):
    """Two parameters that the forward never uses, before and after one that it does."""

    def __init__(self):
        super().__init__()
        self.idle = nn.Parameter(torch.randn(2))
        self.used = nn.Linear(3, 2)
        self.spare = nn.Linear(2, 1)

    def forward(self, x):
        return torch.tanh(self.used(x))


class ReturnsItsLoss(nn.Module):
    """Takes a batch's entries by name and gives a mapping with the loss in it."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, inputs, labels):
        scores = self.body(inputs)
        return {"loss": F.cross_entropy(scores, labels), "scores": scores}


CLASS_WEIGHTS = (0.25, 2.0, 1.5)
"""Exact in every floating type."""


def weighted_cross_entropy(model, batches):
    scores, labels = model(joined(batches, 0)), joined(batches, 1)
    weights = torch.tensor(CLASS_WEIGHTS, dtype=scores.dtype)[labels]
    picked = scores.gather(1, labels[:, None])[:, 0]
    return (weights * (scores.logsumexp(1) - picked)).sum() / weights.sum()


@case("Linear regression")
def linear_regression(dtype):
    torch.manual_seed(10)
    x, y = torch.randn(23, 3), torch.randn(23, 2)
    return Case(
        model=nn.Linear(3, 2),
        batches=cut((x, y), (9, 9, 5)),
        loss_fn=nn.MSELoss(),
        full_loss=mean_squared_error,
    )


@case('Linear regression, `reduction="sum"`')
def linear_regression_sum(dtype):
    torch.manual_seed(11)
    x, y = torch.randn(23, 3), torch.randn(23, 2)
    return Case(
        model=nn.Linear(3, 2),
        batches=cut((x, y), (1, 16, 6)),
        loss_fn=nn.MSELoss(reduction="sum"),
        full_loss=mean_squared_error,
    )


@case("Softmax regression")
def softmax_regression(dtype):
    torch.manual_seed(12)
    x, y = torch.randn(31, 4), torch.randint(3, (31,))
    return Case(
        model=nn.Linear(4, 3),
        batches=cut((x, y), (16, 8, 7)),
        loss_fn=nn.CrossEntropyLoss(),
        full_loss=mean_cross_entropy,
    )


@case("Quadratic without data")
def quadratic(dtype):
    torch.manual_seed(13)
    matrix = matrix_with_spectrum([5.0, 3.0, 1.0, 0.5, 0.0, -2.0], seed=13, dtype=dtype)
    return quadratic_case(matrix, torch.randn(6, dtype=dtype), torch.randn(6, dtype=dtype))


@case("MLP with batch norm and dropout")
def mlp_batch_norm_dropout(dtype):
    torch.manual_seed(14)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)
    )
    x, y = 1 + 2 * torch.randn(29, 4), torch.randint(3, (29,))
    settle_batch_norm(model, x)
    return Case(
        model=model,
        batches=cut((x, y), (12, 12, 5)),
        loss_fn=nn.CrossEntropyLoss(),
        full_loss=mean_cross_entropy,
    )


@case("MLP with batch norm and dropout, in training mode")
def mlp_batch_norm_dropout_train(dtype):
    made = mlp_batch_norm_dropout(dtype)
    made.mode = "train"
    made.full_loss = batch_by_batch(lambda m, batch: cross_entropy(m(batch[0]), batch[1]))
    return made


@case("Conv net with batch norm")
def conv_batch_norm(dtype):
    torch.manual_seed(15)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.GELU(),
        nn.AvgPool2d(3),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    x, y = torch.randn(13, 1, 6, 6), torch.randint(3, (13,))
    settle_batch_norm(model, x)
    return Case(
        model=model,
        batches=cut((x, y), (6, 4, 3)),
        loss_fn=nn.CrossEntropyLoss(),
        full_loss=mean_cross_entropy,
    )


@case("Token model with padded labels")
def padded_token_model(dtype):
    torch.manual_seed(16)
    model = nn.Sequential(
        nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 5), Transposed()
    )
    return Case(
        model=model,
        batches=padded_tokens(5, [(7, 2, 1), (1, 1), (4,), (3, 5, 5, 2)]),
        loss_fn=nn.CrossEntropyLoss(),
        full_loss=token_cross_entropy(lambda m, ids: m(ids).transpose(1, 2)),
    )


@case("Cross-entropy with class weights")
def class_weighted(dtype):
    torch.manual_seed(17)
    x, y = torch.randn(25, 3), torch.randint(3, (25,))
    return Case(
        model=nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)),
        batches=cut((x, y), (3, 20, 2)),
        loss_fn=nn.CrossEntropyLoss(weight=torch.tensor(CLASS_WEIGHTS, dtype=dtype)),
        full_loss=weighted_cross_entropy,
    )


@case("Tied embeddings")
def tied_weights(dtype):
    torch.manual_seed(18)
    return Case(
        model=TiedAutoencoder(6, 3),
        batches=cut((torch.randint(6, (17,)), torch.randint(6, (17,))), (8, 9)),
        loss_fn=F.cross_entropy,
        full_loss=mean_cross_entropy,
        selected=("embedding.weight", "hidden.weight", "hidden.bias"),
    )


@case("Frozen layer between trained ones")
def partly_frozen(dtype):
    torch.manual_seed(19)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    return Case(
        model=model,
        batches=cut((torch.randn(14, 3), torch.randn(14, 2)), (10, 4)),
        loss_fn=nn.MSELoss(),
        full_loss=mean_squared_error,
        selected=("0.weight", "0.bias", "4.weight", "4.bias"),
    )


@case("Parameters selected by name")
def selected_by_pattern(dtype):
    torch.manual_seed(20)
    return Case(
        model=nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
        batches=cut((torch.randn(14, 3), torch.randn(14, 2)), (10, 4)),
        loss_fn=nn.MSELoss(),
        full_loss=mean_squared_error,
        params=["2.*", "*.weight"],
        selected=("0.weight", "2.weight", "2.bias"),
    )


@case("Unused parameters")
def unused_parameters(dtype):
    torch.manual_seed(21)
    return Case(
        model=WithUnused(),
        batches=cut((torch.randn(14, 3), torch.randn(14, 2)), (6, 8)),
        loss_fn=functools.partial(F.mse_loss, reduction="mean"),
        full_loss=mean_squared_error,
    )


@case("Mapping batches, model returning its loss")
def mapping_batches(dtype):
    torch.manual_seed(22)
    x, y = torch.randn(16, 3), torch.randint(2, (16,))
    return Case(
        model=ReturnsItsLoss(),
        batches=[{"inputs": a, "labels": b} for a, b in cut((x, y), (5, 10, 1))],
        batch_loss=lambda model, batch: model(**batch)["loss"],
        full_loss=lambda model, batches: mean_cross_entropy(
            model.body, [(b["inputs"], b["labels"]) for b in batches]
        ),
    )
