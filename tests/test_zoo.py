"""Every product, solver and measure through every model of the zoo, judged in float64 by hand."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings

import pytest
import torch
from torch import nn

import flatminima as fm
from exhaustive import thinned
from zoo import (
    NAMES,
    NAMES_AND_DTYPES,
    build,
    cached_dense_hessian,
    copied,
    exact_gradient,
    exact_loss,
    exact_product,
    facts_of,
)

BFLOAT16_PRODUCT = 1e-2
"""What products of models with bfloat16 parameters reach, relative; 4.6e-3 is the worst seen."""

BFLOAT16_VALUE = 5e-3
"""The same for their losses and gradients; 2.9e-3 is the worst seen."""

PRODUCT = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: BFLOAT16_PRODUCT}
VALUE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: BFLOAT16_VALUE}

FAULTS = {
    "embedding_bag_sum": ("embedding_bag", "bag"),
    "embedding_bag_mean": ("embedding_bag", "bag"),
    "embedding_bag_max": ("embedding_bag", "bag"),
    "hardsigmoid": ("hardsigmoid", "3"),
    "cdist": ("cdist", "the model itself"),
    "ctc_loss": ("ctc_loss", "the loss function"),
    "grid_sample": ("grid_sampler_2d", "the model itself"),
    "once_differentiable": ("Swish", "the model itself"),
    "once_differentiable_loss": ("Swish", "the loss function"),
    "checkpointed_reentrant": (
        "torch.utils.checkpoint with use_reentrant=True",
        "the model itself",
    ),
}
"""Operation and module that an approximate case is to be blamed on."""

APPROXIMATE = [name for name in NAMES if facts_of(name).approximate]
NARROWEST = [(name, facts_of(name).dtypes[0]) for name in NAMES]
WIDEST = [(name, facts_of(name).dtypes[-1]) for name in NAMES]


def parametrized(pairs, one_in=1, *, always=()):
    ids = [f"{name}-{str(dtype).removeprefix('torch.')}" for name, dtype in pairs]
    values = thinned(pairs, one_in, always=always)
    return pytest.mark.parametrize(("name", "dtype"), values, ids=ids)


every_entry = parametrized(NAMES_AND_DTYPES)
# The judge of every model stays in the default suite, of short types on some of them.
every_entry_for_the_judge = parametrized(NAMES_AND_DTYPES, 5, always=WIDEST)
every_third_entry = parametrized(NAMES_AND_DTYPES, 3)
narrowest_entry = parametrized(NARROWEST)
widest_entry = parametrized(WIDEST)
approximate_entry = parametrized([p for p in NAMES_AND_DTYPES if p[0] in APPROXIMATE])
float64_entry = pytest.mark.parametrize(
    "name", [name for name, dtype in WIDEST if dtype is torch.float64]
)


@contextlib.contextmanager
def expected_warnings(case, *, results=lambda: ()):
    """Of differences once for an approximate case, none for the others.

    Beyond that only for those of `results()` that the errors of the differences keep from their
    tolerance.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught
    kinds = [w.category for w in caught]
    wanted = [fm.FiniteDifferenceWarning] if case.approximate else []
    outcomes = [result.outcome for result in results()]
    late = [outcome for outcome in outcomes if outcome is not fm.Outcome.CONVERGED]
    assert kinds == wanted + [fm.ConvergenceWarning] * len(late), [str(w.message) for w in caught]
    if late:
        assert case.approximate
        assert case.dtype is torch.float32
        assert set(late) == {fm.Outcome.INEXACT_PRODUCTS}


def gaussian(n, k, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator, dtype=torch.float64).to(dtype)


def gap(found, expected):
    return float((found.double() - expected).norm())


def relative(found, expected):
    return gap(found, expected) / float(expected.norm())


def floor(case):
    """What the precision of the products may move an eigenvalue by."""
    hessian = cached_dense_hessian(case.name, case.dtype)
    loss = {torch.bfloat16: BFLOAT16_PRODUCT}.get(case.dtype, 20 * torch.finfo(case.dtype).eps)
    return loss * float(hessian.norm())


def rounding(case, vector):
    """What the oracle itself may be off by."""
    size = float(cached_dense_hessian(case.name, case.dtype).norm())
    return 1e-14 * size * float(vector.double().norm())


# -------------------------------------------------------------------------------------- values


@every_entry
def test_loss_and_gradient(name, dtype):
    case = build(name, dtype)
    objective = case.objective()
    value, gradient = objective.value_and_gradient()
    assert objective.loss() == pytest.approx(exact_loss(case), rel=VALUE[dtype])
    assert value == pytest.approx(objective.loss(), rel=VALUE[dtype])
    assert gradient.dtype == case.vector_dtype
    assert objective.layout.names == case.names()
    assert relative(gradient, exact_gradient(case)) <= VALUE[dtype]


@widest_entry
def test_the_gradient_is_the_slope_of_the_loss(name, dtype):
    """Of the library's own loss: values and gradients must speak of the same function."""
    case = build(name, dtype)
    objective = case.objective()
    v = gaussian(objective.size, 1, seed=8, dtype=objective.dtype)[:, 0]
    v /= v.norm()
    step = {torch.float64: 1e-5, torch.float32: 1e-2, torch.bfloat16: 0.5}[dtype]
    rise = objective.loss_at(step * v) - objective.loss_at(-step * v)
    ahead, behind = (objective.value_and_gradient(s * v)[1] @ v for s in (step, -step))
    # The trapezoid rule is off by the third derivative, and differences by rounding.
    slope = (ahead + behind) / 2
    scale = float(objective.gradient().norm()) + abs(objective.loss()) * 1e-2
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1}[dtype]
    assert abs(rise / (2 * step) - float(slope)) <= tolerance * scale


# ------------------------------------------------------------------------------------ products


@every_entry_for_the_judge
def test_products_equal_the_dense_hessian(name, dtype):
    case = build(name, dtype)
    operator = fm.HessianOperator(case.objective())
    n = operator.shape[0]
    single = torch.eye(n, dtype=operator.dtype)[:, [0, n // 2, n - 1]]
    block = torch.cat([gaussian(n, 1, dtype=operator.dtype), single], 1)
    with expected_warnings(case):
        found = operator @ block
    expected = cached_dense_hessian(name, dtype) @ block.double()
    assert found.dtype == operator.dtype == case.vector_dtype
    if not case.approximate:
        assert operator.method == "double_backward"
        assert (operator.reason, operator.error) == ("", 0.0)
        for columns in (slice(0, 1), slice(1, None)):
            assert relative(found[:, columns], expected[:, columns]) <= PRODUCT[dtype]
    for column, image, wanted in zip(block.T, found.T, expected.T, strict=True):
        assert gap(image, wanted) <= max(
            10 * operator.error * float(column.norm()), PRODUCT[dtype] * float(wanted.norm())
        ) + PRODUCT[dtype] * float(expected.norm())


@every_third_entry
def test_products_are_symmetric_and_the_same_together_alone_and_again(name, dtype):
    case = build(name, dtype)
    operator, other = (fm.HessianOperator(case.objective()) for _ in range(2))
    block = gaussian(operator.shape[0], 2, seed=1, dtype=operator.dtype)
    with expected_warnings(case):
        together = operator @ block
        alone = operator @ block[:, 1]
    with expected_warnings(case):
        assert torch.equal(other @ block, together)
    # Differences are taken column by column, at the very same points.
    tolerance = 0 if case.approximate else PRODUCT[dtype] / 10
    assert relative(together[:, 1], alone.double()) <= tolerance
    (u, v), (hu, hv) = block.double().T, together.double().T
    skew = abs(float(u @ hv - v @ hu))
    allowed = 20 * operator.error * float(u.norm() * v.norm())
    size = float(u.norm() * hv.norm() + v.norm() * hu.norm())
    assert skew <= max(allowed, PRODUCT[dtype] / 10 * size)


@widest_entry
def test_graphs_that_are_kept_change_no_product(name, dtype):
    case = build(name, dtype)
    operator = fm.HessianOperator(case.objective(), keep_graph=True)
    n = operator.shape[0]
    v = gaussian(n, 2, seed=3, dtype=operator.dtype)
    with expected_warnings(case):
        rebuilt = operator @ v
    with operator.session():
        for _ in range(2):
            assert relative(operator @ v, rebuilt.double()) <= PRODUCT[dtype] / 10
            assert relative(operator @ v[:, 0], rebuilt[:, 0].double()) <= PRODUCT[dtype] / 10
    assert operator.kept_bytes == 0


# ----------------------------------------------------------------------- differences of gradients


def probes(n, dtype):
    """Random, in three sizes, with few entries, and along single parameters."""
    plain = gaussian(n, 3, seed=4).T
    single = torch.eye(n, dtype=torch.float64)[:: max(1, n // 6)]
    few = plain[1].clone()
    few[few.abs() < few.abs().quantile(0.9)] = 0
    chosen = [
        *plain,
        1e-6 * plain[0],
        1e6 * plain[0],
        few,
        plain[2].sign(),
        *single,
        1e6 * single[0],
    ]
    return [v.to(dtype) for v in chosen]


def assert_error_is_within_ten_times_the_estimate(case, vectors, **options):
    objective = case.objective()
    for vector in vectors:
        # A new operator for each, which knows no other vector's error.
        operator = fm.HessianOperator(objective, **options)
        product = operator @ vector
        expected = cached_dense_hessian(case.name, case.dtype) @ vector.double()
        allowed = 10 * operator.error * float(vector.double().norm())
        assert math.isfinite(operator.error)
        assert gap(product, expected) <= allowed + rounding(case, vector)
    return operator


@approximate_entry
def test_the_true_error_is_within_ten_times_the_estimate(name, dtype):
    case = build(name, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fm.FiniteDifferenceWarning)
        vectors = probes(case.objective().size, case.vector_dtype)
        operator = assert_error_is_within_ten_times_the_estimate(case, vectors)
    assert operator.method == "finite_differences"


@every_third_entry
def test_differences_on_request_are_within_ten_times_their_estimate(name, dtype):
    case = build(name, dtype)
    _, _, _, tiny, _, few, signs, *single = probes(case.objective().size, case.vector_dtype)
    vectors = (tiny, signs) if dtype is torch.float32 else (few, single[1])
    operator = assert_error_is_within_ten_times_the_estimate(
        case, vectors, method="finite_differences"
    )
    assert (operator.method, operator.reason) == ("finite_differences", "")


@approximate_entry
def test_differences_are_good_products(name, dtype):
    """An honest estimate is not enough: the products must be of use."""
    case = build(name, dtype)
    operator = fm.HessianOperator(case.objective())
    v = gaussian(operator.shape[0], 1, seed=5, dtype=operator.dtype)[:, 0]
    with expected_warnings(case):
        found = operator @ v
    assert relative(found, exact_product(case, v[:, None])[:, 0]) <= (
        1e-8 if dtype is torch.float64 else 1e-3
    )
    assert operator.error * float(v.norm()) <= 0.05 * float(found.norm())


@approximate_entry
def test_scaled_vectors_have_scaled_products(name, dtype):
    case = build(name, dtype)
    objective = case.objective()
    v = gaussian(objective.size, 1, seed=6, dtype=objective.dtype)[:, 0]
    plain, tiny, huge = (
        fm.HessianOperator(objective, method="finite_differences") @ (s * v) / s
        for s in (1.0, 2.0**-20, 2.0**20)
    )
    # Powers of two, so that not even rounding differs.
    assert torch.equal(plain, tiny)
    assert torch.equal(plain, huge)


def test_every_approximate_case_is_told_apart():
    assert set(APPROXIMATE) <= set(FAULTS)


@approximate_entry
def test_one_warning_names_the_operation_and_the_module(name, dtype):
    case = build(name, dtype)
    operation, module = FAULTS[name]
    operator = fm.HessianOperator(case.objective())
    assert (operator.method, operator.reason) == ("double_backward", "")
    v = gaussian(operator.shape[0], 2, seed=7, dtype=operator.dtype)
    with expected_warnings(case) as caught:
        first = operator @ v[:, 0]
        operator @ v
        operator @ v[:, 1]
        fm.trace(operator, products=2)
    said = str(caught[0].message)
    assert operation in said
    assert (module if module.startswith("the ") else repr(module)) in said
    assert "method='double_backward' refuses them" in said
    assert f"norm {float(first.norm()):.1e}" in said
    assert operator.method == "finite_differences"
    assert operation in operator.reason
    assert operator.reason.endswith(".")
    assert operator.error > 0


@approximate_entry
def test_double_backward_insists(name, dtype):
    case = build(name, dtype)
    operator = fm.HessianOperator(case.objective(), method="double_backward")
    for _ in range(2):
        with pytest.raises(fm.NotTwiceDifferentiableError) as caught:
            operator @ torch.ones(operator.shape[0], dtype=operator.dtype)
        assert (caught.value.operation, caught.value.module) == FAULTS[name]
    assert operator.method == "double_backward"
    assert case.objective().loss() == pytest.approx(exact_loss(case), rel=VALUE[dtype])


# ----------------------------------------------------------------------- solvers and estimators


def assert_residuals_are_true(result, case):
    """Against the dense Hessian, also where the products are differences."""
    hessian = cached_dense_hessian(case.name, case.dtype)
    vectors = result.eigenvectors.double()
    errors = (hessian @ vectors - result.eigenvalues * vectors).norm(dim=0)
    assert bool((errors <= result.residuals * (1 + 1e-6) + floor(case)).all())
    # An eigenvalue lies within the residual of each.
    spectrum = torch.linalg.eigvalsh(hessian)
    nearest = (spectrum[:, None] - result.eigenvalues).abs().min(0).values
    assert bool((nearest <= result.residuals * (1 + 1e-6) + floor(case)).all())


@narrowest_entry
def test_lanczos_finds_the_largest_eigenvalue(name, dtype):
    case = build(name, dtype)
    operator = fm.HessianOperator(case.objective())
    with expected_warnings(case, results=lambda: [result]):
        result = fm.lanczos(operator, tol=1e-2)
    assert_residuals_are_true(result, case)
    top = torch.linalg.eigvalsh(cached_dense_hessian(name, dtype))[-1]
    assert abs(float(result.eigenvalues[0] - top)) <= float(result.residuals[0]) + floor(case)


@widest_entry
def test_power_iteration_has_true_residuals(name, dtype):
    case = build(name, dtype)
    operator = fm.HessianOperator(case.objective())
    with expected_warnings(case, results=lambda: [result]):
        result = fm.power_iteration(operator, tol=0.3)
    assert_residuals_are_true(result, case)
    largest = float(torch.linalg.eigvalsh(cached_dense_hessian(name, dtype)).abs().max())
    assert abs(float(result.eigenvalues[0])) <= largest + float(result.residuals[0]) + floor(case)


# ------------------------------------------------------------------------------------ measures


@widest_entry
def test_epsilon_sharpness_is_a_rise_of_the_loss_by_hand(name, dtype):
    case = build(name, dtype)
    objective = case.objective()
    # In models of at most 64 parameters the full space takes thousands of evaluations.
    subspace = 1 if objective.size <= 64 else None
    options = {"epsilon": 1e-2, "iterations": 1, "subspace": subspace, "seed": 4}
    first = fm.epsilon_sharpness(objective, **options, return_displacement=True)
    assert fm.epsilon_sharpness(objective, **options) == dataclasses.replace(
        first, displacement=None
    )
    assert first.value > 0
    shift = first.displacement.double()
    exact, theta = case.exact()
    if subspace is None:
        assert bool((shift.abs() <= 1e-2 * (theta.abs() + 1)).all())
    before, after = exact_loss(case), exact(theta + shift).item()
    expected = 100 * (after - before) / (1 + before)
    slack = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2.0}[dtype]
    assert first.value == pytest.approx(expected, rel=1e-3, abs=slack)


@widest_entry
def test_balls_and_noise_are_rises_of_the_loss_by_hand(name, dtype):
    case = build(name, dtype)
    objective = case.objective()
    exact, theta = case.exact()
    before = exact_loss(case)
    gradient = exact_gradient(case)
    rel = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 0.2}[dtype]
    slack = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    assert fm.gradient_norm(objective).value == pytest.approx(float(gradient.norm()), rel=rel)
    sam = fm.sam_sharpness(objective, rho=0.1, return_displacement=True)
    expected = exact(theta + 0.1 * gradient / gradient.norm()).item() - before
    assert sam.value == pytest.approx(max(expected, 0.0), rel=rel, abs=slack)
    assert sam.first_order == pytest.approx(0.1 * float(gradient.norm()), rel=rel)
    average = fm.average_sharpness(objective, sigma=0.1, samples=2, seed=4)
    generator = torch.Generator().manual_seed(4)
    rises = []
    for _ in range(2):
        z = torch.randn(objective.size, generator=generator, dtype=objective.dtype).double()
        sides = [exact(theta + sign * 0.1 * z).item() for sign in (1, -1)]
        rises.append(sum(sides) / 2 - before)
    assert average.value == pytest.approx(sum(rises) / 2, rel=rel, abs=slack)


def perturbed(model, scale, seed=0):
    """A copy with noise on its parameters; buffers stay."""
    twin = copied(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in twin.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += scale * noise.to(parameter.dtype)
    return twin


@widest_entry
def test_interpolation_to_a_perturbed_copy(name, dtype):
    case = build(name, dtype)
    end = perturbed(case.unwrapped, 0.1)
    objective = case.objective()
    curve = fm.interpolate(objective, case.model, end, alphas=[0, 0.5, 1])
    assert curve.loss[0] == objective.loss()
    inner = None if case.inner is None else end
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for index, scale in ((1, 0.05), (2, 0.1)):
        there = perturbed(case.unwrapped, scale)
        twin = dataclasses.replace(case, model=there, inner=inner and there)
        assert curve.loss[index] == pytest.approx(exact_loss(twin), rel=tolerance)
    same = fm.interpolate(objective, case.model.state_dict(), end.state_dict(), alphas=[0, 0.5, 1])
    assert same.loss == curve.loss


@widest_entry
def test_layers_have_the_curvature_of_their_blocks(name, dtype):
    case = build(name, dtype)
    objective = case.objective()
    # One warning for all the layers; coarser ones in the larger models, to save time.
    depth = None if objective.size <= 150 else 1
    with expected_warnings(case, results=lambda: [result]):
        result = fm.layerwise(objective, depth=depth, tol=1e-2, trace_products=2)
    hessian = cached_dense_hessian(name, dtype)
    places = dict(objective.layout.slices())
    assert sum(layer.parameters for layer in result.layers) == objective.size
    assert result.passes <= max(layer.products for layer in result.layers)
    for layer in result.layers:
        own = [
            torch.arange(p.start, p.stop)
            for n, p in places.items()
            if ".".join(n.split(".")[:-1][:depth]) == layer.name
        ]
        rows = torch.cat(own)
        assert len(rows) == layer.parameters
        block = hessian[rows][:, rows]
        top = float(torch.linalg.eigvalsh(block)[-1])
        assert abs(layer.eigenvalue - top) <= layer.residual + floor(case)
        # The variance of zᵀ H z over the block's rows, whose estimate from few probes is poor.
        square = hessian[rows].square()
        within = float(square[:, rows].sum() - block.diagonal().square().sum())
        spread = math.sqrt((within + float(square.sum() - block.diagonal().square().sum())) / 2)
        assert abs(layer.trace - float(block.trace())) <= 5 * spread + 20 * floor(case)


def keywords(case):
    return {key: getattr(case, key) for key in ("batch_loss", "params", "weight", "mode")}


@widest_entry
def test_the_report_agrees_with_the_hessian_and_with_its_parts(name, dtype):
    case = build(name, dtype)
    with expected_warnings(case):
        report = fm.sharpness(
            case.model,
            case.loss_fn,
            case.batches,
            measures=["gradient_norm", "random_sharpness", "trace"],
            trace_products=10,
            samples=1,
            seed=4,
            **keywords(case),
        )
    assert report.loss == pytest.approx(exact_loss(case), rel=VALUE[dtype])
    norm = float(exact_gradient(case).norm())
    assert report.gradient_norm == pytest.approx(norm, rel=VALUE[dtype])
    missed = abs(report.trace.value - float(cached_dense_hessian(name, dtype).trace()))
    assert missed <= 4 * report.trace.standard_error + 10 * floor(case)
    shaken = report.random_sharpness
    assert shaken == fm.random_sharpness(case.objective(), samples=1, seed=4)
    assert [t.name for t in shaken.tensors] == list(case.names())
    assert math.isfinite(shaken.value)
    assert any("differences of gradients" in n for n in report.notes) == bool(case.approximate)


@parametrized([p for p in WIDEST if p[0] in APPROXIMATE])
def test_the_report_has_eigenvalues_by_differences(name, dtype):
    def worse(one, other):
        return other if one.converged else one

    case = build(name, dtype)
    # Both ends come from one call, which warns once.
    with expected_warnings(case, results=lambda: [worse(report.largest, report.smallest)]):
        report = fm.sharpness(
            case.model,
            case.loss_fn,
            case.batches,
            measures="eigenvalues",
            eigenvalues=2,
            **keywords(case),
        )
    spectrum = torch.linalg.eigvalsh(cached_dense_hessian(name, dtype))
    for found, ends in ((report.largest, spectrum[[-1, -2]]), (report.smallest, spectrum[:1])):
        gaps = (found.eigenvalues - ends).abs()
        assert bool((gaps <= found.residuals + floor(case)).all())
    assert FAULTS[name][0] in report.notes[-1]


@every_third_entry
@pytest.mark.parametrize("cache", [True, False])
def test_several_points_have_the_losses_of_each(name, dtype, cache):
    objective = build(name, dtype).objective(cache=cache)
    shifts = 0.1 * gaussian(3, objective.size, seed=10, dtype=objective.dtype)
    expected = [objective.loss_at(shift) for shift in shifts]
    for _ in range(2):
        assert objective.losses_at(shifts) == expected


@float64_entry
def test_a_displaced_point_has_the_values_of_a_displaced_model(name):
    case = build(name)
    objective = case.objective()
    shift = 0.1 * gaussian(objective.size, 1, seed=9)[:, 0]
    exact, theta = case.exact()
    wanted = exact(theta + shift).item()
    assert objective.loss_at(shift) == pytest.approx(wanted, rel=1e-12)
    value, gradient = objective.value_and_gradient(shift)
    assert value == pytest.approx(wanted, rel=1e-12)
    expected = torch.autograd.functional.jacobian(exact, theta + shift)
    assert relative(gradient, expected) <= 1e-9


@widest_entry
def test_pieces_of_batches_give_the_same_or_are_refused(name, dtype):
    case = build(name, dtype)
    value, gradient = case.objective().value_and_gradient()
    try:
        found, pieces = case.objective(microbatch=2).value_and_gradient()
    except fm.InvalidArgumentError as error:
        said = str(error)
    else:
        assert found == pytest.approx(value, rel=VALUE[dtype])
        assert relative(pieces, gradient.double()) <= VALUE[dtype]
        return
    assert "microbatch=" in said
    assert "smaller batches" in said


def test_the_zoo_holds_wrapped_models_and_plain_ones():
    wrapped = [name for name in NAMES if build(name).inner is not None]
    assert len(wrapped) >= 4
    assert all(isinstance(build(name).model, nn.Module) for name in NAMES)
