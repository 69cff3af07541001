"""Sums, blocks, projections and preconditioners: what they refuse, and what is theirs alone."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import flatminima as fm
from zoo import build, matrix_with_spectrum

MATRIX = matrix_with_spectrum([4.0, 2.0, 1.0, 0.0, -3.0], seed=1)


def objective(model=None, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)) if model is None else model
    x, y = torch.randn(8, 4).to(dtype), torch.randint(2, (8,))
    return fm.Objective(model.to(dtype), nn.CrossEntropyLoss(), (x, y), **options)


def operator(dtype=torch.float32):
    return fm.MatrixOperator(MATRIX.to(dtype))


def trained(make, model, steps=2):
    optimiser = make(model.parameters())
    for _ in range(steps):

        def loss():
            optimiser.zero_grad()
            value = model(torch.ones(3, 4)).square().mean()
            value.backward()
            return value

        optimiser.step(loss)
    return optimiser


# ---------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    "factor",
    [
        2,
        2.0,
        np.float32(2),
        np.float64(2),
        np.int64(2),
        np.array(2.0),
        torch.tensor(2.0),
        torch.tensor(2),
    ],
    ids=lambda f: f"{type(f).__module__}.{type(f).__name__}",
)
def test_any_number_is_a_factor_on_both_sides(factor):
    for scaled in (factor * operator(), operator() * factor):
        assert isinstance(scaled, fm.SumOperator)
        assert scaled.coefficients == [2.0]


@pytest.mark.parametrize(
    ("factor", "shown"),
    [
        (torch.ones(5), r"Tensor of shape \(5,\)"),
        (np.ones(5), r"ndarray of shape \(5,\)"),
        (torch.ones(1), r"Tensor of shape \(1,\)"),
        ("2", "str"),
        (None, "NoneType"),
        (True, "bool"),
        ([2.0], "list"),
        (2j, "complex"),
        (fm.MatrixOperator(MATRIX), r"MatrixOperator of shape \(5, 5\)"),
    ],
)
def test_what_is_no_number_is_no_factor(factor, shown):
    message = rf"MatrixOperator \* takes a number; got {shown}\. .*operator @ vector"
    with pytest.raises(fm.ArgumentTypeError, match=message):
        operator() * factor
    with pytest.raises(fm.ArgumentTypeError, match=message):
        factor * operator()


@pytest.mark.parametrize("other", [3, 3.0, torch.eye(5), np.eye(5), "x", None])
def test_numbers_and_matrices_are_not_added(other):
    for sign, call in (
        ("+", lambda: operator() + other),
        ("+", lambda: other + operator()),
        ("-", lambda: operator() - other),
        ("-", lambda: other - operator()),
    ):
        with pytest.raises(
            TypeError, match=rf"MatrixOperator \{sign}.*shifted\(number\)"
        ) as caught:
            call()
        assert isinstance(caught.value, fm.ArgumentTypeError)


def test_the_sum_of_a_list_is_a_sum_operator():
    with pytest.raises(fm.ArgumentTypeError, match=r"fm.SumOperator\(operators\)"):
        sum([operator(), operator()])
    found = fm.SumOperator(o for o in [operator(), operator()])
    torch.testing.assert_close(found.to_dense(), 2 * MATRIX.float())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_factors_and_shifts_are_finite(value):
    with pytest.raises(fm.InvalidArgumentError, match=r"'coefficients'.*finite"):
        value * operator()
    with pytest.raises(fm.InvalidArgumentError, match=r"'shift' argument of shifted.*finite"):
        operator().shifted(value)
    with pytest.raises(fm.InvalidArgumentError, match=r"'shift' argument of SumOperator.*finite"):
        fm.SumOperator([operator()], shift=value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([],), fm.InvalidArgumentError, "one operator at least"),
        ((fm.MatrixOperator(MATRIX),), fm.ArgumentTypeError, "'operators'.*list; got MatrixOp"),
        (([MATRIX],), fm.ArgumentTypeError, r"must be a LinearOperator; got Tensor.*MatrixOp"),
        (([fm.MatrixOperator(MATRIX)], 2.0), fm.ArgumentTypeError, "'coefficients'.*got float"),
        (([fm.MatrixOperator(MATRIX)], ["2"]), fm.ArgumentTypeError, "'coefficients'.*got '2'"),
        (([fm.MatrixOperator(MATRIX)], [1, 2]), fm.InvalidArgumentError, "got 2 for 1 operators"),
    ],
)
def test_wrong_arguments_of_a_sum(arguments, error, message):
    with pytest.raises(error, match=message):
        fm.SumOperator(*arguments)


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (fm.MatrixOperator(torch.eye(4)), fm.ShapeError, r"one size.*5 × 5.*4 × 4"),
        (fm.MatrixOperator(torch.eye(5).double()), fm.InvalidArgumentError, "float32.*float64"),
        (fm.FunctionOperator(abs, 5, device="meta"), fm.DeviceError, "one device.*cpu.*meta"),
    ],
)
def test_operators_of_different_kinds_of_vectors_are_not_added(other, error, message):
    for call in (lambda: operator() + other, lambda: operator() - other):
        with pytest.raises(error, match=message):
            call()


def test_sums_within_sums_are_resolved():
    a, b = operator(), operator()
    total = 2 * (a - 3 * b).shifted(0.5) - a
    assert total.operators == [a, b, a]
    assert total.coefficients == [2.0, -6.0, -1.0]
    assert total.shift == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_cancels_but_for_rounding_is_zero(dtype):
    parts = [fm.MatrixOperator(matrix_with_spectrum([3.0, 1, 0, -2, 5], s, dtype)) for s in (2, 3)]
    both = fm.MatrixOperator(parts[0].matrix + parts[1].matrix)
    nothing = both - parts[0] - parts[1]
    result = fm.lanczos(nothing)
    assert result.converged
    assert 0 < nothing.floor < 1e3 * torch.finfo(dtype).eps
    assert abs(float(result.eigenvalues[0])) <= nothing.floor


def test_parameters_of_another_layout_are_not_named():
    first, second = (objective(nn.Linear(4, 2, bias=bias)) for bias in (True, True))
    same = fm.HessianOperator(first) + fm.HessianOperator(second)
    assert same.layout == first.layout
    other = fm.HessianOperator(objective(nn.Sequential(nn.Linear(4, 2))))
    assert (fm.HessianOperator(first) + other).layout is None


# -------------------------------------------------------------------------------------- blocks


def test_operators_without_parameters_have_no_blocks():
    for whole in (
        operator(),
        operator() + operator(),
        fm.PreconditionedOperator(operator(), torch.ones(5)),
    ):
        with pytest.raises(fm.InvalidArgumentError, match=r"5 × 5.*ProjectedOperator"):
            fm.BlockOperator(whole, "weight")


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ("2.wieght", fm.ParameterSelectionError, "'2.wieght' matches no.*Did you mean '2.weight'"),
        (["0.*", "bias"], fm.ParameterSelectionError, "'bias' matches no.*'2.bias' or '0.bias'"),
        ([], fm.ParameterSelectionError, "empty list"),
        (lambda name, parameter: False, fm.ParameterSelectionError, "selects no parameter"),
        (3, fm.ArgumentTypeError, "got 3"),
        (None, fm.ArgumentTypeError, "got None.*the operator itself"),
    ],
)
def test_wrong_choices_of_a_block(params, error, message):
    with pytest.raises(error, match=message):
        fm.BlockOperator(fm.HessianOperator(objective()), params)


def test_a_block_knows_only_the_names_of_its_operator():
    hessian = fm.HessianOperator(objective(params="0.*"))
    with pytest.raises(fm.ParameterSelectionError, match=r"'2\.bias' matches no parameter"):
        fm.BlockOperator(hessian, "2.bias")
    again = fm.BlockOperator(fm.BlockOperator(hessian, ["0.*"]), "0.bias")
    assert again.shape == (3, 3)


def test_a_block_has_the_type_of_its_operator():
    """Where a model has parameters of several types, vectors have the widest."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.wide = nn.Linear(4, 3), nn.Linear(3, 2).double()

        def forward(self, x):
            return self.wide(self.narrow(x).double())

    torch.manual_seed(0)
    model = Mixed()
    data = torch.randn(8, 4), torch.randint(2, (8,))
    hessian = fm.HessianOperator(fm.Objective(model, nn.CrossEntropyLoss(), data))
    block = fm.BlockOperator(hessian, "narrow.*")
    assert block.dtype == block.layout.dtype == torch.float64
    optimiser = torch.optim.Adam(model.parameters())
    nn.functional.cross_entropy(model(data[0]), data[1]).backward()
    optimiser.step()
    scaled = fm.PreconditionedOperator(block, optimiser)
    assert scaled.diagonal.dtype == scaled.to_dense().dtype == torch.float64


def test_blocks_are_those_of_the_objective_of_their_parameters():
    case = build("mlp_batch_norm_dropout")
    whole = fm.GaussNewtonOperator(case.objective())
    name = whole.layout.names[-2]
    own = fm.GaussNewtonOperator(case.objective(params=name))
    block = fm.BlockOperator(whole, name)
    torch.testing.assert_close(block.to_dense(), own.to_dense(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(block.exact_diagonal(), own.exact_diagonal(), rtol=1e-9, atol=1e-12)


# --------------------------------------------------------------------------------- projections


@pytest.mark.parametrize(
    ("basis", "error", "message"),
    [
        (torch.ones(5, 2), fm.InvalidArgumentError, r"independent.*\(5, 2\) has rank 1"),
        (torch.zeros(5, 1), fm.InvalidArgumentError, "rank 0"),
        (torch.eye(5)[:, [0, 1, 0]], fm.InvalidArgumentError, "rank 2"),
        (torch.empty(5, 0), fm.InvalidArgumentError, r"\(5, 0\) has rank 0"),
        (torch.ones(5, 6).tril(), fm.InvalidArgumentError, "at most 5.*rank 5"),
        (torch.ones(4, 2), fm.ShapeError, r"takes shape \(5, k\); got \(4, 2\)"),
        (torch.ones(5), fm.ShapeError, r"takes shape \(5, k\); got \(5,\)"),
        (np.eye(5), fm.ArgumentTypeError, "takes a tensor.*got ndarray"),
        (torch.eye(5) * math.nan, fm.NonFiniteError, "NaN or infinity at index 0"),
        (torch.eye(5, device="meta"), fm.DeviceError, "the vector is on meta"),
    ],
)
@pytest.mark.parametrize("complement", [False, True])
def test_wrong_bases(basis, error, message, complement):
    with pytest.raises(error, match=f"ProjectedOperator.*{message}"):
        fm.ProjectedOperator(operator(), basis, complement=complement)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_may_have_any_length(dtype):
    basis = torch.eye(5, dtype=dtype)[:, :3] * torch.tensor([1e-12, 1.0, 1e12], dtype=dtype)
    found = fm.ProjectedOperator(operator(dtype), basis).to_dense()
    expected = torch.zeros(5, 5, dtype=dtype)
    expected[:3, :3] = MATRIX[:3, :3]
    torch.testing.assert_close(found, expected)


def test_the_basis_is_orthonormal_and_no_view_of_the_users():
    basis = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    found = fm.ProjectedOperator(operator(), basis)
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(2))
    before = found.to_dense()
    basis.zero_()
    assert torch.equal(found.to_dense(), before)


def test_deflation_brings_the_next_eigenvalues():
    whole = operator(torch.float64)
    top = fm.lanczos(whole, k=2, which="LM", tol=1e-8)
    rest = fm.ProjectedOperator(whole, top.eigenvectors, complement=True)
    found = fm.lanczos(rest, k=2, which="LA", tol=1e-8).eigenvalues
    torch.testing.assert_close(found, torch.tensor([2.0, 1.0]).double(), rtol=1e-6, atol=1e-9)


def test_a_whole_basis_leaves_all_or_nothing():
    basis = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).double()
    whole = operator(torch.float64)
    torch.testing.assert_close(fm.ProjectedOperator(whole, basis).to_dense(), MATRIX)
    nothing = fm.ProjectedOperator(whole, basis, complement=True)
    assert float(nothing.to_dense().abs().max()) < 1e-12


# ------------------------------------------------------------------------------ preconditioners


@pytest.mark.parametrize(
    ("diagonal", "error", "message"),
    [
        (torch.tensor([1.0, 1, 0, 1, 1]), fm.InvalidArgumentError, "positive.*entries is 0.*small"),
        (torch.tensor([1.0, 1, -2, 1, 1]), fm.InvalidArgumentError, "positive.*entries is -2"),
        (torch.tensor([1.0, math.nan, 1, 1, 1]), fm.NonFiniteError, "NaN or infinity at index 1"),
        (torch.tensor([1.0, math.inf, 1, 1, 1]), fm.NonFiniteError, "NaN or infinity at index 1"),
        (torch.ones(4), fm.ShapeError, r"takes shape \(5,\); got \(4,\)"),
        (torch.ones(5, 5), fm.ShapeError, r"takes shape \(5,\); got \(5, 5\)"),
        (torch.ones(5, device="meta"), fm.DeviceError, "meta"),
        (torch.ones(5) * 1j, fm.ArgumentTypeError, "real"),
        ([1.0] * 5, fm.ArgumentTypeError, r"'preconditioner'.*list.*torch.optim.Optimizer"),
        (nn.Linear(5, 1), fm.ArgumentTypeError, r"'preconditioner'.*Linear"),
        (None, fm.ArgumentTypeError, r"'preconditioner'.*NoneType"),
    ],
)
def test_wrong_diagonals(diagonal, error, message):
    with pytest.raises(error, match=message):
        fm.PreconditionedOperator(operator(), diagonal)


UNKNOWN = {
    "SGD": torch.optim.SGD,
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "ASGD": torch.optim.ASGD,
    "Rprop": torch.optim.Rprop,
    "LBFGS": torch.optim.LBFGS,
    "Adafactor": torch.optim.Adafactor,
}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("kind", UNKNOWN)
def test_other_optimisers_are_refused(kind, steps):
    if kind == "Adamax" and steps == 0:
        pytest.skip("looks like Adam before its first step")
    whole = fm.HessianOperator(objective())
    optimiser = trained(UNKNOWN[kind], whole.objective.model, steps)
    with pytest.raises(
        fm.ArgumentTypeError, match=rf"knows the state of Adam.*got {kind.split()[0]}"
    ):
        fm.PreconditionedOperator(whole, optimiser)


def test_optimisers_that_do_not_fit_are_refused():
    whole = fm.HessianOperator(objective())
    model = whole.objective.model
    with pytest.raises(fm.InvalidArgumentError, match=r"no step for '0\.weight' yet"):
        fm.PreconditionedOperator(whole, torch.optim.Adam(model.parameters()))
    other = trained(torch.optim.Adam, objective().model)
    with pytest.raises(
        fm.InvalidArgumentError, match=r"not hold the parameter '0\.weight'.*another"
    ):
        fm.PreconditionedOperator(whole, other)
    some = trained(lambda p: torch.optim.Adam(list(p)[:2]), model)
    with pytest.raises(fm.InvalidArgumentError, match=r"'2\.weight'.*params="):
        fm.PreconditionedOperator(whole, some)
    assert fm.PreconditionedOperator(fm.BlockOperator(whole, "0.*"), some).shape == (15, 15)
    with pytest.raises(fm.InvalidArgumentError, match=r"5 × 5.*diagonal as a tensor"):
        fm.PreconditionedOperator(operator(), some)


def test_the_state_is_taken_as_it_is_and_copied():
    whole = fm.HessianOperator(objective())
    model = whole.objective.model
    optimiser = trained(torch.optim.Adam, model)
    first = fm.PreconditionedOperator(whole, optimiser)
    kept = first.diagonal.clone()
    optimiser.state[model[0].weight]["exp_avg_sq"].mul_(4)
    assert torch.equal(first.diagonal, kept)
    second = fm.PreconditionedOperator(whole, optimiser).diagonal
    torch.testing.assert_close(second[:12] - 1e-8, 2 * (kept[:12] - 1e-8))
    given = torch.ones(5)
    scaled = fm.PreconditionedOperator(operator(), given)
    given.zero_()
    assert torch.equal(scaled.diagonal, torch.ones(5))


def test_a_state_that_was_loaded_serves_as_well():
    whole = fm.HessianOperator(objective())
    model = whole.objective.model
    optimiser = trained(torch.optim.Adam, model)
    resumed = torch.optim.Adam(model.parameters())
    resumed.load_state_dict(optimiser.state_dict())
    assert torch.equal(
        fm.PreconditionedOperator(whole, resumed).diagonal,
        fm.PreconditionedOperator(whole, optimiser).diagonal,
    )


def test_moments_in_half_precision_are_widened():
    """1e-8 is zero in float16."""
    whole = fm.HessianOperator(objective(nn.Linear(4, 2).bfloat16(), torch.bfloat16))
    optimiser = torch.optim.Adam(whole.objective.model.parameters())
    for p in whole.objective.model.parameters():
        p.grad = torch.zeros_like(p)
    optimiser.step()
    found = fm.PreconditionedOperator(whole, optimiser).diagonal
    torch.testing.assert_close(found, torch.full((10,), 1e-8))


def test_parameters_without_gradient_do_not_drown_the_others():
    """Their D is ε: products for them are zero, and not as uncertain as 1 / ε."""
    torch.manual_seed(0)
    x = torch.randn(100, 10)
    x[:, :3] = 0
    y = (x @ torch.randn(10, 3)).argmax(1)
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    whole = fm.HessianOperator(fm.Objective(model, nn.CrossEntropyLoss(), (x, y)))
    scaled = fm.PreconditionedOperator(whole, optimiser)
    assert float(scaled.diagonal.min()) < 1e-7
    scale = scaled.diagonal.double().rsqrt()
    dense = scale[:, None] * whole.to_dense().double() * scale
    expected = torch.linalg.eigvalsh(dense)
    result = fm.lanczos(scaled, k=3, tol=1e-4)
    assert result.converged
    assert scaled.floor < 1e-4 * float(expected[-1])
    torch.testing.assert_close(result.eigenvalues, expected[-3:].flip(0), rtol=1e-3, atol=0)
    smallest = fm.lanczos(scaled, which="SA", tol=1e-4).eigenvalues
    torch.testing.assert_close(smallest, expected[:1], rtol=1e-2, atol=0)


def test_errors_of_products_grow_with_the_preconditioner():
    whole = fm.HessianOperator(objective(dtype=torch.float64), method="finite_differences")
    diagonal = torch.linspace(0.25, 2, whole.shape[0]).double()
    scaled = fm.PreconditionedOperator(whole, diagonal)
    scaled.to_dense()
    assert whole.error > 0
    assert scaled.error == pytest.approx(4 * whole.error)
    total = -3 * scaled + whole
    total.to_dense()
    assert total.error == pytest.approx(13 * whole.error)
    result = fm.lanczos(total)
    assert float(result.residuals[0]) >= total.error


def test_the_diagonal_of_a_preconditioned_hessian_of_a_quadratic_is_flat():
    """D = diag A makes all diagonal entries one."""
    matrix = MATRIX + 5 * torch.eye(5).double()
    scaled = fm.PreconditionedOperator(fm.MatrixOperator(matrix), matrix.diagonal())
    torch.testing.assert_close(scaled.exact_diagonal(), torch.ones(5).double())
    assert fm.trace(scaled).value == pytest.approx(5.0)
