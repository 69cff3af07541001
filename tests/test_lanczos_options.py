"""Lanczos: start vectors that are given, where and how the basis is kept, what the search costs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from benchmarks.box import LiveTensors
from sklearn.datasets import load_digits
from torch import nn

import flatminima as fm
from flatminima.algorithms.eigen.basis import Basis
from flatminima.algorithms.eigen.chain import Chain, bound_sum, select
from zoo import matrix_with_spectrum

N = 400
DOUBLE = torch.float64


def spectrum(kind: str) -> torch.Tensor:
    """What Hessians look like: outliers on a bulk; and what is harder."""
    bulk = torch.linspace(-0.05, 0.1, N - 20).double()
    top = 10 * 0.8 ** torch.arange(20).double()
    if kind == "outliers":
        return torch.cat([top, bulk])
    if kind == "repeated":
        return torch.cat([top[:10].repeat_interleave(2), bulk])
    return torch.linspace(-1, 1, N).double() ** 3


KINDS = ["outliers", "repeated", "cubic"]


def operator(kind: str, seed: int = 1, dtype: torch.dtype = DOUBLE) -> fm.MatrixOperator:
    return fm.MatrixOperator(matrix_with_spectrum(spectrum(kind), seed, dtype))


def assert_right(result, kind: str, k: int, tol: float, matrix: torch.Tensor) -> None:
    assert result.converged
    expected = spectrum(kind).sort(descending=True).values[:k]
    scale = float(spectrum(kind).abs().max())
    torch.testing.assert_close(result.eigenvalues, expected, rtol=0, atol=2 * tol * scale)
    assert_honest(result, matrix)


def assert_honest(result, matrix: torch.Tensor) -> None:
    vectors = result.eigenvectors.double()
    true = torch.linalg.vector_norm(matrix.double() @ vectors - vectors * result.eigenvalues, dim=0)
    slack = 30 * torch.finfo(matrix.dtype).eps * float(torch.linalg.matrix_norm(matrix.double(), 2))
    assert bool((true <= result.residuals + slack).all())


# -------------------------------------------------------------------------------- given starts


BAD_STARTS = {
    "random": lambda vectors, g: torch.randn(N, 5, generator=g, dtype=DOUBLE),
    "the wrong ones": lambda vectors, g: vectors[:, :5],
    "without the largest": lambda vectors, g: vectors[:, -6:-1],
    "parallel": lambda vectors, g: vectors[:, -1:].repeat(1, 4),
    "opposite": lambda vectors, g: torch.stack([vectors[:, -1], -vectors[:, -1]], dim=1),
    "one vector": lambda vectors, g: vectors[:, -3],
    "tiny": lambda vectors, g: 1e-200 * vectors[:, -5:],
    "huge": lambda vectors, g: 1e200 * vectors[:, -5:],
    "more than the basis": lambda vectors, g: vectors[:, -60:],
}


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", BAD_STARTS)
def test_no_start_leads_to_wrong_pairs(start, kind, k):
    problem = operator(kind)
    vectors = torch.linalg.eigh(problem.matrix).eigenvectors
    initial = BAD_STARTS[start](vectors, torch.Generator().manual_seed(0))
    result = fm.lanczos(problem, k=k, tol=1e-6, initial=initial)
    assert_right(result, kind, k, 1e-6, problem.matrix)


@pytest.mark.parametrize("k", [1, 5, 10])
@pytest.mark.parametrize("seed", range(3))
def test_exact_vectors_without_the_best_do_not_hide_it(k, seed):
    # In exact arithmetic a chain from eigenvectors 2 to k + 1 alone never meets the first.
    problem = operator("outliers", 20 + seed)
    vectors = torch.linalg.eigh(problem.matrix).eigenvectors
    result = fm.lanczos(problem, k=k, initial=vectors[:, -k - 1 : -1], seed=seed)
    assert_right(result, "outliers", k, 1e-3, problem.matrix)


@pytest.mark.parametrize("k", [1, 5, 10])
def test_random_starts_cost_hardly_more_than_none(k):
    problem = operator("outliers")
    cold = fm.lanczos(problem, k=k).products
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        initial = torch.randn(N, k, generator=generator, dtype=DOUBLE)
        assert fm.lanczos(problem, k=k, initial=initial).products <= cold + 4


@pytest.mark.parametrize(
    ("kind", "k", "saved"), [("outliers", 5, 4), ("outliers", 10, 4), ("repeated", 10, 20)]
)
def test_an_earlier_result_of_the_same_operator_saves_products(kind, k, saved):
    problem = operator(kind)
    rough = fm.lanczos(problem, k=k, tol=1e-3)
    cold = fm.lanczos(problem, k=k, tol=1e-5)
    warm = fm.lanczos(problem, k=k, tol=1e-5, initial=rough)
    assert_right(warm, kind, k, 1e-5, problem.matrix)
    assert warm.products <= cold.products - saved


@pytest.mark.parametrize("error", [1e-6, 1e-3, 1e-2, 0.1])
@pytest.mark.parametrize("k", [2, 5, 10])
def test_disturbed_vectors_cost_hardly_more_than_none(k, error):
    """Each residual in a direction of its own: taking all over would not pay."""
    problem = operator("outliers")
    generator = torch.Generator().manual_seed(4)
    exact = torch.linalg.eigh(problem.matrix).eigenvectors[:, -k:].flip(1)
    noise = torch.randn(N, k, generator=generator, dtype=DOUBLE) / N**0.5
    result = fm.lanczos(problem, k=k, initial=exact + error * noise)
    assert_right(result, "outliers", k, 1e-3, problem.matrix)
    assert result.products <= fm.lanczos(problem, k=k).products + 4


@pytest.mark.parametrize("limit", [5, 6, 7, 10, 14])
def test_limit_holds_with_vectors_taken_over(limit):
    problem = operator("outliers")
    rough = fm.lanczos(problem, k=5)
    with pytest.warns(fm.ConvergenceWarning):
        result = fm.lanczos(problem, k=5, tol=1e-9, initial=rough, max_products=limit)
    assert result.products <= limit
    assert_honest(result, problem.matrix)


def test_initial_vectors_are_left_alone():
    problem = operator("outliers")
    initial = torch.randn(N, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    before = initial.clone()
    fm.lanczos(problem, k=2, initial=initial)
    assert torch.equal(initial, before)


def test_initial_vectors_of_another_type_are_converted():
    problem = operator("outliers")
    initial = torch.ones(N, dtype=torch.float32)
    assert fm.lanczos(problem, initial=initial).eigenvectors.dtype == DOUBLE


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_initial_vector_that_is_not_finite_is_refused(bad):
    initial = torch.ones(N, 2, dtype=DOUBLE)
    initial[7, 1] = bad
    with pytest.raises(fm.NonFiniteError, match=r"'initial' argument of lanczos .* at index 7"):
        fm.lanczos(operator("outliers"), initial=initial)


@pytest.mark.parametrize("initial", [torch.zeros(N), torch.eye(N)[:, :2] * 0, torch.ones(N, 0)])
def test_initial_vector_of_zeros_is_refused(initial):
    with pytest.raises(fm.InvalidArgumentError, match=r"'initial' argument .* zero vector"):
        fm.lanczos(operator("outliers"), initial=initial.double())


@pytest.mark.parametrize("shape", [(N + 1,), (3, N), (N, 2, 1), ()])
def test_initial_vector_of_another_shape_is_refused(shape):
    with pytest.raises(fm.ShapeError, match="'initial' argument of lanczos"):
        fm.lanczos(operator("outliers"), initial=torch.ones(shape))


@pytest.mark.parametrize("initial", [[1.0] * N, "warm", 3])
def test_initial_of_another_type_is_refused(initial):
    with pytest.raises(fm.ArgumentTypeError, match="an EigenResult or a tensor"):
        fm.lanczos(operator("outliers"), initial=initial)


def test_result_without_its_vectors_is_refused():
    problem = operator("outliers")
    result = fm.lanczos(problem).without_vectors()
    with pytest.raises(fm.InvalidArgumentError, match="eigenvectors were dropped"):
        fm.lanczos(problem, initial=result)


# -------------------------------------------------------------------------------- a trained net


@pytest.fixture(scope="module")
def net():
    """A 64-64-10 tanh net on the digits, an objective, and one of a few steps later."""
    digits = load_digits()
    inputs = torch.tensor(digits.data / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

        def train(steps: int) -> None:
            for _ in range(steps):
                rows = torch.randperm(len(inputs))[:64]
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
                optimizer.step()

        train(200)
        before = copy.deepcopy(model)
        train(3)
    objectives = [
        fm.Objective(each, nn.CrossEntropyLoss(), (inputs[:600], labels[:600]))
        for each in (before, model)
    ]
    return [fm.HessianOperator(objective) for objective in objectives]


@pytest.mark.parametrize("k", [1, 5])
def test_vectors_from_before_a_few_training_steps_are_a_good_start(net, k):
    before, after = net
    old = fm.lanczos(before, k=k)
    cold, warm = fm.lanczos(after, k=k), fm.lanczos(after, k=k, initial=old)
    assert warm.converged
    assert warm.products <= cold.products + 1
    scale = float(cold.eigenvalues[0])
    torch.testing.assert_close(warm.eigenvalues, cold.eigenvalues, rtol=0, atol=2e-3 * scale)


def test_both_ends_of_a_net_share_their_products(net):
    largest = fm.lanczos(net[0], k=3, tol=1e-4)
    smallest = fm.lanczos(net[0], which="SA", tol=1e-4, basis_size=30)
    both = fm.lanczos(net[0], k=(3, 1), which="BE", tol=1e-4, basis_size=30)
    assert both.converged
    assert both.products < 0.9 * (largest.products + smallest.products)
    scale = float(largest.eigenvalues[0])
    expected = torch.cat([largest.eigenvalues, smallest.eigenvalues])
    torch.testing.assert_close(both.eigenvalues, expected, rtol=0, atol=1e-4 * scale)


# ------------------------------------------------------------------- both ends, each its count


@pytest.mark.parametrize("k", [(3, 1), (1, 3), (1, 1), (0, 4), (4, 0), (2, 5)])
@pytest.mark.parametrize("kind", KINDS)
def test_each_end_has_its_own_count(k, kind):
    problem = operator(kind)
    result = fm.lanczos(problem, k=k, which="BE", tol=1e-8, max_products=20_000)
    ordered = spectrum(kind).sort(descending=True).values
    expected = torch.cat([ordered[: k[0]], ordered[N - k[1] :]])
    torch.testing.assert_close(result.eigenvalues, expected, rtol=0, atol=1e-6)
    assert_honest(result, problem.matrix)
    upper, lower = k
    if upper:
        assert result.part("LA", upper).eigenvalues.tolist() == result.eigenvalues[:upper].tolist()
    if lower:
        part = result.part("SA", lower)
        assert part.eigenvalues.tolist() == result.eigenvalues.flip(0)[:lower].tolist()
        assert_honest(part, problem.matrix)
        assert part.which == "SA"


@pytest.mark.parametrize(
    ("k", "which"),
    [((1, 1), "LA"), ((1, 2, 3), "BE"), ((0, 0), "BE"), ((N, 1), "BE"), ((-1, 2), "BE")],
)
def test_counts_that_make_no_sense_are_refused(k, which):
    with pytest.raises(fm.InvalidArgumentError, match="'k' argument of lanczos"):
        fm.lanczos(operator("outliers"), k=k, which=which)


def test_parts_larger_than_the_result_are_refused():
    result = fm.lanczos(operator("outliers"), k=2)
    with pytest.raises(fm.InvalidArgumentError, match=r"'count' argument of EigenResult.part"):
        result.part("LA", 3)


def test_select_with_counts_for_both_ends():
    values = torch.arange(7.0).numpy()
    assert values[select(values, "BE", 4, top=1)].tolist() == [6, 2, 1, 0]
    assert values[select(values, "BE", 3, top=3)].tolist() == [6, 5, 4]
    assert values[select(values[:2], "BE", 4, top=3)].tolist() == [1, 0]


# ------------------------------------------------------------------------- the search by chance


@pytest.mark.parametrize("seed", range(40))
def test_single_largest_eigenvalue_is_the_largest(seed):
    """A pair close below the largest, which a chain meets as early, is not taken for it."""
    values = torch.cat([torch.tensor([1.0, 0.93, 0.91]), torch.linspace(-0.1, 0.5, N - 3)]).double()
    problem = fm.MatrixOperator(matrix_with_spectrum(values, seed, DOUBLE))
    for which in ("LA", "LM"):
        result = fm.lanczos(problem, which=which, seed=seed)
        assert float(result.eigenvalues[0]) == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0, 10.0])
def test_chance_bounds_how_little_of_an_eigenvector_the_start_holds(seed, factor):
    """|⟨b, u⟩| ≤ Πβ / Π|λ − θ|, after restarts too, for the eigenvector u of λ."""
    generator = torch.Generator().manual_seed(seed)
    n, steps = 60, 12
    values = torch.rand(n, generator=generator, dtype=DOUBLE)
    values[0] = 1.0 + 0.1 * factor
    start = torch.randn(n, generator=generator, dtype=DOUBLE)
    start /= torch.linalg.vector_norm(start)
    basis, chain = [start], Chain(20, 0)
    for i in range(steps):
        rest = values * basis[i]
        heights = torch.stack(basis) @ rest
        for vector in basis * 2:
            rest = rest - (vector @ rest) * vector
        beta = torch.linalg.vector_norm(rest)
        chain.take(heights.numpy(), float(beta), None, torch.zeros(0, 0).numpy())
        basis.append(rest / beta)
    ritz = torch.linalg.eigvalsh(torch.from_numpy(chain.matrix.copy())).numpy()
    largest = float(values[0])
    if ritz.max() >= largest:
        pytest.skip("the value was found to rounding")
    log = chain.log_chance(1, largest, n, ritz) - 0.5 * math.log(2 * n / math.pi)
    assert math.log(abs(float(start[0]))) <= log + 1e-8


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_one_pair_at_an_end_takes_few_products_more_than_its_residual(which):
    """No second start is made where a repeated eigenvalue would change nothing."""
    draws = []

    class Counting(fm.MatrixOperator):
        pass

    problem = Counting(operator("outliers").matrix)
    original = torch.randn

    def counted(*arguments, **options):
        draws.append(arguments)
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", counted)
        fm.lanczos(problem, k=2 if which == "BE" else 1, which=which)
    assert len(draws) == 1


@pytest.mark.parametrize("seed", range(20))
def test_bound_of_a_sum_is_one(seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 9, 6, generator=generator, dtype=DOUBLE).numpy()
    bound = bound_sum(a.T @ a, b.T @ b, 3)
    rest = torch.from_numpy(bound - (a + b).T @ (a + b))
    assert float(torch.linalg.eigvalsh(rest).min()) >= -1e-12
    zero = bound_sum(0 * (a.T @ a), b.T @ b, 3)
    torch.testing.assert_close(torch.from_numpy(zero), torch.from_numpy(b.T @ b))


@pytest.mark.parametrize("k", [50, 30])
@pytest.mark.parametrize("seed", range(3))
def test_many_pairs_of_a_decaying_spectrum_all_converge(k, seed):
    """Bounds of residuals added up over many held pairs must not keep it from ending."""
    values = torch.cat([40 * torch.arange(1, 61).double() ** -1.3, torch.linspace(-0.2, 0.2, 940)])
    problem = fm.MatrixOperator(matrix_with_spectrum(values, seed, torch.float32))
    result = fm.lanczos(problem, k=k, seed=seed)
    assert result.converged
    assert result.products <= 4 * k
    expected = values.sort(descending=True).values[:k]
    torch.testing.assert_close(result.eigenvalues, expected.double(), rtol=0, atol=2e-3 * 40)


@pytest.mark.parametrize("seed", range(6))
def test_values_close_to_each_other_are_followed_until_they_rest(seed):
    """Near the last pairs neighbours lie within a tolerance, and small residuals come too early."""
    values = 1 / torch.arange(1, 3001).double()
    problem = fm.FunctionOperator(lambda vector: values.float() * vector, 3000)
    result = fm.lanczos(problem, k=40, seed=seed)
    assert result.products <= 100
    torch.testing.assert_close(result.eigenvalues, values[:40], rtol=0, atol=1e-3)


# ----------------------------------------------------------------- the basis: where and in what


@pytest.mark.parametrize("k", [1, 6])
def test_basis_on_a_named_device_gives_the_same_bits(k):
    problem = operator("outliers", dtype=torch.float32)
    plain, named = fm.lanczos(problem, k=k), fm.lanczos(problem, k=k, basis_device="cpu")
    assert plain == named
    assert torch.equal(plain.eigenvectors, named.eigenvectors)


def test_basis_device_that_is_not_there_is_refused():
    with pytest.raises(fm.DeviceError, match="lanczos is 'nowhere'"):
        fm.lanczos(operator("outliers"), basis_device="nowhere")


NARROW = [
    (torch.bfloat16, torch.float32, 8e-3),
    (torch.float16, torch.float32, 1e-3),
    (torch.bfloat16, DOUBLE, 1e-2),
    (torch.float32, DOUBLE, 1e-6),
]


@pytest.mark.parametrize("k", [1, 4, 10])
@pytest.mark.parametrize("kind", ["outliers", "repeated"])
@pytest.mark.parametrize(("narrow", "dtype", "tol"), NARROW)
def test_narrow_basis_keeps_its_promises(narrow, dtype, tol, kind, k):
    problem = operator(kind, dtype=dtype)
    result = fm.lanczos(problem, k=k, tol=tol, basis_dtype=narrow)
    assert_right(result, kind, k, tol, problem.matrix)
    assert result.eigenvectors.dtype == dtype
    vectors = result.eigenvectors.double()
    true = torch.linalg.vector_norm(
        problem.matrix.double() @ vectors - vectors * result.eigenvalues, dim=0
    )
    assert bool((true <= 1.001 * tol * 10).all())
    torch.testing.assert_close(
        vectors.T @ vectors, torch.eye(k, dtype=DOUBLE), rtol=0, atol=2 * torch.finfo(narrow).eps
    )


@pytest.mark.parametrize("k", [1, 4])
def test_products_that_measure_narrow_vectors_are_counted(k):
    matrix = operator("outliers", dtype=torch.float32).matrix
    calls = []

    def product(vector):
        calls.append(1)
        return matrix @ vector

    problem = fm.FunctionOperator(product, N)
    result = fm.lanczos(problem, k=k, tol=1e-2, basis_dtype=torch.bfloat16)
    assert result.products == len(calls)


def test_narrow_basis_that_runs_out_of_products_says_so():
    problem = operator("cubic", dtype=torch.float32)
    with pytest.warns(fm.ConvergenceWarning):
        result = fm.lanczos(
            problem, k=5, tol=8e-3, basis_dtype=torch.bfloat16, max_products=12, basis_size=8
        )
    assert not result.converged


@pytest.mark.parametrize(
    ("narrow", "tol"), [(torch.bfloat16, 1e-3), (torch.bfloat16, 7e-3), (torch.float16, 9e-4)]
)
def test_tolerance_that_a_narrow_basis_cannot_reach_is_refused(narrow, tol):
    with pytest.raises(fm.InvalidArgumentError, match=r"with a basis in torch.b?float16"):
        fm.lanczos(operator("outliers", dtype=torch.float32), tol=tol, basis_dtype=narrow)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64, "bfloat16"])
def test_basis_of_an_unfit_type_is_refused(dtype):
    with pytest.raises(fm.InvalidArgumentError, match="'basis_dtype' argument of lanczos"):
        fm.lanczos(operator("outliers", dtype=torch.float32), basis_dtype=dtype)


def test_basis_of_the_operators_own_type_changes_nothing():
    problem = operator("outliers", dtype=torch.float32)
    assert fm.lanczos(problem, k=3) == fm.lanczos(problem, k=3, basis_dtype=torch.float32)


def test_half_precision_keeps_its_digits_for_long_vectors():
    n = 2**20
    vector = torch.full((n,), n**-0.5)
    vector[::2] *= 1e-2
    basis = Basis(fm.FunctionOperator(torch.clone, n), 1, n, None, torch.float16)
    stored = basis.put(0, vector)
    torch.testing.assert_close(stored, vector, rtol=1e-3, atol=0)


# --------------------------------------------------------------------------- memory, transfers


class Watch(LiveTensors):
    """Also how often the device is waited for."""

    READS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal")

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function._schema.name in self.READS:
            self.reads.append(function._schema.name)
        return super().__torch_dispatch__(function, types, arguments, options)


LONG = 60_000


@pytest.mark.parametrize(
    ("narrow", "bytes_each"), [(None, 4), (torch.bfloat16, 2), (torch.float16, 2)]
)
def test_memory_does_not_grow_with_the_number_of_products(narrow, bytes_each, monkeypatch):
    monkeypatch.setattr("flatminima.algorithms.eigen.basis.STRIP", 2**14)
    # Eigenvalues as dense as these take more products than any limit here.
    diagonal = torch.linspace(-1, 1, LONG)
    problem = fm.FunctionOperator(lambda vector: diagonal * vector, LONG)
    rows, peaks = 12, []
    for limit in (20, 200):
        with Watch() as watch, pytest.warns(fm.ConvergenceWarning):
            result = fm.lanczos(
                problem,
                k=8,
                tol=1e-5 if narrow is None else 8e-3,
                max_products=limit,
                basis_size=rows,
                basis_dtype=narrow,
                progress=False,
            )
        assert result.products == limit
        peaks.append(watch.most)
    vector = 4 * LONG
    basis = rows * bytes_each * LONG
    # Beside the basis: the product on its way, and the eigenvectors at the end.
    assert peaks[1] <= peaks[0] + vector
    assert peaks[1] <= basis + (8 + 5) * vector


def test_a_restart_needs_no_second_basis(monkeypatch):
    monkeypatch.setattr("flatminima.algorithms.eigen.basis.STRIP", 2**14)
    basis = Basis(fm.FunctionOperator(torch.clone, LONG), 30, LONG)
    basis.rows.normal_(generator=torch.Generator().manual_seed(0))
    before = basis.rows.clone()
    turn = torch.linalg.qr(torch.eye(30, dtype=DOUBLE) + 0.3).Q[:, :17].contiguous()
    with Watch() as watch:
        view = basis.rows[:1]  # makes the basis known: views of it are no memory of their own
        known = watch.most
        basis.rotate(turn.numpy(), 30)
    assert known == view.untyped_storage().nbytes() == 4 * 30 * LONG
    # A strip and what it becomes, in float64.
    assert watch.most - known < 8 * 4 * 2**14
    torch.testing.assert_close(basis.rows[:17], turn.float().T @ before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("rows", [8, 30])
def test_one_transfer_for_each_step(rows, k, monkeypatch):
    """`.cpu()` is the transfer of a step; nothing else in it may wait for the device."""
    diagonal = spectrum("outliers").float()
    problem = fm.FunctionOperator(lambda vector: diagonal * vector, N)
    transfers = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(
        torch.Tensor, "cpu", lambda self: (transfers.append(self.numel()), original(self))[1]
    )
    starts = []
    draw = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **o: (starts.append(1), draw(*a, **o))[1])
    with Watch() as watch:
        result = fm.lanczos(problem, k=k, basis_size=rows, progress=False)
    assert result.converged
    assert result.products > rows or rows > 8, "the small basis is meant to restart"
    assert len(transfers) == result.products
    assert max(transfers) <= rows + 1
    # The norm of each random start is read once.
    assert len(watch.reads) == len(starts)


# ------------------------------------------------------------------------------- corner cases


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("matrix", "k"),
    [
        (torch.eye(100), 3),
        (torch.outer(*[torch.ones(300) / 300**0.5] * 2), 5),
        (torch.diag(torch.tensor([1.0] * 20 + [0.0] * 20)), 20),
    ],
    ids=["identity", "rank one", "projection"],
)
def test_invariant_spaces_in_a_narrow_basis(matrix, k, dtype):
    result = fm.lanczos(fm.MatrixOperator(matrix), k=k, tol=1e-2, basis_dtype=dtype)
    exact = torch.linalg.eigvalsh(matrix.double()).flip(0)[:k]
    torch.testing.assert_close(result.eigenvalues, exact, rtol=0, atol=2e-2)
    assert result.converged


@pytest.mark.parametrize("columns", [[49, 49], [49, 48, 49]])
def test_given_vectors_that_depend_on_each_other(columns):
    operator = fm.MatrixOperator(torch.diag(torch.arange(50.0)))
    given = torch.eye(50)[:, columns]
    result = fm.lanczos(operator, k=2, initial=given)
    torch.testing.assert_close(
        result.eigenvalues, torch.tensor([49.0, 48.0], dtype=DOUBLE), rtol=1e-3, atol=0
    )


def test_given_eigenvectors_are_made_use_of():
    operator = fm.MatrixOperator(torch.diag(torch.arange(200.0)))
    given = torch.eye(200)[:, 195:]
    cold = fm.lanczos(operator, k=5, tol=1e-5)
    warm = fm.lanczos(operator, k=5, tol=1e-5, initial=given)
    assert warm.products < cold.products
    torch.testing.assert_close(warm.eigenvalues, torch.arange(199.0, 194.0, -1, dtype=DOUBLE))
    every = torch.eye(4)
    whole = fm.lanczos(fm.MatrixOperator(torch.diag(torch.arange(4.0))), k=4, initial=every)
    torch.testing.assert_close(
        whole.eigenvalues, torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=DOUBLE), rtol=0, atol=1e-6
    )


def test_devices_without_numbers_are_refused_by_the_name_of_the_argument():
    with pytest.raises(fm.DeviceError, match="'basis_device' argument of lanczos"):
        fm.lanczos(fm.MatrixOperator(torch.eye(30)), basis_device="meta")
