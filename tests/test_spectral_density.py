"""Stochastic Lanczos quadrature: exact where it must be, honest about the rest."""

from __future__ import annotations

import dataclasses
import math
import statistics
import weakref

import pytest
import torch
from scipy import stats

import flatminima as fm
from flatminima.algorithms.estimators import chains
from flatminima.algorithms.estimators.chains import gauss_quadrature
from zoo import build, cached_dense_hessian, matrix_with_spectrum

LINE = torch.linspace(-2, 9, 25).double()
OUTLIERS = torch.cat([torch.tensor([60.0, -25.0, 20.0]), torch.linspace(-1, 2, 57)]).double()
SPECTRA = {
    "one value": [3.5],
    "a line": LINE.tolist(),
    "repeated": [2.0] * 10 + [-1.0] * 6 + [0.5] * 4,
    "clustered": [1.0, 1.0 + 1e-7, 1.0 + 2e-7, 5.0, 5.0 + 1e-7, -3.0],
    "rank-deficient": [0.0] * 12 + [1.0, 2.0, 7.0],
    "zero": [0.0] * 6,
    "indefinite": [-9.0, -4.0, 1.0, 2.0, 3.0, 8.0],
    "large": [1e12, -3e11, 2e10],
    "small": [1e-14, 3e-14, -2e-15],
}
every_spectrum = pytest.mark.parametrize("name", SPECTRA)


def matrix(spectrum, dtype=torch.float64):
    return fm.MatrixOperator(matrix_with_spectrum(spectrum, 1, dtype))


def recorded(spectrum):
    """An operator, the widths of the blocks it multiplied, and every vector among them."""
    operator, widths, vectors = matrix(spectrum), [], []
    original = operator._products

    def watched(block):
        widths.append(len(block))
        vectors.extend(block.clone())
        return original(block)

    operator._products = watched
    return operator, widths, vectors


def mixture(points, spectrum, sigma):
    """Σ N(t; λ, σ²) / n."""
    distance = (points.unsqueeze(1) - torch.as_tensor(spectrum).double()) / sigma
    return (-0.5 * distance**2).exp().mean(dim=1) / (sigma * math.sqrt(2 * math.pi))


# --------------------------------------------------------------------------------- what is exact


@every_spectrum
def test_enough_steps_find_every_distinct_eigenvalue_and_end_by_themselves(name):
    spectrum = SPECTRA[name]
    result = fm.spectral_density(matrix(spectrum), probes=3, steps=100)
    scale = max(map(abs, spectrum))
    assert result.complete == (True,) * 3
    assert result.steps <= len(spectrum)
    torch.testing.assert_close(result.weights.sum(dim=1), torch.ones(3).double())
    for nodes, weights in zip(result.nodes, result.weights, strict=True):
        for node in nodes[weights > 1e-12].tolist():
            assert min(abs(node - value) for value in spectrum) <= 1e-6 * scale
        for value in spectrum:
            assert float((nodes - value).abs().min()) <= 1e-6 * scale


@pytest.mark.parametrize("steps", [1, 2, 4, 25])
def test_gauss_rules_are_exact_for_polynomials_of_degree_below_twice_the_steps(steps):
    operator, _, vectors = recorded(LINE)
    result = fm.spectral_density(operator, probes=3, steps=steps)
    for probe in range(3):
        vector = vectors[probe]
        assert float(vector.norm()) == pytest.approx(1, rel=1e-12)
        for degree in range(2 * min(steps, 5)):
            expected = float(vector @ torch.linalg.matrix_power(operator.matrix, degree) @ vector)
            found = float((result.weights[probe] * result.nodes[probe] ** degree).sum())
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_all_eigenvalues_taken_out_leave_nothing_to_chance():
    result = fm.spectral_density(matrix(OUTLIERS), outliers=60, probes=2)
    ordered = OUTLIERS.sort(descending=True).values
    torch.testing.assert_close(result.eigenvalues, ordered, rtol=0, atol=1e-9)
    assert result.nodes.shape == result.weights.shape == (2, 0)
    square = float((OUTLIERS**2).sum())
    for estimate, expected in (
        (result.mean(), float(OUTLIERS.mean())),
        (result.second_moment(), square / 60),
        (result.frobenius_norm(), math.sqrt(square)),
        (result.stable_rank(), square / 60**2),
        (result.effective_dimension(30.0), float((OUTLIERS / (OUTLIERS + 30)).sum())),
        (result.negative_mass(), float((OUTLIERS < 0).double().mean())),
        (result.negative_mass(0.5), float((OUTLIERS < -0.5).double().mean())),
        (result.sum(torch.cos), float(OUTLIERS.cos().sum())),
        (result.log_determinant(30.0), float((OUTLIERS + 30).log().sum())),
    ):
        assert estimate.value == pytest.approx(expected, rel=1e-8)
        assert estimate.standard_error == 0.0
    points = torch.linspace(-30, 70, 301).double()
    value, error = result.density(points)
    torch.testing.assert_close(value, mixture(points, OUTLIERS, result.sigma))
    assert not error.any()


@pytest.mark.parametrize("value", [2.0, -3.0])
def test_a_multiple_of_the_identity_has_no_spread(value):
    result = fm.spectral_density(fm.MatrixOperator(value * torch.eye(50)), probes=4)
    assert (result.products, result.steps) == (4, 1)
    assert result.mean().value == pytest.approx(value, rel=1e-6)
    assert result.mean().standard_error <= 1e-6
    assert result.stable_rank().value == pytest.approx(50, rel=1e-6)
    assert result.negative_mass() == fm.Estimate(float(value < 0), 0.0)


def test_zero_matrix():
    result = fm.spectral_density(fm.MatrixOperator(torch.zeros(7, 7)))
    for estimate in (result.mean(), result.frobenius_norm(), result.stable_rank()):
        assert estimate == fm.Estimate(0.0, 0.0)
    assert result.negative_mass() == fm.Estimate(0.0, 0.0)
    assert result.effective_dimension(1.0) == fm.Estimate(0.0, 0.0)
    assert result.resolution == 0.0
    assert float(result.density([0.0])[0]) > 1
    assert result.rescaled(scale="log").unplaced_mass() == fm.Estimate(1.0, 0.0)


# -------------------------------------------------------------------------- what is left to chance

TRUTH = {
    "mean": (lambda r: r.mean(), lambda v: v.mean()),
    "second moment": (lambda r: r.second_moment(), lambda v: (v**2).mean()),
    "Frobenius norm": (lambda r: r.frobenius_norm(), lambda v: v.norm()),
    "dimension": (lambda r: r.effective_dimension(40.0), lambda v: (v / (v + 40)).sum()),
    "log-determinant": (lambda r: r.log_determinant(40.0), lambda v: (v + 40).log().sum()),
}
SEEDS = 200


@pytest.fixture(
    scope="module",
    params=[(5, 0, LINE), (20, 0, OUTLIERS), (20, 1, OUTLIERS)],
    ids=["five probes", "outliers", "one of them taken out"],
)
def many(request):
    probes, outliers, spectrum = request.param
    operator = matrix(spectrum)
    known = fm.lanczos(operator, k=1, tol=1e-9) if outliers else 0
    return spectrum, [
        fm.spectral_density(operator, probes=probes, steps=12, outliers=known, seed=seed)
        for seed in range(SEEDS)
    ]


@pytest.mark.parametrize("name", [n for n in TRUTH if n != "Frobenius norm"])
def test_unbiased_over_many_seeds(name, many):
    (estimate, exact), (spectrum, results) = TRUTH[name], many
    values = [estimate(r).value for r in results]
    error = statistics.stdev(values) / math.sqrt(SEEDS)
    assert abs(statistics.fmean(values) - float(exact(spectrum))) < 4 * error


@pytest.mark.parametrize("name", TRUTH)
def test_standard_error_covers_the_truth_as_often_as_it_should(name, many):
    (estimate, exact), (spectrum, results) = TRUTH[name], many
    found = [estimate(r) for r in results]
    truth = float(exact(spectrum))
    within = sum(abs(e.value - truth) <= 2 * e.standard_error for e in found)
    assert 0.90 * SEEDS <= within <= 0.99 * SEEDS
    # The root of a mean of squares is the less for their spread, by less than that spread.
    spread = statistics.stdev(e.value for e in found)
    typical = math.sqrt(statistics.fmean(e.standard_error**2 for e in found))
    # Few samples know their own spread badly, and are told wider errors by Student's t.
    wider = stats.t.ppf(stats.norm.cdf(2), results[0].probes - 1) / 2
    assert typical == pytest.approx(wider * spread, rel=0.25)


def test_twenty_probes_are_within_two_standard_errors_as_often_as_is_promised():
    operator = matrix(OUTLIERS)
    within = 0
    for seed in range(SEEDS):
        mean = fm.spectral_density(operator, probes=20, steps=2, seed=seed).mean()
        within += abs(mean.value - float(OUTLIERS.mean())) <= 2 * mean.standard_error
    assert 0.90 * SEEDS <= within <= 0.99 * SEEDS


def test_trace_and_density_agree():
    operator = matrix(OUTLIERS)
    trace = fm.trace(operator, products=400)
    mean = fm.spectral_density(operator, probes=100, steps=10).mean()
    gap = abs(60 * mean.value - trace.value)
    assert gap < 4 * math.hypot(60 * mean.standard_error, trace.standard_error)


def test_share_below_zero_is_within_its_error_before_the_chains_have_ended():
    spectrum = torch.cat([torch.logspace(-6, 0, 60), -torch.logspace(-7, -1, 40)]).double()
    operator = matrix(spectrum)
    found = [
        fm.spectral_density(operator, probes=10, steps=15, seed=seed).negative_mass()
        for seed in range(50)
    ]
    assert sum(abs(e.value - 0.4) <= 2 * e.standard_error for e in found) >= 45
    assert statistics.fmean(e.standard_error for e in found) < 0.25
    best = fm.spectral_density(operator, probes=10, steps=100).negative_mass()
    assert best.standard_error < 0.5 * found[0].standard_error
    assert abs(best.value - 0.4) <= 3 * best.standard_error


def test_rounding_in_float32_is_not_taken_for_negative_curvature():
    spectrum = [0.0] * 80 + torch.linspace(1, 50, 20).tolist()
    result = fm.spectral_density(matrix(spectrum, torch.float32), steps=30)
    assert result.smallest < 0
    assert abs(result.smallest) < result.resolution < 1e-3
    assert result.negative_mass().value == 0.0


def test_hessian_of_a_net_agrees_with_the_dense_one():
    name = "mlp_batch_norm_dropout"
    dense = torch.linalg.eigvalsh(cached_dense_hessian(name, torch.float64))
    hessian = fm.HessianOperator(build(name, torch.float64).objective())
    result = fm.spectral_density(hessian, probes=10, steps=40, outliers=4)
    largest = dense[dense.abs().argsort(descending=True)[:4]].sort(descending=True).values
    torch.testing.assert_close(result.eigenvalues, largest, rtol=1e-4, atol=1e-7)
    for estimate, exact in (
        (result.mean(), dense.mean()),
        (result.frobenius_norm(), dense.norm()),
        (result.stable_rank(), (dense / dense.abs().max()).square().sum()),
        (result.negative_mass(), (dense < -result.resolution).double().mean()),
    ):
        assert abs(estimate.value - float(exact)) <= 4 * estimate.standard_error
    points = torch.linspace(float(dense.min()), float(dense.max()), 101).double()
    value, error = result.density(points)
    gap = (value - mixture(points, dense, result.sigma)).abs()
    assert bool((gap <= 4 * error + 0.02 * value.max()).all())


# -------------------------------------------------------------------------------- what is taken out


def test_outliers_taken_out_make_the_error_smaller_and_keep_the_total():
    operator = matrix(OUTLIERS)
    plain = fm.spectral_density(operator, steps=15)
    result = fm.spectral_density(operator, steps=15, outliers=3)
    assert result.eigenvalues.tolist() == pytest.approx([60, 20, -25], rel=1e-6)
    assert float(result.nodes.abs().max()) <= 2 + 1e-6
    for estimate, exact in TRUTH.values():
        assert estimate(result).standard_error < 0.2 * estimate(plain).standard_error
        assert (
            abs(estimate(result).value - float(exact(OUTLIERS)))
            <= 4 * estimate(result).standard_error
        )
    points = torch.linspace(-40, 80, 40001).double()
    assert float(torch.trapezoid(result.density(points)[0], points)) == pytest.approx(1, rel=1e-6)
    assert result.sum(torch.ones_like).value == pytest.approx(60, rel=1e-12)


def test_known_pairs_serve_as_well_as_found_ones_and_cost_a_product_each():
    operator, widths, _ = recorded(OUTLIERS)
    pairs = fm.lanczos(operator, k=3, which="LM", tol=1e-6)
    widths.clear()
    known = fm.spectral_density(operator, probes=3, steps=10, outliers=pairs)
    assert known.products == sum(widths) == 3 + 3 * 10
    found = fm.spectral_density(operator, probes=3, steps=10, outliers=3)
    assert found.products > known.products
    torch.testing.assert_close(found.eigenvalues, known.eigenvalues, rtol=1e-6, atol=0)


def test_a_result_without_pairs_takes_nothing_out():
    operator = matrix(LINE)
    pairs = dataclasses.replace(
        fm.lanczos(operator),
        eigenvalues=torch.empty(0).double(),
        eigenvectors=torch.empty(25, 0).double(),
        residuals=torch.empty(0).double(),
    )
    result = fm.spectral_density(operator, probes=2, steps=3, outliers=pairs)
    assert result == fm.spectral_density(operator, probes=2, steps=3)


def test_rough_pairs_are_taken_out_without_harm():
    operator = matrix(OUTLIERS, torch.float32)
    rough = fm.lanczos(operator, k=3, which="LM", tol=2e-2, basis_dtype=torch.bfloat16)
    mean = fm.spectral_density(operator, probes=20, steps=20, outliers=rough).mean()
    assert abs(mean.value - float(OUTLIERS.mean())) <= 4 * mean.standard_error + 1e-6


def test_pairs_from_both_ends_and_in_any_order():
    operator = matrix(OUTLIERS)
    pairs = fm.lanczos(operator, k=(1, 1), which="BE", tol=1e-6)
    result = fm.spectral_density(operator, outliers=pairs.part("SA", 2))
    assert result.eigenvalues.tolist() == pytest.approx([60, -25])


def test_pairs_of_another_operator_are_refused():
    other = matrix(-OUTLIERS)
    pairs = fm.lanczos(other, k=2, tol=1e-6)
    with pytest.raises(fm.InvalidArgumentError, match="pairs that are not those of MatrixOperator"):
        fm.spectral_density(matrix(OUTLIERS), outliers=pairs)
    turned = fm.MatrixOperator(matrix_with_spectrum(OUTLIERS, 2))
    with pytest.raises(fm.InvalidArgumentError, match="pairs that are not those of MatrixOperator"):
        fm.spectral_density(turned, outliers=fm.lanczos(matrix(OUTLIERS), k=2, tol=1e-6))


def test_outliers_that_did_not_converge_are_told():
    operator = fm.MatrixOperator(torch.diag(1 - 1e-6 * torch.arange(400.0).double()))
    with pytest.warns(fm.ConvergenceWarning):
        pairs = fm.lanczos(operator, k=5, tol=1e-10, max_products=20)
    assert not pairs.converged
    result = fm.spectral_density(operator, probes=2, steps=2, outliers=pairs)
    assert result.notes == (f"The outliers: {pairs.outcome.value}",)


# ----------------------------------------------------------------------- side by side, or in groups


@pytest.mark.parametrize("outliers", [0, 2])
def test_all_chains_advance_together_and_a_group_at_a_time_where_memory_is_short(
    outliers, monkeypatch
):
    operator, widths, _ = recorded(OUTLIERS)
    known = fm.lanczos(operator, k=outliers, tol=1e-8) if outliers else 0
    widths.clear()
    whole = fm.spectral_density(operator, probes=5, steps=8, outliers=known)
    assert widths == [outliers] * bool(outliers) + [5] * 8
    for room, expected in ((0, [1] * 40), (2, [2] * 16 + [1] * 8)):
        chain = (outliers + 8 + 4) * 60 * 8
        monkeypatch.setattr(chains, "available_bytes", lambda device, b=2 * room * chain: b)
        widths.clear()
        parts = fm.spectral_density(operator, probes=5, steps=8, outliers=known)
        assert widths[bool(outliers) :] == expected
        torch.testing.assert_close(parts.nodes, whole.nodes, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(parts.weights, whole.weights, rtol=1e-9, atol=1e-9)
        assert parts.products == whole.products


def test_a_group_is_gone_before_the_next_one_takes_memory(monkeypatch):
    original, held, most = chains.Basis, weakref.WeakSet(), []

    def counted(*args, **options):
        made = original(*args, **options)
        held.add(made)
        most.append(len(held))
        return made

    monkeypatch.setattr(chains, "Basis", counted)
    monkeypatch.setattr(chains, "_count_fitting", lambda *arguments: 2)
    fm.spectral_density(matrix(OUTLIERS), probes=7, steps=4)
    assert len(most) == 7
    assert max(most) == 2


def test_memory_that_ends_after_all_makes_the_groups_smaller(monkeypatch):
    whole = fm.spectral_density(matrix(OUTLIERS), probes=4, steps=6)
    made, original = [], chains.Basis

    def short(*args, **options):
        if len(made) == 2:
            made.clear()
            raise fm.DeviceMemoryError("no memory")
        made.append(1)
        return original(*args, **options)

    monkeypatch.setattr(chains, "Basis", short)
    operator, widths, _ = recorded(OUTLIERS)
    parts = fm.spectral_density(operator, probes=4, steps=6)
    assert widths == [2] * 12
    torch.testing.assert_close(parts.nodes, whole.nodes, rtol=1e-9, atol=1e-9)


def test_no_memory_at_all_is_told_with_the_way_out(monkeypatch):
    original = torch.empty

    def empty(*sizes, **options):
        if sizes == (5, 60):
            raise torch.OutOfMemoryError("out of memory")
        return original(*sizes, **options)

    operator = matrix(OUTLIERS)
    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(fm.DeviceMemoryError, match=r"5 vectors of length 60\. Reduce steps="):
        fm.spectral_density(operator, steps=5)


def test_chains_that_end_early_leave_the_others_going():
    diagonal = torch.tensor([1.0, 1.0, 1.0, 5.0, 7.0]).double()
    starts = iter([torch.eye(5)[0], torch.ones(5), torch.eye(5)[3] + torch.eye(5)[4]])
    operator = fm.MatrixOperator(torch.diag(diagonal))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", lambda *sizes, **options: next(starts).double())
        result = fm.spectral_density(operator, probes=3, steps=4)
    assert result.complete == (True, True, True)
    assert result.products == 1 + 3 + 2
    assert [row[row > 0].tolist() for row in result.weights] == [
        [1.0],
        pytest.approx([0.6, 0.2, 0.2]),
        pytest.approx([0.5, 0.5]),
    ]


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_basis_elsewhere_gives_the_same_numbers(device):
    operator = matrix(OUTLIERS)
    named = fm.spectral_density(operator, probes=2, steps=5, basis_device=device)
    assert named == fm.spectral_density(operator, probes=2, steps=5)


def test_data_that_are_not_kept_are_read_once_for_a_step_of_all_chains():
    objective = build("linear_regression", torch.float64).objective(cache=False)
    operator = fm.HessianOperator(objective, keep_graph=False)
    operator @ torch.ones(operator.shape[0], 6, dtype=torch.float64)
    result = fm.spectral_density(operator, probes=6, steps=3)
    assert (result.readings, result.products) == (3, 18)
    assert "read 3 times" in str(result)


# ------------------------------------------------------------------------------------- the drawing


@pytest.mark.parametrize("outliers", [0, 3])
def test_density_integrates_to_one(outliers):
    result = fm.spectral_density(matrix(OUTLIERS), steps=20, outliers=outliers)
    points = torch.linspace(-60, 100, 40001).double()
    value, error = result.density(points)
    assert float(torch.trapezoid(value, points)) == pytest.approx(1, rel=1e-6)
    assert bool((error >= 0).all())
    shaped = result.density(points[:6].reshape(2, 3))
    assert shaped[0].shape == shaped[1].shape == (2, 3)
    torch.testing.assert_close(shaped[0].reshape(-1), value[:6])


def test_density_per_decade_integrates_to_what_can_be_placed():
    spectrum = [0.0] * 10 + [-0.01] * 5 + torch.logspace(-4, 2, 25).tolist()
    result = fm.spectral_density(matrix(spectrum), outliers=10, steps=40, scale="log")
    places = torch.linspace(-16, 8, 20001).double()
    total = sum(
        float(torch.trapezoid(result.density(sign * 10**places)[0], places)) for sign in (1, -1)
    )
    assert total + result.unplaced_mass().value == pytest.approx(1, rel=1e-6)
    exact = fm.spectral_density(matrix(spectrum), outliers=40, scale="log", sigma=0.2)
    assert exact.unplaced_mass() == fm.Estimate(0.25, 0.0)
    expected = 25 / 40 * mixture(places, torch.logspace(-4, 2, 25).log10(), 0.2)
    torch.testing.assert_close(exact.density(10**places)[0], expected, rtol=1e-5, atol=1e-9)
    negative = 5 / 40 * mixture(places, [-2.0], 0.2)
    torch.testing.assert_close(exact.density(-(10**places))[0], negative, rtol=1e-5, atol=1e-9)


def test_nodes_that_stand_for_a_bulk_at_zero_get_no_place_on_a_logarithmic_scale():
    # Half of the eigenvalues lie between 1e-8 and 1e-5, where ten steps cannot tell them apart.
    spectrum = torch.cat([torch.logspace(-8, -5, 100), torch.linspace(0.5, 1, 100)]).double()
    result = fm.spectral_density(matrix(spectrum), steps=10, scale="log")
    assert result.complete == (False,) * 10
    assert result.unplaced_mass().value == pytest.approx(0.5, abs=0.1)
    bulk = torch.logspace(-0.3, 0, 50).double()
    value, error = result.density(bulk)
    expected = mixture(bulk.log10(), spectrum.log10(), result.sigma)
    assert bool(((value - expected).abs() <= 4 * error + 0.15 * expected.max()).all())


def test_mean_density_is_that_of_the_eigenvalues():
    result = fm.spectral_density(matrix(LINE), probes=100, steps=25)
    points = torch.linspace(-4, 11, 101).double()
    value, error = result.density(points)
    expected = mixture(points, LINE, result.sigma)
    assert bool(((value - expected).abs() <= 4 * error).all())
    within = ((value - expected).abs() <= 2 * error).double().mean()
    assert float(within) > 0.8


def test_sigma_is_chosen_from_the_range_of_the_nodes_and_their_number():
    operator = matrix(OUTLIERS)
    factor = 1 / math.sqrt(8 * math.log(1.25))
    plain = fm.spectral_density(operator, steps=20)
    assert plain.sigma == pytest.approx(factor * (plain.largest - plain.smallest) / 20)
    bulk = fm.spectral_density(operator, steps=20, outliers=3)
    extent = float(bulk.nodes.max() - bulk.nodes.min())
    assert bulk.sigma == pytest.approx(factor * extent / 20)
    assert bulk.sigma < 0.05 * plain.sigma
    assert fm.spectral_density(operator, steps=20, sigma=0.3).sigma == 0.3
    # Neighbours in a bulk without gaps make one smooth curve.
    uniform = fm.spectral_density(matrix(torch.linspace(-1, 1, 200)), probes=20, steps=30)
    value = uniform.density(torch.linspace(-0.7, 0.7, 71))[0]
    assert float(value.max()) < 0.5 * 1.3
    assert float(value.min()) > 0.5 * 0.7


def test_sigma_on_a_logarithmic_scale_is_in_decades():
    operator = matrix(torch.logspace(-3, 0, 100))
    result = fm.spectral_density(operator, probes=10, steps=50, scale="log")
    assert 0.01 < result.sigma < 0.3
    assert result.rescaled(scale="log") == result
    assert result.rescaled(scale="log", sigma=0.5).sigma == 0.5
    linear = fm.spectral_density(operator, probes=10, steps=50)
    assert result.rescaled() == linear
    assert fm.spectral_density(operator, probes=10, steps=50, scale="log", sigma=0.5) == (
        linear.rescaled(scale="log", sigma=0.5)
    )


# ----------------------------------------------------------------------------------- by-products


def test_dimension_of_an_indefinite_matrix_says_how_negative_it_is():
    result = fm.spectral_density(matrix(OUTLIERS), steps=20)
    with pytest.raises(fm.NotPositiveDefiniteError, match="eigenvalue of -25 or below") as caught:
        result.effective_dimension(1.0)
    assert caught.value.smallest == pytest.approx(-25)
    assert caught.value.shift == 1.0
    with pytest.raises(fm.NotPositiveDefiniteError, match=r"SpectralDensity\.log_determinant"):
        result.log_determinant(-5.0)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda r: r.effective_dimension(0.0), fm.InvalidArgumentError),
        (lambda r: r.effective_dimension(-1.0), fm.InvalidArgumentError),
        (lambda r: r.effective_dimension("1"), fm.ArgumentTypeError),
        (lambda r: r.log_determinant(math.inf), fm.InvalidArgumentError),
        (lambda r: r.negative_mass(-0.1), fm.InvalidArgumentError),
        (lambda r: r.negative_mass(True), fm.ArgumentTypeError),
        (lambda r: r.density("points"), fm.ArgumentTypeError),
        (lambda r: r.density([0.0, math.nan]), fm.InvalidArgumentError),
        (lambda r: r.rescaled(scale="log").density([1.0, 0.0]), fm.InvalidArgumentError),
        (lambda r: r.rescaled(scale="square"), fm.InvalidArgumentError),
        (lambda r: r.rescaled(sigma=0.0), fm.InvalidArgumentError),
    ],
)
def test_bad_arguments_of_a_result_are_refused(call, error):
    result = fm.spectral_density(matrix(LINE), probes=2, steps=3)
    with pytest.raises(error, match=r"argument of SpectralDensity\."):
        call(result)


# ------------------------------------------------------------------------------------------ input


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"probes": 1}, fm.InvalidArgumentError),
        ({"probes": 2.0}, fm.ArgumentTypeError),
        ({"steps": 0}, fm.InvalidArgumentError),
        ({"steps": None}, fm.ArgumentTypeError),
        ({"outliers": -1}, fm.InvalidArgumentError),
        ({"outliers": 26}, fm.InvalidArgumentError),
        ({"outliers": True}, fm.ArgumentTypeError),
        ({"outliers": torch.ones(25, 1)}, fm.ArgumentTypeError),
        ({"outliers": [1.0]}, fm.ArgumentTypeError),
        ({"scale": "logarithmic"}, fm.InvalidArgumentError),
        ({"sigma": -1.0}, fm.InvalidArgumentError),
        ({"sigma": "auto"}, fm.ArgumentTypeError),
        ({"basis_device": "nowhere"}, fm.DeviceError),
        ({"basis_device": "meta"}, fm.DeviceError),
    ],
)
def test_bad_arguments_are_refused(options, error):
    (name,) = options
    with pytest.raises(error, match=f"'{name}' argument of spectral_density"):
        fm.spectral_density(matrix(LINE), **options)


def test_result_that_lost_its_eigenvectors_is_refused():
    pairs = fm.lanczos(matrix(LINE), k=2).without_vectors()
    with pytest.raises(fm.InvalidArgumentError, match="whose eigenvectors were dropped"):
        fm.spectral_density(matrix(LINE), outliers=pairs)


def test_pairs_of_another_size_are_refused():
    with pytest.raises(fm.ShapeError, match="'outliers' argument of spectral_density"):
        fm.spectral_density(matrix(LINE), outliers=fm.lanczos(matrix(OUTLIERS)))


def test_vectors_that_are_not_orthonormal_are_refused():
    pairs = fm.lanczos(matrix(LINE), k=2, tol=1e-6)
    same = dataclasses.replace(pairs, eigenvectors=pairs.eigenvectors[:, [0, 0]])
    with pytest.raises(fm.InvalidArgumentError, match="not orthonormal"):
        fm.spectral_density(matrix(LINE), outliers=same)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("outliers", [0, 1])
def test_product_that_is_not_finite_raises(bad, outliers):
    operator = fm.FunctionOperator(lambda v: v * bad, 4)
    with pytest.raises(fm.NonFiniteError, match="NaN or infinity"):
        fm.spectral_density(operator, probes=2, outliers=outliers)


def test_operator_that_is_not_symmetric_is_found_out():
    matrix = torch.triu(torch.ones(30, 30, dtype=torch.float64))
    operator = fm.FunctionOperator(lambda v: matrix @ v, 30, dtype=torch.float64)
    with pytest.raises(fm.NotSymmetricError, match="is not symmetric"):
        fm.spectral_density(operator, probes=2, steps=10)


def test_matrix_in_place_of_an_operator_is_refused_with_advice():
    with pytest.raises(fm.ArgumentTypeError, match=r"fm\.MatrixOperator\(matrix\)"):
        fm.spectral_density(torch.eye(3))


def test_same_seed_gives_the_same_bits_and_a_generator_serves():
    operator = matrix(OUTLIERS)

    def found(seed):
        return fm.spectral_density(operator, probes=2, steps=5, outliers=1, seed=seed)

    first = found(3)
    assert first == found(3) == found(torch.Generator().manual_seed(3))
    assert first != found(4)
    other = fm.spectral_density(operator, probes=4, steps=5, seed=3)
    plain = fm.spectral_density(operator, probes=2, steps=5, seed=3)
    torch.testing.assert_close(other.nodes[:2], plain.nodes)


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    fm.spectral_density(matrix(LINE), probes=2, steps=3, outliers=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_are_in_float64_whatever_the_operator_is(dtype):
    result = fm.spectral_density(matrix(LINE, dtype), probes=2, steps=25, outliers=2)
    for tensor in (result.nodes, result.weights, result.eigenvalues, *result.density([1.0])):
        assert tensor.dtype == torch.float64
    rounding = 20 * torch.finfo(dtype).eps * 9
    assert result.resolution == pytest.approx(rounding, rel=1e-3)


def test_error_of_the_operator_counts_as_resolution():
    operator = matrix(LINE)
    operator.error = 0.25
    result = fm.spectral_density(operator, probes=2, steps=25)
    assert result.resolution == 0.25


def test_table_tells_the_by_products():
    result = fm.spectral_density(matrix(OUTLIERS), probes=5, steps=12, outliers=2)
    table = result.table()
    assert "2 of them taken out" in table.title
    assert [row[0] for row in table.rows] == [
        "largest Ritz value",
        "smallest Ritz value",
        "mean eigenvalue",
        "Frobenius norm",
        "stable rank",
        "negative mass",
    ]
    assert "5 probes, 12 steps each" in table.notes[0]


def test_the_quadrature_serves_any_number_of_functions():
    found = gauss_quadrature("here", matrix(LINE), probes=3, steps=6)
    result = fm.spectral_density(matrix(LINE), probes=3, steps=6)
    for function in (torch.exp, torch.sin):
        assert found.sum(function) == result.sum(function)
    assert found.smallest == result.smallest
    with pytest.raises(fm.InvalidArgumentError, match="'probes' argument of here"):
        gauss_quadrature("here", matrix(LINE), probes=1, steps=6)
