"""Diagonals: exact where they must be, unbiased, with an honest standard error for each entry."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import flatminima as fm
from flatminima.algorithms.estimators import diagonal as diagonal_module
from flatminima.algorithms.estimators import probes
from flatminima.algorithms.estimators.probes import t_factor
from spectra import MATRICES, SIZE, hidden, inside, low_rank
from zoo import build, dense_hessian

METHODS = ("hutchinson", "xdiag")
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)
EVERY_MATRIX = pytest.mark.parametrize("name", MATRICES)
FLAT = MATRICES["flat"]


@pytest.fixture(scope="module")
def runs():
    """For each method and matrix the errors and standard errors of 60 seeds, (60, 2, n)."""
    found = {}
    for name, matrix in MATRICES.items():
        operator = hidden(matrix)
        for method in METHODS:
            results = [
                fm.diagonal(operator, method=method, products=48, seed=seed, progress=False)
                for seed in range(60)
            ]
            found[method, name] = torch.stack(
                [torch.stack([r.values - matrix.diagonal(), r.standard_error]) for r in results]
            )
    return found


@EVERY_MATRIX
@EVERY_METHOD
def test_truth_lies_within_two_standard_errors_as_often_as_it_should(method, name, runs):
    errors, told = runs[method, name].unbind(dim=1)
    assert 0.92 <= inside(errors, told) <= 0.98
    met = errors.square().mean().sqrt()
    assert float(told.square().mean().sqrt() / met) == pytest.approx(1, abs=0.25)


@EVERY_MATRIX
@EVERY_METHOD
def test_unbiased_over_many_seeds(method, name, runs):
    errors = runs[method, name][:, 0]
    scores = errors.mean(dim=0) / (errors.std(dim=0) / math.sqrt(len(errors)))
    assert float(scores.abs().max()) < 6
    assert float(scores.square().mean()) == pytest.approx(1, abs=0.5)


@pytest.mark.parametrize("name", ["decaying", "exponential", "outliers and a bulk"])
def test_sketches_pay_where_few_eigenvalues_are_large(name, runs):
    hutchinson, xdiag = (float(runs[method, name][:, 0].norm()) for method in METHODS)
    assert xdiag < 0.3 * hutchinson


def test_variance_of_hutchinson_is_what_theory_says(runs):
    matrix = MATRICES["indefinite"]
    expected = (matrix.square().sum(dim=1) - matrix.diagonal().square()) / 48
    met = runs["hutchinson", "indefinite"][:, 0].square().mean(dim=0)
    assert float((met / expected).mean()) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("products", [2, 3, 12])
def test_hutchinson_is_mean_and_widened_standard_error_of_the_samples(products):
    samples = []

    def product(vector: torch.Tensor) -> torch.Tensor:
        samples.append(vector * (FLAT @ vector))
        return FLAT @ vector

    operator = fm.FunctionOperator(product, SIZE, dtype=torch.float64)
    result = fm.diagonal(operator, method="hutchinson", products=products)
    wanted = torch.stack(samples)
    assert torch.allclose(result.values, wanted.mean(dim=0), rtol=1e-12)
    error = t_factor(products) * wanted.std(dim=0) / math.sqrt(products)
    assert torch.allclose(result.standard_error, error, rtol=1e-9)


@EVERY_METHOD
def test_diagonal_matrices(method):
    exact = torch.linspace(-3, 5, 60).double()
    result = fm.diagonal(hidden(torch.diag(exact)), method=method, products=20)
    if method == "hutchinson":
        assert torch.allclose(result.values, exact, rtol=1e-14)
        assert float(result.standard_error.max()) < 1e-14
    else:
        assert inside(result.values - exact, result.standard_error) > 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 4, 9])
def test_xdiag_is_exact_where_the_rank_is_below_the_sketch(rank, dtype):
    matrix = low_rank(rank, dtype) if rank else torch.zeros(SIZE, SIZE, dtype=dtype)
    for seed in range(10):
        result = fm.diagonal(hidden(matrix), method="xdiag", products=33, seed=seed)
        missed = (result.values - matrix.diagonal()).abs()
        assert bool((missed <= 2 * result.standard_error).all())
        assert float(result.standard_error.max()) <= 200 * torch.finfo(dtype).eps


@pytest.mark.parametrize("products", [4, 5, 6, 7, 23, 48])
@EVERY_METHOD
def test_products_are_all_that_were_asked_for_and_no_more(method, products):
    operator = hidden(FLAT)
    result = fm.diagonal(operator, method=method, products=products)
    wanted = products - products % 2 if method == "xdiag" else products
    assert result.products == operator.multiplied == wanted
    assert (result.method, result.outcome) == (method, fm.Outcome.COMPLETED)
    assert result.values.shape == result.standard_error.shape == (SIZE,)
    assert result.values.dtype == torch.float64


@EVERY_METHOD
def test_blocks_stay_within_the_budget_and_change_nothing_but_rounding(method, monkeypatch):
    whole = fm.diagonal(hidden(FLAT), method=method, products=30)
    monkeypatch.setattr(probes, "BLOCK_BYTES", 4 * SIZE * 8)
    operator = hidden(FLAT)
    blocked = fm.diagonal(operator, method=method, products=30)
    assert max(operator.heights) == 4
    assert torch.allclose(blocked.values, whole.values, rtol=1e-11)
    assert torch.allclose(blocked.standard_error, whole.standard_error, rtol=1e-8)


@EVERY_METHOD
def test_same_seed_gives_the_same_bits_and_a_generator_serves(method):
    first = fm.diagonal(hidden(FLAT), method=method, products=6, seed=3)
    assert first == fm.diagonal(hidden(FLAT), method=method, products=6, seed=3)
    generator = torch.Generator().manual_seed(3)
    assert first == fm.diagonal(hidden(FLAT), method=method, products=6, seed=generator)
    assert first != fm.diagonal(hidden(FLAT), method=method, products=6, seed=4)


@EVERY_METHOD
def test_global_random_state_is_left_alone(method):
    before = torch.get_rng_state()
    fm.diagonal(hidden(FLAT), method=method, products=6)
    assert torch.equal(torch.get_rng_state(), before)


# --------------------------------------------------------------------------------- exact and auto


@pytest.mark.parametrize("method", ["auto", "exact"])
def test_a_diagonal_that_is_known_is_taken(method):
    result = fm.diagonal(fm.MatrixOperator(FLAT), method=method)
    assert torch.equal(result.values, FLAT.diagonal())
    assert torch.count_nonzero(result.standard_error) == 0
    assert (result.products, result.method) == (0, "exact")
    assert result.outcome is fm.Outcome.EXACT


@pytest.mark.parametrize(("method", "products"), [("auto", SIZE), ("xdiag", SIZE), ("exact", None)])
@pytest.mark.parametrize("width", [1, 7, 1000])
def test_as_many_products_as_rows_give_it_exactly(method, products, width, monkeypatch):
    monkeypatch.setattr(probes, "BLOCK_BYTES", width * SIZE * 8)
    operator = hidden(MATRICES["indefinite"])
    result = fm.diagonal(operator, method=method, products=products)
    assert torch.allclose(result.values, MATRICES["indefinite"].diagonal(), rtol=1e-13)
    assert (result.outcome, result.relative_error) == (fm.Outcome.EXACT, 0.0)
    assert result.products == operator.multiplied == SIZE


def test_exact_with_more_products_than_allowed_is_refused_with_the_way_out(monkeypatch):
    with pytest.raises(fm.InvalidArgumentError, match=r"takes 150 products.*Pass products=150"):
        fm.diagonal(hidden(FLAT), method="exact", products=149)
    monkeypatch.setattr(diagonal_module, "EXACT_LIMIT", 100)
    with pytest.raises(fm.InvalidArgumentError, match=r"more than 100.*'xdiag' or 'hutchinson'"):
        fm.diagonal(hidden(FLAT), method="exact")
    assert fm.diagonal(hidden(FLAT), method="exact", products=150).products == SIZE


@pytest.mark.parametrize(("room", "method"), [(150, "xdiag"), (149, "hutchinson")])
def test_the_vectors_that_are_kept_stay_within_the_budget(room, method, monkeypatch):
    monkeypatch.setattr(diagonal_module, "SKETCH_BYTES", room * SIZE * 8)
    assert fm.diagonal(hidden(FLAT), products=100).method == method


def test_half_precision_goes_to_hutchinson_and_a_sketch_of_it_is_refused():
    operator = fm.FunctionOperator(lambda v: 2 * v, 500, dtype=torch.bfloat16)
    result = fm.diagonal(operator, products=10)
    assert result.method == "hutchinson"
    assert bool((result.values == 2).all())
    with pytest.raises(fm.InvalidArgumentError, match=r"'method'.*'hutchinson'.*bfloat16"):
        fm.diagonal(operator, method="xdiag", products=10)


# ------------------------------------------------------------------------------------------ rtol


@pytest.mark.parametrize("name", ["decaying", "flat", "outliers and a bulk"])
@EVERY_METHOD
def test_error_is_within_what_was_asked_for(method, name):
    exact = MATRICES[name].diagonal()
    for seed in range(20):
        result = fm.diagonal(
            hidden(MATRICES[name]), method=method, rtol=0.2, products=10**4, seed=seed
        )
        assert result.outcome in (fm.Outcome.WITHIN_RTOL, fm.Outcome.EXACT)
        assert float((result.values - exact).norm()) <= 0.25 * float(exact.norm())
        assert result.relative_error <= 0.2


@EVERY_METHOD
def test_limit_warns_and_says_what_was_reached(method):
    operator = hidden(MATRICES["indefinite"])
    with pytest.warns(
        fm.ConvergenceWarning, match=r"diagonal: the limit of 60 products.*rtol=0.01"
    ):
        result = fm.diagonal(operator, method=method, rtol=0.01, products=60)
    assert result.outcome is fm.Outcome.ABOVE_RTOL
    with pytest.raises(fm.ConvergenceError) as caught:
        fm.diagonal(operator, method=method, rtol=0.01, products=60, strict=True)
    assert caught.value.result == result


def test_a_relative_error_can_be_reached_by_computing_everything():
    result = fm.diagonal(hidden(MATRICES["indefinite"]), rtol=1e-3)
    assert (result.outcome, result.method) == (fm.Outcome.EXACT, "exact")
    assert result.products <= 1000


# ------------------------------------------------------------------------------------------- nets


@EVERY_METHOD
def test_agrees_with_the_hessian_of_a_net_within_its_error(method):
    case = build("mlp_batch_norm_dropout")
    exact = dense_hessian(case).diagonal().double()
    operator = fm.HessianOperator(case.objective())
    result = fm.diagonal(operator, method=method, products=60)
    missed = result.values.double() - exact
    slack = 1e-6 * float(exact.abs().max())
    assert bool((missed.abs() <= 6 * result.standard_error + slack).all())
    assert inside(missed, result.standard_error + slack) > 0.85
    named = result.named()
    assert list(named) == list(operator.layout.names)
    for name, place in operator.layout.slices():
        assert torch.equal(named[name].flatten(), result.values[place])
    assert [n.shape for n in named.values()] == list(operator.layout.shapes)


def test_operators_without_parameters_have_no_names():
    result = fm.diagonal(hidden(FLAT), products=10)
    assert result.named() == {}
    assert [row[0] for row in result.table().rows] == ["all"]


def test_table_has_a_row_for_each_tensor():
    data = (torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))
    objective = fm.Objective(nn.Linear(2, 1), nn.MSELoss(), data)
    rows = fm.diagonal(fm.HessianOperator(objective)).table().rows
    assert [row[:5] for row in rows] == [
        ("all", "3", "2.333", "1", "4"),
        ("weight", "2", "2.5", "1", "4"),
        ("bias", "1", "2", "2", "2"),
    ]


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(("method", "products"), [("auto", 1), ("hutchinson", 0), ("xdiag", 3)])
def test_too_few_products_are_refused(method, products):
    with pytest.raises(fm.InvalidArgumentError, match="'products' argument of diagonal"):
        fm.diagonal(hidden(FLAT), method=method, products=products)


@pytest.mark.parametrize("rtol", [0.0, -0.1, 1.0, math.nan])
def test_rtol_must_lie_between_zero_and_one(rtol):
    with pytest.raises(fm.InvalidArgumentError, match="'rtol' argument of diagonal"):
        fm.diagonal(hidden(FLAT), rtol=rtol)


def test_unknown_method_is_told_the_closest():
    with pytest.raises(fm.InvalidArgumentError, match="Did you mean 'xdiag'"):
        fm.diagonal(hidden(FLAT), method="xdiagonal")


@pytest.mark.parametrize("method", ["auto", "exact", *METHODS])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_product_that_is_not_finite_raises(method, bad):
    operator = fm.FunctionOperator(lambda v: v * bad, 40)
    with pytest.raises(fm.NonFiniteError, match="NaN or infinity"):
        fm.diagonal(operator, method=method, products=40 if method == "exact" else 6)


def test_matrix_in_place_of_an_operator_is_refused_with_advice():
    with pytest.raises(fm.ArgumentTypeError, match=r"fm\.MatrixOperator\(matrix\)"):
        fm.diagonal(torch.eye(3))


def test_exact_with_a_tolerance_is_exact():
    matrix = torch.diag(torch.arange(5.0))
    operator = fm.FunctionOperator(lambda v: matrix @ v, 5)
    result = fm.diagonal(operator, method="exact", rtol=0.1)
    assert torch.equal(result.values, matrix.diagonal())
    assert result.outcome is fm.Outcome.EXACT
