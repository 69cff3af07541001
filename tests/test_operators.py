import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import flatminima as fm
from zoo import build, dense_hessian, joined, matrix_with_spectrum, names_of

BASIC = pytest.mark.parametrize("name", names_of("basic"))

PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["f64", "f32"]
)


def vectors(n, k, seed=0, dtype=torch.float64):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


# ---------------------------------------------------------------------------- Hessian products


@BASIC
@PRECISIONS
def test_hessian_equals_the_dense_one(name, dtype, tolerance):
    case = build(name, dtype)
    operator = fm.HessianOperator(case.objective())
    expected = dense_hessian(case)
    found = operator @ torch.eye(operator.shape[0], dtype=dtype)
    assert operator.shape == tuple(expected.shape)
    assert found.dtype == operator.dtype == dtype
    assert relative_error(found, expected) <= tolerance


@BASIC
@PRECISIONS
def test_products_with_random_vectors_equal_the_dense_ones(name, dtype, tolerance):
    case = build(name, dtype)
    operator = fm.HessianOperator(case.objective())
    v = vectors(operator.shape[0], 1, seed=5, dtype=dtype)[:, 0]
    assert relative_error(operator.matvec(v), dense_hessian(case) @ v.double()) <= tolerance


@BASIC
@PRECISIONS
def test_matmat_equals_matvec_column_by_column(name, dtype, tolerance):
    operator = fm.HessianOperator(build(name, dtype).objective())
    block = vectors(operator.shape[0], 4, seed=6, dtype=dtype)
    columns = torch.stack([operator.matvec(c) for c in block.T], dim=1)
    found = operator.matmat(block)
    assert found.shape == block.shape
    assert relative_error(found, columns.double()) <= tolerance


@BASIC
@given(seed=st.integers(0, 10**6))
@settings(max_examples=3)
def test_hessian_is_symmetric(name, seed):
    operator = fm.HessianOperator(build(name).objective())
    u, v = vectors(operator.shape[0], 2, seed=seed).T
    left, right = operator.inner(u, operator @ v), operator.inner(v, operator @ u)
    scale = float((operator @ v).norm() * u.norm() + (operator @ u).norm() * v.norm())
    assert abs(float(left - right)) <= 1e-13 * scale


@BASIC
@given(
    seed=st.integers(0, 10**6),
    a=st.floats(-1e3, 1e3, allow_subnormal=False),
    b=st.floats(-1e3, 1e3, allow_subnormal=False),
)
@settings(max_examples=3)
def test_hessian_is_linear(name, seed, a, b):
    operator = fm.HessianOperator(build(name).objective())
    u, v = vectors(operator.shape[0], 2, seed=seed).T
    expected = a * (operator @ u) + b * (operator @ v)
    scale = float(abs(a) * (operator @ u).norm() + abs(b) * (operator @ v).norm())
    assert float((operator @ (a * u + b * v) - expected).norm()) <= 1e-12 * scale


@PRECISIONS
def test_hessian_of_linear_regression_in_closed_form(dtype, tolerance):
    """2 XᵀX/(N·out) ⊗ I, the bias being a column of ones of its own."""
    case = build("linear_regression", dtype)
    x = joined(case.batches, 0).double()
    n, features = x.shape
    outputs = case.model.out_features
    gram = 2 / (n * outputs) * x.T @ x
    mean = 2 / (n * outputs) * x.sum(0)
    unit = torch.eye(outputs, dtype=torch.float64)
    weights = outputs * features
    expected = torch.zeros(weights + outputs, weights + outputs, dtype=torch.float64)
    expected[:weights, :weights] = torch.kron(unit, gram)
    expected[:weights, weights:] = torch.kron(unit, mean[:, None])
    expected[weights:, :weights] = expected[:weights, weights:].T
    expected[weights:, weights:] = 2 / outputs * unit
    found = fm.HessianOperator(case.objective()) @ torch.eye(weights + outputs, dtype=dtype)
    assert relative_error(found, expected) <= tolerance


@PRECISIONS
def test_hessian_of_softmax_regression_in_closed_form(dtype, tolerance):
    """(1/N) Σ (diag p − ppᵀ) ⊗ xxᵀ over the weights."""
    case = build("softmax_regression", dtype)
    objective = case.objective(params="weight")
    x = joined(case.batches, 0).double()
    chances = case.model.double()(x).softmax(1).detach()
    case.model.to(dtype)
    expected = sum(
        torch.kron(torch.diag(p) - torch.outer(p, p), torch.outer(row, row))
        for p, row in zip(chances, x, strict=True)
    ) / len(x)
    found = fm.HessianOperator(objective) @ torch.eye(objective.size, dtype=dtype)
    assert relative_error(found, expected) <= tolerance


@PRECISIONS
def test_hessian_of_a_quadratic_is_its_matrix(dtype, tolerance):
    case = build("quadratic", dtype)
    found = fm.HessianOperator(case.objective()) @ torch.eye(6, dtype=dtype)
    assert relative_error(found, case.model.matrix.double()) <= tolerance


def test_hessian_does_not_move_with_the_point_of_a_quadratic_but_with_the_model():
    case = build("class_weighted")
    operator = fm.HessianOperator(case.objective())
    before = operator @ torch.eye(operator.shape[0]).double()
    with torch.no_grad():
        case.model[0].weight += 0.5
    after = operator @ torch.eye(operator.shape[0]).double()
    assert relative_error(after, dense_hessian(case)) <= 1e-10
    assert relative_error(after, before) > 1e-3


def test_parameters_that_are_not_used_have_zero_rows_and_columns():
    case = build("unused_parameters")
    objective = case.objective()
    hessian = fm.HessianOperator(objective) @ torch.eye(objective.size).double()
    places = dict(objective.layout.slices())
    for name in ("idle", "spare.weight", "spare.bias"):
        assert torch.count_nonzero(hessian[places[name]]) == 0
        assert torch.count_nonzero(hessian[:, places[name]]) == 0
        assert torch.count_nonzero(objective.gradient()[places[name]]) == 0
    assert torch.count_nonzero(hessian[places["used.bias"]]) > 0


def test_only_unused_parameters_give_zero():
    objective = build("unused_parameters").objective(params="idle")
    product = fm.HessianOperator(objective) @ torch.ones(2).double()
    assert torch.equal(product, torch.zeros(2).double())
    assert torch.equal(objective.gradient(), torch.zeros(2).double())


@pytest.mark.parametrize("columns", [1, 3])
def test_a_constant_gradient_gives_zero(columns):
    model = nn.Linear(3, 1).double()
    data = (torch.randn(5, 3).double(), torch.zeros(5, 1))
    objective = fm.Objective(model, lambda output, target: output.mean(), data, batch_size=2)
    product = fm.HessianOperator(objective).matmat(torch.ones(4, columns).double())
    assert torch.equal(product, torch.zeros(4, columns).double())
    assert bool((objective.gradient() != 0).all())


def test_a_parameter_of_constant_gradient_beside_a_curved_one():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Parameter(torch.ones(2).double())
            self.curved = nn.Parameter(torch.ones(2).double())

        def forward(self, x):
            return x @ self.linear + (x * self.curved**3).sum(1)

    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double()
    objective = fm.Objective(Mixed(), lambda output, target: output.mean(), (x, x[:, 0]))
    hessian = fm.HessianOperator(objective) @ torch.eye(4).double()
    torch.testing.assert_close(hessian, torch.diag(torch.tensor([0.0, 0, 12, 18]).double()))


def test_hessian_under_half_precision_parameters_works_in_float32():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).bfloat16()
    x, y = torch.randn(8, 3).bfloat16(), torch.randn(8, 2).bfloat16()
    operator = fm.HessianOperator(fm.Objective(model, nn.MSELoss(), (x, y)))
    assert operator.dtype == torch.float32
    found = (operator @ torch.eye(8))[:6, :6]
    wide = x.double()
    expected = torch.kron(torch.eye(2).double(), wide.T @ wide / 8)
    assert relative_error(found, expected) <= 2e-2


def test_half_precision_products_survive_large_weights():
    """A weight above 65504 does not exist in float16."""
    torch.manual_seed(0)
    model = nn.Linear(2, 40000, bias=False).half()
    x, y = torch.randn(2, 2).half(), torch.zeros(2, 40000).half()
    operator = fm.HessianOperator(fm.Objective(model, nn.MSELoss(reduction="mean"), (x, y)))
    product = operator @ torch.full((operator.shape[0],), 1000.0)
    assert bool(product.isfinite().all())


def test_non_finite_losses_are_reported_by_products():
    case = build("linear_regression")
    case.batches[1][0][0, 0] = math.nan
    operator = fm.HessianOperator(case.objective())
    with pytest.raises(fm.NonFiniteError, match="loss of batch 1 is nan"):
        operator @ torch.ones(8).double()


def test_products_are_the_same_bitwise_every_time():
    first, second = (
        fm.HessianOperator(build("conv_batch_norm", torch.float32).objective()) for _ in range(2)
    )
    v = vectors(75, 1, dtype=torch.float32)[:, 0]
    assert torch.equal(first @ v, first @ v)
    assert torch.equal(first @ v, second @ v)


# ---------------------------------------------------------------------------- LinearOperator


MATRIX = matrix_with_spectrum([4.0, 2.0, 1.0, 0.0, -3.0], seed=1)


def test_to_scipy_leaves_the_array_alone():
    operator = fm.FunctionOperator(lambda v: v.mul_(2), 3, dtype=torch.float64).to_scipy()
    array = np.ones(3)
    np.testing.assert_array_equal(operator.matvec(array), 2 * np.ones(3))
    np.testing.assert_array_equal(array, np.ones(3))


def test_inner_is_the_dot_product():
    u, v = vectors(5, 2).T
    assert fm.MatrixOperator(MATRIX).inner(u, v).item() == pytest.approx(float((u * v).sum()))


# -------------------------------------------------------------------------------- MatrixOperator


@pytest.mark.parametrize(
    ("shape", "shown"),
    [((2, 3), r"\(2, 3\)"), ((3,), r"\(3,\)"), ((0, 0), r"\(0, 0\)"), ((2, 2, 2), r"\(2, 2, 2\)")],
)
def test_a_matrix_that_is_not_square_is_refused(shape, shown):
    with pytest.raises(fm.ShapeError, match=rf"takes shape \(n, n\); got {shown}"):
        fm.MatrixOperator(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_matrix_that_is_not_symmetric_is_refused(dtype):
    matrix = torch.eye(3, dtype=dtype)
    matrix[0, 2] = 1e-3
    with pytest.raises(fm.NotSymmetricError, match=r"differs from its transpose by 1\.00e-03"):
        fm.MatrixOperator(matrix)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_symmetry_is_judged_relative_to_the_matrix(scale):
    rounded = MATRIX.float() * scale
    rounded[0, 1] *= 1 + 1e-6
    assert fm.MatrixOperator(rounded).shape == (5, 5)
    rounded[0, 1] *= 1.1
    with pytest.raises(fm.NotSymmetricError):
        fm.MatrixOperator(rounded)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_matrix_that_is_not_finite_is_refused(value):
    matrix = torch.eye(3)
    matrix[1, 1] = value
    with pytest.raises(fm.NonFiniteError, match="matrix with NaN or infinity"):
        fm.MatrixOperator(matrix)


def test_a_complex_matrix_is_refused():
    with pytest.raises(fm.ArgumentTypeError, match=r"real matrix; got torch.complex64"):
        fm.MatrixOperator(torch.eye(2) + 0j)


def test_a_matrix_of_integers_works_in_float64():
    operator = fm.MatrixOperator(torch.tensor([[2, 1], [1, 2]]))
    assert operator.dtype == torch.float64
    assert (operator @ torch.tensor([1, 0])).tolist() == [2.0, 1.0]


def test_an_array_is_taken_as_a_matrix():
    operator = fm.MatrixOperator(np.diag([1.0, 2.0]))
    assert operator.dtype == torch.float64
    assert (operator @ torch.ones(2)).tolist() == [1.0, 2.0]


# ------------------------------------------------------------------------------ FunctionOperator


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda v: v[:2], r"\(2,\)"),
        (lambda v: v[:, None], r"\(3, 1\)"),
        (lambda v: 1.0, "float"),
        (lambda v: v.numpy(), "ndarray"),
    ],
)
def test_a_function_with_the_wrong_result_is_refused(function, got):
    operator = fm.FunctionOperator(function, 3)
    with pytest.raises(fm.ShapeError, match=rf"must return shape \(3,\).*{got}"):
        operator @ torch.ones(3)


def test_a_function_with_its_result_elsewhere_is_refused():
    operator = fm.FunctionOperator(lambda v: v.to("meta"), 3)
    with pytest.raises(fm.DeviceError, match="works on cpu; its product lies on meta"):
        operator @ torch.ones(3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("A", 3), {}, fm.ArgumentTypeError, "'function' argument.*callable; got 'A'"),
        ((abs, 0), {}, fm.InvalidArgumentError, "'size' argument.*≥ 1; got 0"),
        ((abs, 2.5), {}, fm.ArgumentTypeError, "'size' argument.*integer.*got 2.5"),
        ((abs, True), {}, fm.ArgumentTypeError, "'size' argument.*integer.*got True"),
        (
            (abs, 3),
            {"dtype": torch.int32},
            fm.InvalidArgumentError,
            "floating dtype; got torch.int32",
        ),
    ],
)
def test_wrong_arguments_of_a_function_operator(arguments, options, error, message):
    with pytest.raises(error, match=message):
        fm.FunctionOperator(*arguments, **options)


def test_a_function_may_write_into_its_argument():
    operator = fm.FunctionOperator(lambda v: v.mul_(2), 3)
    ones = torch.ones(3)
    assert (operator @ ones).tolist() == [2.0, 2.0, 2.0]
    assert ones.tolist() == [1.0, 1.0, 1.0]


def test_a_function_may_return_the_same_memory_each_time():
    out = torch.empty(3)
    operator = fm.FunctionOperator(lambda v: torch.mul(v, 2, out=out), 3)
    assert torch.equal(operator @ torch.eye(3), 2 * torch.eye(3))
    first = operator @ torch.ones(3)
    operator @ torch.zeros(3)
    assert first.tolist() == [2.0, 2.0, 2.0]


def test_a_hessian_needs_an_objective():
    with pytest.raises(fm.ArgumentTypeError, match="'objective' argument of HessianOperator"):
        fm.HessianOperator(nn.Linear(2, 1))


def test_the_base_class_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        fm.LinearOperator(3, torch.float32, torch.device("cpu"))


def test_a_matrix_knows_its_diagonal_and_a_hessian_its_layout():
    matrix = matrix_with_spectrum(torch.linspace(-1, 2, 6).double(), 3, torch.float64)
    operator = fm.MatrixOperator(matrix)
    assert torch.equal(operator.exact_diagonal(), matrix.diagonal())
    operator.exact_diagonal().zero_()
    assert torch.equal(operator.matrix, matrix)
    hessian = fm.HessianOperator(build("linear_regression").objective())
    assert hessian.layout is hessian.objective.layout
    assert operator.layout is None
    assert hessian.exact_diagonal() is None
