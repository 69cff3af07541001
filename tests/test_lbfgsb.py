"""L-BFGS-B on the device against SciPy's, against dense formulas, and for what it may cost."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import flatminima as fm
from exhaustive import thinned
from flatminima.algorithms.optimize import cauchy, chunks
from flatminima.algorithms.optimize.box import maximize_over_box
from flatminima.algorithms.optimize.lbfgsb import LBFGSB, MEMORY
from flatminima.algorithms.optimize.line_search import LineSearch
from flatminima.measures import epsilon_sharpness as measure_module
from zoo import NAMES, build, matrix_with_spectrum, quadratic_case

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import image_data
import small_vs_large_batch

DOUBLE = torch.float64
CPU = torch.device("cpu")

# ----------------------------------------------------------------------------------- problems


def with_gradient(function):
    """u → value and gradient, from u → value."""

    def both(u):
        u = u.detach().clone().requires_grad_()
        value = function(u)
        return float(value.detach()), torch.autograd.grad(value, u)[0]

    return both


def quadratic(matrix, linear):
    def both(u):
        product = matrix @ u
        return float(0.5 * u @ product + linear @ u), product + linear

    return both


def draws(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return functools.partial(torch.randn, generator=generator, dtype=DOUBLE)


def smooth_problems(n: int, seed: int):
    """Functions over the unit box whose minima lie inside, on faces, and in corners."""
    randn = draws(seed)
    spectrum = (2 * randn(n)).exp()
    linear = randn(n)
    matrix = matrix_with_spectrum(spectrum.tolist(), seed, DOUBLE)
    signs = torch.where(randn(n) < 0, -1.0, 1.0)
    indefinite = matrix_with_spectrum((spectrum * signs).tolist(), seed, DOUBLE)
    features, targets = randn(3 * n, n) / math.sqrt(n), randn(3 * n)
    return {
        "convex": quadratic(matrix, linear),
        "convex, on a face": quadratic(matrix, 10 * linear),
        "convex, near a corner": quadratic(matrix, 100 * linear),
        "separable": quadratic(torch.diag(spectrum), -spectrum * linear),
        "indefinite": quadratic(indefinite, 10 * linear),
        "concave": quadratic(-matrix, linear),
        "linear": quadratic(torch.zeros(n, n, dtype=DOUBLE), linear),
        "tanh units": with_gradient(lambda u: ((features @ u).tanh() - targets).square().sum()),
        "waves": with_gradient(lambda u: 10 * (3 * u + linear).sin().sum() + u.sum() ** 2),
        "Rosenbrock": with_gradient(lambda u: rosenbrock(1.5 * u)),
        "Rosenbrock, minimum outside": with_gradient(lambda u: rosenbrock(0.5 * u + 0.2)),
    }


SMOOTH = list(smooth_problems(2, 0))


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def starts(n: int, seed: int):
    uniform = torch.as_tensor(np.random.default_rng(seed).uniform(-1, 1, n))
    return {"inside": uniform, "corner": uniform.sign()}


class Watched:
    """A function that remembers where it was evaluated, and what it was there."""

    def __init__(self, function) -> None:
        self.function = function
        self.points: list[torch.Tensor] = []
        self.values: list[float] = []

    def __call__(self, u):
        self.points.append(u.clone())
        value, gradient = self.function(u)
        self.values.append(value)
        return value, gradient.clone()


class Traced(LBFGSB):
    """Remembers after how many evaluations version 3.0 as SciPy has it leaves the formulas.

    It does so (see the dense formulas below) after an iteration without free variables, and after
    a pair that was skipped: the sums over the free variables that it keeps are then out of date.
    """

    common = None

    def _aim(self):
        slope = super()._aim()
        if len(self._pairs) and bool(self._stopped.all()):
            self.leave(1)
        return slope

    def _accept(self, *arguments):
        before = list(self._pairs._order)
        kept = super()._accept(*arguments)
        if before and self._pairs._order == before:
            self.leave(0)
        return kept

    def leave(self, further):
        if self.common is None:
            self.common = len(self.watched.points) + further


def ours(function, start, iterations):
    watched = Watched(function)
    solver = Traced(len(start), dtype=start.dtype, device=CPU)
    solver.point.copy_(start)
    solver.watched = watched
    watched.outcome = solver.minimize(watched, iterations)
    watched.common = solver.common
    return watched


def scipys(function, start, iterations):
    watched = Watched(function)

    def on_host(u):
        value, gradient = watched(torch.as_tensor(u).to(start))
        return value, gradient.double().numpy()

    found = minimize(
        on_host,
        start.double().numpy(),
        jac=True,
        method="L-BFGS-B",
        bounds=[(-1, 1)] * len(start),
        options={"maxiter": iterations, "ftol": 0.0, "gtol": 0.0},
    )
    return watched, found


@pytest.fixture
def short_chunks(monkeypatch):
    """Vectors in many parts and breakpoints in many pieces, as where they are long."""
    monkeypatch.setattr(chunks, "SHORT", 7)
    monkeypatch.setattr(cauchy, "SAMPLE", 8)
    monkeypatch.setattr(cauchy, "BLOCK", 5)


# --------------------------------------------------------------------- the iterates of SciPy's


def assert_same_path(function, start, iterations=10):
    """The same points up to 1e-6, until SciPy has converged to rounding; how many they are."""
    mine = ours(function, start, iterations)
    theirs, found = scipys(function, start, iterations)
    settled = np.nonzero(np.array(theirs.values) <= found.fun + 1e-13 * abs(found.fun))[0]
    count = min(settled[0] + 1, mine.common or math.inf)
    assert len(mine.points) >= count
    for a, b in zip(mine.points[:count], theirs.points[:count], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    return count


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("n", [2, 3, 8, 40, 150])
@pytest.mark.parametrize("name", SMOOTH)
def test_evaluated_points_are_those_of_scipy(name, n, seed):
    function, start = smooth_problems(n, seed)[name], starts(n, seed)
    assert assert_same_path(function, start["inside"]) > 1
    assert_same_path(function, start["corner"])


@pytest.mark.parametrize("name", SMOOTH)
def test_evaluated_points_are_those_of_scipy_where_vectors_are_cut(name, short_chunks):
    for n, seed in ((8, 1), (150, 2)):
        for start in starts(n, seed).values():
            assert_same_path(smooth_problems(n, seed)[name], start)


def test_evaluated_points_are_those_of_scipy_from_the_centre():
    for seed in range(3):
        for name in ("convex, on a face", "indefinite", "tanh units", "linear", "waves"):
            assert_same_path(smooth_problems(30, seed)[name], torch.zeros(30, dtype=DOUBLE))


def test_evaluated_points_are_those_of_scipy_once_the_memory_is_full():
    matrix = matrix_with_spectrum(np.geomspace(1e-2, 1e2, 80).tolist(), 0, DOUBLE)
    function = quadratic(matrix, 10 * draws(1)(80))
    start = starts(80, 3)["inside"]
    mine = ours(function, start, 3 * MEMORY)
    theirs, _ = scipys(function, start, 3 * MEMORY)
    assert mine.common is None
    assert mine.outcome == (fm.Outcome.ITERATION_LIMIT, 3 * MEMORY)
    count = min(len(mine.values), len(theirs.values))
    np.testing.assert_allclose(mine.values[:count], theirs.values[:count], rtol=1e-6)


@functools.cache
def random_net(seed: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).double()
    inputs = torch.randn(40, 6, dtype=DOUBLE)
    return model, inputs, torch.randint(4, (40,))


@pytest.mark.parametrize("width", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_evaluated_points_are_those_of_scipy_for_the_loss_of_a_net(seed, width):
    model, *data = random_net(seed)
    objective = fm.Objective(model, nn.CrossEntropyLoss(), tuple(data))

    def downhill(u):
        value, gradient = objective.value_and_gradient(width * u)
        return 1e4 * value, 1e4 * width * gradient

    assert_same_path(downhill, torch.zeros(objective.size, dtype=DOUBLE))


# ----------------------------------------------------------------------------- dense formulas


def dense_aim(x, g, pairs):
    """Where Byrd, Lu, Nocedal and Zhu search, one breakpoint after the other and with all of B."""
    pairs = [pairs.columns[slot] for slot in pairs._order]
    y, s = pairs[-1]
    b = float(y @ y / (s @ y)) * torch.eye(len(x), dtype=DOUBLE)
    for y, s in pairs:
        bs = b @ s
        b = b - torch.outer(bs, bs) / (s @ bs) + torch.outer(y, y) / (y @ s)
    outward = g.sign() - (g == 0) * x.sign()
    times = torch.where(1 + x * outward == 0, 0.0, (1 + x * outward) / g.abs())
    direction = torch.where(times > 0, -g, 0.0)
    time, z = 0.0, torch.zeros_like(x)
    for end in sorted(set(times[(times > 0) & times.isfinite()].tolist())):
        ahead = -float(direction @ (g + b @ z)) / float(direction @ b @ direction)
        if ahead < end - time:
            time, z = time + max(ahead, 0.0), z + max(ahead, 0.0) * direction
            break
        time, z = end, z + (end - time) * direction
        direction = torch.where(times <= end, 0.0, direction)
    free = times > time
    step = torch.zeros_like(x)
    step[free] = -torch.linalg.solve(b[free][:, free], (g + b @ z)[free])
    aim = (x + z + step).clamp(-1, 1)
    if (aim - x) @ g > 0:
        room = torch.where(step != 0, (step.sign() - x - z) / step, math.inf)
        aim = x + z + min(1.0, float(room.amin())) * step
    return aim


@pytest.fixture
def aims(monkeypatch):
    """Checks each point that is aimed at by the dense formulas; counts what happened."""
    counts = dict.fromkeys(("all", "nothing free", "not projected", "after a skipped pair"), 0)
    aim, within, accept = LBFGSB._aim, LBFGSB._aim_within, LBFGSB._accept

    def watched_aim(self):
        x, g = self.point.clone(), self._gradient.clone()
        slope = aim(self)
        if len(self._pairs) and slope < 0:
            torch.testing.assert_close(self._work, dense_aim(x, g, self._pairs), rtol=0, atol=1e-7)
            counts["all"] += 1
            counts["nothing free"] += bool(self._stopped.all())
        return slope

    def watched_within(self, *arguments):
        counts["not projected"] += 1
        return within(self, *arguments)

    def watched_accept(self, *arguments):
        before = len(self._pairs)
        kept = accept(self, *arguments)
        counts["after a skipped pair"] += 0 < len(self._pairs) == before < MEMORY - 1
        return kept

    monkeypatch.setattr(LBFGSB, "_aim", watched_aim)
    monkeypatch.setattr(LBFGSB, "_aim_within", watched_within)
    monkeypatch.setattr(LBFGSB, "_accept", watched_accept)
    return counts


def test_every_step_is_that_of_the_dense_formulas(aims):
    for n, seed in itertools.product((2, 3, 8, 20), range(6)):
        for function in smooth_problems(n, seed).values():
            for start in starts(n, seed).values():
                ours(function, start, 8)
    assert min(aims.values()) > 5, aims


def test_every_step_is_that_of_the_dense_formulas_where_vectors_are_cut(aims, short_chunks):
    for seed in range(3):
        for function in smooth_problems(60, seed).values():
            for start in starts(60, seed).values():
                ours(function, start, 8)
    assert aims["all"] > 100


def test_steps_with_slopes_that_vanish_at_bounds(aims):
    randn = draws(5)
    features, targets = randn(60, 30), randn(60)
    # No slope in the variables beyond ±0.8, which are many after the first step.
    function = with_gradient(lambda u: (features @ u.clamp(-0.8, 0.8) - targets).square().sum())
    for seed in range(4):
        assert assert_same_path(function, 0.5 * starts(30, seed)["inside"], 5) > 3
    assert aims["all"] > 10


# ------------------------------------------------------------------------------ the line search


@pytest.mark.parametrize(
    ("function", "first"),
    [
        (lambda a: ((a - 1.3) ** 2, 2 * (a - 1.3)), 1),
        (lambda a: ((a - 0.01) ** 2, 2 * (a - 0.01)), 3),
        (lambda a: ((a - 40) ** 2, 2 * (a - 40)), 4),
    ],
)
def test_line_search_ends_at_a_step_with_a_smaller_slope(function, first):
    value, slope = function(0.0)
    search = LineSearch(value, slope, lambda: 1e10)
    trials = 1
    while not search.advance(*function(search.step)):
        trials += 1
    assert trials <= first + 2
    reached, slope_there = function(search.step)
    assert reached <= value + 1e-3 * search.step * slope
    assert abs(slope_there) <= 0.9 * abs(slope)


def test_line_search_stops_at_the_longest_step():
    search = LineSearch(0.0, -1.0, lambda: 3.0)
    steps = []
    while not search.advance(-search.step, -1.0):
        steps.append(search.step)
    assert search.step == 3.0
    assert len(steps) <= 3


def test_longest_step_is_asked_for_only_when_the_first_step_fails():
    def fail():
        raise AssertionError

    assert LineSearch(1.0, -2.0, fail).advance(0.0, 0.0)


# -------------------------------------------------------------------------- the maxima of SciPy's


def small_net(seed: int, steps: int, dtype: torch.dtype) -> fm.Objective:
    torch.manual_seed(seed)
    activation = (nn.Tanh(), nn.GELU(), nn.Sigmoid(), nn.ReLU())[seed % 4]
    model = nn.Sequential(nn.Linear(3, 8), activation, nn.Linear(8, 3))
    inputs = torch.randn(24, 3)
    labels = (inputs @ torch.randn(3, 3)).argmax(dim=1)
    labels[:4] = torch.randint(3, (4,))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return fm.Objective(model.to(dtype), nn.CrossEntropyLoss(), (inputs.to(dtype), labels))


@functools.cache
def digits_net(epochs: int, batch_size: int) -> nn.Module:
    data = image_data.load("digits")
    torch.manual_seed(0)
    model = small_vs_large_batch.f1(data.train_inputs.shape[1], 10, width=16, depth=2)
    options = {"batch_size": batch_size, "epochs": epochs, "seed": 0, "progress": False}
    small_vs_large_batch.train(model, data.train_inputs, data.train_labels, **options)
    return model


def digits(epochs: int, batch_size: int, dtype: torch.dtype) -> fm.Objective:
    data = image_data.load("digits")
    model = copy.deepcopy(digits_net(epochs, batch_size)).to(dtype)
    inputs = data.train_inputs.to(dtype)
    return fm.Objective(model, nn.CrossEntropyLoss(), (inputs, data.train_labels), batch_size=2000)


SPECTRUM = np.geomspace(0.1, 10, 40)


def one_quadratic(signs: float, slope: float, dtype: torch.dtype) -> fm.Objective:
    matrix = matrix_with_spectrum((SPECTRUM * signs).tolist(), 0, DOUBLE)
    return quadratic_case(matrix.to(dtype), (slope * draws(1)(40)).to(dtype)).objective()


MAXIMA = {
    **{
        f"zoo: {name}": functools.partial(lambda n, d: build(n, d).objective(), name)
        for name in NAMES
    },
    **{f"net {s} at its start": functools.partial(small_net, s, 0) for s in range(4)},
    **{f"net {s} trained": functools.partial(small_net, s, 300) for s in range(8)},
    "digits, small batch": functools.partial(digits, 10, 16),
    "digits, large batch": functools.partial(digits, 10, 140),
    **{
        f"{name} quadratic, slope {slope}": functools.partial(one_quadratic, signs, slope)
        for name, signs in (("convex", 1), ("concave", -1), ("indefinite", (-1) ** np.arange(40)))
        for slope in (1e-3, 0.1)
    },
    "concave quadratic, no slope": functools.partial(one_quadratic, -1, 0.0),
}


def climb_of(objective, monkeypatch, **options):
    """The best loss after each evaluation."""
    found = []
    original = maximize_over_box

    def watched(*arguments, on_evaluation, **rest):
        def told(best):
            found.append(best)
            on_evaluation(best)

        return original(*arguments, on_evaluation=told, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(measure_module, "maximize_over_box", watched)
        patch.setattr(measure_module, "FEW_PARAMETERS", 0)
        fm.epsilon_sharpness(objective, **options)
    return found


@pytest.mark.parametrize(
    ("name", "dtype"),
    thinned(itertools.product(MAXIMA, (torch.float32, torch.float64)), 7),
)
def test_maxima_are_not_lower_than_scipys_after_as_many_evaluations(name, dtype, monkeypatch):
    objective = MAXIMA[name](dtype)
    rounding = 16 * torch.finfo(dtype).eps * max(1.0, abs(objective.loss()))
    for epsilon, subspace in itertools.product((1e-3, 5e-4), (None, min(20, objective.size))):
        options = {"epsilon": epsilon, "subspace": subspace}
        mine = climb_of(objective, monkeypatch, **options)
        theirs = climb_of(objective, monkeypatch, solver="scipy", **options)
        count = min(len(mine), len(theirs))
        gain = theirs[count - 1] - theirs[0]
        assert mine[count - 1] - mine[0] >= 0.999 * gain - rounding, options


def test_start_without_a_slope_reaches_what_scipys_reaches():
    matrix = matrix_with_spectrum([5.0, 2.0, 1.0, 0.3, 0.1, 0.0, 0.0], 9, DOUBLE)
    objective = quadratic_case(matrix).objective()
    values = [fm.epsilon_sharpness(objective, solver=s).value for s in ("lbfgsb", "scipy")]
    assert values[0] == pytest.approx(values[1], rel=1e-9)


# ------------------------------------------------------------------------------------- the box


def maximum(function, half_width, **options):
    settings = {"iterations": 10, "on_evaluation": lambda best: None, **options}
    return maximize_over_box(function, half_width, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 1000])
def test_linear_function_gives_the_exact_corner(n, dtype):
    slope = draws(0)(n).to(dtype)
    width = (draws(1)(n).abs() + 1e-3).to(dtype)
    found = maximum(lambda x: (float(slope.double() @ x.double()), slope.clone()), width)
    assert torch.equal(found.point, slope.sign() * width)
    assert found.outcome is fm.Outcome.STATIONARY


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SMOOTH)
def test_no_point_outside_the_box_is_ever_evaluated(name, dtype):
    function = smooth_problems(40, 4)[name]
    width = (1e-3 * (draws(2)(40).abs() + 1)).to(dtype)
    points = []

    def watched(x):
        points.append(x.clone())
        value, gradient = function((x / width).double())
        return -value, (-gradient).to(dtype) / width

    found = maximum(watched, width, iterations=20, restarts=1)
    assert len(points) == found.evaluations > 2
    assert all(bool((p.abs() <= width).all()) and p.dtype == dtype for p in points)
    assert any(torch.equal(found.point, p) for p in points)


def test_widths_of_zero_are_kept():
    function = smooth_problems(20, 6)["indefinite"]
    width = torch.ones(20, dtype=DOUBLE)
    width[::3] = 0
    inner = maximum(lambda x: tuple(-v for v in function(x)), width)
    assert not inner.point[::3].any()
    assert bool(inner.point[1::3].any())


def test_all_widths_of_zero_leave_nothing_to_do():
    found = maximum(lambda x: (float(x.sum()), torch.ones_like(x)), torch.zeros(3))
    assert found.outcome is fm.Outcome.NO_ASCENT
    assert not found.point.any()


def test_width_without_any_slope_is_left_alone():
    def function(x):
        return float(x[0]), torch.tensor([1.0, 0.0], dtype=x.dtype)

    assert torch.equal(maximum(function, torch.ones(2)).point, torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_call_gives_the_same_bits(dtype):
    function, width = hill(30_000, dtype), torch.linspace(0.1, 1, 30_000, dtype=dtype)
    first, again = (maximum(function, width, restarts=1) for _ in range(2))
    assert torch.equal(first.point, again.point)
    assert (first.value, first.evaluations) == (again.value, again.evaluations)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["value", "gradient", "one entry of the gradient"])
@pytest.mark.parametrize("after", [1, 2, 5])
def test_what_is_not_finite_ends_the_start_and_is_told(bad, where, after):
    function = smooth_problems(12, 8)["indefinite"]
    count = itertools.count(1)

    def upwards(x):
        value, gradient = (-v for v in function(x))
        if next(count) > after:
            value = bad if where == "value" else value
            gradient[0 if where.startswith("one") else slice(None)] += (
                0 if where == "value" else bad
            )
        return value, gradient

    found = maximum(upwards, torch.ones(12, dtype=DOUBLE))
    assert found.outcome is fm.Outcome.UNBOUNDED
    assert math.isfinite(found.value)
    assert found.evaluations > after


def test_solver_can_be_chosen_and_an_unknown_one_is_refused():
    objective = build("conv_batch_norm").objective()
    mine, theirs = (fm.epsilon_sharpness(objective, solver=s) for s in ("lbfgsb", "scipy"))
    assert mine == fm.epsilon_sharpness(objective)
    assert mine.value == pytest.approx(theirs.value, rel=1e-9)
    assert mine.outcome is theirs.outcome
    with pytest.raises(fm.InvalidArgumentError, match=r"'solver' .* one of 'lbfgsb', 'scipy'"):
        fm.epsilon_sharpness(objective, solver="lbfgs")


# ------------------------------------------------------------------------------- what it costs


class LiveVectors(TorchDispatchMode):
    """The most memory that tensors of at least n entries take at a time, in vectors."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.most = 0.0
        self.storages: dict[int, tuple[int, float]] = {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        for tensor in made if isinstance(made, list | tuple) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.take(tensor)
        self.most = max(self.most, sum(vectors for _, vectors in self.storages.values()))
        return made

    def take(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        entries = storage.nbytes() / tensor.element_size()
        if entries >= self.size:
            key = storage.data_ptr()
            self.storages[key] = (self.storages.get(key, (0, 0))[0] + 1, entries / self.size)
            weakref.finalize(tensor, self.drop, key)

    def drop(self, key: int) -> None:
        users, vectors = self.storages.pop(key)
        if users > 1:
            self.storages[key] = (users - 1, vectors)


def hill(n, dtype):
    """A concave function with its maximum partly outside the box, which takes one vector."""
    randn = draws(9)
    root, target = randn(n).exp().to(dtype), randn(n).to(dtype)

    def function(x):
        scaled = (target - x).mul_(root)
        return -float(scaled @ scaled) / 2, scaled.mul_(root)

    return function


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_is_bounded(dtype, monkeypatch):
    n = 40_000
    monkeypatch.setattr(chunks, "SHORT", 512)
    function = hill(n, dtype)
    width = torch.linspace(0.5, 1, n, dtype=dtype)
    with LiveVectors(n) as live:
        found = maximum(function, width.clone(), iterations=2 * MEMORY, restarts=1)
    assert found.evaluations > 4 * MEMORY
    assert 2 * MEMORY < live.most <= 2 * MEMORY + 8


def test_vectors_never_come_to_the_host(monkeypatch):
    n = 30_000
    monkeypatch.setattr(chunks, "SHORT", 512)
    function, sizes = hill(n, torch.float32), []

    def watch(name):
        original = getattr(torch.Tensor, name)

        def watched(self, *arguments, **options):
            sizes.append(self.numel())
            return original(self, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, name, watched)

    for name in ("cpu", "numpy", "tolist", "item", "__float__", "__bool__", "__array__"):
        watch(name)
    maximum(function, torch.linspace(0.5, 1, n), restarts=1)
    assert 0 < max(sizes) < 1000


def test_few_numbers_come_to_the_host_in_an_iteration(monkeypatch):
    function, calls = hill(2000, torch.float32), []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: (calls.append(1), original(self))[1])
    found = maximum(function, torch.ones(2000))
    assert len(calls) <= 4 * found.evaluations
