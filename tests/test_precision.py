"""Autocast and short types in place of float32: left alone, and named in every result."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flatminima as fm
from flatminima.support.precision import precision_notes, working_eps
from integrity import untouched

CPU = torch.device("cpu")
X = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
Y = torch.randint(4, (12,), generator=torch.Generator().manual_seed(2))


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype)


@contextlib.contextmanager
def matmul_precision(value):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(value)
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def newer(backend, value):
    if not hasattr(backend, "fp32_precision"):
        pytest.skip("this release of PyTorch has no fp32_precision")
    before = backend.fp32_precision
    try:
        backend.fp32_precision = value
        yield
    finally:
        backend.fp32_precision = before


def test_plain_float32_has_no_note():
    assert precision_notes(net(), CPU) == ()
    assert working_eps(net(), CPU) == torch.finfo(torch.float32).eps
    assert working_eps(net(torch.float64), CPU) == torch.finfo(torch.float64).eps
    assert working_eps(net(torch.bfloat16), CPU) == torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_named_with_its_type(dtype):
    with torch.autocast("cpu", dtype=dtype):
        (note,) = precision_notes(net(), CPU)
        assert working_eps(net(), CPU) == torch.finfo(dtype).eps
    assert str(dtype).removeprefix("torch.") in note
    assert "autocast" in note


def test_short_types_of_matrix_products_are_named_where_float32_is():
    with matmul_precision("medium"):
        (note,) = precision_notes(net(), CPU)
        assert note.startswith("float32 matrix products may be computed in bfloat16")
        assert working_eps(net(), CPU) == 2**-7
        assert precision_notes(net(torch.float64), CPU) == ()
        assert precision_notes(nn.Linear(2, 2).to(torch.float16), CPU) == ()


def test_convolutions_and_recurrent_layers_are_named_where_the_model_has_them():
    b = torch.backends.mkldnn
    with contextlib.ExitStack() as stack:
        for operation in ("conv", "rnn"):
            stack.enter_context(newer(getattr(b, operation, b), "bf16"))
        assert precision_notes(net(), CPU) == ()
        (note,) = precision_notes(nn.Conv1d(2, 2, 3), CPU)
        assert note.startswith("float32 convolutions may be computed in bfloat16")
        both = nn.ModuleList([nn.Conv1d(2, 2, 3), nn.GRU(2, 2)])
        (note,) = precision_notes(both, CPU)
        assert note.startswith("float32 convolutions and recurrent layers may be")


def test_tf32_of_a_gpu_is_named_by_what_the_model_has(monkeypatch):
    # The settings can be read without a GPU.
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    convolution = nn.Conv2d(2, 2, 3)
    (note,) = precision_notes(convolution, cuda)
    assert note == "float32 convolutions may be computed in TF32, as PyTorch's settings allow."
    assert working_eps(convolution, cuda) == 2**-10
    assert precision_notes(convolution.double(), cuda) == ()
    assert precision_notes(net(), cuda) == ()
    with matmul_precision("high"):
        (note,) = precision_notes(nn.ModuleList([net(), nn.Conv2d(2, 2, 3), nn.LSTM(2, 2)]), cuda)
        assert note.startswith("float32 matrix products, convolutions and recurrent layers may")
        assert precision_notes(net(), cuda)[0].startswith("float32 matrix products may be")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert precision_notes(net(), cuda) == ()


def test_the_newer_setting_can_be_read_where_the_older_cannot():
    # PyTorch refuses to tell the older one where the two contradict each other.
    with newer(torch.backends.cuda.matmul, "tf32"), pytest.raises(RuntimeError):
        torch.get_float32_matmul_precision()
    with newer(torch.backends.cuda.matmul, "tf32"):
        assert precision_notes(net(), CPU) == ()


MEASURES = {
    "report": lambda o: fm.sharpness(
        o.model, F.cross_entropy, (X, Y), measures=["gradient_norm"], progress=False
    ),
    "epsilon_sharpness": lambda o: fm.epsilon_sharpness(o, iterations=1),
    "random_sharpness": lambda o: fm.random_sharpness(o, samples=1),
    "interpolate": lambda o: fm.interpolate(o, o.model, torch.zeros(o.size), alphas=[0.5]),
    "layerwise": lambda o: fm.layerwise(o, trace_products=2, tol=0.3),
    "lanczos": lambda o: fm.lanczos(fm.HessianOperator(o), tol=0.3),
    "power_iteration": lambda o: fm.power_iteration(fm.HessianOperator(o), tol=0.3),
    "trace": lambda o: fm.trace(fm.HessianOperator(o), products=2),
    "diagonal": lambda o: fm.diagonal(fm.HessianOperator(o), products=2),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_every_result_names_what_it_was_computed_in(measure):
    objective = fm.Objective(net(), F.cross_entropy, (X, Y))
    plain = MEASURES[measure](objective)
    assert "float" not in repr(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16), untouched(objective.model):
        result = MEASURES[measure](objective)
    assert result.notes[-1] == "Computed under autocast, much of it in bfloat16."
    assert "Note: Computed under autocast" in repr(result)
    assert type(result).from_json(result.to_json()) == result
    with matmul_precision("medium"), untouched(objective.model):
        assert "bfloat16" in repr(MEASURES[measure](objective))
