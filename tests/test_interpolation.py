"""Losses along a path between two models, against the models themselves and closed forms."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

import flatminima as fm
from flatminima.landscape.buffers import recomputed_buffers
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
    assert "also has '0.wieght'" in message


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


# ------------------------------------------------------------------------------------- barriers


def curve_of(losses, alphas, metrics=None) -> fm.Interpolation:
    return fm.Interpolation(
        alphas=tuple(map(float, alphas)),
        curves={"train": fm.Curve(tuple(map(float, losses)), metrics or {})},
        path="linear",
        buffers="interpolate",
        evaluations=len(losses),
        outcome=fm.Outcome.COMPLETED,
    )


def test_barrier_of_a_parabola_is_an_eighth_of_its_curvature_in_the_middle():
    objective, one, two, value = quadratic_ends()
    # L on the line has the second derivative dᵀAd, which bends it below the chord; turned over,
    # above it.
    turned = fm.Objective(
        objective.model,
        data=[torch.zeros(1, dtype=torch.float64)],
        batch_loss=lambda model, batch: -objective.criterion(model, batch),
    )
    found = fm.interpolate(turned, one, two, alphas=torch.linspace(-1, 2, 13)).barrier()
    second = 4 * (value(one) + value(two) - 2 * value((one + two) / 2))
    assert second > 0
    assert found.height == pytest.approx(second / 8, rel=1e-12)
    assert found.alpha == 0.5
    assert (found.quantity, found.curve) == ("loss", "train")


@pytest.mark.parametrize("slope", [-3.0, 0.0, 0.1])
def test_barrier_is_the_height_above_the_chord_wherever_that_is(slope):
    alphas = [i / 20 for i in range(-20, 41)]
    # Beside the chord, α (1 − α)² has its maximum 4/27 at 1/3; outside [0, 1] it is larger.
    losses = [7 + slope * a + a * (1 - a) ** 2 for a in alphas]
    found = curve_of(losses, alphas).barrier()
    best = max(a * (1 - a) ** 2 for a in alphas if 0 <= a <= 1)
    assert found.height == pytest.approx(best, rel=1e-12)
    assert found.alpha == 0.35
    assert best == pytest.approx(4 / 27, rel=0.01)


def test_path_below_its_chord_has_no_barrier():
    found = curve_of([1.0, 0.2, 3.0], [0, 0.5, 1]).barrier()
    assert (found.height, found.alpha) == (0.0, 0.0)
    assert curve_of([0.1] * 5, [0, 0.1, 0.3, 0.7, 1]).barrier().height == 0.0
    assert curve_of([0.3, 0.1], [1, 0]).barrier().height == 0.0


def test_barrier_of_a_metric_is_its_fall_below_the_chord():
    curve = curve_of([1, 1, 1, 1], [1, 0.75, 0, 0.5], {"accuracy": (0.9, 0.2, 0.7, 0.6)})
    found = curve.barrier(metric="accuracy")
    assert found.height == pytest.approx(0.85 - 0.2)
    assert (found.alpha, found.quantity) == (0.75, "accuracy")


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_values_that_are_not_finite_are_an_infinite_barrier(bad, place):
    losses = [1.0, 9.0, 2.0, 1.0]
    losses[place] = bad
    found = curve_of(losses, [0, 0.25, 0.5, 1]).barrier()
    assert (found.height, found.alpha) == (math.inf, [0, 0.25, 0.5, 1][place])


def test_values_outside_of_the_ends_are_no_barrier():
    found = curve_of([math.inf, 1.0, 1.5, 1.0, math.nan], [-0.1, 0, 0.5, 1, 1.1]).barrier()
    assert (found.height, found.alpha) == (0.5, 0.5)


def test_barrier_is_read_off_any_curve_and_said_in_the_table():
    case = build("conv_batch_norm")
    start, end = ends(case)
    test = fm.Objective(copy.deepcopy(case.model), case.loss_fn, case.batches[:1])
    curve = fm.interpolate(
        case.objective(),
        *(start, end),
        alphas=[0, 0.5, 1],
        metrics={"accuracy": fm.accuracy},
        also={"test": test},
    )
    losses = curve.curves["test"].loss
    expected = max(0.0, losses[1] - (losses[0] + losses[2]) / 2)
    assert curve.barrier("test").height == pytest.approx(expected, rel=1e-9)
    assert "Barrier above the chord from α = 0 to 1" in repr(curve)
    for name in ("train loss", "train accuracy", "test loss", "test accuracy"):
        assert f"{name} " in repr(curve).split("Barrier above")[1]
    assert "Barrier" not in repr(curve_of([1, 1], [0, 1]))
    assert "Barrier" not in repr(curve_of([1, 1], [0, 0.5]))


def test_barrier_goes_to_json_and_prints_itself():
    found = curve_of([1.0, 3.0, 1.0], [0, 0.5, 1]).barrier()
    assert type(found).from_json(found.to_json()) == found
    assert "train loss" in repr(found)


@pytest.mark.parametrize("alphas", [[0, 0.5], [0.5, 1], [-1, 2]])
def test_barrier_without_both_ends_is_refused(alphas):
    with pytest.raises(fm.InvalidArgumentError, match="needs the values at α = 0 and α = 1"):
        curve_of([1, 1], alphas).barrier()


def test_barrier_of_what_is_not_there_is_refused():
    plain = curve_of([1, 1], [0, 1])
    judged = curve_of([1, 1], [0, 1], {"accuracy": (0.5, 0.5)})
    with pytest.raises(fm.InvalidArgumentError, match="'curve' argument"):
        plain.barrier("test")
    with pytest.raises(fm.InvalidArgumentError, match="has no metrics"):
        plain.barrier(metric="accuracy")
    with pytest.raises(fm.InvalidArgumentError, match="Did you mean 'accuracy'"):
        judged.barrier(metric="acuracy")


# ----------------------------------------------------------------------------- recomputed buffers


def updated(model: nn.Module, batches) -> nn.Module:
    """A copy after `update_bn` of torch, with dropout left out."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.optim.swa_utils.update_bn([x for x, _ in batches], other)
    return other


def equal_batches(case, count: int = 4, size: int = 6):
    generator = torch.Generator().manual_seed(5)
    x = torch.cat([b[0] for b in case.batches])
    y = torch.cat([b[1] for b in case.batches])
    picks = torch.randint(len(x), (count, size), generator=generator)
    noise = torch.rand(count, size, *x.shape[1:], generator=generator, dtype=x.dtype)
    return [(x[p] + n, y[p]) for p, n in zip(picks, noise, strict=True)]


def deep_norms(dtype=torch.float64) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    model = nn.Sequential(
        *(nn.BatchNorm1d(3), nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False, momentum=0.01), nn.Linear(4, 2)),
    )
    for p in model.parameters():
        p.data.normal_(generator=generator)
    return model.to(dtype)


@pytest.mark.parametrize("mode", ["eval", "keep"])
@pytest.mark.parametrize("name", ["mlp_batch_norm_dropout", "conv_batch_norm"])
def test_recomputed_statistics_are_those_of_update_bn(name, mode):
    case = build(name)
    batches = equal_batches(case)
    other = jittered(case.model, 3)
    objective = fm.Objective(case.model.eval(), case.loss_fn, batches, mode=mode)
    found = recomputed_buffers(objective, dict(other.state_dict()))
    expected = dict(updated(other, batches).named_buffers())
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert value.dtype == expected[key].dtype
        assert torch.allclose(value, expected[key], rtol=1e-12, atol=1e-14), key


def test_statistics_of_deeper_layers_are_those_behind_normalised_batches():
    model = deep_norms(torch.float32)
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(8, 3, generator=generator), torch.zeros(8, 2)) for _ in range(5)]
    found = recomputed_buffers(fm.Objective(model, nn.MSELoss(), batches), {})
    for key, expected in updated(model, batches).named_buffers():
        assert torch.allclose(found[key].double(), expected.double(), rtol=1e-5, atol=1e-6), key


def test_batches_of_several_sizes_are_weighted_by_examples():
    x = torch.tensor([[1.0], [5.0], [2.0], [4.0], [9.0]], dtype=torch.float64)
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1)).double()
    batches = [(x[:2], x[:2]), (x[2:], x[2:])]
    found = recomputed_buffers(fm.Objective(model, nn.MSELoss(), batches), {})
    assert float(found["0.running_mean"]) == pytest.approx(float(x.mean()), rel=1e-14)
    variance = (2 * float(x[:2].var()) + 3 * float(x[2:].var())) / 5
    assert float(found["0.running_var"]) == pytest.approx(variance, rel=1e-14)
    assert int(found["0.num_batches_tracked"]) == 2


def test_statistics_are_recomputed_under_a_batch_loss_and_without_momentum():
    model = deep_norms()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    batches = [{"x": part} for part in x.split(4)]
    objective = fm.Objective(
        model, data=batches, batch_loss=lambda m, batch: m(batch["x"]).square().mean()
    )
    found = recomputed_buffers(objective, {})
    expected = dict(updated(model, [(b["x"], None) for b in batches]).named_buffers())
    assert all(torch.allclose(found[n], expected[n], rtol=1e-12) for n in expected)


def test_layers_that_are_never_called_and_shared_ones():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle, self.out = nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.Linear(2, 1)

        def forward(self, x):
            return self.out(self.used(self.used(x) * 3))

    model = Net().double()
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batches = [(x, torch.zeros(6, 1, dtype=torch.float64))]
    found = recomputed_buffers(fm.Objective(model, nn.MSELoss(), batches), {})
    expected = dict(updated(model, batches).named_buffers())
    assert {n.split(".")[0] for n in found} == {"used"}
    assert all(torch.allclose(t, expected[n]) for n, t in found.items())


def test_without_batch_norm_nothing_is_recomputed():
    case = build("class_weighted")
    start, end = ends(case)
    objective = case.objective()
    assert recomputed_buffers(objective, {}) == {}
    anew = fm.interpolate(objective, start, end, alphas=[0, 0.5, 1], buffers="recompute")
    plain = fm.interpolate(objective, start, end, alphas=[0, 0.5, 1])
    assert (anew.loss, anew.evaluations, anew.notes) == (plain.loss, 3, ())


def test_losses_with_recomputed_statistics_are_those_of_updated_models():
    case = build("conv_batch_norm")
    start, end = ends(case)
    batches = equal_batches(case)
    objective = fm.Objective(case.model, case.loss_fn, batches)
    test = fm.Objective(copy.deepcopy(case.model), case.loss_fn, case.batches)
    curve = fm.interpolate(
        *(objective, start, end),
        alphas=[-1, 0, 0.5, 2],
        buffers="recompute",
        also={"test": test},
        metrics={"accuracy": fm.accuracy},
    )
    for place, alpha in enumerate(curve.alphas):
        model = copy.deepcopy(case.model)
        with torch.no_grad():
            triples = zip(model.parameters(), start.parameters(), end.parameters(), strict=True)
            for own, one, two in triples:
                own.copy_((1 - alpha) * one + alpha * two)
        model = updated(model, batches)
        for name, data in (("train", batches), ("test", case.batches)):
            expected = fm.Objective(model, case.loss_fn, data).loss()
            assert curve.curves[name].loss[place] == pytest.approx(expected, rel=1e-10)
    assert curve.buffers == "recompute"
    assert curve.evaluations == 12
    assert len(curve.notes) == 1
    assert "recomputed" in curve.notes[0]


def test_recomputing_gives_the_same_where_data_are_read_anew():
    case = build("conv_batch_norm")
    start, end = ends(case)
    lines = [
        fm.interpolate(
            fm.Objective(case.model, case.loss_fn, case.batches, cache=cache),
            *(start, end),
            alphas=[0, 0.5, 1],
            buffers="recompute",
        )
        for cache in (True, False)
    ]
    assert lines[0].loss == lines[1].loss
    assert lines[1].readings > 0


@pytest.mark.parametrize("mode", ["eval", "train", "keep"])
def test_recomputing_leaves_everything_untouched(mode):
    case = build("mlp_batch_norm_dropout", torch.float32)
    case.model.train()
    start, end = ends(case)
    objective = case.objective(mode=mode)
    with untouched(case.model, start, end, case.batches):
        first = fm.interpolate(objective, start, end, alphas=[-1, 0.5], buffers="recompute")
        assert first == fm.interpolate(objective, start, end, alphas=[-1, 0.5], buffers="recompute")


def test_everything_is_untouched_when_recomputing_fails():
    case = build("mlp_batch_norm_dropout", torch.float32)
    x, y = case.batches[0]
    objective = fm.Objective(case.model, case.loss_fn, [(x, y), (x[:1], y[:1])])
    with (
        untouched(case.model, case.batches),
        pytest.raises(fm.InvalidArgumentError, match=r"Batch 1 .* one value for each channel"),
    ):
        fm.interpolate(objective, case.model, case.model, buffers="recompute")


def test_recomputing_with_tensors_of_another_model_is_refused():
    case = build("conv_batch_norm")
    with pytest.raises(fm.StateMismatchError, match="also has 'nonsense'"):
        recomputed_buffers(case.objective(), {"nonsense": torch.zeros(1)})
