import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import flatminima as fm
from flatminima.objective.selection import select_parameters
from flatminima.support.vectors import GaussianSubspace, Layout, check_vector
from zoo import TiedAutoencoder, build, names_of

BASIC = pytest.mark.parametrize("name", names_of("basic"))

CPU = torch.device("cpu")


def small():
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2), nn.BatchNorm1d(2))


# ------------------------------------------------------------------------------------ selection


@BASIC
def test_selection_lists_each_tensor_once_in_the_models_order(name):
    case = build(name)
    chosen = select_parameters(case.model, case.params)
    parameters = dict(case.model.named_parameters())
    assert tuple(chosen) == case.names()
    assert all(chosen[n] is parameters[n] for n in chosen)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ("0.*", ["0.weight", "0.bias"]),
        ("*.bias", ["0.bias", "2.bias", "3.bias"]),
        ("?.weight", ["0.weight", "2.weight", "3.weight"]),
        ("[02].weight", ["0.weight", "2.weight"]),
        (["2.*", "0.weight"], ["0.weight", "2.weight", "2.bias"]),
        (("0.bias", "0.*"), ["0.weight", "0.bias"]),
        ({"3.weight"}, ["3.weight"]),
        (lambda name, p: p.dim() > 1, ["0.weight", "2.weight"]),
        (lambda name, p: "bias" in name and name < "3", ["0.bias", "2.bias"]),
        ("*", ["0.weight", "0.bias", "2.weight", "2.bias", "3.weight", "3.bias"]),
    ],
)
def test_patterns_and_predicates(params, expected):
    assert list(select_parameters(small(), params)) == expected


def test_patterns_may_name_frozen_parameters():
    model = small()
    model[0].requires_grad_(False)
    assert list(select_parameters(model)) == ["2.weight", "2.bias", "3.weight", "3.bias"]
    assert list(select_parameters(model, "0.*")) == ["0.weight", "0.bias"]


@pytest.mark.parametrize("params", ["embedding.weight", "decoder.weight", "*.weight"])
def test_tied_tensors_count_once_under_their_first_name(params):
    chosen = select_parameters(TiedAutoencoder(5, 3), params)
    assert list(chosen).count("embedding.weight") == 1
    assert "decoder.weight" not in chosen


def test_either_name_of_a_tied_tensor_gives_the_same_derivatives():
    case = build("tied_weights")
    first, second = (case.objective(params=p) for p in ("embedding.weight", "decoder.weight"))
    assert torch.equal(first.gradient(), second.gradient())
    assert first.loss_at(torch.ones(18).double()) == second.loss_at(torch.ones(18).double())


def test_a_model_without_parameters_is_refused():
    with pytest.raises(fm.ParameterSelectionError, match="Tanh has no parameters"):
        select_parameters(nn.Tanh())


def test_a_frozen_model_is_refused_with_advice():
    model = small().requires_grad_(False)
    with pytest.raises(
        fm.ParameterSelectionError, match=r'No parameter requires grad.*params="\*"'
    ):
        select_parameters(model)


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("0.weights", "Did you mean '0.weight'"),
        (["0.*", "2.biass"], "Did you mean '2.bias'"),
        ("encoder", "Known names: '0.weight', '0.bias'"),
        ("", "Known names: '0.weight'"),
    ],
)
def test_a_pattern_that_matches_nothing_gets_a_suggestion(pattern, hint):
    shown = pattern if isinstance(pattern, str) else pattern[-1]
    with pytest.raises(fm.ParameterSelectionError, match=f"'{shown}' matches no parameter.*{hint}"):
        select_parameters(small(), pattern)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (lambda name, p: False, "predicate given as params= selects no parameter"),
        ([], "params= is an empty list"),
        ((), "params= is an empty list"),
    ],
)
def test_selecting_nothing_is_refused(params, message):
    with pytest.raises(fm.ParameterSelectionError, match=message):
        select_parameters(small(), params)


@pytest.mark.parametrize("params", [3, [3], ["0.*", None], 1.5, [nn.Linear(1, 1).weight]])
def test_params_of_another_type_are_refused(params):
    with pytest.raises(fm.ArgumentTypeError, match="params= takes None, glob patterns"):
        select_parameters(small(), params)


def test_a_parameter_of_integers_is_refused_by_name():
    model = small()
    model.table = nn.Parameter(torch.arange(3), requires_grad=False)
    assert "table" not in select_parameters(model)
    with pytest.raises(fm.ParameterSelectionError, match=r"'table' is of type torch\.int64"):
        select_parameters(model, "*")


def test_a_complex_parameter_is_refused_by_name():
    model = small()
    model.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(fm.ParameterSelectionError, match=r"'phase' is of type torch\.complex64"):
        select_parameters(model)


# --------------------------------------------------------------------------------------- layout


@BASIC
def test_flatten_and_unflatten_are_inverse(name):
    tensors = select_parameters(build(name).model)
    layout = Layout.of(tensors)
    vector = layout.flatten(tensors.values())
    assert vector.shape == (layout.size,)
    assert layout.size == sum(layout.sizes) == sum(t.numel() for t in tensors.values())
    for piece, tensor in zip(layout.unflatten(vector), tensors.values(), strict=True):
        assert torch.equal(piece, tensor)
    for name_, place in layout.slices():
        assert torch.equal(vector[place], tensors[name_].detach().reshape(-1))


def test_flatten_makes_new_memory_and_reads_none_as_zeros():
    tensor = torch.ones(2, 2)
    layout = Layout.of({"a": tensor, "b": torch.ones(3)})
    vector = layout.flatten([tensor, None])
    assert vector.tolist() == [1, 1, 1, 1, 0, 0, 0]
    vector.zero_()
    assert torch.equal(tensor, torch.ones(2, 2))
    alone = Layout.of({"a": tensor}).flatten([tensor])
    alone.zero_()
    assert torch.equal(tensor, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.float16], torch.float32),
        ([torch.bfloat16, torch.float16], torch.float32),
        ([torch.float32, torch.bfloat16], torch.float32),
        ([torch.float32, torch.float64], torch.float64),
    ],
)
def test_vectors_are_of_the_widest_type_and_float32_at_least(dtypes, expected):
    layout = Layout.of({str(i): torch.ones(2, dtype=d) for i, d in enumerate(dtypes)})
    assert layout.dtype == expected
    pieces = layout.unflatten(torch.ones(layout.size, dtype=expected))
    assert [p.dtype for p in pieces] == dtypes


def test_scalars_and_empty_tensors_have_their_place():
    layout = Layout.of({"scale": torch.tensor(2.0), "none": torch.empty(0, 3), "b": torch.ones(2)})
    assert layout.sizes == (1, 0, 2)
    pieces = layout.unflatten(torch.arange(3.0))
    assert [tuple(p.shape) for p in pieces] == [(), (0, 3), (2,)]


def test_tensors_on_several_devices_are_refused_by_name():
    with pytest.raises(fm.DeviceError, match="'a' on cpu, 'b' on meta"):
        Layout.of({"a": torch.ones(1), "b": torch.ones(1, device="meta")})


# ----------------------------------------------------------------------------------- check_vector


def checked(vector, **options):
    return check_vector("call", vector, size=3, dtype=torch.float64, device=CPU, **options)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float16, torch.float64])
def test_real_vectors_of_any_type_are_converted(dtype):
    found = checked(torch.ones(3).to(dtype))
    assert found.dtype == torch.float64
    assert found.tolist() == [1, 1, 1]


@pytest.mark.parametrize("place", [(0, 0), (1, 1), (2, 0)])
def test_the_row_of_a_bad_entry_is_named(place):
    matrix = torch.zeros(3, 2)
    matrix[place] = math.nan
    with pytest.raises(fm.NonFiniteError, match=f"call was given.*at index {place[0]}"):
        checked(matrix, columns=True)


@pytest.mark.parametrize("columns", [0, 1, 5])
def test_any_number_of_columns_is_accepted(columns):
    assert checked(torch.zeros(3, columns), columns=True).shape == (3, columns)


# ------------------------------------------------------------------------------- GaussianSubspace


def subspace(n=37, p=5, *, seed=0, dtype=torch.float64, budget=2**28):
    return GaussianSubspace(n, p, seed=seed, dtype=dtype, device=CPU, budget=budget)


def dense(space):
    identity = torch.eye(space.dimension, dtype=torch.float64)
    return torch.stack([space.expand(e) for e in identity], dim=1).double()


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few rows, so that small matrices are cut too."""
    monkeypatch.setattr(GaussianSubspace, "BLOCK_ENTRIES", 20)


@pytest.mark.parametrize("budget", [0, 2**28], ids=["regenerated", "kept"])
@pytest.mark.parametrize("n", [1, 4, 8, 37])
@pytest.mark.usefixtures("small_blocks")
def test_products_belong_to_one_matrix(n, budget):
    space = subspace(n, 5, budget=budget)
    matrix = dense(space)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(5, generator=generator).double()
    v = torch.randn(n, generator=generator).double()
    torch.testing.assert_close(space.expand(z), matrix @ z)
    torch.testing.assert_close(space.project(v), matrix.T @ v)


@pytest.mark.parametrize("budget", [0, 2**28], ids=["regenerated", "kept"])
@pytest.mark.usefixtures("small_blocks")
def test_coordinates_are_those_of_the_pseudo_inverse(budget):
    space = subspace(37, 5, budget=budget)
    v = torch.randn(37, generator=torch.Generator().manual_seed(1)).double()
    expected = torch.linalg.pinv(dense(space)) @ v
    torch.testing.assert_close(space.coordinates(v), expected)
    z = torch.arange(5.0).double()
    torch.testing.assert_close(space.coordinates(space.expand(z)), z)


@pytest.mark.usefixtures("small_blocks")
def test_what_is_kept_and_what_is_drawn_anew_are_the_same_bitwise():
    assert torch.equal(dense(subspace(budget=0)), dense(subspace(budget=2**28)))


@given(seed=st.integers(0, 2**40))
@settings(max_examples=10)
def test_the_same_seed_gives_the_same_matrix_and_another_one_another(seed):
    first, again, other = (dense(subspace(seed=s)) for s in (seed, seed, seed + 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.usefixtures("small_blocks")
def test_entries_are_standard_normal_and_blocks_differ():
    matrix = dense(subspace(4000, 5))
    entries = matrix.reshape(-1)
    assert abs(float(entries.mean())) < 4 / math.sqrt(len(entries))
    assert abs(float(entries.var()) - 1) < 4 * math.sqrt(2 / len(entries))
    assert abs(float((entries**4).mean()) - 3) < 4 * math.sqrt(96 / len(entries))
    assert len(entries.unique()) > 0.99 * len(entries)


def test_a_generator_moves_on():
    generator = torch.Generator().manual_seed(0)
    first, second = (dense(subspace(seed=generator)) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, dense(subspace(seed=torch.Generator().manual_seed(0))))


def test_vectors_come_in_their_own_type_and_sums_in_float64():
    space = subspace(dtype=torch.float32)
    assert space.expand(torch.ones(5).double()).dtype == torch.float32
    assert space.project(torch.ones(37)).dtype == torch.float64
    assert space.coordinates(torch.ones(37)).dtype == torch.float64


@pytest.mark.parametrize("seed", [None, "0", 1.5, True])
def test_a_seed_is_an_int_or_a_generator(seed):
    with pytest.raises(
        fm.ArgumentTypeError, match=r"'seed' argument must be an int or a torch.Gen"
    ):
        subspace(seed=seed)
