"""The log evidence against closed forms and dense determinants."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn

import flatminima as fm
from oracles import dense_gauss_newton
from zoo import build


def seeded(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def dense_evidence(case, tau, observations=None):
    objective = case.objective()
    count = objective.batches.total_weight if observations is None else observations
    matrix = count * dense_gauss_newton(case)
    eye = torch.eye(len(matrix), dtype=torch.float64)
    point = objective.point().double()
    return float(
        -count * objective.loss()
        - 0.5 * tau * point @ point
        + 0.5 * len(matrix) * math.log(tau)
        - 0.5 * torch.linalg.slogdet(matrix + tau * eye)[1]
    )


@pytest.mark.parametrize("name", ["softmax_regression", "mlp_batch_norm_dropout", "class_weighted"])
@pytest.mark.parametrize("tau", [0.01, 1.0, 30.0])
def test_equals_the_dense_computation(name, tau):
    case = build(name)
    objective = case.objective()
    # The chains are as long as the space, so that only the random vectors' spread is left.
    found = fm.laplace_log_evidence(objective, prior_precision=tau, steps=objective.size)
    exact = dense_evidence(case, tau)
    assert found.quadrature_error < 1e-6
    assert abs(found.value - exact) <= 4 * found.standard_error
    parts = found.log_likelihood + found.log_prior + found.log_volume
    assert found.value == pytest.approx(parts, rel=1e-12)
    whole = fm.laplace_log_evidence(objective, prior_precision=tau, outliers=objective.size)
    assert whole.value == pytest.approx(exact, rel=1e-9)
    assert whole.standard_error < 1e-9 * abs(exact)


def test_is_the_exact_integral_for_linear_regression():
    """∫ exp(−‖y − Xθ‖²) N(θ; 0, I/τ) dθ, where Laplace's approximation leaves nothing out."""
    x, y, tau = seeded(20, 3), seeded(20, 1, seed=1), 0.7
    model = nn.Linear(3, 1, bias=False).double()
    best = torch.linalg.solve(2 * x.T @ x + tau * torch.eye(3).double(), 2 * x.T @ y)
    with torch.no_grad():
        model.weight.copy_(best.T)
    # y is normal with this covariance, and the likelihood lacks the factor π^(N/2).
    covariance = 0.5 * torch.eye(20).double() + x @ x.T / tau
    normal = torch.distributions.MultivariateNormal(torch.zeros(20).double(), covariance)
    exact = float(normal.log_prob(y[:, 0])) + 10 * math.log(math.pi)
    objective = fm.Objective(model, nn.MSELoss(), (x, y))
    found = fm.laplace_log_evidence(objective, prior_precision=tau, outliers=3)
    assert found.value == pytest.approx(exact, rel=1e-10)
    assert found.observations == 20


def test_the_best_prior_is_where_the_evidence_is_largest():
    case = build("mlp_batch_norm_dropout")
    objective = case.objective()
    found = fm.laplace_log_evidence(objective, prior_precision="optimise", outliers=objective.size)
    best = minimize_scalar(
        lambda logarithm: -dense_evidence(case, math.exp(logarithm)), bounds=(-9, 9)
    )
    assert found.optimised
    assert math.log(found.prior_precision) == pytest.approx(float(best.x), abs=1e-3)
    assert found.value == pytest.approx(-float(best.fun), rel=1e-8)
    point = objective.point()
    assert found.effective_parameters == pytest.approx(
        found.prior_precision * float(point @ point), rel=1e-6
    )


def test_both_spellings_are_understood():
    objective = build("softmax_regression").objective()
    one, other = (
        fm.laplace_log_evidence(objective, prior_precision=p, steps=5)
        for p in ("optimise", "optimize")
    )
    assert one == other


def test_the_optimum_costs_no_products_of_its_own():
    objective = build("padded_token_model").objective()
    given = fm.laplace_log_evidence(objective, prior_precision=2.0, steps=20)
    best = fm.laplace_log_evidence(objective, prior_precision="optimise", steps=20)
    assert best.products == given.products
    same = fm.laplace_log_evidence(objective, prior_precision=best.prior_precision, steps=20)
    assert same.value == pytest.approx(best.value, rel=1e-12)
    assert (
        same.value
        == fm.laplace_log_evidence(objective, prior_precision=best.prior_precision, steps=20).value
    )


def test_the_flatter_of_two_minima_has_more_mass():
    objective = build("mlp_batch_norm_dropout").objective()
    curvature = fm.GaussNewtonOperator(objective)
    flat, sharp = (
        fm.laplace_log_evidence(objective, operator=scale * curvature, outliers=objective.size)
        for scale in (1.0, 10.0)
    )
    assert (flat.log_likelihood, flat.log_prior) == (sharp.log_likelihood, sharp.log_prior)
    assert flat.value - sharp.value == pytest.approx(flat.log_volume - sharp.log_volume)
    assert flat.log_volume > sharp.log_volume + 1


def test_observations_and_the_operator_may_be_given():
    case = build("softmax_regression")
    objective = case.objective()
    found = fm.laplace_log_evidence(objective, observations=5, outliers=objective.size)
    assert found.value == pytest.approx(dense_evidence(case, 1.0, 5), rel=1e-9)
    fisher = fm.FisherOperator(objective)
    same = fm.laplace_log_evidence(
        objective, observations=5, operator=fisher, outliers=objective.size
    )
    assert same.value == pytest.approx(found.value, rel=1e-9)


def test_objectives_with_batch_loss_need_an_operator():
    case = build("quadratic")
    with pytest.raises(fm.InvalidArgumentError, match="batch_loss"):
        fm.laplace_log_evidence(case.objective())
    hessian = fm.HessianOperator(case.objective())
    with pytest.raises(fm.NotPositiveDefiniteError, match="-2"):
        fm.laplace_log_evidence(case.objective(), operator=hessian)
    shifted = fm.laplace_log_evidence(
        case.objective(), operator=hessian, prior_precision=5.0, outliers=6
    )
    assert math.isfinite(shifted.value)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"prior_precision": 0}, "prior_precision"),
        ({"prior_precision": -1.0}, "prior_precision"),
        ({"prior_precision": "best"}, "'optimise'"),
        ({"observations": 0}, "observations"),
        ({"operator": fm.MatrixOperator(torch.eye(3))}, "15 parameters"),
        ({"probes": 1}, "probes"),
    ],
)
def test_bad_arguments_are_named(options, fragment):
    with pytest.raises(fm.InvalidArgumentError, match=fragment):
        fm.laplace_log_evidence(build("softmax_regression").objective(), **options)


def test_a_model_of_zeros_has_no_best_prior():
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    objective = fm.Objective(model, nn.MSELoss(), (torch.eye(2), torch.ones(2, 1)))
    with pytest.raises(fm.InvalidArgumentError, match="all parameters are zero"):
        fm.laplace_log_evidence(objective, prior_precision="optimise")
