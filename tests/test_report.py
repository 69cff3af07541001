"""The one-call face: the same numbers as the parts, side by side, and nothing left behind."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import re
import statistics

import pytest
import torch
from torch import nn

import flatminima as fm
from flatminima.report.sharpness import DEFAULT
from integrity import untouched
from zoo import build


@pytest.fixture(scope="module")
def case():
    return build("mlp_batch_norm_dropout")


@pytest.fixture(scope="module")
def report(case) -> fm.SharpnessReport:
    return fm.sharpness(case.model, case.loss_fn, case.batches, seed=3, trace_products=10)


@pytest.fixture(scope="module")
def objective(case) -> fm.Objective:
    return case.objective()


# --------------------------------------------------------------- the numbers are those of the parts


def test_report_describes_what_was_measured(report, objective):
    assert report.model == "Sequential"
    assert (report.parameters, report.examples, report.mode) == (objective.size, 29, "eval")
    assert report.loss == objective.loss()


def test_gradient_norm_is_that_of_the_objective(report, objective):
    assert report.gradient_norm == float(objective.gradient().norm())


@pytest.mark.parametrize(
    ("index", "epsilon", "whole"),
    [(0, 1e-3, True), (1, 5e-4, True), (2, 1e-3, False), (3, 5e-4, False)],
)
def test_epsilon_sharpness_is_that_of_the_function(index, epsilon, whole, report, objective):
    subspace = None if whole else min(100, objective.size)
    alone = fm.epsilon_sharpness(objective, epsilon=epsilon, subspace=subspace, seed=3)
    assert len(report.epsilon_sharpness) == 4
    assert report.epsilon_sharpness[index] == alone


def test_random_sharpness_is_that_of_the_function(report, objective):
    assert report.random_sharpness == fm.random_sharpness(objective, seed=3)


def test_eigenvalues_are_those_of_lanczos(report, objective):
    operator = fm.HessianOperator(objective)
    found = fm.lanczos(operator, k=(3, 1), which="BE", tol=1e-4, basis_size=30, seed=3)
    assert report.largest == found.without_vectors().part("LA", 3)
    assert report.smallest == found.without_vectors().part("SA", 1)
    exact = torch.linalg.eigvalsh(operator @ torch.eye(objective.size, dtype=torch.float64))
    torch.testing.assert_close(
        report.largest.eigenvalues, exact.flip(0)[:3], rtol=0, atol=2e-4 * float(exact[-1])
    )
    assert report.smallest.which == "SA"
    assert report.smallest.eigenvectors is None
    smallest = float(report.smallest.eigenvalues[0])
    assert smallest == pytest.approx(float(exact[0]), abs=2e-4 * float(exact[-1]))


def test_trace_is_that_of_the_function(report, objective):
    assert report.trace == fm.trace(fm.HessianOperator(objective), products=10, seed=3)


def test_gauss_newton_is_that_of_its_operator(report, objective):
    operator = fm.GaussNewtonOperator(objective)
    largest = fm.lanczos(operator, tol=1e-4, seed=3)
    assert report.gauss_newton_largest == largest.without_vectors()
    assert report.gauss_newton_trace == fm.trace(operator, products=10, seed=3)
    exact = torch.linalg.eigvalsh(operator.to_dense())
    assert float(largest.eigenvalues[0]) == pytest.approx(float(exact[-1]), rel=2e-4)
    missed = abs(report.gauss_newton_trace.value - float(exact.sum()))
    assert missed <= 4 * report.gauss_newton_trace.standard_error


def test_density_has_the_eigenvalues_of_the_report_taken_out(case, report, objective):
    found = fm.sharpness(case.model, case.loss_fn, case.batches, measures=["density"], seed=3)
    # They come with it, so that a subset of the measures gives the same numbers.
    assert (found.largest, found.smallest) == (report.largest, report.smallest)
    operator = fm.HessianOperator(objective)
    pairs = fm.lanczos(operator, k=(3, 1), which="BE", tol=1e-4, basis_size=30, seed=3)
    assert found.density == fm.spectral_density(operator, outliers=pairs, seed=3)
    kept = torch.cat([report.largest.eigenvalues, report.smallest.eigenvalues])
    torch.testing.assert_close(found.density.eigenvalues, kept, rtol=1e-6, atol=1e-8)
    own = found.density.probes * found.density.steps
    assert own < found.density.products <= own + 4
    exact = torch.linalg.eigvalsh(operator.to_dense())
    rank = float((exact / exact.abs().max()).square().sum())
    estimate = found.density.stable_rank()
    assert abs(estimate.value - rank) <= 4 * estimate.standard_error


def test_traces_of_modules_come_with_both_traces(report):
    for found in (report.trace, report.gauss_newton_trace):
        assert [block.name for block in found.modules] == ["0", "1", "4"]
        total = sum(block.value for block in found.modules)
        assert total == pytest.approx(found.value, rel=1e-9)


def test_subspace_is_a_hundred_where_there_is_room():
    model = nn.Linear(30, 4)
    data = torch.linspace(-1, 1, 240).reshape(8, 30).sin(), torch.ones(8, 4)
    report = fm.sharpness(model, nn.MSELoss(), data, measures="epsilon_sharpness")
    assert [r.subspace for r in report.epsilon_sharpness] == [None, None, 100, 100]


def test_generator_as_seed_gives_every_measure_the_same_start(case):
    given = [
        fm.sharpness(
            case.model,
            case.loss_fn,
            case.batches,
            measures=measures,
            trace_products=3,
            seed=torch.Generator().manual_seed(1),
        )
        for measures in (["trace", "random_sharpness"], ["trace"])
    ]
    assert given[0].trace == given[1].trace


# --------------------------------------------------------------------------------- subsets

FIELDS = {
    "gradient_norm": ["gradient_norm"],
    "epsilon_sharpness": ["epsilon_sharpness"],
    "random_sharpness": ["random_sharpness"],
    "eigenvalues": ["largest", "smallest"],
    "trace": ["trace"],
    "gauss_newton": ["gauss_newton_largest", "gauss_newton_trace"],
}


def test_every_measure_but_the_density_is_taken_unless_told(report):
    assert set(FIELDS) == set(DEFAULT)
    assert report.density is None
    assert report.results == {
        "epsilon_sharpness": report.epsilon_sharpness,
        "random_sharpness": (report.random_sharpness,),
    }


@pytest.mark.parametrize("measure", FIELDS)
def test_a_measure_alone_gives_the_same_number(measure, case, report):
    alone = fm.sharpness(
        case.model, case.loss_fn, case.batches, measures=[measure], seed=3, trace_products=10
    )
    for name, fields in FIELDS.items():
        for field in fields:
            if name == measure:
                assert getattr(alone, field) == getattr(report, field)
            else:
                assert getattr(alone, field) in (None, ())
    assert alone.loss == report.loss


def test_measures_may_be_one_name_or_none(case):
    one = fm.sharpness(case.model, case.loss_fn, case.batches, measures="gradient_norm")
    none = fm.sharpness(case.model, case.loss_fn, case.batches, measures=[])
    assert one.gradient_norm is not None
    assert [m.name for m in none.measurements()] == ["loss L(θ)"]


def test_counts_are_passed_on(case):
    report = fm.sharpness(
        case.model,
        case.loss_fn,
        case.batches,
        measures=["eigenvalues", "trace", "random_sharpness", "gauss_newton"],
        eigenvalues=5,
        trace_products=4,
        samples=2,
    )
    assert len(report.largest.eigenvalues) == 5
    assert report.trace.products == report.gauss_newton_trace.products == 4
    assert report.random_sharpness.samples == 2


def test_tiny_models_have_as_many_eigenvalues_as_parameters():
    model = nn.Linear(1, 1)
    data = torch.ones(3, 1), torch.zeros(3, 1)
    report = fm.sharpness(model, nn.MSELoss(), data, measures=[*DEFAULT, "density"])
    assert len(report.largest.eigenvalues) == 2
    # Nothing but these is left of the density.
    assert (report.density.steps, len(report.density.eigenvalues)) == (0, 2)
    assert [r.subspace for r in report.epsilon_sharpness] == [None, None, 2, 2]


@pytest.mark.parametrize("options", [{"params": "0.*"}, {"mode": "train"}, {"batch_size": 7}])
def test_options_of_the_objective_are_passed_on(options, case):
    x, y = (torch.cat([b[i] for b in case.batches]) for i in (0, 1))
    report = fm.sharpness(case.model, case.loss_fn, (x, y), measures=["gradient_norm"], **options)
    expected = fm.Objective(case.model, case.loss_fn, (x, y), **options)
    assert report.loss == expected.loss()
    assert report.parameters == expected.size
    assert report.gradient_norm == float(expected.gradient().norm())


def test_batch_loss_takes_the_place_of_the_criterion():
    case = build("mapping_batches")
    report = fm.sharpness(
        case.model, data=case.batches, batch_loss=case.batch_loss, trace_products=3
    )
    assert report.loss == case.objective().loss()
    assert report.trace == fm.trace(fm.HessianOperator(case.objective()), products=3)


def test_batch_loss_leaves_gauss_newton_out_and_says_so():
    case = build("mapping_batches")
    call = {"data": case.batches, "batch_loss": case.batch_loss, "trace_products": 3}
    report = fm.sharpness(case.model, **call)
    assert (report.gauss_newton_largest, report.gauss_newton_trace) == (None, None)
    assert "The Gauss–Newton matrix is left out, as batch_loss=" in report.notes[-1]
    named = fm.sharpness(case.model, **call, measures=["trace"])
    assert named.notes == ()
    with pytest.raises(fm.InvalidArgumentError, match="GaussNewtonOperator looks between"):
        fm.sharpness(case.model, **call, measures=["trace", "gauss_newton"])


class Logs(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x):
        return self.net(x).log_softmax(1)


LOGS = torch.linspace(-1, 1, 18).reshape(6, 3).sin(), torch.arange(6) % 3


def test_linear_loss_is_told_in_a_note():
    report = fm.sharpness(Logs(), nn.NLLLoss(), LOGS, trace_products=4)
    assert report.gauss_newton_trace.value == 0
    assert float(report.gauss_newton_largest.eigenvalues[0]) == 0
    (note,) = report.notes
    assert note.startswith("The loss is linear in the model's outputs")
    assert report.gauss_newton_trace.notes == (note,)


def test_linear_loss_is_warned_of_where_gauss_newton_was_asked_for():
    with pytest.warns(fm.FlatMinimaWarning, match="linear in the model's outputs") as caught:
        fm.sharpness(Logs(), nn.NLLLoss(), LOGS, trace_products=4, measures="gauss_newton")
    assert len(caught) == 1


def test_loss_that_is_not_convex_is_noted():
    def wave(output, target):
        return torch.cos(output - target).mean()

    data = LOGS[0], torch.zeros(6, 3)
    report = fm.sharpness(Logs(), wave, data, trace_products=4, measures="gauss_newton")
    assert report.notes == report.gauss_newton_trace.notes
    assert "not positive semi-definite" in report.notes[0]
    assert report.gauss_newton_trace.value < 0


def test_the_operators_keep_their_graphs_one_after_the_other(case, monkeypatch):
    kept = []

    def looked_at(function):
        def call(operator, **options):
            held = [o.kept_bytes for o in made if o is not operator]
            found = function(operator, **options)
            kept.append((operator.kept_bytes > 0, sum(held)))
            return found

        return call

    made = []
    for name in ("HessianOperator", "GaussNewtonOperator"):
        kind = getattr(fm, name)
        monkeypatch.setattr(
            f"flatminima.report.sharpness.{name}",
            lambda objective, kind=kind: made.append(kind(objective)) or made[-1],
        )
    monkeypatch.setattr("flatminima.report.sharpness.trace", looked_at(fm.trace))
    fm.sharpness(case.model, case.loss_fn, case.batches, trace_products=4)
    assert kept == [(True, 0), (True, 0)]


def test_weight_of_the_user_counts(case):
    report = fm.sharpness(
        case.model,
        case.loss_fn,
        case.batches,
        weight=lambda batch: 1.0,
        measures=[],
    )
    means = [case.loss_fn(case.model(x), y).item() for x, y in case.batches]
    assert report.loss == pytest.approx(statistics.fmean(means), rel=1e-14)


# ------------------------------------------------------------------------------ what it prints


def test_every_measurement_is_a_line_of_the_table(report):
    lines = report.measurements()
    assert len(lines) == 2 + 4 + 1 + 3 + 1 + 1 + 2
    rows = report.table().rows
    assert [row[0] for row in rows] == [line.name for line in lines]
    assert len({line.name for line in lines}) == len(lines)
    assert all(line.cost for line in lines if "λ₂" not in line.name and "λ₃" not in line.name)


def test_errors_say_what_they_are(report):
    kinds = {line.name: line.error_kind for line in report.measurements()}
    assert kinds["trace of the Hessian"] == "standard error"
    assert kinds["trace of the Gauss–Newton matrix"] == "standard error"
    assert kinds["λ₁ largest eigenvalue (Gauss–Newton)"] == "residual"
    assert kinds["λ₁ largest eigenvalue"] == kinds["λₙ smallest eigenvalue"] == "residual"
    assert kinds["random-perturbation sharpness, ε = 0.001"] == "std"
    assert kinds["loss L(θ)"] == ""


def test_measurements_carry_the_numbers_of_their_results(report):
    lines = {line.name: line for line in report.measurements()}
    assert lines["loss L(θ)"].value == report.loss
    assert lines["gradient norm ‖∇L‖"].value == report.gradient_norm
    box = lines["ε-sharpness φ (%), ε = 0.0005, full space"]
    assert box.value == report.epsilon_sharpness[1].value
    assert box.cost == f"{report.epsilon_sharpness[1].evaluations} gradients"
    second = lines["λ₂ largest eigenvalue"]
    assert second.value == report.largest.eigenvalues[1]
    assert second.error == report.largest.residuals[1]
    assert lines["trace of the Hessian"].error == report.trace.standard_error
    trace = lines["trace of the Gauss–Newton matrix"]
    assert trace.value == report.gauss_newton_trace.value
    assert trace.error == report.gauss_newton_trace.standard_error
    top = lines["λ₁ largest eigenvalue (Gauss–Newton)"]
    assert top.value == report.gauss_newton_largest.eigenvalues[0]


def test_density_has_two_lines(case):
    report = fm.sharpness(case.model, case.loss_fn, case.batches, measures="density")
    lines = {line.name: line for line in report.measurements()}
    rank, negative = report.density.stable_rank(), report.density.negative_mass()
    line = lines["stable rank of the Hessian"]
    assert (line.value, line.error) == (rank.value, rank.standard_error)
    assert line.cost == f"{report.density.products} products"
    line = lines["negative mass of the Hessian"]
    assert (line.value, line.error) == (negative.value, negative.standard_error)
    assert (line.error_kind, line.cost) == ("standard error", "the same")


def test_eigenvalues_beyond_nine_have_two_small_digits(case):
    report = fm.sharpness(
        case.model, case.loss_fn, case.batches, measures="eigenvalues", eigenvalues=10
    )
    assert [m.name for m in report.measurements()][10] == "λ₁₀ largest eigenvalue"


class Noted(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 3), *layers)

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize(
    ("layers", "mode", "words"),
    [
        ([nn.BatchNorm1d(3)], "eval", ["running statistics"]),
        ([nn.Dropout(0.1)], "eval", ["dropout off"]),
        ([nn.Dropout(0.1), nn.BatchNorm1d(3)], "eval", ["dropout off", "running statistics"]),
        ([nn.Tanh()], "eval", []),
        ([nn.LayerNorm(3)], "eval", []),
        ([nn.BatchNorm1d(3)], "train", []),
    ],
)
def test_notes_tell_what_evaluation_mode_did(layers, mode, words):
    data = torch.linspace(-1, 1, 18).reshape(6, 3).sin(), torch.ones(6, 3)
    report = fm.sharpness(Noted(*layers), nn.MSELoss(), data, measures=[], mode=mode)
    assert len(report.notes) == (1 if words else 0)
    assert all(word in report.notes[0] for word in words)
    assert all(word in repr(report) for word in words)


class Sequence(nn.Module):
    """Takes what it is given through a module that works on sequences."""

    def __init__(self, body) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        x = x[:, None]
        out = self.body(x, x, x) if isinstance(self.body, nn.MultiheadAttention) else self.body(x)
        return self.head(out[0][:, 0])


def attention(**options):
    return nn.MultiheadAttention(3, 1, batch_first=True, **options)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: Sequence(nn.LSTM(3, 3, 2, batch_first=True, dropout=0.2)), ["dropout off"]),
        (lambda: Sequence(nn.GRU(3, 3, 2, batch_first=True, dropout=0.2)), ["dropout off"]),
        (lambda: Sequence(nn.LSTM(3, 3, 2, batch_first=True)), []),
        (lambda: Sequence(attention(dropout=0.2)), ["dropout off"]),
        (lambda: Sequence(attention()), []),
        (lambda: Noted(nn.AlphaDropout(0.2)), ["dropout off"]),
        (lambda: Noted(nn.Dropout(0.0)), []),
        (lambda: Noted(nn.BatchNorm1d(3, track_running_stats=False)), []),
        (lambda: Noted(nn.BatchNorm1d(3, affine=False)), ["running statistics"]),
        (
            lambda: Noted(nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.BatchNorm1d(3)))),
            ["dropout off", "running statistics"],
        ),
    ],
)
@pytest.mark.parametrize("mode", ["eval", "train", "keep"])
def test_notes_know_dropout_and_batch_norm_wherever_they_are(mode, model, words):
    torch.manual_seed(0)
    data = torch.linspace(-1, 1, 18).reshape(6, 3).sin(), torch.ones(6, 3)
    report = fm.sharpness(model(), nn.MSELoss(), data, measures=[], mode=mode)
    if mode != "eval" or not words:
        assert report.notes == ()
        return
    (note,) = report.notes
    assert note.startswith("Evaluation mode: ")
    assert [word in note for word in ("dropout off", "running statistics")] == [
        word in words for word in ("dropout off", "running statistics")
    ]


def test_notes_see_what_is_inside_a_wrapper():
    data = torch.linspace(-1, 1, 18).reshape(6, 3).sin(), torch.ones(6, 3)
    wrapped = nn.DataParallel(Noted(nn.Dropout(0.5)))
    report = fm.sharpness(wrapped, nn.MSELoss(), data, measures=[])
    assert report.notes == ("Evaluation mode: dropout off.",)


def test_notes_tell_of_differences_with_the_operation_and_their_error():
    case = build("embedding_bag_sum")
    with pytest.warns(fm.FiniteDifferenceWarning):
        report = fm.sharpness(
            case.model,
            data=case.batches,
            batch_loss=case.batch_loss,
            weight=case.weight,
            measures=["trace"],
            trace_products=2,
        )
    (note,) = report.notes
    assert "no second derivative of embedding_bag (in the module 'bag')" in note
    assert "differences of gradients, with an estimated error of up to" in note
    # Where no product was taken, none is approximate.
    report = fm.sharpness(
        case.model,
        data=case.batches,
        batch_loss=case.batch_loss,
        weight=case.weight,
        measures=["gradient_norm"],
    )
    assert report.notes == ()


def test_notes_tell_of_differences_of_either_operator():
    case = build("once_differentiable_loss")
    with pytest.warns(fm.FiniteDifferenceWarning) as caught:
        report = fm.sharpness(
            case.model,
            case.loss_fn,
            case.batches,
            measures=["trace", "gauss_newton"],
            trace_products=4,
        )
    assert ["Hessian products" in str(w.message) for w in caught] == [True, False]
    assert "central differences of outputs" in str(caught[1].message)
    first, second = report.notes
    assert "Hessian products are differences of gradients, with an estimated error" in first
    assert "Gauss–Newton products are differences of outputs, with an estimated" in second


# -------------------------------------------------------------------------------- side effects


@pytest.mark.parametrize("mode", ["eval", "train", "keep"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_model_data_and_random_states_are_untouched(dtype, mode):
    case = build("mlp_batch_norm_dropout", dtype)
    case.model.train()
    case.model[0].weight.grad = torch.ones_like(case.model[0].weight)
    with untouched(case.model, case.batches):
        fm.sharpness(case.model, case.loss_fn, case.batches, mode=mode, trace_products=2, samples=1)


def test_nothing_is_printed(case, capsys):
    fm.sharpness(case.model, case.loss_fn, case.batches, trace_products=2)
    assert capsys.readouterr().out == ""


def test_without_progress_nothing_is_written_at_all(case, capsys, monkeypatch):
    monkeypatch.setattr("flatminima.support.progress.DELAY_SECONDS", 0.0)
    fm.sharpness(case.model, case.loss_fn, case.batches, trace_products=2, progress=False)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_progress_goes_to_the_error_stream(case, capsys, monkeypatch):
    monkeypatch.setattr("flatminima.support.progress.DELAY_SECONDS", 0.0)
    fm.sharpness(case.model, case.loss_fn, case.batches, trace_products=2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "sharpness" in captured.err


def test_same_seed_gives_the_same_report_and_another_does_not(case, report):
    again = fm.sharpness(case.model, case.loss_fn, case.batches, seed=3, trace_products=10)
    other = fm.sharpness(case.model, case.loss_fn, case.batches, seed=4, trace_products=10)
    assert again == report
    assert other != report


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("measure", "near"),
    [
        ("eigenvalue", "eigenvalues"),
        ("epsilon", "epsilon_sharpness"),
        ("Trace", "trace"),
        ("gauss-newton", "gauss_newton"),
    ],
)
def test_unknown_measure_is_refused_with_the_nearest(measure, near, case):
    with pytest.raises(fm.InvalidArgumentError, match=f"Did you mean .*'{near}'"):
        fm.sharpness(case.model, case.loss_fn, case.batches, measures=["trace", measure])


@pytest.mark.parametrize("measure", [["trace"], None, 3])
def test_something_that_is_no_name_is_refused(measure, case):
    with pytest.raises((fm.InvalidArgumentError, fm.ArgumentTypeError), match="'measures'"):
        fm.sharpness(case.model, case.loss_fn, case.batches, measures=[measure])


@pytest.mark.parametrize(
    ("argument", "value"), [("eigenvalues", 0), ("trace_products", 1), ("samples", 0)]
)
def test_counts_too_small_are_refused_before_anything_is_computed(argument, value, case):
    def never(output, target):
        raise AssertionError("computed something")

    with pytest.raises(fm.InvalidArgumentError, match=f"'{argument}' argument of sharpness"):
        fm.sharpness(case.model, never, case.batches, **{argument: value})


def test_neither_data_nor_loss_is_refused(case):
    with pytest.raises(fm.InvalidArgumentError, match="loss_fn"):
        fm.sharpness(case.model, data=case.batches)
    with pytest.raises(fm.InvalidArgumentError, match="needs data"):
        fm.sharpness(case.model, case.loss_fn)


def test_loss_that_is_not_finite_raises(case):
    model = copy.deepcopy(case.model)
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    with pytest.raises(fm.NonFiniteError, match="batch 0"):
        fm.sharpness(model, case.loss_fn, case.batches)


# ------------------------------------------------------------------------------------- compare


def plain(loss: float, norm: float | None = None, **changes) -> fm.SharpnessReport:
    fields = {
        "model": "Net",
        "parameters": 3,
        "examples": 5,
        "mode": "eval",
        "loss": loss,
        "gradient_norm": norm,
        "epsilon_sharpness": (),
        "random_sharpness": None,
        "largest": None,
        "smallest": None,
        "trace": None,
        "notes": (),
    }
    return fm.SharpnessReport(**fields | changes)


LOSS, NORM = "loss L(θ)", "gradient norm ‖∇L‖"


def test_ratios_are_to_the_first():
    comparison = fm.compare({"a": plain(2.0, 1.0), "b": plain(6.0, 0.5), "c": plain(1.0, -3.0)})
    assert comparison.labels == ("a", "b", "c")
    assert comparison.measures == (LOSS, NORM)
    assert comparison.ratio_of_means == {"a": (1.0, 1.0), "b": (3.0, 0.5), "c": (0.5, -3.0)}
    assert comparison.table().header == ("measure", "a", "b", "c", "b / a", "c / a")
    assert comparison.table().rows[0] == (LOSS, "2", "6", "1", "3", "0.5")


def test_several_seeds_are_mean_and_standard_deviation():
    small = [plain(1.0), plain(2.0), plain(6.0)]
    comparison = fm.compare({"small": small, "large": plain(30.0)})
    assert comparison.values == {"small": ((1.0, 2.0, 6.0),), "large": ((30.0,),)}
    assert comparison.mean("small", LOSS) == 3.0
    assert comparison.standard_deviation("small", LOSS) == pytest.approx(math.sqrt(7))
    assert comparison.ratio_of_means["large"] == (10.0,)
    assert comparison.table().rows[0] == (LOSS, "3 ± 2.6", "30", "10")
    assert "over 3 (small), 1 (large) seeds" in repr(comparison)


def test_one_report_has_no_standard_deviation():
    comparison = fm.compare({"a": plain(1.0), "b": plain(2.0)})
    assert math.isnan(comparison.standard_deviation("a", LOSS))
    assert "seeds" not in repr(comparison)


def test_ratio_to_zero_is_nan():
    comparison = fm.compare({"a": plain(0.0), "b": plain(2.0)})
    assert all(math.isnan(comparison.ratio_of_means[n][0]) for n in ("a", "b"))
    assert comparison.table().rows[0] == (LOSS, "0", "2", "NaN")


@pytest.mark.parametrize(
    "losses", [[1.0, math.inf], [1.0, math.nan], [math.inf, -math.inf], [math.inf, math.inf]]
)
def test_seeds_that_are_not_finite_are_shown_as_they_are(losses):
    comparison = fm.compare({"a": [plain(loss) for loss in losses], "b": [plain(1.0), plain(2.0)]})
    mean = comparison.mean("a", LOSS)
    assert mean == sum(losses) / 2 or math.isnan(mean)
    assert not math.isfinite(mean)
    assert math.isnan(comparison.standard_deviation("a", LOSS))
    assert "NaN" in repr(comparison)


def test_only_shared_measures_are_compared():
    comparison = fm.compare({"a": plain(1.0, 2.0), "b": [plain(2.0, 3.0), plain(2.0)]})
    assert comparison.measures == (LOSS,)


def test_real_reports_are_compared_line_by_line(report):
    comparison = fm.compare({"one": report, "same": [report, report]})
    assert comparison.measures == tuple(m.name for m in report.measurements())
    assert comparison.ratio_of_means["same"] == (1.0,) * len(comparison.measures)
    assert fm.Comparison.from_json(comparison.to_json()) == comparison


def test_measures_that_one_report_lacks_are_noted(case, report):
    fewer = fm.sharpness(
        case.model, case.loss_fn, case.batches, measures="trace", seed=3, trace_products=10
    )
    comparison = fm.compare({"a": report, "b": fewer})
    assert comparison.measures == (LOSS, "trace of the Hessian")
    (note,) = comparison.notes
    assert note.startswith("Not in all reports, and left out: ")
    assert "trace of the Gauss–Newton matrix" in note
    assert "λ₁ largest eigenvalue (Gauss–Newton)" in note


def test_reports_that_were_not_made_alike_are_noted():
    comparison = fm.compare({"a": plain(1.0), "b": plain(1.0, examples=6, mode="train")})
    assert any("examples" in note and "a: 5; b: 6" in note for note in comparison.notes)
    assert any("mode" in note for note in comparison.notes)
    assert all(note in repr(comparison) for note in comparison.notes)


def test_numbers_to_distrust_are_noted():
    doubtful = fm.EpsilonSharpnessResult(
        value=0.0,
        loss=1.0,
        maximum=1.0,
        epsilon=1e-3,
        subspace=None,
        iterations=10,
        evaluations=2,
        outcome=fm.Outcome.UNBOUNDED,
    )
    fine = dataclasses.replace(doubtful, outcome=fm.Outcome.STATIONARY)
    comparison = fm.compare(
        {
            "a": plain(1.0, epsilon_sharpness=(fine,)),
            "b": [plain(1.0, epsilon_sharpness=(r,)) for r in (fine, doubtful)],
        }
    )
    assert comparison.notes == ("ε-sharpness φ (%), ε = 0.001, full space, b: UNBOUNDED.",)


@pytest.mark.parametrize(
    ("label", "measure", "near"), [("c", LOSS, "'a'"), ("a", "loss", "loss L")]
)
def test_unknown_label_or_measure_is_refused_with_the_known(label, measure, near):
    comparison = fm.compare({"a": plain(1.0), "b": plain(2.0)})
    for ask in (comparison.mean, comparison.standard_deviation):
        with pytest.raises(fm.InvalidArgumentError, match=near):
            ask(label, measure)


@pytest.mark.parametrize("reports", [{}, {"a": plain(1.0)}])
def test_fewer_than_two_reports_are_refused(reports):
    with pytest.raises(fm.InvalidArgumentError, match="needs two reports at least"):
        fm.compare(reports)


def test_empty_list_of_reports_is_refused_by_label():
    with pytest.raises(fm.InvalidArgumentError, match="empty list for 'b'"):
        fm.compare({"a": plain(1.0), "b": []})


def test_list_in_place_of_a_mapping_is_refused_with_an_example():
    with pytest.raises(fm.ArgumentTypeError, match="mapping such as"):
        fm.compare([plain(1.0), plain(2.0)])


@pytest.mark.parametrize("thing", [3, None, [3], "report", TypeError, [plain(1.0), None]])
def test_something_that_is_no_report_is_refused_by_label(thing):
    with pytest.raises(fm.ArgumentTypeError, match=r"compare takes reports of sharpness.*'b'"):
        fm.compare({"a": plain(1.0), "b": thing})


# ----------------------------------------------------------------------- an objective in its place


def test_an_objective_gives_the_same_report():
    case = build("mlp_batch_norm_dropout")
    measures = ["gradient_norm", "epsilon_sharpness", "trace"]
    direct = fm.sharpness(case.model, case.loss_fn, case.batches, measures=measures)
    objective = fm.Objective(case.model, case.loss_fn, case.batches)
    assert fm.sharpness(objective, measures=measures) == direct
    # Readings of the data are counted from the call on.
    assert fm.sharpness(objective, measures=measures) == direct


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"data": (torch.zeros(1), torch.zeros(1))}, "data="),
        ({"loss_fn": nn.MSELoss(), "mode": "train"}, "loss_fn=, mode="),
        ({"params": "0.*"}, "params="),
        ({"batch_size": 7}, "batch_size="),
    ],
)
def test_options_of_an_objective_are_refused_beside_one(options, named):
    objective = build("linear_regression").objective()
    with pytest.raises(fm.InvalidArgumentError, match=re.escape(f"give {named} to fm.Objective")):
        fm.sharpness(objective, **options)


def test_sharpness_takes_the_arguments_of_an_objective():
    own = inspect.signature(fm.sharpness).parameters
    for name, parameter in inspect.signature(fm.Objective).parameters.items():
        assert own[name].default == parameter.default
        assert own[name].kind == parameter.kind
