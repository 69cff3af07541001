"""What the zoo is made of: cases, their registry, and oracles that know nothing of the library.

Each case carries `full_loss`, its objective written out by hand on all the data at once; the
dense Hessians made from it know nothing of the library. A new case is one decorated function in
the file of its family:

    @case("What it is, in a few words")
    def my_case(dtype):
        torch.manual_seed(0)
        ...
        return Case(model=..., batches=[...], loss_fn=..., full_loss=...)
"""

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import flatminima as fm

FLOATING = (torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a case before it is built.

    Attributes:
        title: for people, as a table in the docs would name it.
        family: the file it comes from, without "zoo_".
        approximate: for Hessian products that double backward cannot give: what PyTorch's message
            calls the operation at fault, or a piece of that name; None where they are exact.
        dtypes: the types in which the case makes sense.
        fixed_dtype: the model has types of its own, whatever `build` is asked for; `dtypes` then
            holds the one that bounds the precision.
    """

    title: str
    family: str
    approximate: str | None = None
    dtypes: tuple[torch.dtype, ...] = FLOATING
    fixed_dtype: bool = False


@dataclasses.dataclass(eq=False)
class Case:
    """A model, its data in ragged batches, and its objective once by name and once by hand.

    Attributes:
        model: in evaluation mode, of type `dtype`.
        batches: a list, for `Objective(data=...)`.
        full_loss: `(model, batches) -> L`, by hand and twice differentiable; the model may be of
            another type, has the training flags that `mode` asks for and is never wrapped.
        loss_fn: the criterion, or None.
        batch_loss: in place of `loss_fn`, or None.
        params: which parameters are selected, as `Objective` takes it.
        selected: the names `params` stands for, by hand; None for all that require grad.
        weight: `batch -> w_b`, as `Objective` takes it.
        mode: as `Objective` takes it.
        inner: the module inside a wrapped `model`, which gives the parameters their names; None
            when there is no wrapper.
        facts: set by the registry.
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
    weight: Callable[[Any], float] | None = None
    mode: str = "eval"
    inner: nn.Module | None = None
    facts: Facts = Facts("", "")
    name: str = ""
    dtype: torch.dtype = torch.float64

    @property
    def title(self) -> str:
        return self.facts.title

    @property
    def family(self) -> str:
        return self.facts.family

    @property
    def approximate(self) -> str | None:
        return self.facts.approximate

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return self.facts.dtypes

    @property
    def fixed_dtype(self) -> bool:
        return self.facts.fixed_dtype

    @property
    def unwrapped(self) -> nn.Module:
        """The module whose parameters are meant."""
        return self.model if self.inner is None else self.inner

    @property
    def vector_dtype(self) -> torch.dtype:
        """The widest type among the selected parameters, float32 at least."""
        parameters = dict(self.unwrapped.named_parameters())
        return functools.reduce(
            torch.promote_types, (parameters[n].dtype for n in self.names()), torch.float32
        )

    def objective(self, **options: Any) -> fm.Objective:
        arguments = {
            "loss_fn": self.loss_fn,
            "batch_loss": self.batch_loss,
            "params": self.params,
            "data": self.batches,
            "weight": self.weight,
            "mode": self.mode,
            **options,
        }
        return fm.Objective(self.model, **arguments)

    def names(self) -> tuple[str, ...]:
        if self.selected is not None:
            return self.selected
        return tuple(n for n, p in self.unwrapped.named_parameters() if p.requires_grad)

    def in_float64(self) -> tuple[nn.Module, list[Any]]:
        """The unwrapped model and the batches as float64 copies with the same values."""
        return copied(self.unwrapped).double(), [doubled(b) for b in self.batches]

    def exact(self) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
        """L as a function of a float64 θ, shape (n,), and θ itself, all by hand."""
        model, batches = self.in_float64()
        model.train(self.mode == "train")
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

    @functools.cached_property
    def gradient_graph(self) -> tuple[torch.Tensor, torch.Tensor]:
        """∇L with its graph and the float64 θ that it hangs on, for the model as first seen."""
        loss, theta = self.exact()
        theta.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(theta), theta, create_graph=True)
        return gradient, theta


class _Bound(nn.Module):
    def __init__(self, model, function):
        super().__init__()
        self.model = model
        self.function = (function,)

    def forward(self):
        return self.function[0](self.model)


# ------------------------------------------------------------------------------------- registry


Builder = Callable[[torch.dtype], Case]

_REGISTRY: dict[str, tuple[Builder, Facts]] = {}


def case(
    title: str,
    *,
    approximate: str | None = None,
    dtypes: tuple[torch.dtype, ...] = FLOATING,
    fixed_dtype: bool = False,
) -> Callable[[Builder], Builder]:
    """Enter the decorated builder, `dtype -> Case`, under its own name; see `Facts`."""

    def enter(builder: Builder) -> Builder:
        name = builder.__name__
        assert name not in _REGISTRY, f"two cases are called {name}"
        family = builder.__module__.removeprefix("zoo_")
        _REGISTRY[name] = builder, Facts(title, family, approximate, dtypes, fixed_dtype)
        return builder

    return enter


def names_of(family: str) -> tuple[str, ...]:
    """The cases of a family, in the order of its file."""
    return tuple(n for n, (_, facts) in _REGISTRY.items() if facts.family == family)


def facts_of(name: str) -> Facts:
    """What is known of a case without building it."""
    return _REGISTRY[name][1]


def build(name: str, dtype: torch.dtype = torch.float64) -> Case:
    """The case of that name, new each time and the same each time."""
    builder, facts = _REGISTRY[name]
    if facts.fixed_dtype:
        (dtype,) = facts.dtypes
    with torch.random.fork_rng(devices=[]):
        made = builder(dtype)
    if not facts.fixed_dtype:
        made.model.to(dtype)
        made.batches = [as_type(b, dtype) for b in made.batches]
    made.model.eval()
    made.facts, made.name, made.dtype = facts, name, dtype
    return made


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of modules that keep a tensor with its graph, as legacy weight_norm."""
    kept = [t for m in model.modules() for t in vars(m).values() if isinstance(t, torch.Tensor)]
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in kept if not t.is_leaf})


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], data: Any) -> Any:
    """`data` with its tensors replaced: containers, dataclasses and objects keep their type."""
    follow = functools.partial(map_tensors, function)
    if isinstance(data, torch.Tensor):
        return function(data)
    if isinstance(data, dict):
        return {k: follow(v) for k, v in data.items()}
    if isinstance(data, PackedSequence) or hasattr(data, "_fields"):
        return type(data)(*map(follow, data))
    if isinstance(data, (tuple, list)):
        return type(data)(map(follow, data))
    if hasattr(data, "__dict__"):
        twin = copy.copy(data)
        for name, value in vars(data).items():
            object.__setattr__(twin, name, follow(value))
        return twin
    return data


def as_type(data: Any, dtype: torch.dtype) -> Any:
    return map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, data)


def doubled(data: Any) -> Any:
    return as_type(data, torch.float64)


# ------------------------------------------------------------------------------------- oracles


def exact_product(case: Case, vectors: torch.Tensor) -> torch.Tensor:
    """H v as (n, k) float64 for `vectors` (n, k), from the case's loss by hand.

    The graph is made at the first call: what is done to the model later is not seen.
    """
    gradient, theta = case.gradient_graph
    columns = [
        torch.autograd.grad(gradient, theta, column, retain_graph=True)[0]
        for column in vectors.to(theta.dtype).T
    ]
    return torch.stack(columns, 1)


def dense_hessian(case: Case) -> torch.Tensor:
    """∇²L as an (n, n) float64 matrix, from the case's loss by hand."""
    gradient, theta = case.gradient_graph
    unit = torch.eye(len(theta), dtype=theta.dtype)
    try:
        batched = {"is_grads_batched": True, "retain_graph": True}
        return torch.autograd.grad(gradient, theta, unit, **batched)[0].T
    except RuntimeError:  # an operation that cannot be batched: one column after the other
        return exact_product(case, unit)


@functools.cache
def cached_dense_hessian(name: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """`dense_hessian` of a case as built, not to be written to."""
    return dense_hessian(build(name, dtype))


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


# ------------------------------------------------------------------------------- data and models


def cut(tensors: tuple[torch.Tensor, ...], sizes: tuple[int, ...]) -> list[Any]:
    """Tensors of equal length as a list of batches of these sizes."""
    pieces = [torch.split(t, list(sizes)) for t in tensors]
    return list(zip(*pieces, strict=True))


def joined(batches: list[Any], index: int | str) -> torch.Tensor:
    """The `index`-th tensors of all batches, one after the other."""
    return torch.cat([b[index] for b in batches])


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


def joined_tokens(batches: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of all batches, padded to the longest row of all."""
    width = max(ids.shape[1] for ids, _ in batches)

    def widened(tensor, value):
        return nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=value)

    ids = torch.cat([widened(i, 0) for i, _ in batches])
    return ids, torch.cat([widened(t, -100) for _, t in batches])


def settle_batch_norm(model, inputs):
    """Running statistics as training would leave them, unlike their initial values."""
    model.train()
    with torch.no_grad():
        for _ in range(5):
            model(inputs)
    model.eval()


def stir(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """Noise on every parameter, for models that start at zeros, ones and nearly nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn_like(parameter)
    return model


class Transposed(nn.Module):
    """(N, T, C) → (N, C, T), as cross-entropy wants token scores."""

    def forward(self, scores):
        return scores.transpose(1, 2)


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


# ---------------------------------------------------------------------------------- hand losses


def squared_error(output, target):
    difference = output - target
    return (difference * difference).sum() / difference.numel()


def cross_entropy(scores, labels):
    """Mean over the labels that are not −100; scores (..., C), labels (...)."""
    kept = labels != -100
    scores, labels = scores[kept], labels[kept]
    picked = scores.gather(-1, labels[:, None])[:, 0]
    return (scores.logsumexp(-1) - picked).sum() / len(labels)


def mean_squared_error(model, batches):
    return squared_error(model(joined(batches, 0)), joined(batches, 1))


def mean_cross_entropy(model, batches):
    return cross_entropy(model(joined(batches, 0)), joined(batches, 1))


def token_cross_entropy(forward):
    """`full_loss` for ids and labels (N, T), from `forward(model, ids)` → scores (N, T, C)."""

    def full_loss(model, batches):
        ids, labels = joined_tokens(batches)
        return cross_entropy(forward(model, ids), labels)

    return full_loss


def batch_by_batch(loss, count=lambda batch: len(batch[1])):
    """`full_loss` for what depends on the cutting or on random draws: Σ w_b ℓ_b / Σ w_b.

    `loss(model, batch)` is each batch's mean and `count(batch)` the number of its terms.
    """

    def full_loss(model, batches):
        losses = []
        for index, batch in enumerate(batches):
            with seeded(index):
                losses.append(count(batch) * loss(model, batch))
        return sum(losses) / sum(map(count, batches))

    return full_loss


@contextlib.contextmanager
def seeded(index: int) -> Iterator[None]:
    """torch's random state as every evaluation of batch `index` starts with; put back after it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(index)
        yield


def attention(q, k, v, allowed=None):
    """Softmax attention written out, (N, T, C) or with more dimensions in front."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    return scores.softmax(-1) @ v


def split_heads(x, heads):
    """(N, T, C) → (N, heads, T, C / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x):
    return x.transpose(1, 2).flatten(2)
