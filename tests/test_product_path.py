"""From `operator @ v` to `autograd.grad` a product passes through few hands."""

from __future__ import annotations

import contextlib
import traceback
from pathlib import Path

import pytest
import torch
from torch import nn

import flatminima as fm

PACKAGE = Path(fm.__file__).parent
FRAMES, FILES = 10, 4


def objective() -> fm.Objective:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    data = torch.randn(8, 3, generator=generator), torch.randint(2, (8,), generator=generator)
    return fm.Objective(model, nn.CrossEntropyLoss(), data, batch_size=4)


@pytest.mark.parametrize("kind", [fm.HessianOperator, fm.GaussNewtonOperator, fm.FisherOperator])
@pytest.mark.parametrize("kept", [False, True])
def test_a_product_passes_through_few_frames_and_files(kind, kept, monkeypatch):
    operator = kind(objective())
    vector = torch.ones(operator.shape[0])
    grad = torch.autograd.grad
    stacks: list[list[str]] = []

    def watched(*args, **kwargs):
        names = [Path(frame.filename) for frame in traceback.extract_stack()]
        own = [n.relative_to(PACKAGE).as_posix() for n in names if PACKAGE in n.parents]
        stacks.append(own)
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    first = operator @ vector
    with operator.session() if kept else contextlib.nullcontext():
        for _ in range(3):
            assert torch.allclose(operator @ vector, first)
    # A graph of the gradient and a product for each of two batches, kept or not.
    assert len(stacks) >= 4 * 2
    assert max(map(len, stacks)) <= FRAMES, max(stacks, key=len)
    assert max(len(set(s)) for s in stacks) <= FILES
