"""The same numbers on a GPU as on the CPU, up to rounding."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flatminima as fm
from integrity import untouched

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def objectives():
    """One objective on the CPU and the same on the GPU, in float64."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
    data = torch.randn(50, 6, dtype=torch.float64), torch.randint(3, (50,))
    return [
        fm.Objective(copy.deepcopy(net).to(d), nn.CrossEntropyLoss(), data, batch_size=16)
        for d in ("cpu", "cuda")
    ]


def test_values_and_products_agree_with_the_cpu(objectives):
    host, device = objectives
    assert device.device.type == "cuda"
    assert device.loss() == pytest.approx(host.loss(), rel=1e-12)
    torch.testing.assert_close(device.gradient().cpu(), host.gradient(), rtol=1e-9, atol=1e-12)
    v = torch.linspace(-1, 1, host.size, dtype=torch.float64)
    product = fm.HessianOperator(device) @ v.cuda()
    torch.testing.assert_close(product.cpu(), fm.HessianOperator(host) @ v, rtol=1e-9, atol=1e-12)


def trained(objective):
    """An Adam optimiser after three steps; the same on both devices, but for rounding."""
    optimiser = torch.optim.Adam(objective.model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        x = torch.randn(16, 6, generator=generator, dtype=torch.float64).to(objective.device)
        optimiser.zero_grad()
        objective.model(x).square().mean().backward()
        optimiser.step()
    return optimiser


OPERATORS = {
    "gauss-newton": fm.GaussNewtonOperator,
    "gauss-newton by differences": lambda o: fm.GaussNewtonOperator(o, method="finite_differences"),
    "gauss-newton, graphs rebuilt": lambda o: fm.GaussNewtonOperator(o, keep_graph=False),
    "fisher": fm.FisherOperator,
    "fisher, empirical": lambda o: fm.FisherOperator(o, kind="empirical"),
    "sum": lambda o: (2 * fm.HessianOperator(o) - fm.GaussNewtonOperator(o)).shifted(0.1),
    "preconditioned": lambda o: fm.PreconditionedOperator(fm.HessianOperator(o), trained(o)),
    "block": lambda o: fm.BlockOperator(fm.HessianOperator(o), ["0.weight", "3.*"]),
    "off a subspace": lambda o: fm.ProjectedOperator(
        fm.HessianOperator(o),
        torch.linspace(-1, 1, o.size, dtype=torch.float64, device=o.device)[:, None],
        complement=True,
    ),
}


@pytest.mark.parametrize("kind", OPERATORS)
def test_operators_agree_with_the_cpu(objectives, kind):
    host, device = (OPERATORS[kind](o) for o in objectives)
    tolerance = 1e-6 if "differences" in kind else 1e-9
    block = torch.randn(
        host.shape[0], 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    with untouched(objectives[1].model):
        with device.session():
            found = [device @ block.cuda() for _ in range(2)]
        diagonal = device.exact_diagonal()
    expected = host @ block
    for product in found:
        assert product.device.type == "cuda"
        torch.testing.assert_close(product.cpu(), expected, rtol=tolerance, atol=tolerance)
    if diagonal is not None:
        torch.testing.assert_close(
            diagonal.cpu(), host.exact_diagonal(), rtol=tolerance, atol=tolerance
        )


def test_drawn_labels_on_the_gpu_are_the_same_in_every_product(objectives):
    device = objectives[1]
    operator = fm.FisherOperator(device, kind="monte_carlo", samples=2, seed=1)
    unit = torch.eye(device.size, dtype=torch.float64, device="cuda")
    state = torch.cuda.get_rng_state()
    matrix = operator @ unit
    torch.testing.assert_close(matrix, operator @ unit, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-9, atol=1e-12)
    assert float(torch.linalg.eigvalsh(matrix)[0]) > -1e-12
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_eigenvalues_agree_with_the_cpu(objectives):
    host, device = (fm.lanczos(fm.HessianOperator(o), k=4, tol=1e-8) for o in objectives)
    torch.testing.assert_close(device.eigenvalues, host.eigenvalues, rtol=1e-6, atol=1e-9)
    assert device.eigenvectors.device.type == "cuda"


@pytest.mark.parametrize("basis_device", [None, "cpu"])
def test_spectra_agree_with_the_cpu(objectives, basis_device):
    host, device = (fm.HessianOperator(o) for o in objectives)
    options = {"probes": 3, "steps": 8, "outliers": fm.lanczos(host, k=2, tol=1e-8)}
    generators = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    first = fm.spectral_density(host, **options, seed=generators[0])
    options["basis_device"] = basis_device
    second = fm.spectral_density(device, **options, seed=generators[1])
    torch.testing.assert_close(second.eigenvalues, first.eigenvalues, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(second.nodes, first.nodes, rtol=1e-5, atol=1e-7)
    assert second.weights.device.type == "cpu"


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_traces_from_the_same_draws_agree_with_the_cpu(objectives, method):
    # A generator on the CPU draws the same vectors for both.
    host, device = (
        fm.trace(
            fm.HessianOperator(o), method=method, products=20, seed=torch.Generator().manual_seed(0)
        )
        for o in objectives
    )
    assert device.value == pytest.approx(host.value, rel=1e-8)
    assert device.standard_error == pytest.approx(host.standard_error, rel=1e-5)
    for one, other in zip(device.tensors, host.tensors, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-6, abs=1e-10)


@pytest.mark.parametrize("method", ["hutchinson", "xdiag", "exact"])
def test_diagonals_from_the_same_draws_agree_with_the_cpu(objectives, method):
    host, device = (
        fm.diagonal(
            fm.HessianOperator(o),
            method=method,
            products=None if method == "exact" else 20,
            seed=torch.Generator().manual_seed(0),
        )
        for o in objectives
    )
    assert device.values.device.type == "cuda"
    torch.testing.assert_close(device.values.cpu(), host.values, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        device.standard_error.cpu(), host.standard_error, rtol=1e-4, atol=1e-9
    )


@pytest.mark.parametrize("subspace", [None, 5])
def test_measures_run_on_the_gpu_and_leave_everything_as_it_was(objectives, subspace):
    device = objectives[1]
    with untouched(device.model):
        state = torch.cuda.get_rng_state()
        first = fm.epsilon_sharpness(device, subspace=subspace)
        assert fm.epsilon_sharpness(device, subspace=subspace) == first
        fm.random_sharpness(device, samples=2)
        fm.trace(fm.HessianOperator(device), products=4)
        fm.spectral_density(fm.HessianOperator(device), probes=2, steps=3, outliers=1)
        for method in ("hutchinson", "hutch++", "xtrace"):
            fm.trace(fm.HessianOperator(device), method=method, products=6)
        fm.diagonal(fm.HessianOperator(device), method="xdiag", products=6)
        assert torch.equal(torch.cuda.get_rng_state(), state)


def test_data_stay_where_the_model_is(objectives):
    vector = torch.zeros(objectives[1].size, dtype=torch.float64)
    with pytest.raises(fm.DeviceError, match="cuda"):
        objectives[1].loss_at(vector)


# ------------------------------------------------------------------- data that are read anew


def on_the_gpu(data, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.2), nn.Tanh(), nn.Linear(64, 3)).cuda()
    return fm.Objective(net, nn.CrossEntropyLoss(), data, mode="train", **options)


def numbers(count=5000):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 6, generator=generator)
    return x, torch.randint(3, (count,), generator=generator)


@pytest.mark.parametrize("pin_memory", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_read_ahead_give_the_same_as_kept_ones(pin_memory, workers):
    loader = DataLoader(
        TensorDataset(*numbers()),
        batch_size=64,
        shuffle=True,
        pin_memory=pin_memory,
        num_workers=workers,
    )
    kept, anew = (on_the_gpu(loader, cache=cache) for cache in (True, False))
    with untouched(anew.model, loader):
        for _ in range(3):
            value, gradient = anew.value_and_gradient()
            expected, wanted = kept.value_and_gradient()
            assert value == expected
            assert torch.equal(gradient, wanted)
    result = fm.random_sharpness(anew, samples=2)
    assert result.readings == 2
    assert result.value == fm.random_sharpness(kept, samples=2).value


@pytest.mark.parametrize("cache", [True, False])
def test_a_loader_that_fills_the_same_pinned_memory_again(cache):
    x, y = numbers(64 * 200)

    class Recycling:
        def __iter__(self):
            a = torch.empty(64, 6).pin_memory()
            b = torch.empty(64, dtype=torch.long).pin_memory()
            for start in range(0, len(x), 64):
                a.copy_(x[start : start + 64])
                b.copy_(y[start : start + 64])
                yield a, b

    expected = on_the_gpu((x, y), batch_size=64).gradient()
    objective = on_the_gpu(Recycling(), cache=cache)
    for _ in range(3):
        assert torch.equal(objective.gradient(), expected)


def test_the_host_does_not_fill_the_device_with_batches():
    wide = torch.randn(64 * 128, 4096)
    net = nn.Sequential(nn.Linear(4096, 2048), nn.Tanh(), nn.Linear(2048, 1)).cuda()
    loader = DataLoader(TensorDataset(wide, torch.zeros(len(wide), 1)), batch_size=128)
    objective = fm.Objective(net, nn.MSELoss(), loader, cache=False)
    objective.loss()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    objective.loss()
    batch = 128 * 4096 * 4
    assert torch.cuda.max_memory_allocated() - before < 16 * batch


def test_an_error_between_two_batches_leaves_everything_as_it_was():
    class Broken:
        def __iter__(self):
            x, y = numbers(256)
            yield x[:128], y[:128]
            if self.breaks:
                raise RuntimeError("the disk is full")
            yield x[128:], y[128:]

        breaks = False

    data = Broken()
    objective = on_the_gpu(data, cache=False)
    expected = objective.loss()
    data.breaks = True
    with untouched(objective.model), pytest.raises(RuntimeError, match="the disk is full"):
        objective.loss()
    data.breaks = False
    assert objective.loss() == expected


def test_tf32_is_named_where_it_is_allowed():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this device has no TF32")
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        notes = fm.random_sharpness(on_the_gpu(numbers()), samples=1).notes
        assert notes == (
            "float32 matrix products may be computed in TF32, as PyTorch's settings allow.",
        )
        torch.backends.cuda.matmul.allow_tf32 = False
        assert fm.random_sharpness(on_the_gpu(numbers()), samples=1).notes == ()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
