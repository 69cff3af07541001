"""Every public call on every model of the zoo, undisturbed and failing, leaves all as it was."""

import contextlib
import functools
import sys
import warnings

import pytest
import torch
from torch import nn

import flatminima as fm
from exhaustive import thinned
from flatminima.report.measure_table import FAMILY
from integrity import Snapshot, bits
from zoo import NAMES, build

THOROUGH = (
    "mlp_batch_norm_dropout_train",
    "lstm_language_model",
    "transformer_encoder",
    "checkpointed_reentrant",
    "weight_norm_hooks",
    "spectral_norm_hooks",
    "compiled_module",
    "once_differentiable",
)
"""Cases on which each kind of failure is tried at each event; on the others they take turns."""


@pytest.fixture(autouse=True)
def _small_budgets(monkeypatch):
    boxes = {"epsilon": 1e-3}, {"epsilon": 1e-3, "subspace": 100}
    monkeypatch.setitem(FAMILY, "epsilon_sharpness", (fm.epsilon_sharpness, boxes))


@contextlib.contextmanager
def quiet():
    """Without the warnings that budgets were small and products are differences."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fm.ConvergenceWarning)
        warnings.simplefilter("ignore", fm.FiniteDifferenceWarning)
        yield


def told(complaints):
    """Fail with all of the complaints, if there are any."""
    if found := list(complaints):
        pytest.fail("\n".join(found), pytrace=False)


# -------------------------------------------------------------------- around every public call


class Bench:
    """A case with what the calls need, made beforehand."""

    def __init__(self, case, mode, **options):
        self.case, self.mode, self.options = case, mode, options
        self.objective = self.make()
        self.operator = fm.HessianOperator(self.objective)
        self.differences = fm.HessianOperator(self.objective, method="finite_differences")
        self.step = torch.full((self.objective.size,), 0.01, dtype=self.objective.dtype)
        self.state = {n: t.detach() for n, t in self.objective.model.state_dict().items()}
        positions = range(len(self.objective.layout.names))
        self.blocks = [list(positions[:1]), list(positions[1:])]

    def make(self, **options):
        return self.case.objective(**{"mode": self.mode, **self.options, **options})

    def smallest(self):
        """The name of the smallest tensor by which the loss has a gradient beyond rounding."""
        gradient = self.objective.gradient()
        gradient = gradient.where(gradient.abs() > 1e-4 * gradient.abs().max(), 0)
        used = [
            (p.stop - p.start, n) for n, p in self.objective.layout.slices() if gradient[p].any()
        ]
        return min(used)[1]

    def report(self):
        case = self.case
        # The maximisation takes the most time, and has a call of its own.
        some = ("gradient_norm", "random_sharpness", "eigenvalues", "trace")
        options = {
            "loss_fn": case.loss_fn,
            "batch_loss": case.batch_loss,
            "data": case.batches,
            "weight": case.weight,
            **self.options,
        }
        found = fm.sharpness(
            case.model,
            **options,
            measures=None if self.mode == case.mode else some,
            mode=self.mode,
            params=self.smallest(),
            eigenvalues=1,
            trace_products=2,
            samples=1,
        )
        return fm.compare({"one": found, "two": found})


def by_outputs(matrix, **options):
    """A product with a matrix that looks at the outputs, of cases that show them."""

    def call(bench):
        if bench.case.loss_fn is None:
            return
        operator = matrix(bench.objective, **options)
        # Some losses are no likelihood, and some examples cannot be told apart.
        with contextlib.suppress(fm.InvalidArgumentError):
            operator.matmat(torch.stack([bench.step, -bench.step], dim=1))

    return call


def allowed(measure, **options):
    """A measure of models that allow it: some have no matrices, tensors of zeros, no outputs."""

    def call(bench):
        with contextlib.suppress(fm.InvalidArgumentError):
            measure(bench.objective, **options)

    return call


def allowed_curve(bench):
    """Statistics recomputed at a point, where the loss does not refuse that."""
    with contextlib.suppress(fm.InvalidArgumentError):
        fm.interpolate(
            bench.objective, bench.case.unwrapped, bench.state, alphas=[0.5], buffers="recompute"
        )


def recorded(bench):
    """Two snapshots of a model."""
    trajectory = fm.Trajectory(bench.case.unwrapped)
    trajectory.record(0)
    trajectory.record(1)


def in_groups(bench):
    """SAM sharpness of halves of the data, where these can be cut."""
    with contextlib.suppress(fm.InvalidArgumentError):
        fm.sam_sharpness(bench.objective, m=max(1, bench.objective.examples // 2))


CALLS = {
    "Objective": lambda b: b.make(),
    "Objective read anew": lambda b: b.make(cache=False).loss(),
    "Objective, modes kept": lambda b: b.make(mode="keep").gradient(),
    "repr": lambda b: (repr(b.objective), repr(b.operator)),
    "point": lambda b: b.objective.point().zero_(),
    "loss": lambda b: b.objective.loss(),
    "loss_at": lambda b: b.objective.loss_at(b.step),
    "gradient": lambda b: b.objective.gradient(),
    "value_and_gradient": lambda b: b.objective.value_and_gradient(),
    "value_and_gradient displaced": lambda b: b.objective.value_and_gradient(b.step),
    "evaluate_state": lambda b: b.objective.evaluate_state(b.state),
    "losses_at": lambda b: b.objective.losses_at([b.step, -b.step]),
    "losses_at, read anew": lambda b: b.make(cache=False).losses_at([b.step, -b.step]),
    "matvec": lambda b: b.operator.matvec(b.step),
    "matvec again": lambda b: b.operator.matvec(b.step),
    "matmat": lambda b: b.operator.matmat(torch.stack([b.step, -b.step], dim=1)),
    "to_scipy": lambda b: b.operator.to_scipy().matvec(b.step.numpy()),
    "block_product": lambda b: b.operator.block_product(b.step, b.blocks),
    "finite differences": lambda b: b.differences.matvec(b.step),
    "finite differences by block": lambda b: b.differences.block_product(b.step, b.blocks),
    "Gauss–Newton": by_outputs(fm.GaussNewtonOperator),
    "Gauss–Newton by differences": by_outputs(fm.GaussNewtonOperator, method="finite_differences"),
    "Gauss–Newton diagonal": lambda b: (
        b.case.loss_fn and fm.GaussNewtonOperator(b.objective).exact_diagonal()
    ),
    "Fisher, drawn": by_outputs(fm.FisherOperator, kind="monte_carlo", samples=2),
    "Fisher, empirical": by_outputs(fm.FisherOperator, kind="empirical"),
    "preconditioned": lambda b: fm.PreconditionedOperator(b.operator, b.step).matvec(b.step),
    "lanczos": lambda b: fm.lanczos(b.operator, max_products=2),
    "power_iteration": lambda b: fm.power_iteration(b.operator, max_products=2),
    "trace": lambda b: fm.trace(b.operator, products=2),
    "spectral_density": lambda b: fm.spectral_density(b.operator, probes=2, steps=2),
    "laplace_log_evidence": lambda b: fm.laplace_log_evidence(
        b.objective, operator=b.operator, prior_precision=1e9, probes=2, steps=1
    ),
    "diagonal": lambda b: fm.diagonal(b.operator, products=2),
    "epsilon_sharpness": lambda b: fm.epsilon_sharpness(b.objective, iterations=1),
    "epsilon_sharpness in a subspace": lambda b: fm.epsilon_sharpness(
        b.objective, iterations=1, subspace=2
    ),
    "random_sharpness": lambda b: fm.random_sharpness(b.objective, samples=2, scope="all"),
    "gradient_norm": lambda b: fm.gradient_norm(b.objective),
    "sam_sharpness": lambda b: fm.sam_sharpness(b.objective, steps=2),
    "sam_sharpness, adaptive": allowed(fm.sam_sharpness, adaptive=True),
    "sam_sharpness in groups": in_groups,
    "average_sharpness": lambda b: fm.average_sharpness(b.objective, samples=2),
    "pac_bayes_sharpness": lambda b: fm.pac_bayes_sharpness(
        b.objective, on="loss", samples=2, tol=0.9
    ),
    "local_energy": allowed(fm.local_energy, samples=2, sigmas=[0.1]),
    "fisher_rao_norm": allowed(fm.fisher_rao_norm),
    "relative_flatness": allowed(fm.relative_flatness, products=4),
    "critical_sharpness": lambda b: fm.critical_sharpness(b.objective, tol=0.9),
    "interpolate": lambda b: fm.interpolate(
        b.objective, b.case.unwrapped, b.state, alphas=[0.5], also={"test": b.objective}
    ),
    "surface": lambda b: fm.surface(b.objective, b.step, points=3, also={"test": b.objective}),
    "interpolate, recomputed": allowed_curve,
    "connect": lambda b: fm.connect(
        b.objective, b.case.unwrapped, b.state, steps=1, alphas=[0, 1], buffers="keep"
    ),
    "Trajectory": recorded,
    "layerwise": lambda b: fm.layerwise(b.objective, depth=1, trace_products=2, max_products=1),
    "sharpness and compare": lambda b: b.report(),
}


# Half of all the time: around a disturbed model alone, which they could harm the most.
HEAVY = {"sharpness and compare", "relative_flatness", "Gauss–Newton diagonal"}


def disturb(case):
    """The model as training may leave it: in both modes, with gradients and hooks of all kinds."""
    model = case.unwrapped
    modules = list(model.modules())
    for number, module in enumerate(modules):
        module.training = number % 2 == 0
    for number, parameter in enumerate(model.parameters()):
        if number % 2 == 0:
            parameter.grad = torch.full_like(parameter, 0.5)
    model.register_forward_hook(lambda module, args, output: None, always_call=True)
    modules[-1].register_forward_pre_hook(
        lambda module, args, kwargs: None, with_kwargs=True, prepend=True
    )
    linear = [m for m in modules if isinstance(m, nn.Linear)]
    if len(linear) > 1:  # on the first layer PyTorch warns of them
        linear[-1].register_full_backward_hook(lambda module, inputs, outputs: None)
    trained = [p for p in model.parameters() if p.requires_grad]
    trained[0].register_hook(lambda gradient: 2 * gradient)
    trained[-1].register_post_accumulate_grad_hook(lambda parameter: None)


@pytest.mark.parametrize("name", thinned(NAMES, 6, always=THOROUGH))
@pytest.mark.parametrize("state", ["evaluation", "training"])
def test_every_call_on_every_case(name, state):
    case = build(name)
    mode = case.mode
    if state == "training":
        disturb(case)
        mode = "eval" if case.mode == "train" else "train"
    everything = case.model, case.batches, case.loss_fn
    broken = []
    with quiet():
        before = Snapshot(*everything)
        bench = Bench(case, mode)
        for call, function in CALLS.items():
            if state == "evaluation" and call in HEAVY:
                continue
            function(bench)
            after = Snapshot(*everything)
            changed = before.differences(after)
            broken += [f"{call} changed {', '.join(changed)}"] if changed else []
            before = after
    told(broken)


# --------------------------------------------------------------------------- when something fails


class TroubleError(Exception):
    pass


def out_of_memory(message):
    return torch.OutOfMemoryError(f"CUDA out of memory: {message}")


KINDS = (TroubleError, KeyboardInterrupt, out_of_memory)


class Saboteur:
    """Is told what happens while a call runs, and raises at the event that it is armed for.

    Attributes:
        batch: the number of the batch that was read last.
        events: (stage, batch) of what has happened since it was armed.
    """

    def __init__(self):
        self.batch = 0
        self.disarm()

    def arm(self, at, error):
        self.events, self._at, self._error = [], at, error

    def disarm(self):
        self.arm(-1, None)

    def event(self, stage):
        self.events.append((stage, self.batch))
        if len(self.events) == self._at + 1:
            raise self._error

    def read(self, batches):
        return _Reader(batches, self)

    def around(self, function, stage, *, after=False):
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            if not after:
                self.event(stage)
            result = function(*args, **kwargs)
            if after:
                self.event(stage)
            return result

        return wrapped


class _Reader:
    def __init__(self, batches, saboteur):
        self.batches, self.saboteur = batches, saboteur

    def __iter__(self):
        for number, batch in enumerate(self.batches):
            self.saboteur.batch = number
            self.saboteur.event("reading")
            yield batch


class Tripwire(torch.autograd.Function):
    """The loss itself; each time it is differentiated, the saboteur hears of it."""

    @staticmethod
    def forward(ctx, loss, saboteur):
        ctx.save_for_backward(loss)
        ctx.saboteur = saboteur
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.saboteur.event("backward")
        # The loss comes along, so that the parameters can be reached from here once more.
        return _SecondTripwire.apply(gradient, *ctx.saved_tensors, ctx.saboteur), None


class _SecondTripwire(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient, loss, saboteur):
        ctx.saboteur = saboteur
        return gradient.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.saboteur.event("double backward")
        return gradient, None, None


class Torchlike(Tripwire):
    """Passes for a function of PyTorch's own, of which no second derivative is examined."""


Torchlike.__module__ = "torch.autograd"


class Rigged:
    """A case in which the saboteur sees every stage of every evaluation.

    Attributes:
        before: the snapshot that was taken last.
    """

    def __init__(self, name, tripwire):
        self.case, self.saboteur, self.tripwire = build(name), Saboteur(), tripwire
        self.before = None
        event = self.saboteur.around
        inner, outer = _innermost(self.case), self.case.unwrapped
        # On the instances, as the library does it, and not as hooks, which run outside of that.
        if inner is not outer:
            inner.forward = event(inner.forward, "inner forward", after=True)
        outer.forward = event(outer.forward, "forward", after=True)
        weight = self.case.weight or (lambda batch: 1.0)
        self.options = {
            "data": self.saboteur.read(self.case.batches),
            "weight": event(weight, "weight"),
            "cache": False,
            "loss_fn": self._wired(self.case.loss_fn),
            "batch_loss": self._wired(self.case.batch_loss),
        }
        metric = event(lambda output, target: 0.5, "metric")
        self.metrics = {"metric": metric} if self.case.loss_fn is not None else None

    def _wired(self, loss):
        if loss is None:
            return None
        return self.saboteur.around(
            lambda *args: self.tripwire.apply(loss(*args), self.saboteur), "loss"
        )

    def objective(self):
        return self.case.objective(**self.options)

    def everything(self):
        return Snapshot(self.case.model, self.case.batches, self.case.loss_fn)


def _innermost(case):
    """The most deeply nested module that runs, a recurrent one if there is one."""
    depths = {m: n.count(".") for n, m in case.unwrapped.named_modules()}
    ran = []
    hooks = [m.register_forward_hook(lambda m, args, output: ran.append(m)) for m in depths]
    case.objective().loss()
    for hook in hooks:
        hook.remove()
    return max(ran, key=lambda m: (isinstance(m, nn.RNNBase), depths[m]))


def vector(objective):
    return torch.full((objective.size,), 0.01, dtype=objective.dtype)


def along_a_line(objective, metrics):
    start, end = objective.point(), objective.point() + 0.01
    line = fm.interpolate(objective, start, end, alphas=[0.5], metrics=metrics)
    return [line.loss, line.metrics]


FAILING = {
    "Objective": lambda rigged, _: repr(rigged.objective()),
    "gradient": lambda _, o: o.value_and_gradient(),
    "first product": lambda _, o: fm.HessianOperator(o).matvec(vector(o)),
    "finite differences": lambda _, o: fm.HessianOperator(o, method="finite_differences").matvec(
        vector(o)
    ),
    "interpolate": lambda rigged, o: along_a_line(o, rigged.metrics),
}


def trials(events, turn, thorough):
    """(position, kind of failure): one or, `thorough`, each kind at each stage of each batch.

    What happens there several times in a call takes turns too.
    """
    places = {}
    for position, event in enumerate(events):
        places.setdefault(event, []).append(position)
    for number, positions in enumerate(places.values(), start=turn):
        for other in range(len(KINDS) if thorough else 1):
            yield positions[(number + other) % len(positions)], KINDS[(number + other) % len(KINDS)]


def complaint(error, caught, batch):
    """What is wrong with how `error`, raised in `batch`, came out."""
    chain = [caught]
    while chain[-1] is not None:
        chain.append(chain[-1].__cause__)
    if not any(e is error for e in chain):
        return f"came out as {caught!r}"
    if isinstance(error, torch.OutOfMemoryError) and not isinstance(caught, fm.DeviceMemoryError):
        return f"came out as {type(caught).__name__}, not as DeviceMemoryError"
    notes = getattr(error, "__notes__", [])
    if isinstance(error, TroubleError) and sys.version_info >= (3, 11):
        wanted = f"This happened in batch {batch} of the data."
        return "" if notes == [wanted] else f"has the notes {notes}"
    return ""


STAGES = {
    "Objective": {"reading", "weight"},
    "gradient": {"reading", "forward", "loss", "backward"},
    "first product": {"reading", "forward", "loss", "backward"},
    "finite differences": {"reading", "forward", "loss", "backward"},
    "interpolate": {"reading", "forward", "loss"},
}


def missing(case, call, events):
    """The stages in which the call could not be made to fail."""
    wanted = set(STAGES[call])
    if call == "first product" and case.approximate is None:
        wanted.add("double backward")
    if call == "interpolate" and case.loss_fn is not None:
        wanted.add("metric")
    batches = range(len(case.batches))
    return [(s, b) for s in sorted(wanted) for b in batches if (s, b) not in events]


def provoked(rigged, call, function, position, kind):
    """Lets `function()` fail at an event; what is wrong after it, one line for each."""
    stage, batch = rigged.saboteur.events[position]
    where = f"{call}, {kind.__name__} in {stage} of batch {batch}"
    error, caught = kind(f"in {stage}"), None
    before = rigged.before or rigged.everything()
    rigged.saboteur.arm(position, error)
    try:
        function()
    except BaseException as raised:
        caught = raised
    rigged.saboteur.disarm()
    if wrong := complaint(error, caught, batch):
        yield f"{where}: {wrong}"
    rigged.before = rigged.everything()
    if changed := before.differences(rigged.before):
        yield f"{where}: changed {', '.join(changed)}"


def failures(rigged, turn, thorough):
    """Lets evaluations of each kind fail in every place."""
    saboteur = rigged.saboteur
    for call, function in FAILING.items():
        objective = rigged.objective()
        saboteur.disarm()
        expected = bits(function(rigged, objective))
        events = saboteur.events
        if unreached := missing(rigged.case, call, events):
            yield f"{call}: never came to {unreached}"
        for position, kind in trials(events, turn, thorough):
            objective = rigged.objective()
            saboteur.events = events
            again = functools.partial(function, rigged, objective)
            yield from provoked(rigged, call, again, position, kind)
            if bits(function(rigged, objective)) != expected:
                yield f"{call}, {events[position]}: it gives another number afterwards"


@pytest.mark.parametrize("name", thinned(NAMES, 6, start=3, always=THOROUGH[:3]))
def test_failures_everywhere(name):
    rigged = Rigged(name, Torchlike)
    with quiet():
        told(failures(rigged, NAMES.index(name), name in THOROUGH))


def test_failures_while_functions_of_the_users_own_are_examined():
    with quiet():
        told(failures(Rigged("mlp_batch_norm_dropout", Tripwire), 0, thorough=True))


def failures_amid_calls(rigged):
    """Lets every public call fail half-way and at its end."""

    def bench():
        made = Bench(rigged.case, rigged.case.mode, **rigged.options)
        rigged.saboteur.disarm()
        return made

    for number, (call, function) in enumerate(CALLS.items()):
        function(bench())
        events = rigged.saboteur.events
        if not events:  # repr, point and what reads no data
            continue
        if call == "Gauss–Newton diagonal":  # an error in its trials means that there is none
            continue
        for turn, position in enumerate(sorted({len(events) // 2, len(events) - 1})):
            again, kind = functools.partial(function, bench()), KINDS[(number + turn) % len(KINDS)]
            rigged.saboteur.events = events
            yield from provoked(rigged, call, again, position, kind)


@pytest.mark.parametrize("name", thinned(THOROUGH, 3))
def test_failures_amid_every_call(name):
    with quiet():
        told(failures_amid_calls(Rigged(name, Torchlike)))


COUNTS = {
    "mlp_batch_norm_dropout": lambda batch: len(batch[1]),
    "transformer_encoder": lambda batch: (batch[1] != -100).sum(),
    "tuple_output": lambda batch: len(batch[1]),
}


@pytest.mark.parametrize("name", COUNTS)
def test_running_out_of_memory_where_smaller_pieces_are_allowed(name):
    rigged = Rigged(name, Torchlike)
    rigged.options |= {"weight": COUNTS[name], "microbatch": "auto"}
    saboteur, before = rigged.saboteur, rigged.everything()
    for call in ("gradient", "first product"):
        objective = rigged.objective()
        saboteur.disarm()
        expected = FAILING[call](rigged, objective)
        expected = expected[1] if call == "gradient" else expected
        events = saboteur.events
        for position, (stage, batch) in enumerate(events):
            if stage == "reading":
                continue
            objective = rigged.objective()
            saboteur.arm(position, out_of_memory(f"in {stage}"))
            found = FAILING[call](rigged, objective)
            saboteur.disarm()
            found = found[1] if call == "gradient" else found
            where = f"{call}, {stage} of batch {batch}"
            assert not before.differences(rigged.everything()), where
            assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12), where
