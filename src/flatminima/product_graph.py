"""The product H v of one batch as a graph of operations, cut where v comes in."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["Loss", "ProductGraph", "second_order", "trace_product"]

Loss = Callable[[dict[str, Tensor], dict[str, Tensor], Any], Tensor]
"""(parameters, other tensors by name, batch) → ℓ_b with its graph, by replaced tensors."""


class _ValueReadError(Exception):
    """An operation whose result is a number, or has a shape, that depends on values."""


@dataclasses.dataclass(frozen=True)
class ProductGraph:
    """H v in two parts, neither of which writes to what it is given.

    Attributes:
        first: (inputs) → (ℓ_b, kept tensors): all that does not depend on v.
        second: (those inputs that it uses, kept tensors, those vectors that it uses) → products:
            linear in v.
        inputs: positions of the inputs that `second` uses.
        vectors: positions of the vectors that `second` uses.
        leaves: positions of the leaves that `second` gives a product for; others have zeros.
        captured: tensors that the loss reads although they are not among its arguments; they are
            the last inputs.
    """

    first: fx.GraphModule
    second: fx.GraphModule | None
    inputs: tuple[int, ...]
    vectors: tuple[int, ...]
    leaves: tuple[int, ...]
    captured: tuple[Tensor, ...]


def trace_product(
    loss: Loss,
    leaves: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    data: Any,
    tensors: Sequence[Tensor],
) -> ProductGraph:
    """Trace reverse over reverse, on tensors without values.

    Python that looks at values is thereby found out: it raises instead of going one way for ever.

    Args:
        loss: is called once.
        leaves: to differentiate by.
        others: further tensors by name.
        data: the batch.
        tensors: all those within `data`, which take the place of the inputs after `others`.

    Raises:
        _ValueReadError: a number or a shape depends on the values of tensors.
        Exception: whatever PyTorch makes of operations that cannot be traced.
    """
    # Not above: it takes half a second, which only who compiles should wait for.
    from torch.fx.experimental.proxy_tensor import make_fx

    inputs = [*leaves.values(), *others.values(), *tensors]
    flags = [t.requires_grad for t in inputs]
    count = len(leaves)
    reached: list[int] = []

    def product(arguments: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
        own = [t.detach() for t in arguments]
        for number, (tensor, flag) in enumerate(zip(own, flags, strict=True)):
            tensor.requires_grad_(flag or number < count)
        parameters = dict(zip(leaves, own, strict=False))
        rest = dict(zip(others, own[count:], strict=False))
        # What is in the memo is taken for the copy of what has that id.
        twins: dict[int, Any] = {
            id(t): o for t, o in zip(tensors, own[count + len(others) :], strict=True)
        }
        value = loss(parameters, rest, copy.deepcopy(data, twins))
        _, found = second_order(value, own[:count], vectors)
        reached[:] = [n for n, h in enumerate(found) if h is not None]
        return [value.detach(), *(h for h in found if h is not None)]

    examples = [t.detach() for t in inputs]
    # Tensors of their own: one that is given twice would be one input.
    directions = [torch.empty_like(t) for t in examples[:count]]
    traced = make_fx(product, tracing_mode="fake", _allow_non_fake_inputs=True)(
        examples, directions
    )
    _check_values(traced.graph)
    traced.graph.set_codegen(fx.graph.CodeGen())
    captured = _lift(traced, count)
    pure = make_fx(torch.func.functionalize(traced, remove="mutations"), tracing_mode="fake")(
        *examples, *captured, *directions
    )
    return _cut(pure, count, reached, captured)


def _check_values(graph: fx.Graph) -> None:
    """Refuse what some releases trace as a number that is not known yet."""
    for node in graph.nodes:
        value = node.meta.get("val")
        parts = value.shape if isinstance(value, Tensor) else (value,)
        if any(isinstance(p, (torch.SymInt, torch.SymFloat, torch.SymBool)) for p in parts):
            raise _ValueReadError(str(node.target))


def second_order(
    value: Tensor, leaves: Sequence[Tensor], vectors: Sequence[Tensor]
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
    """The gradient of a scalar and H v by autograd, one tensor for each leaf; None for zeros."""
    gradients = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
    pairs = [
        (g, v) for g, v in zip(gradients, vectors, strict=True) if g is not None and g.requires_grad
    ]
    if not pairs:
        return gradients, [None] * len(leaves)
    products = torch.autograd.grad(
        [g for g, _ in pairs], leaves, [v for _, v in pairs], allow_unused=True
    )
    return gradients, products


def _lift(traced: fx.GraphModule, count: int) -> tuple[Tensor, ...]:
    """Make inputs of the tensors that were captured, before the `count` vectors."""
    graph = traced.graph
    vectors = [n for n in graph.nodes if n.op == "placeholder"][-count:]
    captured: list[Tensor] = []
    places: dict[str, fx.Node] = {}
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        name = str(node.target)
        if name not in places:
            captured.append(getattr(traced, name))
            with graph.inserting_before(vectors[0]):
                places[name] = graph.placeholder(f"captured_{len(captured)}")
        node.replace_all_uses_with(places[name])
        graph.erase_node(node)
    graph.lint()
    traced.recompile()
    return tuple(captured)


def _cut(
    traced: fx.GraphModule, count: int, reached: Sequence[int], captured: tuple[Tensor, ...]
) -> ProductGraph:
    graph = traced.graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    for node in [n for n in graph.nodes if n.target is torch.ops.aten.copy_.default]:
        # What is left of writes to inputs, in the end of the graph.
        graph.erase_node(node)
    _spare_statistics(graph)
    graph.eliminate_dead_code()
    given, vectors = placeholders[:-count], placeholders[-count:]
    value, *products = torch.utils._pytree.tree_leaves(_output(graph).args[0])
    dependent = set(vectors)
    for node in graph.nodes:
        if node.op == "call_function" and any(n in dependent for n in node.all_input_nodes):
            dependent.add(node)
    # A linear function of v that does not depend on v is zero.
    wanted = [(i, n) for i, n in zip(reached, products, strict=True) if n in dependent]
    again, crossing = _crossing(graph, dependent)
    inputs = [n for n in given if n in crossing]
    kept = [n for n in graph.nodes if n in crossing and n.op != "placeholder"]
    used = [n for n in vectors if any(u in dependent for u in n.users)]

    first = _part(traced, given, lambda n: n not in dependent, [value, *kept])
    second = None
    if wanted:
        second = _part(
            traced,
            [*inputs, *kept, *used],
            lambda n: n in dependent or n in again,
            [n for _, n in wanted],
        )
    else:
        first, inputs, used = _part(traced, given, lambda n: n not in dependent, [value]), [], []
    return ProductGraph(
        first,
        second,
        tuple(given.index(n) for n in inputs),
        tuple(vectors.index(n) for n in used),
        tuple(i for i, _ in wanted),
        captured,
    )


def _spare_statistics(graph: fx.Graph) -> None:
    """Give batch norm copies of its statistics: it writes to them without saying so."""
    for node in list(graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload) or "backward" in node.name:
            continue
        names = [a.name for a in node.target._schema.arguments]
        for name in {"running_mean", "running_var"}.intersection(names):
            statistic = node.args[names.index(name)] if names.index(name) < len(node.args) else None
            if isinstance(statistic, fx.Node):
                with graph.inserting_before(node):
                    twin = graph.call_function(torch.ops.aten.clone.default, (statistic,))
                node.update_arg(names.index(name), twin)


def _crossing(graph: fx.Graph, dependent: set[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """What is computed again on the far side of the cut, and what is carried over it.

    Views, and entry-wise functions of what is carried over anyway, need not be kept: to compute
    them again costs nothing within a compiled loop, and they take memory.
    """
    crossing: set[fx.Node] = set()
    for node in graph.nodes:
        if node in dependent and node.op == "call_function":
            crossing.update(n for n in node.all_input_nodes if n not in dependent)
    again: set[fx.Node] = set()

    def at_hand(node: fx.Node) -> bool:
        while node not in crossing and node.op != "placeholder":
            if not _is_view(node):
                return False
            node = node.all_input_nodes[0]
        return True

    for node in reversed(list(graph.nodes)):
        if node in crossing and (
            _is_view(node) or (_is_entrywise(node) and all(map(at_hand, node.all_input_nodes)))
        ):
            crossing.remove(node)
            again.add(node)
            crossing.update(node.all_input_nodes)
    return again, crossing


def _is_view(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return _is_view(node.all_input_nodes[0])
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and node.target.is_view
        and len(node.all_input_nodes) == 1
    )


def _is_entrywise(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or not node.all_input_nodes:
        return False
    tags = node.target.tags
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def _part(
    traced: fx.GraphModule,
    inputs: Sequence[fx.Node],
    belongs: Callable[[fx.Node], bool],
    outputs: Sequence[fx.Node],
) -> fx.GraphModule:
    """The operations that belong to one side, as a function of `inputs`."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {n: graph.placeholder(n.name) for n in inputs}
    for node in traced.graph.nodes:
        if node.op == "call_function" and node not in copies and belongs(node):
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[n] for n in outputs])
    graph.eliminate_dead_code()
    graph.lint()
    # Values without content, of no use any more.
    for node in graph.nodes:
        node.meta.clear()
    return fx.GraphModule({}, graph)


def _output(graph: fx.Graph) -> fx.Node:
    found: fx.Node = next(n for n in graph.nodes if n.op == "output")
    return found
