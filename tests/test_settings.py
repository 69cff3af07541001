"""What a loss depends on beside parameters, buffers and data is told apart when it changes."""

import collections

import numpy as np
import pytest
import torch
from torch import nn

from flatminima.operators.products.fingerprint import (
    LONG,
    described,
    settings,
    tensor_identity,
    tensor_marks,
)


class Plain:
    def __init__(self, x, name):
        self.x, self.name = x, name


def shape(tensor):
    return tuple(tensor.shape)


def test_values_are_equal_where_all_but_the_tensors_is():
    a, b, c, d = torch.zeros(2), torch.ones(3), torch.ones(2), torch.zeros(3)
    first, known = described({"x": [a, 1.0], "y": Plain(b, "one")}, shape)
    assert [id(k) for k in known] == [id(a), id(b)]
    assert first == described({"x": [c, 1.0], "y": Plain(d, "one")}, shape)[0]
    hash(first)
    for other in (
        {"x": [c, 2.0], "y": Plain(d, "one")},
        {"x": [c, 1.0], "y": Plain(d, "two")},
        {"x": (c, 1.0), "y": Plain(d, "one")},
        {"x": [c, 1], "y": Plain(d, "one")},
        {"x": [d, 1.0], "y": Plain(c, "one")},
        {"z": [c, 1.0], "y": Plain(d, "one")},
    ):
        assert first != described(other, shape)[0]


@pytest.mark.parametrize(
    ("value", "other"),
    [
        ({1, 2}, {1, 3}),
        (collections.deque([1, 2]), collections.deque([2, 1])),
        (collections.UserDict(x=1), collections.UserDict(x=2)),
        (np.zeros(3), np.ones(3)),
        (float("nan"), 0.0),
        (len, max),
    ],
    ids=["set", "deque", "mapping", "array", "nan", "function"],
)
def test_values_of_many_kinds(value, other):
    assert described([value], shape)[0] == described([value], shape)[0]
    assert described([value], shape)[0] != described([other], shape)[0]


def test_what_holds_itself_and_what_is_long_comes_to_an_end():
    circle = Plain(None, "round")
    circle.x = [circle]
    assert described(circle, shape)[0] == described(circle, shape)[0]
    long = list(range(LONG))
    assert described(long, shape)[1] == [long]


def test_marks_tell_of_another_tensor_and_of_writes():
    tensor = torch.zeros(3)
    before = tensor_marks([tensor])
    assert tensor_marks([tensor]) == before
    assert tensor_marks([torch.zeros(3)]) != before
    identity = tensor_identity(tensor)
    tensor.add_(1)
    assert tensor_marks([tensor]) != before
    assert tensor_identity(tensor) == identity


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.register_buffer("weight", torch.ones(2))


@pytest.mark.parametrize("name", ["scale", "weight"])
def test_tensors_of_the_loss_function_are_seen(name):
    model, criterion, cpu = nn.Linear(2, 2), Weighted(), torch.device("cpu")

    def now():
        return settings(model, criterion, cpu, lambda t: tensor_marks([t])[0])

    before, known = now()
    assert now()[0] == before
    own = getattr(criterion, name)
    assert any(k is own for k in known)
    with torch.no_grad():
        own.mul_(2)
    written = now()[0]
    assert written != before
    setattr(criterion, name, type(own)(torch.ones(2)))
    assert now()[0] not in (before, written)


def test_hooks_flags_modules_and_autocast_are_seen():
    model, cpu = nn.Sequential(nn.Linear(2, 2), nn.Tanh()), torch.device("cpu")
    found = []

    def take():
        found.append(settings(model, nn.MSELoss, cpu, tensor_identity)[0])

    take()
    model[0].register_forward_hook(lambda *_: None)
    take()
    model[1].eval()
    take()
    model[1] = nn.Sigmoid()
    take()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        take()
    assert len(set(found)) == len(found) == 5
