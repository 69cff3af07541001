"""Gauss–Newton and Fisher matrices against dense ones made row by row in float64."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from benchmarks.box import LiveTensors
from torch import nn
from torch.utils.checkpoint import checkpoint

import flatminima as fm
from exhaustive import thinned
from flatminima.operators.outputs import loss_curvature
from oracles import dense_gauss_newton
from zoo import NAMES_AND_DTYPES, build, dense_hessian, facts_of

WITH_OUTPUTS = [
    (name, dtype) for name, dtype in NAMES_AND_DTYPES if build(name, dtype).loss_fn is not None
]
# Masks drawn otherwise by the oracle, which evaluates in float64; a graph that it cannot go
# through; a loss whose second derivative autograd silently leaves out.
WITHOUT_ORACLE = {
    "mlp_batch_norm_dropout_train",
    "lstm_dropout_train",
    "transformer_encoder_train",
    "checkpointed_reentrant",
    "once_differentiable_loss",
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-2}


def seeded(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def labels(*shape, classes=4, seed=0):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@functools.cache
def oracle(name, dtype):
    return dense_gauss_newton(build(name, dtype))


def quiet(operator_of, case):
    """An operator's matrix; a case that needs differences announces them."""
    operator = operator_of(case.objective())
    if case.name in APPROXIMATE:
        with pytest.warns(fm.FiniteDifferenceWarning):
            return operator, operator.to_dense()
    return operator, operator.to_dense()


# Of these the outputs' derivatives are differences; the loss of the last alone is at fault.
APPROXIMATE = {
    *(n for n, _ in WITH_OUTPUTS if facts_of(n).approximate and n != "grid_sample"),
    "once_differentiable_loss",
}


# ------------------------------------------------------------------------ the whole model zoo


@pytest.mark.parametrize(
    ("name", "dtype"),
    thinned(
        [(n, d) for n, d in WITH_OUTPUTS if n not in WITHOUT_ORACLE],
        7,
        always=[(n, d) for n, d in WITH_OUTPUTS if d is torch.float64],
    ),
)
def test_gauss_newton_equals_the_dense_one(name, dtype):
    case = build(name, dtype)
    operator, matrix = quiet(fm.GaussNewtonOperator, case)
    expected = oracle(name, dtype)
    assert operator.method == ("finite_differences" if name in APPROXIMATE else "double_backward")
    allowed = TOLERANCE[case.dtype] * float(expected.norm())
    if name in APPROXIMATE:
        allowed = max(allowed, 10 * operator.error * math.sqrt(len(expected)))
    assert float((matrix.double() - expected).norm()) <= allowed


@pytest.mark.parametrize(
    "name", [n for n, d in WITH_OUTPUTS if n not in WITHOUT_ORACLE and d is torch.float64]
)
def test_the_report_agrees_with_the_dense_one(name):
    case = build(name)
    with contextlib.nullcontext() if name not in APPROXIMATE else pytest.warns():
        report = fm.sharpness(
            case.model,
            case.loss_fn,
            case.batches,
            measures="gauss_newton",
            trace_products=20,
            params=case.params,
            weight=case.weight,
            mode=case.mode,
        )
    dense = oracle(name, torch.float64)
    values = torch.linalg.eigvalsh((dense + dense.T) / 2)
    rounding = 1e-6 * float(values[-1]) if name in APPROXIMATE else 1e-9 * float(values[-1])
    (largest,) = report.gauss_newton_largest.eigenvalues.tolist()
    residual = float(report.gauss_newton_largest.residuals[0])
    assert abs(largest - float(values[-1])) <= residual + rounding
    trace = report.gauss_newton_trace
    missed = abs(trace.value - float(values.sum()))
    assert missed <= 4 * trace.standard_error + len(values) * rounding


@pytest.mark.parametrize("name", sorted(n for n in WITHOUT_ORACLE))
def test_exact_products_and_differences_agree(name):
    case = build(name)
    vector = seeded(case.objective().size, seed=3)
    differences = fm.GaussNewtonOperator(case.objective(), method="finite_differences")
    expected = differences @ vector
    allowed = 10 * differences.error * float(vector.norm())
    assert allowed < 1e-6 * float(expected.norm())
    if name in APPROXIMATE:
        return
    found = fm.GaussNewtonOperator(case.objective(), method="double_backward") @ vector
    assert float((found - expected).norm()) <= allowed


@pytest.mark.parametrize(("name", "dtype"), WITH_OUTPUTS)
def test_kept_graphs_change_nothing(name, dtype):
    case = build(name, dtype)
    if name in APPROXIMATE:
        return
    rebuilt = fm.GaussNewtonOperator(case.objective(), keep_graph=False)
    kept = fm.GaussNewtonOperator(case.objective(), keep_graph=True)
    block = seeded(rebuilt.shape[0], 2).to(rebuilt.dtype)
    first = rebuilt @ block
    eps = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2e-2}[case.dtype]
    with kept.session():
        for _ in range(3):
            assert float((kept @ block - first).norm()) <= eps * float(first.norm())
    assert kept.kept_bytes == 0


@pytest.mark.parametrize(
    "name",
    thinned([n for n, d in WITH_OUTPUTS if d is torch.float64 and n not in APPROXIMATE], 3),
)
def test_convex_losses_give_positive_semi_definite_matrices(name):
    case = build(name)
    operator, matrix = quiet(fm.GaussNewtonOperator, case)
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    assert values[0] >= -1e-10 * values[-1]
    assert not any("not convex" in note for note in operator.notes)


@pytest.mark.parametrize("name", ["linear_regression", "softmax_regression", "class_weighted"])
def test_linear_models_have_the_hessian(name):
    case = build(name)
    if name == "class_weighted":
        case.model = nn.Linear(4, 3).double()
        torch.manual_seed(0)
        case.batches = [(seeded(6, 4), labels(6, classes=3)), (seeded(3, 4), labels(3, classes=3))]
    matrix = fm.GaussNewtonOperator(case.objective()).to_dense()
    hessian = fm.HessianOperator(case.objective()).to_dense()
    torch.testing.assert_close(matrix, hessian, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------- closed forms


def criteria():
    weight = torch.tensor([0.5, 1.0, 2.0, 0.25], dtype=torch.float64)
    ignoring = labels(7).clone()
    ignoring[2] = ignoring[5] = -100
    probabilities = seeded(7, 4, seed=5).softmax(1)
    scores = seeded(7, 4, seed=1)
    yield "cross-entropy", nn.CrossEntropyLoss(), scores, labels(7)
    yield "sum", nn.CrossEntropyLoss(reduction="sum"), scores, labels(7)
    yield "weights", nn.CrossEntropyLoss(weight), scores, labels(7)
    yield "weights, sum", nn.CrossEntropyLoss(weight, reduction="sum"), scores, labels(7)
    yield "ignored", nn.CrossEntropyLoss(weight), scores, ignoring
    yield "ignored 3", nn.CrossEntropyLoss(ignore_index=3), scores, labels(7)
    yield "smoothed", nn.CrossEntropyLoss(label_smoothing=0.2), scores, ignoring
    yield "all at once", nn.CrossEntropyLoss(weight, label_smoothing=0.2), scores, ignoring
    yield "probabilities", nn.CrossEntropyLoss(), scores, probabilities
    yield (
        "probabilities, weights",
        nn.CrossEntropyLoss(weight, label_smoothing=0.1),
        scores,
        probabilities,
    )
    yield "images", nn.CrossEntropyLoss(weight), seeded(2, 4, 3, 2), labels(2, 3, 2)
    yield "one", nn.CrossEntropyLoss(), seeded(4), labels()
    yield "function", F.cross_entropy, scores, labels(7)
    yield "partial", functools.partial(F.cross_entropy, label_smoothing=0.3), scores, labels(7)
    yield "squares", nn.MSELoss(), scores, seeded(7, 4)
    yield "squares, sum", nn.MSELoss(reduction="sum"), scores, seeded(7, 4)
    yield "squares, function", F.mse_loss, seeded(5), seeded(5, seed=1)
    yield "logits", nn.BCEWithLogitsLoss(), scores, (scores > 0).double()
    yield (
        "logits, weights",
        nn.BCEWithLogitsLoss(weight, pos_weight=3 * weight),
        scores,
        (scores > 0).double() * 0.9,
    )


@pytest.mark.parametrize(
    ("criterion", "output", "target"),
    [pytest.param(*c[1:], id=c[0]) for c in criteria()],
)
@pytest.mark.parametrize("chunk", [3, 2**20])
def test_closed_forms_equal_differentiation(criterion, output, target, chunk, monkeypatch):
    monkeypatch.setattr(loss_curvature, "CHUNK", chunk)
    output = output.requires_grad_()
    closed = loss_curvature.loss_hessian(criterion, output, target)
    assert closed.positive
    dense = torch.autograd.functional.hessian(lambda o: criterion(o, target), output.detach())
    dense = dense.reshape(output.numel(), output.numel())
    rows = [
        closed.times([unit.view(output.shape)])[0].reshape(-1)
        for unit in torch.eye(output.numel(), dtype=torch.float64)
    ]
    torch.testing.assert_close(torch.stack(rows), dense, rtol=1e-10, atol=1e-14)


def test_other_losses_are_differentiated():
    closed = loss_curvature.closed_form
    output = seeded(5, 3)
    assert closed(lambda o, t: F.cross_entropy(o, t), output, labels(5)) is None
    assert closed(nn.HuberLoss(), output, output) is None
    assert closed(nn.MSELoss(), output, output[:, :1]) is None
    assert closed(functools.partial(F.cross_entropy, output), output, labels(5)) is None

    class Own(nn.CrossEntropyLoss):
        def forward(self, output, target):
            return 2 * super().forward(output, target)

    assert closed(Own(), output, labels(5)) is None
    case = build("softmax_regression")
    plain = fm.GaussNewtonOperator(case.objective()).to_dense()
    doubled = fm.GaussNewtonOperator(case.objective(loss_fn=Own())).to_dense()
    torch.testing.assert_close(doubled, 2 * plain, rtol=1e-10, atol=1e-14)


def vocabulary_model(words=20_000, width=32):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(words, width)
            self.mixing = nn.Linear(width, width)
            self.head = nn.Linear(width, words)

        def forward(self, x):
            return self.head(torch.tanh(self.mixing(self.embedding(x))))

    torch.manual_seed(0)
    return Model(), labels(512, classes=words), labels(512, classes=words, seed=1)


def test_outputs_as_large_as_a_vocabulary_fit_into_half_as_much_again_as_a_training_step():
    model, x, y = vocabulary_model()

    def step():
        F.cross_entropy(model(x), y).backward()
        for parameter in model.parameters():
            parameter.grad = None

    step()
    with LiveTensors() as training:
        step()
    operator = fm.GaussNewtonOperator(
        fm.Objective(model, nn.CrossEntropyLoss(), [(x, y)]), keep_graph=False
    )
    vector = torch.ones(operator.shape[0])
    operator @ vector
    with LiveTensors() as product:
        operator @ vector
    assert training.most > 3 * 4 * 512 * 20_000
    assert product.most <= 1.5 * training.most


def test_activations_are_saved_once():
    """What backpropagates u = 0 takes no memory."""
    layers = [m for _ in range(8) for m in (nn.Linear(16, 16), nn.Tanh())]
    model = nn.Sequential(*layers)
    objective = fm.Objective(model, nn.MSELoss(), (torch.randn(4096, 16), torch.randn(4096, 16)))
    operator = fm.GaussNewtonOperator(objective, keep_graph=True)
    vector = torch.ones(operator.shape[0])
    with operator.session():
        operator @ vector
        operator @ vector
        activations = 8 * 4 * 4096 * 16
        assert activations <= operator.kept_bytes <= 1.3 * activations


# -------------------------------------------------------------------------------------- Fisher


@pytest.mark.parametrize("name", ["mlp_batch_norm_dropout", "padded_token_model", "resnet"])
def test_the_exact_fisher_matrix_is_gauss_newtons(name):
    case = build(name)
    fisher = fm.FisherOperator(case.objective()).to_dense()
    assert relative(fisher, oracle(name, torch.float64)) < 1e-12


def small_net(outputs=3):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, outputs)).double()


LIKELIHOODS = {
    "cross-entropy": (nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]).double()), labels),
    "squares": (nn.MSELoss(), lambda n, classes: seeded(n, classes, seed=4)),
    "squares, sum": (nn.MSELoss(reduction="sum"), lambda n, classes: seeded(n, classes, seed=4)),
    "logits": (
        nn.BCEWithLogitsLoss(torch.tensor([1.0, 2.0, 0.5]).double()),
        lambda n, classes: (seeded(n, classes) > 0).double(),
    ),
}


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_drawn_labels_give_the_exact_matrix_on_average(kind):
    criterion, targets = LIKELIHOODS[kind]
    data = seeded(6, 2), targets(6, classes=3)
    objective = fm.Objective(small_net(), criterion, data, batch_size=4)
    exact = fm.FisherOperator(objective).to_dense()
    samples = 20_000
    found = fm.FisherOperator(objective, kind="monte_carlo", samples=samples).to_dense()
    # The spread of one draw, from as many operators with one each.
    singles = torch.stack(
        [
            fm.FisherOperator(objective, kind="monte_carlo", seed=seed).to_dense()
            for seed in range(40)
        ]
    )
    spread = float((singles - exact).flatten(1).norm(dim=1).mean())
    assert float((found - exact).norm()) < 4 * spread / math.sqrt(samples)
    assert spread > 0.1 * float(exact.norm())


def test_draws_are_seeded_and_the_same_in_every_product():
    case = build("padded_token_model")
    one, again, other = (
        fm.FisherOperator(case.objective(), kind="monte_carlo", seed=seed) for seed in (3, 3, 4)
    )
    vector = seeded(one.shape[0])
    first = one @ vector
    assert torch.equal(one @ vector, first)
    assert torch.equal(again @ vector, first)
    assert not torch.allclose(other @ vector, first, rtol=1e-3)
    with one.session():
        for _ in range(3):
            torch.testing.assert_close(one @ vector, first)


def test_pieces_of_a_batch_draw_labels_of_their_own():
    x = torch.ones(64, 2, dtype=torch.float64)
    objective = fm.Objective(
        small_net(), nn.CrossEntropyLoss(), [(x, labels(64, classes=3))], microbatch=1
    )
    operator = fm.FisherOperator(objective, kind="monte_carlo")
    # Equal examples with equal labels would have a matrix of rank one.
    values = torch.linalg.eigvalsh(operator.to_dense())
    assert int((values > 1e-10 * values[-1]).sum()) == 2


@pytest.mark.parametrize("samples", [1, 2])
def test_the_rank_is_that_of_the_draws(samples):
    data = seeded(3, 2), seeded(3, 3)
    objective = fm.Objective(small_net(), nn.MSELoss(), data)
    operator = fm.FisherOperator(objective, kind="monte_carlo", samples=samples)
    values = torch.linalg.eigvalsh(operator.to_dense())
    assert int((values > 1e-10 * values[-1]).sum()) == 3 * samples


def own_gradients(model, loss, inputs, targets):
    """∇ of each example's own loss, (examples, n)."""
    rows = []
    for x, y in zip(inputs, targets, strict=True):
        gradients = torch.autograd.grad(loss(model(x[None]), y[None]), list(model.parameters()))
        rows.append(torch.cat([g.reshape(-1) for g in gradients]))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("criterion", "single", "targets", "weights"),
    [
        (nn.CrossEntropyLoss(), F.cross_entropy, labels(7, classes=3), torch.ones(7)),
        (
            nn.CrossEntropyLoss(reduction="sum"),
            F.cross_entropy,
            labels(7, classes=3),
            torch.ones(7),
        ),
        (nn.MSELoss(), F.mse_loss, seeded(7, 3), torch.ones(7)),
        (nn.MSELoss(reduction="sum"), F.mse_loss, seeded(7, 3), torch.ones(7)),
        (nn.HuberLoss(), F.huber_loss, seeded(7, 3), torch.ones(7)),
        (
            nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]).double()),
            F.cross_entropy,
            labels(7, classes=3),
            torch.tensor([1.0, 2.0, 0.5])[labels(7, classes=3)],
        ),
        (
            lambda o, t: (o - t).abs().pow(1.5).mean(),
            lambda o, t: (o - t).abs().pow(1.5).mean(),
            seeded(7, 3),
            torch.ones(7),
        ),
    ],
)
@pytest.mark.parametrize("batch_size", [7, 3])
def test_the_empirical_fisher_matrix_is_made_of_the_gradients_of_examples(
    criterion, single, targets, weights, batch_size
):
    model, x = small_net(), seeded(7, 2)
    objective = fm.Objective(model, criterion, (x, targets), batch_size=batch_size)
    rows = own_gradients(model, single, x, targets)
    expected = rows.T @ (rows * (weights.double() / weights.sum())[:, None])
    found = fm.FisherOperator(objective, kind="empirical").to_dense()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_examples_that_are_ignored_add_nothing():
    model, x, y = small_net(), seeded(7, 2), labels(7, classes=3)
    hidden = y.clone()
    hidden[4:] = -100
    few = fm.Objective(model, nn.CrossEntropyLoss(), (x[:4], y[:4]))
    many = fm.Objective(model, nn.CrossEntropyLoss(), (x, hidden))
    for kind in ("exact", "empirical"):
        expected = fm.FisherOperator(few, kind=kind).to_dense()
        torch.testing.assert_close(fm.FisherOperator(many, kind=kind).to_dense(), expected)


def test_log_probabilities_have_a_fisher_matrix_and_no_gauss_newton_matrix():
    class Log(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x).log_softmax(1)

    net, data = small_net(), (seeded(7, 2), labels(7, classes=3))
    logits = fm.Objective(net, nn.CrossEntropyLoss(), data)
    logs = fm.Objective(Log(net), nn.NLLLoss(), data)
    expected = fm.GaussNewtonOperator(logits).to_dense()
    torch.testing.assert_close(fm.FisherOperator(logs).to_dense(), expected)
    drawn = fm.FisherOperator(logs, kind="monte_carlo", samples=5000).to_dense()
    assert relative(drawn, expected) < 0.05
    with pytest.warns(fm.FlatMinimaWarning, match="linear in the model's outputs"):
        zero = fm.GaussNewtonOperator(logs).to_dense()
    assert not zero.any()


def test_a_loss_that_is_linear_on_some_batches_alone_is_not_called_so():
    def clipped(output, target):
        return F.huber_loss(output, target, delta=0.1)

    x = seeded(8, 2)
    net = small_net()
    near = net(x).detach() + 0.01
    far = near + 5
    for targets, linear in (((far, near), False), ((near, far), False), ((far, far), True)):
        objective = fm.Objective(net, clipped, [(x, y) for y in targets])
        operator = fm.GaussNewtonOperator(objective)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            product = operator @ seeded(operator.shape[0])
            operator @ seeded(operator.shape[0])
            operator.exact_diagonal()
        assert len(caught) == linear
        assert bool(product.any()) != linear
        assert any("linear" in note for note in operator.notes) == linear


# ------------------------------------------------------------------------------ the diagonal


@pytest.mark.parametrize(
    "name",
    [n for n, d in WITH_OUTPUTS if d is torch.float64 and n not in WITHOUT_ORACLE | APPROXIMATE],
)
def test_the_exact_diagonal_is_that_of_the_matrix(name):
    diagonal = fm.GaussNewtonOperator(build(name).objective()).exact_diagonal()
    if name in ("resnet_train", "lstm_packed"):
        assert diagonal is None
    else:
        assert relative(diagonal, oracle(name, torch.float64).diagonal()) < 1e-9


@pytest.mark.parametrize("kind", ["exact", "monte_carlo", "empirical"])
def test_the_exact_diagonal_of_fisher_matrices(kind):
    operator = fm.FisherOperator(build("mlp_batch_norm_dropout").objective(), kind=kind)
    expected = operator.to_dense().diagonal()
    torch.testing.assert_close(operator.exact_diagonal(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2**28])
def test_the_memory_allowed_changes_no_diagonal(size, monkeypatch):
    monkeypatch.setattr("flatminima.operators.outputs.jacobians.BLOCK_BYTES", size)
    operator = fm.GaussNewtonOperator(build("conv_batch_norm").objective())
    expected = oracle("conv_batch_norm", torch.float64).diagonal()
    assert relative(operator.exact_diagonal(), expected) < 1e-10


def test_no_diagonal_where_examples_depend_on_each_other_or_have_many_outputs():
    case = build("mlp_batch_norm_dropout_train")
    assert fm.GaussNewtonOperator(case.objective()).exact_diagonal() is None
    many = fm.Objective(nn.Linear(2, 65), nn.MSELoss(), (torch.ones(3, 2), torch.ones(3, 65)))
    assert fm.GaussNewtonOperator(many).exact_diagonal() is None

    def joined(output, target):
        return (output.mean(0) - target.mean(0)).square().mean()

    contrastive = fm.Objective(small_net(), joined, (seeded(5, 2), seeded(5, 3)))
    assert fm.GaussNewtonOperator(contrastive).exact_diagonal() is None


def test_a_diagonal_for_which_memory_is_short_is_not_taken_for_none():
    class Short(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    objective = fm.Objective(Short(2, 3), nn.MSELoss(), (torch.ones(4, 2), torch.ones(4, 3)))
    with pytest.raises(fm.DeviceMemoryError, match="batch 0"):
        fm.GaussNewtonOperator(objective).exact_diagonal()


# ---------------------------------------------------------------------------------- bad input


def test_objectives_with_batch_loss_are_told_what_to_give():
    objective = fm.Objective(
        nn.Linear(2, 1), data=[torch.ones(3, 2)], batch_loss=lambda m, b: m(b).sum()
    )
    for operator in (fm.GaussNewtonOperator, fm.FisherOperator):
        with pytest.raises(fm.InvalidArgumentError, match=r"loss_fn\(output, target\)"):
            operator(objective)


def test_losses_that_are_no_likelihood_have_no_fisher_matrix():
    objective = fm.Objective(small_net(), nn.HuberLoss(), (seeded(4, 2), seeded(4, 3)))
    for kind in ("exact", "monte_carlo"):
        with pytest.raises(fm.InvalidArgumentError, match="likelihood"):
            fm.FisherOperator(objective, kind=kind) @ seeded(objective.size)


def test_options_are_checked():
    objective = build("softmax_regression").objective()
    with pytest.raises(fm.InvalidArgumentError, match="'kind'"):
        fm.FisherOperator(objective, kind="expected")
    with pytest.raises(fm.InvalidArgumentError, match="'samples'"):
        fm.FisherOperator(objective, kind="monte_carlo", samples=0)
    with pytest.raises(fm.InvalidArgumentError, match="'method'"):
        fm.GaussNewtonOperator(objective, method="compile")
    with pytest.raises(fm.InvalidArgumentError, match="GaussNewtonOperator must be True"):
        fm.GaussNewtonOperator(objective, keep_graph="yes")
    with pytest.raises(fm.ArgumentTypeError, match="objective"):
        fm.GaussNewtonOperator(nn.Linear(1, 1))


def test_examples_that_cannot_be_told_apart_have_no_empirical_matrix():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 3)

        def forward(self, x):
            return self.net(x).T

    objective = fm.Objective(
        Turned(), lambda o, t: (o.T - t).square().mean(), (torch.ones(5, 2), torch.ones(5, 3))
    )
    with pytest.raises(fm.InvalidArgumentError, match="GaussNewtonOperator"):
        fm.FisherOperator(objective, kind="empirical") @ torch.ones(9)


def test_losses_that_are_not_convex_say_so():
    def saturating(output, target):
        return torch.tanh((output - target).square()).mean()

    data = seeded(6, 2), 3 * seeded(6, 3)
    operator = fm.GaussNewtonOperator(fm.Objective(small_net(), saturating, data))
    result = fm.lanczos(operator, k=1, which="SA")
    assert result.eigenvalues[0] < 0
    assert any("not positive semi-definite" in note for note in result.notes)


def test_a_model_without_a_part_in_the_output_is_refused():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 3)

        def forward(self, x):
            return self.net(x).detach()

    objective = fm.Objective(Detached(), nn.MSELoss(), (torch.ones(5, 2), torch.ones(5, 3)))
    with pytest.raises(fm.LossNotScalarError, match="does not depend"):
        fm.GaussNewtonOperator(objective) @ torch.ones(9)


def test_the_hessian_of_a_net_is_not_its_gauss_newton_matrix():
    case = build("mlp_batch_norm_dropout")
    assert relative(oracle("mlp_batch_norm_dropout", torch.float64), dense_hessian(case)) > 0.05


# ---------------------------------------------- losses and models that do more than compute


def quartic(output, target):
    return (output - target).pow(4).mean()


def writing(output, target):
    output.sub_(target)
    return output.pow(4).mean()


def hiding(output, target):
    with torch.no_grad():
        output.mul_(0.5)
    return (output - target).pow(4).mean()


def penalised(output, target):
    inner = (output - target).pow(3).sum()
    (slope,) = torch.autograd.grad(inner, output, create_graph=True)
    return slope.square().mean()


@pytest.mark.parametrize("loss", [writing, hiding, penalised])
def test_losses_that_write_or_differentiate_have_the_matrix_that_hessians_see(loss):
    """Of a linear model the two are the same."""
    model = nn.Linear(2, 3).double()
    data = seeded(5, 2), seeded(5, 3, seed=1)
    newton = fm.GaussNewtonOperator(fm.Objective(model, loss, data)).to_dense()
    hessian = fm.HessianOperator(fm.Objective(model, loss, data)).to_dense()
    torch.testing.assert_close(newton, hessian, rtol=1e-9, atol=1e-12)


def hooked():
    criterion = nn.MSELoss()
    criterion.register_forward_pre_hook(lambda module, given: (given[0] ** 3, given[1]))
    return criterion, seeded(5, 3, seed=1)


def overridden():
    criterion = nn.CrossEntropyLoss()
    criterion.forward = lambda output, target: F.cross_entropy(2 * output, target)
    return criterion, labels(5, classes=3)


def byte_labels():
    return nn.CrossEntropyLoss(torch.tensor([1.0, 3.0, 0.5]).double()), labels(5, classes=3).byte()


@pytest.mark.parametrize("make", [hooked, overridden, byte_labels])
def test_closed_forms_are_for_criteria_as_pytorch_has_them(make):
    criterion, target = make()
    model = nn.Linear(2, 3).double()
    objective = fm.Objective(model, criterion, (seeded(5, 2), target))
    newton = fm.GaussNewtonOperator(objective).to_dense()
    hessian = fm.HessianOperator(objective).to_dense()
    torch.testing.assert_close(newton, hessian, rtol=1e-9, atol=1e-12)


def test_outputs_within_objects_are_refused():
    class Box:
        def __init__(self, value):
            self.value = value

    class Boxed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x):
            out = self.net(x)
            return {"first": out[:, :1], "rest": Box(out)}

    def loss(output, target):
        return quartic(output["rest"].value, target) + output["first"].square().mean()

    objective = fm.Objective(Boxed(), loss, (seeded(5, 2), seeded(5, 3)))
    with pytest.raises(fm.ArgumentTypeError, match="within objects"):
        fm.GaussNewtonOperator(objective) @ seeded(objective.size)


def changing_labels(target, criterion):
    target[:3] = (target[:3] + 1) % 3


def changing_weights(target, criterion):
    criterion.keywords["weight"].mul_(torch.tensor([1.0, 5.0, 0.2]))


@pytest.mark.parametrize("change", [changing_labels, changing_weights])
@pytest.mark.parametrize(
    "operator_of",
    [
        fm.HessianOperator,
        fm.GaussNewtonOperator,
        fm.FisherOperator,
        functools.partial(fm.FisherOperator, kind="empirical"),
    ],
)
def test_data_and_losses_changed_within_a_session_are_noticed(operator_of, change):
    weight = torch.tensor([1.0, 2.0, 3.0]).double()
    criterion = functools.partial(F.cross_entropy, weight=weight)
    target = labels(8, classes=3)
    objective = fm.Objective(
        small_net(), criterion, [(seeded(8, 2), target)], weight=lambda batch: 8
    )
    operator, vector = operator_of(objective), seeded(objective.size)
    with operator.session():
        for _ in range(3):
            operator @ vector
        change(target, criterion)
        found = operator @ vector
    torch.testing.assert_close(found, operator_of(objective) @ vector)


def test_attributes_of_a_callable_loss_changed_within_a_session_are_noticed():
    class Power:
        def __init__(self):
            self.power = 2

        def __call__(self, output, target):
            return (output - target).abs().pow(self.power).mean()

    criterion = Power()
    objective = fm.Objective(small_net(), criterion, (seeded(8, 2), seeded(8, 3)))
    for operator_of in (fm.HessianOperator, fm.GaussNewtonOperator):
        criterion.power = 2
        operator, vector = operator_of(objective), seeded(objective.size)
        with operator.session():
            for _ in range(3):
                operator @ vector
            criterion.power = 4
            found = operator @ vector
        torch.testing.assert_close(found, operator_of(objective) @ vector)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x.abs() < 1)


class Numpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 3 * x

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(3 * g.detach().numpy())


class Through(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(2, 4), nn.Linear(4, 3), function

    def forward(self, x):
        return self.last(self.function.apply(self.first(x)))


def test_straight_through_estimators_have_the_matrix_of_their_own_jacobian():
    torch.manual_seed(0)
    objective = fm.Objective(Through(Straight).double(), nn.MSELoss(), (seeded(6, 2), seeded(6, 3)))
    operator = fm.GaussNewtonOperator(objective)
    matrix = operator.to_dense()
    assert operator.method == "double_backward"
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(operator.exact_diagonal(), matrix.diagonal())
    assert torch.linalg.eigvalsh(matrix)[0] > -1e-12


def test_a_backward_that_hides_what_it_depends_on_is_found_out():
    torch.manual_seed(0)
    objective = fm.Objective(Through(Numpy).double(), nn.MSELoss(), (seeded(6, 2), seeded(6, 3)))
    with pytest.warns(fm.FiniteDifferenceWarning, match="Numpy"):
        matrix = fm.GaussNewtonOperator(objective).to_dense()

    class Plain(nn.Module):
        @staticmethod
        def apply(x):
            return 3 * x

    torch.manual_seed(0)
    same = fm.Objective(Through(Plain).double(), nn.MSELoss(), (seeded(6, 2), seeded(6, 3)))
    torch.testing.assert_close(
        matrix, fm.GaussNewtonOperator(same).to_dense(), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize(
    "loss",
    [lambda o, t: (o - t).square().sum(), lambda o, t: o.var(0).sum() + 0 * t.sum()],
    ids=["a sum unsaid", "joined"],
)
def test_losses_that_are_no_mean_over_examples_have_no_empirical_matrix(loss):
    objective = fm.Objective(small_net(), loss, (seeded(6, 2), seeded(6, 3)))
    with pytest.raises(fm.InvalidArgumentError, match="mean loss of each example"):
        fm.FisherOperator(objective, kind="empirical") @ seeded(objective.size)


def test_a_loss_checkpointed_after_a_gauss_newton_product_has_a_hessian():
    class Chunked(nn.Module):
        def forward(self, output, target):
            parts = [
                checkpoint(F.mse_loss, o, t, use_reentrant=False)
                for o, t in zip(F.relu(output).chunk(2), target.chunk(2), strict=True)
            ]
            return sum(parts) / 2

    def objective():
        return fm.Objective(small_net(), Chunked(), (seeded(6, 2), seeded(6, 3)))

    one, vector = objective(), seeded(objective().size)
    fm.GaussNewtonOperator(one) @ vector
    found = fm.HessianOperator(one) @ vector
    torch.testing.assert_close(found, fm.HessianOperator(objective()) @ vector)
