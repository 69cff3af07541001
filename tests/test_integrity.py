import contextlib
import gc
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset

import flatminima as fm
from integrity import Snapshot, bits, untouched
from zoo import build, settle_batch_norm

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
    "losses_at": lambda o: o.losses_at([vector(o), vector(o, -0.01)]),
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
@EVERY_CONTEXT
@CACHED
def test_calls_work_in_any_gradient_mode_and_leave_it(call, context, cache):
    def measure():
        loader = DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True)
        return CALLS[call](fm.Objective(model, F.cross_entropy, loader, cache=cache))

    model = hooked_net()
    expected = bits(measure())
    with CONTEXTS[context](), untouched(model, X, Y):
        assert bits(measure()) == expected


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
    assert bits(found) == bits(expected)


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
@pytest.mark.parametrize("call", ["loss", "matvec"])
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


class Immovable:
    """A batch that runs out of memory on its way to the device."""

    x = X

    def to(self, device):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_memory_that_runs_out_while_a_batch_is_moved():
    with pytest.raises(fm.DeviceMemoryError) as caught:
        fm.Objective(
            hooked_net(), batch_loss=lambda m, b: m(b.x).mean(), data=[Immovable()], weight=len
        )
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_ctrl_c_between_two_hooks_of_the_librarys_own(monkeypatch):
    """The trace of a first product hooks one module after the other."""
    model = hooked_net()
    objective = fm.Objective(model, F.cross_entropy, (X, Y))
    operator, register, left = fm.HessianOperator(objective), nn.Module.register_forward_hook, [2]

    def interrupted(module, *args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return register(module, *args, **kwargs)

    with untouched(model), monkeypatch.context() as patch:
        patch.setattr(nn.Module, "register_forward_hook", interrupted)
        with contextlib.suppress(KeyboardInterrupt):
            operator.matvec(vector(objective))


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
    with untouched(model):
        first = bits(CALLS[call](objective))
        second = bits(CALLS[call](objective))
    assert first == second


class Recording(nn.Module):
    """Its value depends on how long a list is that grows with each call."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 4)
        self.seen = []

    def forward(self, x):
        self.seen.append(1)
        return self.net(x) * len(self.seen)


class Remembering(nn.Module):
    """Keeps what it makes from its weights in a mapping."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 4)
        self.cache = {}

    def forward(self, x):
        if "scale" not in self.cache:
            self.cache["scale"] = self.net.weight.square().sum()
        return self.net(x) * self.cache["scale"]


class Settings:
    kind = None


class Deciding(nn.Module):
    """Settles an option of its own, an object's, when first called."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 4)
        self.settings = Settings()

    def forward(self, x):
        if self.settings.kind is None:
            self.settings.kind = "regression"
        return self.net(x)


class Noisy(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self, generator):
        super().__init__()
        self.net = nn.Linear(3, 4)
        self.generator = generator

    def forward(self, x):
        if isinstance(self.generator, torch.Generator):
            noise = torch.randn(x.shape, generator=self.generator)
        else:
            noise = torch.as_tensor(self.generator.standard_normal(x.shape), dtype=x.dtype)
        return self.net(x + noise)


WRITERS_BEHIND_ATTRIBUTES = {
    "list in place": Recording,
    "mapping in place": Remembering,
    "object": Deciding,
    "torch's generator": lambda: Noisy(torch.Generator().manual_seed(4)),
    "NumPy's generator": lambda: Noisy(np.random.default_rng(4)),
}


@pytest.mark.parametrize("kind", WRITERS_BEHIND_ATTRIBUTES)
@pytest.mark.parametrize("call", ["loss", "matvec"])
def test_models_that_write_to_what_their_attributes_hold(kind, call):
    torch.manual_seed(0)
    model = WRITERS_BEHIND_ATTRIBUTES[kind]()
    objective = fm.Objective(model, F.cross_entropy, (X, Y), batch_size=6)
    with untouched(model):
        first, second = (bits(CALLS[call](objective)) for _ in range(2))
    assert first == second


class CountingLoss(nn.Module):
    """A criterion with state of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, output, target):
        self.calls += 1
        return F.cross_entropy(output, target) * self.calls


def test_a_criterion_that_writes_while_it_computes():
    model, criterion = nn.Linear(3, 4), CountingLoss()
    objective = fm.Objective(model, criterion, (X, Y), batch_size=6)
    with untouched(model, criterion):
        assert objective.loss() == objective.loss()


def test_gradients_of_others_stay_where_backward_is_called():
    """By reentrant checkpointing, for which `torch.autograd.grad` does not do."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.block = nn.Linear(3, 4), nn.Linear(4, 4)

        def forward(self, x):
            return checkpoint(self.block, self.first(x), use_reentrant=True)

    def loss(model, batch):
        decay = sum(p.square().sum() for p in own)
        return F.mse_loss(model(batch), teacher(batch)) + 0.1 * decay

    model, teacher = Checkpointed(), nn.Linear(3, 4)
    own = list(model.parameters())
    own[0].grad = torch.ones_like(own[0])
    x = X.clone().requires_grad_()
    objective = fm.Objective(model, batch_loss=loss, data=[x])
    with untouched(model, teacher, x):
        for _ in range(2):
            objective.gradient()


class Record:
    """A batch of a class of the user's own."""

    def __init__(self, x):
        self.x = x


def double_tensor(model, batch):
    batch["x"].mul_(2)
    return model(batch["x"]).square().mean()


def derive_by_input(model, batch):
    x = batch["x"].requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return slope.square().mean()


def empty_mapping(model, batch):
    return model(batch.pop("x")).square().mean()


def double_array(model, batch):
    batch["x"] *= 2
    return model(torch.as_tensor(batch["x"])).square().mean()


def double_in_object(model, batch):
    batch.x.mul_(2)
    return model(batch.x).square().mean()


WRITING_LOSSES = {
    "tensor": (double_tensor, lambda: {"x": X.clone()}),
    "requires_grad": (derive_by_input, lambda: {"x": X.clone()}),
    "mapping": (empty_mapping, lambda: {"x": X.clone()}),
    "array": (double_array, lambda: {"x": X.numpy().copy()}),
    "object": (double_in_object, lambda: Record(X.clone())),
}


@pytest.mark.parametrize("kind", WRITING_LOSSES)
@pytest.mark.parametrize("call", ["loss", "gradient"])
def test_losses_that_write_to_their_batch(kind, call):
    loss, make = WRITING_LOSSES[kind]
    model, data = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), [make()]
    objective = fm.Objective(model, batch_loss=loss, data=data, weight=lambda batch: N)
    with untouched(model, data):
        first, second, third = (bits(CALLS[call](objective)) for _ in range(3))
    assert first == second == third


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


class Box:
    def __init__(self):
        self.value = 1


def busy_net():
    """Everything that the check looks at is there to be changed."""
    model = nn.Sequential(
        nn.Linear(2, 2),
        nn.BatchNorm1d(2),
        nn.LSTM(2, 2),
        parametrizations.weight_norm(nn.Linear(2, 2)),
    )
    model[0].weight.grad = torch.zeros(2, 2)
    model.number = 1.5
    model.kept = torch.zeros(2)
    model.generators = [torch.Generator(), np.random.default_rng(0), random.Random(0)]
    model.history = [[torch.zeros(1)], {"a": 1.5}]
    model.options = {"a": [1], "b": Box()}
    model.register_forward_hook(print)
    model.cell = nn.Parameter(torch.zeros(1))
    model.cell.note = "a"
    return model


def set_to(path, value):
    def change(model):
        *owners, name = path.split(".")
        for owner in owners:
            model = model[int(owner)] if owner.isdigit() else getattr(model, owner)
        setattr(model, name, value)

    return change


def rebind_parameter(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def rebind_buffer(model):
    model[1].running_mean = model[1].running_mean.clone()


def write_what_was_there(model):
    model[1].running_mean.copy_(model[1].running_mean.clone())


def move_storage(model):
    model[1].running_mean.data = model[1].running_mean.clone()


def reorder_hooks(model):
    handle = model.register_forward_hook(repr)
    model._forward_hooks.move_to_end(handle.id, last=False)
    handle.remove()


def copy_hooks(model):
    model._forward_hooks = type(model._forward_hooks)(model._forward_hooks)


CHANGES = {
    "parameter": lambda m: m[0].weight.data.add_(1e-7),
    "parameter by the last bit": lambda m: m[0].bias.data.copy_(
        torch.nextafter(m[0].bias.data, torch.tensor(9.0))
    ),
    "another parameter of the same values": rebind_parameter,
    "buffer": lambda m: m[1].running_mean.add_(1),
    "sign of zero": lambda m: m[1].running_mean.data.neg_(),
    "another buffer of the same values": rebind_buffer,
    "buffer written to": write_what_was_there,
    "buffer in another place": move_storage,
    "buffer no longer saved": lambda m: m[1]._non_persistent_buffers_set.add("running_mean"),
    "counter": lambda m: m[1].num_batches_tracked.add_(1),
    "gradient filled": set_to("0.bias.grad", torch.zeros(2)),
    "gradient removed": set_to("0.weight.grad", None),
    "gradient changed": lambda m: m[0].weight.grad.add_(1),
    "gradient replaced": set_to("0.weight.grad", torch.zeros(2, 2)),
    "requires_grad": lambda m: m[0].weight.requires_grad_(False),
    "mode": lambda m: m[1].eval(),
    "forward hook": lambda m: m[0].register_forward_hook(print),
    "forward hook with keywords": lambda m: m._forward_hooks_with_kwargs.update({0: True}),
    "forward hook that is always called": lambda m: m._forward_hooks_always_called.update(
        {0: True}
    ),
    "forward pre-hook": lambda m: m[0].register_forward_pre_hook(print),
    "forward pre-hook with keywords": lambda m: m._forward_pre_hooks_with_kwargs.update({0: True}),
    "backward hook": lambda m: m[0].register_full_backward_hook(print),
    "backward pre-hook": lambda m: m[0].register_full_backward_pre_hook(print),
    "kind of backward hooks": set_to("0._is_full_backward_hook", True),
    "state dict hook": lambda m: m[0].register_state_dict_post_hook(lambda *args: None),
    "state dict pre-hook": lambda m: m[0].register_state_dict_pre_hook(print),
    "loading hook": lambda m: m[0].register_load_state_dict_post_hook(print),
    "loading pre-hook": lambda m: m[0].register_load_state_dict_pre_hook(print),
    "hooks removed": lambda m: m._forward_hooks.clear(),
    "hooks in another dictionary": copy_hooks,
    "tensor hook": lambda m: m[0].weight.register_hook(print),
    "accumulation hook": lambda m: m[0].weight.register_post_accumulate_grad_hook(print),
    "attribute of a parameter": set_to("cell.note", "b"),
    "parametrization": lambda m: parametrize.register_parametrization(
        m[0], "weight", nn.Identity()
    ),
    "parametrization removed": lambda m: parametrize.remove_parametrizations(m[3], "weight"),
    "class": set_to("0.__class__", nn.Bilinear),
    "attribute added": set_to("extra", 1),
    "attribute": set_to("number", 2.5),
    "attribute removed": lambda m: delattr(m, "number"),
    "method of the instance": set_to("0.forward", print),
    "tensor in an attribute": lambda m: m.kept.add_(1),
    "another tensor in an attribute": set_to("kept", torch.zeros(2)),
    "torch's generator": lambda m: torch.rand(1, generator=m.generators[0]),
    "NumPy's generator": lambda m: m.generators[1].random(),
    "Python's generator": lambda m: m.generators[2].random(),
    "list": lambda m: m.history.append(1),
    "inner list": lambda m: m.history[0].clear(),
    "inner mapping": lambda m: m.history[1].update(a=2.5),
    "tensor in a list": lambda m: m.history[0][0].add_(1),
    "mapping": lambda m: m.options.pop("a"),
    "object": lambda m: setattr(m.options["b"], "value", 2),
    "recurrent weights": lambda m: m[2]._flat_weights.reverse(),
    "new buffer": lambda m: m.register_buffer("extra", torch.zeros(1)),
    "new module": lambda m: m.append(nn.Tanh()),
    "replaced module": lambda m: m.__setitem__(1, nn.BatchNorm1d(2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_check_finds_a_changed_model(change):
    model = busy_net()
    with pytest.raises(AssertionError, match="changed by the call"), untouched(model):
        CHANGES[change](model)


def test_the_check_lets_pass_hooks_that_came_and_went():
    model = busy_net()
    with untouched(model):
        reorder_hooks(model)


@contextlib.contextmanager
def setting(function, value, before):
    function(value)
    try:
        yield
    finally:
        function(before)


@contextlib.contextmanager
def replaced(owner, name, value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value)
        yield


@contextlib.contextmanager
def warnings_ignored():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def drawn(draw):
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    draw()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])


@contextlib.contextmanager
def hooked():
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: None)
    try:
        yield
    finally:
        handle.remove()


class Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


b = torch.backends
GLOBAL_CHANGES = {
    "Python's random state": lambda: drawn(random.random),
    "NumPy's random state": lambda: drawn(np.random.rand),
    "torch's random state": lambda: drawn(lambda: torch.rand(1)),
    "grad mode": torch.no_grad,
    "inference mode": torch.inference_mode,
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "autocast": lambda: torch.autocast("cpu"),
    "default dtype": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "default device": lambda: torch.device("meta"),
    "function mode": Mode,
    "deterministic algorithms": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "saved tensor hooks": lambda: torch.autograd.graph.disable_saved_tensors_hooks("no"),
    "cuDNN": lambda: b.cudnn.flags(enabled=False),
    "cuDNN's choice": lambda: b.cudnn.flags(enabled=b.cudnn.enabled, benchmark=True),
    "oneDNN": lambda: replaced(b.mkldnn, "enabled", False),
    "attention": lambda: sdpa_kernel([SDPBackend.MATH]),
    "fast path": lambda: setting(b.mha.set_fastpath_enabled, False, True),
    "matmul": lambda: setting(torch.set_float32_matmul_precision, "high", "highest"),
    "threads": lambda: setting(torch.set_num_threads, 2, 1),
    "stance of torch.compile": lambda: torch.compiler.set_stance("force_eager"),
    "warnings": warnings_ignored,
    "NumPy's errors": lambda: np.errstate(all="ignore"),
    "global hook": hooked,
    "weight norm": lambda: replaced(torch, "_weight_norm", print),
    "checkpoint's warning": lambda: replaced(
        torch.utils.checkpoint, "check_backward_validity", print
    ),
    "method of a class": lambda: replaced(nn.Linear, "forward", print),
}


@pytest.mark.parametrize("change", GLOBAL_CHANGES)
def test_the_check_finds_a_changed_process(change):
    model = busy_net()
    torch.compiler.set_stance("default")
    with contextlib.ExitStack() as stack:
        before = Snapshot(model)
        stack.enter_context(GLOBAL_CHANGES[change]())
        changed = before.differences(Snapshot(model))
    assert changed
    assert not before.differences(Snapshot(model))


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

    model = busy_net()
    with pytest.raises(AssertionError, match="training"), untouched(model):
        block()


def test_the_check_lets_pass_what_changes_nothing():
    model = hooked_net()
    with untouched(model, X, DataLoader(TensorDataset(X, Y))):
        model[3](torch.zeros(1, 6))
        model.state_dict()
    with pytest.raises(TroubleError), untouched(model):
        raise TroubleError
