"""Trajectories: what is recorded, where it is kept, and their principal components."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import flatminima as fm
from flatminima.landscape.trajectory import principal as principal_module
from flatminima.landscape.trajectory import trajectory as trajectory_module
from flatminima.landscape.trajectory.path_losses import path_losses
from flatminima.landscape.trajectory.principal import (
    PrincipalResult,
    TrajectoryLosses,
    principal_components,
)
from flatminima.landscape.trajectory.snapshots import Snapshots
from flatminima.landscape.trajectory.trajectory import Trajectory
from integrity import untouched
from zoo import build, quadratic_case


class Point(nn.Module):
    """Two tensors with n entries between them, put wherever a test wants."""

    def __init__(self, n: int = 12, dtype=torch.float64) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.zeros(2, n // 4, dtype=dtype))
        self.right = nn.Parameter(torch.zeros(n - 2 * (n // 4), dtype=dtype))

    def forward(self, inputs=None):
        return self.left.square().sum() + self.right.square().sum()

    def put(self, vector) -> None:
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(
                torch.as_tensor(vector, dtype=self.left.dtype), self.parameters()
            )


def recorded(rows, dtype="float64", model=None, **options) -> Trajectory:
    """A trajectory through these points."""
    rows = np.asarray(rows)
    model = Point(rows.shape[1]) if model is None else model
    trajectory = Trajectory(model, dtype=dtype, **options)
    for step, row in enumerate(rows):
        model.put(row)
        assert trajectory.record(step)
    return trajectory


def objective_at(vector, n=None) -> fm.Objective:
    model = Point(len(vector) if n is None else n)
    model.put(vector)
    return fm.Objective(model, data=[torch.zeros(1)], batch_loss=lambda m, batch: m())


def walk(steps=9, n=12, seed=0, scale=1.0):
    generator = np.random.default_rng(seed)
    return 3 + scale * generator.normal(size=(steps, n)).cumsum(axis=0)


# ------------------------------------------------------------------------------------ recording


def test_every_kth_call_is_kept_and_the_last_by_force():
    model = Point()
    trajectory = Trajectory(model, every=3)
    kept = [trajectory.record(step) for step in range(8)]
    assert kept == [True, False, False, True, False, False, True, False]
    assert trajectory.record(7, force=True)
    assert not trajectory.record(7, force=True), "that step is there"
    assert trajectory.steps == (0, 3, 6, 7)
    assert len(trajectory) == 4


def test_steps_are_counted_where_they_are_not_given():
    trajectory = Trajectory(Point(), every=2)
    for _ in range(5):
        trajectory.record()
    assert trajectory.steps == (0, 2, 4)
    trajectory.record(100, force=True)
    trajectory.record()
    assert trajectory.steps == (0, 2, 4, 100, 101)


def test_points_are_the_parameters_as_they_were():
    rows = walk()
    trajectory = recorded(rows)
    for i, row in enumerate(rows):
        assert np.array_equal(trajectory.point(i).numpy(), row)
    assert torch.equal(trajectory.point(-1), trajectory.point(8))
    assert trajectory.point(0).dtype == torch.float64
    single = recorded(rows, dtype="float32")
    assert single.point(0).dtype == torch.float32
    assert np.array_equal(single.point(3).numpy(), rows[3].astype(np.float32))
    point = single.point(3)
    point.zero_()
    assert single.point(3).any(), "a point is a copy"


def test_order_is_that_of_the_objective():
    case = build("tied_weights")
    objective = case.objective()
    for subject in (objective, case.model):
        trajectory = Trajectory(subject)
        trajectory.record()
        assert torch.equal(trajectory.point(0), objective.point())
        assert trajectory.size == objective.size


def test_parameters_are_selected_as_in_an_objective():
    model = Point()
    trajectory = Trajectory(model, params="left")
    trajectory.record()
    assert trajectory.point(0).shape == (6,)
    assert trajectory.parameters == ("left (2, 3)",)
    with pytest.raises(fm.InvalidArgumentError, match="own selection"):
        Trajectory(objective_at(np.ones(12)), params="left")
    with pytest.raises(fm.ParameterSelectionError, match="'left'"):
        Trajectory(model, params="lefd")


def test_numbers_are_kept_beside_the_snapshots():
    trajectory = Trajectory(Point(), every=2)
    loss = torch.tensor(2.0, requires_grad=True) * 1
    for step in range(4):
        trajectory.record(step, loss=loss, rate=0.1 if step else math.inf)
    trajectory.record(9, loss=np.float64(1), accuracy=1)
    numbers = trajectory.numbers
    assert numbers["loss"] == (2.0, 2.0, 1.0)
    assert numbers["rate"][:2] == (math.inf, 0.1)
    assert math.isnan(numbers["rate"][2])
    assert numbers["accuracy"][2] == 1.0
    with pytest.raises(fm.ArgumentTypeError, match="loss="):
        trajectory.record(10, force=True, loss=torch.ones(3))
    assert len(trajectory) == 3


def test_numbers_are_not_read_when_nothing_is_kept():
    """Reading a loss waits for a GPU."""

    class Unread:
        def __float__(self):
            raise AssertionError("read")

    trajectory = Trajectory(Point(), every=2)
    trajectory.record(0)
    assert not trajectory.record(1, loss=Unread())


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}, {"sketch": 5}, {"path": True}])
def test_recording_touches_nothing(options, tmp_path):
    case = build("conv_batch_norm", torch.float32)
    case.model.train()
    options = options | ({"path": tmp_path / "run"} if "path" in options else {})
    loss = case.model(case.batches[0][0]).sum()
    loss.backward()
    with untouched(case.model, case.batches):
        trajectory = Trajectory(case.model, **options)
        trajectory.record(0, loss=loss)
        trajectory.record(1)
        trajectory.point(-1)
        repr(trajectory)


def test_recording_works_in_inference_mode():
    model = Point()
    model.put(np.arange(12.0))
    trajectory = Trajectory(model)
    with torch.inference_mode():
        trajectory.record()
    model.put(np.ones(12))
    trajectory.record()
    point = trajectory.point(0)
    assert not point.is_inference()
    point.add_(1).requires_grad_()
    (point * point).sum().backward()
    assert principal_components(trajectory, components=1).vectors is not None
    sketch = Trajectory(model, sketch=4)
    with torch.inference_mode():
        sketch.record()
    model.put(np.zeros(12))
    sketch.record()
    assert principal_components(sketch, components=1).distances.shape == (2,)


def test_half_precision_models_are_recorded_in_float32():
    model = nn.Linear(3, 2).to(torch.bfloat16)
    trajectory = Trajectory(model)
    trajectory.record()
    assert trajectory.point(0).dtype == torch.float32
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(trajectory.point(0), flat.float())


def test_wrapped_models_are_those_inside():
    model = nn.Linear(2, 2)
    inside = Trajectory(model).parameters
    assert Trajectory(nn.DataParallel(model)).parameters == inside
    assert Trajectory(torch.compile(model, backend="eager")).parameters == inside


def test_a_default_device_does_not_matter():
    model = Point()
    with torch.device("meta"):
        whole, sketch = Trajectory(model), Trajectory(model, sketch=3)
        whole.record()
        sketch.record()
    assert whole.point(0).device.type == "cpu"
    assert sketch.point(0).device.type == "cpu"


def test_changed_models_are_noticed():
    model = Point()
    trajectory = Trajectory(model)
    trajectory.record(0)
    model.right = nn.Parameter(torch.zeros(4))
    with pytest.raises(fm.StateMismatchError, match=r"'right' was \(6,\).*\(4,\) at step 1"):
        trajectory.record(1)
    del model.right
    with pytest.raises(fm.StateMismatchError, match=r"'right'.*is gone at step 2"):
        trajectory.record(2)
    assert trajectory.steps == (0,)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_parameters_that_are_not_finite_are_refused_by_name(value):
    model = Point()
    trajectory = Trajectory(model)
    trajectory.record(0)
    row = np.zeros(12)
    row[8] = value
    model.put(row)
    with pytest.raises(fm.NonFiniteError, match=r"'right'.*float32.*at step 1"):
        trajectory.record(1)
    assert len(trajectory) == 1


@pytest.mark.parametrize("steps", [(5, 4), (5, 5)])
def test_steps_that_do_not_increase_are_refused(steps):
    trajectory = Trajectory(Point())
    trajectory.record(steps[0])
    with pytest.raises(fm.InvalidArgumentError, match="must increase"):
        trajectory.record(steps[1])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"every": 0}, "every"),
        ({"dtype": "float8"}, "'float16'"),
        ({"sketch": 0}, "sketch"),
        ({"path": 3}, "path"),
        ({"resume": True}, "path"),
        ({"resume": 1, "path": "x"}, "resume"),
        ({"sketch": 2, "seed": "a"}, "seed"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises((fm.InvalidArgumentError, fm.ArgumentTypeError), match=match):
        Trajectory(Point(), **options)


def test_subjects_and_places_are_checked():
    with pytest.raises(fm.ArgumentTypeError, match="module in training"):
        Trajectory([torch.ones(2)])
    trajectory = Trajectory(Point())
    with pytest.raises(fm.InvalidArgumentError, match="0 snapshots"):
        trajectory.point(0)
    with pytest.raises(fm.ArgumentTypeError, match=r"1\.5"):
        trajectory.point(1.5)
    with pytest.raises(fm.ArgumentTypeError, match="step"):
        trajectory.record("last")


# ------------------------------------------------------------------------------------ float16


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_float16_keeps_its_precision_at_any_scale(scale):
    rows = walk() * scale
    trajectory = recorded(rows, dtype="float16")
    for i, row in enumerate(rows):
        error = np.abs(trajectory.point(i).numpy() - row)
        assert (error <= 2.0**-11 * np.abs(row) + 2.0**-38 * np.abs(row).max()).all()


def test_float16_of_zeros_is_zero():
    trajectory = recorded(np.zeros((2, 12)), dtype="float16")
    assert not trajectory.point(0).any()


def test_float16_components_are_those_within_its_rounding():
    rows = walk()
    exact = principal_components(recorded(rows))
    rough = principal_components(recorded(rows, dtype="float16"))
    torch.testing.assert_close(rough.coordinates, exact.coordinates, rtol=0, atol=2e-2)
    assert rough.dtype == "float16"


def test_extents_within_rounding_are_told():
    rows = 3 + 6e-4 * walk()
    found = principal_components(recorded(rows, dtype="float16"))
    assert any("rounding the snapshots to float16" in note for note in found.notes)
    assert not principal_components(recorded(rows, dtype="float32")).notes


# ------------------------------------------------------------------------------------ on disk


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_memory_disk_and_loading_agree(dtype, tmp_path):
    rows = walk()
    memory = recorded(rows, dtype=dtype)
    disk = recorded(rows, dtype=dtype, path=tmp_path / "a" / "run")
    loaded = Trajectory.load(str(tmp_path / "a" / "run"))
    for other in (disk, loaded):
        assert other.steps == memory.steps
        assert other.numbers == memory.numbers
        assert other.parameters == memory.parameters
        assert (other.size, other.dtype) == (12, dtype)
        for i in range(len(rows)):
            assert torch.equal(other.point(i), memory.point(i))
        assert principal_components(other) == principal_components(memory)


def test_a_folder_holds_arrays_and_an_index_without_a_pickle(tmp_path):
    model = Point()
    trajectory = Trajectory(model, path=tmp_path, dtype="float32")
    for step in range(3):
        trajectory.record(step, loss=math.nan if step else 1.5)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["index.json", *(f"snapshot-{i:06d}.npy" for i in range(3))]
    for name in names[1:]:
        assert np.load(tmp_path / name, allow_pickle=False).shape == (12,)
    index = json.loads((tmp_path / "index.json").read_text(), parse_constant=pytest.fail)
    assert index["layout"] == ["left (2, 3)", "right (6,)"]
    assert [entry["step"] for entry in index["snapshots"]] == [0, 1, 2]
    loss = Trajectory.load(tmp_path).numbers["loss"]
    assert loss[0] == 1.5
    assert math.isnan(loss[1])


def test_going_on_needs_to_be_asked_for_and_goes_on(tmp_path):
    rows = walk()
    model = Point()
    first = Trajectory(model, path=tmp_path, every=2, dtype="float64")
    for row in rows[:4]:
        model.put(row)
        first.record()
    with pytest.raises(fm.InvalidArgumentError, match=r"2 snapshots.*resume=True"):
        Trajectory(model, path=tmp_path, dtype="float64")
    second = Trajectory(model, path=tmp_path, every=2, dtype="float64", resume=True)
    assert second.steps == (0, 2)
    model.put(rows[4])
    second.record(4, force=True)
    assert Trajectory.load(tmp_path).steps == (0, 2, 4)
    assert np.array_equal(second.point(-1).numpy(), rows[4])
    assert np.array_equal(second.point(0).numpy(), rows[0])
    with pytest.raises(fm.InvalidArgumentError, match="must increase"):
        second.record(3, force=True)


def test_resuming_a_folder_that_is_not_there_begins_it(tmp_path):
    trajectory = Trajectory(Point(), path=tmp_path / "new", resume=True)
    trajectory.record()
    assert len(Trajectory.load(tmp_path / "new")) == 1


@pytest.mark.parametrize("resume", [False, True])
def test_the_folder_of_another_model_is_refused_with_what_differs(resume, tmp_path):
    Trajectory(Point(), path=tmp_path).record()
    with pytest.raises(fm.StateMismatchError, match=r"only recorded: right \(6,\)") as caught:
        Trajectory(Point(14), path=tmp_path, resume=resume)
    assert "only here: right (8,)" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dtype": "float16"}, "dtype 'float32' instead of 'float16'"),
        ({"sketch": 4}, "sketch None instead of 4"),
    ],
)
def test_a_folder_of_other_settings_is_refused(options, match, tmp_path):
    Trajectory(Point(), path=tmp_path).record()
    with pytest.raises(fm.StateMismatchError, match=match):
        Trajectory(Point(), path=tmp_path, resume=True, **options)


def test_sketches_of_another_seed_are_refused(tmp_path):
    Trajectory(Point(), path=tmp_path, sketch=4, seed=1).record()
    with pytest.raises(fm.StateMismatchError, match="seed"):
        Trajectory(Point(), path=tmp_path, sketch=4, seed=2, resume=True)
    assert len(Trajectory(Point(), path=tmp_path, sketch=4, seed=1, resume=True)) == 1


def test_foreign_folders_and_files_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(fm.InvalidArgumentError, match="does not hold a trajectory"):
        Trajectory(Point(), path=tmp_path)
    with pytest.raises(fm.InvalidArgumentError, match="is a file"):
        Trajectory(Point(), path=tmp_path / "notes.txt")
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "notes.txt"):
        with pytest.raises(fm.InvalidArgumentError, match="does not hold a trajectory"):
            Trajectory.load(folder)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(fm.InvalidArgumentError, match="cannot be read"):
        Trajectory.load(tmp_path)
    (tmp_path / "index.json").write_text('{"format": "another"}')
    with pytest.raises(fm.InvalidArgumentError, match="does not hold a trajectory"):
        Trajectory.load(tmp_path)
    (tmp_path / "index.json").write_text('{"format": "flatminima trajectory", "version": 9}')
    with pytest.raises(fm.InvalidArgumentError, match="version 9"):
        Trajectory.load(tmp_path)
    (tmp_path / "index.json").write_text('{"format": "flatminima trajectory", "version": 1}')
    with pytest.raises(fm.InvalidArgumentError, match="lacks layout"):
        Trajectory.load(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_missing_and_damaged_files_are_named(tmp_path):
    recorded(walk(), path=tmp_path)
    file = tmp_path / "snapshot-000004.npy"
    np.save(file, np.zeros(3))
    with pytest.raises(fm.InvalidArgumentError, match=r"000004.npy.*\(3,\)"):
        Trajectory.load(tmp_path)
    file.write_bytes(b"nothing")
    with pytest.raises(fm.InvalidArgumentError, match=r"000004.npy.*cannot be read"):
        Trajectory.load(tmp_path)
    file.unlink()
    with pytest.raises(fm.InvalidArgumentError, match=r"000004.npy.*cannot be read"):
        Trajectory.load(tmp_path)


def test_an_interrupted_writing_leaves_what_was_there(tmp_path, monkeypatch):
    model = Point()
    trajectory = Trajectory(model, path=tmp_path, dtype="float64")
    trajectory.record(0)
    model.put(np.ones(12))

    def interrupted(self, folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Snapshots, "_write_index", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trajectory.record(1)
    assert trajectory.steps == (0,)
    assert Trajectory.load(tmp_path).steps == (0,)
    assert not list(tmp_path.glob("*.part"))
    model.put(2 * np.ones(12))
    trajectory.record(2)
    assert Trajectory.load(tmp_path).steps == (0, 2)
    assert float(trajectory.point(1)[0]) == 2


def test_a_loaded_trajectory_records_nothing(tmp_path):
    recorded(walk(), path=tmp_path)
    with pytest.raises(fm.InvalidArgumentError, match="resume=True"):
        Trajectory.load(tmp_path).record()


def test_representation_says_what_is_there(tmp_path):
    assert repr(recorded(walk())) == (
        "Trajectory(9 snapshots of 12 parameters, steps 0 to 8, float64, in memory)"
    )
    assert "sketches of 3" in repr(recorded(walk(), sketch=3, path=tmp_path))
    assert repr(Trajectory(Point())).startswith("Trajectory(0 snapshots of 12 parameters, float32")


# ------------------------------------------------------------------------- principal components


@pytest.mark.parametrize("center", ["last", "mean"])
@pytest.mark.parametrize("components", [1, 2, 5, 8])
def test_components_are_those_of_numpys_svd(center, components):
    rows = walk()
    found = principal_components(recorded(rows), components=components, center=center)
    middle = rows[-1] if center == "last" else rows.mean(axis=0)
    differences = rows - middle
    left, sizes, right = np.linalg.svd(differences, full_matrices=False)
    coordinates = left[:, :components] * sizes[:components]
    signs = np.sign(coordinates[np.abs(coordinates).argmax(axis=0), range(components)])
    exact = {
        "vectors": right[:components].T * signs,
        "coordinates": coordinates * signs,
        "variance": sizes[:components] ** 2 / len(rows),
        "origin": middle,
        "distances": np.linalg.norm(differences - coordinates @ right[:components], axis=1),
    }
    for name, value in exact.items():
        torch.testing.assert_close(
            getattr(found, name), torch.from_numpy(value), rtol=1e-9, atol=1e-9
        )
    shares = sizes**2 / (sizes**2).sum()
    assert found.explained == pytest.approx(shares[:components], rel=1e-9)
    assert found.total_variance == pytest.approx((sizes**2).sum() / len(rows))
    torch.testing.assert_close(
        found.coordinates, torch.from_numpy(differences) @ found.vectors, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("center", ["last", "mean"])
def test_a_planted_plane_is_found_whole(center):
    generator = np.random.default_rng(1)
    plane, _ = np.linalg.qr(generator.normal(size=(40, 2)))
    planted = np.stack([np.linspace(3, 0, 15), np.sin(np.linspace(0, 5, 15))], axis=1)
    rows = 0.3 + planted @ plane.T
    found = principal_components(recorded(rows), center=center)
    assert sum(found.explained) == pytest.approx(1, abs=1e-12)
    assert float(found.distances.max()) < 1e-13
    apart = np.linalg.norm(planted[:, None] - planted[None], axis=2)
    torch.testing.assert_close(
        torch.cdist(found.coordinates, found.coordinates), torch.from_numpy(apart)
    )
    projector = found.vectors @ found.vectors.T
    torch.testing.assert_close(projector, torch.from_numpy(plane @ plane.T))


def test_distances_far_below_the_extent_are_not_lost():
    """As differences of squares they would be rounding: 1e-9 beside 1 is 1e-18 beside 1."""
    rows = np.zeros((5, 12))
    rows[:, 0] = [4, 3, 2, 1, 0]
    rows[:, 1] = [0, 2, 1, 1, 0]
    rows[2, 7] = 1e-9
    found = principal_components(recorded(rows))
    assert float(found.distances[2]) == pytest.approx(1e-9, rel=0.2)


def test_small_moves_about_large_parameters_are_not_lost():
    generator = np.random.default_rng(0)
    moves = 1e-6 * generator.normal(size=(6, 12)).cumsum(axis=0)
    rows = 1e3 + moves
    found = principal_components(recorded(rows), components=3)
    differences = rows - rows[-1]
    sizes = np.linalg.svd(differences, compute_uv=False)
    torch.testing.assert_close(
        found.variance, torch.from_numpy(sizes[:3] ** 2 / 6), rtol=1e-8, atol=0
    )


def test_last_is_at_zero_and_signs_are_fixed():
    found = principal_components(recorded(walk()), components=4)
    assert not found.coordinates[-1].any()
    assert float(found.distances[-1]) == 0
    largest = found.coordinates[found.coordinates.abs().argmax(dim=0), range(4)]
    assert (largest > 0).all()
    assert found.center == "last"


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_blocks_of_any_size_give_the_same(where, monkeypatch, tmp_path):
    rows = walk(n=101)
    trajectory = recorded(rows, path=tmp_path if where == "disk" else None)
    whole = principal_components(trajectory, components=3)
    monkeypatch.setattr(trajectory_module, "BLOCK_BYTES", 8 * 9 * 7)
    assert max(part.shape[1] for _, part in trajectory.blocks()) == 7
    cut = principal_components(trajectory, components=3)
    for name in ("vectors", "coordinates", "variance", "distances"):
        torch.testing.assert_close(getattr(cut, name), getattr(whole, name), rtol=1e-9, atol=1e-10)


def test_components_are_orthonormal_in_float32():
    found = principal_components(recorded(walk(n=500), dtype="float32"), components=8)
    assert found.vectors.dtype == torch.float32
    gram = found.vectors.double().T @ found.vectors.double()
    torch.testing.assert_close(gram, torch.eye(8).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (np.zeros((0, 12)), "no snapshot"),
        (np.zeros((1, 12)), "one snapshot"),
        (np.ones((4, 12)), "All 4 snapshots are equal"),
        (np.arange(2.0)[:, None] * np.ones(12), r"2 snapshots span 1.*components=1"),
        (np.arange(5.0)[:, None] * np.ones(12), r"extend in 1 direction only.*components=1"),
    ],
)
@pytest.mark.parametrize("center", ["last", "mean"])
def test_too_few_directions_are_refused(rows, match, center):
    with pytest.raises(fm.InvalidArgumentError, match=match):
        principal_components(recorded(rows), center=center)


def test_arguments_of_principal_components_are_checked():
    trajectory = recorded(walk())
    for options, match in (
        ({"components": 0}, "≥ 1"),
        ({"components": 9}, "span 8"),
        ({"center": "first"}, "'last'"),
    ):
        with pytest.raises(fm.InvalidArgumentError, match=match):
            principal_components(trajectory, **options)
    with pytest.raises(fm.ArgumentTypeError, match="Trajectory"):
        principal_components(torch.ones(3, 4))


def test_directions_are_unit_vectors_with_their_shares():
    rows = walk()
    found = principal_components(recorded(rows, dtype="float32"))
    objective = objective_at(rows[-1])
    directions = found.directions(objective)
    assert directions.units == ("parameter units",) * 2
    share = f"{100 * found.explained[0]:.0f} % of variance"
    assert directions.labels[0] == f"principal component 1 ({share})"
    assert directions.vectors.dtype == torch.float64
    torch.testing.assert_close(directions.gram(), torch.eye(2).double(), rtol=0, atol=1e-6)
    assert directions.notes == (), "the model is the last snapshot, to float32"
    point = objective.point() + directions.vectors @ found.coordinates[0]
    assert float((point - torch.from_numpy(rows[0])).norm()) == pytest.approx(
        float(found.distances[0]), rel=1e-5
    )


@pytest.mark.parametrize("center", ["last", "mean"])
def test_another_model_than_the_centre_is_told_and_can_be_reckoned_with(center):
    rows = walk()
    found = principal_components(recorded(rows), center=center)
    here = rows[3]
    objective = objective_at(here)
    (note,) = found.directions(objective).notes
    assert "coordinates_at(objective)" in note
    assert center in note
    exact = torch.from_numpy(rows - here) @ found.vectors
    torch.testing.assert_close(found.coordinates_at(objective), exact, rtol=1e-9, atol=1e-9)


def test_coordinates_at_the_last_model_are_the_coordinates():
    rows = walk()
    found = principal_components(recorded(rows))
    at = found.coordinates_at(objective_at(rows[-1]))
    torch.testing.assert_close(at, found.coordinates)


def test_objectives_of_other_parameters_are_refused():
    found = principal_components(recorded(walk()))
    for call in (found.directions, found.coordinates_at):
        with pytest.raises(fm.StateMismatchError, match=r"only here: right \(8,\)"):
            call(objective_at(np.ones(14)))
        with pytest.raises(fm.ArgumentTypeError, match="Objective"):
            call(Point())
        with pytest.raises(fm.InvalidArgumentError, match="dropped"):
            getattr(found.without_vectors(), call.__name__)(objective_at(np.ones(12)))


def test_principal_results_go_to_json_and_back():
    for options in ({}, {"sketch": 20}, {"dtype": "float32"}):
        found = principal_components(recorded(walk(), **options))
        assert PrincipalResult.from_json(found.to_json()) == found
        assert fm.Result.from_json(found.to_json()) == found
    again = PrincipalResult.from_json(found.without_vectors().to_json())
    assert again.vectors is None
    assert again.steps == found.steps
    text = repr(found)
    assert "Principal components of 9 snapshots, steps 0 to 8, relative to the last" in text
    assert "largest distance" in text


# ------------------------------------------------------------------------------------ sketches


def test_sketches_keep_distances():
    rows = walk(steps=12, n=3000)
    trajectory = recorded(rows, sketch=400)
    exact = np.linalg.norm(rows - rows[-1], axis=1)[:-1]
    ((_, kept),) = trajectory.blocks()
    lengths = (kept - kept[-1]).norm(dim=1)[:-1].numpy()
    # The squared length of a sketch has the relative variance 2 / 400.
    assert np.abs(lengths / exact - 1).max() < 5 / math.sqrt(2 * 400)
    assert np.abs(lengths / exact - 1).max() > 1e-4


def test_sketched_components_are_near_and_have_no_directions():
    rows = walk(steps=12, n=3000)
    exact = principal_components(recorded(rows))
    trajectory = recorded(rows, sketch=1500)
    found = principal_components(trajectory)
    assert found.explained == pytest.approx(exact.explained, abs=0.06)
    torch.testing.assert_close(found.coordinates, exact.coordinates, rtol=0.2, atol=30)
    torch.testing.assert_close(found.distances, exact.distances, rtol=0.2, atol=3)
    assert any("sketches of 1500" in note for note in found.notes)
    assert found.vectors is None
    with pytest.raises(fm.InvalidArgumentError, match=r"no directions; record without sketch="):
        found.directions(objective_at(rows[-1]))
    with pytest.raises(fm.InvalidArgumentError, match="record without sketch="):
        path_losses(objective_at(rows[-1]), trajectory)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_of_sketched_snapshots_the_last_is_kept_whole(where, tmp_path):
    rows = walk()
    path = tmp_path if where == "disk" else None
    trajectory = recorded(rows, sketch=3, path=path)
    assert np.array_equal(trajectory.point(-1).numpy(), rows[-1])
    assert np.array_equal(trajectory.point(8).numpy(), rows[-1])
    with pytest.raises(fm.InvalidArgumentError, match="only the last"):
        trajectory.point(0)
    if path is not None:
        assert len(list(path.glob("last-*.npy"))) == 1
        loaded = Trajectory.load(path)
        assert np.array_equal(loaded.point(-1).numpy(), rows[-1])
        in_memory = recorded(rows, sketch=3)
        assert principal_components(loaded) == principal_components(in_memory)


def test_sketches_repeat_with_their_seed(tmp_path):
    rows = walk()
    one, two, other = (next(recorded(rows, sketch=4, seed=s).blocks())[1] for s in (3, 3, 4))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    model = Point()
    first = Trajectory(model, path=tmp_path, sketch=4, seed=3)
    for row in rows[:5]:
        model.put(row)
        first.record()
    second = Trajectory(model, path=tmp_path, sketch=4, seed=3, resume=True)
    for row in rows[5:]:
        model.put(row)
        second.record()
    assert torch.equal(next(second.blocks())[1], one)


# --------------------------------------------------------------------------- losses along the path


def test_losses_are_those_of_the_snapshots_and_of_their_projections():
    rows = walk()
    trajectory = recorded(rows)
    objective = objective_at(rows[4])
    found = path_losses(objective, trajectory)
    principal = principal_components(trajectory)
    assert found.loss == pytest.approx((rows**2).sum(axis=1), rel=1e-12)
    plane = principal.origin + principal.coordinates @ principal.vectors.T
    assert found.plane_loss == pytest.approx(plane.square().sum(dim=1).tolist(), rel=1e-12)
    assert found.distances == tuple(principal.distances.tolist())
    assert found.steps == trajectory.steps
    assert found.plane_loss[-1] == found.loss[-1]
    assert found.evaluations == 18
    assert found.outcome is fm.Outcome.COMPLETED
    assert found == path_losses(objective, trajectory, principal=principal)
    assert TrajectoryLosses.from_json(found.to_json()) == found
    assert "loss in the plane" in repr(found)


def test_losses_are_exactly_those_seen_in_training():
    case = build("mlp_batch_norm_dropout", torch.float32)
    model = copy.deepcopy(case.model).eval()
    objective = fm.Objective(model, case.loss_fn, case.batches)
    trajectory = Trajectory(objective)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    seen = []
    for step in range(4):
        seen.append(objective.loss())
        trajectory.record(step)
        loss = case.loss_fn(model(case.batches[0][0]), case.batches[0][1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with untouched(model, case.batches):
        found = path_losses(objective, trajectory, progress=False)
        anew = path_losses(objective, trajectory, buffers="recompute", progress=False)
    assert found.loss == tuple(seen)
    assert any("running_mean" in note for note in found.notes)
    assert any("recomputed" in note for note in anew.notes)
    assert not any("running_mean" in note for note in anew.notes)
    assert all(a != b for a, b in zip(anew.loss, found.loss, strict=True))


def test_a_line_serves_two_snapshots():
    rows = walk()[:2]
    found = path_losses(objective_at(rows[1]), recorded(rows))
    assert found.plane_loss == pytest.approx(found.loss)


def test_infinite_losses_are_kept_and_told():
    case = quadratic_case(torch.eye(2).double())
    model = case.model
    objective = fm.Objective(
        model, data=case.batches, batch_loss=lambda m, batch: 1 / m.theta[0].abs()
    )
    trajectory = Trajectory(objective, dtype="float64")
    for x in (1.0, 0.0, 2.0):
        with torch.no_grad():
            model.theta.copy_(torch.tensor([x, 3.0]))
        trajectory.record()
    found = path_losses(
        objective, trajectory, principal=principal_components(trajectory, components=1)
    )
    assert found.loss[1] == math.inf
    assert found.outcome is fm.Outcome.NON_FINITE_POINTS
    assert TrajectoryLosses.from_json(found.to_json()) == found


def test_arguments_of_path_losses_are_checked():
    rows = walk()
    trajectory, objective = recorded(rows), objective_at(rows[-1])
    other = principal_components(recorded(rows[:5]))
    with pytest.raises(fm.StateMismatchError, match="another trajectory"):
        path_losses(objective, trajectory, principal=other)
    with pytest.raises(fm.StateMismatchError, match="only here"):
        path_losses(objective_at(np.ones(14)), trajectory)
    with pytest.raises(fm.ArgumentTypeError, match="principal"):
        path_losses(objective, trajectory, principal=trajectory)
    with pytest.raises(fm.ArgumentTypeError, match="Trajectory"):
        path_losses(objective, rows)
    with pytest.raises(fm.ArgumentTypeError, match="Objective"):
        path_losses(Point(), trajectory)
    with pytest.raises(fm.InvalidArgumentError, match="'recompute'"):
        path_losses(objective, trajectory, buffers="recomputed")
    dropped = principal_components(trajectory).without_vectors()
    with pytest.raises(fm.InvalidArgumentError, match="dropped"):
        path_losses(objective, trajectory, principal=dropped)


@pytest.mark.parametrize("share", [0.000123, 0.5, 0.623, 0.9997, 1.0])
def test_shares_are_written_for_people(share):
    text = principal_module._percent(share)
    assert (
        text
        == {
            0.000123: "0.012 %",
            0.5: "50 %",
            0.623: "62 %",
            0.9997: "99.97 %",
            1.0: "100 %",
        }[share]
    )


def test_results_are_frozen():
    found = principal_components(recorded(walk()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.center = "mean"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_parameters_on_a_gpu_are_copied_to_the_host():
    rows = walk()
    model = Point().cuda()
    trajectory = Trajectory(model, dtype="float64")
    for row in rows:
        model.put(torch.from_numpy(row).cuda())
        with untouched(model):
            trajectory.record()
    assert principal_components(trajectory) == principal_components(recorded(rows))
    objective = fm.Objective(model, data=[torch.zeros(1)], batch_loss=lambda m, batch: m())
    directions = principal_components(trajectory).directions(objective)
    assert directions.vectors.device == objective.device
    assert path_losses(objective, trajectory).loss == pytest.approx((rows**2).sum(axis=1))
