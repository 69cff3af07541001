"""Losses along a path between two models, against the models themselves and closed forms."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

import flatminima as fm
from integrity import untouched
from zoo import build, matrix_with_spectrum, quadratic_case

ENDPOINT_CASES = (
    "mlp_batch_norm_dropout",
    "conv_batch_norm",
    "tied_weights",
    "partly_frozen",
    "class_weighted",
    "padded_token_model",
)


def jittered(model: nn.Module, seed: int) -> nn.Module:
    """A copy with other parameters and other floating-point buffers."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*other.parameters(), *other.buffers()]:
            if tensor.dtype.is_floating_point:
                noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.add_((0.3 * noise).to(tensor.dtype))
    return other


def ends(case) -> tuple[nn.Module, nn.Module]:
    return jittered(case.model, 1), jittered(case.model, 2)


def own_loss(case, model: nn.Module) -> float:
    arguments = {"loss_fn": case.loss_fn, "batch_loss": case.batch_loss, "params": case.params}
    return fm.Objective(model, data=case.batches, **arguments).loss()


# ---------------------------------------------------------------------------------- the ends


@pytest.mark.parametrize("path", ["linear", "curvilinear"])
@pytest.mark.parametrize("name", [*ENDPOINT_CASES, "mapping_batches"])
def test_ends_have_exactly_the_models_own_losses(name, path):
    case = build(name)
    start, end = ends(case)
    curve = fm.interpolate(case.objective(), start, end, alphas=[0, 1], path=path)
    assert curve.loss == (own_loss(case, start), own_loss(case, end))
    assert curve.alphas == (0.0, 1.0)
    assert curve.path == path
    assert own_loss(case, start) != own_loss(case, end)


@pytest.mark.parametrize("name", ["mlp_batch_norm_dropout", "conv_batch_norm"])
def test_ends_have_exactly_the_models_own_metrics(name):
    case = build(name)
    start, end = ends(case)
    curve = fm.interpolate(
        case.objective(), start, end, alphas=[0, 1], metrics={"accuracy": fm.accuracy}
    )
    x = torch.cat([b[0] for b in case.batches])
    y = torch.cat([b[1] for b in case.batches])
    expected = [float((m.eval()(x).argmax(dim=1) == y).double().mean()) for m in (start, end)]
    assert curve.metrics["accuracy"] == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("name", ENDPOINT_CASES)
def test_same_end_twice_is_the_same_value_everywhere(name):
    case = build(name)
    alphas = [-1, 0, 0.25, 0.5, 1, 2]
    curve = fm.interpolate(case.objective(), case.model, case.model, alphas=alphas, buffers="keep")
    assert curve.loss == pytest.approx([own_loss(case, case.model)] * 6, rel=1e-12)


@pytest.mark.parametrize("name", ENDPOINT_CASES)
def test_modules_and_state_dicts_are_the_same(name):
    case = build(name)
    start, end = ends(case)
    objective = case.objective()
    alphas = [-0.5, 0, 0.3, 1, 1.5]
    modules = fm.interpolate(objective, start, end, alphas=alphas)
    states = fm.interpolate(objective, start.state_dict(), end.state_dict(), alphas=alphas)
    mixed = fm.interpolate(objective, start, end.state_dict(), alphas=alphas)
    assert modules == states == mixed


@pytest.mark.parametrize("name", ["linear_regression", "tied_weights", "class_weighted"])
def test_modules_and_vectors_are_the_same_without_buffers(name):
    case = build(name)
    start, end = ends(case)
    objective = case.objective()
    vectors = [case.objective().layout.flatten(list(m.parameters())) for m in (start, end)]
    alphas = [-0.5, 0, 0.3, 1, 1.5]
    modules = fm.interpolate(objective, start, end, alphas=alphas)
    assert modules == fm.interpolate(objective, *vectors, alphas=alphas)


def test_vector_of_torchs_own_helper_serves():
    case = build("linear_regression")
    start, end = ends(case)
    vectors = [parameters_to_vector(m.parameters()) for m in (start, end)]
    objective = case.objective()
    assert fm.interpolate(objective, *vectors) == fm.interpolate(objective, start, end)


def test_vector_ends_have_the_buffers_of_the_objectives_model():
    case = build("mlp_batch_norm_dropout")
    start, end = ends(case)
    vectors = [case.objective().layout.flatten(list(m.parameters())) for m in (start, end)]
    for model in (start, end):
        for own, buffer in zip(case.model.buffers(), model.buffers(), strict=True):
            buffer.copy_(own)
    curve = fm.interpolate(case.objective(), *vectors, alphas=[0, 1])
    assert curve.loss == (own_loss(case, start), own_loss(case, end))


@pytest.mark.parametrize("name", ["partly_frozen", "selected_by_pattern"])
def test_vector_ends_of_a_subset_leave_the_other_parameters_alone(name):
    case = build(name)
    objective = case.objective()
    point = objective.point()
    start, end = point, point + 1.0
    curve = fm.interpolate(objective, start, end, alphas=[0, 0.5, 1])
    shifts = [torch.full_like(point, a) for a in (0, 0.5, 1)]
    assert curve.loss == pytest.approx([objective.loss_at(s) for s in shifts], rel=1e-14)


# ------------------------------------------------------------------------------ closed forms


def quadratic_ends():
    generator = torch.Generator().manual_seed(3)
    matrix = matrix_with_spectrum([4.0, 2.0, 1.0, -0.5, 0.0], 3, torch.float64)
    linear, one, two = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    objective = quadratic_case(matrix, linear, one).objective()

    def value(theta: torch.Tensor) -> float:
        return float(0.5 * theta @ matrix @ theta + linear @ theta)

    return objective, one, two, value


@pytest.mark.parametrize("alphas", [None, [-10.0, 7.5], [0.5]])
def test_quadratic_is_followed_exactly_also_outside_the_ends(alphas):
    objective, one, two, value = quadratic_ends()
    curve = fm.interpolate(objective, one, two, alphas=alphas)
    expected = [value((1 - a) * one + a * two) for a in curve.alphas]
    assert curve.loss == pytest.approx(expected, rel=1e-13, abs=1e-13)


def test_curvilinear_path_is_sine_and_cosine():
    objective, one, two, value = quadratic_ends()
    curve = fm.interpolate(objective, one, two, path="curvilinear", buffers="keep")
    expected = [
        value(math.cos(a * math.pi / 2) * one + math.sin(a * math.pi / 2) * two)
        for a in curve.alphas
    ]
    assert curve.loss == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert curve.path == "curvilinear"


def test_curvilinear_midpoint_is_the_sum_over_root_two():
    objective, one, two, value = quadratic_ends()
    curve = fm.interpolate(objective, one, two, alphas=[0.5], path="curvilinear", buffers="keep")
    assert curve.loss[0] == pytest.approx(value((one + two) / math.sqrt(2)), rel=1e-13)


def test_curvilinear_turning_points_are_the_ends_with_their_signs():
    objective, one, two, value = quadratic_ends()
    curve = fm.interpolate(
        objective, one, two, alphas=[-1, 0, 1, 2], path="curvilinear", buffers="keep"
    )
    expected = [value(t) for t in (-two, one, two, -one)]
    assert curve.loss == pytest.approx(expected, rel=1e-14)


def test_default_points_are_those_of_the_paper():
    objective, one, two, _ = quadratic_ends()
    alphas = fm.interpolate(objective, one, two).alphas
    assert len(alphas) == 25
    assert (alphas[0], alphas[8], alphas[16], alphas[-1]) == (-1.0, 0.0, 1.0, 2.0)
    assert alphas == pytest.approx(torch.linspace(-1, 2, 25, dtype=torch.float64).tolist())


def test_points_may_be_a_tensor_and_keep_their_order():
    objective, one, two, value = quadratic_ends()
    curve = fm.interpolate(objective, one, two, alphas=torch.tensor([1.0, 0.0, 0.5]))
    assert curve.alphas == (1.0, 0.0, 0.5)
    assert curve.loss == pytest.approx([value(two), value(one), value((one + two) / 2)])


# ------------------------------------------------------------------------- metrics, more data


def test_metrics_and_other_data_are_evaluated_at_the_same_points():
    case = build("conv_batch_norm")
    start, end = ends(case)
    test_batches = [(x + 0.1, y) for x, y in case.batches[:1]]
    test = fm.Objective(copy.deepcopy(case.model), case.loss_fn, test_batches)
    metrics = {"accuracy": fm.accuracy, "largest": lambda out, y: out.max()}
    curve = fm.interpolate(
        case.objective(), start, end, alphas=[0, 0.5, 1], metrics=metrics, also={"test": test}
    )
    assert list(curve.curves) == ["train", "test"]
    assert curve.loss == curve.curves["train"].loss
    assert curve.metrics == curve.curves["train"].metrics
    assert curve.evaluations == 6
    inputs, labels = test_batches[0]
    for model, index in ((start, 0), (end, 2)):
        output = model.eval()(inputs).detach()
        found = curve.curves["test"]
        loss = nn.functional.cross_entropy(output, labels)
        assert found.loss[index] == pytest.approx(float(loss), rel=1e-13)
        assert found.metrics["largest"][index] == pytest.approx(float(output.max()), rel=1e-13)
        right = float((output.argmax(dim=1) == labels).double().mean())
        assert found.metrics["accuracy"][index] == pytest.approx(right)


def test_train_is_no_name_for_other_data():
    objective, one, two, _ = quadratic_ends()
    with pytest.raises(fm.InvalidArgumentError, match='"train"'):
        fm.interpolate(objective, one, two, also={"train": objective})


# ----------------------------------------------------------------------------------- buffers


class Shifted(nn.Module):
    """θ times the input plus floating-point buffers, one of them not saved; others not mixed."""

    def __init__(self, theta: float, shift: float, count: int, hidden: float = 0.0) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([theta], dtype=torch.float64))
        self.register_buffer("shift", torch.tensor(shift, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(count))
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("hidden", torch.tensor(hidden).double(), persistent=False)

    def forward(self, x):
        return self.theta * x + self.shift + self.hidden


def first_output(model: Shifted) -> fm.Objective:
    data = [(torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1))]
    return fm.Objective(model, lambda output, target: output.mean(), data)


def test_floating_point_buffers_are_interpolated_like_parameters():
    curve = fm.interpolate(
        first_output(Shifted(0, 100.0, 0)),
        Shifted(1.0, 2.0, 3),
        Shifted(5.0, 8.0, 9),
        alphas=[-1, 0, 0.5, 1, 2],
    )
    assert curve.loss == (-7.0, 3.0, 8.0, 13.0, 23.0)
    assert curve.buffers == "interpolate"


def test_kept_buffers_are_those_of_the_objectives_model():
    curve = fm.interpolate(
        first_output(Shifted(0, 100.0, 0)),
        Shifted(1.0, 2.0, 3),
        Shifted(5.0, 8.0, 9),
        alphas=[0, 0.5, 1],
        buffers="keep",
    )
    assert curve.loss == (101.0, 103.0, 105.0)
    assert curve.buffers == "keep"


def test_buffers_that_are_not_saved_come_from_a_module_but_not_from_a_state_dict():
    objective = first_output(Shifted(0, 0, 0, hidden=1000.0))
    start, end = Shifted(1.0, 0, 0, hidden=10.0), Shifted(1.0, 0, 0, hidden=20.0)
    assert fm.interpolate(objective, start, end, alphas=[0, 1]).loss == (11.0, 21.0)
    states = start.state_dict(), end.state_dict()
    assert fm.interpolate(objective, *states, alphas=[0, 1]).loss == (1001.0, 1001.0)


def test_integer_and_boolean_buffers_are_not_mixed():
    seen = []

    class Watching(Shifted):
        def forward(self, x):
            seen.append((self.count.dtype, int(self.count), bool(self.flag)))
            return super().forward(x)

    fm.interpolate(
        first_output(Watching(0, 0, 0)), Shifted(0, 0, 3), Shifted(0, 0, 9), alphas=[0, 0.5]
    )
    assert set(seen) == {(torch.int64, 3, True)}


def batch_norm_ends():
    case = build("mlp_batch_norm_dropout")
    start, end = copy.deepcopy(case.model), copy.deepcopy(case.model)
    start[1].running_var.fill_(4.0)
    end[1].running_var.fill_(1.0)
    return case, start, end


def test_extrapolated_running_variances_stay_positive_and_a_note_says_how():
    case, start, end = batch_norm_ends()
    seen = []
    hook = case.model[1].register_forward_pre_hook(
        lambda module, inputs: seen.append(float(module.running_var.min()))
    )
    curve = fm.interpolate(case.objective(), start, end, alphas=[-1, 0, 0.5, 1, 2])
    hook.remove()
    # |1 − α| · 4 + |α| · 1, three batches each; without the absolute value the last is −2.
    assert seen == [v for v in (9.0, 4.0, 2.5, 1.0, 6.0) for _ in range(3)]
    assert all(map(math.isfinite, curve.loss))
    assert len(curve.notes) == 1
    assert "running variances" in curve.notes[0]
    assert curve.notes[0] in repr(curve)


def test_nothing_is_noted_between_the_ends_or_with_kept_buffers():
    case, start, end = batch_norm_ends()
    inside = fm.interpolate(case.objective(), start, end, alphas=[0, 0.5, 1])
    kept = fm.interpolate(case.objective(), start, end, alphas=[-1, 2], buffers="keep")
    assert inside.notes == kept.notes == ()


def test_batch_norm_is_evaluated_with_the_mixed_statistics():
    case, start, end = batch_norm_ends()
    curve = fm.interpolate(case.objective(), start, end, alphas=[0.25])
    mixed = copy.deepcopy(case.model)
    mixed[1].running_var.fill_(0.75 * 4 + 0.25 * 1)
    assert curve.loss[0] == pytest.approx(own_loss(case, mixed), rel=1e-14)


def test_tied_weights_move_together():
    case = build("tied_weights")
    start, end = ends(case)
    middle = copy.deepcopy(case.model)
    with torch.no_grad():
        for mid, one, two in zip(
            middle.parameters(), start.parameters(), end.parameters(), strict=True
        ):
            mid.copy_((one + two) / 2)
    curve = fm.interpolate(case.objective(), start, end, alphas=[0.5])
    assert curve.loss[0] == pytest.approx(own_loss(case, middle), rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters_are_mixed_in_float32(dtype):
    seen = []
    model = nn.Linear(50, 1, bias=False).to(dtype)
    objective = fm.Objective(
        model,
        data=[torch.zeros(1)],
        batch_loss=lambda m, b: seen.append(m.weight.detach().clone()) or m.weight.float().sum(),
    )
    one, two = copy.deepcopy(model), copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for end in (one, two):
            end.weight.copy_(torch.randn(1, 50, generator=generator))
    seen.clear()
    fm.interpolate(objective, one, two, alphas=[0, 0.3, 1])
    middle = 0.7 * one.weight.float() + 0.3 * two.weight.float()
    for found, expected in zip(seen, (one.weight, middle.to(dtype), two.weight), strict=True):
        assert found.dtype == dtype
        assert torch.equal(found, expected)


# ------------------------------------------------------------------ values that are not finite


def test_infinite_and_nan_values_are_kept_and_told():
    model = nn.Linear(1, 1, bias=False).double()
    objective = fm.Objective(model, data=[torch.zeros(1)], batch_loss=lambda m, b: m.weight.log())
    start, end = (torch.tensor([v], dtype=torch.float64) for v in (0.0, 1.0))
    curve = fm.interpolate(objective, start, end, alphas=[-1, 0, 1])
    assert math.isnan(curve.loss[0])
    assert curve.loss[1:] == (-math.inf, 0.0)
    assert curve.outcome is fm.Outcome.NON_FINITE_POINTS


def test_finite_curves_are_completed():
    objective, one, two, _ = quadratic_ends()
    assert fm.interpolate(objective, one, two).outcome is fm.Outcome.COMPLETED


# ------------------------------------------------------------------- repetition, side effects


@pytest.mark.parametrize("mode", ["eval", "train", "keep"])
def test_models_data_and_random_states_are_untouched(mode):
    case = build("mlp_batch_norm_dropout", torch.float32)
    case.model.train()
    start, end = ends(case)
    objective = case.objective(mode=mode)
    with untouched(case.model, start, end, case.batches):
        first = fm.interpolate(objective, start, end, alphas=[-1, 0.5, 2])
        again = fm.interpolate(objective, start, end, alphas=[-1, 0.5, 2])
    assert first == again


def test_models_are_untouched_when_a_metric_raises():
    case = build("mlp_batch_norm_dropout", torch.float32)
    start, end = ends(case)

    def failing(output, target):
        raise RuntimeError("in the middle")

    with untouched(case.model, start, end), pytest.raises(RuntimeError, match="in the middle"):
        fm.interpolate(case.objective(), start, end, metrics={"bad": failing})


# ----------------------------------------------------------------------------------- bad input


def test_missing_and_superfluous_keys_are_named():
    case = build("class_weighted")
    state = case.model.state_dict()
    state["0.wieght"] = state.pop("0.weight")
    with pytest.raises(fm.StateMismatchError) as caught:
        fm.interpolate(case.objective(), case.model, state)
    message = str(caught.value)
    assert "'end' argument" in message
    assert "lacks '0.weight'" in message
    assert "has besides '0.wieght'" in message


def test_shapes_that_differ_are_named():
    case = build("class_weighted")
    other = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with pytest.raises(fm.StateMismatchError, match=r"'0.weight' \(5, 3\) instead of \(4, 3\)"):
        fm.interpolate(case.objective(), other, case.model)


def test_many_differences_are_cut_short():
    case = build("class_weighted")
    deep = nn.Sequential(*[nn.Linear(3, 3) for _ in range(9)]).double()
    with pytest.raises(fm.StateMismatchError, match=r"and \d+ more"):
        fm.interpolate(case.objective(), deep, case.model)


def test_other_data_with_another_architecture_is_named():
    case, other = build("class_weighted"), build("softmax_regression")
    with pytest.raises(fm.StateMismatchError, match=r"also\['test'\]"):
        fm.interpolate(case.objective(), case.model, case.model, also={"test": other.objective()})


def test_vector_of_the_wrong_length_is_refused():
    objective, one, _, _ = quadratic_ends()
    with pytest.raises(fm.ShapeError, match=r"\(5,\); got \(6,\)"):
        fm.interpolate(objective, one, torch.zeros(6, dtype=torch.float64))


def test_vector_with_nan_is_refused():
    objective, one, _, _ = quadratic_ends()
    with pytest.raises(fm.NonFiniteError, match="index 0"):
        fm.interpolate(objective, one * math.nan, one)


@pytest.mark.parametrize("end", [None, 3, [1.0], "model.pt"])
def test_end_of_another_type_is_refused(end):
    objective, one, _, _ = quadratic_ends()
    with pytest.raises(fm.ArgumentTypeError, match="'end' argument of interpolate"):
        fm.interpolate(objective, one, end)


@pytest.mark.parametrize("alphas", [[], [0.0, math.nan], [math.inf]])
def test_points_that_are_missing_or_not_finite_are_refused(alphas):
    objective, one, two, _ = quadratic_ends()
    with pytest.raises(fm.InvalidArgumentError, match="'alphas' argument of interpolate"):
        fm.interpolate(objective, one, two, alphas=alphas)


@pytest.mark.parametrize("alphas", [5, ["a"], [None], [[0.0, 1.0]]])
def test_points_of_another_type_are_refused(alphas):
    objective, one, two, _ = quadratic_ends()
    with pytest.raises(fm.ArgumentTypeError, match="'alphas' argument of interpolate"):
        fm.interpolate(objective, one, two, alphas=alphas)


@pytest.mark.parametrize(
    ("argument", "value", "near"),
    [("path", "curved", "curvilinear"), ("buffers", "kept", "keep")],
)
def test_unknown_choices_are_refused_with_the_nearest(argument, value, near):
    objective, one, two, _ = quadratic_ends()
    with pytest.raises(fm.InvalidArgumentError, match=f"'{argument}'.*Did you mean '{near}'"):
        fm.interpolate(objective, one, two, **{argument: value})


def test_metric_that_cannot_be_called_is_refused():
    objective, one, two, _ = quadratic_ends()
    with pytest.raises(fm.ArgumentTypeError, match="metric 'accuracy' must be callable"):
        fm.interpolate(objective, one, two, metrics={"accuracy": 0.9})


def test_metrics_without_an_output_to_judge_are_refused():
    objective, one, two, _ = quadratic_ends()
    with pytest.raises(fm.InvalidArgumentError, match="batch_loss="):
        fm.interpolate(objective, one, two, metrics={"accuracy": fm.accuracy})


def test_model_in_place_of_an_objective_is_refused_with_advice():
    model = nn.Linear(2, 1)
    with pytest.raises(fm.ArgumentTypeError, match=r"fm\.Objective\(model, loss_fn, data\)"):
        fm.interpolate(model, model, model)
