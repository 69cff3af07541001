"""Random-perturbation sharpness: the draws are made again here, and the values by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

import flatminima as fm
from integrity import untouched
from zoo import build


class Sum(nn.Module):
    """gᵀθ over three tensors, with a g for each."""

    def __init__(self, dtype=torch.float64, size=1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.slopes = {}
        for name, shape in (("first", (3, 2)), ("second", (5,)), ("third", ())):
            start = size * torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(start.to(dtype)))
            slope = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.slopes[name] = slope.to(dtype)

    def forward(self, inputs=None):
        return sum((self.slopes[n] * p).sum() for n, p in self.named_parameters())


def linear(**options) -> tuple[Sum, fm.Objective]:
    model = Sum(**options)
    return model, fm.Objective(model, data=[torch.zeros(1)], batch_loss=lambda m, batch: m())


def draws(model: Sum, samples: int, seed: int, scope: str) -> dict[str, torch.Tensor]:
    """For each place, its z as rows (samples, size), in the order in which they are drawn."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    if scope == "all":
        sizes = {"all": sum(sizes.values())}
    return {
        name: torch.stack(
            [torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(samples)]
        )
        for name, n in sizes.items()
    }


def by_hand(model: Sum, samples: int, seed: int, scope: str, relative: bool) -> dict:
    slopes, rms = {}, {}
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        rms[name] = torch.full_like(flat, float((flat**2).mean().sqrt()) if relative else 1.0)
        slopes[name] = model.slopes[name].flatten()
    if scope == "all":
        slopes = {"all": torch.cat(list(slopes.values()))}
        rms = {"all": torch.cat(list(rms.values()))}
    z = draws(model, samples, seed, scope)
    return {n: ((z[n] * rms[n]) @ slopes[n]).abs().numpy() for n in slopes}


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("scope", ["tensor", "all"])
@pytest.mark.parametrize(("samples", "seed"), [(2, 0), (7, 3)])
@pytest.mark.parametrize("epsilon", [1e-3, 0.1])
def test_linear_loss_gives_the_product_of_slope_and_draw(samples, seed, scope, relative, epsilon):
    model, objective = linear()
    result = fm.random_sharpness(
        objective, epsilon=epsilon, samples=samples, seed=seed, scope=scope, relative=relative
    )
    exact = by_hand(model, samples, seed, scope, relative)
    assert [t.name for t in result.tensors] == list(exact)
    for tensor in result.tensors:
        values = exact[tensor.name]
        assert tensor.value == pytest.approx(values.max(), rel=1e-9)
        assert tensor.mean == pytest.approx(values.mean(), rel=1e-9)
        assert tensor.standard_deviation == pytest.approx(values.std(ddof=1), rel=1e-9)
    every = np.stack(list(exact.values()))
    assert result.value == pytest.approx(every.max(), rel=1e-9)
    assert result.mean == pytest.approx(every.mean(), rel=1e-9)
    assert result.standard_deviation == pytest.approx(every.std(ddof=1), rel=1e-9)
    assert (result.scope, result.relative) == (scope, relative)
    assert (result.samples, result.epsilon) == (samples, epsilon)
    assert result.loss == objective.loss()
    assert result.outcome is fm.Outcome.COMPLETED


def test_one_draw_gives_the_absolute_product_and_no_spread():
    model, objective = linear()
    result = fm.random_sharpness(objective, samples=1, scope="all")
    slope = torch.cat([s.flatten() for s in model.slopes.values()])
    z = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert result.value == pytest.approx(abs(float(slope @ z)), rel=1e-9)
    assert math.isnan(result.standard_deviation), "one draw says nothing about the spread"


def watched(model: Sum, **options) -> tuple[list[torch.Tensor], fm.Objective]:
    """The parameter vectors that the loss is evaluated at, in order."""
    seen = []

    def loss(model, batch):
        seen.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return model()

    data = [torch.zeros(1), torch.zeros(1)]
    return seen, fm.Objective(model, data=data, batch_loss=loss, **options)


@pytest.mark.parametrize("cache", [True, False])
def test_each_tensor_is_perturbed_alone(cache):
    model = Sum()
    seen, objective = watched(model, cache=cache)
    fm.random_sharpness(objective, samples=2)
    expected = [{*range(6)}] * 2 + [{*range(6, 11)}] * 2 + [{11}] * 2
    point = objective.point()
    moved = [set((v != point).nonzero().flatten().tolist()) for v in seen]
    assert moved[:2] == [set(), set()], "the loss itself, of two batches"
    # Batch after batch where the data are read anew, point after point where they are kept.
    assert moved[2:] == ([e for e in expected for _ in range(2)] if cache else 2 * expected)


@pytest.mark.parametrize(("scope", "losses"), [("tensor", 3 * 4 + 1), ("all", 4 + 1)])
@pytest.mark.parametrize("cache", [True, False])
def test_evaluations_are_counted_exactly(scope, losses, cache):
    seen, objective = watched(Sum(), cache=cache)
    result = fm.random_sharpness(objective, samples=4, scope=scope)
    assert result.evaluations == losses
    assert len(seen) == 2 * losses


@pytest.mark.parametrize("scope", ["tensor", "all"])
@pytest.mark.parametrize("relative", [False, True])
def test_data_that_are_read_anew_give_the_same_numbers(scope, relative):
    case = build("mlp_batch_norm_dropout", torch.float32)
    options = {"samples": 3, "scope": scope, "relative": relative}
    kept = fm.random_sharpness(case.objective(cache=True), **options)
    anew = fm.random_sharpness(case.objective(cache=False), **options)
    assert (kept.readings, anew.readings) == (0, 2), "once for L(θ), once for all the rest"
    assert dataclasses.replace(anew, readings=0) == kept
    assert "The data were read 2 times, since they are not kept" in repr(anew)
    assert "read" not in repr(kept)
    assert fm.RandomSharpnessResult.from_json(anew.to_json()) == anew


def test_zero_tensors_are_not_perturbed_when_relative():
    model, objective = linear()
    with torch.no_grad():
        model.second.zero_()
    result = fm.random_sharpness(objective, relative=True)
    values = {t.name: t.value for t in result.tensors}
    assert values["second"] == 0.0
    assert values["first"] > 0
    assert result.outcome is fm.Outcome.COMPLETED


def test_a_model_of_zeros_cannot_be_shaken_relatively_and_says_so():
    model, objective = linear()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    result = fm.random_sharpness(objective, relative=True)
    assert result.value == 0.0
    assert result.outcome is fm.Outcome.BELOW_ROUNDING


def test_relative_value_is_unchanged_when_the_unit_of_a_tensor_changes():
    # θ → cθ with slopes g / c is the same function of the relative perturbation.
    model, objective = linear()
    before = fm.random_sharpness(objective, relative=True)
    with torch.no_grad():
        model.first.mul_(8)
    model.slopes["first"] = model.slopes["first"] / 8
    after = fm.random_sharpness(objective, relative=True)
    assert after.value == pytest.approx(before.value, rel=1e-9)


# ----------------------------------------------------------------------- what can be resolved


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resolution_is_that_of_the_loss_over_epsilon(dtype):
    _, objective = linear(dtype=dtype, size=100.0)
    result = fm.random_sharpness(objective, epsilon=1e-2)
    expected = 2 * torch.finfo(dtype).eps * abs(objective.loss()) / 1e-2
    assert result.resolution == pytest.approx(expected)


def constant(value: float, slope: float, dtype=torch.float32) -> fm.Objective:
    model = nn.Linear(1, 1, bias=False).to(dtype)
    return fm.Objective(
        model,
        data=[torch.zeros(1)],
        batch_loss=lambda m, batch: value + slope * m.weight.sum(),
    )


def test_differences_within_rounding_are_told():
    result = fm.random_sharpness(constant(1e4, 1e-3), epsilon=1e-3)
    assert result.outcome is fm.Outcome.BELOW_ROUNDING
    assert result.value <= result.resolution


def test_the_same_in_float64_is_resolved():
    result = fm.random_sharpness(constant(1e4, 1e-3, torch.float64), epsilon=1e-3)
    assert result.outcome is fm.Outcome.COMPLETED
    assert 0 < result.value < 1e-2


def root(offset: float) -> fm.Objective:
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(offset)
    return fm.Objective(model, data=[torch.zeros(1)], batch_loss=lambda m, b: m.weight.sum().sqrt())


def test_points_where_the_loss_is_nan_are_kept_and_told():
    result = fm.random_sharpness(root(1e-6), epsilon=1.0)
    assert result.outcome is fm.Outcome.NON_FINITE_POINTS
    assert math.isnan(result.value)
    assert result.loss == pytest.approx(1e-3)


def test_points_where_the_loss_is_infinite_are_kept_and_told():
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    objective = fm.Objective(
        model, data=[torch.zeros(1)], batch_loss=lambda m, b: (1000 * m.weight.abs()).sum().exp()
    )
    result = fm.random_sharpness(objective, epsilon=10.0)
    assert result.outcome is fm.Outcome.NON_FINITE_POINTS
    assert result.value == math.inf


def test_loss_that_is_not_finite_at_the_model_raises():
    with pytest.raises(fm.NonFiniteError, match="batch 0"):
        fm.random_sharpness(constant(math.nan, 1.0))


# --------------------------------------------------------------------- repetition, bad input


@pytest.mark.parametrize("options", [{}, {"scope": "all"}, {"relative": True}])
def test_same_seed_gives_the_same_bits(options):
    objective = build("conv_batch_norm", torch.float32).objective()
    first = fm.random_sharpness(objective, samples=2, seed=5, **options)
    assert first == fm.random_sharpness(objective, samples=2, seed=5, **options)
    generator = torch.Generator().manual_seed(5)
    assert first == fm.random_sharpness(objective, samples=2, seed=generator, **options)
    assert first != fm.random_sharpness(objective, samples=2, seed=6, **options)


@pytest.mark.parametrize("mode", ["eval", "train", "keep"])
def test_model_data_and_random_states_are_untouched(mode):
    case = build("mlp_batch_norm_dropout", torch.float32)
    case.model.train()
    with untouched(case.model, case.batches):
        fm.random_sharpness(case.objective(mode=mode), samples=2)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan])
def test_epsilon_that_is_not_positive_is_refused(epsilon):
    with pytest.raises(fm.InvalidArgumentError, match="'epsilon' argument of random_sharpness"):
        fm.random_sharpness(linear()[1], epsilon=epsilon)


@pytest.mark.parametrize("samples", [0, -1])
def test_no_samples_are_refused(samples):
    with pytest.raises(fm.InvalidArgumentError, match="'samples' argument of random_sharpness"):
        fm.random_sharpness(linear()[1], samples=samples)


def test_unknown_scope_is_refused_with_the_nearest():
    with pytest.raises(fm.InvalidArgumentError, match="Did you mean 'tensor'"):
        fm.random_sharpness(linear()[1], scope="tensors")


def test_model_in_place_of_an_objective_is_refused_with_advice():
    with pytest.raises(fm.ArgumentTypeError, match=r"fm\.Objective\(model, loss_fn, data\)"):
        fm.random_sharpness(nn.Linear(2, 1))
