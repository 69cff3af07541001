"""The same function with other weights: a layer multiplied, what reads it divided."""

from __future__ import annotations

import copy
import fnmatch
import inspect
import math
import operator
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ...errors import ArgumentTypeError, FlatMinimaWarning, InvalidArgumentError, closest, warn
from ...objective.modules import check_model, unwrap
from ...support.checks import check_choice, check_instance, check_positive
from ...support.randomness import Seed, as_generator, preserve_random_state
from .homogeneous import LAYERS, Paths, Route, Stop, channels_of

if TYPE_CHECKING:
    from torch.fx import Graph

__all__ = ["first_line", "rescale", "trace_graph"]

_BY_HAND = (
    "Rescale by hand instead: multiply a layer's weight and bias by a factor, and divide the "
    "weights of the layers that read it by the same."
)


def rescale(
    model: nn.Module,
    *,
    factor: float = 10.0,
    per: Literal["layer", "neuron"] = "layer",
    layers: str | Sequence[str] | None = None,
    seed: Seed = 0,
) -> nn.Module:
    """Return a copy of a ReLU network that computes the same function with other weights.

    A layer's weight and bias are multiplied by α > 0, and the weights of every layer that reads
    it are divided by α (Dinh et al. 2017). Nothing changes in the output as long as only
    positively homogeneous operations stand in between, φ(αx) = α φ(x): ReLU, LeakyReLU, PReLU,
    dropout, pooling, reshapes. A measure of sharpness that moves under it says something about
    the parametrisation, not about the function.

    Linear layers, convolutions and affine normalisations are multiplied; linear layers and
    convolutions are divided. A layer that only feeds normalisations stays as it is, and they are
    multiplied in its place, since a normalisation takes a scale out only up to its eps. With the
    statistics of batch norm left alone, the functions are equal in training as in evaluation.

    Args:
        model: the network, which stays as it is. Its forward is traced by `torch.fx`, in training
            and in evaluation, with the defaults of its optional arguments.
        factor: α of the first, third, … multiplied layer, in the order in which the forward calls
            them. The second, fourth, … have 1/α, as equal ones would cancel in the layers between.
        per: "layer" has one α for each layer. "neuron" draws one for each output feature or
            channel, log-uniform between 1/factor and factor; convolutions and batch norms must
            then be called on batches (N, C, …).
        layers: names of the layers to multiply, or glob patterns; a layer that only feeds
            normalisations stands for them. None takes all that can be.
        seed: an int or a `torch.Generator`, for `per="neuron"`.

    Returns:
        The copy, with the dtypes, devices, training flags and buffers of the model, and without
        its gradients. Wrappers (`torch.compile`, data parallelism) are taken off. Its function is
        the same up to rounding.

    Raises:
        InvalidArgumentError: no layer can be multiplied, or not one of `layers`; the message says
            why. Or the model cannot be copied or traced, or its weights overflow at this factor.
        ParameterSelectionError: uninitialised, quantized or sharded parameters.

    Warns:
        FlatMinimaWarning: without `layers`, the layers that stay as they are for what follows
            them (a Tanh), and why. The last layer and branches that are added or concatenated
            are not among them.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1)
        ... ).double()
        >>> scaled = fm.rescale(model, factor=100.0)
        >>> bool((scaled[0].weight == 100 * model[0].weight).all())
        True
        >>> inputs = torch.ones(3, 2, dtype=torch.float64)
        >>> torch.allclose(scaled(inputs), model(inputs), rtol=1e-10)
        True
    """
    advice = "Give the network itself."
    check_instance("rescale", "model", model, nn.Module, advice)
    alpha = check_positive("rescale", "factor", factor)
    check_choice("rescale", "per", per, ("layer", "neuron"))
    generator = as_generator(seed, torch.device("cpu"))
    model = unwrap(model)
    check_model(model)
    routes = _routes(model, neurons=per == "neuron")
    chosen = _all(routes) if layers is None else _named(routes, layers)
    scaled = _copied(model)
    for i, name in enumerate(chosen):
        factors = torch.tensor(1 / alpha if i % 2 else alpha, dtype=torch.float64)
        if per == "neuron":
            count = channels_of(scaled.get_submodule(name)).count
            options: dict[str, Any] = {"device": generator.device, "dtype": torch.float64}
            draws = torch.rand(count, generator=generator, **options).cpu()
            factors = torch.exp((2 * draws - 1) * math.log(alpha))
        _multiply(scaled, name, factors, source=True)
        for sink, channels in routes[name].sinks:
            there = factors if channels is None else channels.spread(factors)
            _multiply(scaled, sink, 1 / there, source=False)
    return scaled


def _multiply(model: nn.Module, name: str, factors: Tensor, *, source: bool) -> None:
    """Multiply, in place, what a layer gives, or what it makes of its inputs."""
    module: Any = model.get_submodule(name)
    by = factors
    if factors.ndim:
        ones, rows = [1] * (module.weight.ndim - 2), module.weight.shape[0]
        if source and not getattr(module, "transposed", False):
            by = factors.view(-1, *[1] * (module.weight.ndim - 1))
        elif not source and getattr(module, "transposed", False):
            by = factors.view(-1, 1, *ones)
        else:
            # The weight's second dimension counts within a group, its first through all of them.
            groups = getattr(module, "groups", 1)
            by = factors.view(groups, 1, -1).expand(-1, rows // groups, -1)
            by = by.reshape(rows, -1, *ones)
    both = [(module.weight, by)]
    if source and getattr(module, "bias", None) is not None:
        both.append((module.bias, factors))
    for tensor, multiplier in both:
        finite = tensor.isfinite()
        with torch.no_grad():
            tensor.mul_(multiplier.to(tensor) if multiplier.ndim else float(multiplier))
        if not tensor.is_meta and not bool(tensor.isfinite().eq(finite).all()):
            raise InvalidArgumentError(
                f"The 'factor' argument of rescale takes a parameter of {name!r} out of the range "
                f"of {tensor.dtype}. Use one nearer to 1, or model.double()."
            )


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise InvalidArgumentError(
            f"rescale works on a copy, and the model ({type(model).__name__}) cannot be copied: "
            f"{first_line(error)}. Make copy.deepcopy(model) work, for instance by removing "
            "tensors that a forward has left on it."
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _routes(model: nn.Module, *, neurons: bool) -> dict[str, Route]:
    """For each layer, in the order in which they are called, where what it gives ends up."""
    scratch = _copied(model)  # a forward may change what it finds on the model
    modules = dict(scratch.named_modules())
    names = [n for n, m in modules.items() if n and isinstance(m, LAYERS)]
    if not names:
        raise InvalidArgumentError(
            f"rescale found no linear layer, convolution or normalisation inside the model "
            f"({type(model).__name__}). It takes a network with at least two such layers."
        )
    merged: dict[str, Route] = {}
    for training in (False, True):
        for module in modules.values():
            module.training = training
        paths = Paths(trace_graph(scratch, training), modules, neurons)
        names.sort(key=lambda n: paths.position(n) if not training else 0)
        for name in names:
            route = paths.route(name)
            if merged.setdefault(name, route) != route and not merged[name].stop:
                reason = "it is read by other layers in training than in evaluation"
                merged[name] = route if route.stop else Route(stop=reason)
    return merged


def trace_graph(model: nn.Module, training: bool) -> Graph:
    """Return the graph of a model's forward, traced with its training flag set."""
    from torch.fx import Tracer

    try:
        if "forward" in vars(model):
            raise InvalidArgumentError(
                "its forward was replaced on the object, where it is not seen"
            )
        given = inspect.signature(model.forward).parameters.values()
        defaults = {p.name: p.default for p in given if p.default is not p.empty}
        with preserve_random_state(), warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            graph = Tracer().trace(model, defaults or None)
        constants = [n for n in graph.nodes if n.op == "get_attr"]
        if any(operator.attrgetter(n.target)(model).grad_fn is not None for n in constants):
            raise InvalidArgumentError("it computes with parameters outside of the graph")
    except Exception as error:
        raise InvalidArgumentError(
            f"rescale follows the model's forward with torch.fx, which cannot trace that of "
            f"{type(model).__name__} in {'training' if training else 'evaluation'}: "
            f"{first_line(error)}. Move branches on values out of the forward. {_BY_HAND}"
        ) from error
    return graph


def _targets(name: str, routes: dict[str, Route]) -> tuple[str, ...]:
    """Return the layer itself, or the normalisations that it only feeds."""
    route, found = routes[name], list[str]()
    if route.stop:
        raise Stop(route.stop, route.structural)
    for norm in route.norms:
        try:
            found += _targets(norm, routes)
        except Stop as stop:
            reason = f"it feeds {norm!r}, which stays as it is: {stop.reason}"
            raise Stop(reason, stop.structural) from None
    return tuple(found) or (name,)


def _all(routes: dict[str, Route]) -> list[str]:
    found, left, reasons = set[str](), list[str](), list[str]()
    for name in routes:
        try:
            found.update(_targets(name, routes))
        except Stop as stop:
            reasons.append(f"{name!r} ({stop.reason})")
            left += [] if stop.structural else reasons[-1:]
    if not found:
        raise InvalidArgumentError(
            f"rescale can multiply no layer of this model; the first is {(left or reasons)[0]}. "
            "Only positively homogeneous operations (ReLU, LeakyReLU, pooling, dropout, reshapes) "
            "may stand between a layer and the layers that read it."
        )
    if left:
        warn(f"rescale left these layers as they are: {'; '.join(left)}.", FlatMinimaWarning)
    return [n for n in routes if n in found]


def _named(routes: dict[str, Route], layers: str | Sequence[str]) -> list[str]:
    patterns = [layers] if isinstance(layers, str) else layers
    if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
        raise ArgumentTypeError(
            "The 'layers' argument of rescale must be None, a name or pattern, or several in a "
            f"list; got {layers!r}."
        )
    if not patterns:
        raise InvalidArgumentError("The 'layers' argument of rescale is empty; None takes all.")
    found = set[str]()
    for pattern in patterns:
        hits = [n for n in routes if fnmatch.fnmatchcase(n, pattern)]
        if not hits:
            raise InvalidArgumentError(
                f"The pattern {pattern!r} of the 'layers' argument of rescale matches no linear "
                f"layer, convolution or normalisation. {closest(pattern, routes)}"
            )
        for name in hits:
            try:
                found.update(_targets(name, routes))
            except Stop as stop:
                raise InvalidArgumentError(
                    f"rescale cannot multiply {name!r}: {stop.reason}. Leave it out of 'layers'."
                ) from None
    return [n for n in routes if n in found]
