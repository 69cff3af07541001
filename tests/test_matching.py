"""Hidden units put in the order of another network's: planted orders, functions, refusals."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flatminima as fm
from flatminima.landscape.symmetry.matching import Permutations, apply_permutations, match_weights
from integrity import untouched


def mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.BatchNorm1d(16), nn.GELU()),
        *(nn.Dropout(0.1), nn.Linear(16, 14), nn.LayerNorm(14), nn.PReLU(14), nn.Linear(14, 3)),
    )


def conv_net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 10, 3, padding=1, bias=False), nn.GroupNorm(1, 10), nn.ReLU()),
        *(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(40, 12), nn.ELU(), nn.Linear(12, 3)),
    )


class Written(nn.Module):
    """The same operations as functions, with transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(2, 6, 2)
        self.mix = nn.Conv1d(6, 7, 1)
        self.norm = nn.BatchNorm1d(7, affine=False)
        self.down = nn.ConvTranspose1d(7, 5, 1)
        self.each = nn.Linear(5, 4)
        self.out = nn.Linear(4, 3)
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        x = F.hardswish(self.up(x)) * 2 + 1
        x = torch.sin(self.norm(self.mix(x)))
        x = F.softplus(self.down(x)).mean(dim=2)
        x = self.each(x.view(x.size(0), -1)).clamp(min=-2.0)
        return self.out(x) / self.temperature


def tokens() -> nn.Module:
    """Features that lie apart from each other once flattened."""
    return nn.Sequential(
        *(nn.Linear(3, 6), nn.Tanh(), nn.LayerNorm(6), nn.Flatten(), nn.BatchNorm1d(24)),
        *(nn.LeakyReLU(), nn.Linear(24, 5), nn.Softsign(), nn.Linear(5, 2)),
    )


NETS = {
    "mlp": (mlp, (5, 12)),
    "convolutions": (conv_net, (5, 2, 8, 8)),
    "functions": (Written, (5, 2, 8)),
    "tokens": (tokens, (5, 4, 3)),
}


def built(name: str, seed: int) -> nn.Module:
    """A net with random weights, biases, and statistics everywhere."""
    model = NETS[name][0]().double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dtype.is_floating_point:
                draw = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.copy_(draw.abs() + 0.5 if n.endswith(("_var", "temperature")) else draw)
    return model.eval()


def inputs(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(NETS[name][1], generator=generator, dtype=torch.float64)


def shuffled(model: nn.Module, seed: int = 1) -> tuple[nn.Module, dict[str, list[int]]]:
    """The net with its units in a random order, and that order."""
    generator = torch.Generator().manual_seed(seed)
    found = match_weights(model, model)
    orders = {
        n: torch.randperm(len(p), generator=generator).tolist()
        for n, p in found.permutations.items()
    }
    planted = Permutations(
        permutations={n: tuple(p) for n, p in orders.items()},
        distance_before=0.0,
        distance_after=0.0,
        sweeps=1,
        outcome=fm.Outcome.STATIONARY,
    )
    return apply_permutations(model, planted), orders


def same_tensors(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# ------------------------------------------------------------------------------- what is permuted


@pytest.mark.parametrize("name", NETS)
def test_units_in_another_order_are_the_same_function(name):
    model, x = built(name, 0), inputs(name)
    other, orders = shuffled(model)
    assert torch.allclose(other(x), model(x), rtol=1e-11, atol=1e-11)
    assert not same_tensors(other, model)
    assert any(order != sorted(order) for order in orders.values())


@pytest.mark.parametrize("name", NETS)
def test_units_in_another_order_are_the_same_function_in_training(name):
    model, x = built(name, 0), inputs(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # its mask would fall on other units
    other, _ = shuffled(model)
    assert torch.allclose(other.train()(x), model.train()(x), rtol=1e-9, atol=1e-9)


def test_every_hidden_layer_is_found_and_no_other():
    names = {n: list(match_weights(built(n, 0), built(n, 1)).permutations) for n in NETS}
    assert names == {
        "mlp": ["0", "2", "6"],
        "convolutions": ["0", "4", "9"],
        "functions": ["up", "mix", "down", "each"],
        "tokens": ["0", "6"],
    }


@pytest.mark.parametrize("name", ["mlp", "convolutions"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_order_is_recovered_exactly(name, seed):
    model = built(name, 0)
    other, orders = shuffled(model, seed + 1)
    found = match_weights(model, other, seed=seed)
    assert found.distance_before > 1
    assert found.distance_after == 0
    assert found.outcome is fm.Outcome.STATIONARY
    for layer, order in orders.items():
        # Unit i of the reference is where the planted order has put it.
        assert [order[p] for p in found.permutations[layer]] == list(range(len(order)))
    assert same_tensors(apply_permutations(other, found), model)


@pytest.mark.parametrize("name", NETS)
def test_matching_brings_independent_nets_nearer_and_leaves_the_function(name):
    one, two, x = built(name, 0), built(name, 1), inputs(name)
    found = match_weights(one, two)
    matched = apply_permutations(two, found)
    assert torch.allclose(matched(x), two(x), rtol=1e-11, atol=1e-11)
    vectors = [nn.utils.parameters_to_vector(m.parameters()).detach() for m in (one, two, matched)]
    assert found.distance_before == pytest.approx(float((vectors[0] - vectors[1]).norm()))
    assert found.distance_after == pytest.approx(float((vectors[0] - vectors[2]).norm()))
    assert found.distance_after < found.distance_before
    again = match_weights(one, matched)
    assert again.distance_after <= found.distance_after + 1e-9


def test_one_hidden_layer_is_matched_as_well_as_by_all_orders():
    nets = [nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)).double() for _ in range(2)]
    generator = torch.Generator().manual_seed(4)
    for net in nets:
        for p in net.parameters():
            p.data.normal_(generator=generator)
    one, two = nets
    rows = [
        torch.cat([m[0].weight, m[0].bias[:, None], m[2].weight.T], dim=1).detach() for m in nets
    ]
    outer = float((one[2].bias - two[2].bias).detach().square().sum())
    best = min(
        float((rows[0] - rows[1][list(order)]).square().sum()) + outer
        for order in itertools.permutations(range(5))
    )
    assert match_weights(one, two).distance_after == pytest.approx(best**0.5, rel=1e-12)


def trained(seed: int, x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 2))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def test_matched_nets_have_a_lower_barrier_than_unmatched_ones():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long()
    one, two = trained(1, x, y), trained(2, x, y)
    objective = fm.Objective(one, nn.CrossEntropyLoss(), (x, y))
    alphas = torch.linspace(0, 1, 11)
    matched = apply_permutations(two, match_weights(one, two))
    before = fm.interpolate(objective, one, two, alphas=alphas)
    after = fm.interpolate(objective, one, matched, alphas=alphas)
    assert after.loss[-1] == pytest.approx(before.loss[-1], rel=1e-4)
    assert before.barrier().height > 0.05
    assert after.barrier().height < 0.5 * before.barrier().height


# ---------------------------------------------------------------------------- result, repetition


def test_same_seed_is_the_same_and_results_go_to_json():
    one, two = built("mlp", 0), built("mlp", 1)
    found = match_weights(one, two, seed=3)
    assert found == match_weights(one, two, seed=3)
    assert found == match_weights(one, two, seed=torch.Generator().manual_seed(3))
    assert Permutations.from_json(found.to_json()) == found
    assert "distance" in repr(found)
    assert "moved" in repr(found)


def test_limit_of_sweeps_is_told():
    one, two = built("mlp", 0), built("mlp", 1)
    found = match_weights(one, two, max_sweeps=1)
    assert (found.sweeps, found.outcome) == (1, fm.Outcome.ITERATION_LIMIT)
    assert found.distance_after < found.distance_before


def test_nets_and_random_states_are_untouched():
    one, two = built("convolutions", 0).train(), built("convolutions", 1)
    for model in (one, two):
        model(inputs("convolutions")).sum().backward()
    with untouched(one, two):
        found = match_weights(one, two)
        other = apply_permutations(two, found)
    assert all(p.grad is None for p in other.parameters())
    assert [m.training for m in other.modules()] == [m.training for m in two.modules()]


def test_wrapped_nets_and_other_types_are_matched_alike():
    one, two = built("mlp", 0), built("mlp", 1)
    found = match_weights(one, two)
    assert match_weights(nn.DataParallel(one), nn.DataParallel(two)) == found
    wrapped = apply_permutations(nn.DataParallel(two), found)
    assert same_tensors(wrapped, apply_permutations(two, found))
    halves = match_weights(one, copy.deepcopy(two).to(torch.bfloat16))
    assert halves.distance_after < halves.distance_before


# ---------------------------------------------------------------------------------- what is refused


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.last(x + torch.relu(self.inner(x)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        out, _ = self.cell(x)
        return self.last(out)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.last = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        weights = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), dim=-1)
        return self.last(weights @ self.q(x))


class Given(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.first(x)
        return x, self.last(x)


class Prelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.slopes = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.last(F.prelu(self.first(x), self.slopes))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.first(x)) if x.sum() > 0 else self.last(self.first(-x))


SHARED = nn.Linear(4, 4)
REFUSED = {
    "residual": (Residual(), "'first': it is added to another branch"),
    "recurrent": (Recurrent(), "'cell': it is LSTM"),
    "attention": (Attention(), "'q': "),
    "given out": (Given(), "'first': it also gives the model's output"),
    "channel slopes": (Prelu(), r"'first': it goes through prelu\(\)"),
    "transformer": (
        nn.Sequential(nn.TransformerEncoderLayer(4, 2, batch_first=True), nn.Linear(4, 2)),
        "'0': it is TransformerEncoderLayer",
    ),
    "grouped": (
        nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=2)),
        "'0': '2', which reads it, is a grouped convolution",
    ),
    "groups of a norm": (
        nn.Sequential(nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1)),
        r"'0': it feeds '1' \(GroupNorm\)",
    ),
    "shared": (nn.Sequential(nn.Linear(3, 4), SHARED, SHARED), "'0': '1', which reads it"),
    "softmax": (
        nn.Sequential(nn.Linear(3, 4), nn.Softmax(dim=-1), nn.Linear(4, 2)),
        r"'0': it feeds '1' \(Softmax\)",
    ),
    "weight norm": (
        nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2)
        ),
        "'0': its weight is made by a parametrisation",
    ),
    "embedding": (
        nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)),
        "'0': it is Embedding",
    ),
    "one layer": (nn.Sequential(nn.Linear(3, 2)), "found no hidden units in Sequential"),
    "a branch on values": (Branching(), "cannot trace that of Branching"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layer_that_stands_in_the_way_is_named(name):
    model, message = REFUSED[name]
    with pytest.raises(fm.InvalidArgumentError, match=message):
        match_weights(copy.deepcopy(model), model)


def test_last_layer_may_go_anywhere():
    model = nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.BatchNorm1d(2), nn.Softmax(dim=-1)
    )
    assert list(match_weights(model, model).permutations) == ["0"]


def test_other_architecture_is_refused_with_the_tensor():
    one = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    two = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(
        fm.StateMismatchError, match=r"'model' argument of match_weights.*'0.weight' \(4, 3\)"
    ):
        match_weights(one, two)


def test_bad_arguments_are_refused():
    model = built("mlp", 0)
    with pytest.raises(fm.ArgumentTypeError, match="'reference' argument of match_weights"):
        match_weights(model.state_dict(), model)
    with pytest.raises(fm.InvalidArgumentError, match="'max_sweeps'"):
        match_weights(model, model, max_sweeps=0)
    broken = copy.deepcopy(model)
    broken[2].weight.data[0, 0] = float("nan")
    with pytest.raises(fm.NonFiniteError, match=r"'model' argument .* '2.weight'"):
        match_weights(model, broken)


def test_permutations_of_another_architecture_are_refused():
    found = match_weights(built("mlp", 0), built("mlp", 1))
    with pytest.raises(fm.InvalidArgumentError, match="the layer '0' has 8 hidden units"):
        apply_permutations(built("convolutions", 0), found)
    with pytest.raises(fm.ArgumentTypeError, match="'permutations' argument"):
        apply_permutations(built("mlp", 0), found.permutations)


@pytest.mark.parametrize("layer", [nn.PReLU(5), nn.GroupNorm(1, 5)], ids=["PReLU", "GroupNorm"])
def test_inputs_show_where_units_are_not_where_they_were_taken_to_be(layer):
    """A second dimension of tokens, as many as units, cannot be told by tracing."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nn.init.normal_(layer.weight)
        nets = [
            nn.Sequential(nn.Linear(3, 5), copy.deepcopy(layer), nn.Linear(5, 2)) for _ in range(2)
        ]
        tokens, rows = torch.randn(2, 5, 3), torch.randn(6, 3)
    found = fm.match_weights(*nets)
    found = dataclasses.replace(found, permutations={"0": (4, 3, 2, 1, 0)})
    permuted = fm.apply_permutations(nets[1], found, inputs=rows)
    torch.testing.assert_close(permuted(rows), nets[1](rows))
    assert permuted.training
    with pytest.raises(fm.InvalidArgumentError, match="other outputs for these inputs"):
        fm.apply_permutations(nets[1], found, inputs=tokens)


def test_a_forward_replaced_on_the_object_is_refused():
    nets = [nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)) for _ in range(2)]
    nets[1].forward = lambda x: nets[1][2](nets[1][0](x) * torch.arange(5.0))
    with pytest.raises(fm.InvalidArgumentError, match="replaced on the object"):
        fm.match_weights(*nets)
    with pytest.raises(fm.InvalidArgumentError, match="replaced on the object"):
        fm.rescale(nets[1])
