"""How many terms a batch's mean runs over: token labels, and who must be told."""

from __future__ import annotations

import collections
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import flatminima as fm

LABELS = torch.tensor([[5, 6, 7, -100], [8, 9, -100, -100], [-100, 3, -100, 4]])
"""Seven labels, of which five are not the first of their row: 2, 1 and 2."""


@dataclasses.dataclass
class Sample:
    ids: torch.Tensor
    labels: torch.Tensor


class Encoding(dict):
    __getattr__ = dict.__getitem__


# --------------------------------------------------------------------------------- token_weight


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 7),
        ({"shift": True}, 5),
        ({"ignore_index": 5}, 11),
        ({"ignore_index": 9, "shift": True}, 8),
        ({"labels": "labels"}, 7),
    ],
)
@pytest.mark.parametrize(
    "batch",
    [
        {"ids": torch.zeros(3, 4), "labels": LABELS},
        Encoding(ids=torch.zeros(3, 4), labels=LABELS),
    ],
    ids=["mapping", "encoding"],
)
def test_labels_that_count_are_counted(batch, options, expected):
    count = fm.token_weight(**options)(batch)
    assert count == expected
    assert type(count) is int


@pytest.mark.parametrize(
    ("batch", "options"),
    [
        ((torch.zeros(3, 4), LABELS), {}),
        ([torch.zeros(3, 4), LABELS], {}),
        ((LABELS, torch.zeros(3, 4)), {"labels": 0}),
        ((torch.zeros(3), torch.zeros(3), LABELS), {"labels": -1}),
        ({"targets": LABELS, "labels": torch.zeros(3, 4)}, {"labels": "targets"}),
        ({0: LABELS}, {"labels": 0}),
        (Sample(torch.zeros(3, 4), LABELS), {"labels": "labels"}),
    ],
)
def test_labels_may_lie_anywhere(batch, options):
    assert fm.token_weight(**options)(batch) == 7
    assert fm.token_weight(**options, shift=True)(batch) == 5


def test_labels_of_one_row_or_with_more_dimensions():
    assert fm.token_weight()((None, LABELS[0])) == 3
    assert fm.token_weight(shift=True)((None, LABELS[0])) == 2
    assert fm.token_weight(shift=True)((None, LABELS[None])) == 5
    assert fm.token_weight()((None, LABELS.int())) == 7
    assert fm.token_weight()((None, torch.full((2, 3), -100))) == 0


@pytest.mark.parametrize(
    ("batch", "options", "place"),
    [
        ({"ids": LABELS}, {}, "'labels'"),
        ((LABELS,), {}, "1"),
        ({"labels": LABELS}, {"labels": "targets"}, "'targets'"),
        ({"labels": LABELS.double()}, {}, "'labels'"),
        ({"labels": LABELS.tolist()}, {}, "'labels'"),
        ({"labels": None}, {}, "'labels'"),
        (LABELS.double(), {}, "1"),
        (3, {}, "1"),
    ],
)
def test_batches_without_such_labels_are_refused(batch, options, place):
    with pytest.raises(
        fm.InvalidArgumentError, match=f"no integer labels at {place} of a .*labels="
    ):
        fm.token_weight(**options)(batch)


# --------------------------------------------------------------- what the objective makes of it


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(7, 3), nn.Linear(3, 7)
        self.double()

    def forward(self, ids):
        return self.head(self.table(ids).tanh()).transpose(1, 2)


ROWS = 8
LENGTHS = (6, 1, 3, 2, 5, 1, 4, 2)
IDS = torch.randint(1, 7, (ROWS, 6), generator=torch.Generator().manual_seed(0))
TAGS = torch.randint(1, 7, (ROWS, 6), generator=torch.Generator().manual_seed(1))


def ragged(marks):
    """Batches of rows between the marks, each padded to its own longest row."""
    edges = sorted({0, ROWS, *marks})
    batches = []
    for begin, end in itertools.pairwise(edges):
        width = max(LENGTHS[begin:end])
        inside = torch.arange(width) < torch.tensor(LENGTHS[begin:end])[:, None]
        ids = torch.where(inside, IDS[begin:end, :width], 0)
        tags = torch.where(inside, TAGS[begin:end, :width], -100)
        batches.append({"input_ids": ids, "attention_mask": inside.long(), "labels": tags})
    return batches


partitions = st.lists(st.integers(1, ROWS - 1), max_size=5)


def one_by_one(model):
    """The mean over all labels, sequence by sequence and without padding."""
    losses = [
        F.cross_entropy(model(IDS[None, i, :n]), TAGS[None, i, :n], reduction="sum")
        for i, n in enumerate(LENGTHS)
    ]
    return (sum(losses) / sum(LENGTHS)).item()


@given(marks=partitions)
@settings(max_examples=15)
def test_a_token_loss_does_not_depend_on_the_batches(marks):
    model, batches = Tagger(), ragged(marks)
    mapped = fm.Objective(
        model,
        data=batches,
        batch_loss=lambda m, b: F.cross_entropy(m(b["input_ids"]), b["labels"]),
        weight=fm.token_weight(),
    )
    paired = fm.Objective(
        model,
        lambda output, target: F.cross_entropy(output, target),
        [(b["input_ids"], b["labels"]) for b in batches],
        weight=fm.token_weight(),
    )
    known = fm.Objective(
        model, nn.CrossEntropyLoss(), [(b["input_ids"], b["labels"]) for b in batches]
    )
    for objective in (mapped, paired, known):
        assert objective.loss() == pytest.approx(one_by_one(model), rel=1e-12)
        assert objective.batches.total_weight == sum(LENGTHS)
        assert objective.examples == ROWS


def test_counting_by_examples_would_be_wrong():
    batches = ragged([1, 4])
    counted, naive = (
        fm.Objective(
            Tagger(),
            data=batches,
            batch_loss=lambda m, b: F.cross_entropy(m(b["input_ids"]), b["labels"]),
            weight=weight,
        )
        for weight in (fm.token_weight(), lambda b: len(b["labels"]))
    )
    assert abs(naive.loss() - counted.loss()) > 1e-3


def test_batches_whose_labels_are_all_ignored_add_nothing():
    model, batches = Tagger(), ragged([3, 5])
    empty = {k: v.clone() for k, v in batches[1].items()}
    empty["labels"][:] = -100
    objective = fm.Objective(
        model,
        data=[*batches, empty],
        batch_loss=lambda m, b: F.cross_entropy(m(b["input_ids"]), b["labels"]),
        weight=fm.token_weight(),
    )
    assert objective.loss() == pytest.approx(one_by_one(model), rel=1e-12)


# --------------------------------------------------------------------------- Hugging Face models


def causal_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=7, n_positions=8, n_embd=4, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.loss_type = "ForCausalLM"  # which it takes anyway, after a message that it does
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def own_loss(model, batch):
    return model(**batch).loss


def shifted_one_by_one(model):
    """Mean cross-entropy of every label but the first of each sequence."""
    total = torch.zeros((), dtype=torch.float64)
    for i, n in enumerate(LENGTHS):
        scores = model(input_ids=IDS[None, i, :n]).logits[0, :-1]
        total += F.cross_entropy(scores.double(), TAGS[i, 1:n], reduction="sum")
    return (total / sum(n - 1 for n in LENGTHS)).item()


@pytest.mark.parametrize("marks", [(), (1,), (3, 5), (2, 4, 6), range(1, 8)])
def test_a_causal_model_has_the_loss_of_its_labels(marks):
    """Also where rows of one token, which have no label to predict, make up a batch."""
    model = causal_model()
    objective = fm.Objective(
        model, data=ragged(marks), batch_loss=own_loss, weight=fm.token_weight(shift=True)
    )
    with torch.no_grad():
        expected = shifted_one_by_one(model)
    assert objective.loss() == pytest.approx(expected, rel=2e-6)
    assert objective.batches.total_weight == sum(n - 1 for n in LENGTHS)


def test_derivatives_of_a_causal_model_do_not_depend_on_the_batches():
    model = causal_model()
    whole, parts, pieces = (
        fm.Objective(
            model,
            data=ragged(marks),
            batch_loss=own_loss,
            weight=fm.token_weight(shift=True),
            microbatch=size,
        )
        for marks, size in (((), None), ((1, 3, 6), None), ((), 3))
    )
    v = torch.randn(whole.size, generator=torch.Generator().manual_seed(0))
    products = [fm.HessianOperator(o) @ v for o in (whole, parts, pieces)]
    for objective, product in ((parts, products[1]), (pieces, products[2])):
        torch.testing.assert_close(objective.gradient(), whole.gradient(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(product, products[0], rtol=1e-4, atol=1e-5)


def test_a_causal_model_without_a_weight_is_refused_with_the_way_out():
    with pytest.raises(fm.InvalidArgumentError, match="labels of −100") as caught:
        fm.Objective(causal_model(), data=ragged([3]), batch_loss=own_loss)
    assert "token_weight(shift=True)" in str(caught.value)


def test_batches_of_other_lengths_are_refused_even_without_padding():
    """Nothing is ignored, but a batch of short rows would count as much as one of long ones."""
    batches = [{"input_ids": IDS[:4, :n], "labels": TAGS[:4, :n]} for n in (6, 3)]
    with pytest.raises(fm.InvalidArgumentError, match=r"Batch 1 has labels of another length"):
        fm.Objective(causal_model(), data=batches, batch_loss=own_loss)
    fm.Objective(causal_model(), data=[batches[0]] * 2, batch_loss=own_loss)


def test_rows_of_one_length_need_no_weight():
    model = causal_model()
    batches = [{"input_ids": IDS[a:b], "labels": TAGS[a:b]} for a, b in ((0, 5), (5, 8))]
    objective = fm.Objective(model, data=batches, batch_loss=own_loss)
    with torch.no_grad():
        scores = model(input_ids=IDS).logits[:, :-1].reshape(-1, 7)
        expected = F.cross_entropy(scores, TAGS[:, 1:].reshape(-1)).item()
    assert objective.loss() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda output, target: F.cross_entropy(output, target),
        nn.Sequential(),
    ],
    ids=["function", "module"],
)
def test_ignored_labels_of_an_unknown_criterion_are_refused(loss_fn):
    data = [(b["input_ids"], b["labels"]) for b in ragged([3])]
    with pytest.raises(fm.InvalidArgumentError, match=r"Batch 0 has labels of −100.*token_weight"):
        fm.Objective(Tagger(), loss_fn, data)


@pytest.mark.parametrize("kind", ["mapping", "dataclass", "tuple", "named"])
def test_ignored_labels_of_a_batch_loss_are_refused_wherever_token_weight_finds_them(kind):
    named = collections.namedtuple("Named", ["ids", "labels"])
    make = {
        "mapping": lambda b: {"ids": b["input_ids"], "labels": b["labels"]},
        "dataclass": lambda b: Sample(b["input_ids"], b["labels"]),
        "tuple": lambda b: (b["input_ids"], b["labels"]),
        "named": lambda b: named(b["input_ids"], b["labels"]),
    }[kind]

    def loss(model, batch):
        ids, labels = batch if isinstance(batch, tuple) else (batch["ids"], batch["labels"])
        return F.cross_entropy(model(ids), labels)

    with pytest.raises(fm.InvalidArgumentError, match=r"labels of −100.*token_weight"):
        fm.Objective(Tagger(), data=[make(b) for b in ragged([3])], batch_loss=loss)


@pytest.mark.parametrize("labels", ["floats", "classes", "none"])
def test_other_labels_are_no_matter(labels):
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    made = {
        "floats": torch.full((6, 2), -100.0),
        "classes": torch.arange(6) % 2,
        "none": None,
    }[labels]
    batches = [{"x": x[:4], "labels": None if made is None else made[:4]}]
    batches.append({"x": x[4:], "labels": None if made is None else made[4:]})
    objective = fm.Objective(
        nn.Linear(3, 2), data=batches, batch_loss=lambda m, b: m(b["x"]).square().mean()
    )
    assert objective.batches.total_weight == 6
