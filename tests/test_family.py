"""The measures as one family: alike in their calls, in reports, in comparisons."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import nn

import flatminima as fm
from flatminima.report.measure_table import FAMILY
from flatminima.report.sharpness import MEASURES

DOUBLE = torch.float64


def draws(seed, *shape, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=DOUBLE).to(dtype)


def net_and_data(dtype=DOUBLE):
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    net.to(dtype)
    with torch.no_grad():
        for number, p in enumerate(net.parameters()):
            p.copy_(draws(number, *p.shape, dtype=dtype))
    x = draws(50, 40, 4, dtype=dtype)
    return net, nn.CrossEntropyLoss(), (x, net(x).argmax(dim=1).detach())


FUNCTIONS = {"gradient_norm": fm.gradient_norm} | {n: f for n, (f, _) in FAMILY.items()}
EVERY = pytest.mark.parametrize("name", FUNCTIONS)
CHEAP = {
    "sam_sharpness": [{"rho": 0.1}, {"rho": 0.1, "adaptive": True, "steps": 3}],
    "average_sharpness": {"samples": 3},
    "pac_bayes_sharpness": {"samples": 2, "tol": 0.2},
    "local_energy": {"samples": 2},
    "relative_flatness": {"products": 4},
    "laplace_log_evidence": {"probes": 2, "steps": 4},
    "fisher_rao_norm": None,
    "critical_sharpness": None,
}


# ------------------------------------------------------------------------------------- functions


@EVERY
def test_every_measure_takes_an_objective_seed_and_progress(name):
    function = FUNCTIONS[name]
    parameters = inspect.signature(function).parameters
    assert next(iter(parameters)) == "objective"
    for option, default in (("seed", 0), ("progress", True)):
        assert parameters[option].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[option].default == default
    required = [p for p in parameters.values() if p.default is p.empty]
    assert [p.name for p in required] == ["objective"]
    assert getattr(fm, name) is function
    with pytest.raises(fm.ArgumentTypeError, match=rf"'objective' argument of {name} .*Make one"):
        function(nn.Linear(1, 1))


@EVERY
def test_every_result_has_what_the_family_shares(name):
    net, loss_fn, data = net_and_data()
    result = FUNCTIONS[name](fm.Objective(net, loss_fn, data), progress=False)
    assert isinstance(result, fm.MeasureResult)
    assert math.isfinite(result.value)
    assert isinstance(result.outcome, fm.Outcome)
    assert result.readings == 0
    lines = result.measurements()
    assert lines[0].value == result.value
    assert lines[0].outcome in (result.outcome, None)
    assert lines[0].cost[0].isdigit()
    assert fm.Result.from_json(result.to_json()) == result
    assert result.outcome.value in str(result)


@EVERY
def test_seeds_are_checked_everywhere(name):
    net, loss_fn, data = net_and_data()
    with pytest.raises(fm.ArgumentTypeError, match="'seed' argument must be an int"):
        FUNCTIONS[name](fm.Objective(net, loss_fn, data), seed="0")


@EVERY
@pytest.mark.parametrize("progress", [True, False])
def test_bars_go_to_the_error_stream_or_nowhere(name, progress, capsys, monkeypatch):
    monkeypatch.setattr("flatminima.support.progress.DELAY_SECONDS", 0.0)
    net, loss_fn, data = net_and_data()
    FUNCTIONS[name](fm.Objective(net, loss_fn, data, progress=False), progress=progress)
    out, err = capsys.readouterr()
    assert out == ""
    shows = name not in ("gradient_norm", "fisher_rao_norm")
    assert bool(err) == (progress and shows)


# ---------------------------------------------------------------------------------------- reports


def test_a_report_holds_what_the_functions_give():
    net, loss_fn, data = net_and_data()
    report = fm.sharpness(net, loss_fn, data, measures=CHEAP, seed=3)
    objective = fm.Objective(net, loss_fn, data)
    assert list(report.results) == [name for name in MEASURES if name in CHEAP]
    for name, options in CHEAP.items():
        several = options if isinstance(options, list) else [options or {}]
        expected = tuple(FUNCTIONS[name](objective, seed=3, **o) for o in several)
        assert report.results[name] == expected
    lines = [line.name for line in report.measurements()]
    assert len(lines) == len(set(lines)) == 1 + 9
    assert report.gradient_norm is None
    assert fm.SharpnessReport.from_json(report.to_json()) == report


def test_settings_of_keskars_and_of_random_sharpness():
    net, loss_fn, data = net_and_data()
    report = fm.sharpness(
        net,
        loss_fn,
        data,
        measures={
            "epsilon_sharpness": {"epsilon": 0.01, "iterations": 2},
            "random_sharpness": [{"samples": 2}, {"samples": 2, "relative": True}],
            "gradient_norm": None,
        },
    )
    (box,) = report.epsilon_sharpness
    assert (box.epsilon, box.iterations) == (0.01, 2)
    assert [r.relative for r in report.results["random_sharpness"]] == [False, True]
    assert report.gradient_norm > 0
    one = fm.sharpness(net, loss_fn, data, measures={"random_sharpness": {"samples": 3}})
    assert one.random_sharpness.samples == 3


def test_all_is_every_measure():
    net, loss_fn, data = net_and_data()
    report = fm.sharpness(net, loss_fn, data, measures="all", trace_products=4, samples=2)
    assert report.density is not None
    assert report.gauss_newton_trace is not None
    assert set(report.results) == set(FAMILY)
    for name, found in report.results.items():
        assert len(found) == len(FAMILY[name][1])
    assert len(fm.compare({"one": report, "two": report}).measures) == len(report.measurements())
    assert "PAC-Bayes" in report._repr_html_()


def test_all_leaves_out_what_a_model_does_not_allow_and_says_so():
    model = nn.Linear(2, 1).double()
    nn.init.zeros_(model.bias)
    data = draws(0, 9, 2), draws(1, 9, 1)
    report = fm.sharpness(model, nn.MSELoss(), data, measures="all", trace_products=2, samples=1)
    assert "pac_bayes_sharpness" not in report.results
    assert [r.adaptive for r in report.results["sam_sharpness"]] == [False, False]
    notes = " ".join(report.notes)
    for words in (
        "pac_bayes_sharpness() is left out",
        "sam_sharpness(rho=0.5, adaptive=True, steps=20) is left out",
        "no classifier",
        "'bias'",
        "local_energy",
    ):
        assert words in notes
    with pytest.raises(fm.InvalidArgumentError, match="no classifier"):
        fm.sharpness(model, nn.MSELoss(), data, measures=["pac_bayes_sharpness"])


def test_lines_that_differ_in_hidden_settings_are_numbered():
    net, loss_fn, data = net_and_data()
    several = {"average_sharpness": [{"samples": 2}, {"samples": 3}]}
    report = fm.sharpness(net, loss_fn, data, measures=several)
    names = [line.name for line in report.measurements()][1:]
    assert names == ["average sharpness, σ = 0.01", "average sharpness, σ = 0.01 (2)"]
    assert len(fm.compare({"a": report, "b": report}).measures) == 3


def test_all_works_where_outputs_are_of_tokens_and_losses_are_not_convex():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6)).double()
    data = torch.randint(5, (8, 3)), torch.randint(6, (8, 3))

    def loss_fn(output, target):
        scores = output.flatten(0, 1)
        return nn.functional.cross_entropy(scores, target.flatten()) - scores.square().mean()

    report = fm.sharpness(net, loss_fn, data, measures="all", trace_products=2, samples=1)
    notes = " ".join(report.notes)
    for name in ("pac_bayes_sharpness", "local_energy", "laplace_log_evidence"):
        assert name not in report.results
        assert f"{name}(" in notes


def test_settings_of_the_user_are_taken_as_they_are():
    model = nn.Linear(3, 1)
    data = torch.ones(4, 3), torch.zeros(4, 1)
    own = {"epsilon_sharpness": {"epsilon": 1e-3, "subspace": 100}}
    with pytest.raises(fm.InvalidArgumentError, match="'subspace' argument"):
        fm.sharpness(model, nn.MSELoss(), data, measures=own)


def test_all_works_with_batch_loss():
    net, _, (x, y) = net_and_data()
    report = fm.sharpness(
        net,
        data=[{"x": x, "y": y}],
        batch_loss=lambda m, b: nn.functional.cross_entropy(m(b["x"]), b["y"]),
        measures="all",
        trace_products=2,
        samples=1,
    )
    assert set(report.results) == {
        "epsilon_sharpness",
        "random_sharpness",
        "sam_sharpness",
        "average_sharpness",
        "relative_flatness",
        "critical_sharpness",
    }
    assert "fisher_rao_norm() is left out" in " ".join(report.notes)


def test_comparisons_have_every_measure_and_distrust_the_doubtful():
    net, loss_fn, data = net_and_data()
    reports = {
        label: fm.sharpness(fm.rescale(net, factor=f), loss_fn, data, measures=CHEAP)
        for label, f in (("as it is", 1.0), ("rescaled", 10.0))
    }
    comparison = fm.compare(reports)
    assert len(comparison.measures) == 10
    ratios = dict(zip(comparison.measures, comparison.ratio_of_means["rescaled"], strict=True))
    assert ratios["Fisher–Rao norm"] == pytest.approx(1, rel=1e-9)
    assert ratios["SAM sharpness, ρ = 0.1, 1 step"] > 2


@pytest.mark.parametrize(
    ("measures", "error", "message"),
    [
        (["sam_sharp"], fm.InvalidArgumentError, "Did you mean .*'sam_sharpness'"),
        ({"sam_sharpnes": {}}, fm.InvalidArgumentError, "Did you mean 'sam_sharpness'"),
        ({"sam_sharpness": {"roh": 1}}, fm.InvalidArgumentError, "no setting 'roh'.*mean 'rho'"),
        ({"sam_sharpness": {"seed": 1}}, fm.InvalidArgumentError, "no setting 'seed'"),
        ({"sam_sharpness": {"rho": 0}}, fm.InvalidArgumentError, "'rho' argument"),
        ({"trace": {"products": 3}}, fm.InvalidArgumentError, "'trace' takes no settings"),
        ({"sam_sharpness": 0.1}, fm.ArgumentTypeError, "must be a mapping"),
        ({"sam_sharpness": []}, fm.ArgumentTypeError, "must be a mapping"),
        ({"sam_sharpness": [0.1]}, fm.ArgumentTypeError, "must be a mapping"),
    ],
)
def test_unknown_measures_and_settings_are_refused(measures, error, message):
    net, loss_fn, data = net_and_data()
    with pytest.raises(error, match=message):
        fm.sharpness(net, loss_fn, data, measures=measures)


# --------------------------------------------------------------------------------------- invariance


def test_the_table_of_what_survives_rescaling():
    net, loss_fn, data = net_and_data()
    adaptive = {"adaptive": True}
    table = fm.invariance_table(
        net,
        loss_fn,
        data,
        measures={
            "gradient_norm": None,
            "epsilon_sharpness": {"epsilon": 1e-3},
            "random_sharpness": [{"samples": 3}, {"samples": 3, "relative": True}],
            "eigenvalues": None,
            "trace": None,
            "sam_sharpness": [{"steps": 8}, {"steps": 8, **adaptive}],
            "average_sharpness": [{"samples": 5}, {"samples": 5, **adaptive}],
            "pac_bayes_sharpness": [{"samples": 5}, {"samples": 5, **adaptive}],
            "local_energy": {"samples": 5},
            "fisher_rao_norm": None,
            "relative_flatness": {"products": 200},
            "critical_sharpness": None,
        },
        eigenvalues=1,
    )
    assert table.loss_change < 1e-10
    survivors = {
        kind: {name for name in table.measures if table.invariant(kind, name)}
        for kind in ("layer", "neuron")
    }
    both = {
        "loss L(θ)",
        "adaptive SAM sharpness, ρ = 0.05, 8 steps",
        "adaptive average sharpness, σ = 0.01",
        "magnitude-aware PAC-Bayes sharpness 1/σ², error + 0.1",
        "local energy (error), σ ≤ 0.5",
        "Fisher–Rao norm",
    }
    assert survivors["neuron"] == both
    extra = survivors["layer"] - both
    assert extra == {"relative flatness", "relative random-perturbation sharpness, ε = 0.001"}
    assert len(table.measures) == 18
    assert "unchanged" in str(table)
    assert fm.InvarianceTable.from_json(table.to_json()) == table


def test_the_same_seed_gives_the_same_table():
    net, loss_fn, data = net_and_data()
    options = {"measures": {"average_sharpness": {"samples": 3}}, "per": "neuron"}
    first = fm.invariance_table(net, loss_fn, data, seed=1, **options)
    assert fm.invariance_table(net, loss_fn, data, seed=1, **options) == first
    assert fm.invariance_table(net, loss_fn, data, seed=2, **options) != first
    assert list(first.ratios) == ["neuron"]


def test_a_loss_that_sees_the_parameters_is_no_function_of_the_outputs():
    net, _, (x, y) = net_and_data()

    def decayed(model, batch):
        penalty = sum(p.square().sum() for p in model.parameters())
        return nn.functional.cross_entropy(model(batch[0]), batch[1]) + penalty

    with pytest.raises(fm.InvalidArgumentError, match=r"the function is another one.*decay"):
        fm.invariance_table(net, data=[(x, y)], batch_loss=decayed, measures="gradient_norm")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"factor": 0}, fm.InvalidArgumentError, "'factor' argument of invariance_table"),
        ({"tolerance": -1}, fm.InvalidArgumentError, "'tolerance' argument"),
        ({"per": ["row"]}, fm.InvalidArgumentError, "'per' argument"),
        ({"per": []}, fm.InvalidArgumentError, "'per' argument .* empty"),
        ({"measures": None}, fm.ArgumentTypeError, "must name measures"),
    ],
)
def test_bad_options_of_the_table(options, error, message):
    net, loss_fn, data = net_and_data()
    with pytest.raises(error, match=message):
        fm.invariance_table(net, loss_fn, data, **options)


def test_a_net_that_is_not_homogeneous_names_its_layer():
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    data = torch.ones(4, 2), torch.zeros(4, dtype=torch.long)
    with pytest.raises(fm.InvalidArgumentError, match="'1' is Tanh"):
        fm.invariance_table(net, nn.CrossEntropyLoss(), data, measures="gradient_norm")
