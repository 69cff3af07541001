"""Rescaled networks: the same function, other weights, and a reason wherever that cannot be."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import flatminima as fm
from flatminima.landscape.symmetry.rescaling import rescale


def seeded(build) -> nn.Module:
    """A model in float64 whose parameters and buffers are none of them 0 or 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().double()
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.data.copy_(0.2 + torch.rand_like(tensor) * torch.randn_like(tensor).sign())
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.abs_()
    return model


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def output(model: nn.Module, x: torch.Tensor, training: bool) -> torch.Tensor:
    model = copy.deepcopy(model).train(training)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return model(x)


def bits(model: nn.Module) -> list[tuple[str, bytes]]:
    return [(n, t.numpy().tobytes()) for n, t in model.state_dict().items()]


class Forward(nn.Module):
    """Named layers and a forward that is given as a function."""

    def __init__(self, forward, **layers) -> None:
        super().__init__()
        self.rule = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.rule(self, x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


def mlp():
    return nn.Sequential(
        nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.Dropout(0.3), nn.ReLU(), nn.Linear(4, 2)
    )


def mlp_batch_norm():
    return nn.Sequential(
        *(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU()),
        *(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)),
    )


def conv_pool_flatten():
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 3, 3, padding=1), nn.ReLU(inplace=True), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2)),
    )


def grouped():
    return nn.Sequential(
        *(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU()),
        *(nn.Conv2d(6, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 1)),
    )


def transposed():
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ReLU()),
        *(nn.ConvTranspose2d(6, 3, 2), nn.ReLU(), nn.Conv2d(3, 2, 1)),
    )


def one_dimensional():
    return nn.Sequential(
        *(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.AdaptiveMaxPool1d(2)),
        *(nn.Flatten(), nn.Linear(8, 3), nn.BatchNorm1d(3), nn.LeakyReLU(), nn.Linear(3, 2)),
    )


def three_dimensional():
    return nn.Sequential(
        *(nn.Conv3d(1, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool3d(2), nn.Flatten()),
        nn.Linear(24, 2),
    )


def residual():
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), Block(), Block()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
    )


def leaky():
    return nn.Sequential(
        *(nn.Linear(3, 5), nn.LeakyReLU(0.2), nn.Linear(5, 4), nn.PReLU(4)),
        *(nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 2)),
    )


def layer_norms():
    return nn.Sequential(
        *(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 4), nn.RMSNorm(4)),
        *(nn.ReLU(), nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.ReLU(), nn.Linear(6, 2)),
    )


def image_norms():
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3)),
        *(nn.InstanceNorm2d(4, affine=True), nn.ReLU(), nn.Conv2d(4, 2, 1)),
    )


def functional():
    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = torch.relu(self.conv2(x)).contiguous()
        x = F.dropout(x.view(x.size(0), -1), 0.3, self.training)
        x = F.leaky_relu(self.fc1(x), 0.1)
        return self.fc3(self.fc2(x.reshape(x.shape[0], -1)).relu())

    layers = {"conv1": nn.Conv2d(2, 4, 3, padding=1), "conv2": nn.Conv2d(4, 3, 3)}
    return Forward(
        forward, **layers, fc1=nn.Linear(12, 5), fc2=nn.Linear(5, 4), fc3=nn.Linear(4, 2)
    )


def two_readers():
    def forward(self, x):
        x = F.relu(self.first(x))
        return self.left(x) * self.right(x.detach()).exp()

    return Forward(forward, first=nn.Linear(3, 5), left=nn.Linear(5, 2), right=nn.Linear(5, 2))


def pooled_by_mean():
    def forward(self, x):
        return self.head(F.relu(self.conv(x)).mean((-2, -1)))

    return Forward(forward, conv=nn.Conv2d(2, 4, 3), head=nn.Linear(4, 2))


def sequence():
    """Features last, behind a flatten that puts the features of a channel apart."""
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 2))


def normalised_inputs():
    return nn.Sequential(
        *(nn.BatchNorm2d(2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)),
        *(nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)),
    )


def normalised_sequences():
    return nn.Sequential(
        *(nn.InstanceNorm1d(2, affine=True), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten()),
        *(nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)),
    )


def summed_batch():
    def forward(self, x):
        return self.head(F.relu(self.conv(x)).sum(0).flatten())

    return Forward(forward, conv=nn.Conv2d(2, 4, 3), head=nn.Linear(144, 2))


IMAGE, ROW = (3, 2, 8, 8), (6, 3)
SAME = {
    mlp: (ROW, ["0", "2"]),
    mlp_batch_norm: (ROW, ["1", "4"]),
    conv_pool_flatten: (IMAGE, ["0", "3", "7"]),
    grouped: (IMAGE, ["0", "2", "4"]),
    transposed: (IMAGE, ["0", "2", "4"]),
    one_dimensional: ((3, 2, 7), ["1", "6"]),
    three_dimensional: ((2, 1, 4, 5, 4), ["0"]),
    residual: (IMAGE, ["3.bn1", "4.bn1"]),
    leaky: (ROW, ["0", "2", "4"]),
    layer_norms: (ROW, ["1", "4", "7"]),
    image_norms: (IMAGE, ["1", "4"]),
    functional: ((3, 2, 8, 8), ["conv1", "conv2", "fc1", "fc2"]),
    two_readers: (ROW, ["first"]),
    pooled_by_mean: (IMAGE, ["conv"]),
    sequence: ((3, 4, 3), ["0"]),
    normalised_inputs: (IMAGE, ["0", "5"]),
    normalised_sequences: ((5, 2, 6), ["4"]),
    summed_batch: (IMAGE, ["conv"]),
}
every_model = pytest.mark.parametrize("build", SAME, ids=lambda b: b.__name__)
either = pytest.mark.parametrize("per", ["layer", "neuron"])


@every_model
@either
@pytest.mark.parametrize("training", [False, True])
def test_function_stays_the_same(build, per, training):
    model, x = seeded(build), inputs(*SAME[build][0])
    scaled = rescale(model, per=per, factor=7.0, seed=3)
    before = output(model, x, training)
    assert before.abs().min() > 0
    torch.testing.assert_close(output(scaled, x, training), before, rtol=1e-10, atol=1e-12)


@every_model
@either
def test_every_layer_that_can_be_is_multiplied(build, per):
    """The bias says so, or the weight where there is none: no layer that reads changes it."""
    model = seeded(build)
    scaled = rescale(model, per=per, factor=7.0)
    multiplied = []
    for name, module in model.named_modules():
        other = scaled.get_submodule(name)
        if getattr(module, "bias", None) is not None:
            ratio = other.bias / module.bias
        elif isinstance(module, nn.RMSNorm):
            ratio = other.weight / module.weight
        else:
            continue
        if not torch.equal(ratio, torch.ones_like(ratio)):
            multiplied.append(name)
            expected = 7.0 if len(multiplied) % 2 else 1 / 7
            if per == "layer":
                torch.testing.assert_close(ratio, torch.full_like(ratio, expected))
            else:
                assert ratio.min() >= 1 / 7
                assert ratio.max() <= 7
                assert ratio.std() > 0.1
    assert multiplied == SAME[build][1]


def test_factors_alternate_from_layer_to_layer():
    model = seeded(mlp)
    scaled = rescale(model, factor=10.0)
    for name, weight, bias in (("0", 10, 10), ("2", 0.01, 0.1), ("5", 10, 1)):
        before, after = model.get_submodule(name), scaled.get_submodule(name)
        torch.testing.assert_close(after.weight, weight * before.weight)
        torch.testing.assert_close(after.bias, bias * before.bias)


def test_weights_move_by_the_factor_of_their_channel():
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)))
    scaled = rescale(model, per="neuron", factor=4.0, seed=8)
    draws = torch.rand(5, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    factors = torch.exp((2 * draws - 1) * math.log(4.0))
    torch.testing.assert_close(scaled[0].weight, factors[:, None] * model[0].weight)
    torch.testing.assert_close(scaled[0].bias, factors * model[0].bias)
    torch.testing.assert_close(scaled[2].weight, model[2].weight / factors)
    torch.testing.assert_close(scaled[2].bias, model[2].bias, rtol=0, atol=0)


def test_layers_between_a_sum_and_a_layer_are_left():
    model = seeded(residual)
    scaled = rescale(model, factor=10.0)
    block, other = model[3], scaled[3]
    torch.testing.assert_close(other.bn1.weight, 10 * block.bn1.weight)
    torch.testing.assert_close(other.conv2.weight, block.conv2.weight / 10)
    for name in ("conv1.weight", "bn2.weight", "bn2.bias", "bn1.running_mean"):
        assert torch.equal(other.state_dict()[name], block.state_dict()[name]), name


@either
def test_model_is_left_as_it_was(per):
    model = seeded(mlp_batch_norm)
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model(inputs(*ROW)).sum().backward()
    before, state = bits(model), torch.get_rng_state()
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    scaled = rescale(model, per=per)
    assert bits(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        gradient = gradients[name]
        same = parameter.grad is gradient or torch.equal(parameter.grad, gradient)
        assert same, name
        other = scaled.get_parameter(name)
        assert other.requires_grad == parameter.requires_grad
        assert other.dtype == parameter.dtype
        assert other.data_ptr() != parameter.data_ptr()
        assert other.grad is None
    for name, buffer in model.named_buffers():
        assert torch.equal(scaled.get_buffer(name), buffer), name
    for module, other in zip(model.modules(), scaled.modules(), strict=True):
        assert module.training == other.training
        assert type(module) is type(other)


def test_frozen_layers_are_rescaled_too():
    model = seeded(mlp)
    model.requires_grad_(False)
    scaled = rescale(model)
    torch.testing.assert_close(scaled[0].weight, 10 * model[0].weight)
    assert not any(p.requires_grad for p in scaled.parameters())


def test_forward_that_changes_its_model_leaves_no_trace():
    def forward(self, x):
        self.calls += 1
        torch.rand(3)
        return self.second(F.relu(self.first(x)))

    model = seeded(lambda: Forward(forward, first=nn.Linear(3, 4), second=nn.Linear(4, 2)))
    model.register_buffer("calls", torch.zeros(()))
    state = torch.get_rng_state()
    scaled = rescale(model)
    assert float(model.calls) == float(scaled.calls) == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_same_seed_gives_the_same_factors():
    model = seeded(mlp)
    once = bits(rescale(model, per="neuron", seed=1))
    assert bits(rescale(model, per="neuron", seed=1)) == once
    assert bits(rescale(model, per="neuron", seed=torch.Generator().manual_seed(1))) == once
    assert bits(rescale(model, per="neuron", seed=2)) != once


@either
def test_factor_one_changes_nothing(per):
    model = seeded(mlp)
    assert bits(rescale(model, per=per, factor=1.0)) == bits(model)


def test_single_precision_stays_single():
    model = seeded(mlp).float()
    scaled = rescale(model, per="neuron")
    assert {p.dtype for p in scaled.parameters()} == {torch.float32}
    x = inputs(*ROW).float()
    torch.testing.assert_close(output(scaled, x, False), output(model, x, False))


def test_wrappers_are_taken_off():
    model = seeded(mlp)
    scaled = rescale(nn.DataParallel(model))
    assert type(scaled) is nn.Sequential
    assert bits(scaled) == bits(rescale(model))


@pytest.mark.parametrize(
    ("layers", "multiplied"),
    [("2", ["2"]), (["0"], ["0"]), ("[02]", ["0", "2"]), (("2", "0", "2"), ["0", "2"])],
)
def test_layers_are_chosen_by_pattern(layers, multiplied):
    model = seeded(mlp)
    scaled = rescale(model, layers=layers)
    moved = [n for n in "025" if not torch.equal(scaled[int(n)].bias, model[int(n)].bias)]
    assert moved == multiplied
    assert torch.allclose(scaled[int(moved[0])].bias, 10 * model[int(moved[0])].bias)


def test_layer_before_a_normalisation_stands_for_it():
    model = seeded(mlp_batch_norm)
    assert bits(rescale(model, layers="0")) == bits(rescale(model, layers="1"))
    scaled = rescale(model, layers="0")
    torch.testing.assert_close(scaled[1].weight, 10 * model[1].weight)
    assert torch.equal(scaled[0].weight, model[0].weight)


def test_optional_arguments_keep_their_defaults():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x, mask=None, squash=False):
            x = self.first(x)
            if mask is not None:
                x = x + mask
            return self.second(torch.tanh(x) if squash else F.relu(x))

    model, x = seeded(Net), inputs(*ROW)
    scaled = rescale(model)
    torch.testing.assert_close(scaled(x), model(x), rtol=1e-10, atol=1e-12)
    assert not torch.equal(scaled.first.weight, model.first.weight)


# What cannot be rescaled, and why.


def between(*modules, width=4):
    return nn.Sequential(nn.Linear(3, 4), *modules, nn.Linear(width, 2))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Tanh(), "'1' is Tanh, which is not positively homogeneous"),
        (nn.ReLU6(), "'1' is ReLU6, which is not positively homogeneous"),
        (nn.Hardtanh(), "'1' is Hardtanh, which is not positively homogeneous"),
        (nn.GELU(), "'1' is GELU, which is not positively homogeneous"),
        (nn.Sigmoid(), "'1' is Sigmoid, which is not positively homogeneous"),
        (nn.Softmax(dim=1), "'1' is Softmax, which is not positively homogeneous"),
        (nn.SiLU(), "'1' is SiLU, which is not positively homogeneous"),
        (nn.AlphaDropout(), "'1' is AlphaDropout, through which a scale cannot be followed"),
        (nn.LocalResponseNorm(2), "'1' is LocalResponseNorm, through which a scale cannot"),
        (nn.BatchNorm1d(4, affine=False), "it feeds '1', which stays as it is: it has no affine"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_modules_that_stop_a_scale_are_named(module, reason):
    with pytest.raises(fm.InvalidArgumentError, match=f"first is '0' .{re.escape(reason)}"):
        rescale(between(module))
    with pytest.raises(fm.InvalidArgumentError, match=f"multiply '0': {re.escape(reason)}"):
        rescale(between(module), layers="0")


def functions(*steps, **layers):
    layers = layers or {"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)}
    return Forward(*steps, **layers)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: m.b(torch.tanh(m.a(x))), r"it goes through tanh\(\), which is not"),
        (lambda m, x: m.b(F.relu6(m.a(x))), r"it goes through relu6\(\), which is not"),
        (lambda m, x: m.b(m.a(x).sigmoid_()), r"it goes through sigmoid_\(\), which is not"),
        (lambda m, x: m.b(m.a(x) + 1), r"it goes through add\(\), which is not"),
        (lambda m, x: m.b(m.a(x).cumsum(1)), r"it goes through cumsum\(\), through which"),
        (lambda m, x: m.b(m.a(x) + x.sum()), "it is added to another branch"),
        (lambda m, x: m.b(torch.cat([m.a(x), x[:, :0]], 1)), "it is concatenated with another"),
        (lambda m, x: m.b(F.prelu(x, m.a(x))), r"it goes through prelu\(\), through"),
        (lambda m, x: m.b(F.prelu(h := m.a(x), h)), r"it goes through prelu\(\), through"),
        (lambda m, x: (m.a(x), m.b(x.new_ones(2, 4)))[1], "nothing reads what it gives"),
        (lambda m, x: m.b(m.a(x).view(torch.int64)), r"it goes through view\(\), through"),
        (lambda m, x: (m.b(h := m.a(x)), h), "it gives the model's output"),
        (lambda m, x: m.b(m.b(m.a(x))), "'b', which reads it, cannot be divided: it is called mo"),
        (lambda m, x: m.b(m.a(x) * m.a(x)), "it is called more than once"),
        (lambda m, x: m.b(F.relu(m.a(x))) + m.b.weight.sum(), "'b', which .* reads its weight or"),
        (lambda m, x: m.b(F.relu(m.a(x))) + m.a.bias.sum(), "the forward reads its weight or bi"),
        (lambda m, x: m.b(F.linear(x, m.a.weight)), "the forward reads its weight or bias other"),
    ],
)
def test_forwards_that_stop_a_scale_are_named(forward, reason):
    with pytest.raises(fm.InvalidArgumentError, match=f"multiply 'a': {reason}"):
        rescale(functions(forward), layers="a")
    with pytest.raises(fm.InvalidArgumentError, match=rf"the first is 'a' \({reason}"):
        rescale(functions(forward))


def test_queries_of_weights_and_values_stop_nothing():
    def forward(m, x):
        h = m.a(x.to(m.a.weight.device))
        return m.b(F.relu(h)) + x.new_zeros(h.shape[0], 2) * h.size(1)

    scaled = rescale(functions(forward), layers="a")
    assert scaled.a.weight.abs().max() > 1


def test_layer_read_otherwise_in_training_is_left():
    def forward(self, x):
        x = self.a(x)
        return self.b(F.relu(x) if self.training else F.hardtanh(x))

    for flag in (True, False):
        model = functions(forward).train(flag)
        with pytest.raises(fm.InvalidArgumentError, match=r"'a' \(it goes through hardtanh\(\)"):
            rescale(model)
        assert model.training is flag

    model = functions(lambda m, x: m.b(torch.tanh(m.a(x)) if m.training else F.relu(m.a(x))))
    with pytest.raises(fm.InvalidArgumentError, match=r"'a' \(it goes through tanh\(\)"):
        rescale(model)

    def switched(self, x):
        return (self.b if self.training else self.c)(F.relu(self.a(x)))

    layers = {"a": nn.Linear(3, 4), "b": nn.Linear(4, 2), "c": nn.Linear(4, 2)}
    with pytest.raises(
        fm.InvalidArgumentError, match="multiply 'a': it is read by other layers in tr"
    ):
        rescale(functions(switched, **layers), layers="a")


def test_layer_with_two_kinds_of_readers_is_left():
    layers = {"a": nn.Linear(3, 4), "b": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}
    model = functions(lambda m, x: m.b(h := m.a(x)) + m.norm(h), **layers)
    with pytest.raises(fm.InvalidArgumentError, match="'a': it feeds 'norm', which takes a scale"):
        rescale(model, layers="a")


def test_tied_weights_are_left():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[4].weight = model[0].weight
    with pytest.raises(fm.InvalidArgumentError, match="multiply '0': it shares its weight or bias"):
        rescale(model, layers="0")
    reason = "'4', which reads it, cannot be divided: it shares its weight or bias with another"
    with pytest.raises(fm.InvalidArgumentError, match=f"multiply '2': {reason}"):
        rescale(model, layers="2")


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_weights_are_left(wrap):
    model = between(nn.ReLU())
    model[2] = wrap(model[2])
    with pytest.raises(fm.InvalidArgumentError, match=r"'2', which reads .* by a parametrisation"):
        rescale(model)
    model = between(nn.ReLU())
    model[0] = wrap(model[0])
    with pytest.raises(fm.InvalidArgumentError, match=r"'0' \(its weight is made by a param"):
        rescale(model)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_hooks_stop_a_scale(place):
    model = between(nn.ReLU())
    model[place].register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.raises(fm.InvalidArgumentError, match=f"'{place}' has a forward hook"):
        rescale(model)


def test_class_that_is_not_torchs_is_left():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x).exp()

    model = nn.Sequential(Own(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(fm.InvalidArgumentError, match=r"its class, Own, is not one of torch.nn"):
        rescale(model)


@pytest.mark.parametrize(
    ("model", "layer", "reason"),
    [
        (between(nn.MaxPool1d(2), width=2), "0", "'MaxPool1d'|'1' moves or merges"),
        (between(nn.Unflatten(1, (2, 2)), width=2), "0", "'1' moves or merges dimensions"),
        (
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(2), nn.Linear(4, 2)),
            "0",
            "'1' moves or merges dimensions",
        ),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Linear(4, 2)), "0", "'1' does not read it channel"),
        (nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)), "0", "'1' does not read it channel"),
        (nn.Sequential(nn.LayerNorm((2, 4)), nn.Linear(4, 2)), "0", "it normalises over several"),
        (nn.Sequential(nn.Linear(3, 4), nn.Conv1d(4, 2, 1)), "0", "'1' does not read it channel"),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(8, 2)), "0", "'1' does not read it channel by"),
        (
            nn.Sequential(nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Flatten(0), nn.Linear(8, 2)),
            "0",
            "'2' moves or merges dimensions",
        ),
        (
            functions(
                lambda m, x: m.b(m.a(x).squeeze(-1)), a=nn.Conv1d(1, 4, 3), b=nn.Linear(4, 2)
            ),
            "a",
            "'squeeze' moves or merges",
        ),
        (functions(lambda m, x: m.b(m.a(x).mean(1))), "a", "'mean' moves or merges"),
        (functions(lambda m, x: m.b(m.a(x).view(-1, 4))), "a", "'view' moves or merges"),
        (functions(lambda m, x: m.b(m.a(x).view(x.size(0), -1))), "a", "'view' moves or"),
        (functions(lambda m, x: m.b(m.a(x).squeeze(1))), "a", "'squeeze' moves or merges"),
        (functions(lambda m, x: m.b(F.max_pool2d(m.a(x), 2))), "a", "'max_pool2d' moves or"),
    ],
)
def test_channels_that_cannot_be_followed_are_named(model, layer, reason):
    """And without channels, the same layer can be."""
    with pytest.raises(fm.InvalidArgumentError, match=f"multiply '{layer}': ({reason})"):
        rescale(model, per="neuron", layers=layer)
    before = bits(model)
    assert bits(rescale(model, layers=layer)) != before


def test_left_layers_are_warned_of_together():
    model = seeded(
        lambda: nn.Sequential(
            *(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU()),
            *(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)),
        )
    )
    with pytest.warns(fm.FlatMinimaWarning) as caught:
        scaled = rescale(model)
    assert [str(w.message) for w in caught] == [
        "rescale left these layers as they are: '0' ('1' is Tanh, which is not positively "
        "homogeneous); '4' ('5' is GELU, which is not positively homogeneous)."
    ]
    assert caught[0].filename == __file__
    x = inputs(*ROW)
    torch.testing.assert_close(scaled(x), model(x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(scaled[2].bias, 10 * model[2].bias)


def test_last_layers_give_no_warning_whatever_follows_them():
    """Nothing behind them could be divided; but a layer before them is still told of."""
    model = between(nn.ReLU())
    model.append(nn.LogSoftmax(dim=1))
    assert not torch.equal(rescale(model)[0].weight, model[0].weight)
    model.append(nn.Linear(2, 1))
    with pytest.warns(fm.FlatMinimaWarning, match=r"as they are: '2' \('3' is LogSoftmax"):
        rescale(model)
    model = functions(lambda m, x: torch.tanh(m.b(F.relu(m.a(x)))) @ m.last)
    model.last = nn.Parameter(torch.ones(2, 1))
    with pytest.warns(fm.FlatMinimaWarning, match=r"as they are: 'b' \(it goes through tanh"):
        rescale(model)


def test_layers_that_are_not_seen_give_a_warning():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4))
    model.append(nn.TransformerEncoderLayer(4, 2, 4))
    model[1].spare = nn.Linear(2, 2)
    with pytest.warns(fm.FlatMinimaWarning) as caught:
        rescale(model)
    message = str(caught[0].message)
    assert "'1.spare' (it is not called by itself in the forward)" in message
    assert "'3.linear1' (it is not called by itself in the forward)" in message
    assert "'2' ('3' is TransformerEncoderLayer, through which a scale cannot be" in message


def test_network_of_tanh_is_refused():
    with pytest.raises(fm.InvalidArgumentError, match=r"no layer .* '0' \('1' is Tanh.*ReLU"):
        rescale(between(nn.Tanh(), nn.Linear(4, 4), nn.Tanh()))


@pytest.mark.parametrize("model", [nn.Linear(3, 2), nn.Sequential(nn.ReLU()), nn.LSTM(2, 2)])
def test_model_without_layers_inside_is_refused(model):
    with pytest.raises(fm.InvalidArgumentError, match=r"found no linear layer.* at least two"):
        rescale(model)


def test_last_layer_is_named_when_asked_for():
    with pytest.raises(fm.InvalidArgumentError, match="multiply '2': it gives the model's output"):
        rescale(between(nn.ReLU()), layers="2")


@pytest.mark.parametrize("factor", [0.0, -1.0, math.inf, math.nan])
def test_factor_must_be_positive(factor):
    with pytest.raises(fm.InvalidArgumentError, match="'factor' argument of rescale must be"):
        rescale(between(nn.ReLU()), factor=factor)


def test_factor_out_of_range_is_refused():
    model = between(nn.ReLU()).half()
    with pytest.raises(fm.InvalidArgumentError, match=r"parameter of '0' out .* torch.float16"):
        rescale(model, factor=1e6)


def test_arguments_are_checked():
    model = between(nn.ReLU())
    with pytest.raises(
        fm.InvalidArgumentError, match=r"'frist' .* matches no .* Did you .*'first'"
    ):
        rescale(functions(lambda m, x: m.b(m.first(x)), first=model[0], b=model[2]), layers="frist")
    with pytest.raises(
        fm.InvalidArgumentError, match=r"'1' of the 'layers' .* Known names: '0', '"
    ):
        rescale(model, layers=["0", "1"])
    with pytest.raises(fm.InvalidArgumentError, match="is empty"):
        rescale(model, layers=[])
    with pytest.raises(fm.ArgumentTypeError, match="'layers' argument of rescale must be None"):
        rescale(model, layers=3)
    with pytest.raises(fm.InvalidArgumentError, match="'per' argument of rescale must be one of"):
        rescale(model, per="row")
    with pytest.raises(fm.ArgumentTypeError, match="'model' argument of rescale must be a Module"):
        rescale(torch.nn.functional.relu)
    with pytest.raises(fm.ArgumentTypeError, match="'seed' argument"):
        rescale(model, seed="a")
    with pytest.raises(fm.ParameterSelectionError, match="not initialised"):
        rescale(nn.Sequential(nn.LazyLinear(2), nn.ReLU(), nn.Linear(2, 2)))


def test_forward_that_cannot_be_traced_is_refused():
    def forward(self, x):
        return self.b(x) if x.sum() > 0 else self.a(x)

    with pytest.raises(
        fm.InvalidArgumentError, match=r"cannot trace that of Forward in .* by hand"
    ):
        rescale(functions(forward))


def test_penalty_made_of_parameters_is_refused():
    def forward(self, x):
        penalty = sum(p.square().sum() for p in self.list)
        return self.b(F.relu(self.a(x))) + penalty

    model = functions(forward)
    model.list = [torch.stack([p.sum() for p in model.parameters()])]
    with pytest.raises(fm.InvalidArgumentError, match="cannot be copied"):
        rescale(model)
    model = functions(lambda m, x: m.b(m.a(x)) + sum(p.square().sum() for p in m.parameters()))
    with pytest.raises(fm.InvalidArgumentError, match=r"multiply 'a': the forward reads|trace"):
        rescale(model, layers="a")
