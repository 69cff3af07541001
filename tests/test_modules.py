"""Modules as people have them: wrapped, lazy, quantized, stateful, and writing where they should
not."""

from __future__ import annotations

import collections
import contextlib
import copy
import types
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize
from torch.testing._internal.distributed.fake_pg import FakeStore

import flatminima as fm
from flatminima.objective.modules import unwrap
from integrity import untouched


def seeded(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


X, Y = seeded(9, 3), seeded(9, 2, seed=1)
LABELS = torch.arange(9) % 2


def net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2)
    )
    with torch.no_grad():
        model[1].running_mean.copy_(torch.tensor([0.3, -0.2, 0.5, 0.1]))
        model[1].running_var.copy_(torch.tensor([0.5, 2.0, 1.5, 0.8]))
    return model.double().eval()


# -------------------------------------------------------------------------------------- wrappers


@contextlib.contextmanager
def processes(count):
    """A group in which nobody else is there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


def data_parallel(model):
    return nn.DataParallel(model)


def distributed(model):
    with processes(1):
        return DistributedDataParallel(model)


WRAPPERS = {
    "compile": compiled,
    "DataParallel": data_parallel,
    "DDP": distributed,
    "compile of DDP": lambda m: compiled(distributed(m)),
    "DDP of compile": lambda m: distributed(compiled(m)),
    "DataParallel of compile": lambda m: data_parallel(compiled(m)),
    "compile of DataParallel of compile": lambda m: compiled(data_parallel(compiled(m))),
}
every_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)


@every_wrapper
def test_wrapped_models_are_measured_without_their_wrapper(wrapper):
    model = net()
    plain = fm.Objective(model, nn.MSELoss(), (X, Y), batch_size=4)
    wrapped = WRAPPERS[wrapper](model)
    objective = fm.Objective(wrapped, nn.MSELoss(), (X, Y), batch_size=4)
    assert objective.model is model is unwrap(wrapped)
    assert objective.layout.names == tuple(n for n, _ in model.named_parameters())
    assert objective.loss() == plain.loss()
    assert torch.equal(objective.gradient(), plain.gradient())
    v = seeded(objective.size)
    assert torch.equal(fm.HessianOperator(objective) @ v, fm.HessianOperator(plain) @ v)


@every_wrapper
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_wrapped_models_are_left_as_they_were(wrapper, mode):
    wrapped = WRAPPERS[wrapper](net())
    with untouched(wrapped, X, Y):
        objective = fm.Objective(wrapped, nn.MSELoss(), (X, Y), mode=mode, batch_size=3)
        objective.loss()
        objective.gradient()
        fm.HessianOperator(objective) @ seeded(objective.size)


@every_wrapper
def test_patterns_speak_of_names_without_prefixes(wrapper):
    wrapped = WRAPPERS[wrapper](net())
    objective = fm.Objective(wrapped, nn.MSELoss(), (X, Y), params=["0.*", "4.bias"])
    assert objective.layout.names == ("0.weight", "0.bias", "4.bias")
    seen = []
    fm.Objective(
        wrapped, nn.MSELoss(), (X, Y), params=lambda name, p: seen.append(name) or "4" in name
    )
    assert seen == [n for n, _ in net().named_parameters()]
    with pytest.raises(fm.ParameterSelectionError, match=r"Did you mean '4\.weight'"):
        fm.Objective(wrapped, nn.MSELoss(), (X, Y), params="4.wieght")


def perturbed(model):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for index, tensor in enumerate([*twin.parameters(), twin[1].running_mean]):
            tensor += 0.1 * seeded(*tensor.shape, seed=index)
    return twin


@every_wrapper
def test_endpoints_of_an_interpolation_may_be_wrapped(wrapper):
    start, end = net(), perturbed(net())
    objective = fm.Objective(net(), nn.MSELoss(), (X, Y))
    plain = fm.interpolate(objective, start, end, alphas=[0, 0.4, 1])
    assert plain.loss[0] != plain.loss[2]
    wrap = WRAPPERS[wrapper]
    assert fm.interpolate(objective, wrap(start), wrap(end), alphas=[0, 0.4, 1]) == plain
    wrapped = fm.Objective(wrap(net()), nn.MSELoss(), (X, Y))
    assert fm.interpolate(wrapped, start, end, alphas=[0, 0.4, 1]) == plain
    states = (wrap(start).state_dict(), wrap(end).state_dict())
    assert all(name.startswith(("_orig_mod.", "module.")) for name in states[0])
    assert fm.interpolate(objective, *states, alphas=[0, 0.4, 1]) == plain
    assert fm.interpolate(objective, start, states[1], alphas=[0, 0.4, 1]) == plain


def test_a_state_dict_that_was_saved_and_loaded(tmp_path):
    torch.save(compiled(data_parallel(perturbed(net()))).state_dict(), tmp_path / "state.pt")
    objective = fm.Objective(net(), nn.MSELoss(), (X, Y))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    curve = fm.interpolate(objective, net(), state, alphas=[0, 1])
    assert curve == fm.interpolate(objective, net(), perturbed(net()), alphas=[0, 1])


class CalledModule(nn.Module):
    """Its own names begin like a wrapper's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.module = nn.Linear(3, 2)
        self.double()

    def forward(self, x):
        return self.module(x)


def test_a_submodule_called_module_is_no_wrapper():
    model, other = CalledModule(), CalledModule()
    nn.init.ones_(other.module.weight)
    objective = fm.Objective(model, nn.MSELoss(), (X, Y))
    assert objective.model is model
    assert objective.layout.names == ("module.weight", "module.bias")
    plain = fm.interpolate(objective, model, other, alphas=[0, 1])
    for wrap in (lambda m: m, data_parallel, compiled):
        states = (wrap(model).state_dict(), wrap(other).state_dict())
        assert fm.interpolate(objective, *states, alphas=[0, 1]) == plain


@pytest.mark.parametrize("number", [2, 8])
def test_several_processes_are_told(number):
    with processes(number):
        wrapped = DistributedDataParallel(net())
        with pytest.warns(fm.FlatMinimaWarning, match=f"shared by {number} processes") as caught:
            fm.Objective(wrapped, nn.MSELoss(), (X, Y))
    # It points at the line that made the objective.
    assert [w.filename for w in caught] == [__file__]


def test_one_process_is_no_matter():
    with processes(1):
        assert fm.Objective(DistributedDataParallel(net()), nn.MSELoss(), (X, Y)).loss() > 0


def test_a_compiled_part_of_a_model_has_exact_products():
    model = net()
    plain = fm.HessianOperator(fm.Objective(net(), nn.MSELoss(), (X, Y)))
    model[0] = torch.compile(model[0], backend="eager")
    operator = fm.HessianOperator(fm.Objective(model, nn.MSELoss(), (X, Y)))
    v = seeded(operator.shape[0])
    torch.testing.assert_close(operator @ v, plain @ v)


# -------------------------------------------------------------------------------------- refusals


def test_lazy_modules_are_refused_until_they_have_seen_a_batch():
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(2))
    data = X.float(), Y.float()
    with pytest.raises(fm.ParameterSelectionError, match=r"'0\.weight' is not initialised yet"):
        fm.Objective(model, nn.MSELoss(), data)
    model(data[0])
    objective = fm.Objective(model, nn.MSELoss(), data)
    expected = F.mse_loss(model.eval()(data[0]), data[1]).item()
    assert objective.loss() == pytest.approx(expected, rel=1e-6)


def test_a_lazy_buffer_alone_is_refused_too():
    model = nn.Sequential(nn.Linear(3, 4), nn.LazyBatchNorm1d(affine=False), nn.Linear(4, 2))
    with pytest.raises(fm.ParameterSelectionError, match=r"'1\.running_mean' is not initialised"):
        fm.Objective(model, nn.MSELoss(), (X.float(), Y.float()))


def test_a_frozen_part_on_another_device_is_refused_by_name():
    model = net()
    model[4] = nn.Linear(4, 2, device="meta").requires_grad_(False)
    with pytest.raises(fm.DeviceError, match=r"'4\.weight' is on the meta device"):
        fm.Objective(model, nn.MSELoss(), (X, Y))


def test_a_model_that_is_all_meta_is_refused_with_a_way_out():
    with pytest.raises(fm.DeviceError, match="holds no numbers; load the weights first"):
        fm.Objective(net().to("meta"), nn.MSELoss(), (X, Y))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
def test_quantized_modules_are_refused():
    from torch.ao.nn.quantized import dynamic

    model = nn.Sequential(nn.Linear(3, 4), dynamic.Linear(4, 2))
    with pytest.raises(fm.ParameterSelectionError, match=r"module '1' \(Linear\) is quantized"):
        fm.Objective(model, nn.MSELoss(), (X.float(), Y.float()))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_quantized_buffer_is_refused():
    model = net()
    model.register_buffer("table", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
    with pytest.raises(fm.ParameterSelectionError, match=r"'table' .*quantized"):
        fm.Objective(model, nn.MSELoss(), (X, Y))


class IntegerTensor(torch.Tensor):
    """As torchao makes them."""

    __module__ = "torchao.dtypes"


def test_weights_of_torchao_are_refused():
    model = net()
    model[4].weight = nn.Parameter(model[4].weight.detach().as_subclass(IntegerTensor))
    with pytest.raises(fm.ParameterSelectionError, match=r"'4\.weight' \(IntegerTensor\)"):
        fm.Objective(model, nn.MSELoss(), (X, Y))


def test_sharded_models_are_refused():
    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    for model, where in (
        (FullyShardedDataParallel(net()), "The model"),
        (nn.Sequential(FullyShardedDataParallel(net())), "The module '0'"),
    ):
        with pytest.raises(fm.ParameterSelectionError, match=f"{where} .*sharded among processes"):
            fm.Objective(model, nn.MSELoss(), (X, Y))


def test_sharded_tensors_are_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = nn.Linear(4, 2)
    with processes(2):
        mesh = init_device_mesh("cpu", (2,))
        sharded = distribute_tensor(model.weight.detach(), mesh, [Shard(0)])
        model.weight = nn.Parameter(sharded)
        with pytest.raises(fm.ParameterSelectionError, match=r"'weight' \(DTensor\) is sharded"):
            fm.Objective(model, nn.MSELoss(), (seeded(3, 4).float(), seeded(3, 2).float()))


# --------------------------------------------------------------------------------- inference mode


def numbers(objective):
    """What first, no and second derivatives give."""
    v = seeded(objective.size, seed=3)
    value, gradient = objective.value_and_gradient(0.1 * v)
    product = fm.HessianOperator(objective) @ v
    return objective.loss(), objective.loss_at(0.1 * v), value, gradient, product


def assert_same_numbers(first, second):
    for one, other in zip(numbers(first), numbers(second), strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)
            assert not one.is_inference()
        else:
            assert one == other


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("params", [None, "4.*"])
def test_a_model_made_under_inference_mode(params, mode):
    with torch.inference_mode():
        model = net()
    options = {"params": params, "mode": mode, "batch_size": 3}
    assert model[0].weight.is_inference()
    with untouched(model):
        assert_same_numbers(
            fm.Objective(model, nn.MSELoss(), (X, Y), **options),
            fm.Objective(net(), nn.MSELoss(), (X, Y), **options),
        )


def test_batches_made_under_inference_mode():
    with torch.inference_mode():
        batches = [(X[:4].clone(), Y[:4].clone()), (X[4:].clone(), Y[4:].clone())]
    for cache in (True, False):
        assert_same_numbers(
            fm.Objective(net(), nn.MSELoss(), batches, cache=cache),
            fm.Objective(net(), nn.MSELoss(), [(X[:4], Y[:4]), (X[4:], Y[4:])]),
        )


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_measuring_works_under_every_mode_of_autograd(context):
    expected = numbers(fm.Objective(net(), nn.MSELoss(), (X, Y)))
    with context():
        found = numbers(fm.Objective(net(), nn.MSELoss(), (X, Y)))
        operator = fm.HessianOperator(fm.Objective(net(), nn.MSELoss(), (X, Y)))
        assert fm.lanczos(operator).converged
        assert fm.layerwise(operator.objective, trace_products=2).layers
        assert fm.epsilon_sharpness(operator.objective, subspace=2).value > 0
    assert all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(found, expected, strict=True)
    )
    assert not any(t.is_inference() for t in found if isinstance(t, torch.Tensor))


def test_constants_made_under_inference_mode_are_explained():
    with torch.inference_mode():
        scale = torch.ones(2).double()
    loss = lambda output, target: (output * scale).square().mean()  # noqa: E731
    objective = fm.Objective(net(), loss, (X, Y))
    with pytest.raises(fm.GraphError, match=r"under torch\.inference_mode") as caught:
        objective.gradient()
    assert isinstance(caught.value.__cause__, RuntimeError)


# --------------------------------------------------------------- what a forward leaves behind


class Recurrent(nn.Module):
    """Goes on from the state of the batch before, as streaming models do."""

    def __init__(self, detach):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)
        self.state, self.detach = None, detach
        self.double()

    def forward(self, x):
        output, state = self.body(x, self.state)
        self.state = state.detach() if self.detach else state
        return self.head(output[:, -1])


SERIES, AIMS = seeded(8, 5, 3), seeded(8, 2, seed=1)


@pytest.mark.parametrize("detach", [True, False], ids=["detached", "graph"])
@pytest.mark.parametrize("cache", [True, False])
def test_every_batch_sees_the_state_that_the_model_has(cache, detach):
    """And not that of the batch before, which makes the value depend on the order."""
    model = Recurrent(detach)
    for state in (None, seeded(1, 4, 4, seed=2)):
        model.state = state
        data = [(SERIES[:4], AIMS[:4]), (SERIES[4:], AIMS[4:])]
        objective = fm.Objective(model, nn.MSELoss(), data, cache=cache)
        parameters = list(model.parameters())
        terms = []
        for x, y in data:
            terms.append(F.mse_loss(model.head(model.body(x, state)[0][:, -1]), y))
        loss = torch.stack(terms).mean()
        expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)])
        with untouched(model):
            for _ in range(2):
                assert objective.loss() == pytest.approx(loss.item(), rel=1e-12)
                torch.testing.assert_close(objective.gradient(), expected)
            product = fm.HessianOperator(objective) @ expected
        assert model.state is state
        twin = fm.HessianOperator(objective, method="finite_differences") @ expected
        torch.testing.assert_close(product, twin, rtol=1e-7, atol=1e-9)


class Caching(nn.Linear):
    """Keeps what it makes of its weights, under names new and old."""

    def forward(self, x):
        if getattr(self, "normed", None) is None:
            self.normed = self.weight / self.weight.norm()
            self.calls = self.calls + 1
        self.note = f"seen {len(x)} examples"
        return F.linear(x, self.normed, self.bias)


@pytest.mark.parametrize("kept", ["absent", "None"])
def test_attributes_bound_by_the_forward_are_unbound_after_each_batch(kept):
    torch.manual_seed(0)
    model = Caching(3, 2).double()
    model.calls = 5
    if kept == "None":
        model.normed = None
    objective = fm.Objective(model, nn.MSELoss(), (X, Y), batch_size=4)
    names = list(vars(model))
    weight = model.weight.detach()
    expected = F.mse_loss(F.linear(X, weight / weight.norm(), model.bias), Y).item()
    shift = seeded(objective.size)
    place = shift[:6].view(2, 3) + weight
    displaced = F.mse_loss(F.linear(X, place / place.norm(), model.bias + shift[6:]), Y).item()
    for _ in range(2):
        assert objective.loss() == pytest.approx(expected, rel=1e-12)
        assert objective.loss_at(shift) == pytest.approx(displaced, rel=1e-12)
        objective.gradient()
        fm.HessianOperator(objective) @ shift
    assert list(vars(model)) == names
    assert model.calls == 5


class Ending(nn.Module):
    """Takes apart what it is made of."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.how = nn.Linear(3, 4), nn.Linear(4, 2), how
        self.register_buffer("scale", torch.ones(1))
        self.double()

    def forward(self, x):
        output = self.head(self.body(x).tanh()) * self.scale
        if self.how == "delete":
            del self.scale
        elif self.how == "module":
            self.head = nn.Linear(4, 2)
        elif self.how == "parameter":
            self.body.weight = nn.Parameter(torch.zeros(4, 3).double())
        elif self.how == "buffer":
            self.register_buffer("more", output.detach())
        elif self.how == "train":
            self.train()
        elif self.how == "mapping":
            self.extra = {"output": output}
        return output


@pytest.mark.parametrize("how", ["delete", "module", "parameter", "buffer", "train", "mapping"])
def test_a_forward_that_takes_its_model_apart_finds_it_whole_again(how):
    model = Ending(how)
    plain = fm.Objective(Ending("no"), nn.MSELoss(), (X, Y), batch_size=4)
    objective = fm.Objective(model, nn.MSELoss(), (X, Y), batch_size=4)
    with untouched(model):
        assert_same_numbers(objective, plain)


class Banking(nn.Module):
    """Keeps its outputs in a container that it writes to."""

    def __init__(self, kind, detach):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.bank, self.detach = nn.Linear(3, 2), kind(), detach
        self.double()

    def forward(self, x):
        output = self.layer(x)
        kept = list(self.bank.values() if isinstance(self.bank, dict) else self.bank)
        total = output + sum(k.mean() for k in kept)
        output = output.detach() if self.detach else output
        if isinstance(self.bank, dict):
            self.bank[len(self.bank)] = output
        else:
            self.bank.append(output)
        return total


@pytest.mark.parametrize("kind", [list, dict, collections.deque])
@pytest.mark.parametrize("call", ["gradient", "product", "differences"])
def test_a_module_that_keeps_tensors_with_their_graph_is_right_or_refused(call, kind):
    model = Banking(kind, detach=False)
    objective = fm.Objective(model, nn.MSELoss(), (X, Y), batch_size=4)
    single = fm.Objective(nn.Linear(3, 2).double(), nn.MSELoss(), (X, Y))
    single.model.load_state_dict(model.layer.state_dict(prefix=""))
    v = seeded(objective.size)
    calls = {
        "gradient": lambda o: o.gradient(),
        "product": lambda o: fm.HessianOperator(o) @ v,
        "differences": lambda o: fm.HessianOperator(o, method="finite_differences") @ v,
    }
    try:
        found = calls[call](objective)
    except fm.GraphError as error:
        refusal = error
    else:
        torch.testing.assert_close(found, calls[call](single), rtol=1e-6, atol=1e-8)
        return
    assert "batch 1 depends on a graph that no longer exists" in str(refusal)
    assert "Keep them detached" in str(refusal)
    assert isinstance(refusal.__cause__, RuntimeError)


MEMORY = []


class Remembering(nn.Linear):
    """Its memory is nobody's attribute."""

    def forward(self, x):
        output = super().forward(x)
        MEMORY.append(output)
        return output + sum(m.mean() for m in MEMORY)


def test_a_graph_kept_outside_of_the_model_is_refused():
    MEMORY.clear()
    objective = fm.Objective(Remembering(3, 2).double(), nn.MSELoss(), (X, Y), batch_size=4)
    with pytest.raises(fm.GraphError, match="batch 1 depends on a graph") as caught:
        objective.gradient()
    assert "second time" in str(caught.value.__cause__)
    MEMORY.clear()


@pytest.mark.parametrize("kind", [list, dict, collections.deque])
def test_containers_that_a_forward_writes_to_do_not_change_the_value(kind):
    """Each evaluation would see one more entry: no function of θ at all."""
    model = Banking(kind, detach=True)
    objective = fm.Objective(model, nn.MSELoss(), (X, Y), batch_size=4)
    try:
        first = objective.loss()
        second = objective.loss()
    except fm.FlatMinimaError:
        return
    assert first == second
    assert not model.bank


class Config:
    """An object of the user's own."""

    def __init__(self):
        self.count = 0


class Counting(nn.Module):
    """Scales its output by how often it was called, as noted in `where`."""

    def __init__(self, where):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.where = nn.Linear(3, 2), where
        self.number, self.config, self.array = 0, Config(), np.zeros(1)
        self.nested, self.set = {"deep": [[], 0]}, {0}
        self.generator, self.rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
        self.double()

    def forward(self, x):
        if self.where == "number":
            self.number += 1
            factor = self.number
        elif self.where == "config":
            self.config.count += 1
            factor = self.config.count
        elif self.where == "array":
            self.array += 1
            factor = float(self.array[0])
        elif self.where == "nested":
            self.nested["deep"][0].append(1)
            factor = len(self.nested["deep"][0])
        elif self.where == "set":
            self.set.add(len(self.set))
            factor = len(self.set)
        elif self.where == "generator":
            factor = 1 + torch.rand((), generator=self.generator).item()
        else:
            factor = 1 + self.rng.random()
        return self.layer(x) * factor


@pytest.mark.parametrize(
    "where", ["number", "config", "array", "nested", "set", "generator", "rng"]
)
def test_what_a_forward_counts_starts_anew_in_each_batch(where):
    model = Counting(where)
    objective = fm.Objective(model, nn.MSELoss(), (X, Y), batch_size=3)
    terms = []
    for x, y in zip(X.split(3), Y.split(3), strict=True):
        terms.append(F.mse_loss(copy.deepcopy(model)(x), y).item())
    with untouched(model):
        values = [objective.loss(), objective.value_and_gradient()[0], objective.loss()]
    assert values == pytest.approx([sum(terms) / 3] * 3, rel=1e-12)


class Plain(nn.Module):
    """A running mean that is no buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.mean = nn.Linear(3, 2), torch.zeros(2).double()
        self.double()

    def forward(self, x):
        output = self.layer(x)
        self.mean.mul_(0.9).add_(output.detach().mean(0))
        return output - self.mean


def test_plain_tensors_that_a_forward_writes_to_do_not_change_the_value():
    model = Plain()
    objective = fm.Objective(model, nn.MSELoss(), (X, Y), batch_size=3)
    terms = []
    for x, y in zip(X.split(3), Y.split(3), strict=True):
        terms.append(F.mse_loss(copy.deepcopy(model)(x), y).item())
    with untouched(model):
        values = [objective.loss(), objective.value_and_gradient()[0], objective.loss()]
    assert values == pytest.approx([sum(terms) / 3] * 3, rel=1e-12)


def test_cached_parametrizations_do_not_keep_the_parameters_from_moving():
    """Within `parametrize.cached()` a weight is made once, and would stay at θ."""
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3)), nn.Linear(3, 2)).double()
    objective = fm.Objective(model, nn.MSELoss(), (X, Y))
    shift = 0.1 * seeded(objective.size)
    expected = objective.loss(), objective.loss_at(shift), objective.gradient()
    with parametrize.cached():
        model(X)
        found = objective.loss(), objective.loss_at(shift), objective.gradient()
    assert found[:2] == expected[:2]
    assert torch.equal(found[2], expected[2])


# ----------------------------------------------------------------------------- writes in place


class Writing(nn.Module):
    def __init__(self, what=None, how="plain"):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("scale", torch.full((4,), 0.8))
        self.what, self.how = what, how
        self.double()

    def halve(self, tensor):
        if self.how == "data":
            tensor.data.mul_(0.5)
        else:
            with torch.no_grad():
                tensor.mul_(0.5)

    def forward(self, x):
        if self.what == "input":
            self.halve(x)
        elif self.what == "buffer":
            self.halve(self.scale)
        elif self.what == "frozen":
            self.halve(self.frozen.weight)
        elif self.what == "selected":
            self.halve(self.head.weight)
        return self.head(self.frozen(self.body(x).tanh() * self.scale))


def halved(what):
    """The model and data that the writing one must amount to, at every batch anew."""
    model, x = Writing(), X.clone()
    tensor = {
        "input": x,
        "buffer": model.scale,
        "frozen": model.frozen.weight,
        "selected": model.head.weight,
    }[what]
    with torch.no_grad():
        tensor.mul_(0.5)
    return model, x


@pytest.mark.parametrize("how", ["plain", "data"])
@pytest.mark.parametrize("what", ["input", "buffer", "frozen", "selected"])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("start", ["loss", "gradient", "product", "state"])
def test_every_batch_and_every_evaluation_sees_what_was_there_before(start, cache, what, how):
    model, batches = (
        Writing(what, how),
        [(x.clone(), y) for x, y in zip(X.split(3), Y.split(3), strict=True)],
    )
    objective = fm.Objective(model, nn.MSELoss(), batches, cache=cache)
    twin, x = halved(what)
    loss = F.mse_loss(twin(x), Y).item()
    calls = {
        "loss": objective.loss,
        "gradient": lambda: objective.value_and_gradient()[0],
        "product": lambda: objective.sum_over_batches(
            lambda seen, leaves: [None] * len(leaves), derivatives=2
        )[0],
        "state": lambda: objective.evaluate_state({})[0],
    }
    with untouched(model, batches):
        values = [calls[name]() for name in (start, *calls)]
    assert values == pytest.approx([loss] * 5, rel=1e-12)


@pytest.mark.parametrize("how", ["plain", "data"])
@pytest.mark.parametrize("what", ["input", "buffer", "frozen"])
def test_derivatives_of_a_writing_model(what, how):
    model = Writing(what, how)
    objective = fm.Objective(model, nn.MSELoss(), (X, Y), batch_size=4)
    twin, x = halved(what)
    other = fm.Objective(twin, nn.MSELoss(), (x, Y))
    torch.testing.assert_close(objective.gradient(), other.gradient())
    v = seeded(objective.size)
    torch.testing.assert_close(
        fm.HessianOperator(objective) @ v, fm.HessianOperator(other) @ v, rtol=1e-9, atol=1e-11
    )


class Centring(nn.Module):
    """A buffer that follows the activations, and is used, with its graph or without."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.how = nn.Linear(3, 4), nn.Linear(4, 2), how
        self.register_buffer("centre", torch.zeros(4))
        self.double()

    def forward(self, x):
        hidden = self.body(x).tanh()
        mean = hidden.mean(0) if self.how == "graph" else hidden.detach().mean(0)
        if self.how == "in place":
            self.centre.mul_(0.9).add_(mean)
        else:
            self.centre = 0.9 * self.centre + mean
        return self.head(hidden - self.centre)


@pytest.mark.parametrize("how", ["in place", "bound", "graph"])
def test_buffers_that_follow_the_activations_start_anew_in_each_batch(how):
    model = Centring(how)
    objective = fm.Objective(model, nn.MSELoss(), (X, Y), batch_size=3)
    terms = []
    for x, y in zip(X.split(3), Y.split(3), strict=True):
        twin = copy.deepcopy(model)
        terms.append(F.mse_loss(twin(x), y).item())
    with untouched(model):
        for _ in range(2):
            assert objective.loss() == pytest.approx(sum(terms) / 3, rel=1e-12)
            assert objective.value_and_gradient()[0] == pytest.approx(sum(terms) / 3, rel=1e-12)


# ------------------------------------------------------------------------------------ fast paths


def encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Padded(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.body, self.head = encoder(**options), nn.Linear(4, 2)

    def forward(self, inputs):
        x, padding = inputs
        return self.head(self.body(x, src_key_padding_mask=padding)).mean(1)


PADDING = torch.arange(5) >= torch.tensor([5, 3, 1, 4, 2, 5])[:, None]
TOKENS = seeded(6, 5, 4)


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_and_gradients_of_a_padded_encoder_speak_of_one_function(dtype, options):
    """Its fast path, taken without gradients alone, pads in another way."""
    model = Padded(**options).to(dtype)
    data = [((TOKENS.to(dtype), PADDING), AIMS[:6].to(dtype))]
    objective = fm.Objective(model, nn.MSELoss(), data)
    values = [
        objective.value_and_gradient()[0],
        objective.loss(),
        objective.loss_at(torch.zeros(objective.size)),
        objective.evaluate_state({})[0],
        objective.sum_over_batches(lambda seen, leaves: [None] * len(leaves), derivatives=2)[0],
    ]
    with torch.no_grad():
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            plain = F.mse_loss(model.eval()(data[0][0]), data[0][1]).item()
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert values == pytest.approx([plain] * 5, rel=20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_fast_path_is_as_the_user_has_it_afterwards(enabled):
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        objective = fm.Objective(net(), nn.MSELoss(), (X, Y))
        numbers(objective)
        assert torch.backends.mha.get_fastpath_enabled() == enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# ---------------------------------------------------------------------------------- odd modules


def test_a_model_of_frozen_parameters_alone_needs_names():
    model = net().requires_grad_(False)
    with pytest.raises(fm.ParameterSelectionError, match='params="\\*"'):
        fm.Objective(model, nn.MSELoss(), (X, Y))
    objective = fm.Objective(model, nn.MSELoss(), (X, Y), params="*")
    assert_same_numbers(objective, fm.Objective(net(), nn.MSELoss(), (X, Y)))
    assert not any(p.requires_grad for p in model.parameters())


def test_hooks_of_the_user_act_and_stay():
    model = net()
    seen = []
    handles = [
        model[0].register_forward_hook(lambda m, a, out: out * 2),
        model.register_forward_pre_hook(lambda m, a: seen.append(len(a[0]))),
    ]
    objective = fm.Objective(model, nn.MSELoss(), (X, Y), batch_size=4)
    with torch.no_grad():
        expected = F.mse_loss(model(X), Y).item()
    seen.clear()
    with untouched(model):
        assert objective.loss() == pytest.approx(expected, rel=1e-12)
        fm.HessianOperator(objective) @ seeded(objective.size)
    assert seen == [4, 4, 1] * 2
    for handle in handles:
        handle.remove()


def test_a_module_used_twice_counts_once():
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(3, 2)).double()
    objective = fm.Objective(model, nn.MSELoss(), (X, Y))
    assert objective.layout.names == ("0.weight", "0.bias", "4.weight", "4.bias")
    operator = fm.HessianOperator(objective)
    differences = fm.HessianOperator(objective, method="finite_differences")
    v = seeded(objective.size)
    torch.testing.assert_close(operator @ v, differences @ v, rtol=1e-7, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_modules_have_exact_products():
    model = net()
    scripted = torch.jit.script(copy.deepcopy(model))
    plain, other = (
        fm.HessianOperator(fm.Objective(m, nn.MSELoss(), (X, Y))) for m in (model, scripted)
    )
    v = seeded(plain.shape[0])
    torch.testing.assert_close(other @ v, plain @ v)


def test_nothing_is_said_of_a_plain_model():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        numbers(fm.Objective(net(), nn.MSELoss(), (X, Y)))


# --------------------------------------------------------------- what attributes lead to


class Keeping(nn.Module):
    """Adds to what it keeps in `place` at each forward, and to its output what it finds there."""

    def __init__(self, place):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.place = nn.Linear(3, 2), place
        self.tensors = [torch.zeros(2).double()]
        self.pair = ([], torch.zeros(2).double())
        self.state = types.SimpleNamespace(
            memory=torch.zeros(2).double(), inner=types.SimpleNamespace(number=0), seen=[]
        )
        self.double()

    def forward(self, x):
        output = self.layer(x)
        if self.place == "tensor in a list":
            memory = self.tensors[0].add_(1)
        elif self.place == "list in a tuple":
            self.pair[0].append(1)
            memory = len(self.pair[0])
        elif self.place == "tensor on an object":
            memory = self.state.memory.add_(1)
        elif self.place == "object on an object":
            self.state.inner.number += 1
            memory = self.state.inner.number
        else:
            self.state.seen.append(output)
            memory = sum(self.state.seen)
        return output + memory


@pytest.mark.parametrize(
    "place",
    [
        "tensor in a list",
        "list in a tuple",
        "tensor on an object",
        "object on an object",
        "graph in a list on an object",
    ],
)
def test_what_attributes_lead_to_is_as_before_in_each_batch(place):
    model = Keeping(place)
    objective = fm.Objective(model, nn.MSELoss(), (X, Y), batch_size=4)
    with untouched(model.layer):
        values = [objective.loss(), objective.value_and_gradient()[0], objective.loss()]
    fm.HessianOperator(objective) @ seeded(objective.size)
    terms = [
        len(x) * F.mse_loss(Keeping(place)(x), y).item()
        for x, y in zip(X.split(4), Y.split(4), strict=True)
    ]
    assert values == pytest.approx([sum(terms) / len(X)] * 3, rel=1e-12)
    assert not model.tensors[0].any()
    assert not model.pair[0]
    assert not model.state.memory.any()
    assert (model.state.inner.number, model.state.seen) == (0, [])


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("place", ["buffer", "attribute", "batch"])
@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
def test_sparse_tensors_are_no_hindrance(place, layout):
    class Propagating(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 2)
            if place == "buffer":
                self.register_buffer("graph", torch.eye(len(X)).to_sparse(layout=layout))
            elif place == "attribute":
                self.graph = torch.eye(len(X)).double().to_sparse(layout=layout)
            self.double()

    def loss(model, batch):
        graph = batch[2] if place == "batch" else model.graph
        return F.mse_loss(graph @ model.layer(batch[0]), batch[1])

    batch = (X, Y, torch.eye(len(X)).double().to_sparse(layout=layout))
    model = Propagating()
    objective = fm.Objective(model, data=[batch], batch_loss=loss, weight=lambda b: len(b[0]))
    for _ in range(2):
        assert objective.loss() == pytest.approx(F.mse_loss(model.layer(X), Y).item(), rel=1e-12)
    plain = fm.HessianOperator(fm.Objective(model.layer, nn.MSELoss(), (X, Y)))
    v = seeded(8)
    torch.testing.assert_close(fm.HessianOperator(objective) @ v, plain @ v)


def test_structured_outputs_and_inputs_point_to_batch_loss():
    class Structured(nn.Linear):
        def forward(self, x):
            return {"scores": super().forward(x)}

    for data in [(X, Y)], [({"x": X}, Y)]:
        objective = fm.Objective(Structured(3, 2).double(), nn.MSELoss(), data)
        with pytest.raises(fm.ArgumentTypeError, match=r"is a dict; .*batch_loss="):
            objective.loss()
