"""The switch of the hand-written derivatives: without them every number is the same."""

import ast
import contextlib
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flatminima as fm
from flatminima.derivatives.gradients import nodes
from flatminima.derivatives.hand_written import PIECES, Differentiation, is_marked
from zoo import NAMES, build, cached_dense_hessian, facts_of

PACKAGE = Path(fm.__file__).parent
EXACT = [n for n in NAMES if not facts_of(n).approximate and torch.float64 in facts_of(n).dtypes]
WRITTEN = ("_Convolution", "_FixedNorm", "_Layer", "_Attention")


def generator():
    return torch.Generator().manual_seed(0)


class Pieces(nn.Module):
    """One layer for each hand-written derivative."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        x, _ = self.lstm(x)
        return self.attention(x, x, x, need_weights=False)[0].mean(1)


def objective_of(dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = Pieces().to(dtype).eval()
    x = torch.randn(5, 2, 3, 3, generator=generator()).to(dtype)
    data = [(x, torch.arange(5) % 4), (x[:2] * 2, torch.arange(2))]
    return fm.Objective(model, nn.CrossEntropyLoss(), data, **options)


@contextlib.contextmanager
def seen_functions(operator):
    """The names of the functions in the graphs that are built meanwhile."""
    found = set()
    own = operator._graph

    def spy(seen, leaves, trace):
        found.update(node.name().removesuffix("Backward") for node in nodes(seen.loss))
        return own(seen, leaves, trace)

    operator._graph = spy
    try:
        yield found
    finally:
        del operator._graph


def written(objective, passes=2):
    """The hand-written functions that products with H go through."""
    hessian = fm.HessianOperator(objective)
    vector = torch.ones(objective.size, dtype=objective.dtype)
    with seen_functions(hessian) as found:
        for _ in range(passes):
            hessian @ vector
    return found & set(WRITTEN)


# ------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("name", EXACT)
def test_products_without_hand_written_derivatives_equal_the_dense_hessian(name):
    objective = build(name).objective()
    block = torch.randn(objective.size, 2, generator=generator(), dtype=torch.float64)
    with fm.pytorch_derivatives():
        operator = fm.HessianOperator(objective)
        first, second = operator @ block, operator @ block
    expected = cached_dense_hessian(name, torch.float64) @ block
    assert operator.method == "double_backward"
    for found in (first, second):
        assert float((found - expected).norm()) <= 1e-9 * float(expected.norm())


@pytest.mark.parametrize("name", PIECES)
def test_products_without_a_single_piece_are_the_same(name):
    objective = objective_of()
    vector = torch.randn(objective.size, generator=generator(), dtype=torch.float64)
    hessian = fm.HessianOperator(objective)
    expected = hessian @ vector
    with fm.pytorch_derivatives(name):
        for _ in range(2):
            torch.testing.assert_close(hessian @ vector, expected, rtol=1e-11, atol=1e-13)


def test_gauss_newton_products_without_hand_written_derivatives():
    vector = torch.ones(objective_of().size, dtype=torch.float64)
    products = [
        fm.GaussNewtonOperator(objective_of(hand_written=flag)) @ vector for flag in (True, False)
    ]
    torch.testing.assert_close(*products, rtol=1e-11, atol=1e-13)


def test_weight_norm_stays_correct():
    """PyTorch's second derivative of it is wrong: a correction is nothing to turn off."""
    objective = build("weight_norm").objective()
    block = torch.eye(objective.size, dtype=torch.float64)
    with fm.pytorch_derivatives():
        found = fm.HessianOperator(objective) @ block
    torch.testing.assert_close(found, found.T)


# -------------------------------------------------------------------------------- the switch


def test_everything_is_used_by_default():
    assert written(objective_of()) == set(WRITTEN)


def test_nothing_is_used_within_the_context_manager():
    objective = objective_of()
    with fm.pytorch_derivatives():
        assert written(objective) == set()
    assert written(objective) == set(WRITTEN)


def test_nothing_is_used_by_an_objective_without_them():
    assert written(objective_of(hand_written=False)) == set()


FUNCTIONS = {
    "attention": "_Attention",
    "batch_norm": "_FixedNorm",
    "convolution": "_Convolution",
    "lstm": "_Layer",
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_is_turned_off_by_its_name(name):
    objective = objective_of()
    with fm.pytorch_derivatives(name):
        assert written(objective) == set(WRITTEN) - {FUNCTIONS[name]}
    assert written(objective_of(hand_written=[name])) == {FUNCTIONS[name]}


def test_channels_last_is_turned_off_by_its_name():
    noted = []

    class Noting(nn.Conv2d):
        def forward(self, x):
            out = super().forward(x)
            noted.append(is_marked(out))
            return out.sum((2, 3))

    model = Noting(2, 3, 3, padding=1)
    x, y = torch.ones(2, 2, 4, 4), torch.zeros(2, dtype=torch.long)
    objective = fm.Objective(model, nn.CrossEntropyLoss(), (x, y))
    hessian, vector = fm.HessianOperator(objective), torch.ones(objective.size)
    hessian @ vector
    hessian @ vector
    with fm.pytorch_derivatives("channels_last"):
        hessian @ vector
    hessian @ vector
    assert noted == [False, True, False, True]


def test_names_add_up_and_each_context_restores_what_was_there():
    way = Differentiation(nn.Identity(), None)
    everything = set(PIECES)
    with fm.pytorch_derivatives("lstm"):
        with fm.pytorch_derivatives("attention", "convolution"):
            assert way.pieces == everything - {"lstm", "attention", "convolution"}
        assert way.pieces == everything - {"lstm"}
        with fm.pytorch_derivatives():
            assert way.pieces == set()
        assert way.pieces == everything - {"lstm"}
    assert way.pieces == everything


def test_the_switch_restores_itself_after_an_exception():
    way = Differentiation(nn.Identity(), None)
    with pytest.raises(KeyError), fm.pytorch_derivatives():
        raise KeyError
    assert way.pieces == set(PIECES)


def test_other_threads_are_not_affected():
    found = []
    way = Differentiation(nn.Identity(), None)
    with fm.pytorch_derivatives():
        thread = threading.Thread(target=lambda: found.append(way.pieces))
        thread.start()
        thread.join()
    assert found == [set(PIECES)]


def test_unknown_names_are_refused():
    with (
        pytest.raises(fm.InvalidArgumentError, match=r"'names'.*'attention'.*got 'atention'"),
        fm.pytorch_derivatives("atention"),
    ):
        pass
    with pytest.raises(fm.InvalidArgumentError, match=r"'hand_written'.*got 'lsmt'"):
        objective_of(hand_written=["lsmt"])


@pytest.mark.parametrize("value", ["lstm", 1, None])
def test_other_values_are_refused(value):
    with pytest.raises(fm.ArgumentTypeError, match="'hand_written'"):
        objective_of(hand_written=value)


# ---------------------------------------------------------------------------- kept graphs


def test_kept_graphs_are_not_used_across_a_change_of_the_switch():
    objective = objective_of()
    hessian = fm.HessianOperator(objective, keep_graph=True)
    vector = torch.ones(objective.size, dtype=torch.float64)

    def functions():
        with seen_functions(hessian) as found:
            product = hessian @ vector
        return product, found

    with hessian.session():
        hessian @ vector  # examines the graph, and keeps nothing yet
        expected, built = functions()
        assert built & set(WRITTEN) == set(WRITTEN)
        assert functions()[1] == set()  # the graphs are kept
        with fm.pytorch_derivatives("lstm"):
            other, rebuilt = functions()
            assert rebuilt & set(WRITTEN) == set(WRITTEN) - {"_Layer"}
            assert functions()[1] == set()
        again, rebuilt = functions()
        assert rebuilt & set(WRITTEN) == set(WRITTEN)
    torch.testing.assert_close(other, expected, rtol=1e-11, atol=1e-13)
    assert torch.equal(again, expected)


def test_a_first_pass_without_them_leaves_the_choice_open():
    objective = objective_of(torch.float32)
    hessian, vector = fm.HessianOperator(objective), torch.ones(objective.size)
    with fm.pytorch_derivatives():
        expected = hessian @ vector
    # Channels last takes a pass that has been watched.
    assert not objective.differentiation.retreat(RuntimeError())
    for _ in range(2):
        torch.testing.assert_close(hessian @ vector, expected, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------- what others have replaced


WRAPPED = """
import functools, sys, warnings
sys.path.insert(0, {source!r})
import torch
import torch.nn.functional as F
from torch import nn

calls = []

def traced(function):
    def wrapper(*args, **kwargs):
        calls.append(function.__name__)
        return function(*args, **kwargs)
    return wrapper

def counted(tag, function, *args, **kwargs):
    calls.append(tag)
    return function(*args, **kwargs)

{wrap}

import flatminima as fm

torch.manual_seed(0)

class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0].mean(1)

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)
    def forward(self, x):
        return self.lstm(x)[0].mean(1)

layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
models = {{
    "attention": Attending(),
    "encoder": nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 4)),
    "lstm": Recurrent(),
}}
model = models[{model!r}].double()
x, y = torch.randn(3, 3, 4).double(), torch.arange(3)
objective = fm.Objective(model, nn.CrossEntropyLoss(), (x, y))
v = torch.randn(objective.size).double()
hessian = fm.HessianOperator(objective, method="double_backward")
calls.clear()
found = [hessian @ v, hessian @ v]
count = len(calls)
with fm.pytorch_derivatives():
    expected = hessian @ v
for product in found:
    torch.testing.assert_close(product, expected, rtol=1e-10, atol=1e-12)
print(count)
"""
FORWARD = "F.multi_head_attention_forward"
WRAPS = {
    "a plain wrapper": "{f} = traced({f})",
    "a wrapper with its name": "{f} = functools.wraps({f})(traced({f}))",
    "functools.partial": "{f} = functools.partial(counted, 'partial', {f})",
}


def count_of_calls(wrap, model):
    script = WRAPPED.format(source=str(PACKAGE.parent), wrap=wrap, model=model)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("model", ["attention", "encoder"])
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_attention_that_another_library_wrapped_before_is_called(wrap, model):
    assert count_of_calls(wrap.format(f=FORWARD), model) >= 2


@pytest.mark.parametrize(
    ("wrap", "model"),
    [
        ("F.scaled_dot_product_attention = traced(F.scaled_dot_product_attention)", "attention"),
        ("nn.MultiheadAttention.forward = traced(nn.MultiheadAttention.forward)", "encoder"),
        ("nn.LSTM.forward = traced(nn.LSTM.forward)", "lstm"),
    ],
)
def test_other_functions_that_another_library_wrapped_before_are_called(wrap, model):
    assert count_of_calls(wrap, model) >= 2


@pytest.mark.parametrize("kind", [nn.LSTM, nn.MultiheadAttention])
def test_a_forward_given_to_an_instance_is_called(kind):
    objective = objective_of()
    module = next(m for m in objective.model.modules() if type(m) is kind)
    own, count = module.forward, []

    def forward(*args, **kwargs):
        count.append(1)
        return own(*args, **kwargs)

    module.forward = forward
    hessian = fm.HessianOperator(objective)
    for _ in range(2):
        hessian @ torch.ones(objective.size, dtype=torch.float64)
    assert len(count) >= 4
    assert module.forward is forward


def test_modules_are_left_as_they_were():
    objective = objective_of()
    before = [dict(vars(m)) for m in objective.model.modules()]
    fm.HessianOperator(objective) @ torch.ones(objective.size, dtype=torch.float64)
    after = [dict(vars(m)) for m in objective.model.modules()]
    assert [list(a) for a in after] == [list(b) for b in before]
    assert not any("forward" in a for a in after)


# --------------------------------------------------------------------------------- the door


HAND_WRITTEN = {"attention", "batch_norm", "channels_last", "convolution", "eligibility"}
HAND_WRITTEN |= {"recurrent", "substitution", "weight_norm"}


def test_other_rooms_reach_the_hand_written_derivatives_by_the_door_alone():
    names = {p.stem for p in (PACKAGE / "derivatives").glob("*.py")} - {"__init__"}
    assert names == HAND_WRITTEN | {
        *("gradients", "hand_written", "missing", "torch_private", "tracing")
    }
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "derivatives":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = getattr(node, "module", None) or ""
            if isinstance(node, ast.ImportFrom) and "derivatives." in module:
                assert module.rpartition(".")[2] not in HAND_WRITTEN, path
