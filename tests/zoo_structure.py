"""How parameters sit in a model: shared, frozen, low rank, parametrized."""

import warnings

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from cases import Case, case, cross_entropy, cut, joined, mean_cross_entropy, settle_batch_norm


def classifier_case(model, *, full_loss=mean_cross_entropy, **options):
    """Four numbers in, three classes out."""
    x, y = torch.randn(15, 4), torch.randint(3, (15,))
    return Case(
        model=model,
        batches=cut((x, y), (5, 8, 2)),
        loss_fn=nn.CrossEntropyLoss(),
        full_loss=full_loss,
        **options,
    )


def by_scores(forward):
    """`full_loss` from `forward(model, x)` → scores."""
    return lambda m, batches: cross_entropy(forward(m, joined(batches, 0)), joined(batches, 1))


# ---------------------------------------------------------------------------- shared and frozen


class Twice(nn.Module):
    """One layer applied again and again, and one parameter used in two ways."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor([1.2, -0.7, 0.4]))

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        return self.scale * self.head(x) + self.scale**2


@case("Parameters used several times")
def used_twice(dtype):
    torch.manual_seed(120)

    def scores(m, x):
        w, b = m.layer.weight, m.layer.bias
        x = ((((x @ w.T + b).tanh() @ w.T + b).tanh()) @ w.T + b).tanh()
        return m.scale * (x @ m.head.weight.T + m.head.bias + m.scale)

    return classifier_case(Twice(), full_loss=by_scores(scores))


class FrozenBackbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.backbone.requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x):
        with torch.no_grad():
            features = self.backbone(x)
        return self.head(features)


@case("Frozen backbone, trainable head")
def frozen_backbone(dtype):
    torch.manual_seed(121)
    model = FrozenBackbone()
    settle_batch_norm(model, torch.randn(20, 4))
    return classifier_case(
        model,
        full_loss=by_scores(lambda m, x: m.head(m.backbone(x))),
        selected=("head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"),
    )


class LowRank(nn.Module):
    """x ↦ W x + b + B A x with W and b frozen."""

    def __init__(self, base, rank):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, base.in_features) / 2)
        self.B = nn.Parameter(torch.randn(base.out_features, rank) / 2)

    def forward(self, x):
        return self.base(x) + x @ self.A.T @ self.B.T


@case("LoRA-like adapters")
def low_rank_adapters(dtype):
    torch.manual_seed(122)

    def layer(m, x):
        return x @ (m.base.weight + m.B @ m.A).T + m.base.bias

    return classifier_case(
        nn.Sequential(LowRank(nn.Linear(4, 6), 2), nn.Tanh(), LowRank(nn.Linear(6, 3), 1)),
        full_loss=by_scores(lambda m, x: layer(m[2], layer(m[0], x).tanh())),
        selected=("0.A", "0.B", "2.A", "2.B"),
    )


# ------------------------------------------------------------------------------ parametrizations


def two_layers(first=lambda layer: layer, width=5):
    return nn.Sequential(first(nn.Linear(4, width)), nn.Tanh(), nn.Linear(width, 3))


def with_first_weight(weight):
    """`full_loss` of `two_layers` with `weight(layer)` in place of its first weight."""

    def scores(m, x):
        return m[2](torch.tanh(x @ weight(m[0]).T + m[0].bias))

    return by_scores(scores)


def unit_rows(v, g):
    return g * v / (v * v).sum(1, keepdim=True).sqrt()


@case("parametrizations.weight_norm")
def weight_norm(dtype):
    torch.manual_seed(123)

    def weight(layer):
        own = layer.parametrizations.weight
        return unit_rows(own.original1, own.original0)

    return classifier_case(
        two_layers(parametrizations.weight_norm), full_loss=with_first_weight(weight)
    )


@case("parametrizations.spectral_norm")
def spectral_norm(dtype):
    torch.manual_seed(124)

    def weight(layer):
        own = layer.parametrizations.weight
        w, u, v = own.original, own[0]._u, own[0]._v
        return w / (u @ w @ v)

    return classifier_case(
        two_layers(parametrizations.spectral_norm), full_loss=with_first_weight(weight)
    )


def deprecated(function):
    """`function` without the warning that it is one."""

    def quiet(module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return function(module)

    return quiet


@case("torch.nn.utils.weight_norm, by hooks")
def weight_norm_hooks(dtype):
    torch.manual_seed(125)
    return classifier_case(
        two_layers(deprecated(nn.utils.weight_norm)),
        full_loss=with_first_weight(lambda layer: unit_rows(layer.weight_v, layer.weight_g)),
    )


@case("torch.nn.utils.spectral_norm, by hooks")
def spectral_norm_hooks(dtype):
    torch.manual_seed(126)
    model = two_layers(deprecated(nn.utils.spectral_norm))
    model(torch.randn(2, 4))  # a step of its power iteration, as training would leave it

    def weight(layer):
        w, u, v = layer.weight_orig, layer.weight_u, layer.weight_v
        return w / (u @ w @ v)

    return classifier_case(model, full_loss=with_first_weight(weight))


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).T


@case("Own parametrization: symmetric weights")
def symmetric_weights(dtype):
    torch.manual_seed(127)

    def register(layer):
        parametrize.register_parametrization(layer, "weight", Symmetric())
        return layer

    def weight(layer):
        own = layer.parametrizations.weight.original
        upper = torch.arange(4)[:, None] <= torch.arange(4)
        return torch.where(upper, own, own.T)

    return classifier_case(two_layers(register, width=4), full_loss=with_first_weight(weight))


@case("parametrizations.orthogonal")
def orthogonal_weights(dtype):
    torch.manual_seed(128)

    def register(layer):
        return parametrizations.orthogonal(layer, orthogonal_map="cayley")

    def weight(layer):
        own = layer.parametrizations.weight
        lower = own.original.tril(-1)
        skew, unit = lower - lower.T, torch.eye(4, dtype=lower.dtype)
        return own[0].base @ torch.linalg.solve(unit - skew / 2, unit + skew / 2)

    return classifier_case(two_layers(register, width=4), full_loss=with_first_weight(weight))
