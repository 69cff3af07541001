"""Batches in pieces: the same numbers in less memory, or a refusal with the reason."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import flatminima as fm
from integrity import untouched


def seeded(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def integers(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def net(outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


X, LABELS, VECTORS = seeded(17, 4), integers(3, 17), seeded(17, 3, seed=1)
IGNORING = torch.where(torch.arange(17) % 5 == 1, -100, LABELS)
WEIGHTS = torch.tensor([0.1, 3.0, 1.5]).double()
SIZES = (7, 1, 9)


def batched(*tensors):
    return list(zip(*(t.split(SIZES) for t in tensors), strict=True))


@dataclasses.dataclass(frozen=True)
class Sample:
    x: torch.Tensor
    y: torch.Tensor
    names: list[str]
    kind: str = "plain"
    extra: Any = None


class Pair(NamedTuple):
    x: torch.Tensor
    rest: dict[str, Any]


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, sentences):
        return self.head(torch.stack([self.table(s).tanh().mean(0) for s in sentences]))


SENTENCES = [integers(6, 1 + i % 4, seed=i) for i in range(17)]
"""Ragged; the first of length one, so that no tensor in it has the batch's length but by chance."""

ROWS = [slice(0, 7), slice(7, 8), slice(8, 17)]
TOKENS = integers(5, 17, 6)
TOKEN_LABELS = torch.where(
    torch.arange(6) < integers(7, 17, seed=3).clamp(min=1)[:, None],
    integers(5, 17, 6, seed=4),
    -100,
)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.double()

    def forward(self, ids):
        return self.head(self.table(ids).tanh()).transpose(1, 2)


SETTINGS = {
    "mean": lambda: (net(), {"loss_fn": nn.MSELoss(), "data": batched(X, VECTORS)}),
    "sum": lambda: (net(), {"loss_fn": nn.MSELoss(reduction="sum"), "data": batched(X, VECTORS)}),
    "cross-entropy": lambda: (net(), {"loss_fn": F.cross_entropy, "data": batched(X, LABELS)}),
    "ignored labels": lambda: (
        net(),
        {"loss_fn": nn.CrossEntropyLoss(), "data": batched(X, IGNORING)},
    ),
    "ignored labels, sum": lambda: (
        net(),
        {"loss_fn": nn.CrossEntropyLoss(reduction="sum"), "data": batched(X, IGNORING)},
    ),
    "class weights": lambda: (
        net(),
        {"loss_fn": nn.CrossEntropyLoss(weight=WEIGHTS), "data": batched(X, IGNORING)},
    ),
    "class weights, sum": lambda: (
        net(),
        {
            "loss_fn": nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum"),
            "data": batched(X, LABELS),
        },
    ),
    "token labels": lambda: (
        Tagger(),
        {"loss_fn": nn.CrossEntropyLoss(), "data": batched(TOKENS, TOKEN_LABELS)},
    ),
    "token weights": lambda: (
        Tagger(),
        {
            "batch_loss": lambda m, b: F.cross_entropy(m(b["ids"]), b["labels"]),
            "data": [{"ids": i, "labels": t} for i, t in batched(TOKENS, TOKEN_LABELS)],
            "weight": fm.token_weight(),
        },
    ),
    "mappings": lambda: (
        net(),
        {
            "batch_loss": lambda m, b: F.cross_entropy(m(b["x"]), b["deep"][1]),
            "data": [
                {"x": x, "deep": ["name", y, None], "scale": torch.tensor(2.0), "n": 3}
                for x, y in batched(X, LABELS)
            ],
        },
    ),
    "dataclasses": lambda: (
        net(),
        {
            "batch_loss": lambda m, b: F.cross_entropy(m(b.x), b.y) * len(b.kind),
            "data": [Sample(x, y, [str(i) for i in range(len(y))]) for x, y in batched(X, LABELS)],
        },
    ),
    "named tuples": lambda: (
        net(),
        {
            "batch_loss": lambda m, b: F.cross_entropy(m(b.x), b.rest["y"]),
            "data": [Pair(x, {"y": y, "text": "abc"}) for x, y in batched(X, LABELS)],
        },
    ),
    "ragged lists": lambda: (
        Words(),
        {
            "loss_fn": nn.CrossEntropyLoss(),
            "data": [(SENTENCES[rows], LABELS[rows]) for rows in ROWS],
            "weight": lambda batch: len(batch[1]),
        },
    ),
    "arrays": lambda: (
        net(),
        {
            "batch_loss": lambda m, b: F.cross_entropy(m(torch.as_tensor(b[0])), b[1]),
            "data": [(x.numpy(), y) for x, y in batched(X, LABELS)],
        },
    ),
    "own weights": lambda: (
        net(),
        {
            "loss_fn": lambda o, t: (
                ((o - t).square().sum(1) * (t[:, 0] > 0)).sum() / (t[:, 0] > 0).sum().clamp(min=1)
            ),
            "data": batched(X, VECTORS),
            "weight": lambda batch: (batch[1][:, 0] > 0).sum(),
        },
    ),
    "one tuple": lambda: (net(), {"loss_fn": nn.MSELoss(), "data": (X, VECTORS)}),
}


def numbers(objective):
    v = seeded(objective.size, 2, seed=5)
    shift = 0.1 * v[:, 0].contiguous()
    value, gradient = objective.value_and_gradient(shift)
    product = fm.HessianOperator(objective) @ v
    scalars = torch.tensor([objective.loss(), objective.loss_at(shift), value]).double()
    return scalars, objective.gradient(), gradient, product


def assert_same(found, expected, tolerance=1e-12):
    for one, other in zip(numbers(found), numbers(expected), strict=True):
        assert float((one - other).norm()) <= tolerance * float(other.norm())


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    ("size", "cache"), [(1, True), (2, False), (4, True), (100, True), ("auto", True)]
)
def test_pieces_give_the_same_numbers_as_whole_batches(size, cache, setting):
    model, options = SETTINGS[setting]()
    with untouched(model, options["data"]):
        whole = fm.Objective(model, **options)
        pieces = fm.Objective(model, **options, microbatch=size, cache=cache)
        assert_same(pieces, whole)


@pytest.mark.parametrize("setting", ["mean", "ragged lists", "dataclasses"])
def test_no_piece_is_larger_than_asked_for(setting):
    model, options = SETTINGS[setting]()
    sizes = []
    name = "loss_fn" if "loss_fn" in options else "batch_loss"
    function = options[name]

    def watching(first, second):
        sizes.append(len(second.y if isinstance(second, Sample) else second))
        return function(first, second)

    objective = fm.Objective(model, **options | {name: watching, "weight": weight_of}, microbatch=3)
    objective.loss()
    sizes.clear()
    objective.gradient()
    assert sizes == [3, 3, 1, 1, 3, 3, 3]
    assert objective.examples == 17


def weight_of(batch):
    return len(batch.y) if isinstance(batch, Sample) else len(batch[1])


def test_pieces_of_weight_zero_are_not_evaluated():
    """A mean over no labels is NaN."""
    labels = torch.full((6,), -100)
    labels[5] = 1
    losses = []

    class Watched(nn.CrossEntropyLoss):
        def forward(self, output, target):
            losses.append(super().forward(output, target))
            return losses[-1]

    options = {"data": [(X[:6], labels)]}
    objective = fm.Objective(net(), Watched(), **options, microbatch=2)
    plain = fm.Objective(net(), nn.CrossEntropyLoss(), **options)
    assert objective.loss() == pytest.approx(plain.loss(), rel=1e-12)
    assert all(math.isfinite(loss.item()) for loss in losses)
    assert_same(objective, plain)


def test_measures_work_in_pieces():
    whole, pieces = (
        fm.Objective(net(), nn.MSELoss(), (X, VECTORS), microbatch=size) for size in (None, 4)
    )
    for measure in (
        lambda o: fm.epsilon_sharpness(o, subspace=2, iterations=2).value,
        lambda o: fm.random_sharpness(o, samples=2).value,
        lambda o: fm.lanczos(fm.HessianOperator(o)).eigenvalues.item(),
        lambda o: fm.trace(fm.HessianOperator(o), products=3).value,
        lambda o: fm.layerwise(o, trace_products=3).layers[0].eigenvalue,
        lambda o: (
            fm.HessianOperator(o, method="finite_differences")
            .matvec(torch.ones(o.size))
            .norm()
            .item()
        ),
        lambda o: fm.interpolate(o, net(), torch.zeros(o.size), alphas=[0.5]).loss[0],
    ):
        assert measure(pieces) == pytest.approx(measure(whole), rel=1e-8)
    report = fm.sharpness(
        net(), nn.MSELoss(), (X, VECTORS), microbatch=4, measures=["gradient_norm"]
    )
    assert report.loss == pytest.approx(whole.loss(), rel=1e-12)


def test_metrics_work_in_pieces():
    whole, pieces = (
        fm.Objective(net(), nn.CrossEntropyLoss(), batched(X, IGNORING), microbatch=size)
        for size in (None, 2)
    )
    metrics = {"accuracy": fm.accuracy}
    (one, means), (other, values) = (o.evaluate_state({}, metrics) for o in (whole, pieces))
    assert one == pytest.approx(other, rel=1e-12)
    assert means["accuracy"] == pytest.approx(values["accuracy"], rel=1e-12)


# -------------------------------------------------------------------------------- out of memory


class Scarce:
    """A criterion with memory for so many rows, in the forward or in the derivative."""

    def __init__(self, rows, stage="forward", error=None):
        self.rows, self.stage, self.error = rows, stage, error
        self.seen = []

    def __call__(self, output, target):
        self.seen.append(len(target))
        if len(target) > self.rows:
            if self.stage == "forward":
                raise self.error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            output = Hungry.apply(output, self)
        return F.mse_loss(output, target)


class Hungry(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, owner):
        ctx.owner = owner
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ctx.owner.error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")


def scarce(criterion, **options):
    return fm.Objective(
        net(),
        criterion,
        batched(X, VECTORS),
        weight=lambda batch: batch[1].numel(),
        microbatch="auto",
        **options,
    )


@pytest.mark.parametrize("stage", ["forward", "backward"])
@pytest.mark.parametrize(("rows", "cache"), [(1, True), (2, False), (5, True), (8, True)])
def test_auto_finds_a_size_that_fits(rows, cache, stage):
    whole = fm.Objective(net(), nn.MSELoss(), batched(X, VECTORS))
    objective = scarce(Scarce(rows, stage), cache=cache)
    value, gradient = objective.value_and_gradient()
    assert value == pytest.approx(whole.loss(), rel=1e-12)
    torch.testing.assert_close(gradient, whole.gradient(), rtol=1e-11, atol=1e-13)
    v = seeded(objective.size)
    product = fm.HessianOperator(scarce(Scarce(rows, "forward"), cache=cache)) @ v
    torch.testing.assert_close(product, fm.HessianOperator(whole) @ v, rtol=1e-11, atol=1e-13)


def test_second_derivatives_that_do_not_fit_are_cut_too():
    class HungryTwice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gradient, rows):
            if rows > 2 and gradient.requires_grad:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return gradient.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient, None

    class Curved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            return gradient * HungryTwice.apply(x, len(x)).cos()

    criterion = lambda o, t: F.mse_loss(Curved.apply(o), t)  # noqa: E731
    options = {"data": batched(X, VECTORS), "weight": lambda batch: batch[1].numel()}
    objective = fm.Objective(net(), criterion, **options, microbatch="auto")
    plain = fm.Objective(net(), lambda o, t: F.mse_loss(o.sin(), t), **options)
    v = seeded(objective.size)
    found = fm.HessianOperator(objective) @ v
    torch.testing.assert_close(found, fm.HessianOperator(plain) @ v, rtol=1e-11, atol=1e-13)
    refused = fm.Objective(net(), criterion, **options)
    with pytest.raises(fm.DeviceMemoryError, match="microbatch='auto'"):
        fm.HessianOperator(refused) @ v


def test_the_smaller_size_is_kept():
    criterion = Scarce(3)
    objective = scarce(criterion)
    objective.loss()
    assert max(criterion.seen) == 7
    criterion.seen.clear()
    objective.loss()
    objective.gradient()
    assert max(criterion.seen) <= 3
    assert sum(criterion.seen) == 2 * 17
    # No smaller than memory asks for: 7 → 3.
    assert criterion.seen[:4] == [3, 3, 1, 1]


def test_with_enough_memory_nothing_is_cut():
    criterion = Scarce(20)
    objective = scarce(criterion)
    objective.loss()
    criterion.seen.clear()
    objective.gradient()
    assert criterion.seen == list(SIZES)


ERRORS = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "host": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
    "python": MemoryError("no memory"),
    "cublas": RuntimeError("CUDA error: out of memory"),
}


@pytest.mark.parametrize("stage", ["forward", "backward"])
@pytest.mark.parametrize("which", ERRORS)
def test_auto_gives_up_at_one_example_with_the_original_as_cause(which, stage):
    error = ERRORS[which]
    criterion = Scarce(0, stage, error)
    objective = scarce(criterion)
    with pytest.raises(
        fm.DeviceMemoryError, match="One example of batch 0 alone needs more memory"
    ) as caught:
        objective.gradient()
    assert caught.value.__cause__ is error
    assert criterion.seen[-1] == 1


@pytest.mark.parametrize("which", ERRORS)
@pytest.mark.parametrize("size", [None, 5])
def test_without_auto_the_way_out_is_named(size, which):
    error = ERRORS[which]
    objective = fm.Objective(
        net(),
        Scarce(3, error=error),
        batched(X, VECTORS),
        weight=lambda batch: batch[1].numel(),
        microbatch=size,
    )
    with pytest.raises(fm.DeviceMemoryError, match="microbatch='auto'") as caught:
        objective.loss()
    assert caught.value.__cause__ is error


def test_later_batches_that_do_not_fit_are_named():
    batches = [(X[:2], VECTORS[:2]), (X, VECTORS)]
    options = {"weight": lambda batch: batch[1].numel()}
    objective = fm.Objective(net(), Scarce(5), batches, **options)
    with pytest.raises(fm.DeviceMemoryError, match="for batch 1"):
        objective.loss()


@pytest.mark.parametrize("size", ["auto", 4])
def test_other_errors_are_no_matter_of_memory(size):
    calls = []

    def criterion(output, target):
        calls.append(len(target))
        if len(calls) > 3:
            raise RuntimeError("something else")
        return F.mse_loss(output, target)

    objective = fm.Objective(net(), criterion, [(X, VECTORS)], microbatch=size)
    with pytest.raises(RuntimeError, match="something else") as caught:
        objective.loss()
    assert not isinstance(caught.value, fm.FlatMinimaError)
    assert "batch 0" in caught.value.__notes__[0]


def test_a_failed_attempt_adds_nothing():
    """Neither to the loss nor to the gradient nor to a metric."""

    whole = fm.Objective(net(), nn.MSELoss(), batched(X, VECTORS))
    objective = scarce(Scarce(2, "backward"))
    torch.testing.assert_close(objective.gradient(), whole.gradient(), rtol=1e-11, atol=1e-13)
    counted = []
    metric = lambda o, t: counted.append(len(t)) or (o - t).square().mean()  # noqa: E731
    _, means = scarce(Scarce(2)).evaluate_state({}, {"error": metric})
    assert means["error"] == pytest.approx(whole.loss(), rel=1e-12)
    assert sum(counted) == 17


def test_the_model_is_untouched_by_attempts_that_fail():
    model = nn.Sequential(net(), nn.BatchNorm1d(3).double(), nn.Dropout(0.3)).eval()
    data = batched(X, VECTORS)
    objective = fm.Objective(
        model,
        Scarce(2, "backward"),
        data,
        weight=lambda batch: batch[1].numel(),
        microbatch="auto",
    )
    with untouched(model, data):
        objective.gradient()
        with pytest.raises(fm.DeviceMemoryError):
            fm.Objective(
                model, Scarce(0), data, weight=lambda batch: batch[1].numel(), microbatch="auto"
            ).loss()


# -------------------------------------------------------------------------------------- refusals


def normed(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, **options), nn.Linear(5, 3)).double()


@pytest.mark.parametrize("size", [4, "auto"])
@pytest.mark.parametrize(
    ("options", "mode", "training"),
    [
        ({}, "train", False),
        ({}, "keep", True),
        ({"track_running_stats": False}, "eval", False),
        ({"affine": False}, "train", True),
    ],
)
def test_batch_norm_on_the_batchs_statistics_is_refused(options, mode, training, size):
    model = normed(**options).train(training)
    with pytest.raises(fm.InvalidArgumentError, match=r"batch norm '1'.*statistics of the whole"):
        fm.Objective(model, nn.MSELoss(), (X, VECTORS), mode=mode, microbatch=size)


@pytest.mark.parametrize("size", [4, "auto"])
@pytest.mark.parametrize(("mode", "training"), [("eval", True), ("keep", False)])
def test_batch_norm_on_its_running_statistics_is_cut(mode, training, size):
    model = normed().train(training)
    whole = fm.Objective(model, nn.MSELoss(), (X, VECTORS), mode=mode)
    pieces = fm.Objective(model, nn.MSELoss(), (X, VECTORS), mode=mode, microbatch=size)
    assert_same(pieces, whole)


def dropping(rate=0.5):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(rate), nn.Linear(8, 3)).double()


@pytest.mark.parametrize("size", [1, 4, "auto"])
@pytest.mark.parametrize("rate", [0.5, 0.02])
def test_dropout_in_training_mode_is_refused(rate, size):
    """The masks of a piece are others than those of its rows in the whole batch.

    At a small rate two examples are not enough to see it.
    """
    with pytest.raises(fm.InvalidArgumentError, match=r"dropout.* in training mode"):
        fm.Objective(
            dropping(rate), nn.MSELoss(), (X, VECTORS), mode="train", microbatch=size
        ).loss()


def test_dropout_in_evaluation_mode_is_cut():
    whole, pieces = (
        fm.Objective(dropping(), nn.MSELoss(), (X, VECTORS), microbatch=size) for size in (None, 4)
    )
    assert_same(pieces, whole)


def contrastive(output, target):
    """Each example against all others of its batch."""
    scores = output @ output.T
    return F.cross_entropy(scores, torch.arange(len(scores)))


@pytest.mark.parametrize("size", [1, 4, "auto"])
def test_contrastive_losses_are_refused(size):
    objective = fm.Objective(net(), contrastive, (X, VECTORS), microbatch=size)
    with pytest.raises(fm.InvalidArgumentError, match="microbatch= cannot be used here: the loss"):
        objective.loss()


def test_what_was_refused_once_is_refused_again():
    objective = fm.Objective(net(), contrastive, (X, VECTORS), microbatch=4)
    for call in (objective.loss, objective.gradient, objective.loss):
        with pytest.raises(fm.InvalidArgumentError, match="contrastive losses"):
            call()


@pytest.mark.parametrize("size", [1, 4, "auto"])
def test_a_first_dimension_of_time_is_refused(size):
    class Streaming(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = nn.RNN(4, 5), nn.Linear(5, 3)
            self.double()

        def forward(self, x):
            return self.head(self.body(x)[0])

    data = [(seeded(6, 3, 4), seeded(6, 3, 3, seed=1))]
    objective = fm.Objective(Streaming(), nn.MSELoss(), data, microbatch=size)
    with pytest.raises(fm.InvalidArgumentError, match="a first dimension that is not the batch's"):
        objective.loss()


def test_weights_that_do_not_count_what_the_mean_runs_over_are_refused():
    data = [{"ids": i, "labels": t} for i, t in batched(TOKENS, TOKEN_LABELS)]
    loss = lambda m, b: F.cross_entropy(m(b["ids"]), b["labels"])  # noqa: E731
    options = {"batch_loss": loss, "data": data, "microbatch": 2}
    objective = fm.Objective(Tagger(), **options, weight=lambda batch: len(batch["ids"]))
    with pytest.raises(fm.InvalidArgumentError, match="weight= does not count"):
        objective.loss()
    fm.Objective(Tagger(), **options, weight=fm.token_weight()).loss()


def test_a_batch_loss_that_adds_up_is_refused():
    data = [{"x": x, "y": y} for x, y in batched(X, VECTORS)]
    objective = fm.Objective(
        net(),
        data=data,
        batch_loss=lambda m, b: (m(b["x"]) - b["y"]).square().sum(),
        microbatch=2,
    )
    with pytest.raises(fm.InvalidArgumentError, match="microbatch= cannot be used here"):
        objective.loss()


class Own:
    """Tells nobody where its examples are."""

    def __init__(self, x, y):
        self.x, self.y = x, y


@pytest.mark.parametrize("size", [2, "auto"])
def test_batches_of_a_class_unknown_cannot_be_cut(size):
    def loss(model, batch):
        if size == "auto":
            raise torch.OutOfMemoryError("out of memory")
        return F.mse_loss(model(batch.x), batch.y)

    data = [Own(X, VECTORS)]
    objective = fm.Objective(net(), data=data, batch_loss=loss, microbatch=size)
    with pytest.raises(fm.InvalidArgumentError, match="a Own does not show where its examples are"):
        objective.loss()


@pytest.mark.parametrize("size", [2, "auto"])
def test_packed_sequences_cannot_be_cut(size):
    rows = [seeded(n, 4, seed=n) for n in (3, 5, 2)]
    packed = pack_sequence(rows, enforce_sorted=False)

    def loss(model, batch):
        if size == "auto":
            raise torch.OutOfMemoryError("out of memory")
        return model(batch.data).square().mean()

    objective = fm.Objective(
        net(), data=[packed], batch_loss=loss, microbatch=size, weight=lambda batch: 10
    )
    with pytest.raises(fm.InvalidArgumentError, match="cannot be cut into pieces for microbatch="):
        objective.loss()


@pytest.mark.parametrize("size", [2, "auto"])
@pytest.mark.parametrize(
    ("batch", "why"),
    [
        ({"x": X, "edges": torch.zeros(2, 40)}, "its tensors differ in length"),
        ([X, ["a", "b"]], "one of its lists has length 2 instead of 17"),
    ],
)
def test_batches_that_disagree_in_length_cannot_be_cut(batch, why, size):
    def loss(model, batch):
        if size == "auto":
            raise torch.OutOfMemoryError("out of memory")
        x = batch["x"] if isinstance(batch, dict) else batch[0]
        return model(x).square().mean()

    objective = fm.Objective(
        net(), data=[batch], batch_loss=loss, microbatch=size, weight=lambda batch: 17
    )
    with pytest.raises(fm.InvalidArgumentError, match=f"Batch 0 cannot be cut.*{why}"):
        objective.loss()


@pytest.mark.parametrize(
    ("size", "error"),
    [
        (0, fm.InvalidArgumentError),
        (-3, fm.InvalidArgumentError),
        (2.5, fm.ArgumentTypeError),
        ("some", fm.InvalidArgumentError),
        (True, fm.ArgumentTypeError),
        ([4], fm.ArgumentTypeError),
    ],
)
def test_sizes_that_are_none_are_refused(size, error):
    with pytest.raises(error, match="'microbatch' argument of Objective"):
        fm.Objective(net(), nn.MSELoss(), (X, VECTORS), microbatch=size)


def test_a_loss_that_is_not_finite_is_reported_as_such():
    x = X.clone()
    x[11, 0] = math.nan
    for size in (2, "auto"):
        objective = fm.Objective(net(), nn.MSELoss(), batched(x, VECTORS), microbatch=size)
        with pytest.raises(fm.NonFiniteError, match="loss of batch 2 is nan"):
            objective.loss()


def test_losses_that_draw_random_numbers_are_refused():
    """Functional dropout, of which no module tells."""

    def loss(model, batch):
        return F.mse_loss(F.dropout(model(batch[0]), 0.01), batch[1])

    objective = fm.Objective(net(), data=[(X, VECTORS)], batch_loss=loss, microbatch=2)
    with pytest.raises(fm.InvalidArgumentError, match="draws random numbers"):
        objective.loss()


def test_contrastive_losses_are_refused_in_bfloat16_too():
    objective = fm.Objective(
        net().bfloat16(), contrastive, (X.bfloat16(), VECTORS.bfloat16()), microbatch=2
    )
    with pytest.raises(fm.InvalidArgumentError, match="contrastive losses"):
        objective.loss()
