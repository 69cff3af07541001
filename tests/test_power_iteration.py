"""Deflated power iteration, on the spectra it can handle and on those it cannot."""

from __future__ import annotations

import math

import pytest
import torch

import flatminima as fm
from zoo import matrix_with_spectrum

N = 40

SPECTRA = {
    "positive": [10.0, 7.0, 4.0, 2.0, *torch.linspace(0, 0.5, N - 4).tolist()],
    "negative": [-10.0, -7.0, -4.0, -2.0, *torch.linspace(-0.5, 0, N - 4).tolist()],
    "indefinite": [-10.0, 7.0, -4.0, 2.0, *torch.linspace(-0.5, 0.5, N - 4).tolist()],
    "low rank": [10.0, -7.0, 4.0, *([0.0] * (N - 3))],
    "repeated": [5.0, 5.0, 5.0, -2.0, -2.0, *torch.linspace(-0.3, 0.3, N - 5).tolist()],
    "identity": [1.0] * N,
    "zero": [0.0] * N,
}


def by_magnitude(spectrum: list[float], k: int) -> torch.Tensor:
    return torch.tensor(sorted(spectrum, key=abs, reverse=True)[:k], dtype=torch.float64)


def assert_true_residuals(result: fm.EigenResult, matrix: torch.Tensor, tol: float) -> None:
    wide, vectors = matrix.double(), result.eigenvectors.double()
    eps = 100 * float(torch.finfo(result.eigenvectors.dtype).eps)
    norm = float(torch.linalg.matrix_norm(wide, 2))
    identity = torch.eye(vectors.shape[1], dtype=torch.float64)
    torch.testing.assert_close(vectors.T @ vectors, identity, rtol=0, atol=eps)
    true = torch.linalg.vector_norm(wide @ vectors - vectors * result.eigenvalues, dim=0)
    torch.testing.assert_close(result.residuals, true, rtol=1e-3, atol=eps * norm)
    assert bool((true <= tol * norm + eps * norm).all())


@pytest.mark.parametrize(
    ("dtype", "tol"), [(torch.float64, 1e-10), (torch.float64, 1e-3), (torch.float32, 1e-4)]
)
@pytest.mark.parametrize("name", SPECTRA)
def test_largest_magnitudes_with_their_signs(name, dtype, tol):
    matrix = matrix_with_spectrum(SPECTRA[name], 1, dtype)
    result = fm.power_iteration(fm.MatrixOperator(matrix), k=3, tol=tol)
    assert result.outcome is fm.Outcome.CONVERGED
    assert (result.method, result.which) == ("power_iteration", "LM")
    assert_true_residuals(result, matrix, tol)
    torch.testing.assert_close(
        result.eigenvalues, by_magnitude(SPECTRA[name], 3), rtol=0, atol=10 * tol
    )


@pytest.mark.parametrize("n", [1, 2, 5])
def test_k_equal_to_n_gives_the_whole_spectrum(n):
    spectrum = [8.0, -4.0, 2.0, -1.0, 0.0][:n]
    matrix = matrix_with_spectrum(spectrum, 2, torch.float64)
    result = fm.power_iteration(fm.MatrixOperator(matrix), k=n, tol=1e-9)
    assert result.eigenvalues.tolist() == pytest.approx(spectrum, abs=1e-7)
    assert_true_residuals(result, matrix, 1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_a_true_three_is_not_reported_as_two_and_a_half(seed):
    spectrum = [3.0, 2.5, 2.4, *torch.linspace(-1, 2, 30).tolist()]
    matrix = matrix_with_spectrum(spectrum, 3, torch.float64)
    result = fm.power_iteration(fm.MatrixOperator(matrix), tol=1e-3, seed=seed)
    assert result.converged
    assert result.eigenvalues.item() == pytest.approx(3.0, abs=3e-3)


def test_agrees_with_lanczos():
    matrix = matrix_with_spectrum(SPECTRA["indefinite"], 4, torch.float64)
    operator = fm.MatrixOperator(matrix)
    power = fm.power_iteration(operator, k=4, tol=1e-8)
    lanczos = fm.lanczos(operator, k=4, which="LM", tol=1e-8)
    torch.testing.assert_close(power.eigenvalues, lanczos.eigenvalues, rtol=0, atol=1e-6)
    overlap = (power.eigenvectors.T @ lanczos.eigenvectors).abs()
    torch.testing.assert_close(overlap, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-5)
    assert power.products > lanczos.products


def test_a_pair_of_opposite_signs_never_converges_and_says_so():
    matrix = matrix_with_spectrum([4.0, -4.0, *([0.1] * 10)], 5, torch.float64)
    with pytest.warns(fm.ConvergenceWarning, match="power_iteration: 1 of 1 eigenpairs") as caught:
        result = fm.power_iteration(fm.MatrixOperator(matrix), max_products=200)
    assert caught[0].filename == __file__
    assert result.outcome is fm.Outcome.PRODUCT_LIMIT
    assert result.products == 200
    assert float(result.residuals[0]) > 0.1
    assert_true_residuals(result, matrix, math.inf)


def test_strict_raises_with_the_result_in_hand():
    matrix = matrix_with_spectrum([4.0, -4.0, 1.0], 5, torch.float64)
    with pytest.raises(fm.ConvergenceError) as caught:
        fm.power_iteration(fm.MatrixOperator(matrix), max_products=20, strict=True)
    assert caught.value.result.products == 20


@pytest.mark.parametrize("limit", [3, 4, 10, None])
@pytest.mark.parametrize("name", ["positive", "repeated", "zero", "low rank"])
@pytest.mark.filterwarnings("ignore::flatminima.ConvergenceWarning")
def test_products_are_counted_exactly_and_within_the_limit(name, limit):
    matrix = matrix_with_spectrum(SPECTRA[name], 6, torch.float64)
    calls = [0]

    def product(vector: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return matrix @ vector

    operator = fm.FunctionOperator(product, N, dtype=torch.float64)
    result = fm.power_iteration(operator, k=3, tol=1e-6, max_products=limit)
    assert result.products == calls[0] <= (limit or 3000)
    assert len(result.eigenvalues) == 3


def test_same_seed_gives_the_same_bits_and_a_generator_serves():
    operator = fm.MatrixOperator(matrix_with_spectrum(SPECTRA["positive"], 7, torch.float32))
    first = fm.power_iteration(operator, k=2, seed=3)
    assert first == fm.power_iteration(operator, k=2, seed=3)
    assert first == fm.power_iteration(operator, k=2, seed=torch.Generator().manual_seed(3))
    assert first != fm.power_iteration(operator, k=2, seed=4)


@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_scaling_the_matrix_scales_the_answer_and_costs_the_same(factor):
    matrix = matrix_with_spectrum(SPECTRA["indefinite"], 8, torch.float64)
    plain = fm.power_iteration(fm.MatrixOperator(matrix), k=3)
    scaled = fm.power_iteration(fm.MatrixOperator(matrix * factor), k=3)
    assert scaled.products == plain.products
    torch.testing.assert_close(scaled.eigenvalues, plain.eigenvalues * factor)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_product_that_is_not_finite_raises(bad):
    operator = fm.FunctionOperator(lambda v: v * bad, 4)
    with pytest.raises(fm.NonFiniteError, match="NaN or infinity"):
        fm.power_iteration(operator)


SMALL = fm.MatrixOperator(torch.diag(torch.tensor([4.0, 2.0, 1.0])))


@pytest.mark.parametrize("k", [0, 4, -1])
def test_k_outside_one_to_n_is_refused(k):
    with pytest.raises(fm.InvalidArgumentError, match="'k' argument of power_iteration"):
        fm.power_iteration(SMALL, k=k)


@pytest.mark.parametrize("k", [1.0, True, None])
def test_k_that_is_no_integer_is_refused(k):
    with pytest.raises(fm.ArgumentTypeError, match="'k' argument of power_iteration"):
        fm.power_iteration(SMALL, k=k)


@pytest.mark.parametrize("tol", [0.0, -1.0, 1e-9, math.nan])
def test_tolerance_that_cannot_be_met_is_refused(tol):
    with pytest.raises(fm.InvalidArgumentError, match="'tol' argument of power_iteration"):
        fm.power_iteration(SMALL, tol=tol)


def test_limit_below_k_is_refused():
    with pytest.raises(fm.InvalidArgumentError, match="'max_products' argument"):
        fm.power_iteration(SMALL, k=2, max_products=1)


def test_matrix_in_place_of_an_operator_is_refused_with_advice():
    with pytest.raises(fm.ArgumentTypeError, match=r"fm\.MatrixOperator\(matrix\)"):
        fm.power_iteration(torch.eye(3))
