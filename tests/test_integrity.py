import gc
import random
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import flatminima as fm
from integrity import untouched
from zoo import NAMES, build, cut, settle_batch_norm

N = 20
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(1))
Y = torch.randint(4, (N,), generator=torch.Generator().manual_seed(2))


def hooked_net():
    """Every kind of state that a model can have: modes, gradients, hooks, frozen parts."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 5), nn.Linear(5, 4)
    )
    settle_batch_norm(model, X)
    model.register_buffer("scratch", torch.full((2,), float("nan")), persistent=False)
    model[0].weight.grad = torch.ones(6, 3)
    model[3].requires_grad_(False)
    model[0].register_forward_hook(lambda module, args, output: None)
    model[4].register_full_backward_hook(lambda module, inputs, outputs: None)
    model[4].weight.register_hook(lambda gradient: 2 * gradient)
    model.train()
    model[1].eval()
    return model


def vector(objective, value=0.01):
    return torch.full((objective.size,), value, dtype=objective.dtype)


CALLS = {
    "loss": lambda o: o.loss(),
    "loss_at": lambda o: o.loss_at(vector(o)),
    "gradient": lambda o: o.gradient(),
    "value_and_gradient": lambda o: o.value_and_gradient(),
    "value_and_gradient displaced": lambda o: o.value_and_gradient(vector(o)),
    "point": lambda o: o.point().zero_(),
    "evaluate_state": lambda o: o.evaluate_state(o.model.state_dict()),
    "matvec": lambda o: fm.HessianOperator(o).matvec(vector(o)),
    "matmat": lambda o: fm.HessianOperator(o).matmat(torch.stack([vector(o)] * 2, dim=1)),
    "to_scipy": lambda o: fm.HessianOperator(o).to_scipy().matvec(vector(o).numpy()),
    "repr": lambda o: (repr(o), repr(fm.HessianOperator(o))),
}
EVERY_CALL = pytest.mark.parametrize("call", CALLS)
EVERY_MODE = pytest.mark.parametrize("mode", ["eval", "train", "keep"])
CACHED = pytest.mark.parametrize("cache", [True, False], ids=["cached", "read anew"])

CONTEXTS = {
    "plain": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
EVERY_CONTEXT = pytest.mark.parametrize("context", CONTEXTS)


def values(result):
    """Whatever a call returned, as something that can be compared bitwise."""
    if isinstance(result, torch.Tensor):
        return result.dtype, result.clone().numpy().tobytes()
    if isinstance(result, np.ndarray):
        return result.tobytes()
    if isinstance(result, tuple):
        return tuple(values(r) for r in result)
    return result


# -------------------------------------------------------------------- around every public call


@EVERY_CALL
@EVERY_MODE
@CACHED
def test_every_call_leaves_everything_as_it_was(call, mode, cache):
    model, criterion = hooked_net(), nn.CrossEntropyLoss()
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True, generator=generator)
    with untouched(model, criterion, loader, generator, X, Y):
        objective = fm.Objective(model, criterion, loader, mode=mode, cache=cache)
        CALLS[call](objective)


@EVERY_CALL
@pytest.mark.parametrize("name", NAMES)
def test_every_case_of_the_zoo_stays_as_it_was(name, call):
    case = build(name)
    with untouched(case.model, case.batches, case.loss_fn):
        CALLS[call](case.objective())


@EVERY_CALL
@EVERY_CONTEXT
@CACHED
def test_calls_work_in_any_gradient_mode_and_leave_it(call, context, cache):
    def measure():
        loader = DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True)
        return CALLS[call](fm.Objective(model, F.cross_entropy, loader, cache=cache))

    model = hooked_net()
    expected = values(measure())
    with CONTEXTS[context](), untouched(model, X, Y):
        assert values(measure()) == expected


@EVERY_CONTEXT
@pytest.mark.parametrize("later", CONTEXTS)
def test_objects_made_in_one_gradient_mode_serve_in_another(context, later):
    model = hooked_net()
    with CONTEXTS[context]():
        objective = fm.Objective(model, F.cross_entropy, DataLoader(TensorDataset(X, Y)))
        operator = fm.HessianOperator(objective)
        delta, gradient = vector(objective), objective.gradient()
    with CONTEXTS[later](), untouched(model, delta, gradient):
        assert torch.equal(objective.gradient(), gradient)
        objective.value_and_gradient(delta)
        (operator @ gradient).add_(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_default_dtype_does_not_matter(dtype):
    expected = fm.Objective(hooked_net(), F.cross_entropy, (X, Y)).value_and_gradient()
    model = hooked_net()
    torch.set_default_dtype(dtype)
    try:
        with untouched(model):
            found = fm.Objective(model, F.cross_entropy, (X, Y)).value_and_gradient()
    finally:
        torch.set_default_dtype(torch.float32)
    assert values(found) == values(expected)


# --------------------------------------------------------------------------- when something fails


class TroubleError(Exception):
    pass


class Fragile(Dataset):
    """Raises when example `at` is read, once `armed`."""

    def __init__(self, error, at):
        self.error, self.at, self.armed = error, at, True

    def __len__(self):
        return N

    def __getitem__(self, index):
        torch.rand(1)
        random.random()
        np.random.rand()  # noqa: NPY002
        if self.armed and index == self.at:
            raise self.error
        return X[index], Y[index]


@pytest.mark.parametrize(
    "error", [TroubleError("lost"), KeyboardInterrupt()], ids=["error", "Ctrl-C"]
)
@pytest.mark.parametrize("batch", range(4))
@CACHED
def test_data_that_raise_at_the_first_reading(batch, error, cache):
    model, data = hooked_net(), Fragile(error, 5 * batch + 2)
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(data, batch_size=5, generator=generator)
    with untouched(model, generator), pytest.raises(type(error)):
        fm.Objective(model, F.cross_entropy, loader, cache=cache)


@pytest.mark.parametrize(
    "error", [TroubleError("lost"), KeyboardInterrupt()], ids=["error", "Ctrl-C"]
)
@pytest.mark.parametrize("batch", range(4))
@pytest.mark.parametrize("call", [c for c in CALLS if c not in ("point", "repr")])
def test_data_that_raise_at_a_later_reading(call, batch, error):
    model, data = hooked_net(), Fragile(error, 5 * batch + 2)
    data.armed = False
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(data, batch_size=5, shuffle=True, generator=generator)
    objective = fm.Objective(model, F.cross_entropy, loader, mode="train", cache=False)
    expected = objective.loss()
    data.armed = True
    with untouched(model, generator), pytest.raises(type(error)):
        CALLS[call](objective)
    data.armed = False
    assert objective.loss() == expected


class Stumbling(nn.Module):
    """Its forward raises at the `at`-th call, in the middle of the layers."""

    def __init__(self, error):
        super().__init__()
        self.net = hooked_net()
        self.error = error
        self.countdown = [10**9]

    def forward(self, x):
        x = self.net[1](self.net[0](x))
        self.countdown[0] -= 1
        if self.countdown[0] == 0:
            raise self.error
        return self.net[4](self.net[3](x))


@pytest.mark.parametrize(
    "error", [TroubleError("lost"), KeyboardInterrupt()], ids=["error", "Ctrl-C"]
)
@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("call", [c for c in CALLS if c not in ("point", "repr")])
def test_a_forward_that_raises(call, batch, error):
    model = Stumbling(error)
    objective = fm.Objective(model, F.cross_entropy, (X, Y), batch_size=5, mode="train")
    model.countdown[0] = batch + 1
    with untouched(model, X, Y), pytest.raises(type(error)) as caught:
        CALLS[call](objective)
    if isinstance(error, Exception) and sys.version_info >= (3, 11):
        assert f"This happened in batch {batch} of the data." in caught.value.__notes__


@pytest.mark.parametrize("call", [c for c in CALLS if c not in ("point", "repr")])
def test_a_loss_that_raises(call):
    def loss(output, target):
        if len(target) < 5:
            raise TroubleError("lost")
        return F.cross_entropy(output, target)

    model = hooked_net()
    objective = fm.Objective(model, loss, cut((X, Y), (9, 8, 3)))
    with untouched(model, X, Y), pytest.raises(TroubleError) as caught:
        CALLS[call](objective)
    if sys.version_info >= (3, 11):
        assert caught.value.__notes__ == ["This happened in batch 2 of the data."]


def test_a_backward_that_raises():
    class Irreversible(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise TroubleError("no way back")

    model = hooked_net()
    loss = lambda o, t: F.cross_entropy(Irreversible.apply(o), t)  # noqa: E731
    objective = fm.Objective(model, loss, (X, Y), batch_size=6)
    for call in ("gradient", "matvec"):
        with untouched(model, X, Y), pytest.raises(TroubleError, match="no way back"):
            CALLS[call](objective)


def test_a_metric_that_raises():
    def metric(output, target):
        raise TroubleError("lost")

    model = hooked_net()
    objective = fm.Objective(model, F.cross_entropy, (X, Y))
    with untouched(model), pytest.raises(TroubleError) as caught:
        objective.evaluate_state({}, {"metric": metric})
    if sys.version_info >= (3, 11):
        assert caught.value.__notes__ == ["This happened in batch 0 of the data."]


def test_data_that_changed_leave_no_trace():
    model = hooked_net()
    data = Fragile(None, 10**9)
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(data, batch_size=5, shuffle=True, generator=generator)
    objective = fm.Objective(model, F.cross_entropy, loader, mode="train", cache=False)
    X[7, 0] += 1
    try:
        with untouched(model, generator), pytest.raises(fm.DataChangedError):
            objective.gradient()
    finally:
        X[7, 0] -= 1


# ------------------------------------------------------- models that write while they compute


class InPlaceCounter(nn.Module):
    """Its value depends on how often it was called since it was made."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.net(x) * self.calls


class RebindingCounter(InPlaceCounter):
    def forward(self, x):
        self.calls = self.calls + 1
        return self.net(x) * self.calls


class PlainCounter(nn.Module):
    """Counts in an attribute that is no buffer, and keeps what it made."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 4)
        self.calls = 0
        self.last = None

    def forward(self, x):
        self.calls += 1
        self.last = self.net(x) * self.calls
        self.extra = self.last.sum()
        return self.last


class Registering(nn.Module):
    """Makes a buffer when first called."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 4)

    def forward(self, x):
        if "mask" not in self._buffers:
            self.register_buffer("mask", torch.ones(4))
        return self.net(x) * self.mask


class Recurrent(nn.Module):
    """Rebuilds its list of weights whenever they are replaced."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(1, 4, batch_first=True)

    def forward(self, x):
        return self.cell(x[:, :, None])[0][:, -1]


def with_spectral_norm():
    layer = torch.nn.utils.spectral_norm(nn.Linear(3, 4))
    layer(X)
    return nn.Sequential(layer)


def with_parametrized_spectral_norm():
    return nn.Sequential(torch.nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)))


WRITERS = {
    "buffer in place": InPlaceCounter,
    "buffer bound anew": RebindingCounter,
    "plain attributes": PlainCounter,
    "buffer made late": Registering,
    "recurrent weights": Recurrent,
    "spectral norm": with_spectral_norm,
    "parametrized spectral norm": with_parametrized_spectral_norm,
    "cumulative batch norm": lambda: nn.Sequential(
        nn.BatchNorm1d(3, momentum=None), nn.Linear(3, 4)
    ),
}


@pytest.mark.parametrize("kind", WRITERS)
@EVERY_MODE
@pytest.mark.parametrize("call", ["loss", "loss_at", "value_and_gradient displaced", "matvec"])
def test_models_that_write_while_they_compute(kind, mode, call):
    torch.manual_seed(0)
    model = WRITERS[kind]()
    model.train()
    objective = fm.Objective(model, F.cross_entropy, (X, Y), batch_size=6, mode=mode)
    attributes = [dict(vars(m)) for m in model.modules()]
    with untouched(model):
        first = values(CALLS[call](objective))
        second = values(CALLS[call](objective))
    assert first == second
    for module, before in zip(model.modules(), attributes, strict=True):
        after = vars(module)
        assert list(after) == list(before)
        assert all(after[name] is before[name] for name in before)


def test_a_model_that_counts_in_a_buffer_starts_from_its_own_count_in_each_batch():
    model = InPlaceCounter()
    model.calls += 4
    expected = F.cross_entropy(5 * model.net(X), Y).item()
    whole = fm.Objective(model, F.cross_entropy, (X, Y)).loss()
    cut_up = fm.Objective(model, F.cross_entropy, (X, Y), batch_size=3).loss()
    assert whole == pytest.approx(expected, rel=1e-6)
    assert cut_up == pytest.approx(expected, rel=1e-6)


def test_results_do_not_share_memory_with_the_model():
    case = build("quadratic")
    objective = case.objective()
    with untouched(case.model):
        objective.point().fill_(7)
        objective.gradient().fill_(7)
        (fm.HessianOperator(objective) @ torch.ones(6).double()).fill_(7)


def test_the_graph_of_a_product_is_freed_at_once():
    """Without reference cycles, which only the garbage collector would undo, and without growth."""
    objective = build("mlp_batch_norm_dropout").objective()
    operator = fm.HessianOperator(objective)
    v = vector(objective)

    def living():
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    operator @ v
    gc.collect()
    gc.disable()
    try:
        before = living()
        operator @ v
        objective.gradient()
        objective.loss_at(v)
        assert living() == before
    finally:
        gc.enable()


# ------------------------------------------------------------------ the check itself finds things


def one_layer():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].weight.grad = torch.zeros(2, 2)
    return model


def rebind_parameter(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def rebind_buffer(model):
    model[1].running_mean = model[1].running_mean.clone()


def flip_sign_of_zero(model):
    model[1].running_mean.neg_()


CHANGES = {
    "parameter": lambda m: m[0].weight.data.add_(1e-7),
    "parameter by the last bit": lambda m: m[0].bias.data.copy_(
        torch.nextafter(m[0].bias.data, torch.tensor(9.0))
    ),
    "another parameter of the same values": rebind_parameter,
    "buffer": lambda m: m[1].running_mean.add_(1),
    "sign of zero": flip_sign_of_zero,
    "another buffer of the same values": rebind_buffer,
    "counter": lambda m: m[1].num_batches_tracked.add_(1),
    "gradient filled": lambda m: setattr(m[0].bias, "grad", torch.zeros(2)),
    "gradient removed": lambda m: setattr(m[0].weight, "grad", None),
    "gradient changed": lambda m: m[0].weight.grad.add_(1),
    "gradient replaced": lambda m: setattr(m[0].weight, "grad", torch.zeros(2, 2)),
    "requires_grad": lambda m: m[0].weight.requires_grad_(False),
    "mode": lambda m: m[1].eval(),
    "forward hook": lambda m: m[0].register_forward_hook(print),
    "forward pre-hook": lambda m: m[0].register_forward_pre_hook(print),
    "backward hook": lambda m: m[0].register_full_backward_hook(print),
    "tensor hook": lambda m: m[0].weight.register_hook(print),
    "attribute": lambda m: setattr(m, "extra", 1),
    "new buffer": lambda m: m.register_buffer("extra", torch.zeros(1)),
    "new module": lambda m: m.append(nn.Tanh()),
    "replaced module": lambda m: m.__setitem__(1, nn.BatchNorm1d(2)),
    "Python's random state": lambda m: random.random(),
    "NumPy's random state": lambda m: np.random.rand(),  # noqa: NPY002
    "torch's random state": lambda m: torch.rand(1),
    "grad mode": lambda m: torch.set_grad_enabled(False),
    "default dtype": lambda m: torch.set_default_dtype(torch.float64),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_check_finds_a_changed_model_or_state(change):
    model = one_layer()
    try:
        with pytest.raises(AssertionError, match="changed by the call"), untouched(model):
            CHANGES[change](model)
    finally:
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)


def test_the_check_finds_changed_data():
    data = {"x": [torch.zeros(2)], "y": np.zeros(2), "generator": torch.Generator()}
    loader = DataLoader(
        TensorDataset(torch.zeros(4, 1)), shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    for change in (
        lambda: data["x"][0].add_(1),
        lambda: data["y"].fill(1),
        lambda: data["x"].append(1),
        lambda: torch.rand(1, generator=data["generator"]),
        lambda: data.pop("y"),
        lambda: list(loader),
        lambda: loader.dataset.tensors[0].add_(1),
    ):
        with pytest.raises(AssertionError, match="changed by the call"), untouched(data, loader):
            change()


def test_the_check_finds_changes_when_the_block_raises():
    def block():
        model.eval()
        raise TroubleError

    model = one_layer()
    with pytest.raises(AssertionError, match="training"), untouched(model):
        block()


def test_the_check_lets_pass_what_changes_nothing():
    model = hooked_net()
    with untouched(model, X, DataLoader(TensorDataset(X, Y))):
        model[3](torch.zeros(1, 6))
        model.state_dict()
    with pytest.raises(TroubleError), untouched(model):
        raise TroubleError
