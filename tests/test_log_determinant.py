"""log det(A + τ I) against the dense one, with an honest error, and refused where there is none."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest
import torch

import flatminima as fm
from flatminima.algorithms.estimators.chains import gauss_quadrature
from zoo import build, cached_dense_hessian, matrix_with_spectrum

SPREAD = torch.cat([torch.tensor([300.0, 80.0, 40.0]), torch.linspace(0, 2, 57)]).double()
BULK = torch.cat([torch.logspace(-6, -2, 290), torch.linspace(1, 50, 10)]).double()


def matrix(spectrum, dtype=torch.float64):
    return fm.MatrixOperator(matrix_with_spectrum(spectrum, 1, dtype))


def exact(operator, shift):
    dense = operator.matrix.double()
    sign, value = torch.linalg.slogdet(dense + shift * torch.eye(len(dense)).double())
    assert sign == 1
    return float(value)


# ------------------------------------------------------------------------------- against slogdet


@pytest.mark.parametrize(
    ("spectrum", "shift"),
    [
        ([2.5], 0.0),
        ([2.5], -1.0),
        ([0.0] * 5, 3.0),
        ([1.0, 2.0, 3.0, 4.0], 0.5),
        ([2.0] * 10 + [0.0] * 10, 1e-3),
        ([-0.5, 0.1, 3.0, 3.0 + 1e-9], 0.75),
        ([4.0, 9.0, 16.0], -3.5),
        (SPREAD.tolist(), 1e-4),
    ],
)
def test_exact_with_all_eigenvalues_taken_out(spectrum, shift):
    operator = matrix(spectrum)
    result = fm.log_determinant(operator, shift, outliers=len(spectrum), probes=2)
    assert result.value == pytest.approx(exact(operator, shift), rel=1e-9, abs=1e-9)
    assert (result.standard_error, result.quadrature_error) == (0.0, 0.0)
    assert (result.shift, result.size) == (shift, len(spectrum))
    assert result.outcome is fm.Outcome.COMPLETED


@pytest.mark.parametrize("shift", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("outliers", [0, 3])
def test_agrees_with_slogdet_within_its_error(shift, outliers):
    operator = matrix(SPREAD)
    result = fm.log_determinant(operator, shift, steps=60, outliers=outliers)
    assert abs(result.value - exact(operator, shift)) <= 4 * result.standard_error
    assert result.quadrature_error <= 0.01 * result.standard_error
    assert result.notes == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_multiple_of_the_identity_is_exact_after_one_step(dtype):
    result = fm.log_determinant(fm.MatrixOperator(3 * torch.eye(40, dtype=dtype)), shift=1.0)
    assert result.value == pytest.approx(40 * math.log(4), rel=1e-6)
    assert result.standard_error <= 1e-5
    assert (result.quadrature_error, result.products) == (0.0, 10)


def test_gauss_newton_like_matrix_of_low_rank_in_float32():
    spectrum = [0.0] * 180 + torch.linspace(1, 50, 20).tolist()
    operator = matrix(spectrum, torch.float32)
    result = fm.log_determinant(operator, 0.1, outliers=20)
    expected = sum(math.log(value + 0.1) for value in spectrum)
    # The bulk is known to its rounding, which the shift is 200 times as large as.
    assert result.value == pytest.approx(expected, rel=1e-3)


def test_hessian_of_a_net():
    name = "mlp_batch_norm_dropout"
    dense = cached_dense_hessian(name, torch.float64)
    shift = 2 * abs(float(torch.linalg.eigvalsh(dense)[0]))
    operator = fm.HessianOperator(build(name, torch.float64).objective())
    result = fm.log_determinant(operator, shift, probes=20, steps=50)
    expected = float(torch.linalg.slogdet(dense + shift * torch.eye(len(dense)).double())[1])
    assert abs(result.value - expected) <= 4 * result.standard_error


# -------------------------------------------------------------------------------------- its errors


@pytest.fixture(scope="module")
def many():
    operator = matrix(SPREAD)
    return [fm.log_determinant(operator, 1.0, probes=20, steps=20, seed=s) for s in range(200)]


def test_unbiased_over_many_seeds(many):
    values = [r.value for r in many]
    error = statistics.stdev(values) / math.sqrt(len(values))
    assert abs(statistics.fmean(values) - float((SPREAD + 1).log().sum())) < 4 * error


def test_standard_error_covers_the_truth_as_often_as_it_should(many):
    truth = float((SPREAD + 1).log().sum())
    within = sum(abs(r.value - truth) <= 2 * r.standard_error for r in many)
    assert 180 <= within <= 198
    spread = statistics.stdev(r.value for r in many)
    assert statistics.fmean(r.standard_error for r in many) == pytest.approx(spread, rel=0.2)


def test_outliers_taken_out_make_the_error_smaller():
    operator = matrix(SPREAD)
    plain, without = (
        fm.log_determinant(operator, 5.0, probes=40, steps=30, outliers=count) for count in (0, 3)
    )
    assert without.standard_error < 0.3 * plain.standard_error
    known = fm.lanczos(operator, k=3, tol=1e-8)
    again = fm.log_determinant(operator, 1.0, steps=30, outliers=known)
    assert again.products == 3 + 10 * 30
    assert abs(again.value - exact(operator, 1.0)) <= 4 * again.standard_error


@pytest.mark.parametrize("shift", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("steps", [10, 20, 40, 80])
def test_error_of_the_quadrature_is_rarely_too_small_and_falls_with_the_steps(shift, steps):
    operator = matrix(BULK)

    def function(values):
        return (values + shift).log()

    options = {"probes": 3, "outliers": 10, "seed": 1}
    whole = gauss_quadrature("here", operator, steps=300, **options)
    part = gauss_quadrature("here", operator, steps=steps, **options)
    # The same vectors, so that nothing is left but the error of the shorter rules.
    missed = abs(whole.sum(function).value - part.sum(function).value)
    told = part.truncation(function)
    assert missed <= 2 * told + 1e-8
    assert whole.truncation(function) == 0.0
    assert told <= 2000 * missed + 1e-8


def test_quadrature_that_needs_more_steps_is_told():
    short = fm.log_determinant(matrix(BULK), 1e-6, steps=6)
    assert "increase steps" in short.notes[0]
    assert short.quadrature_error > short.standard_error
    unknown = fm.log_determinant(matrix(BULK), 1e-6, steps=2)
    assert "an unknown amount" in unknown.notes[0]
    assert unknown.quadrature_error == math.inf
    assert fm.log_determinant(matrix(BULK), 1.0).notes == ()


def test_several_shifts_from_one_set_of_chains():
    operator = matrix(SPREAD)
    density = fm.spectral_density(operator, probes=4, steps=20, outliers=2)
    for shift in (0.1, 1.0, 10.0):
        single = fm.log_determinant(operator, shift, probes=4, steps=20, outliers=2)
        assert density.log_determinant(shift) == fm.Estimate(single.value, single.standard_error)


# ---------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.49])
def test_indefinite_matrix_is_refused_with_a_shift_that_would_do(shift):
    operator = matrix([-0.5, 0.2, 1.0, 2.0])
    with pytest.raises(
        fm.NotPositiveDefiniteError, match=r"eigenvalue of -0\.5 or below"
    ) as caught:
        fm.log_determinant(operator, shift)
    assert caught.value.smallest == pytest.approx(-0.5)
    assert caught.value.shift == shift
    assert "log_determinant needs" in str(caught.value)
    (proposed,) = [float(text.split()[0]) for text in str(caught.value).split("a shift of ")[1:]]
    assert proposed == pytest.approx(0.5, rel=0.01)
    result = fm.log_determinant(operator, proposed, probes=2, outliers=4)
    assert result.value == pytest.approx(exact(operator, proposed), rel=1e-6)


@pytest.mark.parametrize(
    ("spectrum", "shift"), [([0.0, 1.0, 2.0], 0.0), ([0.0] * 4, 0.0), ([-1.0, 5.0], 1.0)]
)
def test_matrix_that_cannot_be_told_from_a_singular_one_is_refused(spectrum, shift):
    with pytest.raises(fm.NotPositiveDefiniteError, match="is singular up to rounding"):
        fm.log_determinant(matrix(spectrum), shift)


@pytest.mark.parametrize("shift", [math.nan, math.inf])
def test_shift_that_is_not_finite_is_refused(shift):
    with pytest.raises(fm.InvalidArgumentError, match="'shift' argument of log_determinant"):
        fm.log_determinant(matrix([1.0, 2.0]), shift)


@pytest.mark.parametrize("shift", ["1", None, True, [1.0, 2.0]])
def test_shift_that_is_no_number_is_refused(shift):
    with pytest.raises(fm.ArgumentTypeError, match="'shift' argument of log_determinant"):
        fm.log_determinant(matrix([1.0, 2.0]), shift)


@pytest.mark.parametrize("options", [{"probes": 1}, {"steps": 0}, {"outliers": 3}])
def test_bad_arguments_are_refused(options):
    (name,) = options
    with pytest.raises(fm.InvalidArgumentError, match=f"'{name}' argument of log_determinant"):
        fm.log_determinant(matrix([1.0, 2.0]), 1.0, **options)


def test_matrix_in_place_of_an_operator_is_refused_with_advice():
    with pytest.raises(fm.ArgumentTypeError, match=r"argument of log_determinant must be a Linear"):
        fm.log_determinant(torch.eye(3), 1.0)


# ------------------------------------------------------------------------------------- the result


def test_same_seed_gives_the_same_bits_and_a_generator_serves():
    operator = matrix(SPREAD)
    first = fm.log_determinant(operator, 1.0, probes=2, steps=5, seed=3)
    assert first == fm.log_determinant(operator, 1.0, probes=2, steps=5, seed=3)
    generator = torch.Generator().manual_seed(3)
    assert first == fm.log_determinant(operator, 1.0, probes=2, steps=5, seed=generator)
    other = fm.log_determinant(operator, 1.0, probes=2, steps=5, seed=4)
    assert dataclasses.replace(first, value=other.value) != other


def test_table_tells_both_errors():
    result = fm.log_determinant(matrix(SPREAD), 1.0, probes=4, steps=10)
    rows = result.table().rows
    assert [row[0] for row in rows] == [
        "log det(A + 1 I)",
        "error of the quadrature",
        "smallest Ritz value of A",
    ]
    assert "40 products" in result.table().title


@pytest.mark.parametrize("seed", range(3))
def test_what_is_left_after_the_outliers_may_be_rounding_alone(seed):
    """Then its chains end; they went on in noise, which is not orthogonal to anything."""
    tiny = torch.logspace(-20, -60, 53, dtype=torch.float64)
    values = torch.cat([torch.logspace(0, -3, 30, dtype=torch.float64), tiny])

    operator = fm.FunctionOperator(lambda v: values * v, 83, dtype=torch.float64)
    found = fm.log_determinant(operator, 0.1, outliers=40, probes=8, steps=30, seed=seed)
    assert found.value == pytest.approx(float((values + 0.1).log().sum()), rel=1e-9)
