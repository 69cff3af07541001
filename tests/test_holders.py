"""What models hold beside tensors: it is left alone, and noticed when it changes."""

from __future__ import annotations

import collections
import dataclasses
import math
import weakref

import pytest
import torch
from torch import nn

import flatminima as fm
from flatminima.support.trees import members, walk

X = torch.arange(12.0, dtype=torch.float64).view(4, 3) / 10
Y = torch.ones(4, 1, dtype=torch.float64)


@dataclasses.dataclass
class Settings:
    declared: float = 1.0
    late: float = dataclasses.field(init=False)

    def __post_init__(self):
        self.scale = 1.0
        self.seen = []


class Key:
    pass


class Holder(nn.Module):
    def __init__(self, held, touch=None):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(3, 1).double()
        self.held, self.touch = held, touch

    def forward(self, x):
        scale = getattr(self.held, "scale", 1.0)
        out = self.inner(x) * scale
        if self.touch is not None:
            self.touch(self.held, out)
        return out


def objective(held, touch=None, **options):
    return fm.Objective(Holder(held, touch), nn.MSELoss(), (X, Y), batch_size=2, **options)


@pytest.mark.parametrize("held", [nn, nn.functional, torch, math, torch.ops.aten, Key, print])
def test_code_is_not_followed(held):
    assert members(held) is None
    assert math.isfinite(objective(held).loss())


def test_each_object_is_met_once():
    shared = {"a": [1.0, torch.ones(1)]}
    met = list(walk([[shared], [shared], shared]))
    assert sum(v is shared for v in met) == 1


def test_an_attribute_that_is_no_field_makes_graphs_be_rebuilt():
    held = Settings()
    hessian = fm.HessianOperator(objective(held))
    vector = torch.ones(4, dtype=torch.float64)
    before = hessian @ vector
    with hessian.session():
        for _ in range(3):
            hessian @ vector
        held.scale = 3.0
        assert torch.allclose(hessian @ vector, 9 * before)


def put(key):
    return lambda held, out: held.__setitem__(key, out)


KEY = Key()
HELD = {
    "dataclass": (Settings, lambda held, out: held.seen.append(out), lambda h: h.seen),
    "UserDict": (collections.UserDict, put("a"), lambda h: h.data),
    "ChainMap": (collections.ChainMap, put("a"), lambda h: h.maps[0]),
    "weak keys": (weakref.WeakKeyDictionary, put(KEY), lambda h: dict(h)),
}


@pytest.mark.parametrize("name", HELD)
def test_what_a_forward_puts_into_an_object_is_taken_out(name):
    make, touch, content = HELD[name]
    held = make()
    study = objective(held, touch)
    first = study.loss()
    study.gradient()
    assert not content(held)
    assert study.loss() == first


def test_a_mapping_that_loads_lazily_is_not_asked():
    class Lazy(collections.abc.Mapping):
        def __getitem__(self, key):
            raise RuntimeError("missing")

        def __iter__(self):
            return iter(["a"])

        def __len__(self):
            return 1

    assert math.isfinite(objective(Lazy()).loss())


def test_a_nested_evaluation_does_not_disturb_smaller_pieces():
    inner = objective(None)
    study = None

    def loss_fn(output, target):
        inner.loss()
        if study is not None and len(target) == 2 and not loss_fn.failed:
            loss_fn.failed = True
            study.loss()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return nn.functional.mse_loss(output, target)

    loss_fn.failed = True
    model = Holder(None)
    expected = fm.Objective(model, nn.MSELoss(), (X, Y)).gradient()
    study = fm.Objective(
        model, loss_fn, (X, Y), batch_size=2, microbatch="auto", weight=lambda batch: len(batch[1])
    )
    study.loss()
    loss_fn.failed = False
    assert torch.allclose(study.gradient(), expected)
