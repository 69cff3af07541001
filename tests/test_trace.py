"""Traces: exact where they must be, unbiased, with honest standard errors."""

from __future__ import annotations

import contextlib
import math
import statistics

import pytest
import torch
from scipy import special
from torch import nn

import flatminima as fm
from flatminima.algorithms.estimators import probes, stopping
from flatminima.algorithms.estimators import trace as trace_module
from flatminima.algorithms.estimators.probes import t_factor
from spectra import MATRICES, SIZE, hidden, inside, low_rank
from zoo import build, cached_dense_hessian, dense_hessian, matrix_with_spectrum

FULL = matrix_with_spectrum(torch.linspace(-2, 9, 25).double(), 1, torch.float64)
METHODS = ("hutchinson", "hutch++", "xtrace")
SKETCHING = ("hutch++", "xtrace")
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)
EVERY_MATRIX = pytest.mark.parametrize("name", MATRICES)


# ---------------------------------------------------------------------------------- Hutchinson


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "diagonal", [[3.0], [1.0, -4.0, 2.5, 0.0], [0.0] * 5, list(range(-10, 20))]
)
def test_hutchinson_is_exact_on_diagonal_matrices_with_no_error(diagonal, dtype):
    matrix = torch.diag(torch.tensor(diagonal, dtype=dtype))
    result = fm.trace(fm.MatrixOperator(matrix), method="hutchinson", products=7)
    assert result.value == sum(diagonal)
    assert result.standard_error == 0.0
    assert (result.size, result.products) == (len(diagonal), 7)
    assert (result.outcome, result.method) == (fm.Outcome.COMPLETED, "hutchinson")


@pytest.fixture(scope="module")
def many():
    operator = hidden(FULL)
    return [fm.trace(operator, method="hutchinson", products=30, seed=seed) for seed in range(200)]


def test_spread_of_hutchinson_over_seeds_is_what_theory_says(many):
    off_diagonal = float((FULL**2).sum() - (FULL.diagonal() ** 2).sum())
    expected = math.sqrt(2 * off_diagonal / 30)
    # The standard deviation of 200 values is itself known to 1 / √400 = 5 %.
    assert statistics.stdev(r.value for r in many) == pytest.approx(expected, rel=0.2)
    told = statistics.fmean(r.standard_error for r in many) / t_factor(30)
    assert told == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("products", [2, 3, 12])
def test_value_and_error_are_mean_and_widened_standard_error_of_the_samples(products):
    samples = []

    def product(vector: torch.Tensor) -> torch.Tensor:
        samples.append(float(vector @ FULL @ vector))
        return FULL @ vector

    operator = fm.FunctionOperator(product, 25, dtype=torch.float64)
    result = fm.trace(operator, method="hutchinson", products=products)
    assert len(samples) == products
    assert result.value == pytest.approx(statistics.fmean(samples), rel=1e-12)
    error = t_factor(products) * statistics.stdev(samples) / math.sqrt(products)
    assert result.standard_error == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("samples", [2, 5, 30, 1000])
def test_widening_is_that_of_students_t(samples):
    covered = special.stdtr(samples - 1, 2 * t_factor(samples))
    assert covered == pytest.approx(special.ndtr(2), abs=1e-9)


@pytest.mark.parametrize("width", [1, 3, 7, 100])
@pytest.mark.parametrize("products", [2, 7, 40])
def test_width_of_a_block_changes_neither_draws_nor_count(products, width, monkeypatch):
    seen = []

    def product(vector: torch.Tensor) -> torch.Tensor:
        seen.append(vector)
        return FULL @ vector

    operator = fm.FunctionOperator(product, 25, dtype=torch.float64)
    whole = fm.trace(operator, method="hutchinson", products=products)
    vectors = list(seen)
    seen.clear()
    monkeypatch.setattr(probes, "BLOCK_BYTES", width * 25 * 8)
    blocked = fm.trace(operator, method="hutchinson", products=products)
    assert len(vectors) == products
    assert torch.equal(torch.stack(vectors), torch.stack(seen))
    assert blocked == whole


def test_vectors_of_hutchinson_are_signs():
    seen = []
    operator = fm.FunctionOperator(lambda v: seen.append(v) or v, 50)
    fm.trace(operator, method="hutchinson", products=20)
    signs = torch.stack(seen)
    assert bool((signs.abs() == 1).all())
    assert abs(float(signs.mean())) < 4 / math.sqrt(signs.numel())


# ---------------------------------------------------------------------------------- every method


@pytest.fixture(scope="module")
def runs():
    """For each method and matrix the errors and standard errors of 200 seeds."""
    found = {}
    for name, matrix in MATRICES.items():
        operator, exact = hidden(matrix), float(matrix.trace())
        for method in METHODS:
            results = [
                fm.trace(operator, method=method, products=48, seed=seed) for seed in range(200)
            ]
            found[method, name] = torch.tensor(
                [[r.value - exact, r.standard_error] for r in results]
            ).double()
    return found


@EVERY_MATRIX
@EVERY_METHOD
def test_truth_lies_within_two_standard_errors_as_often_as_it_should(method, name, runs):
    errors, told = runs[method, name].T
    assert 0.90 <= inside(errors, told) <= 0.99


@EVERY_MATRIX
@EVERY_METHOD
def test_unbiased_over_many_seeds(method, name, runs):
    errors = runs[method, name][:, 0]
    assert abs(float(errors.mean())) < 4 * float(errors.std()) / math.sqrt(len(errors))


@pytest.mark.parametrize("name", ["decaying", "exponential", "outliers and a bulk"])
def test_sketches_pay_where_few_eigenvalues_are_large(name, runs):
    spread = {method: float(runs[method, name][:, 0].std()) for method in METHODS}
    assert spread["xtrace"] < spread["hutch++"] < 0.3 * spread["hutchinson"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 4, 9])
@pytest.mark.parametrize("method", SKETCHING)
def test_exact_where_the_rank_is_below_the_sketch(method, rank, dtype):
    matrix = low_rank(rank, dtype) if rank else torch.zeros(SIZE, SIZE, dtype=dtype)
    for seed in range(20):
        result = fm.trace(hidden(matrix), method=method, products=33, seed=seed, progress=False)
        size = float(torch.linalg.matrix_norm(matrix.double(), "nuc"))
        eps = torch.finfo(dtype).eps
        missed = abs(result.value - float(matrix.double().trace()))
        assert missed <= 2 * result.standard_error <= 100 * eps * size


@pytest.mark.parametrize("rank", [19, 20, 21])
def test_rank_about_the_size_of_the_sketch_is_covered_too(rank):
    matrix = low_rank(rank)
    exact = float(matrix.trace())
    results = [
        fm.trace(hidden(matrix), method="xtrace", products=40, seed=seed) for seed in range(200)
    ]
    errors = torch.tensor([[r.value - exact, r.standard_error] for r in results]).double()
    assert inside(*errors.T) >= 0.85


@pytest.mark.parametrize("products", [4, 5, 6, 7, 23, 48])
@EVERY_METHOD
def test_products_are_all_that_were_asked_for_and_no_more(method, products):
    operator = hidden(MATRICES["flat"])
    result = fm.trace(operator, method=method, products=products)
    wanted = products - products % 2 if method == "xtrace" else products
    assert result.products == operator.multiplied == wanted
    assert result.standard_error > 0


@EVERY_METHOD
def test_blocks_stay_within_the_budget_and_change_nothing_but_rounding(method, monkeypatch):
    whole = fm.trace(hidden(MATRICES["flat"]), method=method, products=30)
    monkeypatch.setattr(probes, "BLOCK_BYTES", 4 * SIZE * 8)
    operator = hidden(MATRICES["flat"])
    blocked = fm.trace(operator, method=method, products=30)
    assert max(operator.heights) == 4
    assert blocked.value == pytest.approx(whole.value, rel=1e-12)
    assert blocked.standard_error == pytest.approx(whole.standard_error, rel=1e-6)
    monkeypatch.setattr(probes, "BLOCK_BYTES", 1)
    assert fm.trace(operator, method=method, products=30).value == pytest.approx(whole.value)


@EVERY_METHOD
def test_float32_gives_what_float64_gives(method):
    matrix = MATRICES["outliers and a bulk"]
    exact = float(matrix.trace())
    short = fm.trace(hidden(matrix.float()), method=method, products=60)
    assert abs(short.value - exact) <= 4 * short.standard_error
    assert short.standard_error < {"hutchinson": 0.5, "hutch++": 0.01, "xtrace": 0.01}[
        method
    ] * abs(exact)


@EVERY_METHOD
def test_scaling_the_matrix_scales_the_result(method):
    for scale in (1e-20, 1e20):
        one = fm.trace(hidden(MATRICES["indefinite"]), method=method, products=40)
        other = fm.trace(hidden(scale * MATRICES["indefinite"]), method=method, products=40)
        assert other.value == pytest.approx(scale * one.value, rel=1e-8)
        assert other.standard_error == pytest.approx(scale * one.standard_error, rel=1e-8)


@EVERY_METHOD
def test_same_seed_gives_the_same_bits_and_a_generator_serves(method):
    operator = hidden(MATRICES["flat"])
    first = fm.trace(operator, method=method, products=6, seed=3)
    assert first == fm.trace(operator, method=method, products=6, seed=3)
    assert first == fm.trace(
        operator, method=method, products=6, seed=torch.Generator().manual_seed(3)
    )
    assert first != fm.trace(operator, method=method, products=6, seed=4)


@EVERY_METHOD
def test_global_random_state_is_left_alone(method):
    before = torch.get_rng_state()
    fm.trace(hidden(MATRICES["flat"]), method=method, products=6)
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------ auto


def test_a_diagonal_that_is_known_is_taken():
    operator = fm.MatrixOperator(FULL)
    result = fm.trace(operator)
    assert result.value == pytest.approx(float(FULL.trace()), rel=1e-14)
    assert (result.standard_error, result.products) == (0.0, 0)
    assert (result.method, result.outcome) == ("exact", fm.Outcome.EXACT)


@pytest.mark.parametrize("method", ["auto", *SKETCHING])
def test_as_many_products_as_rows_give_it_exactly(method):
    operator = hidden(MATRICES["indefinite"])
    result = fm.trace(operator, method=method, products=SIZE)
    assert result.value == pytest.approx(float(MATRICES["indefinite"].trace()), rel=1e-13)
    assert (result.standard_error, result.outcome) == (0.0, fm.Outcome.EXACT)
    assert result.products == operator.multiplied == SIZE
    assert fm.trace(operator, method=method, products=SIZE - 1).outcome is fm.Outcome.COMPLETED


@pytest.mark.parametrize(
    ("room", "method"), [(150, "xtrace"), (149, "hutch++"), (2, "hutch++"), (1, "hutchinson")]
)
def test_the_vectors_that_are_kept_stay_within_the_budget(room, method, monkeypatch):
    monkeypatch.setattr(trace_module, "SKETCH_BYTES", room * SIZE * 8)
    matrix = MATRICES["outliers and a bulk"]
    result = fm.trace(hidden(matrix), products=100)
    assert (result.method, result.products) == (method, 100)
    assert abs(result.value - float(matrix.trace())) <= 4 * result.standard_error


@pytest.mark.parametrize("products", [2, 3])
def test_products_too_few_for_a_sketch_go_to_hutchinson(products):
    assert fm.trace(hidden(FULL), products=products).method == "hutchinson"


def test_half_precision_goes_to_hutchinson_and_a_sketch_of_it_is_refused():
    operator = fm.FunctionOperator(lambda v: 2 * v, 500, dtype=torch.bfloat16)
    result = fm.trace(operator, products=10)
    assert (result.method, result.value) == ("hutchinson", 1000.0)
    with pytest.raises(fm.InvalidArgumentError, match=r"'method'.*'hutchinson'.*bfloat16"):
        fm.trace(operator, method="xtrace", products=10)


# ------------------------------------------------------------------------------------------ rtol


@pytest.fixture(scope="module")
def stopped():
    """For each method and matrix 200 runs to a relative error."""
    found = {}
    for name, matrix in MATRICES.items():
        for method in METHODS:
            found[method, name] = [
                fm.trace(
                    hidden(matrix),
                    method=method,
                    rtol=0.05,
                    products=20_000,
                    seed=seed,
                    progress=False,
                )
                for seed in range(200)
            ]
    return found


@EVERY_MATRIX
@EVERY_METHOD
def test_stopping_is_not_fooled_by_chance(method, name, stopped):
    exact = float(MATRICES[name].trace())
    results = stopped[method, name]
    assert {r.outcome for r in results} <= {fm.Outcome.WITHIN_RTOL, fm.Outcome.EXACT}
    errors = torch.tensor([[r.value - exact, r.standard_error] for r in results]).double()
    sampled = torch.tensor([r.outcome is fm.Outcome.WITHIN_RTOL for r in results])
    assert bool((errors[~sampled].abs() <= 1e-11 * abs(exact)).all())
    if int(sampled.sum()) >= 100:
        assert 0.90 <= inside(*errors[sampled].T) <= 0.99
    assert all(r.standard_error <= 0.05 * abs(r.value) for r in results)
    # The relative error itself: within twice what was asked for in all but a few runs.
    assert float((errors[:, 0].abs() <= 0.1 * abs(exact)).double().mean()) >= 0.95


def test_smaller_tolerances_take_more_products(stopped):
    for name in ("decaying", "outliers and a bulk"):
        mean = {m: statistics.fmean(r.products for r in stopped[m, name]) for m in METHODS}
        assert mean["xtrace"] <= mean["hutch++"] < mean["hutchinson"]
    operator = hidden(MATRICES["decaying"])
    counts = [fm.trace(operator, method="xtrace", rtol=r).products for r in (0.3, 0.03, 0.003)]
    assert counts == sorted(counts)
    assert counts[0] < counts[2]


@EVERY_METHOD
def test_limit_warns_and_says_what_was_reached(method):
    matrix = MATRICES["indefinite"]
    with pytest.warns(fm.ConvergenceWarning, match=r"trace: the limit of \d+ products.*rtol=1e-06"):
        result = fm.trace(hidden(matrix), method=method, rtol=1e-6, products=60)
    assert result.outcome is fm.Outcome.ABOVE_RTOL
    assert result.outcome.doubtful
    assert result.products <= 60
    with pytest.raises(fm.ConvergenceError, match="Increase products= or rtol=") as caught:
        fm.trace(hidden(matrix), method=method, rtol=1e-6, products=60, strict=True)
    assert caught.value.result == result


@EVERY_METHOD
@pytest.mark.parametrize("rtol", [0.05, 0.5])
def test_trace_of_zero_is_never_within_a_relative_error(method, rtol):
    values = torch.cat([torch.linspace(0.1, 2, SIZE // 2), torch.linspace(-0.1, -2, SIZE // 2)])
    matrix = matrix_with_spectrum(values.double(), 3, torch.float64)
    for seed in range(20):
        with pytest.warns(fm.ConvergenceWarning, match="too close to zero"):
            result = fm.trace(
                hidden(matrix), method=method, rtol=rtol, products=140, seed=seed, progress=False
            )
        assert result.outcome is fm.Outcome.ABOVE_RTOL
        assert abs(result.value) <= 5 * result.standard_error


def test_a_small_operator_is_computed_whole_when_the_looks_come_that_far():
    values = torch.linspace(-1, 1, 30).double()
    operator = hidden(matrix_with_spectrum(values, 3, torch.float64))
    result = fm.trace(operator, rtol=0.01)
    assert result.outcome is fm.Outcome.EXACT
    assert abs(result.value) < 1e-13
    assert result.products == operator.multiplied == 24 + 30


def test_where_the_sketch_may_grow_no_further_the_rest_is_sampled(monkeypatch):
    matrix = MATRICES["flat"]
    monkeypatch.setattr(trace_module, "SKETCH_BYTES", 45 * SIZE * 8)
    exact = float(matrix.trace())
    errors = []
    for seed in range(100):
        result = fm.trace(hidden(matrix), rtol=0.004, products=299, seed=seed, progress=False)
        assert (result.method, result.outcome) == ("hutch++", fm.Outcome.WITHIN_RTOL)
        errors.append([result.value - exact, result.standard_error])
    assert 0.88 <= inside(*torch.tensor(errors).double().T) <= 1
    assert result.products > 36


def test_known_diagonals_and_zero_need_no_looks():
    assert fm.trace(fm.MatrixOperator(FULL), rtol=0.1).outcome is fm.Outcome.EXACT
    nothing = fm.FunctionOperator(lambda v: 0 * v, 500)
    for method in METHODS:
        result = fm.trace(nothing, method=method, rtol=0.1)
        assert (result.value, result.standard_error) == (0.0, 0.0)
        assert result.outcome is fm.Outcome.WITHIN_RTOL


@pytest.mark.parametrize(("limit", "last"), [(24, [24]), (28, [28]), (29, [24, 29])])
def test_the_last_look_adds_a_fifth_at_least(limit, last):
    assert list(stopping.schedule_looks(limit, 0.1)[0]) == last


# ----------------------------------------------------------------------------------------- blocks


@pytest.fixture(scope="module")
def net():
    case = build("mlp_batch_norm_dropout")
    hessian = dense_hessian(case)
    return fm.HessianOperator(case.objective()), hessian


def test_agrees_with_the_hessian_of_a_net_within_its_error(net):
    operator, hessian = net
    exact = float(hessian.trace())
    for method in METHODS:
        result = fm.trace(operator, method=method, products=60)
        assert 0 < result.standard_error < 0.5 * abs(exact)
        assert abs(result.value - exact) < 4 * result.standard_error


@EVERY_METHOD
def test_blocks_of_tensors_and_modules_add_up(method, net):
    operator, _ = net
    layout = operator.layout
    result = fm.trace(operator, method=method, products=40)
    assert [block.name for block in result.tensors] == list(layout.names)
    assert [block.size for block in result.tensors] == list(layout.sizes)
    assert math.fsum(b.value for b in result.tensors) == pytest.approx(result.value, rel=1e-9)
    assert math.fsum(b.value for b in result.modules) == pytest.approx(result.value, rel=1e-9)
    owners = {name.rpartition(".")[0]: None for name in layout.names}
    assert [block.name for block in result.modules] == list(owners)
    for module in result.modules:
        own = [b for b in result.tensors if b.name.rpartition(".")[0] == module.name]
        assert module.size == sum(b.size for b in own)
        assert module.value == pytest.approx(math.fsum(b.value for b in own), rel=1e-9, abs=1e-12)


@EVERY_METHOD
def test_blocks_have_the_traces_of_the_dense_blocks_within_their_errors(method, net):
    operator, hessian = net
    layout = operator.layout
    places = dict(layout.slices())
    exact = torch.stack([hessian.diagonal()[place].sum() for place in places.values()])
    dense = hidden(hessian.double(), layout)
    found = []
    for seed in range(100):
        result = fm.trace(dense, method=method, products=40, seed=seed, progress=False)
        found.append([[b.value, b.standard_error] for b in result.tensors])
    values, told = torch.tensor(found).double().unbind(dim=2)
    misses = values - exact
    assert bool((misses.mean(dim=0).abs() <= 0.4 * misses.std(dim=0) + 1e-12).all())
    assert 0.90 <= inside(misses, told) <= 0.995
    # Told and met errors of each tensor agree, those that cancel but for rounding aside.
    met = misses.square().mean(dim=0).sqrt()
    large = met > 1e-6 * float(met.max())
    ratio = (told.square().mean(dim=0).sqrt() / met)[large]
    assert bool(((ratio > 0.6) & (ratio < 1.8)).all())


def test_operators_without_parameters_have_no_blocks():
    result = fm.trace(hidden(FULL), products=10)
    assert result.tensors == result.modules == ()


def test_the_table_shows_the_modules_with_the_largest_traces():
    torch.manual_seed(0)
    layers = [nn.Linear(3, 3) for _ in range(15)]
    data = (torch.randn(20, 3), torch.randn(20, 3))
    objective = fm.Objective(nn.Sequential(*layers), nn.MSELoss(), data)
    result = fm.trace(fm.HessianOperator(objective), products=20)
    rows = result.table().rows
    assert [row[0] for row in rows[:2]] == ["trace", "mean eigenvalue"]
    shown = [row[0] for row in rows[2:]]
    by_size = sorted(result.modules, key=lambda block: -abs(block.value))
    assert shown == [b.name for b in result.modules if b in by_size[:12]]
    assert "3 modules with smaller traces are in `modules`." in result.table().notes


def test_a_model_of_one_module_is_one_row():
    objective = fm.Objective(nn.Linear(2, 1), nn.MSELoss(), (torch.eye(2), torch.zeros(2, 1)))
    result = fm.trace(fm.HessianOperator(objective))
    assert len(result.table().rows) == 2
    assert [block.name for block in result.modules] == [""]


@EVERY_METHOD
@pytest.mark.parametrize("name", ["lstm_language_model", "hardsigmoid"])
def test_recurrent_nets_and_differences_serve_too(method, name):
    case = build(name, torch.float64)
    operator = fm.HessianOperator(case.objective())
    with pytest.warns(fm.FiniteDifferenceWarning) if case.approximate else contextlib.nullcontext():
        result = fm.trace(operator, method=method, products=20)
    hessian = cached_dense_hessian(name, torch.float64)
    slack = 20 * operator.error * operator.shape[0]
    assert abs(result.value - float(hessian.trace())) <= 5 * result.standard_error + slack


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("products", [1, 0, -3])
def test_fewer_than_two_products_are_refused(products):
    with pytest.raises(fm.InvalidArgumentError, match="'products' argument of trace"):
        fm.trace(fm.MatrixOperator(FULL), products=products)


@pytest.mark.parametrize("method", SKETCHING)
def test_fewer_than_four_products_are_no_sketch(method):
    with pytest.raises(fm.InvalidArgumentError, match=r"'products' argument of trace.*≥ 4"):
        fm.trace(fm.MatrixOperator(FULL), method=method, products=3)


@pytest.mark.parametrize("products", [10.0, "10", True])
def test_products_that_are_no_integer_are_refused(products):
    with pytest.raises(fm.ArgumentTypeError, match="'products' argument of trace"):
        fm.trace(fm.MatrixOperator(FULL), products=products)


@pytest.mark.parametrize("rtol", [0.0, -0.1, 1.0, 3.0, math.nan, math.inf])
def test_rtol_must_lie_between_zero_and_one(rtol):
    with pytest.raises(fm.InvalidArgumentError, match="'rtol' argument of trace"):
        fm.trace(hidden(FULL), rtol=rtol)


def test_unknown_method_is_told_the_closest():
    with pytest.raises(fm.InvalidArgumentError, match=r"Did you mean 'hutch\+\+'"):
        fm.trace(hidden(FULL), method="hutch+")


@EVERY_METHOD
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_product_that_is_not_finite_raises(method, bad):
    operator = fm.FunctionOperator(lambda v: v * bad, 40)
    with pytest.raises(fm.NonFiniteError, match="NaN or infinity"):
        fm.trace(operator, method=method, products=6)
    with pytest.raises(fm.NonFiniteError, match="NaN or infinity"):
        fm.trace(operator, products=40)


def test_matrix_in_place_of_an_operator_is_refused_with_advice():
    with pytest.raises(fm.ArgumentTypeError, match=r"fm\.MatrixOperator\(matrix\)"):
        fm.trace(torch.eye(3))


def test_table_tells_the_mean_eigenvalue_too():
    result = fm.trace(fm.MatrixOperator(2 * torch.eye(4)), method="hutchinson", products=3)
    assert [row[1] for row in result.table().rows] == ["8", "2"]
