"""Small seeded models with their data, through which every product and measure goes.

Each case carries `full_loss`, its objective written out by hand on all the data at once; the
dense Hessians made from it know nothing of the library. A new case is one decorated function:

    @case
    def my_case(dtype):
        torch.manual_seed(0)
        ...
        return Case(model=..., batches=[...], loss_fn=..., full_loss=...)
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import flatminima as fm


@dataclasses.dataclass(eq=False)
class Case:
    """A model, its data in ragged batches, and its objective once by name and once by hand.

    Attributes:
        model: in evaluation mode, of type `dtype`.
        batches: a list, for `Objective(data=...)`.
        full_loss: `(model, batches) -> L`, by hand; the model may be of another type.
        loss_fn: the criterion, or None.
        batch_loss: in place of `loss_fn`, or None.
        params: which parameters are selected, as `Objective` takes it.
        selected: the names `params` stands for, by hand; None for all that require grad.
        name: set by the registry.
        dtype: set by the registry.
    """

    model: nn.Module
    batches: list[Any]
    full_loss: Callable[[nn.Module, list[Any]], torch.Tensor]
    loss_fn: Callable[..., torch.Tensor] | None = None
    batch_loss: Callable[[nn.Module, Any], torch.Tensor] | None = None
    params: Any = None
    selected: tuple[str, ...] | None = None
    name: str = ""
    dtype: torch.dtype = torch.float64

    def objective(self, **options: Any) -> fm.Objective:
        arguments = {
            "loss_fn": self.loss_fn,
            "batch_loss": self.batch_loss,
            "params": self.params,
            "data": self.batches,
            **options,
        }
        return fm.Objective(self.model, **arguments)

    def names(self) -> tuple[str, ...]:
        if self.selected is not None:
            return self.selected
        return tuple(n for n, p in self.model.named_parameters() if p.requires_grad)

    def in_float64(self) -> tuple[nn.Module, list[Any]]:
        """Model and batches as float64 copies with the same values."""
        return copy.deepcopy(self.model).double(), [doubled(b) for b in self.batches]

    def exact(self) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
        """L as a function of a float64 θ, shape (n,), and θ itself, all by hand."""
        model, batches = self.in_float64()
        parameters = dict(model.named_parameters())
        names = self.names()
        shapes = [parameters[n].shape for n in names]
        theta = torch.cat([parameters[n].detach().reshape(-1) for n in names])

        def loss(vector: torch.Tensor) -> torch.Tensor:
            pieces = torch.split(vector, [s.numel() for s in shapes])
            replaced = {n: p.view(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
            # One entry for each tensor: functional_call gives it to the tied names too.
            wrapped = _Bound(model, lambda m: self.full_loss(m, batches))
            renamed = {f"model.{n}": p for n, p in replaced.items()}
            return torch.func.functional_call(wrapped, renamed, ())

        return loss, theta


class _Bound(nn.Module):
    def __init__(self, model, function):
        super().__init__()
        self.model = model
        self.function = (function,)

    def forward(self):
        return self.function[0](self.model)


_BUILDERS: dict[str, Callable[[torch.dtype], Case]] = {}


def case(builder: Callable[[torch.dtype], Case]) -> Callable[[torch.dtype], Case]:
    _BUILDERS[builder.__name__] = builder
    return builder


def build(name: str, dtype: torch.dtype = torch.float64) -> Case:
    """The case of that name, new each time and the same each time."""
    with torch.random.fork_rng(devices=[]):
        made = _BUILDERS[name](dtype)
    made.model.to(dtype).eval()
    made.batches = [as_type(b, dtype) for b in made.batches]
    made.name, made.dtype = name, dtype
    return made


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], data: Any) -> Any:
    if isinstance(data, torch.Tensor):
        return function(data)
    if isinstance(data, Mapping):
        return {k: map_tensors(function, v) for k, v in data.items()}
    if isinstance(data, (tuple, list)):
        return type(data)(map_tensors(function, d) for d in data)
    return data


def as_type(data: Any, dtype: torch.dtype) -> Any:
    return map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, data)


def doubled(data: Any) -> Any:
    return as_type(data, torch.float64)


# ------------------------------------------------------------------------------------- oracles


def dense_hessian(case: Case) -> torch.Tensor:
    """∇²L as an (n, n) float64 matrix, from the case's loss by hand."""
    loss, theta = case.exact()
    return torch.autograd.functional.hessian(loss, theta)


def exact_gradient(case: Case) -> torch.Tensor:
    """∇L as an (n,) float64 vector, from the case's loss by hand."""
    loss, theta = case.exact()
    return torch.autograd.functional.jacobian(loss, theta)


def exact_loss(case: Case) -> float:
    """L in float64, from the case's loss by hand."""
    loss, theta = case.exact()
    return loss(theta).item()


def random_orthogonal(n: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(n, n, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * torch.sign(torch.diagonal(r))).to(dtype)


def matrix_with_spectrum(
    spectrum: Any, seed: int = 0, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    values = torch.as_tensor(spectrum, dtype=torch.float64)
    q = random_orthogonal(len(values), seed)
    matrix = (q * values) @ q.T
    return ((matrix + matrix.T) / 2).to(dtype)


def cut(tensors: tuple[torch.Tensor, ...], sizes: tuple[int, ...]) -> list[Any]:
    """Tensors of equal length as a list of batches of these sizes."""
    pieces = [torch.split(t, list(sizes)) for t in tensors]
    return list(zip(*pieces, strict=True))


def joined(batches: list[Any], index: int) -> torch.Tensor:
    """The `index`-th tensors of all batches, one after the other."""
    return torch.cat([b[index] for b in batches])


# --------------------------------------------------------------------------------------- models


class Quadratic(nn.Module):
    """½ θᵀAθ + bᵀθ, whatever the input."""

    def __init__(self, matrix, linear, start):
        super().__init__()
        self.theta = nn.Parameter(start.clone())
        self.register_buffer("matrix", matrix.clone())
        self.register_buffer("linear", linear.clone())

    def forward(self, inputs=None):
        return 0.5 * self.theta @ self.matrix @ self.theta + self.linear @ self.theta


def quadratic_case(matrix, linear=None, start=None) -> Case:
    """A case with this Hessian, gradient Aθ + b and θ = `start` (zeros unless given)."""
    zeros = torch.zeros(matrix.shape[0], dtype=matrix.dtype)
    model = Quadratic(
        matrix, zeros if linear is None else linear, zeros if start is None else start
    )
    return Case(
        model=model,
        batches=[torch.zeros(1, dtype=matrix.dtype)],
        batch_loss=lambda m, batch: m(batch),
        full_loss=lambda m, batches: 0.5 * m.theta @ m.matrix @ m.theta + m.linear @ m.theta,
        name="quadratic",
        dtype=matrix.dtype,
    )


class Transposed(nn.Module):
    """(N, T, C) → (N, C, T), as cross-entropy wants token scores."""

    def forward(self, scores):
        return scores.transpose(1, 2)


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


def settle_batch_norm(model, inputs):
    """Running statistics as training would leave them, unlike their initial values."""
    model.train()
    with torch.no_grad():
        for _ in range(5):
            model(inputs)
    model.eval()


# ---------------------------------------------------------------------------------- hand losses


def mean_squared_error(model, batches):
    difference = model(joined(batches, 0)) - joined(batches, 1)
    return (difference * difference).sum() / difference.numel()


def mean_cross_entropy(model, batches):
    scores, labels = model(joined(batches, 0)), joined(batches, 1)
    picked = scores.gather(1, labels[:, None])[:, 0]
    return (scores.logsumexp(1) - picked).sum() / len(labels)


def token_cross_entropy(model, batches, ignored=-100):
    """Per example and position, since the batches differ in length."""
    terms = []
    for ids, labels in batches:
        scores = model(ids)
        for n, t in (labels != ignored).nonzero().tolist():
            terms.append(scores[n, :, t].logsumexp(0) - scores[n, labels[n, t], t])
    return torch.stack(terms).sum() / len(terms)


CLASS_WEIGHTS = (0.25, 2.0, 1.5)
"""Exact in every floating type."""


def weighted_cross_entropy(model, batches):
    scores, labels = model(joined(batches, 0)), joined(batches, 1)
    weights = torch.tensor(CLASS_WEIGHTS, dtype=scores.dtype)[labels]
    picked = scores.gather(1, labels[:, None])[:, 0]
    return (weights * (scores.logsumexp(1) - picked)).sum() / weights.sum()


# --------------------------------------------------------------------------------------- cases


@case
def linear_regression(dtype):
    torch.manual_seed(10)
    x, y = torch.randn(23, 3), torch.randn(23, 2)
    return Case(
        model=nn.Linear(3, 2),
        batches=cut((x, y), (9, 9, 5)),
        loss_fn=nn.MSELoss(),
        full_loss=mean_squared_error,
    )


@case
def linear_regression_sum(dtype):
    torch.manual_seed(11)
    x, y = torch.randn(23, 3), torch.randn(23, 2)
    return Case(
        model=nn.Linear(3, 2),
        batches=cut((x, y), (1, 16, 6)),
        loss_fn=nn.MSELoss(reduction="sum"),
        full_loss=mean_squared_error,
    )


@case
def softmax_regression(dtype):
    torch.manual_seed(12)
    x, y = torch.randn(31, 4), torch.randint(3, (31,))
    return Case(
        model=nn.Linear(4, 3),
        batches=cut((x, y), (16, 8, 7)),
        loss_fn=nn.CrossEntropyLoss(),
        full_loss=mean_cross_entropy,
    )


@case
def quadratic(dtype):
    torch.manual_seed(13)
    matrix = matrix_with_spectrum([5.0, 3.0, 1.0, 0.5, 0.0, -2.0], seed=13, dtype=dtype)
    return quadratic_case(matrix, torch.randn(6, dtype=dtype), torch.randn(6, dtype=dtype))


@case
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


@case
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


def padded_tokens(tokens, lengths_by_batch):
    """Batches of ids and labels, each as long as its longest row; the rest is padding."""
    batches = []
    for lengths in lengths_by_batch:
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for row, length in enumerate(lengths):
            ids[row, :length] = torch.randint(1, tokens, (length,))
            labels[row, :length] = torch.randint(1, tokens, (length,))
        batches.append((ids, labels))
    return batches


@case
def padded_token_model(dtype):
    torch.manual_seed(16)
    model = nn.Sequential(
        nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 5), Transposed()
    )
    return Case(
        model=model,
        batches=padded_tokens(5, [(7, 2, 1), (1, 1), (4,), (3, 5, 5, 2)]),
        loss_fn=nn.CrossEntropyLoss(),
        full_loss=token_cross_entropy,
    )


@case
def class_weighted(dtype):
    torch.manual_seed(17)
    x, y = torch.randn(25, 3), torch.randint(3, (25,))
    return Case(
        model=nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)),
        batches=cut((x, y), (3, 20, 2)),
        loss_fn=nn.CrossEntropyLoss(weight=torch.tensor(CLASS_WEIGHTS, dtype=dtype)),
        full_loss=weighted_cross_entropy,
    )


@case
def tied_weights(dtype):
    torch.manual_seed(18)
    return Case(
        model=TiedAutoencoder(6, 3),
        batches=cut((torch.randint(6, (17,)), torch.randint(6, (17,))), (8, 9)),
        loss_fn=F.cross_entropy,
        full_loss=mean_cross_entropy,
        selected=("embedding.weight", "hidden.weight", "hidden.bias"),
    )


@case
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


@case
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


@case
def unused_parameters(dtype):
    torch.manual_seed(21)
    return Case(
        model=WithUnused(),
        batches=cut((torch.randn(14, 3), torch.randn(14, 2)), (6, 8)),
        loss_fn=functools.partial(F.mse_loss, reduction="mean"),
        full_loss=mean_squared_error,
    )


@case
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


NAMES = tuple(_BUILDERS)
"""Every case, for `pytest.mark.parametrize("name", NAMES)` and `build(name)`."""
