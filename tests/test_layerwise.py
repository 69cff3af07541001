"""Curvature module by module: the diagonal blocks of the Hessian, and what they cost."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flatminima as fm
from flatminima.algorithms.estimators.probes import t_factor
from integrity import untouched
from zoo import build, cached_dense_hessian


def seeded(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class Nested(nn.Module):
    """Modules within modules, a parameter of its own, and one that is never used."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.tensor([1.5, -0.5]))
        self.encoder = nn.ModuleDict(
            {
                "first": nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)),
                "second": nn.Linear(4, 4),
            }
        )
        self.idle = nn.Linear(2, 2)
        self.head = nn.Linear(4, 2)
        self.double()

    def forward(self, x):
        x = self.encoder["first"](x).tanh()
        return self.scale * self.head(self.encoder["second"](x).tanh())


X, Y = seeded(12, 3), seeded(12, 2, seed=1)
GROUPS = {
    "": ["scale"],
    "encoder.first.0": ["encoder.first.0.weight", "encoder.first.0.bias"],
    "encoder.first.2": ["encoder.first.2.weight", "encoder.first.2.bias"],
    "encoder.second": ["encoder.second.weight", "encoder.second.bias"],
    "idle": ["idle.weight", "idle.bias"],
    "head": ["head.weight", "head.bias"],
}


def objective_of(model=None, **options):
    return fm.Objective(Nested() if model is None else model, nn.MSELoss(), (X, Y), **options)


@pytest.fixture(scope="module")
def objective():
    return objective_of(batch_size=5)


@pytest.fixture(scope="module")
def hessian(objective):
    return fm.HessianOperator(objective) @ torch.eye(objective.size).double()


@pytest.fixture(scope="module")
def result(objective):
    return fm.layerwise(objective)


def rows_of(objective, names):
    places = dict(objective.layout.slices())
    return torch.cat([torch.arange(places[n].start, places[n].stop) for n in names])


def block_of(hessian, objective, names):
    rows = rows_of(objective, names)
    return hessian[rows][:, rows]


def spread(hessian, rows, products):
    """The standard error of the trace of a block, by the exact variance of its samples."""
    inside = hessian[rows][:, rows]
    square = hessian[rows].square().sum() - inside.diagonal().square().sum()
    within = inside.square().sum() - inside.diagonal().square().sum()
    return math.sqrt(float(square + within) / products)


# ----------------------------------------------------------------------------- against the blocks


def test_every_module_has_the_curvature_of_its_block(result, objective, hessian):
    assert [layer.name for layer in result.layers] == list(GROUPS)
    for layer in result.layers:
        block = block_of(hessian, objective, GROUPS[layer.name])
        assert layer.parameters == len(block)
        top = float(torch.linalg.eigvalsh(block)[-1])
        assert layer.outcome is fm.Outcome.CONVERGED
        assert abs(layer.eigenvalue - top) <= layer.residual + 1e-12
        assert layer.residual <= 1e-2 * float(torch.linalg.eigvalsh(block).abs().max()) + 1e-14
        error = spread(hessian, rows_of(objective, GROUPS[layer.name]), 50)
        assert abs(layer.trace - float(block.trace())) <= 4 * error
        assert layer.trace_error == pytest.approx(error, rel=0.5)
    assert result.outcome is fm.Outcome.CONVERGED
    assert result.notes == ()


def test_tighter_tolerances_give_the_eigenvalues_of_the_blocks(objective, hessian):
    result = fm.layerwise(objective, tol=1e-9, trace_products=2)
    for layer in result.layers:
        block = block_of(hessian, objective, GROUPS[layer.name])
        top = float(torch.linalg.eigvalsh(block)[-1])
        assert layer.eigenvalue == pytest.approx(top, rel=1e-8, abs=1e-12)


def test_a_module_that_is_never_used_has_no_curvature(result):
    idle = next(layer for layer in result.layers if layer.name == "idle")
    assert (idle.trace, idle.trace_error, idle.eigenvalue) == (0, 0, 0)


def test_the_trace_of_the_whole_is_the_sum(result, objective, hessian):
    assert result.trace == math.fsum(layer.trace for layer in result.layers)
    everything = torch.arange(objective.size)
    error = spread(hessian, everything, 50)
    assert abs(result.trace - float(hessian.trace())) <= 4 * error
    whole = fm.trace(fm.HessianOperator(objective), method="hutchinson", products=50)
    assert result.trace == pytest.approx(whole.value, rel=1e-12)


def test_blocks_with_negative_curvature_have_their_largest_eigenvalue_not_the_largest_in_size():
    class Valley(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.ParameterList([torch.tensor([1.0, 2.0]).double()])
            self.b = nn.ParameterList([torch.tensor([1.0, 1.0, 1.0]).double()])

        def forward(self, x):
            curved = self.a[0].square() @ torch.tensor([-3.0, -5.0]).double()
            return curved + self.b[0].square() @ torch.tensor([-4.0, 0.5, 1.0]).double()

    model = Valley()
    objective = fm.Objective(model, data=[torch.zeros(1)], batch_loss=lambda m, b: m(b))
    layers = fm.layerwise(objective, tol=1e-8).layers
    assert [layer.name for layer in layers] == ["a", "b"]
    assert [layer.eigenvalue for layer in layers] == pytest.approx([-6.0, 2.0])
    # A diagonal Hessian has exact traces.
    assert [layer.trace for layer in layers] == pytest.approx([-16.0, -5.0])
    assert [layer.trace_error for layer in layers] == pytest.approx([0, 0], abs=1e-12)


@pytest.mark.parametrize(
    ("depth", "names"),
    [
        (1, ["", "encoder", "idle", "head"]),
        (2, ["", "encoder.first", "encoder.second", "idle", "head"]),
        (3, list(GROUPS)),
        (9, list(GROUPS)),
        (None, list(GROUPS)),
    ],
)
def test_depth_says_which_parts_of_a_name_tell_modules_apart(depth, names, objective, hessian):
    result = fm.layerwise(objective, depth=depth, tol=1e-6, trace_products=3)
    assert [layer.name for layer in result.layers] == names
    for layer in result.layers:
        inside = [
            parameter
            for group, parameters in GROUPS.items()
            if group == layer.name or (layer.name and group.startswith(layer.name + "."))
            for parameter in parameters
        ]
        block = block_of(hessian, objective, inside)
        assert layer.parameters == len(block)
        top = float(torch.linalg.eigvalsh(block)[-1])
        assert layer.eigenvalue == pytest.approx(top, rel=1e-5, abs=1e-12)
        error = spread(hessian, rows_of(objective, inside), 3)
        assert abs(layer.trace - float(block.trace())) <= 5 * error


def test_selected_parameters_alone_are_divided(hessian, objective):
    chosen = objective_of(params=["encoder.first.*", "head.bias"])
    result = fm.layerwise(chosen, tol=1e-6)
    assert [(v.name, v.parameters) for v in result.layers] == [
        ("encoder.first.0", 24),
        ("encoder.first.2", 28),
        ("head", 2),
    ]
    block = block_of(hessian, objective, ["head.bias"])
    top = float(torch.linalg.eigvalsh(block)[-1])
    assert result.layers[2].eigenvalue == pytest.approx(top, rel=1e-5)


def test_tied_parameters_count_once_where_they_come_first():
    case = build("tied_weights")
    result = fm.layerwise(case.objective(), tol=1e-6)
    assert [v.name for v in result.layers] == ["embedding", "hidden"]
    dense = cached_dense_hessian("tied_weights")
    top = float(torch.linalg.eigvalsh(dense[:18, :18])[-1])
    assert result.layers[0].eigenvalue == pytest.approx(top, rel=1e-5)


def test_one_module_is_the_whole():
    case = build("softmax_regression")
    result = fm.layerwise(case.objective(), tol=1e-6)
    dense = cached_dense_hessian("softmax_regression")
    assert [v.parameters for v in result.layers] == [15]
    top = float(torch.linalg.eigvalsh(dense)[-1])
    assert result.layers[0].eigenvalue == pytest.approx(top, rel=1e-6)


def test_modules_without_elements_are_no_hindrance():
    class Hollow(nn.Module):
        def __init__(self):
            super().__init__()
            self.empty = nn.ParameterList([torch.empty(0, 3).double()])
            self.full = nn.Linear(3, 2).double()

        def forward(self, x):
            return self.full(x) + self.empty[0].sum()

    objective = objective_of(Hollow())
    layers = {layer.name: layer for layer in fm.layerwise(objective).layers}
    assert layers["full"].eigenvalue > 0


# ------------------------------------------------------------------------------------------ cost


class Counted(nn.Module):
    """Counts its forwards."""

    count = 0

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        Counted.count += 1
        return self.inner(x)


def test_a_pass_serves_every_module_that_is_left(result, objective):
    assert result.passes == max(layer.products for layer in result.layers)
    separate = sum(layer.products for layer in result.layers)
    assert result.passes < separate / 2
    assert result.trace_products == 50


def test_passes_are_what_is_counted(monkeypatch):
    objective = objective_of(Counted(Nested()), batch_size=5)
    fm.HessianOperator(objective) @ torch.ones(objective.size)
    passes = 0
    original = fm.Objective.evaluate_batches

    def counted(self, *args, **kwargs):
        nonlocal passes
        passes += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(fm.Objective, "evaluate_batches", counted)
    Counted.count = 0
    result = fm.layerwise(objective, trace_products=7)
    # All probes fit into one block of columns, which reads the data once.
    assert passes == 1 + result.passes
    # Once to see that there are second derivatives, once for the graphs that are kept.
    assert Counted.count == 2 * len(objective.batches)


def test_no_more_products_than_lanczos_needs_for_each_block_alone(objective, hessian):
    result = fm.layerwise(objective, tol=1e-3, trace_products=2)
    for layer in result.layers:
        block = block_of(hessian, objective, GROUPS[layer.name])
        alone = fm.lanczos(fm.MatrixOperator((block + block.T) / 2), tol=1e-3, basis_size=20)
        assert layer.products <= alone.products + 3


# ---------------------------------------------------------------------------------- estimators


def test_traces_are_unbiased_over_seeds(objective, hessian):
    results = [fm.layerwise(objective, trace_products=4, tol=0.9, seed=s) for s in range(20)]
    for index, names in enumerate(GROUPS.values()):
        rows = rows_of(objective, names)
        values = [r.layers[index].trace for r in results]
        error = spread(hessian, rows, 80)
        exact = float(hessian[rows][:, rows].trace())
        assert abs(math.fsum(values) / 20 - exact) <= 4 * error
        # The standard errors that were told are those that were met.
        told = math.fsum(r.layers[index].trace_error ** 2 for r in results) / 20
        widened = error**2 * 20 * t_factor(4) ** 2
        assert told == pytest.approx(widened, rel=0.5, abs=1e-20)


def test_the_same_seed_gives_the_same_result_and_another_does_not(objective, result):
    assert fm.layerwise(objective) == result
    assert fm.layerwise(objective, seed=torch.Generator().manual_seed(0)) == result
    other = fm.layerwise(objective, seed=1)
    assert other != result
    assert other.layers[1].trace != result.layers[1].trace
    assert other.layers[1].eigenvalue == pytest.approx(result.layers[1].eigenvalue, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_model_and_data_are_untouched(dtype):
    model, data = Nested().to(dtype), (X.to(dtype), Y.to(dtype))
    with untouched(model, data):
        fm.layerwise(fm.Objective(model, nn.MSELoss(), data, mode="train"), trace_products=2)


# -------------------------------------------------------------------------------------- outcomes


def test_too_few_products_are_told(objective, hessian):
    with pytest.warns(fm.ConvergenceWarning, match="did not converge in 4 of 6") as caught:
        result = fm.layerwise(objective, tol=1e-6, max_products=3)
    assert [w.filename for w in caught] == [__file__]
    assert "'encoder.first.0'" in str(caught[0].message)
    assert result.outcome is fm.Outcome.PRODUCT_LIMIT
    assert result.passes == 3
    late = [layer for layer in result.layers if layer.outcome is not fm.Outcome.CONVERGED]
    assert [layer.name for layer in late] == [n for n in GROUPS if n not in ("", "idle")]
    for layer in result.layers:
        spectrum = torch.linalg.eigvalsh(block_of(hessian, objective, GROUPS[layer.name]))
        assert layer.products <= 3
        assert float((spectrum - layer.eigenvalue).abs().min()) <= layer.residual + 1e-12
        assert layer.eigenvalue <= float(spectrum[-1]) + 1e-12


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("embedding_bag_sum", torch.float64),
        ("ctc_loss", torch.float32),
        ("once_differentiable", torch.float64),
    ],
)
def test_differences_serve_too_and_are_noted(name, dtype):
    case = build(name, dtype)
    objective = case.objective()
    hessian = cached_dense_hessian(name, dtype)
    with pytest.warns(fm.FiniteDifferenceWarning) as caught:
        result = fm.layerwise(objective, tol=1e-2)
    assert len(caught) == 1
    assert result.notes[0].startswith("PyTorch has no second derivative of")
    for layer in result.layers:
        names = [n for n in objective.layout.names if n.rpartition(".")[0] == layer.name]
        block = block_of(hessian, objective, names)
        top = float(torch.linalg.eigvalsh(block)[-1])
        assert abs(layer.eigenvalue - top) <= layer.residual
        assert layer.residual <= 0.02 * float(hessian.norm())
        error = spread(hessian, rows_of(objective, names), 50)
        assert abs(layer.trace - float(block.trace())) <= 5 * error


def test_gradients_that_are_not_finite_are_refused():
    x = X.clone()
    x[7, 1] = math.inf
    objective = fm.Objective(Nested(), nn.MSELoss(), [(X[:4], Y[:4]), (x[4:], Y[4:])])
    with pytest.raises(fm.NonFiniteError, match=r"batch 1|NaN or infinity"):
        fm.layerwise(objective)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"depth": 0}, fm.InvalidArgumentError, "'depth' argument of layerwise.*≥ 1; got 0"),
        ({"depth": 1.5}, fm.ArgumentTypeError, "'depth' argument"),
        ({"trace_products": 1}, fm.InvalidArgumentError, "'trace_products' argument.*≥ 2"),
        ({"max_products": 0}, fm.InvalidArgumentError, "'max_products' argument.*≥ 1"),
        ({"tol": 0}, fm.InvalidArgumentError, "'tol' argument of layerwise"),
        ({"tol": 1e-20}, fm.InvalidArgumentError, "Rounding hides smaller residuals"),
        ({"seed": "a"}, fm.ArgumentTypeError, "'seed' argument"),
    ],
)
def test_wrong_arguments_are_refused(options, error, message, objective):
    with pytest.raises(error, match=message):
        fm.layerwise(objective, **options)


def test_an_objective_is_needed():
    with pytest.raises(fm.ArgumentTypeError, match="'objective' argument of layerwise"):
        fm.layerwise(Nested())


# --------------------------------------------------------------------------------------- results


def test_a_result_survives_json(result):
    for made in (result, result.layers[1]):
        text = made.to_json()
        assert type(made).from_json(text) == made
        assert fm.Result.from_json(text) == made


def test_a_result_that_did_not_converge_survives_json(objective):
    with pytest.warns(fm.ConvergenceWarning):
        result = fm.layerwise(objective, tol=1e-6, max_products=2, trace_products=2)
    again = fm.LayerwiseResult.from_json(result.to_json())
    assert again == result
    assert again.outcome is fm.Outcome.PRODUCT_LIMIT
    assert again.layers[1].outcome is fm.Outcome.PRODUCT_LIMIT


def test_results_are_frozen(result):
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.trace = 0.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.layers[0].trace = 0.0


def test_the_table_has_a_row_for_each_module(result):
    text = str(result)
    lines = text.splitlines()
    assert lines[0] == "Curvature of each module: diagonal blocks of the Hessian"
    rows = lines[3:9]
    for row, layer in zip(rows, result.layers, strict=True):
        assert row.startswith(layer.name or "(the model's own)")
        assert f"  {layer.parameters}  " in row
        assert row.endswith("converged")
    assert f"50 products for the traces, {result.passes} passes over the data" in text
    html = result._repr_html_()
    assert all(layer.name in html for layer in result.layers)


def test_a_single_layer_has_a_table_too(result):
    text = str(result.layers[1])
    assert "encoder.first.0" in text
    assert "24" in text


def test_the_table_shows_what_did_not_converge(objective):
    with pytest.warns(fm.ConvergenceWarning):
        result = fm.layerwise(objective, tol=1e-6, max_products=2, trace_products=2)
    assert "NOT CONVERGED" in str(result)
    assert fm.Outcome.PRODUCT_LIMIT.value in str(result)


def test_losses_of_any_kind_have_layers():
    """Softmax regression in two modules: weights and bias apart, in closed form for the bias."""

    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(3, 4, bias=False)
            self.shift = nn.ParameterList([torch.zeros(4)])
            self.double()

        def forward(self, x):
            return self.linear(x) + self.shift[0]

    model, labels = Split(), torch.arange(12) % 4
    objective = fm.Objective(model, F.cross_entropy, (X, labels), batch_size=5)
    p = model(X).softmax(1).detach()
    block = (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0)
    layers = fm.layerwise(objective, tol=1e-8, trace_products=400).layers
    assert layers[1].name == "shift"
    assert layers[1].eigenvalue == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]), rel=1e-6)
    assert abs(layers[1].trace - float(block.trace())) <= 4 * layers[1].trace_error
