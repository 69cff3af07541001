"""Lanczos against matrices whose spectrum was chosen, and against ARPACK on a trained net."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from sklearn.datasets import load_digits
from torch import nn

import flatminima as fm
from flatminima.algorithms.eigen.chain import select
from flatminima.algorithms.eigen.lanczos import LanczosSteps
from zoo import matrix_with_spectrum

N = 80

SPECTRA = {
    "spread": torch.linspace(-1, 10, N, dtype=torch.float64),
    "geometric": 0.9 ** torch.arange(N, dtype=torch.float64),
    "clustered at the top": torch.cat(
        [10 - 1e-3 * torch.arange(6), torch.linspace(0, 1, N - 6)]
    ).double(),
    "repeated": torch.tensor([5.0] * 4 + [3.0] * 3 + [1.0] * 10 + [0.0] * (N - 17)).double(),
    "indefinite": torch.cat(
        [torch.linspace(-8, -1, N // 2), torch.linspace(1, 7, N // 2)]
    ).double(),
    "pairs of both signs": torch.cat(
        [torch.arange(1, N // 2 + 1), -torch.arange(1, N // 2 + 1)]
    ).double(),
    "negative": torch.linspace(-9, -2, N).double(),
    "low rank": torch.cat([torch.tensor([7.0, 4.0, -2.0]), torch.zeros(N - 3)]).double(),
    "outliers on a bulk": torch.cat(
        [torch.tensor([40.0, 25.0, 12.0, -6.0]), torch.linspace(-0.1, 0.3, N - 4)]
    ).double(),
    "one among zeros": torch.cat([torch.ones(1), torch.zeros(N - 1)]).double(),
    "zero": torch.zeros(N).double(),
    "identity": torch.ones(N).double(),
    "negative identity": -torch.ones(N).double(),
    "two values": torch.tensor([2.0] * (N // 2) + [-2.0] * (N // 2)).double(),
}


# The lower end of this one has gaps far below every tolerance: see the test of its own.
HARD = {("geometric", "SA"), ("geometric", "BE")}
ENDS = [
    pytest.param(name, which, id=f"{name}-{which}")
    for name in SPECTRA
    for which in ("LA", "SA", "LM", "BE")
    if (name, which) not in HARD
]


def wanted(spectrum: torch.Tensor, which: str, k: int) -> torch.Tensor:
    """The k eigenvalues that `which` names, best first, by sorting."""
    ascending = spectrum.double().sort().values
    if which == "LA":
        return ascending.flip(0)[:k]
    if which == "SA":
        return ascending[:k]
    if which == "LM":
        return ascending[ascending.abs().argsort(descending=True, stable=True)][:k]
    top = -(-k // 2)
    return torch.cat([ascending.flip(0)[:top], ascending[: k - top].flip(0)])


def assert_eigenpairs(result: fm.EigenResult, matrix: torch.Tensor, tol: float) -> None:
    """The promises of an `EigenResult`, judged in float64.

    Each product and the restart after it may round by some units of the operator's precision.
    """
    k = len(result.eigenvalues)
    vectors = result.eigenvectors.double()
    wide = matrix.double()
    norm = float(torch.linalg.matrix_norm(wide, 2))
    eps = float(torch.finfo(result.eigenvectors.dtype).eps) * (20 + result.products)
    gram = vectors.T @ vectors
    assert float((gram - torch.eye(k, dtype=torch.float64)).abs().max()) <= eps
    true = torch.linalg.vector_norm(wide @ vectors - vectors * result.eigenvalues, dim=0)
    assert bool((true <= result.residuals + eps * norm).all())
    assert bool((true <= tol * norm + eps * norm).all())
    spectrum = torch.linalg.eigvalsh(wide)
    nearest = (spectrum[:, None] - result.eigenvalues[None, :]).abs().min(dim=0).values
    assert bool((nearest <= result.residuals + eps * norm).all())


def counting(matrix: torch.Tensor) -> tuple[fm.FunctionOperator, list[int]]:
    calls = [0]

    def product(vector: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return matrix @ vector

    return fm.FunctionOperator(product, len(matrix), dtype=matrix.dtype), calls


# ------------------------------------------------------------------------- prescribed spectra


@pytest.mark.parametrize(("name", "which"), ENDS)
def test_tight_tolerance_gives_the_prescribed_eigenvalues_with_their_multiplicities(name, which):
    matrix = matrix_with_spectrum(SPECTRA[name], 1, torch.float64)
    result = fm.lanczos(fm.MatrixOperator(matrix), k=6, which=which, tol=1e-10)
    assert result.outcome is fm.Outcome.CONVERGED
    assert_eigenpairs(result, matrix, 1e-10)
    expected = wanted(SPECTRA[name], which, 6)
    if which == "LM":  # the order within a pair of opposite signs is nobody's promise
        torch.testing.assert_close(result.eigenvalues.abs(), expected.abs(), rtol=0, atol=1e-8)
    else:
        torch.testing.assert_close(result.eigenvalues, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("name", "which"), ENDS)
def test_loose_tolerance_keeps_the_residual_promise_and_the_values(name, which):
    matrix = matrix_with_spectrum(SPECTRA[name], 2, torch.float64)
    result = fm.lanczos(fm.MatrixOperator(matrix), k=4, which=which, tol=1e-3)
    assert result.outcome is fm.Outcome.CONVERGED
    assert_eigenpairs(result, matrix, 1e-3)
    scale = float(SPECTRA[name].abs().max())
    expected = wanted(SPECTRA[name], which, 4)
    found = result.eigenvalues
    if which == "LM":
        expected, found = expected.abs(), found.abs()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * scale)


@pytest.mark.parametrize(("name", "which"), ENDS)
def test_float32_products_reach_what_float32_can(name, which):
    matrix = matrix_with_spectrum(SPECTRA[name], 3, torch.float32)
    result = fm.lanczos(fm.MatrixOperator(matrix), k=5, which=which, tol=1e-5)
    assert result.outcome is fm.Outcome.CONVERGED
    assert result.eigenvectors.dtype == torch.float32
    assert result.eigenvalues.dtype == result.residuals.dtype == torch.float64
    assert_eigenpairs(result, matrix, 1e-5)
    scale = float(SPECTRA[name].abs().max())
    expected, found = wanted(SPECTRA[name], which, 5), result.eigenvalues
    if which == "LM":
        expected, found = expected.abs(), found.abs()
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5 * scale)


@pytest.mark.parametrize(("name", "which"), sorted(HARD))
def test_end_with_vanishing_gaps_is_found_with_a_whole_basis(name, which):
    matrix = matrix_with_spectrum(SPECTRA[name], 1, torch.float64)
    result = fm.lanczos(fm.MatrixOperator(matrix), k=6, which=which, tol=1e-10, basis_size=N)
    assert result.converged
    assert_eigenpairs(result, matrix, 1e-10)
    expected = wanted(SPECTRA[name], which, 6)
    torch.testing.assert_close(result.eigenvalues, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("name", "which"), sorted(HARD))
def test_end_with_vanishing_gaps_is_not_called_converged_when_it_is_not(name, which):
    matrix = matrix_with_spectrum(SPECTRA[name], 1, torch.float64)
    with pytest.warns(fm.ConvergenceWarning):
        result = fm.lanczos(
            fm.MatrixOperator(matrix), k=6, which=which, tol=1e-10, max_products=300
        )
    assert not result.converged
    assert float(result.residuals.max()) > 1e-10
    assert_eigenpairs(result, matrix, math.inf)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", ["repeated", "identity", "low rank", "clustered at the top"])
def test_multiplicities_are_right_from_every_start(name, seed):
    matrix = matrix_with_spectrum(SPECTRA[name], 10 + seed, torch.float64)
    result = fm.lanczos(fm.MatrixOperator(matrix), k=8, tol=1e-9, seed=seed)
    expected = wanted(SPECTRA[name], "LA", 8)
    torch.testing.assert_close(result.eigenvalues, expected, rtol=0, atol=1e-7)
    assert_eigenpairs(result, matrix, 1e-9)


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize(
    "name", ["spread", "repeated", "indefinite", "zero", "identity", "geometric"]
)
@pytest.mark.parametrize("n", [1, 2, 5, 17])
def test_k_equal_to_n_returns_the_whole_spectrum(n, name, which):
    spectrum = SPECTRA[name][torch.linspace(0, N - 1, n).long()]
    matrix = matrix_with_spectrum(spectrum, 4, torch.float64)
    result = fm.lanczos(fm.MatrixOperator(matrix), k=n, which=which, tol=1e-10)
    assert result.converged
    assert result.eigenvectors.shape == (n, n)
    assert_eigenpairs(result, matrix, 1e-10)
    torch.testing.assert_close(
        result.eigenvalues.sort().values, spectrum.sort().values, rtol=0, atol=1e-9
    )


def test_one_by_one_matrix():
    result = fm.lanczos(fm.MatrixOperator(torch.tensor([[-3.0]])), which="SA", tol=1e-5)
    assert result.eigenvalues.tolist() == [-3.0]
    assert abs(result.eigenvectors.item()) == 1.0
    assert result.products == 1


def test_zero_matrix_has_zero_eigenvalues_with_zero_residuals():
    result = fm.lanczos(fm.MatrixOperator(torch.zeros(9, 9)), k=4)
    assert result.eigenvalues.tolist() == [0.0] * 4
    assert result.residuals.tolist() == [0.0] * 4
    assert result.converged


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("LA", [4.0, 2.0, 1.0]),
        ("SA", [-7.0, -3.0, 0.0]),
        ("LM", [-7.0, 4.0, -3.0]),
        ("BE", [4.0, 2.0, -7.0]),
    ],
)
def test_order_is_best_first(which, expected):
    matrix = torch.diag(torch.tensor([0.0, 1.0, -3.0, 4.0, -7.0, 2.0], dtype=torch.float64))
    result = fm.lanczos(fm.MatrixOperator(matrix), k=3, which=which, tol=1e-10)
    assert result.eigenvalues.tolist() == pytest.approx(expected, abs=1e-8)
    assert result.which == which


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_both_ends_takes_the_odd_one_from_the_top(k):
    values = np.array([5.0, 4.0, 3.0, 2.0, 1.0, 0.0, -1.0])
    chosen = values[select(values, "BE", k)].tolist()
    assert chosen == [*values[: -(-k // 2)], *values[len(values) - k // 2 :]]


# ----------------------------------------------------------------------------------- restarts


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize(
    "name", ["spread", "clustered at the top", "repeated", "outliers on a bulk"]
)
def test_smallest_basis_restarts_and_arrives_at_the_same_values(name, which):
    matrix = matrix_with_spectrum(SPECTRA[name], 5, torch.float64)
    operator, calls = counting(matrix)
    result = fm.lanczos(operator, k=4, which=which, tol=1e-8, basis_size=7, max_products=100_000)
    assert result.converged
    assert calls[0] > 7, "without more products than basis vectors nothing was restarted"
    assert_eigenpairs(result, matrix, 1e-8)
    expected, found = wanted(SPECTRA[name], which, 4), result.eigenvalues
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("basis_size", [6, 11, 40])
def test_memory_never_holds_more_vectors_than_the_basis_size(basis_size, monkeypatch):
    solvers = []
    original = LanczosSteps.__init__

    def remember(self, *arguments, **options):
        original(self, *arguments, **options)
        solvers.append(self)

    monkeypatch.setattr(LanczosSteps, "__init__", remember)
    matrix = matrix_with_spectrum(SPECTRA["spread"], 6, torch.float64)
    operator = fm.MatrixOperator(matrix)
    result = fm.lanczos(operator, k=3, tol=1e-6, basis_size=basis_size, max_products=10_000)
    assert result.converged
    (solver,) = solvers
    assert solver.basis.rows.shape == (basis_size, N)
    everything = [*vars(solver).values(), *vars(solver.basis).values()]
    held = [v for v in everything if isinstance(v, torch.Tensor)]
    assert sum(t.numel() for t in held) == basis_size * N


@pytest.mark.parametrize(("k", "rows"), [(1, 20), (5, 20), (10, 30), (40, 80)])
def test_default_basis_is_twice_k_plus_ten_and_at_most_n(k, rows, monkeypatch):
    seen = []
    original = LanczosSteps.__init__

    def remember(self, operator, size, k, which, tol, limit, rows, seed, **options):
        seen.append(rows)
        original(self, operator, size, k, which, tol, limit, rows, seed, **options)

    monkeypatch.setattr(LanczosSteps, "__init__", remember)
    fm.lanczos(fm.MatrixOperator(matrix_with_spectrum(SPECTRA["spread"], 7, torch.float64)), k=k)
    assert seen == [rows]


# ----------------------------------------------------------------------- counts and the limit


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("basis_size", [None, 8])
def test_products_are_counted_exactly(name, basis_size):
    operator, calls = counting(matrix_with_spectrum(SPECTRA[name], 8, torch.float64))
    result = fm.lanczos(operator, k=3, tol=1e-6, basis_size=basis_size, max_products=5000)
    assert result.products == calls[0] > 0


@pytest.mark.parametrize("limit", [3, 4, 5, 9, 17, 30])
@pytest.mark.parametrize("name", ["spread", "indefinite", "clustered at the top"])
def test_limit_is_never_passed_and_running_out_is_said(name, limit):
    operator, calls = counting(matrix_with_spectrum(SPECTRA[name], 9, torch.float64))
    with pytest.warns(fm.ConvergenceWarning, match=r"of 3 eigenpairs did not converge") as caught:
        result = fm.lanczos(operator, k=3, tol=1e-12, max_products=limit, basis_size=8)
    assert caught[0].filename == __file__
    assert calls[0] == result.products <= limit
    assert result.outcome is fm.Outcome.PRODUCT_LIMIT
    assert not result.converged
    assert len(result.eigenvalues) == 3
    assert float(result.residuals.max()) > 1e-12 * float(result.eigenvalues.abs().max())


@pytest.mark.parametrize("which", ["LA", "BE"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["spread", "identity", "low rank", "repeated"])
def test_no_residual_claims_more_than_rounding_allows(name, dtype, which):
    matrix = matrix_with_spectrum(SPECTRA[name], 9, dtype)
    result = fm.lanczos(fm.MatrixOperator(matrix), k=3, which=which, tol=1e-4)
    largest = float(result.eigenvalues.abs().max())
    assert float(result.residuals.min()) >= 10 * torch.finfo(dtype).eps * largest


@pytest.mark.parametrize("limit", [4, 10, 25])
def test_residuals_are_honest_also_when_the_limit_was_reached(limit):
    matrix = matrix_with_spectrum(SPECTRA["spread"], 9, torch.float64)
    with pytest.warns(fm.ConvergenceWarning):
        result = fm.lanczos(fm.MatrixOperator(matrix), k=3, tol=1e-10, max_products=limit)
    assert_eigenpairs(result, matrix, math.inf)


def test_strict_raises_with_the_result_in_hand():
    matrix = matrix_with_spectrum(SPECTRA["spread"], 9, torch.float64)
    with pytest.raises(fm.ConvergenceError, match="within 6 products") as caught:
        fm.lanczos(fm.MatrixOperator(matrix), k=2, tol=1e-8, max_products=6, strict=True)
    result = caught.value.result
    assert isinstance(result, fm.EigenResult)
    assert result.products == 6
    assert result.outcome is fm.Outcome.PRODUCT_LIMIT


def test_strict_says_nothing_when_it_converges():
    operator = fm.MatrixOperator(torch.diag(torch.arange(30.0)))
    assert fm.lanczos(operator, k=2, strict=True).converged


@pytest.mark.parametrize("limit", [3, 4, 5])
def test_a_limit_that_ends_the_search_for_missed_pairs_is_not_called_converged(limit):
    # The chain from the first start holds one direction of the double eigenvalue, so its two
    # best pairs, 5 and 3, converge; only the search afterwards can find the second 5.
    spectrum = torch.tensor([5.0, 5.0, 3.0, *([0.0] * 37)], dtype=torch.float64)
    operator = fm.MatrixOperator(matrix_with_spectrum(spectrum, 11, torch.float64))
    enough = fm.lanczos(operator, k=2, tol=1e-8)
    assert enough.eigenvalues.tolist() == pytest.approx([5.0, 5.0])
    with pytest.warns(fm.ConvergenceWarning, match="missed"):
        result = fm.lanczos(operator, k=2, tol=1e-8, max_products=limit)
    assert result.outcome is fm.Outcome.PRODUCT_LIMIT


# --------------------------------------------------------------------------------- repetition


@pytest.mark.parametrize("name", ["spread", "repeated", "zero"])
def test_same_seed_gives_the_same_bits(name):
    operator = fm.MatrixOperator(matrix_with_spectrum(SPECTRA[name], 12, torch.float32))
    first = fm.lanczos(operator, k=4, seed=5)
    again = fm.lanczos(operator, k=4, seed=5)
    assert first == again
    assert torch.equal(first.eigenvectors, again.eigenvectors)


def test_seed_matters():
    operator = fm.MatrixOperator(matrix_with_spectrum(SPECTRA["spread"], 12, torch.float64))
    first, second = (fm.lanczos(operator, k=2, seed=s).eigenvectors for s in (0, 1))
    assert not torch.equal(first, second)


def test_generator_as_seed_is_used_and_moves_on():
    operator = fm.MatrixOperator(matrix_with_spectrum(SPECTRA["spread"], 12, torch.float64))
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    from_generator = fm.lanczos(operator, k=2, seed=generator)
    assert not torch.equal(generator.get_state(), before)
    assert from_generator == fm.lanczos(operator, k=2, seed=5)


def test_global_random_state_is_left_alone():
    operator = fm.MatrixOperator(matrix_with_spectrum(SPECTRA["repeated"], 12, torch.float64))
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    fm.lanczos(operator, k=4)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [1e-8, 1e8])
@pytest.mark.parametrize("name", ["spread", "repeated", "outliers on a bulk", "low rank"])
def test_scaling_the_matrix_scales_the_answer_and_costs_the_same(name, factor, dtype):
    matrix = matrix_with_spectrum(SPECTRA[name], 13, dtype)
    plain = fm.lanczos(fm.MatrixOperator(matrix), k=4, tol=1e-4)
    scaled = fm.lanczos(fm.MatrixOperator(matrix * factor), k=4, tol=1e-4)
    assert scaled.products == plain.products
    rtol = 1e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(
        scaled.eigenvalues, plain.eigenvalues * factor, rtol=rtol, atol=1e-6 * factor
    )


def test_the_operator_may_reuse_the_vector_it_is_given():
    matrix = matrix_with_spectrum(SPECTRA["spread"], 14, torch.float64)

    def in_place(vector: torch.Tensor) -> torch.Tensor:
        product = matrix @ vector
        vector.fill_(math.nan)
        return product

    operator = fm.FunctionOperator(in_place, N, dtype=torch.float64)
    result = fm.lanczos(operator, k=2, tol=1e-8)
    assert_eigenpairs(result, matrix, 1e-8)


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("n", [2, 3, 30])
def test_product_that_is_not_symmetric_is_found_out(n):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    operator = fm.FunctionOperator(lambda v: matrix @ v, n, dtype=torch.float64)
    with pytest.raises(fm.NotSymmetricError, match="not symmetric"):
        fm.lanczos(operator, k=1, tol=1e-8)


def test_product_that_changes_between_calls_is_found_out():
    generator = torch.Generator().manual_seed(0)

    def noisy(vector: torch.Tensor) -> torch.Tensor:
        scale = torch.rand(len(vector), generator=generator, dtype=vector.dtype)
        return vector * torch.arange(len(vector), dtype=vector.dtype) * (0.5 + scale)

    operator = fm.FunctionOperator(noisy, 30, dtype=torch.float64)
    with pytest.raises(fm.NotSymmetricError, match="does not change between products"):
        fm.lanczos(operator, k=2, tol=1e-8)


def loose_clusters() -> torch.Tensor:
    """Clusters as wide as the tolerance: locked pairs have to be looked at again here."""
    generator = torch.Generator().manual_seed(294)
    n = int(torch.randint(5, 60, (1,), generator=generator))
    values = torch.randn(int(torch.randint(2, 8, (1,), generator=generator)), generator=generator)
    centres = values[torch.randint(len(values), (n,), generator=generator)].double()
    noise = 1e-2 * torch.randn(n, generator=generator).double()
    return matrix_with_spectrum(centres + noise, 294, torch.float64)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("product", [1, 2, 5, 30, 38, 45, 62, 64, 69, 72, 74])
def test_product_that_is_not_finite_raises_and_says_which(product, bad):
    matrix = loose_clusters()
    operator, calls = counting(matrix)
    assert fm.lanczos(operator, k=9, tol=1e-2).products >= 74
    calls[0] = 0

    def broken(vector: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        result = matrix @ vector
        if calls[0] == product:
            result[3] = bad
        return result

    operator = fm.FunctionOperator(broken, len(matrix), dtype=torch.float64)
    with pytest.raises(fm.NonFiniteError, match=f"Product number {product} "):
        fm.lanczos(operator, k=9, tol=1e-2)


SMALL = fm.MatrixOperator(torch.diag(torch.arange(1.0, 7.0)))


@pytest.mark.parametrize("k", [0, -1, 7])
def test_k_outside_one_to_n_is_refused(k):
    with pytest.raises(
        fm.InvalidArgumentError, match=f"'k' argument of lanczos .* 1 to 6; got {k}"
    ):
        fm.lanczos(SMALL, k=k)


@pytest.mark.parametrize("k", [1.0, "2", None, True, [1]])
def test_k_that_is_no_integer_is_refused(k):
    with pytest.raises(fm.ArgumentTypeError, match="'k' argument of lanczos must be an integer"):
        fm.lanczos(SMALL, k=k)


def test_k_may_be_a_numpy_integer():
    assert len(fm.lanczos(SMALL, k=np.int64(2)).eigenvalues) == 2


@pytest.mark.parametrize("tol", [0.0, -1e-3, math.nan, math.inf])
def test_tolerance_that_is_not_positive_and_finite_is_refused(tol):
    with pytest.raises(fm.InvalidArgumentError, match="'tol' argument of lanczos"):
        fm.lanczos(SMALL, tol=tol)


@pytest.mark.parametrize("tol", ["1e-3", None, True])
def test_tolerance_that_is_no_number_is_refused(tol):
    with pytest.raises(fm.ArgumentTypeError, match="'tol' argument of lanczos"):
        fm.lanczos(SMALL, tol=tol)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-7), (torch.float64, 1e-16)])
def test_tolerance_below_what_rounding_hides_is_refused(dtype, tol):
    operator = fm.MatrixOperator(torch.eye(4, dtype=dtype))
    with pytest.raises(fm.InvalidArgumentError, match="Rounding hides smaller residuals"):
        fm.lanczos(operator, tol=tol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["spread", "repeated", "identity", "zero"])
def test_least_tolerance_that_is_accepted_is_reached(name, dtype):
    matrix = matrix_with_spectrum(SPECTRA[name], 16, dtype)
    tol = 20 * torch.finfo(dtype).eps
    result = fm.lanczos(fm.MatrixOperator(matrix), k=3, tol=tol)
    assert result.converged
    assert_eigenpairs(result, matrix, tol)


@pytest.mark.parametrize("which", ["la", "largest", None, 3])
def test_unknown_end_of_the_spectrum_is_refused_with_the_known_ones(which):
    with pytest.raises(fm.InvalidArgumentError, match="one of 'LA', 'SA', 'LM', 'BE'"):
        fm.lanczos(SMALL, which=which)


@pytest.mark.parametrize("thing", [torch.eye(3), np.eye(3), None, "H"])
def test_something_that_is_no_operator_is_refused_with_advice(thing):
    with pytest.raises(fm.ArgumentTypeError, match=r"LinearOperator; got .*fm\.MatrixOperator"):
        fm.lanczos(thing)


def test_limit_below_k_is_refused():
    with pytest.raises(fm.InvalidArgumentError, match="'max_products' argument of lanczos"):
        fm.lanczos(SMALL, k=3, max_products=2)


def test_basis_too_small_to_restart_is_refused():
    with pytest.raises(fm.InvalidArgumentError, match="'basis_size' argument of lanczos"):
        fm.lanczos(SMALL, k=2, basis_size=4)


@pytest.mark.parametrize("seed", ["0", 1.5, None])
def test_seed_of_another_type_is_refused(seed):
    with pytest.raises(fm.ArgumentTypeError, match="'seed' argument"):
        fm.lanczos(SMALL, seed=seed)


# ------------------------------------------------------------------------------ a trained net


@pytest.fixture(scope="module")
def trained():
    """A 64-256-256-10 tanh net, trained on the digits, with its data."""
    digits = load_digits()
    inputs = torch.tensor(digits.data / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10)
        )
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        for _ in range(8):
            for rows in torch.randperm(len(inputs)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(inputs[rows]), labels[rows]).backward()
                optimizer.step()
    objective = fm.Objective(net, nn.CrossEntropyLoss(), (inputs, labels))
    return net, inputs, labels, objective


@pytest.fixture(scope="module")
def top_ten(trained):
    return fm.lanczos(fm.HessianOperator(trained[3]), k=10, tol=1e-3)


def test_top_ten_of_a_trained_net_take_at_most_thirty_products(trained, top_ten):
    assert trained[3].loss() < 0.2, "the net is meant to be trained"
    assert top_ten.converged
    assert top_ten.products <= 30


def test_top_ten_of_a_trained_net_hold_in_float64(trained, top_ten):
    net, inputs, labels, _ = trained
    wide = fm.Objective(
        copy.deepcopy(net).double(), nn.CrossEntropyLoss(), (inputs.double(), labels)
    )
    vectors = top_ten.eigenvectors.double()
    products = fm.HessianOperator(wide) @ vectors
    true = torch.linalg.vector_norm(products - vectors * top_ten.eigenvalues, dim=0)
    largest = float(top_ten.eigenvalues[0])
    assert bool((true <= top_ten.residuals + 1e-5 * largest).all())
    assert bool((true <= 1.01e-3 * largest).all())
    gram = vectors.T @ vectors
    torch.testing.assert_close(gram, torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-5)


def test_top_ten_of_a_trained_net_agree_with_arpack(trained, top_ten):
    operator = fm.HessianOperator(trained[3]).to_scipy()
    values = eigsh(operator, k=10, which="LA", tol=1e-4, return_eigenvectors=False)
    expected = torch.tensor(np.sort(values)[::-1].copy(), dtype=torch.float64)
    largest = float(expected[0])
    torch.testing.assert_close(top_ten.eigenvalues, expected, rtol=0, atol=1e-3 * largest)
