"""The example that asks which sharpness predicts generalisation: its statistics, and its runs."""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

import flatminima as fm

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import rank_correlation  # noqa: E402
import which_sharpness_predicts  # noqa: E402
from rank_correlation import correlate, groups, kendall  # noqa: E402

STEM = "which_sharpness_predicts_digits"


@pytest.mark.parametrize(
    ("x", "y", "tau"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1),
        ([1, 2, 3, 4], [1, 3, 2, 4], (5 - 1) / 6),
        # Two pairs agree and one is tied in y: 2 / √(3 · 2).
        ([1, 2, 3], [5, 5, 7], 2 / math.sqrt(6)),
        # Nothing is ordered where something could be; and nothing could be.
        ([1, 1, 1], [1, 2, 3], 0),
        ([1, 2, 3], [2, 2, 2], math.nan),
        ([1], [1], math.nan),
        ([], [], math.nan),
    ],
)
def test_tau_by_hand(x, y, tau):
    assert kendall(x, y) == pytest.approx(tau, nan_ok=True)


def test_tau_depends_on_ranks_alone():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=20), rng.integers(0, 8, 20).astype(float)
    tau = kendall(x, y)
    assert 0 < abs(tau) < 1
    assert kendall(np.exp(x), 3 * y - 1) == pytest.approx(tau)
    assert kendall(-x, y) == pytest.approx(-tau)
    order = rng.permutation(20)
    assert kendall(x[order], y[order]) == pytest.approx(tau)


SQUARE = [{"a": a, "b": b} for a in (0, 1) for b in (0, 1)]
"""Two hyper-parameters with two values each."""


def test_granulated_tau_by_hand():
    # By a, for b = 0 and b = 1: both numbers rise. By b, for a = 0 both rise, for a = 1 x falls.
    found = correlate("x", [1, 2, 4, 3], [1, 2, 3, 4], SQUARE, ["a", "b"], resamples=50)
    assert found.granulated == {"a": 1.0, "b": 0.0}
    assert found.groups == {"a": 2, "b": 2}
    assert found.psi == 0.5
    assert found.tau == pytest.approx(4 / 6)
    assert found.nets == 4


def test_groups_of_three_by_hand():
    settings = [{"a": a, "b": b} for b in "pq" for a in (1, 2, 3)]
    # By a: for p three pairs agree, for q one of three. By b: the number falls while y rises.
    x, y = [7, 8, 9, 4, 6, 5], [1, 2, 3, 6, 5, 4]
    found = correlate("x", x, y, settings, ["a", "b"], resamples=50)
    assert found.granulated == pytest.approx({"a": (1 - 1 / 3) / 2, "b": -1})
    assert found.psi == pytest.approx((1 / 3 - 1) / 2)


def test_nets_of_different_seeds_are_never_in_one_group():
    settings = [{**own, "seed": seed} for seed in (0, 1) for own in SQUARE]
    x, y = np.array([1, 2, 4, 3, 1, 2, 4, 3.0]), np.array([1, 2, 3, 4, 1, 2, 3, 4.0])
    shift = np.repeat([0, 100], 4)
    alone = correlate("x", x, y, settings, ["a", "b"], resamples=50)
    apart = correlate("x", x - shift, y + shift, settings, ["a", "b"], resamples=50)
    assert apart.psi == alone.psi == 0.5
    # Over all nets the seeds turn the order round, within groups they do not enter.
    assert apart.tau < 0 < alone.tau
    assert all(len({settings[i]["seed"] for i in g}) == 1 for g in groups(settings, "a"))


def test_groups_without_an_order_are_left_out_and_one_value_makes_none():
    # By a: in b = 0 the errors are the same, in b = 1 the number is, which so orders nothing.
    found = correlate("x", [1, 3, 2, 3], [5, 1, 5, 2], SQUARE, ["a", "b"], resamples=50)
    assert found.granulated["a"] == 0
    assert found.groups == {"a": 1, "b": 2}
    one = correlate("x", [1, 2], [1, 2], SQUARE[:2], ["a", "b"], resamples=50)
    assert math.isnan(one.granulated["a"])
    assert one.psi == one.granulated["b"] == 1.0
    # A net that is missing takes its groups along, where one alone is left of them.
    assert groups(SQUARE[:3], "a") == [[0, 2]]


def test_what_is_the_same_for_all_nets_has_no_correlation():
    for constant in ([2.0, 2.0, 2.0, 2.0], [1.0, 1.0001, 0.9999, 1.0], [math.nan] * 4):
        found = correlate("loss", constant, [1, 2, 3, 4], SQUARE, ["a", "b"])
        numbers = (found.tau, found.psi, *found.tau_interval, *found.psi_interval)
        assert all(math.isnan(number) for number in numbers)
        assert all(math.isnan(number) for number in found.granulated.values())


def test_nets_for_which_a_number_is_not_finite_are_left_out_of_its_correlation():
    found = correlate("x", [1, math.inf, 4, 3], [1, 2, 3, 4], SQUARE, ["a", "b"], resamples=50)
    assert (found.nets, found.tau) == (3, pytest.approx(1 / 3))
    assert found.groups == {"a": 1, "b": 1}


def test_resampled_taus_are_those_of_the_nets_drawn():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=12), rng.integers(0, 5, 12).astype(float)
    taus = rank_correlation.resampled_taus(x, y, 30, seed=3)
    draws = np.random.default_rng(3).integers(0, 12, (30, 12))
    np.testing.assert_allclose(taus, [kendalltau(x[d], y[d]).statistic for d in draws])


def test_bootstrap_intervals_hold_the_value_and_are_seeded():
    rng = np.random.default_rng(0)
    levels = itertools.product((1, 2, 3), (1, 2), range(5))
    settings = [{"a": a, "b": b, "seed": seed} for a, b, seed in levels]
    y = rng.normal(size=30)
    x = y + rng.normal(size=30)
    first, again, other = (
        correlate("x", x, y, settings, ["a", "b"], resamples=400, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert first.tau_interval != other.tau_interval
    assert first.psi_interval != other.psi_interval
    assert (first.tau, first.psi) == (other.tau, other.psi)
    for value, (low, high) in ((first.tau, first.tau_interval), (first.psi, first.psi_interval)):
        assert -1 <= low < value < high <= 1
    # More nets say more.
    many = correlate("x", np.tile(x, 9), np.tile(y, 9), settings * 9, ["a"], resamples=400)
    assert np.ptp(many.tau_interval) < np.ptp(first.tau_interval) / 2


def run(out, *argv):
    """What a run returns and prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = which_sharpness_predicts.main(["--quick", "--quiet", "--out", str(out), *argv])
    return code, printed.getvalue()


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run: its folder, what it printed, and its numbers."""
    out = tmp_path_factory.mktemp("quick")
    code, printed = run(out)
    assert code == 0
    return out, printed, json.loads((out / f"{STEM}.json").read_text(encoding="utf-8"))


@pytest.fixture
def undrawn(monkeypatch):
    """The figure is an empty one, as drawing takes longer than all the rest."""
    monkeypatch.setattr(rank_correlation, "picture", lambda *args: plt.figure(figsize=(1, 1)))


def test_a_quick_run_reports_every_measure_of_nets_at_one_loss(quick):
    out, printed, numbers = quick
    assert (out / f"{STEM}.png").read_bytes().startswith(b"\x89PNG")
    for text in ("0 of 8 nets", "120 images", "all 1677 others", "Kendall's τ", "Training took"):
        assert text in printed
    assert len(numbers["nets"]) == 8
    for net in numbers["nets"]:
        assert net["training_loss"] == pytest.approx(0.3, rel=2e-4)
        assert 0 < net["error"] < 0.5
        assert net["gap"] <= net["error"]
        assert net["doubtful"] == []
        assert all(math.isfinite(value) for value in net["measures"].values())
    names = [c["name"] for c in numbers["correlations"]]
    for part in (
        *("gradient norm", "ε-sharpness", "random-perturbation", "λ₁", "−λₙ", "trace of the H"),
        *("trace of the Gauss", "SAM", "adaptive SAM", "average", "PAC-Bayes", "local energy"),
        *("Fisher–Rao", "relative flatness", "critical", "−Laplace log evidence", "‖θ‖²"),
    ):
        assert any(name.startswith(part) for name in names), part
    found = {c["name"]: c for c in numbers["correlations"]}
    assert found["training loss"]["tau"] is None
    assert "training loss: the same for all nets" in printed
    parameters = found["parameters"]["granulated"]
    # Nets that differ in something else have as many, and one value makes no groups.
    assert (parameters["batch_size"], parameters["learning_rate"]) == (0, 0)
    assert parameters["width"] != 0
    assert parameters["weight_decay"] is None
    table = (out / f"{STEM}.md").read_text(encoding="utf-8")
    header = (
        "| measure | τ | 95 % | granulated Ψ | 95 % of Ψ | batch size | learning rate | width "
        "| weight decay |"
    )
    assert header in table
    assert header in (EXAMPLES.parent / "docs/generalization.md").read_text(encoding="utf-8")
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert sum("(baseline)" in row for row in rows) == 4
    taus = [row.split("|")[2].strip() for row in rows[rows.index(header) + 2 :]]
    assert taus.pop() == "–"
    assert taus == sorted(taus, key=float, reverse=True)


def test_numbers_that_are_larger_where_it_is_flatter_are_turned_round(quick):
    net = quick[2]["nets"][0]
    assert net["measures"]["−λₙ smallest eigenvalue"] > 0
    assert net["measures"]["−Laplace log evidence, τ optimised"] > 0
    assert all(n.startswith("−") or "evidence" not in n for n in net["measures"])


def test_a_second_run_trains_nothing(quick, undrawn, monkeypatch):
    out, _, numbers = quick

    def refuse(*args, **kwargs):
        raise AssertionError("a net was trained again")

    monkeypatch.setattr(which_sharpness_predicts, "train", refuse)
    code, printed = run(out, "--against", "gap")
    assert code == 0
    assert "8 of 8 nets taken from" in printed
    assert "generalisation gap" in printed
    other = json.loads((out / f"{STEM}_gap.json").read_text(encoding="utf-8"))
    assert other["nets"] == numbers["nets"]
    assert other["correlations"] != numbers["correlations"]
    # The plain report is still there.
    assert run(out)[0] == 0
    assert json.loads((out / f"{STEM}.json").read_text(encoding="utf-8")) == numbers


@pytest.fixture
def instead(quick, undrawn, monkeypatch):
    """Nets are not trained but taken from the quick run; a list of those that would have been."""
    kept = {
        tuple(net["net"].values()): {k: v for k, v in net.items() if k != "net"}
        for net in quick[2]["nets"]
    }
    asked = []

    def fitted(net, data, options):
        asked.append(net)
        return kept.get(dataclasses.astuple(net), next(iter(kept.values())))

    monkeypatch.setattr(which_sharpness_predicts, "fitted", fitted)
    return asked


@pytest.mark.parametrize(
    "argv",
    [["--loss", "0.25"], ["--train-images", "150"], ["--max-steps", "1000"], ["--seeds", "2"], []],
)
def test_nets_of_other_settings_are_not_used(quick, instead, argv, monkeypatch):
    if not argv:
        monkeypatch.setattr(fm, "__version__", "0.0.0")
    code, printed = run(quick[0], *argv)
    taken = 8 if argv == ["--seeds", "2"] else 0
    assert code == 0
    assert f"\n{taken} of" in f"\n{printed}"
    assert len(instead) == 8


def test_files_that_are_broken_or_foreign_are_said_and_replaced(tmp_path, instead):
    assert run(tmp_path)[0] == 0
    files = sorted((tmp_path / STEM).iterdir())
    assert len(files) == len(instead) == 8
    contents = [json.loads(f.read_text(encoding="utf-8")) for f in files]
    instead.clear()
    files[0].write_text('{"settings": {', encoding="utf-8")
    files[1].write_bytes(b"\xff\xfe\x00")
    files[2].write_text("[1, 2]", encoding="utf-8")
    files[3].write_text(json.dumps(contents[4]), encoding="utf-8")
    del contents[5]["record"]["measures"]
    files[5].write_text(json.dumps(contents[5]), encoding="utf-8")
    contents[6]["record"]["measures"]["relative flatness"] = "large"
    files[6].write_text(json.dumps(contents[6]), encoding="utf-8")
    code, printed = run(tmp_path)
    assert code == 0
    for place in (0, 1, 2, 3, 5, 6):
        assert f"ignored: {files[place]}" in printed
    assert "other settings" in printed
    assert "2 of 8 nets taken" in printed
    assert len(instead) == 6
    assert "ignored" not in run(tmp_path)[1]
    assert len(instead) == 6


def test_a_run_that_is_stopped_goes_on(tmp_path, instead, monkeypatch, capsys):
    borrowed = which_sharpness_predicts.fitted

    def stopped(net, data, options):
        if len(instead) == 3:
            raise KeyboardInterrupt
        return borrowed(net, data, options)

    monkeypatch.setattr(which_sharpness_predicts, "fitted", stopped)
    assert run(tmp_path)[0] == 130
    assert "stopped" in capsys.readouterr().err
    assert [f.suffix for f in (tmp_path / STEM).iterdir()] == [".json"] * 3
    monkeypatch.setattr(which_sharpness_predicts, "fitted", borrowed)
    code, printed = run(tmp_path)
    assert (code, len(instead)) == (0, 8)
    assert "3 of 8 nets taken" in printed


def test_nets_that_do_not_come_to_the_loss_are_left_out_and_named(tmp_path, instead, monkeypatch):
    borrowed = which_sharpness_predicts.fitted
    failed = {"reached": False, "steps": 7, "training_loss": 0.5}

    def some_fail(net, data, options):
        if net.learning_rate == 0.5 and net.width == 16:
            return failed | ({} if net.batch_size == 64 else {"training_loss": None})
        return borrowed(net, data, options)

    monkeypatch.setattr(which_sharpness_predicts, "fitted", some_fail)
    code, printed = run(tmp_path)
    assert code == 0
    told = [line for line in printed.splitlines() if line.startswith("left out: ")]
    assert len(told) == 2
    assert "batch 16, learning rate 0.5, width 16" in told[0]
    assert "is not finite" in told[0]
    assert "after 7 steps its training loss is 0.5, not 0.3" in told[1]
    assert "6 nets trained" in printed
    assert "did not come to it: 2." in printed
    found = json.loads((tmp_path / f"{STEM}.json").read_text(encoding="utf-8"))
    assert [net["reached"] for net in found["nets"]].count(False) == 2
    assert all(c["groups"]["width"] in (0, 2) for c in found["correlations"])


def test_too_few_nets_are_an_error(tmp_path, capsys):
    assert run(tmp_path, "--max-steps", "3")[0] == 2
    told = capsys.readouterr().err
    assert told.startswith("error: 0 of 8 nets")
    assert "--max-steps" in told
    assert not list(tmp_path.glob("*.png"))


def test_an_error_in_a_net_names_it(tmp_path, monkeypatch, capsys):
    def broken(*args):
        raise fm.NonFiniteError("the loss is NaN")

    monkeypatch.setattr(which_sharpness_predicts, "measured", broken)
    assert run(tmp_path)[0] == 2
    told = capsys.readouterr().err
    assert told.startswith("error: batch 16, learning rate 0.2, width 16, weight decay 0, seed 0: ")
    assert "NaN" in told


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path, instead, capsys):
    place = tmp_path / "file"
    place.write_text("", encoding="utf-8")
    assert run(place)[0] == 2
    assert capsys.readouterr().err.startswith("error: ")


def small():
    data = which_sharpness_predicts.split(which_sharpness_predicts.image_data.load("digits"), 60)
    torch.manual_seed(0)
    return which_sharpness_predicts.network(64, 10, 8), data.train_inputs, data.train_labels


def trained(net, **settings):
    model, *images = small()
    how = {"loss": 0.5, "max_steps": 2000} | settings
    end = which_sharpness_predicts.train(model, *images, net, **how)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(images[0]), images[1]).item()
    return end, loss, torch.cat([p.detach().flatten() for p in model.parameters()])


def test_training_ends_at_the_loss_and_is_the_same_twice():
    net = which_sharpness_predicts.Net(8, 0.2, 8, 1e-3, 0)
    (steps, loss), true, point = trained(net)
    assert loss == pytest.approx(0.5, rel=1e-4)
    assert true == loss
    assert torch.equal(trained(net)[2], point)
    other = dataclasses.replace(net, seed=1)  # the same start, other batches
    assert not torch.equal(trained(other)[2], point)
    # One step less does not come to it.
    (stopped, above), _, _ = trained(net, max_steps=steps - 1)
    assert (stopped, above > 0.5) == (steps - 1, True)


def test_training_that_diverges_stops():
    (steps, loss), _, _ = trained(which_sharpness_predicts.Net(8, 1e6, 8, 1.0, 0))
    assert steps < 100
    assert not math.isfinite(loss)


def test_images_that_are_not_trained_on_are_tested_on():
    data = which_sharpness_predicts.image_data.load("digits")
    part = which_sharpness_predicts.split(data, 300)
    assert (len(part.train_inputs), len(part.test_inputs)) == (300, 1497)
    whole = torch.cat([data.train_inputs, data.test_inputs]).sum(0)
    parts = torch.cat([part.train_inputs, part.test_inputs]).sum(0)
    torch.testing.assert_close(parts, whole)
    assert torch.equal(part.test_inputs[-450:], data.test_inputs)
    assert len(part.train_labels.unique()) == 10


@pytest.mark.parametrize(
    "argv",
    [
        ["--data", "mnist"],
        ["--data", "cifar10", "--root", "x"],
        ["--train-images", "1347"],
        ["--batch-sizes", "16", "121"],
    ],
)
def test_the_example_says_what_was_wrong(tmp_path, argv, capsys):
    assert run(tmp_path, *argv)[0] == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--train-images", "0"], "--train-images"),
        (["--batch-sizes", "0"], "--batch-sizes"),
        (["--learning-rates", "0.1", "-1"], "--learning-rates"),
        (["--loss", "nan"], "--loss"),
        (["--weight-decays", "-0.1"], "--weight-decays"),
        (["--bootstrap", "1"], "--bootstrap"),
        (["--seeds", "0"], "--seeds"),
        (["--against", "luck"], "--against"),
    ],
)
def test_options_out_of_range_are_refused(argv, named, capsys):
    with pytest.raises(SystemExit, match="2"):
        which_sharpness_predicts.main(argv)
    assert named in capsys.readouterr().err


def test_what_is_said_holds_against_quick():
    options = which_sharpness_predicts.arguments(["--quick", "--widths", "48"])
    assert (options.widths, options.loss, options.seeds) == ([48], 0.3, 1)
