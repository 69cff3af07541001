"""Results: frozen, comparable, readable, and the same after a trip through strict JSON."""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
import math
import operator
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch

import flatminima as fm
from flatminima.results import format_number

NAN, INF = math.nan, math.inf


def eigen(vectors: torch.Tensor | None = None, **changes) -> fm.EigenResult:
    fields = {
        "eigenvalues": torch.tensor([3.5, -1e-9], dtype=torch.float64),
        "eigenvectors": vectors,
        "residuals": torch.tensor([1e-7, 0.0], dtype=torch.float64),
        "outcome": fm.Outcome.CONVERGED,
        "products": 17,
        "which": "LA",
        "tol": 1e-3,
        "method": "lanczos",
    }
    return fm.EigenResult(**fields | changes)


def box(**changes) -> fm.EpsilonSharpnessResult:
    fields = {
        "value": 12.5,
        "loss": 0.1,
        "maximum": 0.2375,
        "epsilon": 1e-3,
        "subspace": None,
        "iterations": 10,
        "evaluations": 12,
        "outcome": fm.Outcome.ITERATION_LIMIT,
    }
    return fm.EpsilonSharpnessResult(**fields | changes)


TENSOR = fm.TensorSharpness("0.weight", 2.5, 1.25, 0.5)
SHAKEN = fm.RandomSharpnessResult(
    value=2.5,
    mean=1.25,
    standard_deviation=NAN,
    tensors=(TENSOR, fm.TensorSharpness("0.bias", INF, NAN, NAN)),
    loss=0.25,
    epsilon=1e-3,
    samples=1,
    scope="tensor",
    relative=True,
    resolution=1e-5,
    evaluations=3,
    outcome=fm.Outcome.NON_FINITE_POINTS,
)
BLOCKS = fm.BlockTrace("0", 6, 40.0, 1.25), fm.BlockTrace("1", 4, 2.5, NAN)
TRACE = fm.TraceResult(
    42.5,
    1.5,
    10,
    100,
    fm.Outcome.COMPLETED,
    "xtrace",
    tensors=(fm.BlockTrace("0.weight", 6, 40.0, 1.25),),
    modules=BLOCKS,
)
DIAGONAL = fm.DiagonalResult(
    values=torch.tensor([1.5, -2.5, 4.0]),
    standard_error=torch.tensor([0.0, 3.0, 4.0]),
    products=60,
    outcome=fm.Outcome.WITHIN_RTOL,
    method="xdiag",
    names=("weight", "bias"),
    shapes=((1, 2), ()),
)
CURVE = fm.Curve((0.5, INF, NAN), {"accuracy": (0.9, 0.1, -INF)})
INTERPOLATION = fm.Interpolation(
    alphas=(-1.0, 0.0, 1.0),
    curves={"train": CURVE, "test": fm.Curve((1.0, 2.0, 3.0), {})},
    path="linear",
    buffers="keep",
    evaluations=6,
    outcome=fm.Outcome.NON_FINITE_POINTS,
    notes=("first", "second"),
)
REPORT = fm.SharpnessReport(
    model="Sequential",
    parameters=10,
    examples=5,
    mode="eval",
    loss=0.1,
    gradient_norm=1e-4,
    epsilon_sharpness=(box(), box(subspace=10, value=0.75)),
    random_sharpness=SHAKEN,
    largest=eigen(),
    smallest=eigen(which="SA"),
    trace=TRACE,
    notes=("a note",),
)
GRADIENT = fm.GradientNormResult(
    value=0.5,
    largest=0.25,
    tensors={"0.weight": 0.375, "0.bias": 0.0},
    loss=0.1,
    outcome=fm.Outcome.COMPLETED,
)
SAM = fm.SamSharpnessResult(
    value=0.5,
    loss=0.1,
    first_order=0.25,
    rho=0.05,
    norm=INF,
    steps=20,
    restarts=1,
    adaptive=True,
    m=16,
    groups=4,
    normalize_logits=True,
    gradients=9,
    losses=5,
    outcome=fm.Outcome.ITERATION_LIMIT,
    displacement=torch.tensor([0.1, -0.1]),
)
AVERAGE = fm.AverageSharpnessResult(
    value=0.5,
    standard_error=0.125,
    resolution=1e-7,
    loss=0.1,
    sigma=0.01,
    adaptive=False,
    samples=50,
    normalize_logits=False,
    evaluations=101,
    outcome=fm.Outcome.ABOVE_RTOL,
    readings=2,
)
PAC_BAYES = fm.PacBayesResult(
    value=100.0,
    standard_error=NAN,
    sigma=0.1,
    sigma_error=NAN,
    upper=INF,
    rise=0.05,
    target=0.1,
    on="error",
    base=0.01,
    adaptive=True,
    samples=20,
    sigmas=(0.05, 0.1),
    rises=(0.01, 0.05),
    evaluations=42,
    outcome=fm.Outcome.NOT_REACHED,
)
ENERGY = fm.LocalEnergyResult(
    value=0.125,
    standard_error=0.01,
    sigmas=(0.1, 0.5),
    rises=(0.0, 0.5),
    standard_errors=(0.0, NAN),
    on="loss",
    base=0.1,
    samples=20,
    evaluations=41,
    outcome=fm.Outcome.NON_FINITE_POINTS,
)
FISHER_RAO = fm.FisherRaoResult(
    value=2.25,
    error=0.0,
    kind="empirical",
    parameter_norm=4.0,
    products=1,
    outcome=fm.Outcome.COMPLETED,
)
WEIGHTS = fm.LayerFlatness("0.weight", 3, 2, 1.5, 0.25, 6, fm.Outcome.EXACT)
FLATNESS = fm.RelativeFlatnessResult(
    value=1.5,
    standard_error=0.25,
    layers=(WEIGHTS,),
    products=6,
    whole=True,
    outcome=fm.Outcome.COMPLETED,
)
CRITICAL = fm.CriticalSharpnessResult(
    value=INF,
    error=NAN,
    step=0.0,
    bracket=(0.0, INF),
    update_norm=2.0,
    loss=0.1,
    along="update",
    tried_steps=(0.5, 1.0),
    tried_losses=(0.2, INF),
    gradients=1,
    evaluations=2,
    outcome=fm.Outcome.NO_DESCENT,
)
INVARIANCE = fm.InvarianceTable(
    measures=("loss L(θ)", "gradient norm ‖∇L‖"),
    values=(0.1, 0.0),
    rescaled={"layer": (0.1, 2.0), "neuron": (0.1, 0.0)},
    ratios={"layer": (1.0, INF), "neuron": (1.0, NAN)},
    factor=10.0,
    loss_change=1e-12,
    tolerance=0.01,
    notes=("a note",),
)
LINE = fm.Interpolation(
    alphas=(0.0, 0.5, 1.0),
    curves={"train": fm.Curve((1.0, 3.0, 1.5), {})},
    path="bezier",
    buffers="recompute",
    evaluations=6,
    outcome=fm.Outcome.COMPLETED,
)
LANDSCAPES = {
    "barrier": fm.Barrier(1.75, 0.5, "loss", "train"),
    "connection": fm.Connection(
        curve=LINE,
        line=dataclasses.replace(LINE, path="linear"),
        bend=torch.tensor([0.1, NAN]),
        history=(2.0, INF),
        steps=2,
        points_per_step=1,
        learning_rate=0.01,
        gradients=2,
        outcome=fm.Outcome.COMPLETED,
    ),
    "permutations": fm.Permutations({"0": (2, 0, 1)}, 2.5, 0.5, 3, fm.Outcome.STATIONARY),
    "directions": fm.Directions(torch.eye(3)[:, :2], ("a", "b"), ("‖θ‖", "filter norms"), ("n",)),
    "grid": fm.Grid(torch.tensor([[1.0, NAN], [INF, 0.0]]).double(), {}),
    "surface": fm.Surface(
        coordinates=((-1.0, 0.0), (0.0, 0.5)),
        grids={
            "train": fm.Grid(
                torch.tensor([[1.0, NAN], [INF, 0.0]]).double(),
                {"accuracy": torch.tensor([[1.0, 0.5], [0.0, 0.25]]).double()},
            )
        },
        labels=("a", "b"),
        units=("‖θ‖", "filter norms"),
        evaluations=4,
        outcome=fm.Outcome.NON_FINITE_POINTS,
        notes=("a note",),
    ),
    "principal components": fm.PrincipalResult(
        variance=torch.tensor([2.0, 0.5]).double(),
        total_variance=3.0,
        coordinates=torch.tensor([[1.0, 2.0], [0.0, 0.0]]).double(),
        distances=torch.tensor([0.5, 0.0]).double(),
        steps=(0, 10),
        center="last",
        vectors=torch.eye(3)[:, :2],
        origin=torch.zeros(3),
        parameters=("weight", "bias"),
        dtype="float32",
    ),
    "losses of a trajectory": fm.TrajectoryLosses(
        steps=(0, 10),
        loss=(1.0, NAN),
        plane_loss=(2.0, 0.5),
        distances=(0.5, 0.0),
        evaluations=4,
        outcome=fm.Outcome.NON_FINITE_POINTS,
    ),
}
WHOLE_REPORT = dataclasses.replace(
    REPORT,
    results={"sam_sharpness": (SAM, SAM), "critical_sharpness": (CRITICAL,)},
    gauss_newton_largest=eigen(),
    gauss_newton_trace=dataclasses.replace(TRACE, value=21.25),
    density=fm.SpectralDensity(
        size=10,
        nodes=torch.tensor([[-1.0, 2.0], [0.5, 0.5]]).double(),
        weights=torch.tensor([[0.25, 0.75], [1.0, 0.0]]).double(),
        complete=(False, True),
        eigenvalues=torch.tensor([50.0, -7.0]).double(),
        sigma=0.125,
        scale="linear",
        resolution=1e-6,
        products=904,
        outcome=fm.Outcome.COMPLETED,
    ),
)
BARE = dataclasses.replace(
    REPORT,
    gradient_norm=None,
    epsilon_sharpness=(),
    random_sharpness=None,
    largest=None,
    smallest=None,
    trace=None,
    notes=(),
)
COMPARISON = fm.Comparison(
    labels=("small", "large"),
    measures=("loss L(θ)", "trace"),
    values={"small": ((0.1, 0.2), (0.0, 0.0)), "large": ((0.3, 0.5), (1.0, 2.0))},
    ratio_of_means={"small": (1.0, NAN), "large": (8 / 3, NAN)},
    notes=("not made alike",),
)

VECTORS = torch.tensor([[0.1, 1 / 3], [-2.0, 1e-30], [0.0, 7.0]])

DENSITY = fm.SpectralDensity(
    size=10,
    nodes=torch.tensor([[-1.0, 2.0], [0.5, 0.5]]).double(),
    weights=torch.tensor([[0.25, 0.75], [1.0, 0.0]]).double(),
    complete=(False, True),
    eigenvalues=torch.tensor([50.0, -7.0]).double(),
    sigma=0.125,
    scale="log",
    resolution=1e-6,
    products=9,
    outcome=fm.Outcome.COMPLETED,
    readings=3,
    notes=("a note",),
)

LAYER = fm.LayerCurvature("0", 9, 2.25, 0.5, -1.5, 1e-3, 11, fm.Outcome.CONVERGED)

RESULTS = {
    "eigenpairs": eigen(),
    "eigenpairs with float32 vectors": eigen(VECTORS),
    "eigenpairs with float64 vectors": eigen(VECTORS.double()),
    "eigenpairs with transposed vectors": eigen(torch.arange(10.0).reshape(2, 5).T),
    "eigenpairs with bfloat16 vectors": eigen(VECTORS.bfloat16()),
    "eigenpairs that are not finite": eigen(
        torch.tensor([[NAN, INF], [-INF, 0.0]]),
        eigenvalues=torch.tensor([NAN, -INF], dtype=torch.float64),
        residuals=torch.tensor([INF, NAN], dtype=torch.float64),
        outcome=fm.Outcome.PRODUCT_LIMIT,
    ),
    "no eigenpairs": eigen(
        torch.empty(4, 0),
        eigenvalues=torch.empty(0, dtype=torch.float64),
        residuals=torch.empty(0, dtype=torch.float64),
    ),
    "sharpness": box(),
    "sharpness in a subspace": box(subspace=100, displacement=torch.tensor([0.1, NAN])),
    "sharpness with a float64 displacement": box(displacement=torch.tensor([0.1]).double()),
    "one tensor": TENSOR,
    "random sharpness": SHAKEN,
    "trace": TRACE,
    "block of a trace": BLOCKS[0],
    "diagonal": DIAGONAL,
    "diagonal of no parameters": dataclasses.replace(DIAGONAL, names=(), shapes=()),
    "layer": LAYER,
    "layers": fm.LayerwiseResult(
        (LAYER, dataclasses.replace(LAYER, name="", outcome=fm.Outcome.PRODUCT_LIMIT)),
        trace=4.5,
        trace_products=50,
        passes=12,
        outcome=fm.Outcome.PRODUCT_LIMIT,
        notes=("Products are differences.",),
    ),
    "trace that is not finite": fm.TraceResult(NAN, INF, 3, 2, fm.Outcome.COMPLETED),
    "estimate": fm.Estimate(3.0, 0.25),
    "spectral density": DENSITY,
    "spectral density without outliers": dataclasses.replace(
        DENSITY, eigenvalues=torch.empty(0).double()
    ),
    "spectral density of outliers alone": dataclasses.replace(
        DENSITY, nodes=torch.empty(2, 0).double(), weights=torch.empty(2, 0).double()
    ),
    "log-determinant": fm.LogDeterminantResult(
        value=-12.5,
        standard_error=0.75,
        quadrature_error=INF,
        shift=0.1,
        size=10,
        smallest=-0.0625,
        products=60,
        outcome=fm.Outcome.COMPLETED,
    ),
    "log evidence": fm.LaplaceResult(
        value=-140.5,
        standard_error=0.75,
        quadrature_error=INF,
        log_likelihood=-120.25,
        log_prior=-5.5,
        log_volume=-14.75,
        prior_precision=0.5,
        optimised=True,
        effective_parameters=7.25,
        observations=60.0,
        size=10,
        products=90,
        outcome=fm.Outcome.COMPLETED,
        notes=("a note",),
    ),
    "gradient norm": GRADIENT,
    "SAM sharpness": SAM,
    "average sharpness": AVERAGE,
    "PAC-Bayes sharpness": PAC_BAYES,
    "local energy": ENERGY,
    "Fisher–Rao norm": FISHER_RAO,
    "flatness of a layer": WEIGHTS,
    "relative flatness": FLATNESS,
    "critical sharpness": CRITICAL,
    "invariance": INVARIANCE,
    **LANDSCAPES,
    "curve": CURVE,
    "interpolation": INTERPOLATION,
    "measurement": fm.Measurement("name", 1.5, None, "", None, "1 loss"),
    "measurement with an error": fm.Measurement(
        "name", -INF, 0.5, "residual", fm.Outcome.PRODUCT_LIMIT, "9 products"
    ),
    "report": REPORT,
    "report with everything": WHOLE_REPORT,
    "bare report": BARE,
    "comparison": COMPARISON,
}

every = pytest.mark.parametrize("name", RESULTS)


def refuse(constant: str):
    raise AssertionError(f"{constant} is not JSON")


def test_two_results_of_one_name_are_refused():
    # Saved results are found by the name of their class.
    with pytest.raises(TypeError, match="'TraceResult' exists in flatminima"):
        type("TraceResult", (fm.Result,), {})


def test_every_result_class_is_here():
    kinds = set()

    def collect(kind: type) -> None:
        for child in kind.__subclasses__():
            if child.__module__.startswith("flatminima."):
                kinds.add(child)
            collect(child)

    collect(fm.Result)
    # What all measures have in common is no result by itself.
    assert kinds - {fm.MeasureResult} == {type(r) for r in RESULTS.values()}


# -------------------------------------------------------------------------------------- JSON


def test_results_of_files_not_loaded_yet_are_read():
    script = "import sys, flatminima as fm; print(type(fm.Result.from_json(sys.stdin.read())))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=SAM.to_json(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "SamSharpnessResult" in done.stdout


@every
def test_json_gives_an_equal_result_back(name):
    result = RESULTS[name]
    text = result.to_json()
    assert type(result).from_json(text) == result
    assert type(result).from_dict(result.to_dict()) == result
    assert fm.Result.from_json(text) == result
    assert type(fm.Result.from_json(text)) is type(result)
    assert type(result).from_json(text).to_json() == text


@every
@pytest.mark.parametrize("indent", [None, 2])
def test_json_is_strict_and_plain(name, indent):
    text = RESULTS[name].to_json(indent=indent)
    data = json.loads(text, parse_constant=refuse)
    assert data == RESULTS[name].to_dict()
    assert (data["type"], data["version"]) == (type(RESULTS[name]).__name__, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (0,), (1, 1), (2, 0)])
def test_tensors_come_back_bit_for_bit(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    back = fm.EpsilonSharpnessResult.from_json(box(displacement=tensor).to_json()).displacement
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(back, tensor)


def test_nan_and_infinity_come_back_inside_tensors():
    back = fm.EigenResult.from_json(RESULTS["eigenpairs that are not finite"].to_json())
    assert back.eigenvalues.isnan().tolist() == [True, False]
    assert back.eigenvalues[1] == -INF
    assert back.eigenvectors.isnan().tolist() == [[True, False], [False, False]]


def test_vectors_are_base64_of_their_bytes():
    field = eigen(VECTORS).to_dict()["eigenvectors"]
    raw = base64.b64decode(field["base64"], validate=True)
    assert raw == VECTORS.numpy().tobytes()
    assert (field["dtype"], field["shape"]) == ("float32", [3, 2])


def test_types_survive_not_just_values():
    back = fm.SharpnessReport.from_json(REPORT.to_json())
    assert isinstance(back.epsilon_sharpness, tuple)
    assert isinstance(back.epsilon_sharpness[0], fm.EpsilonSharpnessResult)
    assert isinstance(back.random_sharpness.tensors[0], fm.TensorSharpness)
    assert isinstance(back.largest.eigenvalues, torch.Tensor)
    assert back.largest.outcome is fm.Outcome.CONVERGED
    assert isinstance(back.loss, float)
    assert isinstance(back.parameters, int)
    curve = fm.Interpolation.from_json(INTERPOLATION.to_json()).curves["train"]
    assert isinstance(curve, fm.Curve)
    assert isinstance(curve.metrics["accuracy"], tuple)


def test_integers_in_a_float_field_come_back_as_floats():
    data = box().to_dict() | {"value": 3}
    assert isinstance(fm.EpsilonSharpnessResult.from_dict(data).value, float)


def test_without_vectors_drops_them_from_the_json():
    result = eigen(VECTORS).without_vectors()
    assert result.eigenvectors is None
    assert result.to_dict()["eigenvectors"] is None
    assert result == eigen()


def test_data_of_another_class_are_refused_by_name():
    with pytest.raises(fm.InvalidArgumentError, match="'TraceResult', not of EigenResult"):
        fm.EigenResult.from_json(TRACE.to_json())


def test_unknown_class_is_refused_with_the_nearest():
    data = TRACE.to_dict() | {"type": "TraceResults"}
    with pytest.raises(fm.InvalidArgumentError, match="Did you mean 'TraceResult'"):
        fm.Result.from_dict(data)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_data_of_another_version_are_refused(version):
    data = TRACE.to_dict() | {"version": version}
    with pytest.raises(fm.InvalidArgumentError, match="this release reads version 1"):
        fm.TraceResult.from_dict(data)


@pytest.mark.parametrize("field", ["value", "products", "outcome"])
def test_missing_fields_are_named(field):
    data = TRACE.to_dict()
    del data[field]
    with pytest.raises(fm.InvalidArgumentError, match=f"TraceResult data without {field}"):
        fm.TraceResult.from_dict(data)


@pytest.mark.parametrize("text", ["", "{", "not json", "[1, 2]", "3", "null", '{"a": 1}'])
def test_text_that_is_no_result_is_refused(text):
    with pytest.raises(fm.InvalidArgumentError, match=r"TraceResult\.from_"):
        fm.TraceResult.from_json(text)


@pytest.mark.parametrize("changes", [{"outcome": "FINISHED"}, {"value": "many"}])
def test_field_that_cannot_be_read_is_named(changes):
    (field,) = changes
    with pytest.raises(fm.InvalidArgumentError, match=f"TraceResult data.*'{field}'"):
        fm.TraceResult.from_dict(TRACE.to_dict() | changes)


# ------------------------------------------------------------------------- frozen, comparable


@every
def test_results_are_frozen(name):
    result = RESULTS[name]
    for field in dataclasses.fields(result):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(result, field.name, None)


@every
def test_result_equals_its_copy_and_no_other(name):
    result = RESULTS[name]
    assert result == dataclasses.replace(result)
    assert [n for n, other in RESULTS.items() if other == result] == [name]
    assert result != "something else"
    assert not operator.ne(result, dataclasses.replace(result))


@every
def test_every_field_counts_in_a_comparison(name):
    result = RESULTS[name]
    for field in dataclasses.fields(result):
        # Not by `replace`, as a result may refuse what does not fit.
        changed = copy.copy(result)
        object.__setattr__(changed, field.name, "something else")
        assert changed != result


def test_one_bit_of_a_vector_makes_a_difference():
    other = VECTORS.clone()
    other[1, 1] = torch.nextafter(other[1, 1], torch.tensor(1.0))
    assert eigen(VECTORS) != eigen(other)
    assert eigen(VECTORS) != eigen(VECTORS.double())


def test_results_cannot_be_hashed_by_accident():
    with pytest.raises(TypeError, match="unhashable"):
        hash(TRACE)


# ----------------------------------------------------------------------------- for people


NUMBERS = {
    "eigenpairs": ["3.5", "-1.00000e-09", "1.00e-07", "17 products"],
    "sharpness": ["12.5", "0.1", "0.2375", "12", "0.001", "full space"],
    "sharpness in a subspace": ["p = 100"],
    "one tensor": ["0.weight", "2.5", "1.25", "0.5"],
    "random sharpness": ["2.5", "1.25", "0.bias", "∞", "NaN", "1.0e-05"],
    "trace": ["42.5", "1.5", "4.25", "0.15", "XTrace, 100 products", "1.2", "NaN"],
    "block of a trace": ["0", "40", "1.2"],
    "diagonal": ["weight", "bias", "-2.5", "4", "2.1", "XDiag, 60 products"],
    "diagonal of no parameters": ["all", "2.9"],
    "estimate": ["3", "0.25"],
    "spectral density": ["50", "-7", "2 of them taken out", "9 products", "3 times", "a note"],
    "log-determinant": ["-12.5", "0.75", "∞", "0.1", "-0.0625", "60 products"],
    "log evidence": ["-140.5", "0.75", "-120.2", "-5.5", "optimised", "7.25", "∞", "90 products"],
    "curve": ["0.5", "∞", "NaN", "0.9", "−∞", "accuracy"],
    "interpolation": ["-1", "train loss", "test loss", "train accuracy", "first", "second"],
    "measurement with an error": ["−∞", "0.5 (residual)", "NOT CONVERGED", "9 products"],
    "report": ["Sequential", "10 parameters", "5 examples", "12.5", "42.5", "a note", "λ₁", "λₙ"],
    "report with everything": ["42.5", "21.25", "904 products", "stable rank", "negative"],
    "bare report": ["loss L(θ)", "0.1"],
    "comparison": ["small", "large", "0.15 ± 0.071", "2.67", "NaN", "2 seeds", "not made alike"],
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "how", [repr, str, lambda r: r._repr_html_(), lambda r: r.table().to_text()]
)
def test_numbers_are_shown(name, how):
    shown = how(RESULTS[name])
    assert [n for n in NUMBERS[name] if n not in shown] == []


@every
def test_text_and_html_can_be_made_of_every_result(name):
    result = RESULTS[name]
    assert result.table().to_text() == repr(result) == str(result)
    parser = Cells()
    parser.feed(result._repr_html_())
    table = result.table()
    assert parser.open == []
    assert parser.cells == [cell for row in (table.header, *table.rows) for cell in row]


class Cells(HTMLParser):
    """The texts of the cells, and the tags left open."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


NASTY = "<script>alert('&')</script>"


@pytest.mark.parametrize("part", ["header", "rows", "title", "notes"])
def test_html_is_escaped(part):
    parts = {
        "header": {"header": (NASTY,)},
        "rows": {"rows": ((NASTY,),)},
        "title": {"title": NASTY},
        "notes": {"notes": (NASTY,)},
    }
    table = fm.Table(**{"header": ("a",), "rows": (("b",),)} | parts[part])
    shown = table.to_html()
    assert "<script" not in shown
    assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)" in shown


def test_names_of_the_users_are_escaped_in_a_report():
    shown = dataclasses.replace(REPORT, model=NASTY)._repr_html_()
    assert "<script" not in shown


# ------------------------------------------------------------------------------------ tables


TABLE = fm.Table(
    header=("name", "value", "said"),
    rows=(("a", "1.5", "fine"), ("longer name", "−∞", "1 product"), ("c", "", "")),
    title="A title",
    notes=("One note.",),
)


def test_text_table_aligns_names_left_and_numbers_right():
    assert TABLE.to_text().splitlines() == [
        "A title",
        "name         value  said",
        "───────────  ─────  ─────────",
        "a              1.5  fine",
        "longer name     −∞  1 product",
        "c",
        "Note: One note.",
    ]


def test_markdown_table():
    assert TABLE.to_markdown().splitlines() == [
        "**A title**",
        "",
        "| name | value | said |",
        "| --- | ---: | --- |",
        "| a | 1.5 | fine |",
        "| longer name | −∞ | 1 product |",
        "| c |  |  |",
        "",
        "One note.",
    ]


def test_bars_are_escaped_in_markdown():
    table = fm.Table(("a|b",), (("|x|",),))
    assert table.to_markdown().splitlines() == ["| a\\|b |", "| --- |", "| \\|x\\| |"]


def test_html_table_aligns_like_the_text():
    shown = TABLE.to_html()
    assert '<td style="text-align:right">1.5</td>' in shown
    assert '<td style="text-align:left">fine</td>' in shown
    assert "<caption>A title</caption>" in shown
    assert "One note." in shown


def test_table_without_rows_has_a_header():
    assert fm.Table(("a", "b"), ()).to_text() == "a  b\n─  ─"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (2.5, "2.5"),
        (-2.5, "-2.5"),
        (0.001, "0.001"),
        (0.00099, "9.900e-04"),
        (12345.678, "1.235e+04"),
        (1e5, "1.000e+05"),
        (-1e-12, "-1.000e-12"),
        (NAN, "NaN"),
        (INF, "∞"),
        (-INF, "−∞"),
        (None, "–"),
    ],
)
def test_numbers_as_people_write_them(value, shown):
    assert format_number(value) == shown


@pytest.mark.parametrize(("digits", "shown"), [(1, "3"), (3, "3.14"), (6, "3.14159")])
def test_number_of_digits(digits, shown):
    assert format_number(math.pi, digits) == shown


# ---------------------------------------------------------------------------------- outcomes


@pytest.mark.parametrize("outcome", fm.Outcome)
def test_every_outcome_is_a_sentence_and_has_a_short_form(outcome):
    assert outcome.value.endswith(".")
    assert outcome.value[0].isupper()
    assert 0 < len(outcome.brief) < 30


def test_outcomes_to_distrust_stand_out_in_a_table():
    doubtful = {
        fm.Outcome.PRODUCT_LIMIT,
        fm.Outcome.BELOW_ROUNDING,
        fm.Outcome.NON_FINITE_POINTS,
        fm.Outcome.UNBOUNDED,
        fm.Outcome.ABOVE_RTOL,
        fm.Outcome.NO_DESCENT,
        fm.Outcome.NOT_REACHED,
    }
    assert {o for o in fm.Outcome if o.brief.isupper()} == doubtful
    assert {o for o in fm.Outcome if o.doubtful} == doubtful


# ------------------------------------------------------------------------------- names of before


def test_the_old_name_of_a_class_still_works_with_a_warning():
    with pytest.warns(DeprecationWarning, match="now called EpsilonSharpnessResult"):
        assert fm.SharpnessResult is fm.EpsilonSharpnessResult
    assert "SharpnessResult" not in fm.__all__


def test_files_written_under_the_old_name_can_be_read():
    data = box().to_dict() | {"type": "SharpnessResult"}
    assert fm.Result.from_dict(data) == box()
    assert fm.EpsilonSharpnessResult.from_dict(data) == box()
