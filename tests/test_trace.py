"""Hutchinson's estimator: exact where it must be, unbiased, with an honest standard error."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

import flatminima as fm
from flatminima.estimators import trace as trace_module
from zoo import build, dense_hessian, matrix_with_spectrum

FULL = matrix_with_spectrum(torch.linspace(-2, 9, 25).double(), 1, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "diagonal", [[3.0], [1.0, -4.0, 2.5, 0.0], [0.0] * 5, list(range(-10, 20))]
)
def test_exact_on_diagonal_matrices_with_no_error(diagonal, dtype):
    matrix = torch.diag(torch.tensor(diagonal, dtype=dtype))
    result = fm.trace(fm.MatrixOperator(matrix), products=7)
    assert result.value == sum(diagonal)
    assert result.standard_error == 0.0
    assert (result.size, result.products) == (len(diagonal), 7)
    assert result.outcome is fm.Outcome.COMPLETED


def test_agrees_with_the_hessian_of_a_net_within_its_error():
    case = build("mlp_batch_norm_dropout")
    exact = float(dense_hessian(case).trace())
    result = fm.trace(fm.HessianOperator(case.objective()), products=400)
    assert 0 < result.standard_error < 0.2 * abs(exact)
    assert abs(result.value - exact) < 4 * result.standard_error


@pytest.fixture(scope="module")
def many():
    operator = fm.MatrixOperator(FULL)
    return [fm.trace(operator, products=30, seed=seed) for seed in range(200)]


def test_unbiased_over_many_seeds(many):
    values = [r.value for r in many]
    error = statistics.stdev(values) / math.sqrt(len(values))
    assert abs(statistics.fmean(values) - float(FULL.trace())) < 4 * error


def test_spread_over_seeds_is_what_theory_says(many):
    off_diagonal = float((FULL**2).sum() - (FULL.diagonal() ** 2).sum())
    expected = math.sqrt(2 * off_diagonal / 30)
    # The standard deviation of 200 values is itself known to 1 / √400 = 5 %.
    assert statistics.stdev(r.value for r in many) == pytest.approx(expected, rel=0.2)
    assert statistics.fmean(r.standard_error for r in many) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("products", [2, 3, 12])
def test_value_and_error_are_mean_and_standard_error_of_the_samples(products):
    samples = []

    def product(vector: torch.Tensor) -> torch.Tensor:
        samples.append(float(vector @ FULL @ vector))
        return FULL @ vector

    result = fm.trace(fm.FunctionOperator(product, 25, dtype=torch.float64), products=products)
    assert len(samples) == products
    assert result.value == pytest.approx(statistics.fmean(samples), rel=1e-12)
    error = statistics.stdev(samples) / math.sqrt(products)
    assert result.standard_error == pytest.approx(error, rel=1e-9)


def test_standard_error_covers_the_truth_as_often_as_it_should(many):
    exact = float(FULL.trace())
    within_one = sum(abs(r.value - exact) <= r.standard_error for r in many)
    within_two = sum(abs(r.value - exact) <= 2 * r.standard_error for r in many)
    # Student's t with 29 degrees of freedom: 67.5 % and 94.5 %, each ± 4 binomial deviations.
    assert 108 <= within_one <= 162
    assert 176 <= within_two <= 200


@pytest.mark.parametrize("width", [1, 3, 7, 100])
@pytest.mark.parametrize("products", [2, 7, 40])
def test_width_of_a_block_changes_neither_draws_nor_count(products, width, monkeypatch):
    calls = [0]
    seen = []

    def product(vector: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        seen.append(vector)
        return FULL @ vector

    operator = fm.FunctionOperator(product, 25, dtype=torch.float64)
    whole = fm.trace(operator, products=products)
    vectors = list(seen)
    seen.clear()
    monkeypatch.setattr(trace_module, "BLOCK_BYTES", width * 25 * 8)
    blocked = fm.trace(operator, products=products)
    assert calls[0] == 2 * products
    assert torch.equal(torch.stack(vectors), torch.stack(seen))
    assert blocked == whole


def test_a_row_larger_than_the_budget_still_goes_through(monkeypatch):
    monkeypatch.setattr(trace_module, "BLOCK_BYTES", 1)
    assert fm.trace(fm.MatrixOperator(torch.eye(6)), products=3).value == 6.0


def test_blocks_stay_within_the_budget(monkeypatch):
    monkeypatch.setattr(trace_module, "BLOCK_BYTES", 4 * 25 * 8)
    heights = []
    operator = fm.MatrixOperator(FULL)
    original = operator._products

    def watched(vectors: torch.Tensor) -> torch.Tensor:
        heights.append(len(vectors))
        return original(vectors)

    monkeypatch.setattr(operator, "_products", watched)
    fm.trace(operator, products=10)
    assert heights == [4, 4, 2]


def test_vectors_are_signs():
    seen = []
    operator = fm.FunctionOperator(lambda v: seen.append(v) or v, 50)
    fm.trace(operator, products=20)
    signs = torch.stack(seen)
    assert bool((signs.abs() == 1).all())
    assert abs(float(signs.mean())) < 4 / math.sqrt(signs.numel())


def test_same_seed_gives_the_same_bits_and_a_generator_serves():
    operator = fm.MatrixOperator(FULL)
    first = fm.trace(operator, products=5, seed=3)
    assert first == fm.trace(operator, products=5, seed=3)
    assert first == fm.trace(operator, products=5, seed=torch.Generator().manual_seed(3))
    assert first != fm.trace(operator, products=5, seed=4)


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    fm.trace(fm.MatrixOperator(FULL), products=5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("products", [1, 0, -3])
def test_fewer_than_two_products_are_refused(products):
    with pytest.raises(fm.InvalidArgumentError, match="'products' argument of trace"):
        fm.trace(fm.MatrixOperator(FULL), products=products)


@pytest.mark.parametrize("products", [10.0, "10", None, True])
def test_products_that_are_no_integer_are_refused(products):
    with pytest.raises(fm.ArgumentTypeError, match="'products' argument of trace"):
        fm.trace(fm.MatrixOperator(FULL), products=products)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_product_that_is_not_finite_raises(bad):
    with pytest.raises(fm.NonFiniteError, match="NaN or infinity"):
        fm.trace(fm.FunctionOperator(lambda v: v * bad, 4), products=3)


def test_matrix_in_place_of_an_operator_is_refused_with_advice():
    with pytest.raises(fm.ArgumentTypeError, match=r"fm\.MatrixOperator\(matrix\)"):
        fm.trace(torch.eye(3))


def test_table_tells_the_mean_eigenvalue_too():
    result = fm.trace(fm.MatrixOperator(2 * torch.eye(4)), products=3)
    assert [row[1] for row in result.table().rows] == ["8", "2"]
