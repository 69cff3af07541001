"""Pictures: every result has one, on the axis that was given, and nothing is shown."""

from __future__ import annotations

import dataclasses
import itertools
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from torch import nn

import flatminima as fm
from flatminima.plotting.plot import plot

NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def nothing_is_shown(monkeypatch):
    def shown(*arguments, **options):
        raise AssertionError("plt.show was called")

    plt.close("all")
    monkeypatch.setattr(plt, "show", shown)
    yield
    plt.close("all")


def interpolation(train=(3.0, 0.1, 1.0, 0.2, 4.0), test=None, metrics=None, alphas=None):
    alphas = (-1.0, 0.0, 0.5, 1.0, 2.0)[: len(train)] if alphas is None else alphas
    curves = {"train": fm.Curve(tuple(train), {k: tuple(v) for k, v in (metrics or {}).items()})}
    if test is not None:
        shifted = {k: tuple(x / 2 for x in v) for k, v in (metrics or {}).items()}
        curves["test"] = fm.Curve(tuple(test), shifted)
    return fm.Interpolation(
        alphas=alphas,
        curves=curves,
        path="linear",
        buffers="interpolate",
        evaluations=5,
        outcome=fm.Outcome.COMPLETED,
    )


ACCURACY = {"accuracy": [0.2, 0.9, 0.5, 0.95, 0.1]}
PAPER = interpolation(test=(4.0, 0.5, 2.0, 0.6, 5.0), metrics=ACCURACY)

MATRIX = fm.MatrixOperator(torch.diag(torch.tensor([5.0, -3.0, 1.0, 0.5])))
EIGEN = fm.lanczos(MATRIX, k=3, which="LM", tol=1e-5)

BULK = fm.MatrixOperator(
    torch.diag(torch.cat([torch.tensor([80.0, -9.0]), torch.logspace(-5, 0, 98)]))
)
DENSITY = fm.spectral_density(BULK, probes=4, steps=12, outliers=2)

MODEL = nn.Linear(3, 2)
for parameter in MODEL.parameters():
    nn.init.constant_(parameter, 0.5)
DATA = torch.arange(12.0).reshape(4, 3) / 10, torch.ones(4, 2)
OBJECTIVE = fm.Objective(MODEL, nn.MSELoss(), DATA)
REPORT = fm.sharpness(MODEL, nn.MSELoss(), DATA, trace_products=4)
SHAKEN = fm.random_sharpness(OBJECTIVE, samples=3)
COMPARISON = fm.compare({"small": REPORT, "large": REPORT, "other": REPORT})


def layer(name, trace=1.0, error=0.1, eigenvalue=0.5, residual=0.01):
    outcome = fm.Outcome.CONVERGED
    return fm.LayerCurvature(name, 3, trace, error, eigenvalue, residual, 4, outcome)


def layers(*made):
    return fm.LayerwiseResult(
        layers=made,
        trace=1.0,
        trace_products=2,
        passes=4,
        outcome=fm.Outcome.CONVERGED,
        notes=(),
    )


LAYERS = layers(
    layer("", trace=-3.0), layer("encoder.0", eigenvalue=-0.2), layer("head", 100.0, 5.0, 40.0)
)


def modules(*values: tuple[str, float], error: float = 0.125) -> fm.TraceResult:
    """A trace with the traces of these modules."""
    blocks = tuple(fm.BlockTrace(name, 3, value, error) for name, value in values)
    whole = sum(value for _, value in values)
    return fm.TraceResult(whole, 1.0, 30, 10, fm.Outcome.COMPLETED, modules=blocks)


TRACE = modules(("", 0.5), ("encoder.0", -2.0), ("head", 100.0))
NET = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
for parameter in NET.parameters():
    nn.init.constant_(parameter, 0.25)
DEEP = fm.sharpness(
    NET, nn.MSELoss(), DATA, measures=["trace", "density", "gauss_newton"], trace_products=4
)

SMALL = {
    "critical_sharpness": None,
    "local_energy": {"on": "loss", "samples": 3, "sigmas": [0.1, 0.2, 0.4]},
    "pac_bayes_sharpness": {"on": "loss", "samples": 3},
    "relative_flatness": None,
}
FAMILY = {
    n: r[0] for n, r in fm.sharpness(MODEL, nn.MSELoss(), DATA, measures=SMALL).results.items()
}
INVARIANCE = fm.InvarianceTable(
    measures=("loss L(θ)", "a measure", "a negative one", "zero", "infinite"),
    values=(1.0, 2.0, -1.0, 0.0, 0.0),
    rescaled={"layer": (1.0, 2e3, 2.0, 0.0, 1.0), "neuron": (1.0, 0.5, -3.0, 0.0, 0.0)},
    ratios={"layer": (1.0, 1e3, -2.0, NAN, INF), "neuron": (1.0, 0.25, 3.0, NAN, NAN)},
    factor=10.0,
    loss_change=0.0,
    tolerance=0.01,
)
BOUND = dataclasses.replace(
    FAMILY["pac_bayes_sharpness"], upper=INF, sigma_error=NAN, outcome=fm.Outcome.NOT_REACHED
)

RESULTS = {
    "gradient norm": fm.gradient_norm(OBJECTIVE),
    "relative flatness": FAMILY["relative_flatness"],
    "local energy": FAMILY["local_energy"],
    "PAC-Bayes": FAMILY["pac_bayes_sharpness"],
    "PAC-Bayes, a bound": BOUND,
    "critical sharpness": FAMILY["critical_sharpness"],
    "critical sharpness without descent": fm.critical_sharpness(
        OBJECTIVE, update=OBJECTIVE.gradient()
    ),
    "invariance": INVARIANCE,
    "interpolation": interpolation(),
    "the paper's figure": PAPER,
    "eigenpairs": EIGEN,
    "spectral density": DENSITY,
    "spectral density, logarithmic": DENSITY.rescaled(scale="log"),
    "spectral density without outliers": fm.spectral_density(BULK, probes=2, steps=5),
    "spectral density of outliers alone": fm.spectral_density(MATRIX, probes=2, outliers=4),
    "spectral density of zero": fm.spectral_density(fm.MatrixOperator(torch.zeros(3, 3))),
    "zero, logarithmic": fm.spectral_density(fm.MatrixOperator(torch.zeros(3, 3)), scale="log"),
    "random sharpness": SHAKEN,
    "report": REPORT,
    "comparison": COMPARISON,
    "layers": LAYERS,
    "trace": TRACE,
    "trace of a matrix": fm.trace(MATRIX, products=2),
    "report of several modules": DEEP,
}

every = pytest.mark.parametrize("name", RESULTS)


def drawn(result, ax=None) -> Axes:
    """The picture, rendered, so that warnings of the rendering count."""
    axis = fm.plot(result, ax=ax)
    axis.figure.canvas.draw()
    return axis


def right_axis(axis: Axes) -> Axes | None:
    others = [a for a in axis.figure.axes if a is not axis and a.bbox.bounds == axis.bbox.bounds]
    return others[0] if others else None


def curve(axis: Axes, label: str):
    (line,) = [line for line in axis.get_lines() if line.get_label() == label]
    return line


# ------------------------------------------------------------------------------ every result


@every
def test_a_new_figure_is_made_and_its_axis_returned(name):
    axis = drawn(RESULTS[name])
    assert isinstance(axis, Axes)
    assert plt.get_fignums() == [axis.figure.number]
    assert axis.has_data()


@every
def test_given_axis_is_used(name):
    figure, (first, second) = plt.subplots(1, 2)
    assert drawn(RESULTS[name], ax=second) is second
    assert plt.get_fignums() == [figure.number]
    assert second.has_data()
    assert not first.has_data()


@every
def test_axes_say_what_they_show(name):
    axis = drawn(RESULTS[name])
    assert axis.get_xlabel()
    assert axis.get_ylabel() or [t.get_text() for t in axis.get_yticklabels() if t.get_text()]


@every
def test_result_is_not_changed_by_drawing_it(name):
    before = RESULTS[name].to_json()
    drawn(RESULTS[name])
    assert RESULTS[name].to_json() == before


@every
def test_picture_of_a_result_read_back_from_json(name):
    result = RESULTS[name]
    assert drawn(fm.Result.from_json(result.to_json())).has_data()


@pytest.mark.parametrize(
    "thing", [None, 3, EIGEN.eigenvalues, fm.diagonal(MATRIX, products=2), "report"]
)
def test_something_without_a_picture_is_refused_by_name(thing):
    with pytest.raises(
        fm.ArgumentTypeError, match=f"no picture of a {type(thing).__name__}; it draws Comparison, "
    ):
        fm.plot(thing)
    assert plt.get_fignums() == []


@pytest.mark.parametrize("ax", [3, "axis", (1, 2)])
def test_something_that_is_no_axis_is_refused(ax):
    with pytest.raises(fm.ArgumentTypeError, match="'ax' argument of plot must be a matplotlib"):
        fm.plot(EIGEN, ax=ax)


def test_figure_in_place_of_an_axis_is_refused():
    with pytest.raises(fm.ArgumentTypeError, match="got Figure"):
        fm.plot(EIGEN, ax=plt.figure())


def test_public_name_is_the_function_of_the_plotting_room():
    assert fm.plot is plot


# ----------------------------------------------------------------------------- interpolation


def test_loss_is_logarithmic_at_the_left_and_accuracy_at_the_right():
    axis = drawn(PAPER)
    right = right_axis(axis)
    assert axis.get_yscale() == "log"
    assert axis.get_ylabel() == "loss"
    assert axis.yaxis.get_label_position() == "left"
    assert right.get_yscale() == "linear"
    assert right.get_ylabel() == "accuracy"
    assert right.yaxis.get_label_position() == "right"
    assert axis.get_xlabel() == right.get_xlabel() or right.get_xlabel() == ""


@pytest.mark.parametrize("name", ["train", "test"])
def test_curves_hold_the_values(name):
    axis = drawn(PAPER)
    loss = curve(axis, f"{name} loss")
    accuracy = curve(right_axis(axis), f"{name} accuracy")
    assert loss.get_xdata().tolist() == list(PAPER.alphas)
    assert loss.get_ydata().tolist() == list(PAPER.curves[name].loss)
    assert accuracy.get_ydata().tolist() == list(PAPER.curves[name].metrics["accuracy"])


@pytest.mark.parametrize(("name", "style"), [("train", "-"), ("test", "--")])
def test_training_is_solid_and_test_dashed(name, style):
    axis = drawn(PAPER)
    assert curve(axis, f"{name} loss").get_linestyle() == style
    assert curve(right_axis(axis), f"{name} accuracy").get_linestyle() == style


def test_loss_and_accuracy_have_colours_of_their_own():
    axis = drawn(PAPER)
    right = right_axis(axis)
    losses = {to_hex(curve(axis, f"{n} loss").get_color()) for n in ("train", "test")}
    metrics = {to_hex(curve(right, f"{n} accuracy").get_color()) for n in ("train", "test")}
    assert len(losses) == len(metrics) == 1
    assert losses != metrics


def test_legend_names_every_curve():
    axis = drawn(PAPER)
    texts = {t.get_text() for t in axis.get_legend().get_texts()}
    assert texts == {"train loss", "train accuracy", "test loss", "test accuracy"}


def test_the_two_minima_are_marked():
    axis = drawn(PAPER)
    upright = [line for line in axis.get_lines() if len(set(line.get_xdata())) == 1]
    assert sorted(line.get_xdata()[0] for line in upright) == [0.0, 1.0]
    marks = {t.get_text(): t.xy[0] for t in axis.texts}
    assert marks == {"start": 0.0, "end": 1.0}


def test_without_metrics_there_is_no_right_axis():
    axis = drawn(interpolation())
    assert right_axis(axis) is None


def test_metrics_that_only_some_data_have_are_drawn_where_they_are():
    result = dataclasses.replace(
        PAPER, curves={"train": PAPER.curves["train"], "test": fm.Curve((1.0,) * 5, {})}
    )
    axis = drawn(result)
    labels = [line.get_label() for line in right_axis(axis).get_lines()]
    assert labels == ["train accuracy"]


def test_several_metrics_are_told_apart():
    metrics = {"accuracy": [0.5] * 5, "top five": [0.9] * 5}
    axis = drawn(interpolation(metrics=metrics))
    right = right_axis(axis)
    assert right.get_ylabel() == "accuracy, top five"
    assert len({to_hex(line.get_color()) for line in right.get_lines()}) == 2


@pytest.mark.parametrize("losses", [(1.0, 0.0, 2.0), (1.0, -1.0, 2.0), (-3.0, -1.0, -2.0)])
def test_loss_axis_is_linear_where_a_loss_is_not_positive(losses):
    axis = drawn(interpolation(losses))
    assert axis.get_yscale() == "linear"
    assert curve(axis, "train loss").get_ydata().tolist() == list(losses)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_values_that_are_not_finite_leave_gaps(bad):
    axis = drawn(interpolation((3.0, 0.1, bad, 0.2, 4.0)))
    line = curve(axis, "train loss")
    assert np.isnan(line.get_ydata()).tolist() == [False, False, True, False, False]
    assert axis.get_yscale() == "log"
    low, high = axis.get_ylim()
    assert 0 < low < 0.1
    assert 4.0 < high < 100


def test_points_between_gaps_are_seen():
    line = curve(drawn(interpolation((NAN, 0.1, NAN, 0.2, NAN))), "train loss")
    assert line.get_marker() not in ("", "None", None)


def test_curve_without_a_finite_value_can_be_drawn():
    assert np.isnan(curve(drawn(interpolation((NAN, INF, NAN))), "train loss").get_ydata()).all()


def test_points_out_of_order_are_drawn_in_order():
    result = interpolation((1.0, 3.0, 2.0), alphas=(0.0, 1.0, 0.5))
    line = curve(drawn(result), "train loss")
    assert line.get_xdata().tolist() == [0.0, 0.5, 1.0]
    assert line.get_ydata().tolist() == [1.0, 2.0, 3.0]


def test_rounding_of_a_constant_metric_does_not_look_like_a_change():
    metrics = {"accuracy": [1.0, 1.0 - 1e-9, 1.0, 1.0, 1.0 - 1e-9]}
    low, high = right_axis(drawn(interpolation(metrics=metrics))).get_ylim()
    assert high - low >= 0.1
    assert low < 1.0 < high


def test_single_point_can_be_drawn():
    assert drawn(interpolation((0.5,), alphas=(0.0,))).has_data()


# -------------------------------------------------------------------------------- eigenvalues


def test_eigenvalues_are_points_with_their_residuals():
    wide = dataclasses.replace(EIGEN, residuals=torch.tensor([0.5, 0.25, 0.125]).double())
    axis = drawn(wide)
    ((points, _, (bars,)),) = axis.containers
    assert points.get_xdata().tolist() == [1, 2, 3]
    assert points.get_ydata().tolist() == wide.eigenvalues.tolist()
    spans = [segment[:, 1] for segment in bars.get_segments()]
    assert [(high - low) / 2 for low, high in spans] == pytest.approx([0.5, 0.25, 0.125])
    assert axis.get_ylabel() == "eigenvalue"
    assert "LM" in axis.get_xlabel()
    assert axis.get_title() == ""


def test_eigenvalues_that_did_not_converge_say_so():
    late = dataclasses.replace(EIGEN, outcome=fm.Outcome.PRODUCT_LIMIT)
    assert "not converged" in drawn(late).get_title()


def test_eigenvalue_axis_counts_in_whole_numbers():
    ticks = drawn(EIGEN).get_xticks()
    assert all(t == round(t) for t in ticks)


# ------------------------------------------------------------------------------ random sharpness


def test_random_sharpness_has_a_bar_for_each_tensor():
    axis = drawn(SHAKEN)
    assert [t.get_text() for t in axis.get_yticklabels()] == ["weight", "bias"]
    widths = [bar.get_width() for bar in axis.patches]
    assert widths == [t.value for t in SHAKEN.tensors]


@pytest.mark.parametrize("bad", [NAN, INF])
def test_random_sharpness_that_is_not_finite_can_be_drawn(bad):
    first = dataclasses.replace(SHAKEN.tensors[0], value=bad, mean=bad, standard_deviation=NAN)
    axis = drawn(dataclasses.replace(SHAKEN, tensors=(first, SHAKEN.tensors[1])))
    assert all(map(math.isfinite, axis.get_xlim()))


# -------------------------------------------------------------------------------------- layers


def test_every_module_has_two_bars_with_its_name_beside_them():
    axis = drawn(LAYERS)
    labels = [t.get_text() for t in axis.get_yticklabels()]
    assert labels == ["(own)", "encoder.0", "head"]
    traces, eigenvalues = axis.patches[:3], axis.patches[3:]
    assert [bar.get_width() for bar in traces] == [v.trace for v in LAYERS.layers]
    assert [bar.get_width() for bar in eigenvalues] == [v.eigenvalue for v in LAYERS.layers]
    # Each pair lies at the tick that names it.
    for pair in (traces, eigenvalues):
        for bar, tick in zip(pair, axis.get_yticks(), strict=True):
            assert bar.get_y() - 0.5 < tick < bar.get_y() + bar.get_height() + 0.5
    texts = [t.get_text() for t in axis.get_legend().get_texts()]
    assert texts == ["trace", "largest eigenvalue"]
    assert axis.yaxis_inverted()


@pytest.mark.parametrize("low", [-0.2, -300.0, 0.0, 0.002])
def test_layers_of_all_sizes_and_signs_are_seen(low):
    made = layers(layer("a", 1e3, 1.0, 1e2), layer("b", low, 0.1, 0.01), layer("c", 5.0, 0.1, 0.3))
    axis = drawn(made)
    assert axis.get_xscale() != "linear"
    left, right = axis.get_xlim()
    assert left <= low
    assert right >= 1e3


def test_errors_of_layers_are_drawn():
    axis = drawn(LAYERS)
    segments = [s for c in axis.collections for s in c.get_segments()]
    ends = sorted((min(s[:, 0]), max(s[:, 0])) for s in segments)
    expected = [(v.trace - v.trace_error, v.trace + v.trace_error) for v in LAYERS.layers]
    expected += [(v.eigenvalue - v.residual, v.eigenvalue + v.residual) for v in LAYERS.layers]
    np.testing.assert_allclose(ends, sorted(expected))


@pytest.mark.parametrize(
    "made",
    [
        layers(layer("flat", 0.0, 0.0, 0.0, 0.0)),
        layers(layer("one", 2.0)),
        layers(layer("a", NAN, NAN, INF, INF), layer("b")),
        layers(*(layer(f"encoder.{i}.attention.projection", i + 1.0) for i in range(30))),
    ],
    ids=["zero", "single", "not finite", "many"],
)
def test_layers_of_any_kind_can_be_drawn(made):
    axis = drawn(made)
    assert len(axis.get_yticklabels()) == len(made.layers)
    assert all(map(math.isfinite, axis.get_xlim()))


def test_layers_that_were_measured_can_be_drawn():
    result = fm.layerwise(OBJECTIVE, trace_products=2)
    axis = drawn(result)
    assert [t.get_text() for t in axis.get_yticklabels()] == ["(own)"]
    assert axis.patches[0].get_width() == result.layers[0].trace


# ------------------------------------------------------------------------- traces of modules


def widths(axis: Axes) -> list[list[float]]:
    return [[bar.get_width() for bar in c] for c in axis.containers if hasattr(c, "patches")]


def names_at(axis: Axes) -> list[str]:
    return [t.get_text() for t in axis.get_yticklabels()]


def test_every_module_of_a_trace_has_a_bar_with_its_error():
    axis = drawn(TRACE)
    assert names_at(axis) == ["(own)", "encoder.0", "head"]
    assert widths(axis) == [[0.5, -2.0, 100.0]]
    segments = sorted(tuple(s[:, 0]) for c in axis.collections for s in c.get_segments())
    assert segments == [(-2.125, -1.875), (0.375, 0.625), (99.875, 100.125)]
    assert axis.yaxis_inverted()
    assert axis.get_legend() is None
    assert axis.get_xscale() == "symlog"
    assert drawn(modules(("a", 1.0), ("b", 1e4))).get_xscale() == "log"


def test_trace_without_modules_is_one_bar():
    axis = drawn(RESULTS["trace of a matrix"])
    assert names_at(axis) == ["(all parameters)"]
    assert widths(axis) == [[RESULTS["trace of a matrix"].value]]
    assert axis.get_xlabel() == "trace"


def test_only_the_largest_modules_are_drawn_in_the_order_of_the_model():
    many = [(f"layers.{i}", (-1.0) ** i * (i * 7 % 31 + 1)) for i in range(31)]
    axis = drawn(modules(*many))
    largest = {name for name, value in many if abs(value) > 11}
    assert names_at(axis) == [name for name, _ in many if name in largest]
    assert len(largest) == 20
    assert "(the 20 largest of 31 modules)" in axis.get_xlabel()
    assert "largest" not in drawn(modules(*many[:20])).get_xlabel()


def test_long_names_are_shown_by_their_ends_unless_these_are_alike():
    long = "transformer.encoder.layers.{}.attention.self.query"
    axis = drawn(modules((long.format(0), 1.0), (long.format(11), 2.0), ("head", 3.0)))
    assert names_at(axis) == [
        "…layers.0.attention.self.query",
        "…layers.11.attention.self.query",
        "head",
    ]
    alike = [f"{side}.blocks.first_of_them.attention.self.query" for side in ("left", "right")]
    assert names_at(drawn(modules((alike[0], 1.0), (alike[1], 2.0)))) == alike
    assert names_at(drawn(modules((60 * "x", 1.0), ("y", 2.0)))) == ["…" + 35 * "x", "y"]


@pytest.mark.parametrize("bad", [NAN, INF, 0.0])
def test_traces_of_any_kind_can_be_drawn(bad):
    axis = drawn(modules(("a", bad), ("b", 1.0), error=NAN))
    assert all(map(math.isfinite, axis.get_xlim()))
    assert names_at(axis) == ["a", "b"]


# -------------------------------------------------------------------------------------- report


def test_report_has_the_traces_of_its_modules_below():
    axis = drawn(DEEP)
    first, below = axis.figure.axes
    assert first is axis
    assert names_at(below) == ["0", "2"]
    assert widths(below) == [
        [block.value for block in DEEP.trace.modules],
        [block.value for block in DEEP.gauss_newton_trace.modules],
    ]
    texts = [t.get_text() for t in below.get_legend().get_texts()]
    assert texts == ["Hessian", "Gauss–Newton matrix"]
    for pair in spans(below):
        for (low, high), tick in zip(pair, below.get_yticks(), strict=True):
            assert tick - 0.5 < low < high < tick + 0.5


def spans(axis: Axes) -> list[list[tuple[float, float]]]:
    """Where bars begin and end on the upright axis."""
    return [
        [(bar.get_y(), bar.get_y() + bar.get_height()) for bar in c]
        for c in axis.containers
        if hasattr(c, "patches")
    ]


@pytest.mark.parametrize(
    ("field", "label"), [("trace", "Gauss–Newton matrix"), ("gauss_newton_trace", "Hessian")]
)
def test_one_trace_says_whose_it_is(field, label):
    _, below = drawn(dataclasses.replace(DEEP, **{field: None})).figure.axes
    assert [t.get_text() for t in below.get_legend().get_texts()] == [label]
    assert len(widths(below)) == 1


def test_report_has_one_axis_where_modules_add_nothing():
    assert len(drawn(REPORT).figure.axes) == 1
    bare_of_traces = dataclasses.replace(DEEP, trace=None, gauss_newton_trace=None)
    assert len(drawn(bare_of_traces).figure.axes) == 1
    figure, axis = plt.subplots()
    drawn(DEEP, ax=axis)
    assert figure.axes == [axis]


def bare(**changes) -> fm.SharpnessReport:
    return dataclasses.replace(
        REPORT,
        **{
            "gradient_norm": None,
            "epsilon_sharpness": (),
            "random_sharpness": None,
            "largest": None,
            "smallest": None,
            "trace": None,
            "gauss_newton_largest": None,
            "gauss_newton_trace": None,
            "results": {},
        }
        | changes,
    )


def test_report_has_a_bar_for_each_measurement():
    axis = drawn(REPORT)
    lines = REPORT.measurements()
    assert [bar.get_width() for bar in axis.patches] == [abs(line.value) for line in lines]
    assert axis.get_xscale() == "log"
    labels = [t.get_text() for t in axis.get_yticklabels()]
    assert len(labels) == len(lines)
    assert all(line.name in label for line, label in zip(lines, labels, strict=True))


def test_negative_numbers_are_told_from_positive_ones():
    trace = fm.TraceResult(-4.0, 1.0, 8, 10, fm.Outcome.COMPLETED)
    axis = drawn(bare(loss=2.0, trace=trace))
    labels = [t.get_text() for t in axis.get_yticklabels()]
    assert labels == ["loss L(θ)", "−(trace of the Hessian)"]
    colors = [to_hex(bar.get_facecolor()) for bar in axis.patches]
    assert len(set(colors)) == 2


def numbers_on(axis: Axes) -> list[str]:
    """The labels that are seen on the axis at the bottom."""
    low, high = axis.get_xlim()
    ticks = [*axis.xaxis.get_major_ticks(), *axis.xaxis.get_minor_ticks()]
    labels = [t.label1 for t in ticks if low <= t.get_loc() <= high]
    return [label.get_text() for label in labels if label.get_text()]


def apart(axis: Axes) -> bool:
    """Whether the labels at the bottom leave each other room."""
    ticks = [*axis.xaxis.get_major_ticks(), *axis.xaxis.get_minor_ticks()]
    low, high = axis.get_xlim()
    shown = [t.label1 for t in ticks if low <= t.get_loc() <= high and t.label1.get_text()]
    boxes = sorted((b.x0, b.x1) for b in (label.get_window_extent() for label in shown))
    return all(one[1] < other[0] for one, other in itertools.pairwise(boxes))


@pytest.mark.parametrize(
    "values",
    [
        (1.0, 2.0),
        (0.7, 8.0),
        (0.3, 20.0),
        (1e-4, 1e3),
        (-0.02, 1.7),
        (-300.0, 0.1),
        (0.0, 4.0),
        (-5.0, 4.0),
    ],
)
def test_labels_of_numbers_are_apart_and_more_than_one(values):
    axis = drawn(modules(*zip("ab", values, strict=True), error=0.0))
    assert apart(axis)
    assert len(numbers_on(axis)) >= 2
    axis = drawn(bare(loss=abs(values[0]), gradient_norm=values[1]))
    assert apart(axis)
    assert len(numbers_on(axis)) >= (2 if values[0] else 1)


@pytest.mark.parametrize("loss", [0.0, NAN, INF, 1e-300])
def test_report_with_an_extreme_number_can_be_drawn(loss):
    axis = drawn(bare(loss=loss, gradient_norm=2.0))
    assert all(map(math.isfinite, axis.get_xlim()))
    assert axis.get_yticklabels()[0].get_text() == "loss L(θ)"


def test_report_of_the_loss_alone_can_be_drawn():
    assert drawn(bare()).get_title().startswith("Linear: 8 parameters")


# ---------------------------------------------------------------------------------- comparison


def comparison(**ratios: tuple[float, ...]) -> fm.Comparison:
    count = len(next(iter(ratios.values())))
    values = {name: tuple((r,) for r in row) for name, row in ratios.items()}
    return fm.Comparison(
        labels=tuple(ratios),
        measures=tuple(f"measure {i}" for i in range(count)),
        values=values,
        ratio_of_means=ratios,
    )


def test_comparison_has_a_bar_from_one_to_each_ratio():
    axis = drawn(comparison(base=(1.0, 1.0), big=(3.0, 0.25)))
    ends = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axis.patches]
    assert ends == [(1.0, 3.0), (1.0, 0.25)]
    assert axis.get_xscale() == "log"
    assert [t.get_text() for t in axis.get_yticklabels()] == ["measure 0", "measure 1"]
    assert "base" in axis.get_xlabel()


def test_comparison_of_three_has_a_colour_for_each_of_the_others():
    axis = drawn(comparison(base=(1.0,), one=(2.0,), two=(5.0,)))
    assert [t.get_text() for t in axis.get_legend().get_texts()] == ["one", "two"]
    assert len({to_hex(bar.get_facecolor()) for bar in axis.patches}) == 2


@pytest.mark.parametrize("ratio", [-2.0, 0.0, NAN, INF])
def test_ratios_without_a_logarithm_are_left_out(ratio):
    axis = drawn(comparison(base=(1.0, 1.0), big=(ratio, 4.0)))
    assert [t.get_text() for t in axis.get_yticklabels()] == ["measure 1"]


def test_comparison_without_any_ratio_can_be_drawn():
    axis = drawn(comparison(base=(1.0,), big=(NAN,)))
    assert all(map(math.isfinite, axis.get_xlim()))


def test_comparison_of_equals_can_be_drawn():
    assert drawn(comparison(base=(1.0,), same=(1.0,))).get_xscale() == "log"


# --------------------------------------------------------------------------- spectral densities


def test_density_is_drawn_on_a_logarithmic_axis_with_the_outliers_marked():
    axis = drawn(DENSITY)
    assert (axis.get_xscale(), axis.get_yscale()) == ("linear", "log")
    marks = curve(axis, "taken out first")
    np.testing.assert_allclose(marks.get_xdata(), [80.0, -9.0], rtol=1e-5)
    np.testing.assert_allclose(
        marks.get_ydata(), 1 / (100 * DENSITY.sigma * math.sqrt(2 * math.pi)), rtol=1e-6
    )
    (line,) = [x for x in axis.get_lines() if len(x.get_xdata()) > 100]
    low, high = axis.get_xlim()
    assert low < -9 < 80 < high
    points = line.get_xdata()[::50]
    value, _ = DENSITY.density(points.tolist())
    shown = value.numpy() > axis.get_ylim()[0]
    np.testing.assert_allclose(line.get_ydata()[::50][shown], value.numpy()[shown])


def test_floor_of_the_picture_is_below_a_single_eigenvalue():
    axis = drawn(DENSITY)
    single = 1 / (100 * DENSITY.sigma * math.sqrt(2 * math.pi))
    low, high = axis.get_ylim()
    assert low == pytest.approx(single / 10)
    assert high > 50 * single


def test_every_node_is_met_by_a_point_of_the_line():
    axis = drawn(DENSITY)
    (line,) = [x for x in axis.get_lines() if len(x.get_xdata()) > 100]
    gaps = np.abs(np.subtract.outer(DENSITY.nodes.numpy().ravel(), line.get_xdata()))
    assert gaps.min(axis=1).max() < 0.01 * DENSITY.sigma


def test_band_is_two_standard_errors_wide():
    axis = drawn(DENSITY)
    (band,) = axis.collections
    vertices = band.get_paths()[0].vertices
    place = float(DENSITY.nodes[0].max())
    value, error = (float(x) for x in DENSITY.density([place]))
    near = vertices[np.abs(vertices[:, 0] - place) < 1e-6 * DENSITY.sigma][:, 1]
    assert near.max() == pytest.approx(value + 2 * error, rel=1e-3)


def test_both_signs_are_on_the_logarithmic_axis_and_what_has_no_place_is_told():
    logarithmic = DENSITY.rescaled(scale="log")
    axis = drawn(logarithmic)
    assert (axis.get_xscale(), axis.get_yscale()) == ("symlog", "log")
    assert axis.get_ylabel() == "density per decade"
    low, high = axis.get_xlim()
    assert low < -9 < 80 < high
    texts = [t.get_text() for t in axis.get_legend().get_texts()]
    share = 100 * logarithmic.unplaced_mass().value
    assert f"cannot be placed: {share:.3g} %" in texts
    ticks = axis.get_xticks()
    assert 2 <= len(ticks) <= 10
    assert (ticks < 0).any()
    assert (ticks > 0).any()


def test_positive_spectrum_leaves_the_negative_half_of_the_axis_out():
    operator = fm.MatrixOperator(torch.diag(torch.logspace(-2, 1, 60).double()))
    axis = drawn(fm.spectral_density(operator, probes=3, steps=60, scale="log"))
    low, high = axis.get_xlim()
    assert -0.01 < low < 0
    assert high > 10


# ------------------------------------------------------------------- noise, steps and rescaling


def test_local_energy_begins_at_the_origin_and_has_its_errors():
    axis = drawn(FAMILY["local_energy"])
    (line,) = [line for line in axis.get_lines() if len(line.get_xdata()) > 2]
    np.testing.assert_allclose(line.get_xdata(), [0, 0.1, 0.2, 0.4])
    assert line.get_ydata()[0] == 0
    np.testing.assert_allclose(line.get_ydata()[1:], FAMILY["local_energy"].rises)
    assert len(axis.collections) == 1
    assert axis.get_ylabel() == "rise of the loss"


def test_searches_mark_what_they_found():
    for name, found in (
        ("pac_bayes_sharpness", FAMILY["pac_bayes_sharpness"].sigma),
        ("critical_sharpness", FAMILY["critical_sharpness"].step),
    ):
        axis = drawn(FAMILY[name])
        (mark,) = [line for line in axis.get_lines() if "=" in str(line.get_label())]
        assert mark.get_xdata()[0] == found
        assert axis.get_xscale() == "log"
    assert not [line for line in drawn(BOUND).get_lines() if "=" in str(line.get_label())]


def test_ratios_after_rescaling_grow_from_one():
    axis = drawn(INVARIANCE)
    points = {line.get_label(): line.get_xdata() for line in axis.get_lines()}
    # The infinite one lies beyond the end of the others.
    np.testing.assert_allclose(points["per layer"], [1, 1e3, 2, 1, 3e3])
    np.testing.assert_allclose(points["per neuron"], [1, 0.25, 3, 1, 1])
    assert axis.get_xscale() == "log"
