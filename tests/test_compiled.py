"""Compiled products are autograd's products, or there is a reason why there are none."""

import random
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from flatminima import InvalidArgumentError, NotCompiledError
from flatminima.compiled import CompiledProducts
from flatminima.product_graph import second_order, trace_product

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler"
)


def loss_of(module, criterion=F.cross_entropy):
    def loss(leaves, others, batch):
        x, y = batch
        return criterion(functional_call(module, {**leaves, **others}, (x,)), y)

    return loss


def tensors_of(module):
    leaves = {n: p.detach().clone() for n, p in module.named_parameters()}
    return leaves, {n: b.clone() for n, b in module.named_buffers()}


def batch_of(*shape, classes=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=dtype)
    return x, torch.randint(classes, shape[:1], generator=generator)


def vectors_of(leaves, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in leaves.values()]


def expected_of(loss, leaves, others, data, vectors):
    own = {n: t.detach().requires_grad_() for n, t in leaves.items()}
    value = loss(own, {n: t.clone() for n, t in others.items()}, data)
    products = second_order(value, list(own.values()), vectors)[1]
    return value.detach(), products


def assert_products(loss, leaves, others, data, product, tolerance=1e-12):
    vectors = vectors_of(leaves)
    value, expected = expected_of(loss, leaves, others, data, vectors)
    torch.testing.assert_close(product.loss, value, rtol=tolerance, atol=tolerance)
    for found, wanted in zip(product(vectors), expected, strict=True):
        if found is None or wanted is None:
            # Of what the loss does not depend on.
            assert found is wanted is None
            continue
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted.norm() + 1))


class Everything(nn.Module):
    """A convolution, batch norm, attention, a tied layer, and what depends on no parameter."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(4, 3)
        self.shift = torch.linspace(0, 1, 4).double()

    def forward(self, x):
        hidden = self.norm(self.conv(x)).transpose(1, 2) + self.shift
        hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        return self.head(F.gelu(self.two(torch.tanh(self.one(hidden)))).mean(1))


@needs_compiler
def test_products_of_batches_and_points_with_one_compilation():
    torch.manual_seed(0)
    module = Everything().double().eval()
    loss = loss_of(module)
    leaves, others = tensors_of(module)
    engine = CompiledProducts()
    before = torch.get_rng_state(), random.getstate()
    first, second = batch_of(5, 2, 6), batch_of(5, 2, 6, seed=1)

    def prepared(data):
        return engine.prepare(loss, leaves, others, data)

    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
        product = prepared(first)
        seconds = engine.compile_seconds
        assert seconds > 0
        assert_products(loss, leaves, others, first, product)
        other = prepared(second)
        assert_products(loss, leaves, others, second, other)
        # Both are kept.
        assert_products(loss, leaves, others, first, product)
        # Parameters, buffers and plain tensors are read anew.
        for tensor in (*leaves.values(), others["norm.running_mean"], others["norm.running_var"]):
            tensor.mul_(1.1)
        module.shift += 1
        assert_products(loss, leaves, others, second, prepared(second))
    assert engine.shapes == 1
    assert engine.compile_seconds == seconds
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert product.nbytes > 0
    product.release()
    assert product.nbytes == 0
    with pytest.raises(RuntimeError, match="released"):
        product(vectors_of(leaves))


@needs_compiler
def test_training_mode_with_dropout_draws_the_same_masks():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)
    ).train()
    loss = loss_of(module)
    leaves, others = tensors_of(module)
    data = batch_of(9, 4, dtype=torch.float32)
    buffers = {n: b.clone() for n, b in others.items()}
    engine = CompiledProducts()
    for seed in (1, 2):
        for keep in (True, False):
            torch.manual_seed(seed)
            product = engine.prepare(loss, leaves, others, data, keep=keep)
            torch.manual_seed(seed)
            assert_products(loss, leaves, others, data, product, tolerance=1e-5)
    assert all(torch.equal(others[n], b) for n, b in buffers.items())
    assert engine.shapes == 1


@needs_compiler
def test_embedding_and_recurrence_in_single_precision():
    torch.manual_seed(0)

    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(5, 3)
            self.body = nn.RNN(3, 3, batch_first=True)
            self.head = nn.Linear(3, 5)

        def forward(self, ids):
            return self.head(self.body(self.embedding(ids))[0]).flatten(0, 1)

    module = Language()
    ids = torch.randint(5, (4, 2))
    loss = loss_of(module, lambda out, y: F.cross_entropy(out, y.flatten()))
    leaves, others = tensors_of(module)
    data = (ids, ids.roll(1, 1))
    names, entries = dict(vars(module.body)), list(module.body._flat_weights)
    product = CompiledProducts().prepare(loss, leaves, others, data)
    assert_products(loss, leaves, others, data, product, tolerance=1e-5)
    vars(module.body).update(names)
    module.body._flat_weights = entries


def quadratic(leaves, others, data):
    return (leaves["w"] * data).sin().sum()


W = {"w": torch.linspace(-1, 1, 4).double()}


@needs_compiler
def test_a_failure_is_told_again_without_another_attempt():
    def loss(leaves, others, x):
        if leaves["w"].sum() > 0:
            return leaves["w"].square().sum()
        return (leaves["w"] * x).exp().sum()

    engine = CompiledProducts()
    for _ in range(2):
        with pytest.raises(NotCompiledError, match="asks for values") as caught:
            engine.prepare(loss, W, {}, torch.ones(4).double())
        seconds = engine.compile_seconds
    assert "if" in caught.value.reason
    assert engine.compile_seconds == seconds


@pytest.mark.parametrize(
    "read",
    [lambda w: w.sum().item(), lambda w: len(w[w > 0]), lambda w: float(w[0])],
    ids=["item", "shape", "float"],
)
def test_values_read_in_the_forward_are_refused(read):
    def loss(leaves, others, x):
        return leaves["w"].square().sum() * read(leaves["w"].detach())

    with pytest.raises(NotCompiledError, match="asks for values"):
        CompiledProducts().prepare(loss, W, {}, torch.ones(4).double())


def test_numbers_drawn_by_python_are_refused():
    def loss(leaves, others, x):
        return leaves["w"].square().sum() * random.random()

    state = random.getstate()
    with pytest.raises(NotCompiledError, match="random numbers"):
        CompiledProducts().prepare(loss, W, {}, torch.ones(4).double())
    assert random.getstate() == state


@needs_compiler
def test_a_state_of_python_that_changes_is_found_out():
    calls = []

    def loss(leaves, others, x):
        calls.append(1)
        return leaves["w"].exp().sum() * len(calls)

    with pytest.raises(NotCompiledError, match="traced loss"):
        CompiledProducts().prepare(loss, W, {}, torch.ones(4).double())


def test_errors_of_the_loss_itself_are_not_hidden():
    def loss(leaves, others, x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        CompiledProducts().prepare(loss, W, {}, torch.ones(4).double())


@needs_compiler
def test_too_many_shapes_are_refused_and_those_known_still_work():
    engine = CompiledProducts(max_shapes=1)
    data = torch.ones(4).double()
    engine.prepare(quadratic, W, {}, data)
    with pytest.raises(NotCompiledError, match="more than 1 different shapes"):
        engine.prepare(quadratic, W, {}, torch.ones(2, 4).double())
    assert_products(quadratic, W, {}, data, engine.prepare(quadratic, W, {}, data))


@needs_compiler
def test_what_is_no_tensor_and_the_setting_are_part_of_the_shape():
    def loss(leaves, others, batch):
        return (leaves["w"].pow(3) * batch["x"]).sum() * batch["factor"]

    engine = CompiledProducts()
    x = torch.ones(4).double()
    for number, factor in enumerate((2.0, 3.0, 2.0), start=1):
        data = {"x": x, "factor": factor}
        product = engine.prepare(loss, W, {}, data)
        assert_products(loss, W, {}, data, product)
        assert engine.shapes == min(number, 2)
    engine.prepare(loss, W, {}, {"x": x, "factor": 2.0}, setting="another")
    assert engine.shapes == 3


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(NotCompiledError, match="holds a function"):
        CompiledProducts().prepare(quadratic, W, {}, lambda: None)


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    from torch._inductor import config, cpp_builder

    monkeypatch.setenv("PATH", str(tmp_path))
    cpp_builder.get_cpp_compiler.cache_clear() if hasattr(
        cpp_builder.get_cpp_compiler, "cache_clear"
    ) else None
    with (
        config.patch({"cpp.cxx": (str(tmp_path / "none"),), "force_disable_caches": True}),
        pytest.raises(NotCompiledError, match="no C\\+\\+ compiler"),
    ):
        CompiledProducts().prepare(lambda p, o, x: (p["w"] * x).exp().sum(), W, {}, W["w"] + 7)


def test_a_linear_loss_has_zero_products_and_needs_no_compiler(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("nothing to compile")

    monkeypatch.setattr("torch._inductor.compile", never)
    product = CompiledProducts().prepare(
        lambda leaves, others, x: leaves["w"] @ x, W, {}, torch.ones(4).double()
    )
    assert product([torch.ones(4).double()]) == [None]
    assert float(product.loss) == pytest.approx(0.0)
    assert product.nbytes == 0


def test_the_graph_is_cut_where_the_vector_comes_in():
    def loss(leaves, others, x):
        return (x @ leaves["w"]).pow(4).sum()

    x = torch.eye(4).double() + 1
    graph = trace_product(loss, W, {}, x, [x])
    value, *kept = graph.first(W["w"], x)
    torch.testing.assert_close(value, (x @ W["w"]).pow(4).sum())
    inputs = [(W["w"], x)[i] for i in graph.inputs]
    v = torch.tensor([1.0, -2.0, 0.5, 3.0]).double()
    hessian = x.T @ torch.diag(12 * (x @ W["w"]) ** 2) @ x
    torch.testing.assert_close(graph.second(*inputs, *kept, v)[0], hessian @ v)
    # Products of a matrix with the parameters are made once, in the first part.
    heavy = [n for n in graph.second.graph.nodes if "mv" in str(n.target) or "mm" in str(n.target)]
    assert len(heavy) == 2


@pytest.mark.parametrize("value", [0, -1, True, 1.5])
def test_max_shapes_must_be_a_positive_integer(value):
    with pytest.raises((InvalidArgumentError, TypeError), match="max_shapes"):
        CompiledProducts(max_shapes=value)


@needs_compiler
def test_settings_of_pytorch_are_left_as_they_were():
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    def settings():
        kinds = (bool, int, float, str, type(None))
        configs = [c.get_config_copy() for c in (dynamo, inductor)]
        plain = [{n: v for n, v in c.items() if isinstance(v, kinds)} for c in configs]
        return plain, torch.is_grad_enabled(), torch.get_num_threads()

    before = settings()
    CompiledProducts().prepare(
        lambda leaves, others, x: (leaves["w"] * x).cos().sum(), W, {}, torch.ones(4).double()
    )
    assert settings() == before
