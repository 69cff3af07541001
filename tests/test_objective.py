import copy
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flatminima as fm
from integrity import untouched
from zoo import Transposed, build, cut, exact_gradient, exact_loss, names_of, settle_batch_norm

BASIC = pytest.mark.parametrize("name", names_of("basic"))

# ------------------------------------------------------------------------- values by hand


@BASIC
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)], ids=["f64", "f32"]
)
def test_loss_and_gradient_equal_the_loss_written_by_hand(name, dtype, tolerance):
    case = build(name, dtype)
    objective = case.objective()
    value, gradient = objective.value_and_gradient()
    expected = exact_gradient(case)
    assert objective.loss() == value == pytest.approx(exact_loss(case), rel=tolerance)
    assert gradient.dtype == dtype
    assert (gradient.double() - expected).norm() <= tolerance * expected.norm()


@BASIC
def test_displaced_values_equal_those_of_a_displaced_model(name):
    case = build(name)
    objective = case.objective()
    delta = 0.3 * torch.randn(objective.size, generator=torch.Generator().manual_seed(1)).double()
    exact, theta = case.exact()
    value, gradient = objective.value_and_gradient(delta)
    assert objective.loss_at(delta) == pytest.approx(exact(theta + delta).item(), rel=1e-13)
    assert value == pytest.approx(exact(theta + delta).item(), rel=1e-13)
    expected = torch.autograd.functional.jacobian(exact, theta + delta)
    torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-13)


def test_a_displacement_of_zero_changes_nothing_bitwise():
    objective = build("mlp_batch_norm_dropout", torch.float32).objective()
    zero = torch.zeros(objective.size)
    assert objective.loss_at(zero) == objective.loss()
    value, gradient = objective.value_and_gradient(zero)
    assert value == objective.loss()
    assert torch.equal(gradient, objective.gradient())


def test_the_objective_follows_the_model():
    case = build("softmax_regression")
    objective = case.objective()
    delta = torch.ones(objective.size, dtype=torch.float64)
    displaced = objective.loss_at(delta)
    with torch.no_grad():
        for parameter in case.model.parameters():
            parameter += 1
    assert objective.loss() == displaced


# ------------------------------------------------------- the same for any cutting into batches


def ragged(total, most=9):
    """Batch sizes that add up to `total`."""
    return st.lists(st.integers(0, total), max_size=most).map(
        lambda marks: tuple(
            b - a
            for a, b in zip([0, *sorted(marks)], [*sorted(marks), total], strict=True)
            if b > a
        )
    )


def small_net(inputs, outputs):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def assert_equals_direct(model, loss_fn, batches, direct, **options):
    """L, ∇L and Hv of the objective against `direct(model)`, differentiated by itself."""
    objective = fm.Objective(model, loss_fn, batches, progress=False, **options)
    parameters = list(model.parameters())
    v = torch.randn(objective.size, generator=torch.Generator().manual_seed(7)).double()
    loss = direct(model)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradients])
    products = torch.autograd.grad(flat @ v, parameters, materialize_grads=True)
    product = torch.cat([p.reshape(-1) for p in products])

    assert objective.loss() == pytest.approx(loss.item(), rel=1e-13)
    torch.testing.assert_close(objective.gradient(), flat.detach(), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(
        fm.HessianOperator(objective).matvec(v), product, rtol=1e-11, atol=1e-13
    )


N = 19
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(1)).double()
LABELS = torch.randint(4, (N,), generator=torch.Generator().manual_seed(2))
VECTORS = torch.randn(N, 2, generator=torch.Generator().manual_seed(3)).double()
FLAGS = torch.rand(N, 2, generator=torch.Generator().manual_seed(4)).double().round()
CHANCES = torch.rand(N, 4, generator=torch.Generator().manual_seed(5)).double().softmax(1)
WEIGHTS = torch.tensor([0.1, 3.0, 1.0, 0.4], dtype=torch.float64)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("form", ["module", "partial"])
@given(sizes=ragged(N))
@settings(max_examples=10)
def test_cross_entropy_does_not_depend_on_the_batches(form, reduction, sizes):
    loss_fn = (
        nn.CrossEntropyLoss(reduction=reduction)
        if form == "module"
        else functools.partial(F.cross_entropy, reduction=reduction)
    )
    direct = lambda m: F.cross_entropy(m(X), LABELS)  # noqa: E731
    assert_equals_direct(small_net(3, 4), loss_fn, cut((X, LABELS), sizes), direct)


@given(sizes=ragged(N))
@settings(max_examples=10)
def test_the_function_cross_entropy_does_not_depend_on_the_batches(sizes):
    direct = lambda m: F.cross_entropy(m(X), LABELS)  # noqa: E731
    assert_equals_direct(small_net(3, 4), F.cross_entropy, cut((X, LABELS), sizes), direct)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("form", ["module", "partial"])
@given(sizes=ragged(N))
@settings(max_examples=10)
def test_squared_error_of_vectors_does_not_depend_on_the_batches(form, reduction, sizes):
    loss_fn = (
        nn.MSELoss(reduction=reduction)
        if form == "module"
        else functools.partial(F.mse_loss, reduction=reduction)
    )
    direct = lambda m: ((m(X) - VECTORS) ** 2).sum() / VECTORS.numel()  # noqa: E731
    assert_equals_direct(small_net(3, 2), loss_fn, cut((X, VECTORS), sizes), direct)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("form", ["module", "partial"])
@given(sizes=ragged(N))
@settings(max_examples=10)
def test_class_weights_do_not_depend_on_the_batches(form, reduction, sizes):
    loss_fn = (
        nn.CrossEntropyLoss(weight=WEIGHTS, reduction=reduction)
        if form == "module"
        else functools.partial(F.cross_entropy, weight=WEIGHTS, reduction=reduction)
    )
    direct = lambda m: F.cross_entropy(m(X), LABELS, weight=WEIGHTS)  # noqa: E731
    assert_equals_direct(small_net(3, 4), loss_fn, cut((X, LABELS), sizes), direct)


OTHER_CRITERIA = {
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), 4, LABELS),
    "weighted label smoothing": (
        nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1, ignore_index=2),
        4,
        LABELS,
    ),
    "class probabilities": (nn.CrossEntropyLoss(), 4, CHANCES),
    "weighted class probabilities": (nn.CrossEntropyLoss(weight=WEIGHTS), 4, CHANCES),
    "binary": (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 0.5]).double()), 2, FLAGS),
    "absolute": (nn.SmoothL1Loss(), 2, VECTORS),
    "divergence per batch": (nn.KLDivLoss(reduction="batchmean"), 4, CHANCES),
    "divergence per element": (nn.KLDivLoss(), 4, CHANCES),
    "own function": (lambda out, target: (out - target).square().mean(), 2, VECTORS),
    "own module": (type("Own", (nn.MSELoss,), {})(), 2, VECTORS),
    "summed counts": (nn.PoissonNLLLoss(reduction="sum"), 2, FLAGS),
}


@pytest.mark.parametrize("which", OTHER_CRITERIA)
@given(sizes=ragged(N))
@settings(max_examples=6)
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")
def test_other_criteria_do_not_depend_on_the_batches(which, sizes):
    loss_fn, outputs, target = OTHER_CRITERIA[which]
    terms = target.numel() if getattr(loss_fn, "reduction", "mean") == "sum" else 1
    direct = lambda m: loss_fn(m(X), target) / terms  # noqa: E731
    assert_equals_direct(small_net(3, outputs), loss_fn, cut((X, target), sizes), direct)


IDS = torch.randint(5, (8, 6), generator=torch.Generator().manual_seed(8))


def token_labels(lengths, ignored):
    labels = torch.randint(5, (8, 6), generator=torch.Generator().manual_seed(9))
    for row, length in enumerate(lengths):
        labels[row, length:] = ignored
    return labels


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignored", [-100, 1])
@pytest.mark.parametrize("weight", [None, torch.tensor([0.2, 1, 5, 1, 0.5]).double()])
@given(
    sizes=ragged(8),
    lengths=st.lists(st.integers(0, 6), min_size=8, max_size=8).filter(any),
)
@settings(max_examples=10)
def test_token_losses_count_labels_not_examples(weight, ignored, reduction, sizes, lengths):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5), Transposed()).double()
    labels = token_labels(lengths, ignored)
    if not bool((labels != ignored).any()):
        return
    options = {"ignore_index": ignored, "weight": weight}
    loss_fn = nn.CrossEntropyLoss(**options, reduction=reduction)
    direct = lambda m: F.cross_entropy(m(IDS), labels, **options)  # noqa: E731
    assert_equals_direct(model, loss_fn, cut((IDS, labels), sizes), direct)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("cache", [True, False])
def test_a_batch_of_ignored_labels_only_adds_nothing(place, reduction, cache):
    labels = LABELS.clone()
    labels[place * 6 : (place + 1) * 6] = -100
    batches = cut((X, labels), (6, 6, 6, 1))
    direct = lambda m: F.cross_entropy(m(X), labels)  # noqa: E731
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    assert_equals_direct(small_net(3, 4), loss_fn, batches, direct, cache=cache)


@given(sizes=ragged(N))
@settings(max_examples=10)
def test_weights_of_the_users_own_do_not_depend_on_the_batches(sizes):
    """A loss that averages over the positive targets only, weighted accordingly."""

    def over_positive(output, target):
        keep = target > 0
        return (output - target)[keep].square().sum() / keep.sum().clamp(min=1)

    assert_equals_direct(
        small_net(3, 2),
        over_positive,
        cut((X, VECTORS), sizes),
        lambda m: over_positive(m(X), VECTORS),
        weight=lambda batch: (batch[1] > 0).sum(),
    )


@given(sizes=ragged(N))
@settings(max_examples=10)
def test_batch_loss_counts_examples(sizes):
    net = small_net(3, 4)
    batches = [{"x": x, "labels": y} for x, y in cut((X, LABELS), sizes)]
    assert_equals_direct(
        net,
        None,
        batches,
        lambda m: F.cross_entropy(m(X), LABELS),
        batch_loss=lambda m, b: F.cross_entropy(m(b["x"]), b["labels"]),
    )


@given(order=st.permutations(range(N)), sizes=ragged(N))
@settings(max_examples=10)
def test_the_order_of_the_examples_does_not_matter(order, sizes):
    index = torch.tensor(order)
    batches = cut((X[index], LABELS[index]), sizes)
    direct = lambda m: F.cross_entropy(m(X), LABELS)  # noqa: E731
    assert_equals_direct(small_net(3, 4), F.cross_entropy, batches, direct)


def test_batches_are_weighted_by_their_size_not_equally():
    """1797 examples in batches of 256: the mean of batch means would be off by much."""
    x = torch.cat([torch.zeros(1792, 1), torch.full((5, 1), 10.0)]).double()
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    objective = fm.Objective(model, nn.MSELoss(), (x, torch.zeros_like(x)), batch_size=256)
    assert len(objective.batches) == 8
    assert objective.loss() == pytest.approx(500 / 1797, rel=1e-14)


def test_scalars_are_added_up_in_float64():
    """2²⁴ + 1 is not a float32: adding batch losses in float32 would lose the ones."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    values = torch.tensor([2.0**24, *[1.0] * 64])
    batches = [(v.reshape(1, 1).sqrt(), torch.zeros(1, 1)) for v in values]
    objective = fm.Objective(model, nn.MSELoss(reduction="sum"), batches)
    assert objective.loss() == (2.0**24 + 64) / 65


def test_half_precision_losses_survive_large_weights():
    """A weight above 65504 does not exist in float16."""
    torch.manual_seed(0)
    model = nn.Linear(3, 40000).half()
    x, y = torch.randn(2, 3).half(), torch.zeros(2, 40000).half()
    objective = fm.Objective(model, nn.MSELoss(), (x, y))
    value, gradient = objective.value_and_gradient()
    assert value == pytest.approx(model(x).double().square().mean().item(), rel=1e-2)
    assert gradient.dtype == torch.float32
    assert bool(gradient.isfinite().all())


# ---------------------------------------------------------------------------------------- modes


def noisy_net():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    settle_batch_norm(model, X.float())
    return model.double()


def test_evaluation_mode_is_the_default_whatever_the_model_is_in():
    model = noisy_net()
    expected = F.cross_entropy(model.eval()(X), LABELS).item()
    model.train()
    objective = fm.Objective(model, F.cross_entropy, (X, LABELS), batch_size=7)
    assert objective.mode == "eval"
    assert objective.loss() == pytest.approx(expected, rel=1e-14)
    assert model.training


def test_training_mode_uses_the_statistics_of_the_batch():
    model = nn.Sequential(*[m for m in noisy_net() if not isinstance(m, nn.Dropout)])
    batches = cut((X, LABELS), (8, 8, 3))
    twin = copy.deepcopy(model).train()
    terms = [len(y) * F.cross_entropy(twin(x), y) for x, y in batches]
    expected = (torch.stack(terms).sum() / N).item()

    objective = fm.Objective(model.eval(), F.cross_entropy, batches, mode="train")
    evaluated = fm.Objective(model, F.cross_entropy, batches).loss()
    assert objective.loss() == pytest.approx(expected, rel=1e-14)
    assert abs(evaluated - expected) > 1e-3
    assert not model[1].training


def test_training_mode_draws_the_same_dropout_at_each_evaluation():
    objective = fm.Objective(noisy_net(), F.cross_entropy, (X, LABELS), mode="train", batch_size=5)
    first, gradient = objective.value_and_gradient()
    torch.manual_seed(12345)
    torch.rand(3)
    second, again = objective.value_and_gradient()
    assert first == second == objective.loss()
    assert torch.equal(gradient, again)


def test_training_mode_drops_different_units_in_different_batches():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 1, bias=False)).double()
    same = torch.ones(1, 64, dtype=torch.float64)
    outputs = []

    def watch(output, target):
        outputs.append(output.item())
        return output.mean()

    fm.Objective(model, watch, [(same, same), (same, same)], mode="train").loss()
    assert outputs[0] != outputs[1]


def test_training_mode_is_a_function_whose_gradient_is_its_gradient():
    """With fixed dropout and batch statistics, differences of L agree with ∇L and Hv."""
    objective = fm.Objective(noisy_net(), F.cross_entropy, (X, LABELS), mode="train", batch_size=7)
    v = torch.randn(objective.size, generator=torch.Generator().manual_seed(0)).double()
    step = 1e-5 * v
    slope = (objective.loss_at(step) - objective.loss_at(-step)) / 2e-5
    assert slope == pytest.approx(torch.dot(objective.gradient(), v).item(), rel=1e-6)
    ahead, behind = (objective.value_and_gradient(s)[1] for s in (step, -step))
    product = fm.HessianOperator(objective) @ v
    torch.testing.assert_close(product, (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-6)


def test_keep_leaves_each_module_in_its_own_mode():
    model = noisy_net()
    model.eval()
    model[2].train()
    kept = fm.Objective(model, F.cross_entropy, (X, LABELS), mode="keep")
    value = kept.loss()
    model[2].eval()
    evaluated = F.cross_entropy(model(X), LABELS).item()
    assert kept.loss() == pytest.approx(evaluated, rel=1e-14)
    assert value != pytest.approx(evaluated, rel=1e-6)


@pytest.mark.parametrize("cache", [True, False])
def test_training_mode_is_the_same_with_and_without_cache(cache):
    loader = DataLoader(TensorDataset(X, LABELS), batch_size=5, shuffle=True)
    reference = fm.Objective(noisy_net(), F.cross_entropy, loader, mode="train")
    objective = fm.Objective(noisy_net(), F.cross_entropy, loader, mode="train", cache=cache)
    assert objective.loss() == reference.loss()


# ------------------------------------------------------------------------- losses of many kinds


def test_a_loss_that_differentiates_by_its_input_can_be_evaluated():
    """The residual of u' = cos, as in physics-informed nets."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    points = torch.linspace(0, 1, 9, dtype=torch.float64)[:, None]

    def residual(model, batch):
        t = batch.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(t).sum(), t, create_graph=True)
        return (slope - torch.cos(t)).square().mean()

    objective = fm.Objective(net, data=list(points.split(4)), batch_loss=residual)
    expected = residual(net, points)
    gradient = torch.autograd.grad(expected, list(net.parameters()), allow_unused=True)[0]
    assert objective.loss() == pytest.approx(expected.item(), rel=1e-13)
    assert objective.loss_at(torch.zeros(objective.size).double()) == objective.loss()
    torch.testing.assert_close(objective.gradient()[:4], gradient.reshape(-1))


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_inputs_that_require_grad_keep_it(cache, context):
    class Points:
        def __iter__(self):
            return iter([X[:9].clone().requires_grad_(), X[9:].clone().requires_grad_()])

    def slope(model, batch):
        (gradient,) = torch.autograd.grad(model(batch).sum(), batch, create_graph=True)
        return gradient.square().mean()

    model = small_net(3, 2)
    whole = X.clone().requires_grad_()
    expected = slope(model, whole).item()
    with context():
        objective = fm.Objective(model, data=Points(), batch_loss=slope, cache=cache)
        assert objective.loss() == pytest.approx(expected, rel=1e-13)
        assert objective.value_and_gradient()[0] == objective.loss()


def test_metrics_and_weights_may_carry_a_graph():
    x = X.clone().requires_grad_()
    objective = fm.Objective(
        small_net(3, 2), F.mse_loss, [(x, VECTORS)], weight=lambda batch: (batch[0] ** 0).sum()
    )
    error, means = objective.evaluate_state({}, {"error": lambda o, t: (o - t).square().mean()})
    assert means["error"] == pytest.approx(F.mse_loss(small_net(3, 2)(X), VECTORS).item())
    assert error == pytest.approx(means["error"])


def test_batch_loss_may_use_parts_of_the_model_and_its_parameters():
    case = build("tied_weights")

    def penalised(model, batch):
        scores = model.decoder(torch.tanh(model.hidden(model.embedding(batch[0]))))
        return F.cross_entropy(scores, batch[1]) + 0.1 * model.hidden.weight.square().sum()

    objective = case.objective(loss_fn=None, batch_loss=penalised)
    plain = case.objective()
    weight = case.model.hidden.weight
    assert objective.loss() - plain.loss() == pytest.approx(0.1 * weight.square().sum().item())
    place = dict(objective.layout.slices())["hidden.weight"]
    extra = (objective.gradient() - plain.gradient())[place]
    torch.testing.assert_close(extra, 0.2 * weight.detach().reshape(-1))
    delta = torch.zeros(objective.size, dtype=torch.float64)
    delta[place] = -weight.detach().reshape(-1)
    assert objective.loss_at(delta) == pytest.approx(plain.loss_at(delta), rel=1e-14)


def test_a_criterion_with_parameters_of_its_own_is_no_part_of_the_model():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0).double())

        def forward(self, output, target):
            return self.scale * F.mse_loss(output, target)

    model, criterion = small_net(3, 2), Scaled()
    objective = fm.Objective(model, criterion, (X, VECTORS))
    assert objective.size == sum(p.numel() for p in model.parameters())
    assert objective.loss() == pytest.approx(2 * F.mse_loss(model(X), VECTORS).item())
    objective.gradient()
    assert criterion.scale.grad is None


def test_values_alone_build_no_graph():
    """Also where parameters that are not selected require grad."""
    graphs = []

    def watch(output, target):
        graphs.append(output.requires_grad)
        return F.mse_loss(output, target)

    objective = fm.Objective(small_net(3, 2), watch, (X, VECTORS), params="2.*")
    objective.loss()
    objective.loss_at(torch.zeros(objective.size))
    objective.evaluate_state({})
    objective.gradient()
    assert graphs == [False, False, False, True]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_models_work_and_keep_their_mode():
    model = noisy_net()
    scripted = torch.jit.script(copy.deepcopy(model).train())
    delta = torch.full((sum(p.numel() for p in model.parameters()),), 0.1).double()
    plain, other = (fm.Objective(m, F.cross_entropy, (X, LABELS)) for m in (model, scripted))
    assert other.loss_at(delta) == pytest.approx(plain.loss_at(delta), rel=1e-13)
    torch.testing.assert_close(other.gradient(), plain.gradient())
    assert all(m.training for m in scripted.modules())


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_compiled_models_work(mode):
    model = noisy_net()
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    delta = torch.full((sum(p.numel() for p in model.parameters()),), 0.1).double()
    plain, other = (
        fm.Objective(m, F.cross_entropy, (X, LABELS), mode=mode) for m in (model, compiled)
    )
    assert other.loss_at(delta) == pytest.approx(plain.loss_at(delta), rel=1e-13)
    torch.testing.assert_close(other.gradient(), plain.gradient())


def test_a_one_element_loss_of_any_shape_is_a_scalar():
    objective = fm.Objective(
        small_net(3, 2), lambda o, t: F.mse_loss(o, t).reshape(1, 1), (X, VECTORS)
    )
    assert objective.loss() > 0


def test_a_frozen_model_can_be_named_and_stays_frozen():
    case = build("linear_regression")
    free = case.objective()
    case.model.requires_grad_(False)
    objective = case.objective(params="*")
    assert torch.equal(objective.gradient(), free.gradient())
    assert not any(p.requires_grad for p in case.model.parameters())


def test_point_is_a_new_vector_in_the_models_order():
    case = build("partly_frozen")
    objective = case.objective()
    point = objective.point()
    parameters = dict(case.model.named_parameters())
    expected = torch.cat([parameters[n].detach().reshape(-1) for n in case.names()])
    assert torch.equal(point, expected)
    point.zero_()
    assert torch.equal(objective.point(), expected)


def test_repr_says_what_is_measured():
    text = repr(build("softmax_regression").objective())
    assert "15 parameters, 31 examples in 3 batches" in text
    assert "mode='eval'" in text


def test_displaced_values_that_are_not_finite_are_returned():
    objective = build("quadratic", torch.float32).objective()
    far = torch.full((objective.size,), 1e30)
    assert not math.isfinite(objective.loss_at(far))
    assert not math.isfinite(objective.value_and_gradient(far)[0])


def test_evaluate_state_replaces_parameters_and_buffers():
    case = build("mlp_batch_norm_dropout")
    objective = case.objective()
    other = copy.deepcopy(case.model)
    with torch.no_grad():
        for tensor in [*other.parameters(), other[1].running_mean, other[1].running_var]:
            tensor.mul_(1.5)
    value, means = objective.evaluate_state(other.state_dict(), {"accuracy": fm.accuracy})
    x, y = (torch.cat([b[i] for b in case.batches]) for i in (0, 1))
    assert value == pytest.approx(F.cross_entropy(other(x), y).item(), rel=1e-13)
    hits = (other(x).argmax(1) == y).double().mean().item()
    assert means == {"accuracy": pytest.approx(hits, rel=1e-14)}


def test_evaluate_state_weighs_metrics_by_the_batch_where_targets_do_not_tell():
    data = [(x, {"y": y, "extra": torch.zeros(3)}) for x, y in cut((X, VECTORS), (12, 7))]
    error = lambda o, t: F.mse_loss(o, t["y"])  # noqa: E731
    model = small_net(3, 2)
    objective = fm.Objective(model, error, data, weight=lambda batch: len(batch[0]))
    value, means = objective.evaluate_state({}, {"error": error})
    assert value == pytest.approx(F.mse_loss(model(X), VECTORS).item(), rel=1e-13)
    assert means["error"] == pytest.approx(value, rel=1e-13)


def test_evaluate_state_averages_metrics_over_labels_that_count():
    case = build("padded_token_model")
    _, means = case.objective().evaluate_state({}, {"accuracy": fm.accuracy})
    hits = kept = 0
    for ids, labels in case.batches:
        right = case.model(ids).argmax(1) == labels
        hits += int(right[labels != -100].sum())
        kept += int((labels != -100).sum())
    assert means["accuracy"] == pytest.approx(hits / kept, rel=1e-14)


# --------------------------------------------------------------------------------- determinism


@BASIC
def test_two_objectives_of_the_same_agree_bitwise(name):
    first, second = (build(name, torch.float32).objective() for _ in range(2))
    assert first.loss() == second.loss()
    assert torch.equal(first.gradient(), second.gradient())


def test_the_global_random_state_does_not_matter():
    def measure(seed):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        loader = DataLoader(TensorDataset(X, LABELS), batch_size=4, shuffle=True)
        objective = fm.Objective(noisy_net(), F.cross_entropy, loader, mode="train")
        torch.manual_seed(seed + 1)
        return objective.value_and_gradient()

    (one, left), (two, right) = measure(0), measure(1)
    assert one == two
    assert torch.equal(left, right)


# ------------------------------------------------------------------------------------ bad input


def objective_with(loss_fn=F.mse_loss, data=(X, VECTORS), **options):
    return fm.Objective(small_net(3, 2), loss_fn, data, **options)


@pytest.mark.parametrize("call", ["loss", "gradient"])
def test_a_loss_without_reduction_is_refused(call):
    objective = objective_with(nn.MSELoss(reduction="none"))
    with pytest.raises(fm.LossNotScalarError, match=r"batch 0 has shape \(19, 2\).*reduction="):
        getattr(objective, call)()


@pytest.mark.parametrize("call", ["loss", "gradient"])
@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda o, t: 1.0, r"batch 0 is a float.*without \.item\(\)"),
        (lambda o, t: None, "batch 0 is a NoneType"),
        (lambda o, t: (o - t).round().sum().long(), "batch 0 is of type torch.int64"),
        (lambda o, t: (o - t).sum() + 0j, "batch 0 is of type torch.complex128"),
    ],
    ids=["float", "None", "integer", "complex"],
)
def test_a_loss_that_is_no_real_tensor_is_refused(loss_fn, message, call):
    with pytest.raises(fm.LossNotScalarError, match=message):
        getattr(objective_with(loss_fn), call)()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("call", ["loss", "gradient", "matvec"])
def test_a_loss_that_is_not_finite_names_its_batch(call, batch, value):
    y = VECTORS.clone()
    y[6 * batch] = value
    objective = objective_with(lambda o, t: (o * t).mean(), cut((X, y), (6, 6, 6, 1)))
    calls = {
        "loss": objective.loss,
        "gradient": objective.gradient,
        "matvec": lambda: fm.HessianOperator(objective) @ torch.ones(objective.size).double(),
    }
    with pytest.raises(fm.NonFiniteError, match=f"loss of batch {batch} is (nan|inf|-inf)"):
        calls[call]()


@pytest.mark.parametrize(
    "loss_fn",
    [lambda o, t: (o.detach() - t).mean(), lambda o, t: t.mean()],
    ids=["detached", "constant"],
)
def test_a_loss_that_does_not_depend_on_the_parameters_is_refused(loss_fn):
    objective = objective_with(loss_fn)
    assert math.isfinite(objective.loss())
    with pytest.raises(fm.LossNotScalarError, match="batch 0 does not depend on the selected"):
        objective.gradient()
    with pytest.raises(fm.LossNotScalarError, match="batch 0 does not depend on the selected"):
        fm.HessianOperator(objective) @ torch.ones(objective.size).double()


def test_a_model_must_be_a_module():
    with pytest.raises(
        fm.ArgumentTypeError, match="'model' argument of Objective must be a Module"
    ):
        fm.Objective(lambda x: x, F.mse_loss, (X, VECTORS))


def test_neither_loss_fn_nor_batch_loss_is_refused():
    with pytest.raises(fm.InvalidArgumentError, match=r"either loss_fn.*got neither"):
        objective_with(None)


def test_both_loss_fn_and_batch_loss_are_refused():
    with pytest.raises(fm.InvalidArgumentError, match=r"either loss_fn.*got both"):
        objective_with(batch_loss=lambda m, b: m(b[0]).mean())


@pytest.mark.parametrize("argument", ["loss_fn", "batch_loss", "weight"])
def test_functions_must_be_callable(argument):
    options = {"loss_fn": None if argument == "batch_loss" else F.mse_loss, argument: "mse"}
    with pytest.raises(fm.ArgumentTypeError, match=f"'{argument}' argument.*callable; got a str"):
        objective_with(**options)


@pytest.mark.parametrize("mode", ["evaluate", None, True])
def test_an_unknown_mode_is_refused(mode):
    with pytest.raises(fm.InvalidArgumentError, match=r"'mode' argument.*'eval', 'train', 'keep'"):
        objective_with(mode=mode)


def test_a_misspelt_mode_gets_a_suggestion():
    with pytest.raises(fm.InvalidArgumentError, match="Did you mean 'train'"):
        objective_with(mode="training")


def test_another_device_than_the_models_is_refused():
    with pytest.raises(
        fm.DeviceError, match="device='meta' was asked for, but the model is on cpu"
    ):
        objective_with(device="meta")


def test_a_device_that_does_not_exist_is_refused():
    with pytest.raises(fm.DeviceError, match=r"'device' argument of Objective.*bogus"):
        objective_with(device="bogus")


def test_the_models_own_device_is_accepted():
    assert objective_with(device="cpu").device == torch.device("cpu")


def test_a_model_on_the_meta_device_is_refused():
    with pytest.raises(fm.DeviceError, match="meta device and holds no numbers"):
        fm.Objective(nn.Linear(3, 2, device="meta"), F.mse_loss, (X, VECTORS))


def test_a_model_on_two_devices_is_refused_by_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2, device="meta"))
    with pytest.raises(fm.DeviceError, match=r"'0\.weight' on cpu.*'1\.weight' on meta"):
        fm.Objective(model, F.mse_loss, (X, VECTORS))


def test_a_buffer_on_another_device_is_refused_by_name():
    model = small_net(3, 2)
    model.register_buffer("table", torch.zeros(2, device="meta"))
    with pytest.raises(fm.DeviceError, match="'table' is on the meta device"):
        fm.Objective(model, F.mse_loss, (X, VECTORS))


@pytest.mark.parametrize("call", ["loss_at", "value_and_gradient"])
@pytest.mark.parametrize(
    ("displacement", "error", "message"),
    [
        (torch.zeros(25).double(), fm.ShapeError, r"takes shape \(26,\); got \(25,\)"),
        (torch.zeros(26, 1).double(), fm.ShapeError, r"takes shape \(26,\); got \(26, 1\)"),
        (torch.zeros(()).double(), fm.ShapeError, r"takes shape \(26,\); got \(\)"),
        (torch.zeros(26, device="meta"), fm.DeviceError, "works on cpu; the vector is on meta"),
        (torch.zeros(26) + 0j, fm.ArgumentTypeError, "takes real vectors; got torch.complex64"),
        ([0.0] * 26, fm.ArgumentTypeError, r"takes a tensor of shape \(26,\); got list"),
        (torch.tensor([0.0] * 25 + [math.nan]), fm.NonFiniteError, "NaN or infinity at index 25"),
        (torch.tensor([math.inf] + [0.0] * 25), fm.NonFiniteError, "NaN or infinity at index 0"),
    ],
    ids=["short", "column", "scalar", "device", "complex", "list", "nan", "inf"],
)
def test_a_wrong_displacement_is_refused(call, displacement, error, message):
    objective = objective_with()
    assert objective.size == 26
    with pytest.raises(error, match=rf"Objective\.{call} .*{message}"):
        getattr(objective, call)(displacement)


def test_a_displacement_of_integers_is_allowed():
    objective = objective_with()
    ones = torch.ones(objective.size, dtype=torch.int64)
    assert objective.loss_at(ones) == objective.loss_at(ones.double())


def test_metrics_without_a_loss_fn_are_refused():
    objective = objective_with(None, batch_loss=lambda m, b: m(b[0]).mean())
    with pytest.raises(fm.InvalidArgumentError, match="metrics= needs an objective with loss_fn"):
        objective.evaluate_state({}, {"accuracy": fm.accuracy})


def test_a_metric_of_several_values_is_refused_by_name():
    with pytest.raises(fm.LossNotScalarError, match=r"metric 'error' gave shape \(19, 2\)"):
        objective_with().evaluate_state({}, {"error": lambda o, t: (o - t).abs()})


# ------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize(
    ("output", "target", "expected"),
    [
        ([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]], torch.tensor([0, 1, 1]), 2 / 3),
        ([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]], torch.tensor([0, -100, 1]), 1 / 2),
        ([[1.0], [-1.0], [2.0]], torch.tensor([1, 1, 1]), 2 / 3),
        ([1.0, -1.0, 2.0], torch.tensor([1, 0, 0]), 2 / 3),
        ([[1.0], [-1.0]], torch.tensor([[1.0], [1.0]]), 1 / 2),
        ([[3.0, 0.0], [0.0, 1.0]], torch.tensor([[0.9, 0.1], [0.6, 0.4]]), 1 / 2),
    ],
    ids=["labels", "ignored", "binary column", "binary vector", "flags", "probabilities"],
)
def test_accuracy(output, target, expected):
    assert fm.accuracy(torch.tensor(output), target).item() == pytest.approx(expected)


def test_accuracy_over_positions():
    scores = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    labels = scores.argmax(1)
    labels[0, 0] = -100
    labels[1, :3] = (labels[1, :3] + 1) % 5
    assert fm.accuracy(scores, labels).item() == pytest.approx(20 / 23)


# ------------------------------------------------------- models that write where they should not


class HalvesItsInput(nn.Linear):
    def forward(self, x):
        x /= 2
        return super().forward(x)


@pytest.mark.parametrize("cache", [True, False])
def test_a_forward_that_writes_to_its_input_changes_neither_value_nor_data(cache):
    torch.manual_seed(0)
    x, y = torch.randn(7, 4), torch.randn(7, 2)
    model, kept = HalvesItsInput(4, 2), x.clone()
    expected = F.mse_loss(F.linear(x / 2, model.weight, model.bias), y).item()
    objective = fm.Objective(model, nn.MSELoss(), (x, y), cache=cache, batch_size=3)
    values = [objective.loss() for _ in range(4)]
    assert values == [values[0]] * 4
    assert values[0] == pytest.approx(expected, rel=1e-6)
    assert torch.equal(x, kept)


def test_a_forward_that_writes_to_its_parameters_does_not_reach_the_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, 2))
    data = torch.randint(5, (6, 2)), torch.randint(2, (6,))
    objective = fm.Objective(model, nn.CrossEntropyLoss(), data)
    with untouched(model, data):
        first = objective.loss(), objective.gradient()
        objective.loss_at(torch.full((objective.size,), 0.1))
        fm.HessianOperator(objective) @ torch.ones(objective.size)
        second = objective.loss(), objective.gradient()
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])


def test_parameters_that_are_replaced_are_followed():
    torch.manual_seed(0)
    model, other = nn.Linear(3, 1), nn.Linear(3, 1)
    data = torch.randn(5, 3), torch.randn(5, 1)
    objective = fm.Objective(model, nn.MSELoss(), data)
    model.load_state_dict(other.state_dict(), assign=True)
    assert objective.loss() == fm.Objective(other, nn.MSELoss(), data).loss()


def test_a_model_of_another_type_needs_a_new_objective():
    model = nn.Linear(3, 1)
    objective = fm.Objective(model, nn.MSELoss(), (torch.randn(5, 3), torch.randn(5, 1)))
    model.double()
    with pytest.raises(fm.StateMismatchError, match=r"'weight'.*new Objective"):
        objective.loss()


def test_ignored_labels_in_an_unknown_loss_need_a_weight():
    data = torch.randn(6, 3), torch.tensor([0, 1, -100, 2, 1, -100])
    with pytest.raises(fm.InvalidArgumentError, match="weight="):
        fm.Objective(nn.Linear(3, 3), lambda o, t: F.cross_entropy(o, t), data)
    weighted = fm.Objective(
        nn.Linear(3, 3),
        lambda o, t: F.cross_entropy(o, t),
        data,
        weight=lambda batch: (batch[1] != -100).sum(),
    )
    assert weighted.batches.total_weight == 4


def test_ignored_labels_in_a_mapping_need_a_weight():
    batch = {"x": torch.randn(2, 3), "labels": torch.tensor([1, -100])}
    with pytest.raises(fm.InvalidArgumentError, match="labels of −100"):
        fm.Objective(
            nn.Linear(3, 3),
            data=[batch],
            batch_loss=lambda m, b: F.cross_entropy(m(b["x"]), b["labels"]),
        )


def test_a_gradient_that_is_not_finite_names_the_parameter():
    model = nn.Linear(1, 1)
    nn.init.zeros_(model.weight)
    with pytest.raises(fm.NonFiniteError, match=r"gradient by 'weight'"):
        fm.Objective(
            model, lambda o, t: model_root(model), (torch.ones(2, 1), torch.zeros(2, 1))
        ).gradient()


def model_root(model):
    return model.weight.abs().sum().sqrt() * 1.0


@pytest.mark.parametrize(
    ("output", "target", "expected"),
    [
        (torch.eye(3) * 5 - 1, torch.tensor([[0], [1], [2]]), 1.0),
        (torch.tensor([[2.0], [-1.0], [3.0]]), torch.tensor([1, 0, 0]), 2 / 3),
        (torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0]), 0.5),
        (torch.eye(2), torch.tensor([[0.1, 0.9], [0.2, 0.8]]), 0.5),
        (torch.eye(2), torch.tensor([0, -100]), 1.0),
        (torch.zeros(1, 2, 2) + torch.tensor([0.0, 1.0]), torch.tensor([[0, 0]]), 1.0),
    ],
)
def test_accuracy_reads_each_kind_of_label(output, target, expected):
    assert fm.accuracy(output, target).item() == pytest.approx(expected)


@pytest.mark.parametrize("target", [torch.tensor([0, 1]), torch.zeros(3, 2)])
def test_accuracy_refuses_labels_that_do_not_fit(target):
    with pytest.raises(fm.ShapeError, match="scores"):
        fm.accuracy(torch.eye(3), target)


@pytest.mark.parametrize("size_average", [True, False])
def test_the_old_name_of_the_reduction_is_understood(size_average):
    torch.manual_seed(0)
    model, data = nn.Linear(3, 2), (torch.randn(7, 3), torch.randn(7, 2))
    loss_fn = functools.partial(F.mse_loss, size_average=size_average)
    with pytest.warns(UserWarning, match="size_average"):
        value = fm.Objective(model, loss_fn, data, batch_size=3).loss()
    assert value == pytest.approx(F.mse_loss(model(data[0]), data[1]).item(), rel=1e-6)
