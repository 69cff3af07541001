"""What PyTorch says when something cannot be done, and what becomes of it here.

Each message is provoked from PyTorch itself first, so that a new wording is noticed.
"""

from __future__ import annotations

import contextlib
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import flatminima as fm
from flatminima.derivatives.tracing import operation_name
from flatminima.support.failures import is_out_of_memory
from integrity import untouched
from zoo import NAMES, build, facts_of


def seeded(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


X, Y = seeded(9, 3), seeded(9, 2, seed=1)


def net(*middle):
    torch.manual_seed(0)
    middle = middle or (nn.Tanh(),)
    return nn.Sequential(nn.Linear(3, 4), *middle, nn.Linear(4, 2)).double()


def by_hand(model, loss_fn=None, data=(X, Y)):
    """H v, differentiated twice without the library: what people write themselves."""
    loss = (loss_fn or F.mse_loss)(model(data[0]), data[1])
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    return torch.autograd.grad(sum(g.sum() for g in gradients), parameters)


def products(objective, **options):
    operator = fm.HessianOperator(objective, **options)
    return operator @ torch.ones(operator.shape[0], dtype=operator.dtype)


def differences(objective):
    return products(objective, method="finite_differences")


@contextlib.contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ------------------------------------------------------------- operations without second derivative


class Attention(nn.Module):
    """One head over the examples; `forced` keeps to kernels without a second derivative."""

    def __init__(self, forced=False):
        super().__init__()
        torch.manual_seed(0)
        self.project, self.head, self.forced = nn.Linear(3, 12), nn.Linear(4, 2), forced
        self.double()

    def forward(self, x):
        q, k, v = self.project(x)[None, None].chunk(3, -1)
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]) if self.forced else contextlib.nullcontext():
            return self.head(F.scaled_dot_product_attention(q, k, v)[0, 0])


def test_attention_is_handled():
    with pytest.raises(RuntimeError, match="derivative for aten::_scaled_dot_product_") as caught:
        by_hand(Attention())
    assert "is not implemented" in str(caught.value)
    objective = fm.Objective(Attention(), nn.MSELoss(), (X, Y))
    with no_warning():
        product = products(objective)
    torch.testing.assert_close(product, differences(objective), rtol=1e-7, atol=1e-9)


def test_attention_that_insists_on_a_kernel_has_products_all_the_same():
    objective = fm.Objective(Attention(forced=True), nn.MSELoss(), (X, Y))
    with no_warning():
        product = products(objective, method="double_backward")
    exact = products(fm.Objective(Attention(), nn.MSELoss(), (X, Y)))
    torch.testing.assert_close(product, exact, rtol=1e-7, atol=1e-9)


CTC = {
    "x": seeded(2, 5, 3),
    "labels": torch.tensor([[1, 2], [2, 1]]),
    "lengths": torch.tensor([5, 4]),
    "label_lengths": torch.tensor([2, 1]),
}


def ctc(model, batch):
    scores = model(batch["x"]).log_softmax(2).transpose(0, 1)
    return F.ctc_loss(scores, batch["labels"], batch["lengths"], batch["label_lengths"])


def ctc_objective():
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    return fm.Objective(model, data=[CTC], batch_loss=ctc, weight=lambda batch: 2)


@pytest.mark.parametrize(
    ("make", "bare", "fragment", "operation", "module"),
    [
        (
            lambda: fm.Objective(net(nn.Hardsigmoid()), nn.MSELoss(), (X, Y)),
            lambda: by_hand(net(nn.Hardsigmoid())),
            "derivative for aten::hardsigmoid_backward is not implemented",
            "hardsigmoid",
            "1",
        ),
        (
            ctc_objective,
            lambda: by_hand(
                nn.Linear(3, 4).double(),
                lambda output, target: F.ctc_loss(
                    output.log_softmax(2).transpose(0, 1),
                    CTC["labels"],
                    CTC["lengths"],
                    CTC["label_lengths"],
                ),
                (CTC["x"], None),
            ),
            "derivative for aten::_ctc_loss_backward is not implemented",
            "ctc_loss",
            "the loss function",
        ),
    ],
    ids=["hardsigmoid", "ctc"],
)
def test_operations_without_a_second_derivative(make, bare, fragment, operation, module):
    with pytest.raises(RuntimeError, match=fragment):
        bare()
    objective = make()
    with untouched(objective.model), pytest.raises(fm.NotTwiceDifferentiableError) as caught:
        products(objective, method="double_backward")
    error = caught.value
    assert (error.operation, error.module) == (operation, module)
    assert fragment in str(error.__cause__)
    place = f"(in {module})" if module.startswith("the ") else f"(in the module {module!r})"
    assert str(error).startswith(f"PyTorch has no second derivative of {operation} {place}.")
    assert "method='auto' or 'finite_differences'" in str(error)
    with pytest.warns(fm.FiniteDifferenceWarning, match=operation):
        product = products(objective)
    torch.testing.assert_close(product, differences(objective))


class Missing(torch.autograd.Function):
    """Its second derivative ends in an error with the text given."""

    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return _MissingBackward.apply(gradient * x, ctx.error), None


class _MissingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        raise ctx.error


def missing(error):
    """An objective whose products meet `error` where PyTorch raises it."""
    return fm.Objective(net(), lambda o, t: Missing.apply(o - t, error).mean(), (X, Y))


MESSAGES = {
    "derivative for aten::_scaled_dot_product_efficient_attention_backward is not implemented": (
        "scaled_dot_product_efficient_attention"
    ),
    "the derivative for '_cudnn_rnn_backward' is not implemented. Double backwards is not "
    "supported for CuDNN RNNs due to limitations in the CuDNN API. To run double backwards, "
    "please disable the CuDNN backend": "cudnn_rnn",
    "derivative for aten::mkldnn_rnn_layer_backward is not implemented": "mkldnn_rnn_layer",
    "derivative for aten::miopen_rnn_backward is not implemented": "miopen_rnn",
    "derivative for aten::grid_sampler_2d_backward is not implemented": "grid_sampler_2d",
    "the derivative for 'upsample_lanczos' is not implemented": "upsample_lanczos",
    "trying to differentiate twice a function that was markedwith @once_differentiable": (
        "a function marked as once_differentiable"
    ),
    "trying to differentiate twice a function that was marked with @once_differentiable": (
        "a function marked as once_differentiable"
    ),
    "torch.compile with aot_autograd does not currently support double backward": "torch.compile",
}


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_of_other_devices_and_releases(message):
    error = RuntimeError(message)
    objective = missing(error)
    with pytest.raises(fm.NotTwiceDifferentiableError) as caught:
        products(objective, method="double_backward")
    assert caught.value.operation == MESSAGES[message]
    assert caught.value.__cause__ is error
    with pytest.warns(fm.FiniteDifferenceWarning) as told:
        found = products(objective)
    assert MESSAGES[message] in str(told[0].message)
    plain = products(fm.Objective(net(), nn.MSELoss(), (X, Y)))
    torch.testing.assert_close(found, plain, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", [RuntimeError, NotImplementedError])
def test_messages_come_in_both_classes(kind):
    objective = missing(kind("derivative for aten::_fused_backward is not implemented"))
    with pytest.raises(fm.NotTwiceDifferentiableError) as caught:
        products(objective, method="double_backward")
    assert type(caught.value.__cause__) is kind


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("expected scalar type Float but found Double"),
        ValueError("derivative for aten::x is not implemented"),
        KeyError("x"),
    ],
)
def test_other_errors_of_a_second_derivative_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught:
        products(missing(error))
    assert caught.value is error
    assert "batch 0" in error.__notes__[0]


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("aten::_ctc_loss_backward", "ctc_loss"),
        ("_cudnn_rnn_backward", "cudnn_rnn"),
        ("aten::hardsigmoid_backward", "hardsigmoid"),
        ("aten::_embedding_bag_backward", "embedding_bag"),
        ("aten::_cdist_backward", "cdist"),
    ],
)
def test_names_of_operations(said, name):
    assert operation_name(said) == name


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * gradient * x**2


def test_once_differentiable_functions_are_named():
    class Cubed(nn.Module):
        def forward(self, x):
            return Once.apply(x)

    model = net(Cubed())
    loss = F.mse_loss(model(X), Y)
    (gradient,) = torch.autograd.grad(loss, model[0].weight, create_graph=True)
    with pytest.raises(RuntimeError, match="trying to differentiate twice a function that was"):
        gradient.sum().backward()
    objective = fm.Objective(net(Cubed()), nn.MSELoss(), (X, Y))
    with pytest.raises(fm.NotTwiceDifferentiableError, match=r"of Once \(in the module '1'\)"):
        products(objective, method="double_backward")


# ------------------------------------------------------------------------ compiled, checkpointed


def test_compiled_code_runs_eagerly():
    compiled = functools.partial(torch.compile, backend="aot_eager")
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        by_hand(compiled(net()))
    expected = products(fm.Objective(net(), nn.MSELoss(), (X, Y)))
    inside = nn.Sequential(compiled(net()))
    for model, loss_fn in (
        (compiled(net()), nn.MSELoss()),
        (inside, nn.MSELoss()),
        (net(), compiled(lambda o, t: F.mse_loss(o, t))),
    ):
        with no_warning():
            found = products(fm.Objective(model, loss_fn, (X, Y)))
        torch.testing.assert_close(found, expected)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.block, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.reentrant = reentrant
        self.double()

    def forward(self, x):
        x = self.first(x)
        if self.reentrant is None:
            x = self.block(x).tanh()
        else:
            body = lambda x: self.block(x).tanh()  # noqa: E731
            x = checkpoint(body, x, use_reentrant=self.reentrant)
        return self.head(x)


def test_reentrant_checkpointing_has_all_of_its_gradient():
    model = Checkpointed(True)
    with pytest.raises(RuntimeError, match=r"compatible with \.grad\(\)"):
        torch.autograd.grad(F.mse_loss(model(X), Y), list(model.parameters()))
    plain = fm.Objective(Checkpointed(None), nn.MSELoss(), (X, Y), batch_size=4)
    for params in (None, "block.*", ["block.*", "head.*"], "first.weight"):
        objective = fm.Objective(model, nn.MSELoss(), (X, Y), params=params, batch_size=4)
        twin = fm.Objective(plain.model, nn.MSELoss(), (X, Y), params=params)
        with untouched(model), no_warning():
            torch.testing.assert_close(objective.gradient(), twin.gradient())
            assert objective.loss() == pytest.approx(twin.loss(), rel=1e-12)


def test_reentrant_checkpointing_keeps_the_gradients_of_the_user():
    model = Checkpointed(True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    objective = fm.Objective(model, nn.MSELoss(), (X, Y))
    with untouched(model):
        objective.gradient()
        differences(objective)


@pytest.mark.parametrize("reentrant", [True, False])
def test_products_through_checkpoints(reentrant):
    plain = products(fm.Objective(Checkpointed(None), nn.MSELoss(), (X, Y)))
    objective = fm.Objective(Checkpointed(reentrant), nn.MSELoss(), (X, Y))
    if reentrant:
        with pytest.warns(fm.FiniteDifferenceWarning, match="use_reentrant=True"):
            found = products(objective)
    else:
        with no_warning():
            found = products(objective)
    torch.testing.assert_close(found, plain, rtol=1e-7, atol=1e-9)


@pytest.fixture
def every_warning_every_time():
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)


@pytest.mark.usefixtures("every_warning_every_time")
def test_pytorch_warns_of_create_graph():
    leaf = torch.ones(1, requires_grad=True)
    with pytest.warns(UserWarning, match=r"Using backward\(\) with create_graph=True"):
        (leaf**2).sum().backward(create_graph=True)
    leaf.grad = None


@pytest.mark.usefixtures("every_warning_every_time")
@pytest.mark.parametrize("name", [n for n in NAMES if facts_of(n).approximate])
def test_create_graph_is_never_warned_of(name):
    """It would leave a reference cycle: no gradient is taken that way."""
    case = build(name, facts_of(name).dtypes[-1])
    objective = case.objective()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        objective.gradient()
        products(objective)
        differences(objective)
        fm.layerwise(objective, trace_products=2, tol=0.5)
    assert not [w for w in caught if "create_graph" in str(w.message)]
    assert {w.category for w in caught} <= {fm.FiniteDifferenceWarning, fm.ConvergenceWarning}


# --------------------------------------------------------------------------- graphs that are cut


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)
        self.double()

    def forward(self, x):
        return self.used(x)


def test_unused_parameters_have_derivatives_of_zero():
    model = Unused()
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        torch.autograd.grad(F.mse_loss(model(X), Y), list(model.parameters()))
    objective = fm.Objective(model, nn.MSELoss(), (X, Y))
    with no_warning():
        gradient, product = objective.gradient(), products(objective)
    assert not bool(gradient[8:].any())
    assert not bool(product[8:].any())
    assert bool(gradient[:8].all())


class Detaching(nn.Module):
    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.how = nn.Linear(3, 2), how
        self.double()

    def forward(self, x):
        if self.how == "no_grad":
            with torch.no_grad():
                return self.layer(x)
        if self.how == "data":
            return F.linear(x, self.layer.weight.data, self.layer.bias.data)
        if self.how == "inference":
            with torch.inference_mode():
                return self.layer(x)
        return self.layer(x).detach()


@pytest.mark.parametrize("how", ["detach", "no_grad", "data", "inference"])
@pytest.mark.parametrize("call", ["gradient", "product", "differences", "layerwise"])
def test_a_detached_model_is_told(call, how):
    model = Detaching(how)
    with pytest.raises(RuntimeError, match="element 0 of tensors does not require grad"):
        F.mse_loss(model(X), Y).backward()
    objective = fm.Objective(model, nn.MSELoss(), (X, Y))
    calls = {
        "gradient": objective.gradient,
        "product": lambda: products(objective),
        "differences": lambda: differences(objective),
        "layerwise": lambda: fm.layerwise(objective),
    }
    with (
        untouched(model),
        pytest.raises(fm.LossNotScalarError, match="batch 0 does not depend") as e,
    ):
        calls[call]()
    assert "detach(), no_grad() or .data" in str(e.value)
    assert objective.loss() > 0


def under_no_grad(output, target):
    with torch.no_grad():
        return F.mse_loss(output, target)


@pytest.mark.parametrize(
    "loss_fn",
    [
        under_no_grad,
        torch.no_grad()(F.mse_loss),
        lambda o, t: F.mse_loss(o, t).detach(),
        lambda o, t: torch.tensor(F.mse_loss(o, t).item()),
    ],
    ids=["block", "decorator", "detach", "item"],
)
def test_a_loss_without_a_graph_is_told(loss_fn):
    objective = fm.Objective(net(), loss_fn, (X, Y))
    assert objective.loss() > 0
    for call in (objective.gradient, lambda: products(objective)):
        with pytest.raises(fm.LossNotScalarError, match="does not depend on the selected"):
            call()


@pytest.mark.parametrize(
    ("loss_fn", "kind"),
    [
        (lambda o, t: F.mse_loss(o, t).item(), "float"),
        (lambda o, t: F.mse_loss(o, t).detach().numpy()[()], "float64"),
        (lambda o, t: F.mse_loss(o, t).detach().numpy(), "ndarray"),
        (lambda o, t: None, "NoneType"),
        (lambda o, t: (F.mse_loss(o, t), o), "tuple"),
        (lambda o, t: {"loss": F.mse_loss(o, t)}, "dict"),
    ],
)
def test_a_loss_that_is_no_tensor_is_told(loss_fn, kind):
    objective = fm.Objective(net(), loss_fn, (X, Y))
    for call in (objective.loss, objective.gradient, lambda: products(objective)):
        with pytest.raises(fm.LossNotScalarError, match=rf"batch 0 is a {kind}, not a tensor"):
            call()


def test_a_constant_gradient_gives_zero():
    """`element 0 of tensors does not require grad` again, and no fault of the user's."""
    objective = fm.Objective(nn.Linear(3, 2).double(), lambda o, t: o.mean(), (X, Y))
    with no_warning():
        assert not bool(products(objective).any())


def test_tied_parameters_have_one_entry():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    model[2].weight = model[0].weight
    two = {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}
    two["0.weight"] = two["0.weight"] + 1
    with pytest.raises(ValueError, match=r"got multiple values for keys .* tied"):
        torch.func.functional_call(model, two, X)
    objective = fm.Objective(model, nn.MSELoss(), (X, X))
    assert objective.layout.names == ("0.weight", "0.bias", "2.bias")
    torch.testing.assert_close(products(objective), differences(objective), rtol=1e-7, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
@pytest.mark.parametrize(
    ("loss_fn", "batch", "cause"),
    [
        (F.mse_loss, (X, Y[:8]), RuntimeError),
        (F.cross_entropy, (X, torch.arange(8) % 2), ValueError),
        (nn.CrossEntropyLoss(), (X[:5], torch.arange(9) % 2), ValueError),
        (lambda o, t: (o - t).square().mean(), (X, Y[:4]), RuntimeError),
    ],
)
def test_pieces_of_a_batch_that_disagree_in_length_are_told(loss_fn, batch, cause):
    with pytest.raises(cause) as bare:
        loss_fn(net()(batch[0]), batch[1])
    objective = fm.Objective(net(), loss_fn, [(X, batch[1].repeat_interleave(3, 0)[:9]), batch])
    lengths = f"{len(batch[0])} and {len(batch[1])}"
    for call in (objective.loss, objective.gradient):
        with pytest.raises(
            fm.ShapeError, match=rf"batch 1 differ in length \({lengths}\)"
        ) as caught:
            call()
        assert type(caught.value.__cause__) is cause
        assert str(bare.value).splitlines()[0] in str(caught.value)


def test_mappings_that_disagree_in_length_are_told():
    batch = {"x": X, "labels": torch.arange(7) % 2}
    objective = fm.Objective(
        net(),
        data=[batch],
        batch_loss=lambda m, b: F.cross_entropy(m(b["x"]), b["labels"]),
        weight=lambda b: 9,
    )
    with pytest.raises(fm.ShapeError, match=r"differ in length \(9 and 7\)") as caught:
        objective.loss()
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("width", [2, 4])
def test_shapes_that_disagree_otherwise_keep_their_message(width):
    objective = fm.Objective(net(), nn.MSELoss(), [(seeded(9, width), Y)])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        objective.loss()
    assert not isinstance(caught.value, fm.FlatMinimaError)
    assert "batch 0" in caught.value.__notes__[0]


def test_the_second_of_two_backward_passes_is_explained():
    leaf = torch.ones(1, requires_grad=True)
    loss = leaf.sin().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    kept = []

    def loss_fn(output, target):
        kept.append(F.mse_loss(output, target))
        return torch.stack(kept).mean()

    objective = fm.Objective(net(), loss_fn, (X, Y), batch_size=4)
    with pytest.raises(fm.GraphError, match="batch 1 depends on a graph that no longer exists"):
        objective.gradient()


# ---------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB)"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("something else"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_errors_of_memory_are_known(error, is_memory):
    assert is_out_of_memory(error) == is_memory


def test_the_host_says_what_it_says():
    """PyTorch's own words when the host has no memory left."""
    with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)


def test_a_model_that_needs_too_much_memory_is_told():
    class Greedy(nn.Linear):
        def forward(self, x):
            torch.empty(2**60)
            return super().forward(x)

    model = Greedy(3, 2).double()
    objective = fm.Objective(model, nn.MSELoss(), (X, Y))
    with untouched(model), pytest.raises(fm.DeviceMemoryError, match="not enough memory") as caught:
        objective.loss()
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_wish_to_stop_is_no_failure(kind):
    def loss_fn(output, target):
        raise kind

    objective = fm.Objective(net(), loss_fn, (X, Y), microbatch="auto")
    with untouched(objective.model), pytest.raises(kind):
        objective.loss()


def test_errors_of_the_users_own_stay_their_own():
    class OwnError(Exception):
        pass

    error = OwnError("mine")

    def loss_fn(output, target):
        raise error

    objective = fm.Objective(net(), loss_fn, (X, Y))
    with pytest.raises(OwnError) as caught:
        objective.loss()
    assert caught.value is error
    assert caught.value.__cause__ is None
