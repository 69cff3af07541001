"""Batches of every shape: moved, copied and cut, with the user's own left as it was."""

from __future__ import annotations

import collections
import copy
import dataclasses
import types
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from flatminima.support.trees import (
    LANES,
    cut,
    fingerprint,
    same_tensors,
    tensors_in,
    to_device,
)
from integrity import untouched

CPU, META = torch.device("cpu"), torch.device("meta")
"""META stands in for a second device."""


def numbers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator)


@dataclasses.dataclass
class Sample:
    x: torch.Tensor
    extra: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    extra: Any = None


@dataclasses.dataclass(frozen=True)
class Computed:
    """Its second field is not for the constructor, and the constructor is strict."""

    x: torch.Tensor
    total: torch.Tensor = dataclasses.field(init=False)

    def __post_init__(self):
        if isinstance(self.x, list):
            raise TypeError("no lists")
        object.__setattr__(self, "total", self.x.sum())


@dataclasses.dataclass(slots=True)
class Slotted:
    x: torch.Tensor
    y: list


class Pair(NamedTuple):
    first: Any
    second: Any = None


class Graph:
    """As graph libraries have them: moves itself into a new object."""

    def __init__(self, x, edges):
        self.x, self.edges = x, edges

    def to(self, device):
        return Graph(self.x.to(device), self.edges.to(device))


class Encoding(collections.UserDict):
    """As tokenizers give them: moves itself in place."""

    def to(self, device):
        self.data = {k: v.to(device) for k, v in self.data.items()}
        return self

    def __getattr__(self, name):
        if name == "data" or name not in self.data:
            raise AttributeError(name)
        return self.data[name]


class Moved(dict):
    """A mapping of a class with an attribute."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.note = "kept"


def defaultdict(*items):
    return collections.defaultdict(list, dict(items))


def packed():
    return pack_sequence([numbers(3, 2), numbers(1, 2), numbers(4, 2)], enforce_sorted=False)


BATCHES = {
    "tensor": lambda: numbers(3, 2),
    "tuple": lambda: (numbers(3), numbers(3, 2)),
    "list": lambda: [numbers(3), [numbers(2)], ()],
    "mapping": lambda: {"x": numbers(3), "y": {"deep": (numbers(1),)}, 3: None},
    "OrderedDict": lambda: collections.OrderedDict(b=numbers(3), a=numbers(2)),
    "defaultdict": lambda: defaultdict(("x", numbers(3)), ("words", ["a"])),
    "proxy": lambda: types.MappingProxyType({"x": numbers(3)}),
    "own mapping": lambda: Moved(x=numbers(3), text="abc"),
    "Encoding": lambda: Encoding({"ids": numbers(3), "mask": numbers(3)}),
    "named tuple": lambda: Pair(numbers(3), Pair({"x": numbers(2)})),
    "dataclass": lambda: Sample(numbers(3), [numbers(1), "text"]),
    "frozen dataclass": lambda: Frozen(numbers(3), Frozen(numbers(2))),
    "computed dataclass": lambda: Computed(numbers(3)),
    "slotted dataclass": lambda: Slotted(numbers(3), [numbers(2)]),
    "object": lambda: Graph(numbers(3), torch.tensor([[0, 1], [1, 0]])),
    "object inside": lambda: {"graph": [Graph(numbers(3), numbers(2))], "y": numbers(1)},
    "packed": packed,
    "ragged": lambda: [numbers(n) for n in (3, 1, 4)],
    "mixed": lambda: ("text", b"bytes", None, 3, 2.5, True, numbers(2), frozenset({1})),
    "array": lambda: {"x": np.arange(3.0), "y": numbers(3)},
    "class": lambda: (Sample, numbers(2)),
    "empty": lambda: ((), [], {}, numbers(0, 3)),
}
every_batch = pytest.mark.parametrize("kind", BATCHES)


def shape_of(data):
    """The containers with their types, and the tensors by shape and type."""
    if isinstance(data, torch.Tensor):
        return "tensor", tuple(data.shape), data.dtype
    if isinstance(data, collections.UserDict):
        return type(data), {k: shape_of(v) for k, v in data.data.items()}
    if isinstance(data, (dict, types.MappingProxyType)):
        return type(data), list(data), [shape_of(v) for v in data.values()]
    if isinstance(data, (tuple, list)):
        return type(data), [shape_of(v) for v in data]
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return type(data), [shape_of(getattr(data, f.name)) for f in dataclasses.fields(data)]
    if isinstance(data, np.ndarray):
        return "array", data.shape, data.dtype
    if isinstance(data, Graph):
        return Graph, shape_of(data.x), shape_of(data.edges)
    return data


@every_batch
def test_everything_is_moved_and_nothing_else_changes(kind):
    data = BATCHES[kind]()
    with untouched(data):
        moved = to_device(data, META)
    # PyTorch wants the batch sizes of a PackedSequence on the host.
    tensors = [moved.data] if kind == "packed" else tensors_in(moved)
    assert {t.device for t in tensors if not _is_array(t, moved)} == {META}
    assert shape_of(moved) == shape_of(data)
    assert {t.device for t in tensors_in(data)} == {CPU}


def _is_array(tensor, data):
    """Arrays stay on the host, where NumPy has them."""
    return (
        isinstance(data, dict)
        and any(isinstance(v, np.ndarray) for v in data.values())
        and (tensor.device == CPU)
    )


@every_batch
def test_a_duplicate_is_equal_and_shares_no_memory(kind):
    data = BATCHES[kind]()
    with untouched(data):
        twin = to_device(data, CPU, duplicate=True)
        assert shape_of(twin) == shape_of(data)
        assert same_tensors(twin, data)
        for tensor in tensors_in(twin):
            if tensor.numel() and tensor.dtype != torch.int64 and not _is_array(tensor, data):
                tensor += 1
    assert kind in ("empty", "array") or not same_tensors(twin, data)


@every_batch
def test_on_its_own_device_nothing_is_copied(kind):
    data = BATCHES[kind]()
    moved = to_device(data, CPU)
    assert shape_of(moved) == shape_of(data)
    for one, other in zip(tensors_in(moved), tensors_in(data), strict=True):
        assert one.data_ptr() == other.data_ptr()


@every_batch
def test_containers_can_be_filled_without_reaching_the_users(kind):
    data = BATCHES[kind]()
    twin = to_device(data, CPU)
    with untouched(data):
        for container in containers(twin):
            if isinstance(container, list):
                container.append("more")
            elif isinstance(container, dict):
                container["more"] = "more"
            elif isinstance(container, Sample):
                container.extra = "other"


def containers(data):
    if isinstance(data, (tuple, list)):
        yield data
        for item in data:
            yield from containers(item)
    elif isinstance(data, (dict, types.MappingProxyType)):
        yield data
        for item in data.values():
            yield from containers(item)
    elif dataclasses.is_dataclass(data) and not isinstance(data, type):
        yield data
        for field in dataclasses.fields(data):
            yield from containers(getattr(data, field.name))


def test_mappings_keep_what_they_are():
    moved = to_device(defaultdict(("x", numbers(3))), META)
    assert moved["absent"] == []
    assert list(to_device(collections.OrderedDict(b=numbers(3), a=numbers(2)), META)) == ["b", "a"]
    assert to_device(Moved(x=numbers(3)), META).note == "kept"


def test_an_encoding_that_moves_itself_in_place_stays_where_it_is():
    encoding = Encoding({"ids": numbers(3)})
    ids = encoding["ids"]
    moved = to_device(encoding, META)
    assert moved.ids.device == META
    assert encoding["ids"] is ids


def test_a_batch_encoding_of_transformers():
    transformers = pytest.importorskip("transformers")
    encoding = transformers.BatchEncoding({"ids": torch.arange(3), "mask": torch.ones(3)})
    ids = encoding["ids"]
    moved = to_device(encoding, META)
    assert type(moved) is transformers.BatchEncoding
    assert {t.device for t in tensors_in(moved)} == {META}
    assert encoding["ids"] is ids
    twin = to_device(encoding, CPU, duplicate=True)
    twin["mask"].zero_()
    twin["more"] = 1
    assert encoding["mask"].tolist() == [1, 1, 1]
    assert list(encoding) == ["ids", "mask"]


def test_inputs_that_require_grad_keep_it_as_leaves():
    x = numbers(3).requires_grad_()
    for twin in (
        to_device({"x": x}, CPU, duplicate=True)["x"],
        to_device(Sample(x), CPU, duplicate=True).x,
        to_device(Graph(x, numbers(2)), CPU, duplicate=True).x,
    ):
        assert twin is not x
        assert twin.requires_grad
        assert twin.is_leaf
    assert not to_device(x * 2, CPU, duplicate=True).grad_fn


def test_tensors_from_inference_mode_become_ordinary_ones():
    with torch.inference_mode():
        x = numbers(3)
    moved = to_device([x], CPU)[0]
    assert not moved.is_inference()
    assert torch.equal(moved, x)


def test_views_and_formats_survive_a_duplicate():
    image = numbers(2, 3, 4, 4).to(memory_format=torch.channels_last)
    twin = to_device(image, CPU, duplicate=True)
    assert twin.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(twin, image)
    sparse = torch.eye(3).to_sparse()
    again = to_device({"s": sparse}, CPU, duplicate=True)["s"]
    assert torch.equal(again.to_dense(), torch.eye(3))


class Stubborn:
    """Can be moved but not copied."""

    def __init__(self, x):
        self.x = x

    def __deepcopy__(self, memo):
        raise TypeError("cannot be copied")

    def to(self, device):
        return Stubborn(self.x.to(device))


def test_objects_that_cannot_be_copied_are_moved_all_the_same():
    data = Stubborn(numbers(3))
    assert to_device(data, META, duplicate=True).x.device == META
    assert data.x.device == CPU


class Shared:
    def __init__(self, x):
        self.x, self.again, self.parts = x, x, [x, {"x": x}]

    def to(self, device):
        twin = copy.copy(self)
        twin.x = twin.again = self.x.to(device)
        return twin


def test_a_tensor_under_two_names_of_an_object_stays_one():
    twin = to_device(Shared(numbers(3)), CPU, duplicate=True)
    assert twin.x is twin.again is twin.parts[0] is twin.parts[1]["x"]


def test_objects_that_hold_themselves_are_read_once():
    data = Graph(numbers(3), numbers(2))
    data.me = data
    assert len(list(tensors_in(data))) == 2


# -------------------------------------------------------------------------------------- cutting


def test_tensors_arrays_and_lists_are_cut_along_their_examples():
    x, y = numbers(5, 2), np.arange(5)
    words, texts = [numbers(n) for n in (3, 1, 4, 1, 2)], list("abcde")
    batch = {
        "x": x,
        "deep": (y, Pair(x[:, 0].clone(), words)),
        "texts": texts,
        "scalar": torch.tensor(2.0),
        "number": 3,
        "text": "abcde",
        "nothing": None,
        "sample": Frozen(x, Sample(x, texts)),
        "list of tensors": [x, y],
    }
    with untouched(batch):
        piece = cut(batch, 1, 3, 5)
    assert torch.equal(piece["x"], x[1:3])
    assert piece["deep"][0].tolist() == [1, 2]
    assert type(piece["deep"][1]) is Pair
    assert torch.equal(piece["deep"][1].first, x[1:3, 0])
    assert piece["deep"][1].second is not words
    assert [id(w) for w in piece["deep"][1].second] == [id(w) for w in words[1:3]]
    assert piece["texts"] == ["b", "c"]
    assert (piece["scalar"], piece["number"], piece["text"], piece["nothing"]) == (
        2,
        3,
        "abcde",
        None,
    )
    assert type(piece["sample"]) is Frozen
    assert torch.equal(piece["sample"].extra.x, x[1:3])
    assert piece["sample"].extra.extra == ["b", "c"]
    assert [len(item) for item in piece["list of tensors"]] == [2, 2]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_pieces_together_are_the_batch(size):
    batch = {"x": numbers(7, 3), "y": [torch.arange(7), np.arange(7)], "texts": list("abcdefg")}
    pieces = [cut(batch, start, min(start + size, 7), 7) for start in range(0, 7, size)]
    assert torch.equal(torch.cat([p["x"] for p in pieces]), batch["x"])
    assert torch.equal(torch.cat([p["y"][0] for p in pieces]), batch["y"][0])
    assert np.concatenate([p["y"][1] for p in pieces]).tolist() == list(range(7))
    assert [text for p in pieces for text in p["texts"]] == batch["texts"]


def test_pieces_keep_the_class_of_their_containers():
    for batch in (
        collections.OrderedDict(x=numbers(4)),
        defaultdict(("x", numbers(4))),
        types.MappingProxyType({"x": numbers(4)}),
        Moved(x=numbers(4)),
        Sample(numbers(4)),
        Slotted(numbers(4), list("abcd")),
        Pair(numbers(4)),
        (numbers(4),),
        [numbers(4)],
    ):
        piece = cut(batch, 0, 3, 4)
        assert type(piece) is type(batch)
        assert next(tensors_in(piece)).shape == (3,)
        assert next(tensors_in(batch)).shape == (4,)


def test_a_batch_encoding_is_cut():
    transformers = pytest.importorskip("transformers")
    encoding = transformers.BatchEncoding({"ids": torch.arange(4), "mask": torch.ones(4, 2)})
    piece = cut(encoding, 1, 3, 4)
    assert type(piece) is transformers.BatchEncoding
    assert piece["ids"].tolist() == [1, 2]
    assert encoding["ids"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("batch", "why"),
    [
        ({"x": numbers(4), "y": numbers(3)}, "one of its tensors has length 3 instead of 4"),
        ({"x": numbers(4), "y": np.zeros(2)}, "one of its tensors has length 2 instead of 4"),
        ([numbers(4), ["a", "b"]], "one of its lists has length 2 instead of 4"),
        ((numbers(4), Graph(numbers(4), numbers(4))), "a Graph does not show"),
        (packed(), "PackedSequence"),
    ],
)
def test_what_cannot_be_cut_says_why(batch, why):
    with pytest.raises(ValueError, match=why):
        cut(batch, 0, 2, 4)


# --------------------------------------------------------------------------------- comparisons


@every_batch
def test_a_fingerprint_sees_every_number(kind):
    data = BATCHES[kind]()
    mark = fingerprint(data)
    assert fingerprint(BATCHES[kind]()) == mark
    assert fingerprint(to_device(data, CPU, duplicate=True)) == mark
    for tensor in tensors_in(data):
        if tensor.numel():
            tensor.view(-1)[-1] += 1
            assert fingerprint(data) != mark
            assert not same_tensors(data, BATCHES[kind]())
            tensor.view(-1)[-1] -= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8])
@pytest.mark.parametrize("size", [4 * LANES - 1, 4 * LANES, 17 * LANES + 3])
def test_the_fingerprint_of_a_large_tensor_sees_changes_and_order(dtype, size):
    # Values with few bits: what is weak loses them among the high bits.
    signs = torch.randint(2, (size,), generator=torch.Generator().manual_seed(0)).to(dtype)
    marks = {fingerprint(signs)}
    assert fingerprint(signs.clone()) in marks
    places = [0, 1, LANES - 1, LANES, 3 * LANES + 7, size // 2, size - 2, size - 1]
    for place in places:
        changed = signs.clone()
        changed[place] = 1 - changed[place]
        marks.add(fingerprint(changed))
    assert len(marks) == 1 + len(set(places))
    for distance in (1, 64, LANES // 8, LANES // 2, LANES, 2 * LANES):
        turned = fingerprint(signs.roll(distance))
        assert turned not in marks
        marks.add(turned)
    assert fingerprint(signs.view(-1, 1)) not in marks


def test_the_fingerprint_of_a_large_tensor_sees_swapped_rows():
    rows = torch.randint(2, (130, LANES), generator=torch.Generator().manual_seed(0)).float()
    mark = fingerprint(rows)
    for first, second in ((0, 1), (0, 64), (1, 129), (63, 127), (128, 129)):
        order = torch.arange(130)
        order[first], order[second] = second, first
        assert fingerprint(rows[order]) != mark


def test_equal_batches_are_told_from_others():
    first = {"x": numbers(3), "y": "a"}
    assert same_tensors(first, {"x": numbers(3), "y": "b"})
    assert not same_tensors(first, {"x": numbers(3, seed=1)})
    assert not same_tensors(first, {"x": numbers(2)})
    assert not same_tensors(first, {"x": numbers(3), "y": numbers(1)})
    assert same_tensors(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert not same_tensors(torch.tensor([float("nan")]), torch.tensor([0.0]))


def test_packed_sequences_are_followed():
    data = packed()
    moved = to_device(data, META)
    assert isinstance(moved, PackedSequence)
    assert moved.data.device == META
    assert moved.batch_sizes.device == CPU  # where PyTorch wants them
    assert data.data.device == CPU
    twin = to_device(data, CPU, duplicate=True)
    twin.data.zero_()
    assert bool(data.data.any())
