"""What every operator must do, for each kind of them, against dense matrices in float64."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from scipy.sparse.linalg import eigsh
from torch import nn

import flatminima as fm
from cases import Case, mean_cross_entropy
from exhaustive import thinned
from flatminima.testing import check_operator
from oracles import dense_gauss_newton
from zoo import dense_hessian, matrix_with_spectrum

PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["f64", "f32"]
)
MATRIX = matrix_with_spectrum([*torch.linspace(-1, 1, 24).tolist(), 3.0, 5.0, -4.0], seed=1)


def vectors(n, k, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator, dtype=torch.float64).to(dtype)


# ----------------------------------------------------------------------- the net and its matrices


MADE: dict[tuple[object, ...], torch.Tensor] = {}


class Counting:
    """Batches that count how often they are read."""

    def __init__(self, batches):
        self.batches, self.count = batches, 0

    def __iter__(self):
        self.count += 1
        return iter(self.batches)


class Bench:
    """A small net of 27 parameters, data in three batches, and its matrices by hand."""

    def __init__(self, dtype, *, anew=False, steps=6):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).to(dtype)
        x, y = vectors(9, 4, dtype=dtype), torch.arange(9) % 3
        self.case = Case(
            model=model,
            batches=list(zip(x.split([4, 3, 2]), y.split([4, 3, 2]), strict=True)),
            loss_fn=nn.CrossEntropyLoss(),
            full_loss=mean_cross_entropy,
            dtype=dtype,
        )
        self.dtype, self.steps = dtype, steps
        self.data = Counting(self.case.batches)
        self.anew = anew

    @functools.cached_property
    def objective(self):
        return self.case.objective(data=self.data, cache=not self.anew)

    @property
    def hessian(self):
        return fm.HessianOperator(self.objective)

    @property
    def gauss_newton(self):
        return fm.GaussNewtonOperator(self.objective)

    def by_hand(self, function):
        """What the function makes of the case, once for all tests at the same point."""
        at = nn.utils.parameters_to_vector(self.case.model.parameters()).tolist()
        key = function, self.dtype, tuple(at)
        if key not in MADE:
            MADE[key] = function(self.case)
        return MADE[key]

    @property
    def dense_hessian(self):
        return self.by_hand(dense_hessian)

    @property
    def dense_gauss_newton(self):
        return self.by_hand(dense_gauss_newton)

    @property
    def scores(self):
        """∇ log p(y | x_i) for each example and each label, (9, 3, n), and the probabilities."""
        return self.by_hand(Bench._scores)

    @staticmethod
    def _scores(case):
        model, batches = case.in_float64()
        logs = model(torch.cat([x for x, _ in batches])).log_softmax(1)
        rows = [
            torch.cat([g.reshape(-1) for g in gradient])
            for value in logs.reshape(-1)
            for gradient in [
                torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
            ]
        ]
        return torch.stack(rows).view(9, 3, -1), logs.detach().exp()

    def outer_products(self, weights):
        """(1/N) Σ weights[i, y] s sᵀ over examples and labels."""
        scores = self.scores[0]
        return torch.einsum("iy,iya,iyb->ab", weights, scores, scores) / len(weights)

    def places(self, *names):
        """The positions of these tensors in a vector, by hand."""
        found, start = [], 0
        for name, parameter in self.case.model.named_parameters():
            found += range(start, start + parameter.numel()) if name in names else []
            start += parameter.numel()
        return torch.tensor(found)

    def trained(self, make):
        """An optimiser after some steps, and the gradients (steps, n) that it saw."""
        model = self.case.model
        optimiser, gradients = make(model.parameters()), []
        for _, (x, y) in zip(range(self.steps), itertools.cycle(self.case.batches), strict=False):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            gradients.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]).double())
            optimiser.step()
        return optimiser, torch.stack(gradients)


def monte_carlo(bench):
    """The labels drawn are those that explain the matrix: they must exist, one for an example."""
    operator = fm.FisherOperator(bench.objective, kind="monte_carlo", seed=3)
    scores = bench.scores[0].reshape(27, -1)
    products = torch.einsum("ka,kb->kab", scores, scores).reshape(27, -1) / 9
    found = torch.linalg.lstsq(products.T, operator.to_dense().double().reshape(-1, 1)).solution
    drawn = found.reshape(9, 3).round()
    assert torch.equal(drawn.sum(1), torch.ones(9).double())
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    return operator, bench.outer_products(drawn)


# ------------------------------------------------------------------- preconditioners, by hand

RATE, B1, B2, EPS = 1e-2, 0.8, 0.9, 1e-3


def averages(values, beta):
    """The running averages Σ (1 − β) β^(t−s) values_s for t = 1, 2, …"""
    found, total = [], torch.zeros_like(values[0])
    for value in values:
        total = beta * total + (1 - beta) * value
        found.append(total)
    return torch.stack(found)


def corrected(gradients):
    """v̂, with the bias correction, after the last step."""
    return averages(gradients**2, B2)[-1] / (1 - B2 ** len(gradients))


def adam_denominator(gradients):
    return corrected(gradients).sqrt() + EPS


def amsgrad_denominator(gradients):
    largest = averages(gradients**2, B2).amax(0)
    return (largest / (1 - B2 ** len(gradients))).sqrt() + EPS


def radam_denominator(gradients):
    """Its ε comes before the bias correction."""
    second = averages(gradients**2, B2)[-1]
    return (second.sqrt() + EPS) / math.sqrt(1 - B2 ** len(gradients))


def rmsprop_denominator(gradients):
    return averages(gradients**2, B2)[-1].sqrt() + EPS


def centred_denominator(gradients):
    mean = averages(gradients, B2)[-1]
    return (averages(gradients**2, B2)[-1] - mean**2).sqrt() + EPS


def first_moment(gradients):
    return averages(gradients, B1)[-1] / (1 - B1 ** len(gradients))


def nadam_moment(gradients):
    """What NAdam divides by D: this gradient and the average, with its own schedule of β₁."""
    steps = len(gradients)
    schedule = [B1 * (1 - 0.5 * 0.96 ** (t * 4e-3)) for t in range(1, steps + 2)]
    product = math.prod(schedule[:-1])
    return gradients[-1] * (1 - schedule[-2]) / (1 - product) + averages(gradients, B1)[-1] * (
        schedule[-1] / (1 - product * schedule[-1])
    )


def rectified_moment(gradients):
    longest, steps = 2 / (1 - B2) - 1, len(gradients)
    length = longest - 2 * steps * B2**steps / (1 - B2**steps)
    assert length > 5
    factor = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return math.sqrt(factor) * first_moment(gradients)


def last_gradient(gradients):
    return gradients[-1]


ADAM = {"lr": RATE, "betas": (B1, B2), "eps": EPS}
RMSPROP = {"lr": RATE, "alpha": B2, "eps": EPS}
OPTIMISERS = {
    "Adam": (lambda p: torch.optim.Adam(p, **ADAM), adam_denominator, first_moment),
    "Adam, foreach": (
        lambda p: torch.optim.Adam(p, **ADAM, foreach=True),
        adam_denominator,
        first_moment,
    ),
    "AdamW, AMSGrad": (
        lambda p: torch.optim.AdamW(p, **ADAM, amsgrad=True, weight_decay=0),
        amsgrad_denominator,
        first_moment,
    ),
    "NAdam": (lambda p: torch.optim.NAdam(p, **ADAM), adam_denominator, nadam_moment),
    "RAdam": (lambda p: torch.optim.RAdam(p, **ADAM), radam_denominator, rectified_moment),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, **RMSPROP), rmsprop_denominator, last_gradient),
    "RMSprop, centred": (
        lambda p: torch.optim.RMSprop(p, **RMSPROP, centered=True),
        centred_denominator,
        last_gradient,
    ),
}


def preconditioned(bench, name):
    make, denominator, _ = OPTIMISERS[name]
    optimiser, gradients = bench.trained(make)
    scale = denominator(gradients).rsqrt()
    operator = fm.PreconditionedOperator(bench.hessian, optimiser)
    return operator, scale[:, None] * bench.dense_hessian * scale


# ------------------------------------------------------------------------------ the operators


def given(dtype):
    matrix = MATRIX.to(dtype)
    return fm.FunctionOperator(lambda v: matrix @ v, 27, dtype=dtype)


def positive(dtype):
    return (vectors(27, 1, seed=4)[:, 0].abs() + 0.1).to(dtype)


def scaled(diagonal, dense):
    scale = diagonal.double().rsqrt()
    return scale[:, None] * dense * scale


def projected(dense, basis, *, complement=False):
    inside = basis.double() @ torch.linalg.pinv(basis.double())
    outside = torch.eye(len(dense), dtype=torch.float64) - inside
    middle = outside if complement else inside
    return middle @ dense @ middle


def off_eigenvectors(bench):
    top = torch.linalg.eigh(bench.dense_hessian).eigenvectors[:, -2:].to(bench.dtype)
    operator = fm.ProjectedOperator(bench.hessian, top, complement=True)
    return operator, projected(bench.dense_hessian, top, complement=True)


def onto_a_subspace(bench, *, complement=False):
    # Far from orthonormal, and of very different lengths.
    basis = vectors(27, 5, seed=7).cumsum(1) * torch.tensor([1, 1e3, 1e-2, 1, 10]).double()
    basis = basis.to(bench.dtype)
    operator = fm.ProjectedOperator(given(bench.dtype), basis, complement=complement)
    return operator, projected(MATRIX, basis, complement=complement)


def block(bench, params, *names):
    at = bench.places(*names)
    return fm.BlockOperator(bench.hessian, params), bench.dense_hessian[at][:, at]


def block_of_a_sum(bench):
    at = bench.places("2.weight", "2.bias")
    whole = bench.dense_hessian - 0.5 * bench.dense_gauss_newton
    operator = fm.BlockOperator(bench.hessian - 0.5 * bench.gauss_newton, "2.*")
    return operator, whole[at][:, at]


def nested_sum(bench):
    matrix = fm.MatrixOperator(MATRIX.to(bench.dtype))
    first = (2 * bench.hessian - matrix).shifted(0.25)
    operator = -(0.5 * first + bench.gauss_newton * 3) - (matrix - bench.hessian).shifted(1)
    unit = torch.eye(27, dtype=torch.float64)
    first = 2 * bench.dense_hessian - MATRIX + 0.25 * unit
    dense = -(0.5 * first + 3 * bench.dense_gauss_newton) - (MATRIX - bench.dense_hessian + unit)
    return operator, dense


def preconditioned_block_of_a_sum(bench):
    at, diagonal = bench.places("0.weight"), positive(bench.dtype)[:12]
    whole = bench.dense_hessian + bench.dense_gauss_newton
    operator = fm.BlockOperator(bench.hessian + bench.gauss_newton, lambda n, p: p.numel() == 12)
    return fm.PreconditionedOperator(operator, diagonal), scaled(diagonal, whole[at][:, at])


def block_of_a_preconditioned(bench):
    operator, dense = preconditioned(bench, "Adam")
    at = bench.places("0.bias", "2.bias")
    return fm.BlockOperator(operator, "*.bias"), dense[at][:, at]


def deflated_preconditioned_sum(bench):
    diagonal = positive(bench.dtype)
    whole = bench.gauss_newton.shifted(0.1)
    dense = scaled(diagonal, bench.dense_gauss_newton + 0.1 * torch.eye(27).double())
    basis = vectors(27, 2, seed=8, dtype=bench.dtype)
    operator = fm.PreconditionedOperator(whole, diagonal)
    return (
        fm.ProjectedOperator(operator, basis, complement=True),
        projected(dense, basis, complement=True),
    )


OPERATORS = {
    "matrix": lambda b: (fm.MatrixOperator(MATRIX.to(b.dtype)), MATRIX),
    "function": lambda b: (given(b.dtype), MATRIX),
    "hessian": lambda b: (b.hessian, b.dense_hessian),
    "hessian, graphs rebuilt": lambda b: (
        fm.HessianOperator(b.objective, method="double_backward", keep_graph=False),
        b.dense_hessian,
    ),
    "hessian, graphs kept": lambda b: (
        fm.HessianOperator(b.objective, keep_graph=True),
        b.dense_hessian,
    ),
    "hessian by differences": lambda b: (
        fm.HessianOperator(b.objective, method="finite_differences"),
        b.dense_hessian,
    ),
    "gauss-newton": lambda b: (b.gauss_newton, b.dense_gauss_newton),
    "gauss-newton, graphs rebuilt": lambda b: (
        fm.GaussNewtonOperator(b.objective, keep_graph=False),
        b.dense_gauss_newton,
    ),
    "gauss-newton by differences": lambda b: (
        fm.GaussNewtonOperator(b.objective, method="finite_differences"),
        b.dense_gauss_newton,
    ),
    "fisher": lambda b: (fm.FisherOperator(b.objective), b.outer_products(b.scores[1])),
    "fisher, monte carlo": monte_carlo,
    "fisher, empirical": lambda b: (
        fm.FisherOperator(b.objective, kind="empirical"),
        b.outer_products(nn.functional.one_hot(torch.arange(9) % 3).double()),
    ),
    "scaled": lambda b: (-2.5 * b.hessian, -2.5 * b.dense_hessian),
    "scaled by nothing": lambda b: (0 * b.hessian, 0 * b.dense_hessian),
    "negative": lambda b: (-b.gauss_newton, -b.dense_gauss_newton),
    "sum": lambda b: (given(b.dtype) + b.hessian, MATRIX + b.dense_hessian),
    "difference": lambda b: (
        b.hessian - b.gauss_newton,
        b.dense_hessian - b.dense_gauss_newton,
    ),
    "shift": lambda b: (b.hessian.shifted(-0.3), b.dense_hessian - 0.3 * torch.eye(27).double()),
    "nested sums": nested_sum,
    "sum of matrices": lambda b: (
        fm.SumOperator([fm.MatrixOperator(MATRIX.to(b.dtype))] * 2, [1.0, -3.0], shift=2.0),
        -2 * MATRIX + 2 * torch.eye(27).double(),
    ),
    "sum with differences": lambda b: (
        fm.HessianOperator(b.objective, method="finite_differences") * 2 - b.gauss_newton,
        2 * b.dense_hessian - b.dense_gauss_newton,
    ),
    "onto a subspace": onto_a_subspace,
    "off a subspace": lambda b: onto_a_subspace(b, complement=True),
    "off eigenvectors": off_eigenvectors,
    "block": lambda b: block(b, "0.*", "0.weight", "0.bias"),
    "block of several patterns": lambda b: block(b, ["2.bias", "0.w*"], "0.weight", "2.bias"),
    "block by a predicate": lambda b: block(b, lambda n, p: p.dim() == 1, "0.bias", "2.bias"),
    "block of a sum": block_of_a_sum,
    "preconditioned": lambda b: (
        fm.PreconditionedOperator(b.hessian, positive(b.dtype)),
        scaled(positive(b.dtype), b.dense_hessian),
    ),
    "preconditioned matrix": lambda b: (
        fm.PreconditionedOperator(fm.MatrixOperator(MATRIX.to(b.dtype)), positive(b.dtype)),
        scaled(positive(b.dtype), MATRIX),
    ),
    **{
        f"preconditioned by {name}": functools.partial(preconditioned, name=name)
        for name in OPTIMISERS
    },
    "preconditioned block of a sum": preconditioned_block_of_a_sum,
    "block of a preconditioned": block_of_a_preconditioned,
    "deflated preconditioned sum": deflated_preconditioned_sum,
}
EVERY_OPERATOR = pytest.mark.parametrize("kind", OPERATORS)
DIFFERENCES = {k for k in OPERATORS if "differences" in k}


def made(kind, dtype=torch.float64, **options):
    """The operator and its dense matrix."""
    return OPERATORS[kind](Bench(dtype, **options))


def close(found, expected, operator, tolerance, *, scale=None):
    """Within the tolerance, or within what the operator says of its own error."""
    scale = float(expected.norm()) if scale is None else scale
    allowed = tolerance * scale + 10 * operator.error * math.sqrt(expected.numel())
    assert float((found.double() - expected).norm()) <= allowed


# ----------------------------------------------------------------------------------- products


@EVERY_OPERATOR
def test_vectors_are_left_alone_and_products_are_new(kind):
    operator, dense = made(kind)
    v = vectors(len(dense), 2).requires_grad_()
    before = v.detach().clone()
    first = operator @ v
    assert not first.requires_grad
    kept = first.clone()
    single = operator.matvec(v[:, 0])
    first += 1
    single.zero_()
    assert torch.equal(v.detach(), before)
    close(operator @ v, kept, operator, 1e-12, scale=float(kept.norm()) + 1e-30)


@EVERY_OPERATOR
@PRECISIONS
def test_it_passes_the_public_checks(kind, dtype, tolerance):
    operator, dense = made(kind, dtype)
    check_operator(operator, dense=dense, tolerance=tolerance)


@EVERY_OPERATOR
@PRECISIONS
def test_it_knows_how_good_its_products_are(kind, dtype, tolerance):
    operator, dense = made(kind, dtype)
    operator.to_dense(progress=False)
    size = float(torch.linalg.matrix_norm(dense, 2))
    assert (operator.error > 0) == (kind in DIFFERENCES)
    assert operator.error <= 0.02 * size
    assert 0 <= operator.floor <= 0.01 * max(size, 0.1)
    # Where derivatives are taken exactly, or terms added, something may cancel but for rounding.
    cancels = [
        isinstance(o, fm.SumOperator) or getattr(o, "method", "") == "double_backward"
        for o in within(operator)
    ]
    assert (operator.floor > 0) == (any(cancels) and kind != "scaled by nothing")


@EVERY_OPERATOR
def test_vectors_of_any_type_and_stride(kind):
    operator, dense = made(kind)
    n, scale = len(dense), float(dense.norm()) * 100
    wide = vectors(3, 2 * n)[:, ::2].T
    close(operator @ wide, dense @ wide, operator, 1e-12, scale=scale)
    close(operator @ wide[:, 1], dense @ wide[:, 1], operator, 1e-12, scale=scale)
    expected = dense @ torch.arange(n).double()
    for dtype in (torch.int64, torch.float32, torch.float16):
        close(operator @ torch.arange(n, dtype=dtype), expected, operator, 1e-12, scale=scale)


@EVERY_OPERATOR
@pytest.mark.parametrize(
    ("call", "shape", "error", "message"),
    [
        ("matvec", (1,), fm.ShapeError, r"takes shape \({n},\); got"),
        ("matvec", (0, 1), fm.ShapeError, r"takes shape \({n},\); got \({n}, 1\)"),
        ("matmat", (0,), fm.ShapeError, r"takes shape \({n}, k\); got \({n},\)"),
        ("matmat", (1, 2), fm.ShapeError, r"takes shape \({n}, k\); got"),
        ("__matmul__", (), fm.ShapeError, r"\({n},\) or \({n}, k\); got \(\)"),
        ("__matmul__", (0, 1, 1), fm.ShapeError, r"\({n}, k\); got \({n}, 1, 1\)"),
    ],
)
def test_vectors_of_another_shape_are_refused(kind, call, shape, error, message):
    operator, dense = made(kind, torch.float32)
    n = len(dense)
    vector = torch.ones(tuple(n + s if i == 0 else s for i, s in enumerate(shape)))
    name = type(operator).__name__
    with pytest.raises(error, match=f"{name}.*" + message.replace("{n}", str(n))):
        getattr(operator, call)(vector)


@EVERY_OPERATOR
def test_what_is_no_vector_is_refused(kind):
    operator, dense = made(kind, torch.float32)
    n, name = len(dense), type(operator).__name__
    with pytest.raises(fm.ArgumentTypeError, match=f"{name} @ takes a torch.Tensor.*got ndarray"):
        operator @ np.ones(n)
    with pytest.raises(fm.ArgumentTypeError, match=f"{name}.*takes a tensor.*got list"):
        operator.matvec([1.0] * n)
    with pytest.raises(fm.ArgumentTypeError, match=f"{name}.*real vectors; got torch.complex64"):
        operator.matvec(torch.ones(n) * 1j)
    with pytest.raises(fm.DeviceError, match=f"{name}.*on cpu; the vector is on meta"):
        operator.matvec(torch.ones(n, device="meta"))
    with pytest.raises(fm.DeviceError, match=f"{name}.*the vector is on meta"):
        operator @ torch.ones(n, 2, device="meta")
    broken = torch.zeros(n, 2)
    broken[2, 1] = -math.inf
    with pytest.raises(fm.NonFiniteError, match=f"{name}.*NaN or infinity at index 2"):
        operator @ broken
    with pytest.raises(fm.NonFiniteError, match=f"{name}.*NaN or infinity at index 1"):
        operator @ torch.tensor([0.0, math.nan, *[0.0] * (n - 2)])


@EVERY_OPERATOR
def test_it_says_what_it_is(kind):
    operator, dense = made(kind)
    n = len(dense)
    assert repr(operator) == f"{type(operator).__name__}({n} × {n}, torch.float64, cpu)"
    assert all(isinstance(note, str) for note in operator.notes)


# -------------------------------------------------------------------------------------- scipy


@EVERY_OPERATOR
@PRECISIONS
def test_scipy_gets_the_same_products(kind, dtype, tolerance):
    operator, dense = made(kind, dtype)
    n = len(dense)
    seen = operator.to_scipy()
    assert isinstance(seen, ScipyOperator)
    assert seen.shape == (n, n)
    assert seen.dtype == np.dtype(str(dtype).removeprefix("torch."))
    array = vectors(n, 3, dtype=dtype).numpy()
    array.flags.writeable = False
    expected = dense.numpy() @ array
    for found, wanted in [
        (seen.matvec(array[:, 0]), expected[:, 0]),
        (seen.matvec(array[:, :1]), expected[:, :1]),
        (seen.rmatvec(array[:, 1]), expected[:, 1]),
        (seen.matmat(array), expected),
        (seen.rmatmat(array), expected),
        (seen @ array, expected),
        (seen.H @ array, expected),
    ]:
        assert found.shape == wanted.shape
        scale = float(dense.norm()) * float(np.linalg.norm(array))
        close(torch.tensor(found), torch.tensor(wanted), operator, tolerance, scale=scale)


@EVERY_OPERATOR
def test_scipy_finds_the_same_eigenvalue(kind):
    operator, dense = made(kind)
    if kind == "scaled by nothing":
        return  # ARPACK does not end on zero
    values = torch.linalg.eigvalsh(dense)
    top = values[values.abs().argmax()][None]
    tol = 1e-6 if kind in DIFFERENCES else 0
    found = eigsh(operator.to_scipy(), k=1, v0=np.arange(len(dense)) + 1.0, tol=tol)[0]
    close(torch.tensor(found), top, operator, 1e-9, scale=float(dense.norm()))


# ----------------------------------------------------------------------------------- sessions


def within(operator):
    """All operators that an operator is made of, itself too."""
    inner = [*getattr(operator, "operators", []), getattr(operator, "operator", None)]
    return [operator, *itertools.chain(*(within(o) for o in inner if o is not None))]


@EVERY_OPERATOR
def test_sessions_keep_graphs_and_let_go_of_them(kind):
    operator, dense = made(kind)
    v = vectors(len(dense), 1)
    keepers = [o for o in within(operator) if hasattr(o, "kept_bytes")]
    expected = [o.method == "double_backward" and "rebuilt" not in kind for o in keepers]
    with operator.session():
        for _ in range(3):
            operator @ v
        assert [o.kept_bytes > 0 for o in keepers] == expected
    assert all(o.kept_bytes == 0 for o in keepers)


@EVERY_OPERATOR
def test_readings_of_data_are_counted(kind):
    bench = Bench(torch.float64, anew=True)
    operator = OPERATORS[kind](bench)[0]
    bench.objective.loss()
    before, counted = operator.readings, bench.data.count
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fm.ConvergenceWarning)
        result = fm.lanczos(operator, max_products=4)
        operator @ vectors(operator.shape[0], 1)
    taken = operator.readings - before
    knows = operator._readers[0] is not operator
    assert taken == (bench.data.count - counted)
    assert 0 <= result.readings <= taken
    assert (taken > 0) == bool([o for o in within(operator) if hasattr(o, "objective")])
    assert knows or taken == 0


# --------------------------------------------------------------------------------- algorithms


@EVERY_OPERATOR
def test_lanczos_finds_its_eigenvalues(kind):
    operator, dense = made(kind)
    values = torch.linalg.eigvalsh(dense)
    size = float(values.abs().max())
    for which, expected in (("LA", values[-1]), ("SA", values[0])):
        result = fm.lanczos(operator, which=which, tol=1e-5, progress=False)
        assert result.converged
        assert abs(float(result.eigenvalues[0] - expected)) <= 1e-4 * size + 10 * operator.error
        vector = result.eigenvectors[:, 0]
        residual = (dense @ vector - result.eigenvalues[0] * vector).norm()
        assert float(residual) <= 2 * float(result.residuals[0]) + 1e-8 * size


@pytest.mark.parametrize("kind", thinned(OPERATORS, 2))
def test_estimates_are_those_of_its_matrix(kind):
    operator, dense = made(kind)
    n, size = len(dense), float(dense.norm())
    allowed = 1e-8 * size + 10 * n * operator.error
    # With as many products as there are unit vectors, nothing is left to chance.
    exact = fm.trace(operator, products=n, progress=False)
    assert abs(exact.value - float(dense.trace())) <= allowed
    sampled = fm.trace(operator, method="xtrace", products=16, progress=False)
    error = abs(sampled.value - float(dense.trace()))
    assert error <= 4 * sampled.standard_error + allowed
    diagonal = fm.diagonal(operator, products=n, progress=False)
    close(diagonal.values, dense.diagonal(), operator, 1e-8, scale=size)
    # Products by differences take long; the others go on until the rule is exact.
    steps = 6 if kind in DIFFERENCES else n
    density = fm.spectral_density(operator, probes=12, steps=steps, progress=False)
    mean = density.mean()
    assert abs(mean.value - float(dense.trace()) / n) <= 5 * mean.standard_error + allowed
    ends = torch.linalg.eigvalsh(dense)[[0, -1]]
    if steps == n:
        assert abs(float(density.nodes.max()) - float(ends[1])) <= 1e-6 * size
        assert abs(float(density.nodes.min()) - float(ends[0])) <= 1e-6 * size
    shift = 0.1 * size + 1.0 - float(ends[0])
    found = fm.log_determinant(operator, shift, probes=12, steps=steps, progress=False)
    truth = float(torch.linalg.slogdet(dense + shift * torch.eye(n).double())[1])
    assert abs(found.value - truth) <= (
        5 * found.standard_error + 5 * found.quadrature_error + allowed / shift + 1e-6
    )


@EVERY_OPERATOR
def test_the_exact_diagonal_is_that_of_the_matrix(kind):
    operator, dense = made(kind)
    diagonal = operator.exact_diagonal()
    if operator.knows_diagonal:
        assert diagonal is not None
    known = {"matrix", "sum of matrices", "preconditioned matrix"}
    jacobians = {"negative"} | {
        k for k in OPERATORS if k.startswith(("gauss", "fisher")) and "differences" not in k
    }
    assert operator.knows_diagonal == (kind in known)
    if kind in known | jacobians:
        assert diagonal is not None
    if diagonal is not None:
        assert diagonal.shape == (len(dense),)
        close(diagonal, dense.diagonal(), operator, 1e-10, scale=float(dense.norm()))
        diagonal.zero_()
        close(operator.exact_diagonal(), dense.diagonal(), operator, 1e-10, scale=1.0)


# --------------------------------------------------------------------------------- parameters

NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]
WITHOUT_NAMES = {
    "matrix",
    "function",
    "sum",
    "nested sums",
    "sum of matrices",
    "onto a subspace",
    "off a subspace",
    "preconditioned matrix",
}
CHOSEN = {
    "block": NAMES[:2],
    "block of several patterns": ["0.weight", "2.bias"],
    "block by a predicate": ["0.bias", "2.bias"],
    "block of a sum": NAMES[2:],
    "preconditioned block of a sum": NAMES[:1],
    "block of a preconditioned": ["0.bias", "2.bias"],
}


@EVERY_OPERATOR
def test_it_knows_its_parameters_by_name(kind):
    bench = Bench(torch.float64)
    operator = OPERATORS[kind](bench)[0]
    if kind in WITHOUT_NAMES:
        assert operator.layout is None
        assert operator.parameters is None
        assert fm.trace(operator, products=4, progress=False).tensors == ()
        return
    names = CHOSEN.get(kind, NAMES)
    own = dict(bench.case.model.named_parameters())
    assert list(operator.layout.names) == names
    assert operator.layout.size == operator.shape[0]
    assert operator.layout.dtype == operator.dtype
    assert list(operator.parameters) == names
    assert all(operator.parameters[name] is own[name] for name in names)
    result = fm.trace(operator, products=4, progress=False)
    assert [t.name for t in result.tensors] == names
    with_names = fm.diagonal(operator, products=4, progress=False).named()
    assert {name: v.shape for name, v in with_names.items()} == {n: own[n].shape for n in names}


# ----------------------------------------------------------------------------- preconditioners


@pytest.mark.parametrize("name", OPTIMISERS)
def test_what_an_optimiser_divides_by_is_the_diagonal(name):
    """Its last update, undone, is its rate times what it averages over D."""
    make, denominator, numerator = OPTIMISERS[name]
    bench = Bench(torch.float64, steps=9)
    before = Bench(torch.float64, steps=8)
    before.trained(make)
    optimiser, gradients = bench.trained(make)
    diagonal = fm.PreconditionedOperator(bench.hessian, optimiser).diagonal
    torch.testing.assert_close(diagonal, denominator(gradients), rtol=1e-9, atol=0)
    update = before.objective.point() - bench.objective.point()
    torch.testing.assert_close(
        update * diagonal, RATE * numerator(gradients), rtol=1e-6, atol=1e-10
    )


# ------------------------------------------------------------------------- the checks themselves

SYMMETRIC = MATRIX.double()


class Broken(fm.FunctionOperator):
    """A symmetric matrix whose products are spoilt by a function of them and their argument."""

    def __init__(self, spoil):
        super().__init__(lambda v: SYMMETRIC @ v, len(SYMMETRIC), dtype=torch.float64)
        self.spoil = spoil

    def _products(self, vectors):
        return self.spoil(vectors, vectors @ SYMMETRIC)


def writes_to_its_argument(vectors, products):
    vectors *= 2
    return products


def draws(vectors, products):
    torch.rand(1)
    return products


def drifting():
    calls = itertools.count()
    return lambda vectors, products: products * (1 + 1e-3 * next(calls))


SKEW = torch.triu(torch.ones_like(SYMMETRIC), 1)
BROKEN = {
    "not symmetric": (lambda v, p: p + 0.01 * (v @ SKEW), "is not symmetric: ⟨u, A v⟩"),
    "affine": (lambda v, p: p + 1, "is not"),
    "quadratic": (lambda v, p: p + 1e-3 * v * v, "is not"),
    "rounded": (lambda v, p: p.float(), "gives products of type torch.float32"),
    "aliasing": (lambda v, p: v, "share memory with its argument"),
    "writing": (writes_to_its_argument, "writes to the vectors"),
    "differentiable": (lambda v, p: p.requires_grad_(), "require grad"),
    "drawing": (draws, "changes the global random states"),
    "drifting": (drifting(), ""),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_operators_are_found(name):
    spoil, complaint = BROKEN[name]
    with pytest.raises(AssertionError, match=f"Broken .*{complaint}"):
        check_operator(Broken(spoil))


def test_another_matrix_is_found():
    operator = Broken(lambda v, p: p)
    check_operator(operator)
    check_operator(operator, dense=SYMMETRIC)
    other = SYMMETRIC + 1e-6 * torch.eye(len(SYMMETRIC), dtype=torch.float64)
    with pytest.raises(AssertionError, match="is not the matrix given: off by"):
        check_operator(operator, dense=other)


def test_a_wrong_diagonal_and_wrong_products_in_sessions_are_found():
    class Diagonal(Broken):
        def exact_diagonal(self):
            return torch.ones(len(SYMMETRIC), dtype=torch.float64)

    class Session(Broken):
        @contextlib.contextmanager
        def session(self):
            self.spoil = lambda v, p: 1.5 * p
            yield
            self.spoil = lambda v, p: p

    with pytest.raises(AssertionError, match=r"exact_diagonal\(\) that is off by"):
        check_operator(Diagonal(lambda v, p: p))
    with pytest.raises(AssertionError, match="changes within a session"):
        check_operator(Session(lambda v, p: p))


def test_what_is_no_operator_is_refused():
    with pytest.raises(fm.ArgumentTypeError, match="check_operator must be a LinearOperator"):
        check_operator(SYMMETRIC)
