"""Worst-case sharpness over a ball: closed forms, exact trust regions, groups of examples."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

import flatminima as fm
from integrity import untouched
from test_ball import exact_trust_region
from zoo import matrix_with_spectrum, quadratic_case

INF = math.inf
DOUBLE = torch.float64


class Slope(nn.Module):
    """gᵀθ in two tensors."""

    def __init__(self, start, slope):
        super().__init__()
        half = len(start) // 2
        self.first, self.second = (nn.Parameter(p.clone()) for p in (start[:half], start[half:]))
        self.slope = slope

    def forward(self, inputs=None):
        return torch.cat([self.first, self.second]) @ self.slope


def linear(start, slope) -> fm.Objective:
    start, slope = (torch.tensor(v, dtype=DOUBLE) for v in (start, slope))
    model = Slope(start, slope)
    return fm.Objective(model, data=[torch.zeros(1)], batch_loss=lambda m, batch: m())


def trained_net(dtype=DOUBLE):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=generator, dtype=dtype)
    y = torch.randint(3, (30,), generator=generator)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=dtype))
    return net, x, y


# ------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(("norm", "dual"), [(2, 2), (INF, 1)])
def test_a_linear_loss_rises_by_the_dual_norm(norm, dual, adaptive, steps):
    start, slope = [1.0, -2.0, 0.0, 3.0], [0.5, 1.0, 4.0, -2.0]
    objective = linear(start, slope)
    g = torch.tensor(slope, dtype=DOUBLE) * (torch.tensor(start).abs() if adaptive else 1)
    result = fm.sam_sharpness(
        objective,
        rho=0.3,
        norm=norm,
        adaptive=adaptive,
        steps=steps,
        return_displacement=True,
    )
    expected = 0.3 * float(torch.linalg.vector_norm(g, dual))
    assert result.value == pytest.approx(expected, rel=1e-12)
    assert result.first_order == pytest.approx(expected, rel=1e-12)
    assert result.loss == pytest.approx(1 * 0.5 - 2 * 1 - 3 * 2)
    if adaptive:
        assert result.displacement[2] == 0


@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize("seed", range(3))
def test_a_quadratic_reaches_the_trust_region_maximum(seed, size):
    generator = torch.Generator().manual_seed(seed)
    matrix = matrix_with_spectrum(torch.randn(12, generator=generator), seed)
    gradient = size * torch.randn(12, generator=generator, dtype=DOUBLE)
    result = fm.sam_sharpness(
        quadratic_case(matrix, gradient).objective(), rho=0.7, steps=40, restarts=3
    )
    exact = exact_trust_region(matrix, gradient, 0.7)
    assert 0.995 * exact <= result.value <= exact * (1 + 1e-9)


def test_adaptive_is_the_trust_region_in_units_of_the_parameters():
    generator = torch.Generator().manual_seed(4)
    matrix = matrix_with_spectrum(torch.linspace(-1, 3, 8), 4)
    start = torch.randn(8, generator=generator, dtype=DOUBLE)
    linear_part = torch.randn(8, generator=generator, dtype=DOUBLE)
    objective = quadratic_case(matrix, linear_part, start).objective()
    c = start.abs()
    result = fm.sam_sharpness(objective, rho=0.5, adaptive=True, steps=60, restarts=3)
    gradient = c * (matrix @ start + linear_part)
    exact = exact_trust_region(c[:, None] * matrix * c, gradient, 0.5)
    assert 0.995 * exact <= result.value <= exact * (1 + 1e-9)


def test_one_step_is_the_point_of_sam():
    net, x, y = trained_net()
    objective = fm.Objective(net, nn.CrossEntropyLoss(), (x, y))
    result = fm.sam_sharpness(objective, rho=0.05, return_displacement=True)
    gradient = objective.gradient()
    delta = 0.05 * gradient / gradient.norm()
    torch.testing.assert_close(result.displacement, delta, rtol=1e-12, atol=0)
    assert result.value == pytest.approx(objective.loss_at(delta) - objective.loss(), rel=1e-12)
    assert result.first_order == pytest.approx(0.05 * float(gradient.norm()), rel=1e-12)
    assert (result.gradients, result.losses) == (1, 1)
    assert result.outcome is fm.Outcome.COMPLETED


@pytest.mark.parametrize("norm", [2, INF])
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_maximum_lies_in_the_ball_and_is_what_is_said(norm, adaptive):
    net, x, y = trained_net()
    objective = fm.Objective(net, nn.CrossEntropyLoss(), (x, y))
    result = fm.sam_sharpness(
        objective, rho=0.1, norm=norm, adaptive=adaptive, steps=10, return_displacement=True
    )
    units = objective.point().abs() if adaptive else 1
    length = torch.linalg.vector_norm(result.displacement / units, norm)
    assert length <= 0.1 * (1 + 1e-12)
    rise = objective.loss_at(result.displacement) - result.loss
    assert result.value == pytest.approx(rise, rel=1e-10)
    one = fm.sam_sharpness(objective, rho=0.1, norm=norm, adaptive=adaptive)
    assert result.value > one.value > 0


# -------------------------------------------------------------------------------------- m-sharpness


def m_by_hand(net, x, y, m, rho):
    total = 0.0
    for a in range(0, len(x), m):
        group = fm.Objective(net, nn.CrossEntropyLoss(), (x[a : a + m], y[a : a + m]))
        gradient = group.gradient()
        rise = group.loss_at(rho * gradient / gradient.norm()) - group.loss()
        total += max(rise, 0.0) * len(x[a : a + m])
    return total / len(x)


@pytest.mark.parametrize("m", [1, 7, 10, 30])
@pytest.mark.parametrize("batch_size", [30, 8, 1])
def test_m_sharpness_is_the_mean_over_groups_however_data_are_cut(m, batch_size):
    net, x, y = trained_net()
    objective = fm.Objective(net, nn.CrossEntropyLoss(), (x, y), batch_size=batch_size)
    result = fm.sam_sharpness(objective, rho=0.1, m=m)
    assert result.value == pytest.approx(m_by_hand(net, x, y, m, 0.1), rel=1e-10)
    assert result.groups == -(-30 // m)
    assert f"m = {m}" in result.name


def test_groups_of_all_data_are_the_whole():
    net, x, y = trained_net()
    objective = fm.Objective(net, nn.CrossEntropyLoss(), (x, y), batch_size=9, cache=False)
    whole = fm.sam_sharpness(objective, rho=0.1, steps=4)
    groups = fm.sam_sharpness(objective, rho=0.1, steps=4, m=30)
    assert groups.value == pytest.approx(whole.value, rel=1e-10)
    assert whole.readings > groups.readings


def test_groups_weigh_by_what_their_losses_average_over():
    net, x, y = trained_net()
    y[:9] = -100  # nine of the first ten labels are ignored
    objective = fm.Objective(net, nn.CrossEntropyLoss(), (x, y))
    result = fm.sam_sharpness(objective, rho=0.1, m=10)
    parts = [
        fm.sam_sharpness(fm.Objective(net, nn.CrossEntropyLoss(), (x[a:b], y[a:b])), rho=0.1)
        for a, b in ((0, 10), (10, 20), (20, 30))
    ]
    expected = (1 * parts[0].value + 10 * parts[1].value + 10 * parts[2].value) / 21
    assert result.value == pytest.approx(expected, rel=1e-10)


def test_groups_without_a_label_are_passed_over():
    net, x, y = trained_net()
    y[:10] = -100
    objective = fm.Objective(net, nn.CrossEntropyLoss(), (x, y), batch_size=15)
    result = fm.sam_sharpness(objective, rho=0.1, m=10)
    assert result.groups == 2
    rest = fm.Objective(net, nn.CrossEntropyLoss(), (x[10:], y[10:]))
    assert result.value == pytest.approx(fm.sam_sharpness(rest, rho=0.1, m=10).value, rel=1e-10)


def test_smaller_groups_are_sharper():
    net, x, y = trained_net()
    objective = fm.Objective(net, nn.CrossEntropyLoss(), (x, y))
    values = [fm.sam_sharpness(objective, rho=0.05, m=m).value for m in (1, 10, 30)]
    assert values[0] > values[1] > values[2] > 0


# ------------------------------------------------------------------------------ normalised logits


def test_normalised_logits_do_not_see_the_scale_of_the_last_layer():
    net, x, y = trained_net()
    criterion = nn.CrossEntropyLoss()

    def measured(**options):
        return fm.sam_sharpness(fm.Objective(net, criterion, (x, y)), rho=0.1, **options)

    def adaptive(**options):
        return measured(adaptive=True, **options).value

    plain, normal = adaptive(), adaptive(normalize_logits=True)
    logits = net(x)
    scaled = logits / logits.std(dim=1, correction=0, keepdim=True)
    expected = nn.functional.cross_entropy(scaled, y).item()
    assert measured(normalize_logits=True).loss == pytest.approx(expected, rel=1e-12)
    with torch.no_grad():
        net[2].weight *= 3
        net[2].bias *= 3
    assert adaptive(normalize_logits=True) == pytest.approx(normal, rel=1e-9)
    assert adaptive() > 1.2 * plain


def test_normalised_logits_are_for_cross_entropy_alone():
    net, x, _ = trained_net()
    target = torch.zeros(30, 3, dtype=DOUBLE)
    objective = fm.Objective(net, nn.MSELoss(), (x, target))
    with pytest.raises(fm.InvalidArgumentError, match=r"CrossEntropyLoss.*MSELoss"):
        fm.sam_sharpness(objective, normalize_logits=True)


# --------------------------------------------------------------------------------------- diagnosis


def test_at_a_stationary_point_one_step_says_so_and_more_find_the_rise():
    matrix = matrix_with_spectrum([4.0, 1.0, -1.0], 0)
    objective = quadratic_case(matrix).objective()
    still = fm.sam_sharpness(objective, rho=0.5)
    assert (still.value, still.outcome) == (0.0, fm.Outcome.NO_ASCENT)
    found = fm.sam_sharpness(objective, rho=0.5, steps=30)
    assert found.value == pytest.approx(0.5 * 4 * 0.25, rel=1e-6)


def test_a_loss_that_explodes_keeps_the_best_finite_point():
    class Pole(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([0.5], dtype=DOUBLE))

        def forward(self, inputs):
            return -torch.log(1 - self.theta).sum()

    objective = fm.Objective(Pole(), data=[torch.zeros(1)], batch_loss=lambda m, b: m(b))
    result = fm.sam_sharpness(objective, rho=1.0, steps=10)
    assert result.outcome is fm.Outcome.UNBOUNDED
    assert 0 < result.value < INF


def test_a_rise_within_rounding_says_so():
    net, x, y = trained_net(torch.float32)
    objective = fm.Objective(net, nn.CrossEntropyLoss(), (x, y))
    for rho in (1e-8, 1e-7, 1e-6):
        result = fm.sam_sharpness(objective, rho=rho)
        assert result.outcome is fm.Outcome.BELOW_ROUNDING
    assert fm.sam_sharpness(objective, rho=1e-2).outcome is fm.Outcome.COMPLETED


def test_data_without_examples_have_no_groups():
    objective = fm.Objective(
        nn.Linear(1, 1), data=[3, 5], batch_loss=lambda m, b: b * m.weight.sum(), weight=lambda b: 1
    )
    with pytest.raises(fm.InvalidArgumentError, match="do not show what an example is"):
        fm.sam_sharpness(objective, m=1)


def test_seeds_matter_only_where_starts_are_drawn():
    net, x, y = trained_net()
    objective = fm.Objective(net, nn.CrossEntropyLoss(), (x, y))
    options = {"rho": 0.5, "steps": 2, "restarts": 2}
    first = fm.sam_sharpness(objective, seed=1, **options, return_displacement=True)
    again = fm.sam_sharpness(objective, seed=1, **options, return_displacement=True)
    assert first == again
    generator = torch.Generator().manual_seed(1)
    drawn = fm.sam_sharpness(objective, seed=generator, **options, return_displacement=True)
    assert drawn == first
    assert fm.sam_sharpness(objective, seed=2, rho=0.1) == fm.sam_sharpness(objective, rho=0.1)


def test_result_reads_back_and_prints():
    net, x, y = trained_net()
    result = fm.sam_sharpness(
        fm.Objective(net, nn.CrossEntropyLoss(), (x, y)), norm=INF, m=10, steps=3, restarts=1
    )
    assert fm.SamSharpnessResult.from_json(result.to_json()) == result
    assert result.name == "SAM sharpness, ρ = 0.05 (ℓ∞), 3 steps, 1 restarts, m = 10"
    (line,) = result.measurements()
    assert line.cost == f"{result.gradients} gradients, {result.losses} losses of 10 examples"
    assert "Mean over 3 groups." in str(result)
    assert dataclasses.replace(result, m=None).measurements()[0].cost.endswith("losses")


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_left_as_it_was(fails):
    net, x, y = trained_net(torch.float32)
    net.train()
    calls = [0]

    def criterion(output, target):
        calls[0] += 1
        if fails and calls[0] > 12:
            raise RuntimeError("lost")
        return nn.functional.cross_entropy(output, target)

    loader = torch.utils.data.DataLoader(list(zip(x, y, strict=True)), batch_size=7, shuffle=True)
    objective = fm.Objective(net, criterion, loader, cache=False)
    with untouched(net, x, y):
        if fails:
            with pytest.raises(fm.InvalidArgumentError, match=r"fails on one of 5 \(lost\)"):
                fm.sam_sharpness(objective, m=5, steps=3)
        else:
            fm.sam_sharpness(objective, m=5, steps=2)


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 0}, "'rho' argument of sam_sharpness must be a finite number > 0; got 0"),
        ({"rho": -1.0}, "must be a finite number > 0"),
        ({"rho": math.nan}, "must be a finite number > 0"),
        ({"norm": 1}, r"'norm' argument .* must be 2 or infinity .* got 1"),
        ({"norm": "inf"}, "'norm' argument"),
        ({"norm": True}, "'norm' argument"),
        ({"steps": 0}, "'steps' argument"),
        ({"restarts": -1}, "'restarts' argument"),
        ({"m": 0}, "'m' argument of sam_sharpness must be an integer from 1 to 30"),
        ({"m": 31}, "'m' argument of sam_sharpness must be an integer from 1 to 30; got 31"),
        ({"m": 5, "return_displacement": True}, "only without m="),
    ],
)
def test_bad_options_are_refused(options, message):
    net, x, y = trained_net()
    objective = fm.Objective(net, nn.CrossEntropyLoss(), (x, y))
    with pytest.raises(fm.InvalidArgumentError, match=message):
        fm.sam_sharpness(objective, **options)


def test_adaptive_refuses_tensors_of_zeros_by_name():
    net, x, y = trained_net()
    nn.init.zeros_(net[0].bias)
    objective = fm.Objective(net, nn.CrossEntropyLoss(), (x, y))
    with pytest.raises(fm.InvalidArgumentError, match=r"'0\.bias'.*Leave it out with params="):
        fm.sam_sharpness(objective, adaptive=True)
    weights = fm.Objective(net, nn.CrossEntropyLoss(), (x, y), params="*.weight")
    assert fm.sam_sharpness(weights, adaptive=True).value > 0


def test_single_zeros_stay_where_they_are():
    net, x, y = trained_net()
    with torch.no_grad():
        net[0].weight[:, :2] = 0
    objective = fm.Objective(net, nn.CrossEntropyLoss(), (x, y))
    result = fm.sam_sharpness(
        objective, adaptive=True, rho=0.5, steps=8, restarts=1, return_displacement=True
    )
    moved = result.displacement[:24].view(6, 4)
    assert not moved[:, :2].any()
    assert moved[:, 2:].all()
    assert result.value > 0


def test_batches_that_cannot_be_cut_are_refused():
    net, x, y = trained_net()

    def batch_loss(model, batch):
        return nn.functional.cross_entropy(model(batch["x"]), batch["y"]) + batch["extra"].sum()

    batch = {"x": x, "y": y, "extra": torch.zeros(2)}
    objective = fm.Objective(net, data=[batch], batch_loss=batch_loss, weight=lambda b: len(b["y"]))
    with pytest.raises(fm.FlatMinimaError, match=r"m"):
        fm.sam_sharpness(objective, m=1)


def test_something_else_than_an_objective_is_refused():
    with pytest.raises(fm.ArgumentTypeError, match=r"Make one with fm\.Objective"):
        fm.sam_sharpness(nn.Linear(1, 1))
