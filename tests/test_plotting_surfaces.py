"""Pictures of surfaces and of several profiles: what is drawn where, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import LogNorm

import flatminima as fm

NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def closed():
    plt.close("all")
    yield
    plt.close("all")


def grid(loss, **metrics):
    values = {name: torch.as_tensor(v).double() for name, v in metrics.items()}
    return fm.Grid(torch.as_tensor(loss).double(), values)


def made(loss, coordinates, labels=("random direction 1", "random direction 2"), **others):
    dimensions = len(coordinates)
    return fm.Surface(
        coordinates=tuple(tuple(c) for c in coordinates),
        grids={"train": loss if isinstance(loss, fm.Grid) else grid(loss), **others},
        labels=labels[:dimensions],
        units=("filter norms",) * dimensions,
        evaluations=9,
        outcome=fm.Outcome.COMPLETED,
    )


X, Y = (-1.0, 0.0, 1.0, 2.0), (-0.5, 0.0, 0.5)
PLANE = made([[10 ** (x + 2 * y) for y in Y] for x in X], (X, Y))
LINE = made(grid([4.0, 1.0, 2.0, 8.0], accuracy=[0.1, 0.9, 0.8, 0.2]), (X,))


def trajectory(points=((1.5, 0.4), (1.0, 0.2), (0.0, 0.0)), steps=(0, 10, 20)):
    coordinates = torch.tensor(points, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(3, 2)
    path = fm.Trajectory(model)
    basis = torch.linalg.qr(torch.randn(8, 2, generator=generator))[0]
    for step, row in zip(steps, coordinates.float(), strict=True):
        with torch.no_grad():
            vector = basis @ row
            model.weight.copy_(vector[:6].view(2, 3))
            model.bias.copy_(vector[6:])
        path.record(step, force=True)
    return fm.principal_components(path)


def drawn(result, ax=None, **options):
    axis = fm.plot(result, ax, **options)
    axis.figure.canvas.draw()
    return axis


# ------------------------------------------------------------------------------------- contours


def test_contours_lie_where_their_values_are():
    axis = drawn(PLANE)
    assert (axis.get_xlim(), axis.get_ylim()) == ((-1, 2), (-0.5, 0.5))
    filled = axis.collections[0]
    assert isinstance(filled.norm, LogNorm)
    # The largest value is at the upper right: the second direction is the vertical one.
    highest = [p for p in filled.get_paths() if len(p.vertices)][-1].vertices
    np.testing.assert_allclose(highest.max(axis=0), [2.0, 0.5])
    assert axis.get_xlabel() == "random direction 1 (filter norms)"
    assert axis.get_ylabel() == "random direction 2 (filter norms)"
    assert axis.figure.axes[1].get_ylabel() == "loss"


def test_the_model_has_a_star():
    axis = drawn(PLANE)
    (star,) = [line for line in axis.get_lines() if line.get_marker() == "*"]
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (0, 0)


@pytest.mark.parametrize("sign", [1, -1])
def test_levels_are_linear_where_a_logarithm_says_nothing(sign):
    values = [[sign * (5 + 0.1 * i + 0.2 * j) for j in range(3)] for i in range(4)]
    assert not isinstance(drawn(made(values, (X, Y))).collections[0].norm, LogNorm)


def test_a_flat_surface_is_drawn():
    drawn(made([[1.0] * 3] * 4, (X, Y)))


def test_limits_are_shared():
    axes = [drawn(s, limits=(1e-3, 1e3)) for s in (PLANE, made([[1.0] * 3] * 4, (X, Y)))]
    norms = [axis.collections[0].norm for axis in axes]
    assert [(n.vmin, n.vmax) for n in norms] == [(1e-3, 1e3)] * 2


def test_what_is_not_finite_is_shown_as_such():
    values = PLANE.loss.clone()
    values[0, 0], values[3, 2] = NAN, INF
    axis = drawn(made(values, (X, Y)))
    assert [t.get_text() for t in axis.get_legend().get_texts()] == ["NaN", "infinite"]
    everything = made(torch.full((4, 3), NAN), (X, Y))
    assert drawn(everything).get_legend() is not None


def test_relief_has_its_axes_and_the_model():
    axis = drawn(PLANE, kind="3d")
    assert axis.get_zlabel() == "log₁₀ loss"
    assert axis.get_xlabel() == "random direction 1 (filter norms)"
    given = plt.figure().add_subplot(projection="3d")
    assert drawn(PLANE, given, kind="3d") is given
    with pytest.raises(fm.InvalidArgumentError, match='projection="3d"'):
        fm.plot(PLANE, plt.subplots()[1], kind="3d")


OWN = ("principal component 1 (90 % of variance)", "principal component 2 (10 % of variance)")
ON_PLANE = made(PLANE.loss, (X, Y), OWN)


def test_a_trajectory_is_refused_where_it_does_not_lie():
    for surface, path, options, words in (
        (PLANE, trajectory(), {}, "along its principal directions"),
        (ON_PLANE, trajectory(), {"kind": "3d"}, "interactive"),
        (LINE, trajectory(), {}, "two principal directions"),
    ):
        with pytest.raises(fm.InvalidArgumentError, match=words):
            fm.plot(surface, trajectory=path, **options)


@pytest.mark.parametrize("limits", [(5.0, 1.0), (1.0, 1.0), (1.0, NAN), (1.0,), "wide"])
def test_limits_that_are_none_are_refused(limits):
    with pytest.raises(fm.FlatMinimaError, match="'limits' argument of plot"):
        fm.plot(PLANE, limits=limits)


def test_relief_has_the_colours_of_its_limits():
    faces = [
        fm.plot(PLANE, kind="3d", limits=limits).collections[0].get_clim()
        for limits in (None, (1e-4, 1e4))
    ]
    np.testing.assert_allclose(faces[0], [-2, 3], rtol=1e-6)
    np.testing.assert_allclose(faces[1], [-4, 4], rtol=1e-6)


def test_a_trajectory_lies_on_its_plane_with_time_in_colour():
    principal = trajectory()
    axis = drawn(ON_PLANE, trajectory=principal)
    marks = [c for c in axis.collections if len(c.get_offsets()) == 3 and c.get_array() is not None]
    np.testing.assert_allclose(marks[-1].get_offsets(), principal.coordinates, rtol=1e-6)
    np.testing.assert_allclose(marks[-1].get_array(), [0, 10, 20])
    labels = [a.get_ylabel() for a in axis.figure.axes]
    assert "training step" in labels
    low, high = axis.get_xlim()
    assert low <= float(principal.coordinates[:, 0].min())
    assert high >= float(principal.coordinates[:, 0].max())


# ------------------------------------------------------------------------------------- profiles


def test_a_profile_has_losses_and_metrics():
    axis = drawn(LINE)
    (line,) = [a for a in axis.get_lines() if a.get_label() == "train loss"]
    np.testing.assert_allclose(line.get_ydata(), [4, 1, 2, 8])
    right = [a for a in axis.figure.axes if a is not axis]
    assert right[0].get_ylabel() == "accuracy"
    assert axis.get_yscale() == "log"


def test_several_seeds_are_a_band():
    several = [made([4.0 * k, 1.0 * k, 2.0 * k, 8.0 * k], (X,)) for k in (1.0, 2.0, 4.0)]
    axis = drawn(several)
    (line,) = [a for a in axis.get_lines() if len(a.get_xdata()) == 4]
    np.testing.assert_allclose(line.get_ydata(), [8, 2, 4, 16])
    band = axis.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (1.0, 32.0)
    assert axis.get_legend().get_title().get_text() == "median, and least to largest of 3"


def test_directions_have_lines_of_their_own_and_groups_their_labels():
    first = made([4.0, 1.0, 2.0, 8.0], (X,), labels=("eigenvector 1",))
    second = made([2.0, 1.0, 1.5, 3.0], (X,), labels=("eigenvector 2",))
    texts = [t.get_text() for t in drawn([first, second]).get_legend().get_texts()]
    assert texts == ["eigenvector 1", "eigenvector 2"]
    grouped = {"small": [first, first], "large": second}
    texts = [t.get_text() for t in drawn(grouped).get_legend().get_texts()]
    assert texts == ["small", "large"]


def test_interpolations_are_profiles_too():
    curve = fm.Interpolation(
        alphas=(0.0, 0.5, 1.0),
        curves={"train": fm.Curve((1.0, 3.0, 2.0), {})},
        path="linear",
        buffers="keep",
        evaluations=3,
        outcome=fm.Outcome.COMPLETED,
    )
    axis = drawn({"straight": curve, "again": [curve, curve]})
    assert axis.get_xlabel() == "α"
    texts = [
        t.get_text()
        for t in drawn([curve, dataclasses.replace(curve, path="bezier")]).get_legend().get_texts()
    ]
    assert texts == ["linear path", "bezier path"]
    with pytest.raises(fm.ArgumentTypeError, match="not both"):
        fm.plot([curve, LINE])


# ---------------------------------------------------------------------------------------- style


def test_the_style_of_a_paper_fits_a_column():
    axis = drawn(LINE, style="paper")
    assert axis.figure.get_figwidth() == pytest.approx(3.3)
    assert axis.xaxis.label.get_size() == 8
    # And nothing is left of it.
    usual = drawn(LINE)
    assert usual.figure.get_figwidth() > 5
    assert usual.xaxis.label.get_size() > 8


@pytest.mark.parametrize("kind", ["pdf", "svg"])
def test_vectors_are_written(tmp_path, kind):
    for number, options in enumerate(({}, {"kind": "3d"}, {"style": "paper"})):
        path = tmp_path / f"{number}.{kind}"
        fm.plot(PLANE, **options).figure.savefig(path)
        assert path.stat().st_size > 1000


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("result", "options", "error", "message"),
    [
        (PLANE, {"kind": "heat"}, fm.InvalidArgumentError, "'kind' argument of plot"),
        (PLANE, {"style": "poster"}, fm.InvalidArgumentError, "'style' argument of plot"),
        (LINE, {"trajectory": "it"}, fm.FlatMinimaError, "rajectory"),
        ([], {}, fm.InvalidArgumentError, "empty list"),
        ([PLANE, PLANE], {}, fm.ArgumentTypeError, "Surface of 2 dimensions"),
        ([LINE, 3], {}, fm.ArgumentTypeError, "got a int"),
        ({"a": [LINE, made([1.0, 2.0, 3.0], (Y,))]}, {}, fm.InvalidArgumentError, "differ in"),
        (
            [LINE, dataclasses.replace(LINE, units=("‖θ‖",))],
            {},
            fm.InvalidArgumentError,
            "differ in their points, units",
        ),
        (made(torch.ones(3, 3, 3), (Y, Y, Y), ("a", "b", "c")), {}, fm.InvalidArgumentError, "3"),
    ],
)
def test_what_cannot_be_drawn_is_refused(result, options, error, message):
    with pytest.raises(error, match=message):
        fm.plot(result, **options)


def test_options_of_surfaces_are_for_surfaces():
    estimate = fm.Estimate(1.0, 0.1)
    for options in ({"kind": "3d"}, {"limits": (1, 2)}):
        with pytest.raises(fm.InvalidArgumentError, match="is for surfaces"):
            fm.plot(estimate, **options)
