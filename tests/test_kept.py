"""Graphs kept between products: the same numbers, counted memory, nothing left behind."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import flatminima as fm
from flatminima.derivatives.hand_written import PIECES
from flatminima.derivatives.substitution import Substitution
from flatminima.operators.products import graph_cache as kept

REPLACING = set(PIECES) - {"channels_last"}

X = torch.randn(24, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(24, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Counted(nn.Sequential):
    """Counts its forwards."""

    forwards = 0

    def forward(self, x):
        Counted.forwards += 1
        return super().forward(x)


@pytest.fixture(autouse=True)
def _from_zero():
    Counted.forwards = 0


def net(*between):
    torch.manual_seed(0)
    layers = [nn.Linear(5, 7), *between, nn.Tanh(), nn.Linear(7, 2)]
    return Counted(*layers).double()


def objective_of(model=None, batch_size=8, **options):
    return fm.Objective(model or net(), nn.MSELoss(), (X, Y), batch_size=batch_size, **options)


def vectors_for(objective, k=1, seed=2):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(objective.size, k, generator=generator, dtype=torch.float64)
    return drawn[:, 0] if k == 1 else drawn


def dense(objective):
    plain = fm.HessianOperator(objective, keep_graph=False)
    return plain @ torch.eye(objective.size, dtype=torch.float64)


# ----------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("keep_graph", ["auto", True, False])
def test_products_of_a_session_are_those_without(keep_graph):
    objective = objective_of()
    hessian = dense(objective)
    operator = fm.HessianOperator(objective, keep_graph=keep_graph)
    block = vectors_for(objective, 3)
    with operator.session():
        for seed in range(4):
            vector = vectors_for(objective, seed=seed)
            torch.testing.assert_close(operator @ vector, hessian @ vector)
            torch.testing.assert_close(operator @ block, hessian @ block)
        assert (operator.kept_bytes > 0) == (keep_graph is not False)
    assert operator.kept_bytes == 0
    torch.testing.assert_close(operator @ block, hessian @ block)


def test_forwards_are_run_twice_in_a_session_however_many_products_there_are():
    objective = objective_of()
    operator = fm.HessianOperator(objective)
    with operator.session():
        for _ in range(6):
            operator @ vectors_for(objective)
    # The first pass looks whether the model writes to its tensors, the second keeps the graphs.
    assert Counted.forwards == 2 * 3
    for _ in range(3):
        operator @ vectors_for(objective)
    assert Counted.forwards == 5 * 3


def test_without_keeping_each_product_runs_forward():
    objective = objective_of()
    operator = fm.HessianOperator(objective, keep_graph=False)
    with operator.session():
        for _ in range(4):
            operator @ vectors_for(objective)
    assert Counted.forwards == 4 * 3


@pytest.mark.parametrize(
    "call",
    [
        lambda o: fm.lanczos(o, k=3),
        lambda o: fm.power_iteration(o, k=1, max_products=30, tol=0.5),
        lambda o: fm.trace(o, products=20),
    ],
    ids=["lanczos", "power_iteration", "trace"],
)
def test_algorithms_keep_graphs_by_themselves_and_free_them(call):
    operator = fm.HessianOperator(objective_of())
    operator @ vectors_for(operator.objective)
    Counted.forwards = 0
    call(operator)
    assert Counted.forwards == 3
    assert operator.kept_bytes == 0


def test_a_report_builds_the_graphs_once_for_all_its_measures():
    data = list(zip(X.split(8), Y.split(8), strict=True))
    measures = ["eigenvalues", "trace"]
    fm.sharpness(net(), nn.MSELoss(), data, measures=measures, progress=False)
    # The loss, the look at the graph, and the graphs that are kept.
    assert Counted.forwards == 3 * 3


def test_masks_of_dropout_are_kept_too():
    objective = objective_of(net(nn.Dropout(0.4)), mode="train")
    hessian = dense(objective)
    operator = fm.HessianOperator(objective)
    with operator.session():
        for seed in range(3):
            vector = vectors_for(objective, seed=seed)
            torch.testing.assert_close(operator @ vector, hessian @ vector)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = Counted(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh()).double()
        self.outer = nn.Linear(7, 2).double()

    def forward(self, x):
        return self.outer(checkpoint(self.inner, x, use_reentrant=False))


def test_checkpointed_parts_are_run_again_with_the_right_tensors():
    objective = objective_of(Checkpointed())
    hessian = dense(objective)
    operator = fm.HessianOperator(objective)
    with operator.session():
        for seed in range(4):
            vector = vectors_for(objective, seed=seed)
            torch.testing.assert_close(operator @ vector, hessian @ vector)
    assert all(p.grad is None and p.is_leaf for p in objective.model.parameters())


# ----------------------------------------------------------------------------------------- budget


def saved_bytes(model, batches):
    """Counted here once more: what is saved for the gradient's graph, in its own storages."""
    total = 0
    for x, y in batches:
        own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), x, y]}
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            with Substitution(REPLACING):
                loss = nn.MSELoss()(model(x), y)
            held = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        total += sum(size for address, size in sizes.items() if address not in own)
        del held
    return total


def test_memory_is_counted_exactly():
    model = net()
    batches = list(zip(X.split(8), Y.split(8), strict=True))
    batches = [(x.clone(), y.clone()) for x, y in batches]
    operator = fm.HessianOperator(fm.Objective(model, nn.MSELoss(), batches))
    with operator.session():
        for _ in range(3):
            operator @ vectors_for(operator.objective)
            present = operator.kept_bytes
    assert present == saved_bytes(model, batches)
    # The tanh's (8, 7) result and the output's (8, 2) error are among it, in float64.
    assert present >= 3 * 8 * (8 * 7 + 8 * 2)


@pytest.mark.parametrize("fitting", [0, 1, 2])
def test_what_fits_is_kept_and_the_rest_rebuilt(fitting, monkeypatch):
    objective = objective_of()
    hessian = dense(objective)
    everything = fm.HessianOperator(objective, keep_graph=True)
    with everything.session():
        for _ in range(2):
            everything @ vectors_for(objective)
        each = everything.kept_bytes // 3
    free = kept.SHARE * (each * fitting + each // 2)
    monkeypatch.setattr(kept, "available_bytes", lambda device: free)
    operator = fm.HessianOperator(objective)
    operator @ vectors_for(objective)
    with operator.session():
        operator @ vectors_for(objective)
        Counted.forwards = 0
        for seed in range(3):
            vector = vectors_for(objective, seed=seed)
            torch.testing.assert_close(operator @ vector, hessian @ vector)
        assert Counted.forwards == 3 * (3 - fitting)
        assert operator.kept_bytes == fitting * each


def test_graphs_of_all_batches_make_reading_needless():
    loader = DataLoader(TensorDataset(X, Y), batch_size=8)
    objective = fm.Objective(net(), nn.MSELoss(), loader, cache=False)
    hessian = dense(objective)
    operator = fm.HessianOperator(objective)
    with operator.session():
        operator @ vectors_for(objective)
        operator @ vectors_for(objective)
        before = objective.batches.readings
        for seed in range(3):
            vector = vectors_for(objective, seed=seed)
            torch.testing.assert_close(operator @ vector, hessian @ vector)
        assert objective.batches.readings == before


def test_batches_of_weight_zero_are_passed_over():
    data = list(zip(X.split(8), Y.split(8), strict=True))
    weight = lambda batch: 0.0 if batch[0][0, 0] == X[8, 0] else 8.0  # noqa: E731
    objective = fm.Objective(net(), nn.MSELoss(), data, weight=weight)
    hessian = dense(objective)
    operator = fm.HessianOperator(objective)
    operator @ vectors_for(objective)
    with operator.session():
        Counted.forwards = 0
        for seed in range(3):
            vector = vectors_for(objective, seed=seed)
            torch.testing.assert_close(operator @ vector, hessian @ vector)
    assert Counted.forwards == 2


# ---------------------------------------------------------------------------------------- freeing


class Stop(BaseException):
    pass


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, Stop])
def test_nothing_outlives_the_session(error):
    operator = fm.HessianOperator(objective_of())
    held = []
    try:
        with operator.session(), operator.session():
            for _ in range(3):
                operator @ vectors_for(operator.objective)
            for seen in operator._cache.seen.values():
                held += [weakref.ref(seen.loss), *map(weakref.ref, seen.tensors.values())]
            del seen
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt, Stop):
        pass
    gc.collect()
    assert len(held) == 3 * 5
    assert all(reference() is None for reference in held)
    assert operator.kept_bytes == 0


def test_an_inner_session_does_not_end_the_outer_one():
    operator = fm.HessianOperator(objective_of())
    with operator.session():
        fm.trace(operator, products=3)
        fm.trace(operator, products=3)
        Counted.forwards = 0
        fm.lanczos(operator)
        assert operator.kept_bytes > 0
        assert Counted.forwards == 0


def test_an_error_in_the_pass_that_keeps_leaves_nothing_behind():
    class Failing(Counted):
        fails = False

        def forward(self, x):
            if Failing.fails and float(x[0, 0]) == float(X[16, 0]):
                raise ValueError("third batch")
            return super().forward(x)

    torch.manual_seed(0)
    model = Failing(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).double()
    operator = fm.HessianOperator(objective_of(model))
    vector = vectors_for(operator.objective)
    expected = operator @ vector
    with operator.session():
        Failing.fails = True
        with pytest.raises(ValueError, match="third batch"):
            operator @ vector
        assert operator.kept_bytes == 0
        Failing.fails = False
        for _ in range(2):
            torch.testing.assert_close(operator @ vector, expected)


# ---------------------------------------------------------------------------------------- changes


def step(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def write_data(model):
    model[0].weight.data.mul_(2.0)


def replace_data(model):
    model[0].weight.data = 2 * model[0].weight.data


def load(model):
    model.load_state_dict({n: 2 * t for n, t in model.state_dict().items()})


def move_statistics(model):
    model[1].running_var.mul_(4.0)


@pytest.mark.parametrize("change", [step, write_data, replace_data, load, move_statistics])
def test_a_model_that_changes_meanwhile_gets_new_graphs(change):
    model = net(nn.BatchNorm1d(7))
    objective = objective_of(model)
    operator = fm.HessianOperator(objective)
    vector = vectors_for(objective)
    with operator.session():
        for _ in range(3):
            before = operator @ vector
        change(model)
        expected = dense(objective) @ vector
        assert not torch.allclose(expected, before)
        for _ in range(3):
            torch.testing.assert_close(operator @ vector, expected)


def test_training_flags_that_change_meanwhile_are_seen():
    model = net(nn.BatchNorm1d(7)).eval()
    objective = objective_of(model, mode="keep")
    operator = fm.HessianOperator(objective)
    vector = vectors_for(objective)
    with operator.session():
        for _ in range(3):
            before = operator @ vector
        model.train()
        expected = dense(objective) @ vector
        assert not torch.allclose(expected, before)
        torch.testing.assert_close(operator @ vector, expected)


# ------------------------------------------------------------------------------------- exceptions


def test_batches_in_pieces_are_not_kept():
    objective = objective_of(microbatch=3)
    hessian = dense(objective)
    operator = fm.HessianOperator(objective, keep_graph=True)
    with operator.session():
        for seed in range(3):
            vector = vectors_for(objective, seed=seed)
            torch.testing.assert_close(operator @ vector, hessian @ vector)
        assert operator.kept_bytes == 0


class Writing(nn.Module):
    """Counts its forwards in a tensor that is none of its buffers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = net()
        self.calls = torch.zeros(())

    def forward(self, x):
        self.calls += 1
        return self.inner(x)


def test_models_that_write_to_their_tensors_are_run_forward_each_time():
    objective = objective_of(Writing())
    hessian = dense(objective)
    operator = fm.HessianOperator(objective, keep_graph=True)
    with operator.session():
        for seed in range(3):
            vector = vectors_for(objective, seed=seed)
            torch.testing.assert_close(operator @ vector, hessian @ vector)
        assert operator.kept_bytes == 0


def test_transforms_within_the_model_that_allow_no_hooks_are_left_alone():
    def loss(model, batch):
        x, y = batch
        slopes = torch.func.vmap(torch.func.grad(lambda row: model(row[None]).sum()))(x)
        return F.mse_loss(model(x), y) + slopes.square().mean()

    objective = fm.Objective(net(), data=[(X, Y)], batch_loss=loss)
    hessian = dense(objective)
    operator = fm.HessianOperator(objective, keep_graph=True)
    with operator.session():
        for seed in range(4):
            vector = vectors_for(objective, seed=seed)
            torch.testing.assert_close(operator @ vector, hessian @ vector)
        assert operator.kept_bytes == 0


@pytest.mark.parametrize("session", [False, True])
def test_what_is_overwritten_after_it_was_saved_is_refused_as_without(session):
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()
            self.overwrites = False

        def forward(self, x):
            out = self.inner(x).exp()
            return out.add_(1.0) if self.overwrites else out + 1.0

    model = Overwriting()
    operator = fm.HessianOperator(objective_of(model), keep_graph=session)
    vector = vectors_for(operator.objective)
    with operator.session():
        operator @ vector
        model.overwrites = True
        with pytest.raises((RuntimeError, fm.GraphError), match=r"inplace|in place|in-place"):
            operator @ vector


@pytest.mark.parametrize("keep_graph", ["yes", 1, None])
def test_other_options_are_refused(keep_graph):
    with pytest.raises(fm.InvalidArgumentError, match=r"keep_graph.*True, False or 'auto'"):
        fm.HessianOperator(objective_of(), keep_graph=keep_graph)


def test_operators_without_graphs_have_sessions_too():
    operator = fm.MatrixOperator(torch.eye(3))
    with operator.session(), operator.session():
        assert torch.equal(operator @ torch.ones(3), torch.ones(3))


# ------------------------------------------------------------------------- what else may change


def check_change(model, loss_fn, change, **options):
    """Products after a change within a session are those of a fresh operator."""
    objective = fm.Objective(model, loss_fn, (X, Y), batch_size=8, **options)
    operator = fm.HessianOperator(objective)
    vector = vectors_for(objective)
    with operator.session():
        for _ in range(3):
            before = operator @ vector
        assert operator.kept_bytes > 0
        change()
        expected = dense(objective) @ vector
        assert not torch.allclose(expected, before)
        for _ in range(3):
            torch.testing.assert_close(operator @ vector, expected)


class Scaled(nn.Module):
    """With settings of every kind among its attributes."""

    def __init__(self):
        super().__init__()
        self.inner = net()
        self.factor, self.factors, self.table = 1.0, [1.0], {"x": 1.0}
        self.weights = torch.ones(2, dtype=torch.float64)

    def forward(self, x):
        factor = self.factor * self.factors[0] * self.table["x"]
        return factor * self.inner(x) * self.weights


CHANGES = {
    "number": lambda m: setattr(m, "factor", 2.0),
    "list": lambda m: m.factors.__setitem__(0, 2.0),
    "mapping": lambda m: m.table.update(x=2.0),
    "tensor": lambda m: setattr(m, "weights", torch.full((2,), 2.0, dtype=torch.float64)),
    "written": lambda m: m.weights.mul_(2.0),
    "module": lambda m: m.inner.__setitem__(1, nn.Sigmoid()),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_attributes_that_change_meanwhile_are_seen(kind):
    model = Scaled()
    check_change(model, nn.MSELoss(), lambda: CHANGES[kind](model))


class Weighted(nn.Module):
    """A loss function with tensors of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.register_buffer("weight", torch.ones(2, dtype=torch.float64))
        self.shifts = [torch.zeros(2, dtype=torch.float64)]

    def forward(self, output, target):
        squares = (output.tanh() * self.scale + self.shifts[0] - target).square()
        return (squares * self.weight).mean()


def double(tensor):
    with torch.no_grad():
        tensor.mul_(2.0)


OF_LOSS = {
    "written": lambda c: double(c.scale),
    "parameter": lambda c: setattr(c, "scale", nn.Parameter(2 * c.scale.detach())),
    "buffer": lambda c: setattr(c, "weight", torch.tensor([1.0, 3.0], dtype=torch.float64)),
    "list": lambda c: c.shifts.__setitem__(0, torch.ones(2, dtype=torch.float64)),
}


@pytest.mark.parametrize("kind", OF_LOSS)
def test_tensors_of_the_loss_function_that_change_meanwhile_are_seen(kind):
    criterion = Weighted()
    check_change(net(), criterion, lambda: OF_LOSS[kind](criterion))


def test_a_loss_function_that_changes_meanwhile_is_seen():
    loss_fn = nn.HuberLoss(delta=0.1)
    check_change(net(), loss_fn, lambda: setattr(loss_fn, "delta", 0.5))


def test_data_that_are_written_to_meanwhile_are_seen():
    data = [(X.clone(), Y.clone())]
    objective = fm.Objective(net(), nn.MSELoss(), data)
    operator = fm.HessianOperator(objective)
    vector = vectors_for(objective)
    with operator.session():
        for _ in range(3):
            operator @ vector
        data[0][0].mul_(2.0)
        torch.testing.assert_close(operator @ vector, dense(objective) @ vector)


def test_buffers_that_hold_nan_do_not_keep_graphs_from_being_kept():
    model = net()
    model.register_buffer("unused", torch.full((2,), torch.nan))
    operator = fm.HessianOperator(objective_of(model))
    with operator.session():
        for _ in range(5):
            operator @ vectors_for(operator.objective)
    assert Counted.forwards == 2 * 3


def test_graphs_of_some_parameters_are_kept_beside_others_that_require_grad():
    objective = objective_of(params="2.*")
    operator = fm.HessianOperator(objective)
    with operator.session():
        for _ in range(3):
            operator @ vectors_for(objective)
        # The layers that are not selected are the model's own memory.
        assert 0 < operator.kept_bytes < 24 * 8 * 40
    assert Counted.forwards == 2 * 3


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(5, 2).double()
        self.adjacency = torch.eye(24, dtype=torch.float64).to_sparse()

    def forward(self, x):
        return torch.sparse.mm(self.adjacency, torch.tanh(self.inner(x)))


@pytest.mark.parametrize("place", ["attribute", "buffer", "batch"])
def test_sparse_tensors_are_kept_too(place):
    model, batch_loss, data = Graph(), None, (X, Y)
    if place == "buffer":
        adjacency = vars(model).pop("adjacency")
        model.register_buffer("adjacency", adjacency)
    if place == "batch":
        data = [(X.to_sparse(), Y)]

        def batch_loss(model, batch):
            x, y = batch
            return F.mse_loss(torch.sparse.mm(x, model.inner.weight.T).tanh(), y)

    loss_fn = nn.MSELoss() if batch_loss is None else None
    objective = fm.Objective(model, loss_fn, data, batch_loss=batch_loss)
    hessian = dense(objective)
    operator = fm.HessianOperator(objective)
    with operator.session():
        for seed in range(3):
            vector = vectors_for(objective, seed=seed)
            torch.testing.assert_close(operator @ vector, hessian @ vector)
        assert operator.kept_bytes > 0
    fm.lanczos(operator)
