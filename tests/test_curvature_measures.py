"""Gradient norm, Fisher–Rao norm, relative flatness and critical sharpness: closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian

import flatminima as fm
from integrity import untouched
from zoo import matrix_with_spectrum, quadratic_case

DOUBLE = torch.float64


def draws(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=DOUBLE)


def filled(model, seed=0):
    model.to(DOUBLE)
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.copy_(0.7 * draws(seed + number, *p.shape))
    return model


def net_objective(**options):
    net = filled(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    x, y = draws(50, 23, 4), torch.arange(23) % 3
    return net, x, y, fm.Objective(net, nn.CrossEntropyLoss(), (x, y), **options)


# ----------------------------------------------------------------------------------- gradient norm


def test_gradient_norm_is_that_of_all_and_of_each_tensor():
    net, x, y, objective = net_objective(batch_size=6)
    result = fm.gradient_norm(objective)
    nn.functional.cross_entropy(net(x), y).backward()
    gradients = {n: p.grad for n, p in net.named_parameters()}
    for name, gradient in gradients.items():
        assert result.tensors[name] == pytest.approx(float(gradient.norm()), rel=1e-12)
    flat = torch.cat([g.flatten() for g in gradients.values()])
    assert result.value == pytest.approx(float(flat.norm()), rel=1e-12)
    assert result.largest == pytest.approx(float(flat.abs().max()), rel=1e-12)
    assert "0.bias" in str(result)


# --------------------------------------------------------------------------------- Fisher–Rao norm


def test_fisher_rao_norm_of_a_linear_regression():
    model = filled(nn.Linear(3, 2, bias=False))
    x, y = draws(1, 10, 3), draws(2, 10, 2)
    result = fm.fisher_rao_norm(fm.Objective(model, nn.MSELoss(), (x, y)))
    outputs = model(x).detach()
    assert result.value == pytest.approx(2 * float(outputs.square().mean()), rel=1e-12)


def test_fisher_rao_norm_of_a_homogeneous_net_is_that_of_its_outputs():
    """J θ = 2 f for two bias-free ReLU layers (Liang et al. 2019, theorem 1)."""
    net = filled(nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)))
    x, y = draws(5, 11, 4), torch.arange(11) % 3
    objective = fm.Objective(net, nn.CrossEntropyLoss(), (x, y))
    f = net(x).detach()
    p = f.softmax(1)
    variance = (p * f.square()).sum(1) - (p * f).sum(1).square()
    assert fm.fisher_rao_norm(objective).value == pytest.approx(
        4 * float(variance.mean()), rel=1e-12
    )
    residuals = p - nn.functional.one_hot(y, 3)
    expected = 4 * float((residuals * f).sum(1).square().mean())
    found = fm.fisher_rao_norm(objective, kind="empirical")
    assert found.value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_fisher_rao_norm_survives_rescaling(kind):
    net, x, y, objective = net_objective()
    before = fm.fisher_rao_norm(objective, kind=kind).value
    for per in ("layer", "neuron"):
        other = fm.rescale(net, factor=50.0, per=per)
        after = fm.fisher_rao_norm(fm.Objective(other, nn.CrossEntropyLoss(), (x, y)), kind=kind)
        assert after.value == pytest.approx(before, rel=1e-9)


def test_fisher_rao_norm_needs_a_likelihood():
    net, x, _, _ = net_objective()
    objective = fm.Objective(net, nn.L1Loss(), (x, draws(3, 23, 3)))
    with pytest.raises(fm.InvalidArgumentError, match="kind='empirical'"):
        fm.fisher_rao_norm(objective)
    with pytest.raises(fm.InvalidArgumentError, match="'kind' argument of fisher_rao_norm"):
        fm.fisher_rao_norm(objective, kind="monte_carlo")


# ------------------------------------------------------------------------------- relative flatness


def by_hand(net, full_loss, name):
    """Σ_{s,s'} ⟨w_s, w_s'⟩ tr H_{s,s'} from the dense Hessian of one weight matrix."""
    weight = dict(net.named_parameters())[name].detach()

    def loss(flat):
        return full_loss(torch.func.functional_call, {name: flat.view(weight.shape)})

    dense = hessian(loss, weight.flatten())
    rows = weight.flatten(1)
    s, d = rows.shape
    blocks = dense.view(s, d, s, d).diagonal(dim1=1, dim2=3).sum(-1)
    return float(((rows @ rows.T) * blocks).sum())


@pytest.mark.parametrize("products", [400, 20])
def test_relative_flatness_is_that_of_the_dense_hessian(products):
    net, x, y, objective = net_objective(batch_size=7)

    def full_loss(call, replaced):
        return nn.functional.cross_entropy(call(net, replaced, (x,)), y)

    result = fm.relative_flatness(objective, products=products)
    assert [(r.name, r.rows, r.columns) for r in result.layers] == [
        ("0.weight", 5, 4),
        ("2.weight", 3, 5),
    ]
    for layer in result.layers:
        exact = by_hand(net, full_loss, layer.name)
        if products == 400:
            assert layer.outcome is fm.Outcome.EXACT
            assert layer.value == pytest.approx(exact, rel=1e-10)
        else:
            assert layer.value == pytest.approx(exact, abs=4 * layer.standard_error + 1e-9)
    assert result.value == pytest.approx(sum(layer.value for layer in result.layers))
    # A is the smaller of W and the root of W Wᵀ: 4 × 4 and 3 × 5 numbers.
    if products == 400:
        assert [layer.products for layer in result.layers] == [16, 15]


def test_filters_are_the_rows_of_convolutions():
    net = filled(nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)))
    x, y = draws(9, 6, 2, 3, 3), torch.arange(6) % 2

    def full_loss(call, replaced):
        return nn.functional.cross_entropy(call(net, replaced, (x,)), y)

    objective = fm.Objective(net, nn.CrossEntropyLoss(), (x, y))
    result = fm.relative_flatness(objective, layers="0.weight", products=200)
    assert (result.layers[0].rows, result.layers[0].columns) == (3, 8)
    assert result.value == pytest.approx(by_hand(net, full_loss, "0.weight"), rel=1e-10)


@pytest.mark.parametrize("kind", ["embedding", "transposed convolution"])
def test_neurons_may_be_counted_by_the_second_dimension(kind):
    """The same matrix as of a linear layer that reads what these read."""
    if kind == "embedding":
        net = filled(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)))
        x = torch.tensor([0, 1, 2, 3, 4, 1])
        inputs = nn.functional.one_hot(x, 5).double()
    else:
        net = filled(
            nn.Sequential(nn.ConvTranspose1d(5, 3, 1, bias=False), nn.Flatten(), nn.Linear(3, 2))
        )
        inputs = draws(3, 6, 5)
        x = inputs[:, :, None]
    y = torch.arange(6) % 2
    weight = net[0].weight.detach()
    twin = nn.Sequential(nn.Linear(5, 3, bias=False), nn.Linear(3, 2)).to(DOUBLE)
    with torch.no_grad():
        twin[0].weight.copy_(weight.flatten(1).T)
        twin[1].load_state_dict(net[-1].state_dict())
    found, expected = (
        fm.relative_flatness(fm.Objective(m, nn.CrossEntropyLoss(), (i, y)), products=100)
        for m, i in ((net, x), (twin, inputs))
    )
    assert (found.layers[0].rows, found.layers[0].columns) == (3, 5)
    assert found.layers[0].value == pytest.approx(expected.layers[0].value, rel=1e-10)
    assert expected.value != 0


def test_relative_flatness_survives_the_rescaling_of_layers():
    net, x, y, objective = net_objective()
    before = fm.relative_flatness(objective, products=10, seed=1)
    other = fm.rescale(net, factor=30.0)
    after = fm.relative_flatness(
        fm.Objective(other, nn.CrossEntropyLoss(), (x, y)), products=10, seed=1
    )
    assert after.value == pytest.approx(before.value, rel=1e-7)
    assert before.value != 0


def test_relative_flatness_needs_matrices():
    net, x, y, _ = net_objective()
    biases = fm.Objective(net, nn.CrossEntropyLoss(), (x, y), params="*.bias")
    with pytest.raises(fm.InvalidArgumentError, match="two dimensions"):
        fm.relative_flatness(biases)
    objective = fm.Objective(net, nn.CrossEntropyLoss(), (x, y))
    with pytest.raises(fm.ParameterSelectionError, match=r"'0\.bias' matches no"):
        fm.relative_flatness(objective, layers="0.bias")
    with pytest.raises(fm.InvalidArgumentError, match="'products' argument of relative_flatness"):
        fm.relative_flatness(objective, products=3)


# ------------------------------------------------------------------------------ critical sharpness


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_along_the_gradient_it_is_the_curvature_there(size):
    matrix = matrix_with_spectrum([5.0, 2.0, 1.0, 0.5], 0)
    start = draws(1, 4)
    objective = quadratic_case(size * matrix, None, start).objective()
    gradient = size * matrix @ start
    expected = float(gradient @ (size * matrix) @ gradient / (gradient @ gradient))
    result = fm.critical_sharpness(objective, tol=1e-3)
    assert result.value == pytest.approx(expected, abs=1.01 * result.error)
    assert result.error < 1e-3 * expected
    assert result.step == pytest.approx(2 / result.value)
    low, high = result.bracket
    assert low < 2 / expected < high <= 1.001 * low
    assert (result.gradients, result.evaluations) == (1, len(result.tried_steps))
    assert result.evaluations < 40


def test_an_update_may_be_a_vector_or_tensors_by_name():
    net, _, _, objective = net_objective()
    gradient = objective.gradient()
    signs = -gradient.sign()
    whole = fm.critical_sharpness(objective, update=signs)
    assert whole.measurements()[0].name == "critical sharpness 2/η, update given"
    assert (whole.gradients, whole.evaluations) == (0, len(whole.tried_steps) + 1)
    pieces = dict(zip(objective.layout.names, objective.layout.unflatten(signs), strict=True))
    assert fm.critical_sharpness(objective, update=pieces) == whole
    assert whole.value != pytest.approx(fm.critical_sharpness(objective).value, rel=0.1)
    # The loss is lower just inside of the step and not just outside of it.
    low, high = whole.bracket
    assert objective.loss_at(low * signs) < whole.loss <= objective.loss_at(high * signs)
    head = {n: p for n, p in pieces.items() if n.startswith("2.")}
    partly = fm.critical_sharpness(objective, update=head)
    only = fm.Objective(
        net, objective.loss_fn, (draws(50, 23, 4), torch.arange(23) % 3), params="2.*"
    )
    assert partly.value == pytest.approx(
        fm.critical_sharpness(only, update=signs[-18:], tol=1e-4).value, rel=0.02
    )


def test_an_update_along_which_the_loss_rises_says_so():
    _, _, _, objective = net_objective()
    result = fm.critical_sharpness(objective, update=objective.gradient())
    assert result.outcome is fm.Outcome.NO_DESCENT
    assert (result.value, result.step) == (math.inf, 0.0)
    assert result.measurements()[0].error is None


def test_a_loss_that_falls_for_ever_says_so():
    flat = torch.zeros(2, 2, dtype=DOUBLE)
    objective = quadratic_case(flat, torch.ones(2, dtype=DOUBLE)).objective()
    result = fm.critical_sharpness(objective)
    assert result.outcome is fm.Outcome.NOT_REACHED
    assert 0 < result.value < 1e-6
    assert result.bracket[1] == math.inf


def test_critical_sharpness_refuses_what_is_no_update():
    _, _, _, objective = net_objective()
    n = objective.size
    for update, error, message in (
        (torch.zeros(n, dtype=DOUBLE), fm.InvalidArgumentError, "update, which is zero"),
        (torch.ones(n - 1, dtype=DOUBLE), fm.ShapeError, rf"takes shape \({n},\)"),
        ({"0.wieght": torch.ones(5, 4)}, fm.StateMismatchError, "mean '0.weight'"),
        ({"0.weight": torch.ones(4, 5)}, fm.ShapeError, r"\(5, 4\) for '0.weight'; got \(4, 5\)"),
        (torch.full((n,), math.nan), fm.NonFiniteError, "NaN"),
        (3, fm.ArgumentTypeError, "tensor of shape"),
    ):
        with pytest.raises(error, match=message):
            fm.critical_sharpness(objective, update=update)
    with pytest.raises(fm.InvalidArgumentError, match="below 1"):
        fm.critical_sharpness(objective, tol=1.0)
    still = quadratic_case(torch.eye(2, dtype=DOUBLE)).objective()
    with pytest.raises(fm.InvalidArgumentError, match="gradient, which is zero"):
        fm.critical_sharpness(still)


# ------------------------------------------------------------------------------------------ all


@pytest.mark.parametrize(
    "measure",
    [fm.gradient_norm, fm.fisher_rao_norm, fm.relative_flatness, fm.critical_sharpness],
)
def test_data_may_be_cut_as_one_likes_and_nothing_is_touched(measure):
    values = []
    for batch_size, cache in ((23, True), (5, True), (4, False)):
        net, x, y, objective = net_objective(batch_size=batch_size, cache=cache)
        with untouched(net, x, y):
            result = measure(objective, seed=2, progress=False)
        assert measure(objective, seed=2) == result or not cache
        values.append(result.value)
    assert values[1:] == pytest.approx([values[0]] * 2, rel=1e-6)


# ------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize("distance", [1e-4, 1e-3, 1e-2, 0.3])
def test_critical_sharpness_knows_what_rounding_does(distance):
    """L = 1 + (w − 1)² / 2 in float32, at a distance from its minimum: H = 1."""

    class Bowl(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0 + distance]))

        def forward(self, inputs):
            return 1 + (self.w - 1).square().sum() / 2

    objective = fm.Objective(Bowl(), data=[torch.zeros(1)], batch_loss=lambda m, b: m(b))
    result = fm.critical_sharpness(objective)
    if result.outcome is fm.Outcome.COMPLETED:
        assert result.value == pytest.approx(1.0, abs=2 * result.error)
        assert distance > 1e-4
    else:
        assert result.outcome is fm.Outcome.BELOW_ROUNDING
        assert distance < 1e-2


def test_flatness_by_differences_has_their_error():
    class Hard(nn.Module):
        def forward(self, x):
            return nn.functional.hardsigmoid(x)

    net = filled(nn.Sequential(nn.Linear(3, 4), Hard(), nn.Linear(4, 2))).float()
    objective = fm.Objective(
        net, nn.CrossEntropyLoss(), (draws(1, 8, 3).float(), torch.arange(8) % 2)
    )
    with pytest.warns(fm.FiniteDifferenceWarning):
        result = fm.relative_flatness(objective)
    assert result.outcome is fm.Outcome.INEXACT_PRODUCTS
    assert result.standard_error > 0


def test_layers_that_were_chosen_are_in_the_name():
    _, _, _, objective = net_objective()
    whole = fm.relative_flatness(objective)
    part = fm.relative_flatness(objective, layers="2.*")
    assert whole.measurements()[0].name == "relative flatness"
    assert part.measurements()[0].name == "relative flatness of 2.weight"
    assert part.value == pytest.approx(whole.layers[1].value)
