"""Bézier curves between two minima: closed forms, gradients, seeds, batch norm, refusals."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import flatminima as fm
from flatminima.landscape.connection import Connection, _Bezier, _times, connect
from flatminima.landscape.endpoints import Between
from integrity import untouched
from zoo import build

ENDS = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])


class Point(nn.Module):
    """Parameters alone, as the loss function wants them."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(values, dtype=torch.float64))


def ring(model: Point, batch: torch.Tensor) -> torch.Tensor:
    """A valley along the unit circle."""
    return (model.theta.square().sum() - 1) ** 2 + 0 * batch.sum()


def on_a_ring(loss=ring, batches: int = 1) -> fm.Objective:
    return fm.Objective(Point(0.3, 0.4), data=[torch.zeros(1)] * batches, batch_loss=loss)


def jittered(model: nn.Module, seed: int) -> nn.Module:
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*other.parameters(), *other.buffers()]:
            if tensor.dtype.is_floating_point:
                noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.add_((0.3 * noise).to(tensor.dtype))
    return other


# ------------------------------------------------------------------------------------- the curve


def test_curve_follows_a_bent_valley():
    found = connect(on_a_ring(), *ENDS, steps=200, learning_rate=0.05, points_per_step=2)
    assert found.line_barrier.height == pytest.approx(0.25)
    assert found.line_barrier.alpha == 0.5
    assert found.barrier.height < 1e-3
    assert max(found.curve.loss) < 1e-3
    # The bend of the symmetric curve lies on the diagonal, farther out than the circle.
    assert float(found.bend[0]) == pytest.approx(float(found.bend[1]), abs=0.02)
    assert 1.1 < float(found.bend.norm()) < 1.6
    assert sum(found.history[-50:]) / 50 < 0.01 * sum(found.history[:5]) / 5


def test_curve_is_the_bezier_curve_of_its_bend():
    found = connect(on_a_ring(), *ENDS, steps=30, alphas=[0, 0.3, 0.8, 1])
    start, end = (e.double() for e in ENDS)
    for t, loss in zip(found.alphas, found.curve.loss, strict=True):
        place = (1 - t) ** 2 * start + 2 * t * (1 - t) * found.bend + t**2 * end
        assert loss == pytest.approx(float((place.square().sum() - 1) ** 2), abs=1e-14)
    assert found.curve.path == "bezier"
    assert found.line.path == "linear"
    assert found.curve.loss[0] == found.line.loss[0] == 0.0


def test_a_step_so_small_that_it_rounds_away_leaves_the_bend_halfway():
    found = connect(on_a_ring(), *ENDS, steps=2, learning_rate=1e-300)
    assert torch.equal(found.bend, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert found.curve.loss == pytest.approx(found.line.loss, abs=1e-15)


def test_training_is_that_of_torchs_adam():
    steps, rate = 40, 0.03
    found = connect(on_a_ring(), *ENDS, steps=steps, learning_rate=rate, points_per_step=3, seed=5)
    start, end = (e.double() for e in ENDS)
    bend = ((start + end) / 2).requires_grad_()
    adam = torch.optim.Adam([bend], lr=rate)
    times = _times(steps, 3, torch.Generator().manual_seed(5)).tolist()
    history = []
    for step, row in enumerate(times):
        done = step / steps
        factor = 1.0 if done <= 0.5 else max(0.01, 1 - 0.99 * (done - 0.5) / 0.4)
        adam.param_groups[0]["lr"] = rate * factor
        losses = [
            (((1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t * t * end).square().sum() - 1) ** 2
            for t in row
        ]
        adam.zero_grad()
        mean = sum(losses) / 3
        mean.backward()
        adam.step()
        history.append(float(mean.detach()))
    assert torch.allclose(found.bend, bend.detach(), rtol=1e-9)
    assert found.history == pytest.approx(history, rel=1e-9)
    assert (found.steps, found.gradients) == (steps, 3 * steps)


def test_values_of_t_are_stratified_over_points_and_steps():
    times = _times(50, 4, torch.Generator().manual_seed(0))
    assert times.shape == (50, 4)
    assert torch.equal((times * 4).floor().long(), torch.arange(4).expand(50, 4))
    assert (times * 200).floor().long().reshape(-1).sort().values.tolist() == list(range(200))


# ------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("buffers", ["recompute", "interpolate", "keep"])
@pytest.mark.parametrize("name", ["conv_batch_norm", "partly_frozen", "tied_weights"])
def test_gradient_by_the_bend_is_that_of_the_loss_along_the_curve(name, buffers):
    case = build(name)
    objective = case.objective()
    between = Between.read(
        "connect", {"train": objective}, jittered(case.model, 1), jittered(case.model, 2), buffers
    )
    path = _Bezier(objective, between, recompute=buffers == "recompute")
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(objective.size, generator=generator, dtype=torch.float64)
    value, gradient = path.value_and_gradient(objective, 0.3)
    step = 1e-5
    around = []
    for sign in (1, -1):
        path.bend += sign * step * direction
        around.append(path.value_and_gradient(objective, 0.3)[0])
        path.bend -= sign * step * direction
    slope = (around[0] - around[1]) / (2 * step)
    assert float(gradient @ direction) == pytest.approx(slope, rel=1e-5, abs=1e-8)
    if buffers != "recompute":
        assert value == pytest.approx(objective.evaluate_state(path.at(0.3))[0], rel=1e-12)
    else:
        trained = case.objective(mode="train")
        buffers_apart = {n: t for n, t in path.at(0.3).items() if "running" not in n}
        assert value == pytest.approx(trained.evaluate_state(buffers_apart)[0], rel=1e-12)


def trained_norms(seed: int, x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    model = nn.Sequential(
        nn.Linear(2, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (model[0].weight, model[3].weight, model[3].bias):
            p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def norms() -> tuple[nn.Module, nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 2, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long()
    batches = list(zip(x.split(24), y.split(24), strict=True))
    return trained_norms(1, x, y), trained_norms(2, x, y), batches


@pytest.mark.parametrize("start_as", [nn.Module, dict])
def test_trained_nets_are_connected_with_a_lower_loss_than_on_the_line(norms, start_as):
    one, two, batches = norms
    objective = fm.Objective(one, nn.CrossEntropyLoss(), batches)
    start = one if start_as is nn.Module else one.state_dict()
    with untouched(one, two, batches):
        found = connect(
            *(objective, start, two),
            steps=150,
            learning_rate=0.05,
            batches_per_step=2,
            metrics={"accuracy": fm.accuracy},
        )
    assert found.line_barrier.height > 0.05
    assert found.barrier.height < 0.5 * found.line_barrier.height
    assert sum(found.curve.loss) < sum(found.line.loss)
    assert found.curve.metrics["accuracy"][0] == found.line.metrics["accuracy"][0]
    assert found.gradients == 150
    assert any("recomputed" in note for note in found.notes)
    assert found.curve.barrier(metric="accuracy").height >= 0


# --------------------------------------------------------------------- repetition, side effects


@pytest.mark.parametrize("buffers", ["recompute", "interpolate", "keep"])
@pytest.mark.parametrize("mode", ["eval", "train", "keep"])
def test_same_seed_is_the_same_and_everything_is_untouched(mode, buffers):
    case = build("mlp_batch_norm_dropout", torch.float32)
    case.model.train()
    start, end = jittered(case.model, 1), jittered(case.model, 2)
    objective = case.objective(mode=mode)
    options = {"steps": 4, "points_per_step": 2, "alphas": [0, 0.5, 1], "buffers": buffers}
    with untouched(case.model, start, end, case.batches):
        first = connect(objective, start, end, **options)
        again = connect(objective, start, end, seed=torch.Generator().manual_seed(0), **options)
        other = connect(objective, start, end, seed=1, **options)
    assert first == again
    assert first != other
    assert first.bend.dtype == torch.float32


def test_vectors_and_modules_are_the_same():
    case = build("class_weighted")
    start, end = jittered(case.model, 1), jittered(case.model, 2)
    vectors = [case.objective().layout.flatten(list(m.parameters())) for m in (start, end)]
    found = connect(case.objective(), start, end, steps=5)
    assert found == connect(case.objective(), *vectors, steps=5)


def test_data_read_anew_give_the_same():
    case = build("class_weighted")
    start, end = jittered(case.model, 1), jittered(case.model, 2)
    found = [
        connect(case.objective(cache=cache), start, end, steps=5, alphas=[0, 0.5, 1])
        for cache in (True, False)
    ]
    assert torch.equal(found[0].bend, found[1].bend)
    assert found[0].curve.loss == found[1].curve.loss
    assert (found[0].readings, found[1].readings >= 7) == (0, True)


def test_batches_are_taken_in_turn():
    seen = []

    def watching(model, batch):
        seen.append(int(batch[0]))
        return model.theta.square().sum() + 0 * batch.sum()

    data = [torch.full((1,), float(i)) for i in range(4)]
    objective = fm.Objective(Point(1.0), data=data, batch_loss=watching)
    start, end = torch.zeros(1), torch.ones(1)
    objective.value_and_gradient()
    seen.clear()
    connect(objective, start, end, steps=6, batches_per_step=2, alphas=[0, 1])
    drawn = seen[8:-8]
    assert len(drawn) == 12
    assert [sorted(drawn[i : i + 4]) for i in (0, 4, 8)] == [[0, 1, 2, 3]] * 3
    assert drawn[:4] != drawn[4:8] or drawn[4:8] != drawn[8:]


def test_model_is_untouched_when_the_loss_raises_in_the_training():
    case = build("mlp_batch_norm_dropout", torch.float32)
    calls = []

    def failing(output, target):
        calls.append(0)
        if len(calls) > 60:
            raise RuntimeError("in the middle")
        return nn.functional.cross_entropy(output, target)

    objective = fm.Objective(case.model, failing, case.batches)
    end = jittered(case.model, 1)
    with untouched(case.model, end), pytest.raises(RuntimeError, match="in the middle"):
        connect(objective, case.model, end, steps=50, alphas=[0, 0.5, 1])


# ------------------------------------------------------------------------------------ the result


def test_result_goes_to_json_prints_itself_and_its_curves_are_plotted():
    import matplotlib.pyplot as plt

    test = on_a_ring()
    found = connect(on_a_ring(), *ENDS, steps=5, also={"test": test})
    assert Connection.from_json(found.to_json()) == found
    for part in ("Bézier curve, train", "straight line, test", "mean loss", "5 gradients"):
        assert part in repr(found)
    assert "Bézier curve, start at α = 0" in repr(found.curve)
    assert fm.plot(found.curve).has_data()
    plt.close("all")


def test_steps_without_a_finite_gradient_are_left_out_and_told():
    def walled(model, batch):
        inside = model.theta.square().sum() > 0.6
        return ring(model, batch) + torch.where(inside, 0.0, math.inf)

    found = connect(on_a_ring(walled), *ENDS, steps=20)
    assert found.outcome is fm.Outcome.NON_FINITE_POINTS
    assert any("were left out" in note for note in found.notes)
    assert bool(found.bend.isfinite().all())
    assert found.line_barrier.height == math.inf
    assert "∞" in repr(found)


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("steps", 0),
        ("steps", -3),
        ("learning_rate", 0.0),
        ("learning_rate", -0.1),
        ("learning_rate", math.nan),
        ("points_per_step", 0),
        ("batches_per_step", 2),
        ("alphas", [0.0, 0.5]),
        ("alphas", [-1.0, 0.0, 1.0]),
        ("buffers", "kept"),
        ("seed", 2**64),
    ],
)
def test_bad_values_are_refused(argument, value):
    with pytest.raises(fm.InvalidArgumentError, match=f"'{argument}'"):
        connect(on_a_ring(), *ENDS, **{argument: value})


def test_ends_of_another_architecture_are_refused_with_the_tensor():
    case = build("class_weighted")
    other = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with pytest.raises(
        fm.StateMismatchError, match=r"'end' argument of connect .*'0.weight' \(5, 3\)"
    ):
        connect(case.objective(), case.model, other)


def test_batches_that_are_not_kept_cannot_be_drawn():
    case = build("class_weighted")
    with pytest.raises(fm.InvalidArgumentError, match="cache=True"):
        connect(case.objective(cache=False), case.model, case.model, batches_per_step=1)


def test_pieces_of_batches_have_no_statistics_of_whole_ones():
    case = build("conv_batch_norm")
    objective = case.objective(microbatch=1)
    with pytest.raises(fm.InvalidArgumentError, match="statistics of whole batches"):
        connect(objective, case.model, case.model, steps=1)
    found = connect(objective, case.model, case.model, steps=1, buffers="interpolate")
    assert found.barrier.height < 1e-9
