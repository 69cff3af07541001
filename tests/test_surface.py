"""Surfaces: the model on the grid, values by hand, files to go on from, bad grids."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flatminima as fm
from integrity import untouched
from zoo import matrix_with_spectrum, quadratic_case

DOUBLE = torch.float64


def draws(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=DOUBLE)


def bowl():
    matrix = matrix_with_spectrum([4.0, 1.0, 0.5, -0.25], 0)
    start = draws(1, 4)
    return matrix, start, quadratic_case(matrix, draws(2, 4), start).objective()


def net_objective(count=20, **options):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for number, p in enumerate(net.parameters()):
            p.copy_(draws(number, *p.shape))
    x, y = draws(9, count, 3), torch.arange(count) % 3
    return net, x, y, fm.Objective(net.eval(), nn.CrossEntropyLoss(), (x, y), **options)


# ------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_every_point_is_the_loss_there(dimensions):
    matrix, start, objective = bowl()
    directions = draws(5, 4, dimensions)
    points = (5, 3, 7)[:dimensions]
    result = fm.surface(objective, directions, extent=0.5, points=points)
    assert result.loss.shape == points
    linear = draws(2, 4)
    for place in itertools.product(*(range(p) for p in points)):
        amounts = [result.coordinates[i][k] for i, k in enumerate(place)]
        theta = start + directions @ torch.tensor(amounts, dtype=DOUBLE)
        expected = float(0.5 * theta @ matrix @ theta + linear @ theta)
        assert float(result.loss[place]) == pytest.approx(expected, rel=1e-12, abs=1e-13)


@pytest.mark.parametrize(
    ("extent", "points"), [(1.0, 5), (0.3, 51), ((-0.5, 1.5), 9), ((-1.0, 2.0), 25), (1e-3, 3)]
)
def test_the_model_is_on_the_grid_to_the_last_bit(extent, points):
    _, _, _, objective = net_objective()
    result = fm.surface(objective, draws(3, objective.size, 2), extent=extent, points=points)
    assert float(result.loss[result.center]) == objective.loss()
    low, high = extent if isinstance(extent, tuple) else (-extent, extent)
    for values in result.coordinates:
        assert (values[0], values[-1], len(values)) == (low, high, points)
        steps = np.diff(values)
        np.testing.assert_allclose(steps, steps[0], rtol=1e-9)


@pytest.mark.parametrize("extent", [(-0.62, 12.1), (-3.0, 0.2), (-1e-3, 5.0)])
def test_the_model_is_on_grids_whose_ends_do_not_fit(extent):
    _, _, objective = bowl()
    (values,) = fm.surface(objective, draws(1, 4), extent=extent, points=12).coordinates
    step = np.diff(values)
    np.testing.assert_allclose(step, step[0], rtol=1e-9)
    assert 0.0 in values
    assert values[0] <= extent[0] + 1e-12
    assert values[-1] >= extent[1] - 1e-12
    assert min(abs(values[0] - extent[0]), abs(values[-1] - extent[1])) < 1e-9


def test_axes_may_differ():
    _, _, objective = bowl()
    result = fm.surface(
        objective, [draws(1, 4), draws(2, 4)], extent=[0.5, (-1.0, 3.0)], points=[3, 5]
    )
    assert result.coordinates == ((-0.5, 0.0, 0.5), (-1.0, 0.0, 1.0, 2.0, 3.0))
    assert result.center == (1, 1)


def test_metrics_and_other_data_are_evaluated_at_the_same_points():
    net, x, y, objective = net_objective(batch_size=7)
    test = fm.Objective(net, nn.CrossEntropyLoss(), (x + 1, y))
    directions = fm.random_directions(objective, count=2, seed=3)
    result = fm.surface(
        objective, directions, points=3, metrics={"accuracy": fm.accuracy}, also={"test": test}
    )
    assert list(result.grids) == ["train", "test"]
    shift = directions.vectors @ torch.tensor([1.0, -1.0], dtype=DOUBLE)
    assert float(result.grids["test"].loss[2, 0]) == pytest.approx(test.loss_at(shift), rel=1e-10)
    with torch.no_grad():
        hits = float((net(x).argmax(1) == y).double().mean())
    assert float(result.metrics["accuracy"][1, 1]) == pytest.approx(hits)
    assert result.evaluations == 18
    assert (result.labels, result.units) == (directions.labels, directions.units)


def test_data_read_anew_serve_several_points():
    net, x, y, _ = net_objective()
    loader = DataLoader(TensorDataset(x, y), batch_size=6, shuffle=True)
    anew = fm.Objective(net, nn.CrossEntropyLoss(), loader, cache=False)
    kept = fm.Objective(net, nn.CrossEntropyLoss(), loader, cache=True)
    directions = draws(4, anew.size, 2)
    one = fm.surface(anew, directions, points=5)
    two = fm.surface(kept, directions, points=5)
    torch.testing.assert_close(one.loss, two.loss, rtol=1e-12, atol=0)
    assert 1 <= one.readings <= 3
    assert two.readings == 0


def test_what_is_not_finite_is_kept():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([0.5, 1.0], dtype=DOUBLE))

        def forward(self, inputs):
            return self.theta[0].sqrt() + 1 / self.theta[1].clamp(min=0)

    objective = fm.Objective(Root(), data=[torch.zeros(1)], batch_loss=lambda m, b: m(b))
    result = fm.surface(objective, torch.eye(2, dtype=DOUBLE), extent=1.0, points=3)
    assert result.outcome is fm.Outcome.NON_FINITE_POINTS
    assert result.loss[0].isnan().all()
    assert math.isinf(result.loss[1, 0])
    assert fm.Surface.from_json(result.to_json()) == result
    assert "not finite" in str(result)


# ----------------------------------------------------------------------------------- going on


def interrupted(objective, after):
    """The objective's own evaluation, stopped by Ctrl-C after some points."""
    evaluate = objective.evaluate_states

    def stopping(states, metrics):
        for number, found in enumerate(evaluate(states, metrics)):
            if number == after:
                raise KeyboardInterrupt
            yield found

    objective.evaluate_states = stopping


def test_a_file_goes_on_where_it_was(tmp_path):
    net, x, y, objective = net_objective()
    test = fm.Objective(net, nn.CrossEntropyLoss(), (x + 1, y))
    options = {"points": 5, "also": {"test": test}, "metrics": {"accuracy": fm.accuracy}}
    directions = draws(3, objective.size, 2)
    whole = fm.surface(objective, directions, **options)
    path = tmp_path / "folder" / "surface.npz"
    interrupted(test, after=10)
    with pytest.raises(KeyboardInterrupt):
        fm.surface(objective, directions, resume=path, **options)
    assert path.exists()
    del test.evaluate_states
    calls = []
    evaluate = objective.evaluate_states
    objective.evaluate_states = lambda states, metrics: evaluate(
        (calls.append(1) or state for state in states), metrics
    )
    rest = fm.surface(objective, directions, resume=path, **options)
    assert dataclasses.replace(rest, evaluations=50) == whole
    assert rest.evaluations == 15
    # The training data were done: these are the two points that tell one evaluation from another.
    assert calls == [1, 1]
    again = fm.surface(objective, directions, resume=str(path), **options)
    assert dataclasses.replace(again, evaluations=50) == whole
    assert again.evaluations == 0
    assert [p.name for p in path.parent.iterdir()] == ["surface.npz"]


def test_a_file_of_something_else_says_what_differs(tmp_path):
    net, x, y, objective = net_objective()
    directions = draws(3, objective.size, 2)
    path = tmp_path / "surface.npz"
    fm.surface(objective, directions, points=3, resume=path)
    before = path.read_bytes()
    with pytest.raises(fm.InvalidArgumentError, match="differs: the grid"):
        fm.surface(objective, directions, points=5, resume=path)
    with pytest.raises(fm.InvalidArgumentError, match="differs: the directions"):
        fm.surface(objective, 2 * directions, points=3, resume=path)
    with pytest.raises(fm.InvalidArgumentError, match="differs: the metrics"):
        fm.surface(objective, directions, points=3, resume=path, metrics={"accuracy": fm.accuracy})
    with pytest.raises(fm.InvalidArgumentError, match="differs: the data sets"):
        fm.surface(objective, directions, points=3, resume=path, also={"test": objective})
    other = fm.Objective(net, nn.CrossEntropyLoss(), (x + 1, y))
    with pytest.raises(fm.InvalidArgumentError, match="differs: the loss at the model"):
        fm.surface(other, directions, points=3, resume=path)
    with torch.no_grad():
        net[0].weight += 0.1
    with pytest.raises(fm.InvalidArgumentError, match="differs: the model's parameters"):
        fm.surface(objective, directions, points=3, resume=path)
    assert path.read_bytes() == before
    path.write_bytes(b"not a file of ours")
    with pytest.raises(fm.InvalidArgumentError, match="cannot be read"):
        fm.surface(objective, directions, points=3, resume=path)
    np.savez(path, version=np.array(1))
    with pytest.raises(fm.InvalidArgumentError, match="cannot be read"):
        fm.surface(objective, directions, points=3, resume=path)
    with pytest.raises(fm.ArgumentTypeError, match="path of a file"):
        fm.surface(objective, directions, points=3, resume=3)


def test_a_file_of_other_metrics_data_or_buffers_is_refused(tmp_path):
    net, x, y, objective = net_objective()
    directions, path = draws(3, objective.size, 2), tmp_path / "surface.npz"
    options = {"points": 3, "resume": path}
    fm.surface(objective, directions, metrics={"m": fm.accuracy}, **options)
    with pytest.raises(fm.InvalidArgumentError, match=r"differs: .*in a corner"):
        fm.surface(objective, directions, metrics={"m": lambda o, t: o.mean()}, **options)
    path.unlink()
    flat = nn.Linear(3, 3).double()
    with torch.no_grad():
        for p in flat.parameters():
            p.zero_()
    first, second = (fm.Objective(flat, nn.CrossEntropyLoss(), d) for d in ((x, y), (x + 1, y)))
    assert first.loss() == second.loss()
    fm.surface(first, draws(3, first.size), **options)
    with pytest.raises(fm.InvalidArgumentError, match="differs: the loss or metrics in a corner"):
        fm.surface(second, draws(3, first.size), **options)
    path.unlink()
    fm.surface(objective, directions, **options)
    net[1].running_mean += 1e-9
    with pytest.raises(fm.InvalidArgumentError, match="differs: the model's buffers"):
        fm.surface(objective, directions, **options)


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path):
    _, _, _, objective = net_objective()
    (tmp_path / "file").write_text("")
    with pytest.raises(fm.InvalidArgumentError, match="cannot be made"):
        fm.surface(objective, draws(3, objective.size), resume=tmp_path / "file" / "s.npz")


def test_a_loss_that_is_not_finite_at_the_model_raises():
    net, x, y, _ = net_objective()
    objective = fm.Objective(net, lambda o, t: o.mean() * math.nan, (x, y))
    with pytest.raises(fm.NonFiniteError, match="batch 0"):
        fm.surface(objective, draws(3, objective.size), points=3)


def test_further_models_have_all_tensors_of_the_first():
    net, x, y, objective = net_objective(params="3.*")
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[0].weight += 1
        other[1].running_mean += 1
    also = {"test": fm.Objective(other, nn.CrossEntropyLoss(), (x, y))}
    result = fm.surface(objective, draws(3, objective.size), points=3, also=also)
    assert torch.equal(result.grids["test"].loss, result.loss)


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"extent": 0}, fm.InvalidArgumentError, "'extent' argument of surface"),
        ({"extent": -1.0}, fm.InvalidArgumentError, "'extent' argument of surface"),
        ({"extent": (0.0, 1.0)}, fm.InvalidArgumentError, "0, the model, between"),
        ({"extent": [1.0]}, fm.InvalidArgumentError, "a list of 2; got 1"),
        ({"extent": "wide"}, fm.ArgumentTypeError, "'extent' argument of surface"),
        ({"points": 4}, fm.InvalidArgumentError, "not on the grid of surface; take points=5"),
        ({"points": 1}, fm.InvalidArgumentError, "'points' argument"),
        ({"points": 2.5}, fm.ArgumentTypeError, "'points' argument"),
        ({"metrics": ["accuracy"]}, fm.ArgumentTypeError, "'metrics' argument of surface"),
        ({"also": {"train": None}}, fm.ArgumentTypeError, "also"),
    ],
)
def test_bad_grids_are_refused(options, error, message):
    _, _, objective = bowl()
    with pytest.raises(error, match=message):
        fm.surface(objective, draws(1, 4, 2), **options)


@pytest.mark.parametrize(
    ("directions", "error"),
    [
        (torch.ones(3, 2), fm.ShapeError),
        (torch.zeros(4), fm.InvalidArgumentError),
        (torch.ones(4, 2), fm.InvalidArgumentError),
        (torch.full((4,), math.nan), fm.NonFiniteError),
        ("random", fm.ArgumentTypeError),
        ([], fm.ShapeError),
    ],
)
def test_bad_directions_are_refused(directions, error):
    _, _, objective = bowl()
    with pytest.raises(error):
        fm.surface(objective, directions)


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_left_as_it_was(fails, tmp_path):
    net, x, y, _ = net_objective()
    net.train()
    calls = [0]

    def criterion(output, target):
        calls[0] += 1
        if fails and calls[0] == 9:
            raise RuntimeError("lost")
        return nn.functional.cross_entropy(output, target)

    with untouched(net, x, y):
        objective = fm.Objective(net, criterion, (x, y), batch_size=8)
        directions = fm.random_directions(objective, seed=1)
        if fails:
            with pytest.raises(RuntimeError, match="lost"):
                fm.surface(objective, directions, points=3, resume=tmp_path / "s.npz")
        else:
            fm.surface(objective, directions, points=3)
