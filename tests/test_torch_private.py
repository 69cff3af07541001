"""Each private part of PyTorch that the package uses, alone: a failure says which one broke."""

import ast
import contextlib
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import flatminima as fm
from flatminima.derivatives import torch_private as private
from flatminima.derivatives.gradients import nodes

PACKAGE = Path(fm.__file__).parent

DEPENDS = {
    "BATCH_NORM": "recomputed statistics, microbatches and notes of reports",
    "BATCH_NORM_BACKWARD": "the hand-written derivative of batch norm",
    "COMPILED_PREFIX": "names of parameters in state dicts of compiled models",
    "CONVOLUTION": "the hand-written derivative of convolutions",
    "CONVOLUTION_BACKWARD": "the hand-written derivative of convolutions",
    "CONVOLUTION_LAYER": "rescaling and matching of convolutions",
    "DROPOUT": "the note 'dropout off' and the refusal of microbatches",
    "HOOKS": "putting hooks back, and noticing that they changed",
    "LOSS": "the weights of batches",
    "NORMALIZATION": "rescaling and matching across normalisations",
    "PADDING": "rescaling and matching across paddings",
    "POOLING": "rescaling and matching across poolings",
    "SAFE_SOFTMAX": "the hand-written derivative of attention with a mask",
    "SOFTMAX_BACKWARD": "the hand-written derivative of attention",
    "TENSOR_DICTS": "putting parameters, buffers and submodules back",
    "TRANSPOSED_CONVOLUTION": "relative flatness of transposed convolutions",
    "WEIGHT_NORM": "correct Hessians of models with weight norm",
    "buffers_of": "recomputed statistics and copies of a criterion's buffers",
    "checkpoints_noticed": "correct products of checkpointed models",
    "compiled_inside": "measuring compiled models",
    "dynamo_is_loaded": "running compiled parts of a model eagerly",
    "edge_of": "products with kept graphs, without the memory of the gradient",
    "has_backward_hooks": "knowing PyTorch's own losses",
    "has_equal_sizes": "the hand-written derivative of nn.MultiheadAttention",
    "has_own_forward": "rescaling, and knowing PyTorch's own losses",
    "has_weight_norm": "correct Hessians of models with weight norm",
    "in_transform": "models that use torch.func or forward-mode differentiation",
    "is_cpp_function": "channels last in models with functions written in C++",
    "is_fused_weight_norm": "finding weight norm outside of modules",
    "is_once_differentiable": "finding operations without a second derivative",
    "is_pytorchs": "leaving functions alone that another library has wrapped",
    "is_reentrant_checkpoint": "gradients of reentrant checkpointing",
    "leaf_of": "gradients of reentrant checkpointing, and finding faulty operations",
    "missing_derivative": "differences where a second derivative is missing",
    "names_of_weights": "the hand-written derivative of nn.LSTM",
    "no_checkpoint_warning": "losses of checkpointed models without a warning",
    "node_function": "finding operations without a second derivative",
    "parameters_of": "rescaling and matching",
    "parts_of_sparse": "counting the memory of kept graphs",
    "readable_function": "naming a function of the user's in an error",
    "refuses_saved_tensor_hooks": "products of models that use torch.func",
    "replaced_tensors": "every evaluation of a model at replaced parameters",
    "says_written_to": "rebuilding graphs of tensors that were written to",
    "uncached_parametrizations": "derivatives inside of parametrize.cached()",
    "version": "noticing that a tensor was written to",
}


@contextlib.contextmanager
def mechanism(name):
    """The part of that name; whatever goes wrong with it is told with what depends on it."""
    try:
        yield getattr(private, name)
    except Exception as error:
        pytest.fail(
            f"{name} in derivatives/torch_private.py does not work with torch "
            f"{torch.__version__}: {type(error).__name__}: {error}. On it depends: {DEPENDS[name]}."
        )


def equal(a, b):
    torch.testing.assert_close(a, b)
    return True


def test_every_part_has_a_test_and_a_purpose():
    tested = re.findall(r'mechanism\("(\w+)"\)', Path(__file__).read_text(encoding="utf-8"))
    assert set(private.__all__) == set(DEPENDS)
    assert set(tested) - {"nonsense"} == set(DEPENDS)


def test_a_failure_names_the_part_and_what_depends_on_it(monkeypatch):
    monkeypatch.setitem(DEPENDS, "nonsense", "nothing")
    with (
        pytest.raises(pytest.fail.Exception, match=r"nonsense in .* On it depends: nothing"),
        mechanism("nonsense"),
    ):
        pass


# ---------------------------------------------------------------------------------- operations

X = torch.arange(24.0).reshape(2, 3, 4).sin().requires_grad_()


def test_convolution():
    with mechanism("CONVOLUTION") as convolution:
        weight = torch.ones(2, 3, 2)
        found = convolution(X, weight, None, [1], [0], [1], False, [0], 1)
        assert equal(found, F.conv1d(X, weight))


def test_convolution_backward():
    with mechanism("CONVOLUTION_BACKWARD") as backward:
        weight = torch.ones(2, 3, 2, requires_grad=True)
        out = F.conv1d(X, weight)
        d_out = out.detach().cos()
        options = [1], [0], [1], False, [0], 1
        found = backward(d_out, X, weight, [2], *options, [True, True, True])
        expected = torch.autograd.grad(out, [X, weight], d_out)
        assert equal(list(found[:2]), list(expected))
        assert equal(found[2], d_out.sum((0, 2)))


def test_batch_norm_backward():
    with mechanism("BATCH_NORM_BACKWARD") as backward:
        weight, bias = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
        mean, var = torch.arange(3.0), torch.arange(3.0) + 1
        out = F.batch_norm(X, mean, var, weight, bias)
        d_out = out.detach().cos()
        options = None, None, False, 1e-5, [True, True, True]
        found = backward(d_out, X, weight, mean, var, *options)
        expected = torch.autograd.grad(out, [X, weight, bias], d_out)
        assert equal(list(found), list(expected))


def test_safe_softmax():
    with mechanism("SAFE_SOFTMAX") as softmax:
        scores = torch.tensor([[1.0, 2.0], [-torch.inf, -torch.inf]])
        expected = torch.stack([scores[0].softmax(-1), torch.zeros(2)])
        assert equal(softmax(scores, -1), expected)


def test_softmax_backward():
    with mechanism("SOFTMAX_BACKWARD") as backward:
        out = X.softmax(-1)
        d_out = out.detach().cos()
        found = backward(d_out, out.detach(), -1, X.dtype)
        assert equal(found, torch.autograd.grad(out, X, d_out)[0])


def weight_normed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        hooked = torch.nn.utils.weight_norm(nn.Linear(2, 3))
    return [hooked, parametrizations.weight_norm(nn.Linear(2, 3))]


@pytest.mark.parametrize("number", [0, 1])
def test_weight_norm(number):
    called = []

    class Calls(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            called.append(func)
            return func(*args, **(kwargs or {}))

    with mechanism("WEIGHT_NORM") as function:
        module = weight_normed()[number]
        with Calls():
            module(torch.ones(1, 2))
        assert function in called


# ------------------------------------------------------------------------------- kinds of module


class Outside(nn.modules.batchnorm.BatchNorm1d):
    pass


@pytest.mark.parametrize(
    ("name", "members", "others"),
    [
        (
            "BATCH_NORM",
            [nn.BatchNorm2d(1), nn.SyncBatchNorm(1), Outside(1)],
            [nn.InstanceNorm1d(1)],
        ),
        ("NORMALIZATION", [nn.BatchNorm1d(1), nn.InstanceNorm2d(1)], [nn.LayerNorm(1)]),
        ("CONVOLUTION_LAYER", [nn.Conv1d(1, 1, 1), nn.ConvTranspose3d(1, 1, 1)], [nn.Linear(1, 1)]),
        ("TRANSPOSED_CONVOLUTION", [nn.ConvTranspose1d(1, 1, 1)], [nn.Conv1d(1, 1, 1)]),
        ("DROPOUT", [nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout()], [nn.ReLU()]),
        ("LOSS", [nn.MSELoss(), nn.CrossEntropyLoss(), nn.CTCLoss()], [nn.ReLU()]),
        (
            "POOLING",
            [
                *(nn.MaxPool1d(1), nn.AvgPool2d(1)),
                *(nn.AdaptiveMaxPool2d(1), nn.AdaptiveAvgPool3d(1)),
            ],
            [nn.LPPool1d(2, 1)],
        ),
        (
            "PADDING",
            [nn.ReflectionPad1d(1), nn.ReplicationPad2d(1), nn.CircularPad3d(1)],
            [nn.ConstantPad1d(1, 2.0)],
        ),
    ],
)
def test_kinds_of_module(name, members, others):
    # mechanism("BATCH_NORM") mechanism("NORMALIZATION") mechanism("CONVOLUTION_LAYER")
    # mechanism("TRANSPOSED_CONVOLUTION") mechanism("DROPOUT") mechanism("LOSS")
    # mechanism("POOLING") mechanism("PADDING")
    with mechanism(name) as kind:
        assert all(isinstance(m, kind) for m in members)
        assert not any(isinstance(m, kind) for m in others)


# ---------------------------------------------------------------------------- insides of modules


def test_dictionaries_of_tensors():
    with mechanism("TENSOR_DICTS") as names:
        module = nn.BatchNorm1d(2)
        module.inner = nn.ReLU()
        held = [v for name in names for v in vars(module)[name].values()]
        everything = [*module.parameters(), *module.buffers(), module.inner]
        assert {id(v) for v in held} == {id(v) for v in everything}


def test_dictionaries_of_hooks():
    with mechanism("HOOKS") as names:
        module = nn.Linear(1, 1)

        def hook(*args):
            pass

        for register in (
            module.register_forward_hook,
            module.register_forward_pre_hook,
            module.register_full_backward_hook,
            module.register_full_backward_pre_hook,
            module.register_state_dict_pre_hook,
            module.register_load_state_dict_post_hook,
        ):
            count = sum(len(vars(module)[n]) for n in names)
            register(hook)
            assert sum(len(vars(module)[n]) for n in names) == count + 1


def test_parameters_of():
    with mechanism("parameters_of") as parameters_of:
        own = parameters_of(nn.Sequential(nn.Linear(1, 2, bias=False))[0])
        assert (list(own), own["bias"]) == (["weight", "bias"], None)


def test_buffers_of():
    with mechanism("buffers_of") as buffers_of:
        module = nn.BatchNorm1d(2)
        assert list(buffers_of(module)) == ["running_mean", "running_var", "num_batches_tracked"]
        buffers_of(module)["running_mean"] = None
        assert module.running_mean is None


def test_has_own_forward():
    with mechanism("has_own_forward") as has_own_forward:
        assert not has_own_forward(nn.ReLU())
        for register in ("register_forward_hook", "register_forward_pre_hook"):
            module = nn.ReLU()
            handle = getattr(module, register)(lambda *args: None)
            assert has_own_forward(module)
            handle.remove()
            assert not has_own_forward(module)
        module.forward = lambda x: x
        assert has_own_forward(module)


def test_has_backward_hooks():
    with mechanism("has_backward_hooks") as has_backward_hooks:
        module = nn.ReLU()
        assert not has_backward_hooks(module)
        module.register_full_backward_hook(lambda *args: None)
        assert has_backward_hooks(module)


def test_names_of_weights():
    with mechanism("names_of_weights") as names_of_weights:
        names = names_of_weights(nn.LSTM(2, 3, 2, bidirectional=True))
        assert len(names) == 4
        assert names[1] == [
            f"{n}_l0_reverse" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ]
        assert names_of_weights(nn.LSTM(2, 3, bias=False)) == [["weight_ih_l0", "weight_hh_l0"]]


def test_has_equal_sizes():
    with mechanism("has_equal_sizes") as has_equal_sizes:
        assert has_equal_sizes(nn.MultiheadAttention(4, 2))
        assert not has_equal_sizes(nn.MultiheadAttention(4, 2, kdim=3))


def test_has_weight_norm():
    with mechanism("has_weight_norm") as has_weight_norm:
        for module in weight_normed():
            assert any(map(has_weight_norm, module.modules()))
        other = parametrizations.spectral_norm(nn.Linear(2, 2))
        assert not any(map(has_weight_norm, other.modules()))


def compiled(module, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what the compiler itself imports
        return torch.compile(module, **options)


def test_compiled_inside():
    with mechanism("compiled_inside") as compiled_inside:
        module = nn.Linear(1, 1)
        assert compiled_inside(compiled(module)) is module
        assert compiled_inside(module) is None
        assert compiled_inside(nn.DataParallel(module)) is None


def test_compiled_prefix():
    with mechanism("COMPILED_PREFIX") as prefix:
        names = [n for n, _ in compiled(nn.Linear(1, 1)).named_parameters()]
        assert names == [f"{prefix}weight", f"{prefix}bias"]


def test_replaced_tensors():
    with mechanism("replaced_tensors") as replaced_tensors:
        module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        module[1].weight = own = module[0].weight
        other = torch.ones(2, 2)
        with replaced_tensors(module, {"0.weight": other}):
            assert module[0].weight is other
            assert module[1].weight is other
        assert module[0].weight is own
        assert module[1].weight is own


def test_is_pytorchs():
    with mechanism("is_pytorchs") as is_pytorchs:
        assert is_pytorchs(F.multi_head_attention_forward, F)
        assert is_pytorchs(nn.LSTM.forward, nn.modules.rnn)
        assert is_pytorchs(nn.MultiheadAttention.forward, nn.modules.activation)
        assert not is_pytorchs(lambda *args: None, F)
        assert not is_pytorchs(len, F)


# --------------------------------------------------------------------------- insides of tensors


def test_version():
    with mechanism("version") as version:
        x = torch.zeros(3)
        before = version(x)
        assert version(x) == before
        x.view(-1)[0] = 1
        assert version(x) > before


def test_parts_of_sparse():
    with mechanism("parts_of_sparse") as parts_of_sparse:
        x = torch.eye(4)
        assert parts_of_sparse(x) == []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # sparse tensors are in beta
            kinds = [x.to_sparse(), x.to_sparse_csr(), x.to_sparse_csc()]
            kinds += [x.to_sparse_bsr((2, 2)), x.to_sparse_bsc((2, 2))]
        for sparse in kinds:
            parts = parts_of_sparse(sparse)
            assert len(parts) == (2 if sparse.layout == torch.sparse_coo else 3)
            assert parts[-1].sum() == 4
            assert all(p.layout == torch.strided for p in parts)


# ---------------------------------------------------------------------------- nodes of a graph


class Own(Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


class Once(Own):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * 2


def leaf():
    return torch.ones(3, requires_grad=True)


def test_edge_of():
    with mechanism("edge_of") as edge_of:
        x = leaf()
        (gradient,) = torch.autograd.grad(x.pow(3).sum(), x, create_graph=True)
        seed = torch.arange(3.0)
        (product,) = torch.autograd.grad([edge_of(gradient)], x, grad_outputs=[seed])
        assert equal(product, 6 * seed)


def test_node_function():
    with mechanism("node_function") as node_function:
        assert node_function(Own.apply(leaf()).grad_fn) is Own
        assert node_function(leaf().exp().grad_fn) is None


def test_leaf_of():
    with mechanism("leaf_of") as leaf_of:
        x = leaf()
        found = [leaf_of(node) for node in nodes(x.exp())]
        assert [f is x for f in found] == [False, True]
        assert found[0] is None


def test_is_cpp_function():
    class Node:
        def __init__(self, name):
            self.name = lambda: name

    with mechanism("is_cpp_function") as is_cpp_function:
        assert is_cpp_function(Node("CppNode<Swish>"))  # compiling one would take a minute
        assert not is_cpp_function(leaf().exp().grad_fn)
        assert not is_cpp_function(Own.apply(leaf()).grad_fn)


def test_is_fused_weight_norm():
    with mechanism("is_fused_weight_norm") as is_fused_weight_norm:
        out = weight_normed()[1](torch.ones(1, 2))
        assert sum(map(is_fused_weight_norm, nodes(out))) == 1


def test_is_reentrant_checkpoint():
    with mechanism("is_reentrant_checkpoint") as is_reentrant_checkpoint:
        for reentrant in (True, False):
            out = checkpoint(torch.exp, leaf(), use_reentrant=reentrant)
            assert any(map(is_reentrant_checkpoint, nodes(out))) == reentrant


def test_is_once_differentiable():
    with mechanism("is_once_differentiable") as is_once_differentiable:
        assert is_once_differentiable(Once)
        assert not is_once_differentiable(Own)


@torch.library.custom_op("flatminima_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


doubled.register_autograd(lambda ctx, g: g * 2)


def test_readable_function():
    with mechanism("readable_function") as readable_function:
        assert readable_function(Own) == ("Own", False)
        function = private.node_function(doubled(leaf()).grad_fn)
        name, own = readable_function(function)
        assert name == "flatminima_tests_doubled_default"
        assert not own
        out = checkpoint(torch.exp, leaf(), use_reentrant=True)
        assert readable_function(private.node_function(out.grad_fn)) == ("CheckpointFunction", True)


# -------------------------------------------------------------------------- what errors say


def error_of(call):
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("there was no error")


def twice(function):
    x = leaf()
    (gradient,) = torch.autograd.grad(function(x), x, create_graph=True)
    # Not torch.autograd.grad, which may pass over once-differentiable functions.
    gradient.sum().backward()


def test_missing_derivative():
    with mechanism("missing_derivative") as missing_derivative:
        missing = error_of(lambda: twice(lambda x: F.hardsigmoid(x).square().sum()))
        assert missing_derivative(missing) == "aten::hardsigmoid_backward"
        once = error_of(lambda: twice(lambda x: Once.apply(x).square().sum()))
        assert missing_derivative(once) == ""
        assert missing_derivative(RuntimeError("another")) is None
        said = "torch.compile with aot_autograd does not currently support double backward"
        assert missing_derivative(RuntimeError(said)) == "torch.compile"


def test_compiled_functions_say_that_they_have_no_second_derivative():
    with mechanism("missing_derivative") as missing_derivative:
        function = compiled(lambda x: x.sin().sum(), backend="aot_eager")
        assert missing_derivative(error_of(lambda: twice(function))) == "torch.compile"


def test_refuses_saved_tensor_hooks():
    def transformed():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            torch.func.grad(lambda x: x.exp().sum())(torch.ones(3))

    with mechanism("refuses_saved_tensor_hooks") as refuses:
        assert refuses(error_of(transformed))
        assert not refuses(ValueError("saved tensor hooks"))
        assert not refuses(RuntimeError("another"))


def test_says_written_to():
    def written():
        x = leaf() * 1
        out = x.exp()
        out.mul_(2)
        out.sum().backward()

    with mechanism("says_written_to") as says_written_to:
        assert says_written_to(error_of(written))
        assert not says_written_to(RuntimeError("another"))


# ---------------------------------------------------------------------------- states of PyTorch


def test_in_transform():
    seen = []

    def noting(x):
        seen.append(private.in_transform())
        return x.exp().sum()

    with mechanism("in_transform") as in_transform:
        x = torch.ones(3)
        torch.func.grad(noting)(x)
        torch.func.vmap(noting)(x[None])
        with torch.autograd.forward_ad.dual_level():
            noting(x)
        assert seen == [True] * 3
        assert not in_transform()


def test_dynamo_is_loaded():
    script = (
        f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); import torch\n"
        "from flatminima.derivatives.torch_private import dynamo_is_loaded\n"
        "before = dynamo_is_loaded()\n"
        "torch.compile(torch.nn.ReLU())\n"
        "print(before, dynamo_is_loaded())"
    )
    with mechanism("dynamo_is_loaded"):
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == ["False", "True"]


def test_uncached_parametrizations():
    with mechanism("uncached_parametrizations") as uncached:
        module = parametrizations.orthogonal(nn.Linear(2, 2))
        with parametrize.cached():
            assert module.weight is module.weight
            with uncached():
                assert module.weight is not module.weight
            assert module.weight is module.weight
        with uncached():
            pass
        assert module.weight is not module.weight


def test_no_checkpoint_warning():
    with mechanism("no_checkpoint_warning") as no_checkpoint_warning:
        x = torch.ones(3)
        with pytest.warns(UserWarning, match="requires_grad"):
            checkpoint(torch.exp, x, use_reentrant=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with no_checkpoint_warning():
                checkpoint(torch.exp, x, use_reentrant=True)
        with pytest.warns(UserWarning, match="requires_grad"):
            checkpoint(torch.exp, x, use_reentrant=True)


def test_checkpoints_noticed():
    with mechanism("checkpoints_noticed") as checkpoints_noticed:
        count = []
        x = leaf()
        with checkpoints_noticed(lambda: count.append(1)):
            out = checkpoint(torch.exp, x, use_reentrant=False)
            assert len(count) == 1
        checkpoint(torch.exp, x, use_reentrant=False)
        assert len(count) == 1
        assert equal(torch.autograd.grad(out.sum(), x)[0], x.detach().exp())


# ------------------------------------------------------------------- and nobody else uses any

# Lies below derivatives/, whose names it cannot import; one call over many tensors of a GPU.
ALLOWED = {("support/vectors", "_foreach_add_")}


def test_foreach_add():
    assert hasattr(torch, "_foreach_add_"), "Layout.add in support/vectors.py depends on it"
    totals = [torch.zeros(2), torch.ones(3)]
    torch._foreach_add_(totals, [torch.ones(2), torch.ones(3)], alpha=2.0)
    assert [t.tolist() for t in totals] == [[2.0, 2.0], [3.0, 3.0, 3.0]]


def is_private(name):
    return name.startswith("_") and not name.endswith("__") and name != "_"


def own_names(trees):
    """The private names that the package itself defines."""
    found = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
    return {name for name in found if is_private(name)}


def names_of_pytorch():
    """Private names of the objects of PyTorch that the package handles."""
    objects = [torch, F, torch.Tensor, nn.Module(), nn.LSTM(1, 1), nn.MultiheadAttention(1, 1)]
    objects += [torch.ones(1, requires_grad=True).exp().grad_fn, nn.BatchNorm1d(1), torch.compile]
    objects += [parametrize, torch.utils.checkpoint, torch.autograd.forward_ad, nn.modules.conv]
    return {name for o in objects for name in dir(o) if is_private(name)}


def private_uses(tree, own, pytorchs):
    """Private names of PyTorch in a file: as attributes, in strings and in imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            of_itself = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            of_super = isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()"
            if not (of_itself or of_super) and (node.attr not in own or node.attr in pytorchs):
                yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = re.findall(r"(?<![\w.])_[a-z]\w*", node.value) if " " not in node.value else []
            yield from (w for w in words if w in pytorchs)
            yield from re.findall(r"\btorch\._\w+", node.value) if " " not in node.value else []
        elif isinstance(node, ast.Import | ast.ImportFrom):
            home = getattr(node, "module", None) or ""
            names = [a.name for a in node.names]
            if isinstance(node, ast.Import) or not node.level:
                parts = [p for n in [home, *names] for p in n.split(".")]
                yield from (p for p in parts if is_private(p) and p != "__future__")


TREES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix(): ast.parse(
        path.read_text(encoding="utf-8")
    )
    for path in sorted(PACKAGE.rglob("*.py"))
}
# Of Python, not of PyTorch.
PYTHONS = {"_getframe", "_fields"}


def test_no_other_file_touches_a_private_part_of_pytorch():
    own, pytorchs = own_names(TREES.values()), names_of_pytorch()
    found = {
        (name, use)
        for name, tree in TREES.items()
        if name != "derivatives/torch_private"
        for use in private_uses(tree, own, pytorchs)
        if use not in PYTHONS
    }
    assert found == ALLOWED


@pytest.mark.parametrize(
    ("line", "use"),
    [
        ("module._buffers['x']", "_buffers"),
        ("for m in modules: m._parameters", "_parameters"),
        ("getattr(tensor, '_version')", "_version"),
        ("torch._C._functorch.peek()", "_C"),
        ("from torch._dynamo import config", "_dynamo"),
        ("from torch.nn.modules.conv import _ConvNd", "_ConvNd"),
        ("'torch._dynamo' in sys.modules", "torch._dynamo"),
        ("nn.modules.conv._ConvNd", "_ConvNd"),
        ("F._in_projection_packed", "_in_projection_packed"),
    ],
)
def test_the_search_finds_private_parts(line, use):
    own = own_names(TREES.values())
    assert use in set(private_uses(ast.parse(line), own, names_of_pytorch()))
