"""Several points to a reading of the data: the numbers of one after the other, and the counts."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flatminima as fm
from flatminima.objective import points as states
from integrity import bits, untouched

N = 20
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(1))
Y = torch.randint(4, (N,), generator=torch.Generator().manual_seed(2))
CACHES = pytest.mark.parametrize("cache", [True, False])


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 4))


def objective_of(model=None, loss_fn=F.cross_entropy, **options):
    loader = DataLoader(TensorDataset(X, Y), batch_size=6, shuffle=True)
    return fm.Objective(model or net(), loss_fn, loader, progress=False, **options)


def shifts(objective, count):
    generator = torch.Generator().manual_seed(3)
    return 0.1 * torch.randn(count, objective.size, generator=generator)


@CACHES
@pytest.mark.parametrize(
    ("mode", "microbatch"), [("eval", None), ("train", None), ("keep", None), ("eval", 4)]
)
def test_the_losses_are_those_of_each_displacement(cache, mode, microbatch):
    objective = objective_of(cache=cache, mode=mode, microbatch=microbatch)
    rows = shifts(objective, 5)
    with untouched(objective.model, rows, X, Y):
        found = objective.losses_at(rows)
        assert objective.losses_at(iter(rows)) == found
    assert found == [objective.loss_at(row) for row in rows]
    assert len(set(found)) == 5


@CACHES
def test_no_displacement_has_no_loss(cache):
    objective = objective_of(cache=cache)
    before = objective.batches.readings
    assert objective.losses_at([]) == []
    assert objective.batches.readings == before


def test_one_reading_serves_as_many_points_as_the_budget_holds(monkeypatch):
    objective = objective_of(cache=False)
    rows = shifts(objective, 7)
    readings = []
    for points in (7, 3, 1):
        size = 2 * points * objective.size * 4
        monkeypatch.setattr(states, "HELD_BYTES", size)
        monkeypatch.setattr(states, "VECTORS", 0)
        before = objective.batches.readings
        assert objective.losses_at(rows) == [objective_of().loss_at(row) for row in rows]
        readings.append(objective.batches.readings - before)
    assert readings == [1, 3, 7]


@pytest.mark.parametrize("held", [1, 3])
def test_points_are_taken_as_they_are_needed_and_not_held_on_to(monkeypatch, held):
    objective = objective_of(cache=held == 1)
    monkeypatch.setattr(states, "HELD_BYTES", 2 * held * objective.size * 4)
    monkeypatch.setattr(states, "VECTORS", 0)
    living = weakref.WeakSet()
    most = 0

    def points():
        nonlocal most
        for row in shifts(objective, 12):
            state = {
                name: p.detach() + piece
                for (name, p), piece in zip(
                    objective.parameters.items(), objective.layout.unflatten(row), strict=True
                )
            }
            living.add(state["0.weight"])
            most = max(most, len(living))
            yield state
            del state

    assert len(list(objective.evaluate_states(points()))) == 12
    assert most == held


@CACHES
def test_a_state_may_name_some_tensors_alone_buffers_among_them(cache):
    objective = objective_of(cache=cache)
    some = [
        {},
        {"3.bias": torch.arange(4.0)},
        {"1.running_mean": torch.ones(6)},
        {"0.weight": torch.zeros(6, 3), "1.running_var": torch.full((6,), 4.0)},
    ]
    found = [loss for loss, _ in objective.evaluate_states(some, {"accuracy": fm.accuracy})]
    for state, loss in zip(some, found, strict=True):
        twin = net()
        twin.load_state_dict(twin.state_dict() | state)
        assert loss == objective_of(twin).loss()
    assert len(set(found)) == 4


@CACHES
def test_metrics_are_those_of_each_state(cache):
    objective = objective_of(cache=cache)
    generator = torch.Generator().manual_seed(5)
    many = [{"3.weight": torch.randn(4, 6, generator=generator)} for _ in range(4)]
    for state, (_, values) in zip(
        many, objective.evaluate_states(many, {"accuracy": fm.accuracy}), strict=True
    ):
        twin = net().eval()
        twin.load_state_dict(twin.state_dict() | state)
        assert values["accuracy"] == pytest.approx(float((twin(X).argmax(1) == Y).double().mean()))


@CACHES
def test_a_model_that_writes_to_its_parameters_and_buffers_shows_each_point_afresh(cache):
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(3, 4))
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            out = x @ self.weight + self.count
            with torch.no_grad():
                self.weight.mul_(2)
                self.count += 1
            return out

    objective = objective_of(Writing(), cache=cache)
    rows = shifts(objective, 4)
    with untouched(objective.model):
        first = objective.losses_at(rows)
        assert objective.losses_at(rows) == first
    assert first == [objective_of(Writing()).loss_at(row) for row in rows]


@CACHES
def test_losses_that_are_not_finite_are_returned_as_such(cache):
    model = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(model.weight)
    objective = objective_of(model, lambda out, y: out.sum() * 0 + model_sum(model), cache=cache)
    rows = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0], [0, 0, 0]])
    found = objective.losses_at(rows)
    assert found[0] == 1.0
    assert math.isnan(found[1])
    assert found[2] == 0.0


def model_sum(model):
    return model.weight.sum().sqrt()


@CACHES
def test_a_bad_displacement_is_refused(cache):
    objective = objective_of(cache=cache)
    good = torch.zeros(objective.size)
    bad = good.clone()
    bad[7] = math.nan
    with pytest.raises(fm.NonFiniteError, match=r"losses_at .* NaN or infinity at index 7"):
        objective.losses_at([good, bad])
    with pytest.raises(fm.ShapeError, match="losses_at takes shape"):
        objective.losses_at([good[1:]])
    with pytest.raises(fm.ArgumentTypeError, match="losses_at takes a tensor"):
        objective.losses_at(["a"])


@CACHES
def test_an_error_in_a_batch_says_where_and_leaves_all_as_it_was(cache):
    class TroubleError(Exception):
        pass

    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            if len(x) < 6 and self.net[3].bias[0] > 100:
                raise TroubleError
            return self.net(x)

    objective = objective_of(Failing(), cache=cache)
    many = [{}, {"net.3.bias": torch.full((4,), 200.0)}]
    with untouched(objective.model, X, Y), pytest.raises(TroubleError) as caught:
        list(objective.evaluate_states(many))
    if hasattr(caught.value, "__notes__"):
        assert "batch 3" in caught.value.__notes__[0]


def test_large_finite_vectors_are_not_taken_for_infinite_ones():
    objective = objective_of()
    shift = torch.full((objective.size,), 3e38)
    assert not math.isfinite(float(shift.sum()))
    objective.loss_at(shift)


# ---------------------------------------------------------------------------- counts of readings


MEASURES = {
    "epsilon_sharpness": lambda o: fm.epsilon_sharpness(o, iterations=2),
    "random_sharpness": lambda o: fm.random_sharpness(o, samples=2),
    "interpolate": lambda o: fm.interpolate(
        o, o.model, torch.zeros(o.size), alphas=[0, 0.5, 1], metrics={"accuracy": fm.accuracy}
    ),
    "layerwise": lambda o: fm.layerwise(o, trace_products=3, tol=0.1),
    "lanczos": lambda o: fm.lanczos(fm.HessianOperator(o)),
    "power_iteration": lambda o: fm.power_iteration(fm.HessianOperator(o), tol=0.1),
    "trace": lambda o: fm.trace(fm.HessianOperator(o), products=3),
    "diagonal": lambda o: fm.diagonal(fm.HessianOperator(o), products=3),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_a_result_says_how_often_the_data_were_read(measure):
    kept, anew = objective_of(cache=True), objective_of(cache=False)
    result = MEASURES[measure](kept)
    assert result.readings == 0
    assert "were read" not in repr(result)
    read = 0
    original = anew.batches._raw_batches

    def counted():
        nonlocal read
        read += 1
        return original()

    anew.batches._raw_batches = counted
    again = MEASURES[measure](anew)
    assert again.readings == read > 0
    assert f"The data were read {'once' if read == 1 else f'{read} times'}, since" in repr(again)
    assert type(again).from_json(again.to_json()) == again
    fields = again.to_dict()
    fields["readings"] = 0
    assert type(again).from_dict(fields) == result, "the same numbers"


def test_interpolation_counts_the_readings_of_all_its_data_once():
    first, second = objective_of(cache=False), objective_of(cache=False)
    start, end = first.model, torch.zeros(first.size)
    also = {"test": second, "same": first}
    line = fm.interpolate(first, start, end, alphas=[0, 1], also=also)
    assert line.readings == 3
    assert line.evaluations == 6
    assert line.curves["test"] == line.curves["same"] == line.curves["train"]


@CACHES
def test_a_report_counts_the_readings_after_the_first(cache):
    loader = DataLoader(TensorDataset(X, Y), batch_size=6)
    report = fm.sharpness(net(), F.cross_entropy, loader, measures="random_sharpness", cache=cache)
    assert report.readings == (0 if cache else 3), "the loss, and the measure's two"
    assert ("The data were read 3 times" in repr(report)) is not cache
    assert fm.SharpnessReport.from_json(report.to_json()) == report


def test_operators_of_other_things_read_no_data():
    operator = fm.MatrixOperator(torch.eye(3))
    assert (operator.readings, operator.notes) == (0, ())
    assert bits(fm.trace(operator, products=2).readings) == 0


@pytest.mark.parametrize(
    ("state", "error", "said"),
    [
        ({"module.0.weight": torch.zeros(1)}, fm.StateMismatchError, "wrapper's prefix"),
        ({"0.weight": torch.zeros(3, 2)}, fm.StateMismatchError, "the model has"),
        ({"0.weight": [1.0]}, fm.ArgumentTypeError, "torch.as_tensor"),
        (3, fm.ArgumentTypeError, "takes state dicts"),
    ],
)
def test_states_that_do_not_fit_are_refused(state, error, said):
    model = torch.nn.Sequential(torch.nn.Linear(2, 1))
    objective = fm.Objective(model, torch.nn.MSELoss(), (torch.ones(3, 2), torch.ones(3, 1)))
    with pytest.raises(error, match=said):
        objective.evaluate_state(state)
    with pytest.raises(fm.ArgumentTypeError, match="several state dicts"):
        next(objective.evaluate_states({"0.weight": torch.zeros(1, 2)}))
