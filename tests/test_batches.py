import collections
import dataclasses
import random
import types
import typing

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
)

import flatminima as fm
from flatminima.objective import batches as room
from flatminima.support.trees import to_device
from integrity import untouched
from zoo import cut

N = 20
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(1)).double()
Y = torch.randint(4, (N,), generator=torch.Generator().manual_seed(2))
CACHES = pytest.mark.parametrize("cache", [True, False, "auto"])


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)).double()


def objective_of(data, loss_fn=F.cross_entropy, **options):
    return fm.Objective(net(), loss_fn, data, progress=False, **options)


def direct():
    """L and ∇L of all the data at once."""
    model = net()
    loss = F.cross_entropy(model(X), Y)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), torch.cat([g.reshape(-1) for g in gradients])


def assert_is_the_whole(objective):
    loss, gradient = direct()
    for _ in range(2):
        value, found = objective.value_and_gradient()
        assert value == pytest.approx(loss, rel=1e-13)
        torch.testing.assert_close(found, gradient, rtol=1e-11, atol=1e-13)
    assert objective.examples == N
    assert objective.batches.total_weight == N


# --------------------------------------------------------------------------------- kinds of data


class MapDataset(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, index):
        if index >= N:
            raise IndexError(index)
        return X[index], Y[index]


class Doubling(TensorDataset):
    """Does more than take rows out of its tensors."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return 2 * x, y


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


class Indexed:
    """A map-style dataset that is no torch Dataset and cannot be iterated over."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return X[index], Y[index]

    __iter__ = None


class HubDataset(MapDataset):
    """Iterates over examples, like the datasets of the Hugging Face hub."""

    def set_format(self, kind):
        raise NotImplementedError

    def __iter__(self):
        return iter(zip(X, Y, strict=True))


class Repeatable:
    def __iter__(self):
        return iter(cut((X, Y), (8, 8, 4)))


KINDS = {
    "tuple of tensors": lambda: (X, Y),
    "tuple of arrays": lambda: (X.numpy(), Y.numpy()),
    "tensor dataset": lambda: TensorDataset(X, Y),
    "tensor dataset of its own kind": lambda: Doubling(X / 2, Y),
    "dataset": MapDataset,
    "iterable dataset": Stream,
    "dataset by its methods": HubDataset,
    "loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=6),
    "shuffling loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=6, shuffle=True),
    "loader with a generator": lambda: DataLoader(
        TensorDataset(X, Y), batch_size=6, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "loader with a sampler": lambda: DataLoader(
        MapDataset(),
        batch_size=6,
        sampler=RandomSampler(MapDataset(), generator=torch.Generator().manual_seed(4)),
    ),
    "loader with a batch sampler": lambda: DataLoader(
        MapDataset(),
        batch_sampler=BatchSampler(
            RandomSampler(MapDataset(), generator=torch.Generator().manual_seed(5)), 7, False
        ),
    ),
    "loader with a batch sampler as sampler": lambda: DataLoader(
        TensorDataset(X, Y),
        batch_size=None,
        sampler=BatchSampler(
            RandomSampler(range(N), generator=torch.Generator().manual_seed(6)), 7, False
        ),
    ),
    "loader of a stream": lambda: DataLoader(Stream(), batch_size=6),
    "list of batches": lambda: cut((X, Y), (8, 8, 4)),
    "list of lists": lambda: [list(b) for b in cut((X, Y), (8, 8, 4))],
    "tuple of batches": lambda: tuple(cut((X, Y), (8, 8, 4))),
    "own iterable": Repeatable,
    "deque": lambda: collections.deque(cut((X, Y), (8, 8, 4))),
}


@pytest.mark.parametrize("kind", KINDS)
@CACHES
def test_every_kind_of_data_gives_the_same(kind, cache):
    assert_is_the_whole(objective_of(KINDS[kind](), cache=cache, batch_size=7))


@pytest.mark.parametrize("kind", ["loader", "shuffling loader", "own iterable", "dataset"])
def test_data_are_read_once_when_cached_and_each_time_when_not(kind):
    kept = objective_of(KINDS[kind](), cache=True)
    kept.loss()
    kept.gradient()
    assert kept.batches.cached
    assert kept.batches.readings == 1
    fresh = objective_of(KINDS[kind](), cache=False)
    fresh.loss()
    fresh.gradient()
    assert not fresh.batches.cached
    assert fresh.batches.readings == 3


def test_automatic_caching_stops_at_the_budget(monkeypatch):
    loader = DataLoader(TensorDataset(X, Y), batch_size=6, shuffle=True)
    monkeypatch.setattr(room, "available_bytes", lambda device: 4 * X.nbytes)
    objective = objective_of(loader)
    assert not objective.batches.cached
    assert_is_the_whole(objective)
    monkeypatch.setattr(room, "available_bytes", lambda device: 4 * (X.nbytes + Y.nbytes))
    assert objective_of(loader).batches.cached


def test_tensors_in_place_need_no_budget(monkeypatch):
    monkeypatch.setattr(room, "available_bytes", lambda device: 0)
    assert objective_of((X, Y)).batches.cached
    assert objective_of(cut((X, Y), (10, 10))).batches.cached


def test_tuples_are_cut_by_batch_size():
    objective = objective_of((X, Y), batch_size=6)
    with objective.batches.reading() as stream:
        batches = list(stream)
    assert [b.index for b in batches] == [0, 1, 2, 3]
    assert [b.weight for b in batches] == [6, 6, 6, 2]
    assert torch.equal(torch.cat([b.data[0] for b in batches]), X)


@pytest.mark.parametrize("cache", [True, False])
def test_a_shuffling_loader_deals_the_same_cards_each_time(cache):
    loader = DataLoader(TensorDataset(X, Y), batch_size=6, shuffle=True)
    objective = objective_of(loader, cache=cache)
    orders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        with objective.batches.reading() as stream:
            orders.append(torch.cat([b.data[0] for b in stream]))
    assert torch.equal(*orders)
    assert not torch.equal(orders[0], X)


@pytest.mark.parametrize("cache", [True, False])
def test_the_loaders_own_generator_is_put_back(cache):
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(X, Y), batch_size=6, shuffle=True, generator=generator)
    state = generator.get_state()
    objective = objective_of(loader, cache=cache)
    objective.loss()
    assert torch.equal(generator.get_state(), state)
    list(loader)
    moved = generator.get_state()
    value = objective.loss()
    assert torch.equal(generator.get_state(), moved)
    assert value == objective.loss() == pytest.approx(direct()[0], rel=1e-13)


def test_augmentation_from_the_global_states_is_the_same_each_time():
    class Augmented(MapDataset):
        def __getitem__(self, index):
            noise = torch.rand(1).item() + random.random() + np.random.rand()  # noqa: NPY002
            return X[index] + noise, Y[index]

    def disturb():
        torch.rand(3)
        random.random()
        np.random.rand()  # noqa: NPY002

    fresh = objective_of(DataLoader(Augmented(), batch_size=6, shuffle=True), cache=False)
    disturb()
    kept = objective_of(DataLoader(Augmented(), batch_size=6, shuffle=True), cache=True)
    first = fresh.loss()
    disturb()
    assert fresh.loss() == first == kept.loss()


def test_a_loader_with_a_worker_gives_the_same():
    loader = DataLoader(
        TensorDataset(X, Y),
        batch_size=6,
        shuffle=True,
        num_workers=1,
        multiprocessing_context="spawn",
    )
    assert_is_the_whole(objective_of(loader, cache=True))


def test_a_loader_that_fills_the_same_tensors_again_is_kept_batch_by_batch():
    class Recycling:
        def __iter__(self):
            x, y = torch.empty(5, 3).double(), torch.empty(5, dtype=torch.long)
            for start in range(0, N, 5):
                x.copy_(X[start : start + 5])
                y.copy_(Y[start : start + 5])
                yield x, y

    assert_is_the_whole(objective_of(Recycling(), cache=True))
    assert_is_the_whole(objective_of(Recycling(), cache=False))


def test_tensors_made_in_inference_mode_can_be_used():
    with torch.inference_mode():
        x, batches = X.clone(), [(X[:9].clone(), Y[:9].clone()), (X[9:].clone(), Y[9:].clone())]
    assert_is_the_whole(objective_of((x, Y)))
    assert_is_the_whole(objective_of(batches))
    assert_is_the_whole(objective_of(DataLoader(TensorDataset(x, Y), batch_size=8), cache=False))


@CACHES
def test_batches_of_weight_zero_are_not_given_to_the_model(cache):
    seen = []

    def watching(output, target):
        seen.append(len(target))
        return F.cross_entropy(output, target)

    batches = cut((X, Y), (3, 5, 12))
    weight = lambda batch: 0 if len(batch[1]) == 5 else len(batch[1])  # noqa: E731
    objective_of(batches, watching, weight=weight, cache=cache).loss()
    assert seen == [3, 12]


def test_data_are_iterated_over_only_where_random_states_are_kept():
    class Eager:
        """Shuffles at the moment it is asked for an iterator."""

        def __iter__(self):
            order = torch.randperm(N)
            return iter([(X[order], Y[order])])

    model = net()  # which draws its parameters
    with untouched(model, X, Y):
        objective = fm.Objective(model, F.cross_entropy, Eager(), cache=False, progress=False)
        value = objective.loss()
    torch.rand(3)
    assert objective.loss() == value


# ------------------------------------------------------------------------------ forms of batches


class Pair(typing.NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    y: torch.Tensor
    note: str = "kept"


@dataclasses.dataclass(frozen=True)
class FrozenRecord:
    x: torch.Tensor
    y: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class SlotRecord:
    x: torch.Tensor
    y: torch.Tensor


class Movable:
    """Moves itself in place and returns itself, like a BatchEncoding."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def to(self, device):
        self.x, self.y = self.x.to(device), self.y.to(device)
        return self


class Holder(collections.UserDict):
    pass


class Plain:
    def __init__(self, x, y):
        self.x, self.y = x, y


def defaults(x, y):
    mapping = collections.defaultdict(list)
    mapping.update(x=x, y=y)
    return mapping


FORMS = {
    "tuple": (lambda x, y: (x, y), lambda b: b),
    "list": (lambda x, y: [x, y], lambda b: b),
    "dict": (lambda x, y: {"x": x, "y": y}, lambda b: (b["x"], b["y"])),
    "ordered dict": (
        lambda x, y: collections.OrderedDict(y=y, x=x),
        lambda b: (b["x"], b["y"]),
    ),
    "defaultdict": (defaults, lambda b: (b["x"], b["y"])),
    "user dict": (lambda x, y: Holder(x=x, y=y), lambda b: (b["x"], b["y"])),
    "mapping proxy": (
        lambda x, y: types.MappingProxyType({"x": x, "y": y}),
        lambda b: (b["x"], b["y"]),
    ),
    "named tuple": (Pair, lambda b: (b.x, b.y)),
    "dataclass": (Record, lambda b: (b.x, b.y)),
    "frozen dataclass": (FrozenRecord, lambda b: (b.x, b.y)),
    "dataclass with slots": (SlotRecord, lambda b: (b.x, b.y)),
    "object that moves itself": (Movable, lambda b: (b.x, b.y)),
    "object": (Plain, lambda b: (b.x, b.y)),
    "nested": (
        lambda x, y: {"in": [{"x": x}, None, "text", 3], "out": (Record(x, y), Pair(x, y))},
        lambda b: (b["in"][0]["x"], b["out"][1].y),
    ),
}


@pytest.mark.parametrize("form", FORMS)
@CACHES
def test_every_form_of_batch_gives_the_same(form, cache):
    make, take = FORMS[form]
    data = [make(x, y) for x, y in cut((X, Y), (9, 7, 4))]

    def loss(model, batch):
        x, y = take(batch)
        return F.cross_entropy(model(x), y)

    assert_is_the_whole(objective_of(data, None, batch_loss=loss, cache=cache))


@pytest.mark.parametrize("form", [f for f in FORMS if f != "object"])
def test_batches_are_moved_and_the_users_own_stay_where_they_are(form):
    make, take = FORMS[form]
    batch = make(X, Y)
    moved = to_device(batch, torch.device("meta"))
    assert type(moved) is type(batch)
    assert {t.device.type for t in take(moved)} == {"meta"}
    assert take(batch)[0] is X
    assert take(batch)[1] is Y


def test_moving_keeps_what_is_no_tensor():
    batch = {"x": X, "note": "text", "more": [None, Record(X, Y, "own")]}
    moved = to_device(batch, torch.device("meta"))
    assert moved["note"] == "text"
    assert moved["more"][0] is None
    assert moved["more"][1].note == "own"
    assert list(moved) == list(batch)


def test_pairs_of_nested_inputs_go_through_loss_fn():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, inputs):
            return self.net(inputs["a"] + inputs["b"][0])

    data = [({"a": x / 2, "b": [x / 2]}, y) for x, y in cut((X, Y), (9, 11))]
    objective = fm.Objective(Sum(), F.cross_entropy, data)
    assert objective.loss() == pytest.approx(direct()[0], rel=1e-13)


# -------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("loss_fn", "target", "weight"),
    [
        (nn.CrossEntropyLoss(), torch.tensor([0, 1, -100]), 2),
        (nn.CrossEntropyLoss(ignore_index=1), torch.tensor([0, 1, 2]), 2),
        (nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0])), torch.tensor([0, 1, 1, -100]), 4.5),
        (nn.CrossEntropyLoss(), torch.zeros(3, 4, dtype=torch.long), 12),
        (nn.CrossEntropyLoss(), torch.full((3, 4), 0.25), 3),
        (nn.CrossEntropyLoss(), torch.full((3, 4, 5), 0.25), 15),
        (nn.NLLLoss(ignore_index=0), torch.tensor([0, 1, 2]), 2),
        (F.nll_loss, torch.tensor([0, 1, -100]), 2),
        (nn.MSELoss(), torch.zeros(3, 4), 12),
        (F.mse_loss, torch.zeros(3, 4), 12),
        (nn.KLDivLoss(reduction="batchmean"), torch.zeros(3, 4), 3),
        (nn.KLDivLoss(reduction="sum"), torch.zeros(3, 4), 12),
        (lambda output, target: output.sum(), torch.zeros(3, 4), 3),
        (lambda output, target: output.sum(), torch.tensor(1.0), 1),
    ],
)
def test_the_default_weight_counts_the_terms_of_the_mean(loss_fn, target, weight):
    objective = fm.Objective(net(), loss_fn, [(torch.zeros(3, 3).double(), target)])
    assert objective.batches.total_weight == weight


def test_batches_whose_length_is_not_told_need_a_weight():
    """A graph batch: ten nodes, twelve edges, two graphs."""
    batch = {"nodes": X[:10], "edges": torch.zeros(2, 12), "graphs": Y[:2]}
    loss = lambda model, b: model(b["nodes"]).square().mean()  # noqa: E731
    with pytest.raises(fm.InvalidArgumentError, match=r"Batch 0 does not tell how many.*weight="):
        objective_of([batch], None, batch_loss=loss)
    objective = objective_of([batch], None, batch_loss=loss, weight=lambda b: len(b["graphs"]))
    assert objective.batches.total_weight == 2


def test_batches_without_tensors_need_a_weight():
    with pytest.raises(fm.InvalidArgumentError, match="Batch 0 does not tell how many"):
        objective_of([{"text": "none"}], None, batch_loss=lambda m, b: m(X).mean())


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1, fm.NonFiniteError, r"weight= gave -1\.0 for batch 0"),
        (float("nan"), fm.NonFiniteError, "weight= gave nan for batch 0"),
        (float("inf"), fm.NonFiniteError, "weight= gave inf for batch 0"),
        ("many", fm.ArgumentTypeError, "weight= gave 'many' for batch 0"),
        (None, fm.ArgumentTypeError, "weight= gave None for batch 0"),
        (torch.ones(3), fm.ArgumentTypeError, r"weight= gave tensor\(\[1., 1., 1.\]\) for batch 0"),
    ],
)
def test_a_weight_that_is_no_weight_is_refused(value, error, message):
    with pytest.raises(error, match=message):
        objective_of((X, Y), weight=lambda batch: value)


@pytest.mark.parametrize("value", [3, 3.0, np.float32(3), torch.tensor(3), torch.tensor([3.0])])
def test_a_weight_may_be_any_one_number(value):
    assert objective_of((X, Y), weight=lambda batch: value).batches.total_weight == 3


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "data",
    [
        [],
        (),
        (X[:0], Y[:0]),
        TensorDataset(X[:0], Y[:0]),
        DataLoader(TensorDataset(X, Y), batch_size=64, drop_last=True),
    ],
    ids=["list", "tuple", "tensors", "dataset", "loader"],
)
def test_empty_data_are_refused(data):
    with pytest.raises(fm.EmptyDataError, match="The data hold no batch"):
        objective_of(data)


@pytest.mark.parametrize(
    ("labels", "options"),
    [(torch.full((N,), -100), {}), (Y, {"weight": lambda batch: 0})],
    ids=["ignored", "weight"],
)
def test_data_of_weight_zero_are_refused(labels, options):
    with pytest.raises(fm.EmptyDataError, match="All 3 batches have weight zero"):
        objective_of((X, labels), batch_size=8, **options)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (lambda: (b for b in [(X, Y)]), "generator"),
        (lambda: iter([(X, Y)]), "list_iterator"),
        (lambda: zip([X], [Y], strict=True), "zip"),
        (lambda: map(tuple, [(X, Y)]), "map"),
    ],
)
def test_data_that_can_be_read_only_once_are_refused(data, kind):
    with pytest.raises(fm.OneShotDataError, match=f"data is a {kind}, which can be read only once"):
        objective_of(data())


class Drifting(MapDataset):
    """Augments from a random state of its own."""

    def __init__(self):
        self.random = random.Random(0)

    def __getitem__(self, index):
        return X[index] + (self.random.random() if index == 13 else 0), Y[index]


@pytest.mark.parametrize("call", ["loss", "gradient", "matvec"])
def test_data_that_come_out_differently_are_found_out(call):
    objective = objective_of(DataLoader(Drifting(), batch_size=6), cache=False)
    calls = {
        "loss": objective.loss,
        "gradient": objective.gradient,
        "matvec": lambda: fm.HessianOperator(objective) @ torch.ones(objective.size),
    }
    with pytest.raises(fm.DataChangedError, match=r"\(batch 2 differs\).*cache=True"):
        calls[call]()


def test_data_that_would_differ_are_fixed_by_caching():
    objective = objective_of(DataLoader(Drifting(), batch_size=6), cache=True)
    assert objective.loss() == objective.loss()


class Sequel:
    """Gives one more or one batch fewer at the second reading, or other types."""

    def __init__(self, *readings):
        self.readings = iter(readings)

    def __iter__(self):
        return iter(next(self.readings))


WHOLE = cut((X, Y), (8, 8, 4))


@pytest.mark.parametrize(
    ("second", "what"),
    [
        (WHOLE[:2], "2 batches came instead of 3"),
        ([], "0 batches came instead of 3"),
        (cut((X, Y), (8, 8, 2, 2)), "batch 2 differs"),
        ([*WHOLE, WHOLE[0]], "batch 3 differs"),
        ([WHOLE[1], WHOLE[0], WHOLE[2]], "batch 0 differs"),
        ([(x, y.int()) for x, y in WHOLE], "batch 0 differs"),
        ([WHOLE[0], (WHOLE[1][0].reshape(4, 6), WHOLE[1][1]), WHOLE[2]], "batch 1 differs"),
    ],
    ids=["fewer", "none", "cut differently", "more", "order", "type", "shape"],
)
def test_a_second_reading_with_other_batches_is_found_out(second, what):
    def loss(output, target):
        return F.cross_entropy(output, target.long())

    objective = objective_of(Sequel(WHOLE, second), loss, cache=False)
    with pytest.raises(fm.DataChangedError, match=what):
        objective.loss()


def test_changes_within_objects_of_unknown_classes_are_found_out():
    class Once:
        def __init__(self):
            self.shift = 0.0

        def __iter__(self):
            self.shift += 1
            return iter([Plain(X + self.shift, Y)])

    objective = objective_of(
        Once(), None, cache=False, batch_loss=lambda m, b: F.cross_entropy(m(b.x), b.y)
    )
    with pytest.raises(fm.DataChangedError, match="batch 0 differs"):
        objective.loss()


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (None, fm.InvalidArgumentError, "needs data"),
        (X, fm.ArgumentTypeError, "data is a single tensor"),
        (X.numpy(), fm.ArgumentTypeError, "data is a single tensor"),
        ({"x": X, "y": Y}, fm.ArgumentTypeError, r"one mapping.*data=\[batch\]"),
        ("train.csv", fm.ArgumentTypeError, "data is a str"),
        (7, fm.ArgumentTypeError, "data is a int"),
        ((X, Y[:5]), fm.InvalidArgumentError, "differ in length: 20, 5"),
        ((X, torch.tensor(1)), fm.InvalidArgumentError, "a tensor without dimensions"),
        ([X, Y], fm.ArgumentTypeError, r"Batch 0 is a Tensor.*\(input, target\).*not a list"),
        ([(X, Y, Y)], fm.ArgumentTypeError, "Batch 0 is a tuple of 3.*batch_loss="),
        ([(X, Y), {"x": X}], fm.ArgumentTypeError, "Batch 1 is a dict.*batch_loss="),
        ((X, Y, Y), fm.ArgumentTypeError, "Batch 0 is a tuple of 3"),
    ],
)
def test_data_of_the_wrong_kind_are_refused(data, error, message):
    with pytest.raises(error, match=message):
        objective_of(data)


@pytest.mark.parametrize("cache", ["always", None, 0, 1, []])
def test_an_unknown_cache_is_refused(cache):
    with pytest.raises(fm.InvalidArgumentError, match=r"'cache' argument.*True, False or 'auto'"):
        objective_of((X, Y), cache=cache)


@pytest.mark.parametrize(
    ("batch_size", "error"),
    [(0, fm.InvalidArgumentError), (-3, fm.InvalidArgumentError), (2.5, fm.ArgumentTypeError)],
)
def test_a_wrong_batch_size_is_refused(batch_size, error):
    with pytest.raises(error, match=f"'batch_size' argument.*≥ 1; got {batch_size}"):
        objective_of((X, Y), batch_size=batch_size)


class Stuck:
    def __len__(self):
        return 3

    def to(self, device):
        raise RuntimeError("stays here")


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(
    "broken",
    [(X.to("meta"), Y), (X, Y.to("meta")), (Stuck(), Y)],
    ids=["input", "target", "object"],
)
def test_a_batch_that_cannot_be_moved_is_named(broken, cache):
    with pytest.raises(fm.DeviceError, match="Batch 1 cannot be moved to cpu, where the model is"):
        objective_of([(X, Y), broken], cache=cache)


@pytest.mark.parametrize("reading", [1, 2])
def test_errors_of_the_data_say_which_batch_was_read(reading):
    class Breaking:
        reading = 0

        def __iter__(self):
            self.reading += 1
            for index, batch in enumerate(WHOLE):
                if self.reading == reading and index == 2:
                    raise OSError("disk gone")
                yield batch

    def measure():
        return objective_of(Breaking(), cache=False).loss()

    with pytest.raises(OSError, match="disk gone") as caught:
        measure()
    if hasattr(caught.value, "add_note"):
        assert caught.value.__notes__ == ["This happened in batch 2 of the data."]


def test_a_label_without_a_class_weight_names_its_batch():
    labels = Y.clone()
    labels[17] = 9
    with pytest.raises(IndexError, match="9 is out of bounds") as caught:
        objective_of((X, labels), nn.CrossEntropyLoss(weight=torch.ones(4).double()), batch_size=6)
    if hasattr(caught.value, "add_note"):
        assert caught.value.__notes__ == ["This happened in batch 2 of the data."]
