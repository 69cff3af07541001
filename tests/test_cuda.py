"""The same numbers on a GPU as on the CPU, up to rounding."""

import copy

import pytest
import torch
from torch import nn

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


def test_eigenvalues_agree_with_the_cpu(objectives):
    host, device = (fm.lanczos(fm.HessianOperator(o), k=4, tol=1e-8) for o in objectives)
    torch.testing.assert_close(device.eigenvalues, host.eigenvalues, rtol=1e-6, atol=1e-9)
    assert device.eigenvectors.device.type == "cuda"


@pytest.mark.parametrize("subspace", [None, 5])
def test_measures_run_on_the_gpu_and_leave_everything_as_it_was(objectives, subspace):
    device = objectives[1]
    with untouched(device.model):
        state = torch.cuda.get_rng_state()
        first = fm.epsilon_sharpness(device, subspace=subspace)
        assert fm.epsilon_sharpness(device, subspace=subspace) == first
        fm.random_sharpness(device, samples=2)
        fm.trace(fm.HessianOperator(device), products=4)
        assert torch.equal(torch.cuda.get_rng_state(), state)


def test_data_stay_where_the_model_is(objectives):
    vector = torch.zeros(objectives[1].size, dtype=torch.float64)
    with pytest.raises(fm.DeviceError, match="cuda"):
        objectives[1].loss_at(vector)


def test_captured_products_are_the_same(objectives):
    host, device = objectives
    plain = fm.HessianOperator(host)
    operator = fm.HessianOperator(device, method="cuda_graph")
    block = torch.randn(
        host.size, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    with operator.session():
        for _ in range(3):
            product = (operator @ block.cuda()).cpu()
            torch.testing.assert_close(product, plain @ block, rtol=1e-9, atol=1e-12)
            single = (operator @ block[:, 1].cuda()).cpu()
            torch.testing.assert_close(single, plain @ block[:, 1], rtol=1e-9, atol=1e-12)
        assert operator.kept_bytes > 0
    assert operator.kept_bytes == 0
    found = fm.lanczos(operator, k=2, tol=1e-6).eigenvalues
    expected = fm.lanczos(plain, k=2, tol=1e-6).eigenvalues
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_captures_need_kept_graphs(objectives):
    with pytest.raises(fm.InvalidArgumentError, match="keep_graph=False"):
        fm.HessianOperator(objectives[1], method="cuda_graph", keep_graph=False)
