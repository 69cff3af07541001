"""The diagonal of Jᵀ M J for one batch, by the Jacobians of its examples one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from ...support.failures import is_out_of_memory
from ...support.trees import cut, map_tensors
from .loss_curvature import OutputMatrix, patternless

__all__ = ["OUTPUTS", "jacobian_diagonal"]

OUTPUTS = 64
"""Of an example, up to which Jacobians of examples are made."""

BLOCK_BYTES = 2**28


class _DependentError(Exception):
    """The outputs of a batch cannot be made example by example."""


def jacobian_diagonal(
    model: nn.Module,
    inputs: Any,
    output: Any,
    matrix: OutputMatrix,
    leaves: Mapping[str, Tensor],
) -> list[Tensor] | None:
    """Return the diagonal of Jᵀ M J, a tensor for each leaf.

    Takes the memory of as many Jacobians as fit into 256 MB. That Jᵀ u is the same as of the whole
    batch is checked. None where the outputs are not a tensor with the examples first and at most
    `OUTPUTS` numbers for each, or cannot be made and differentiated one by one.

    Args:
        model: with the leaves in the place of its parameters.
        inputs: of the batch.
        output: of the model for it, (examples, …), with its graph.
        matrix: M, which joins no two examples.
        leaves: the parameters by name.
    """
    if not isinstance(output, Tensor) or output.dim() == 0 or output.numel() == 0:
        return None
    if output[0].numel() > OUTPUTS:
        return None
    probe = patternless(output)
    try:
        blocks = _blocks(matrix, output)
        whole = torch.autograd.grad(output, list(leaves.values()), probe, allow_unused=True)
    except (RuntimeError, _DependentError) as error:
        if is_out_of_memory(error):
            raise
        return None
    detached = {name: leaf.detach() for name, leaf in leaves.items()}
    for jacobians in (_transformed, _one_by_one):
        try:
            found, pulled = _summed(model, inputs, detached, blocks, probe, jacobians)
        except Exception as error:  # whatever transforms, models and data refuse
            if is_out_of_memory(error):
                raise
            continue
        if _agree(pulled, whole, probe.dtype):
            return found
    return None


def _summed(
    model: nn.Module,
    inputs: Any,
    leaves: dict[str, Tensor],
    blocks: Tensor,
    probe: Tensor,
    jacobians: Callable[..., Iterable[Tensor]],
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the diagonal, and Jᵀ u for the probe u, by `jacobians` of a few examples at a time."""
    examples, count = blocks.shape[:2]
    size = sum(leaf.numel() for leaf in leaves.values()) * blocks.element_size()
    chunk = max(1, BLOCK_BYTES // max(1, size * count))
    weights = probe.reshape(examples, count)
    diagonal = [torch.zeros_like(leaf) for leaf in leaves.values()]
    pulled = [torch.zeros_like(leaf) for leaf in leaves.values()]
    for start in range(0, examples, chunk):
        end = min(start + chunk, examples)
        piece = cut(inputs, start, end, examples)
        made = jacobians(model, piece, leaves, count, end - start)
        for place, jacobian in enumerate(made):
            rows = jacobian.detach().reshape(end - start, count, -1)
            moved = torch.bmm(blocks[start:end].to(rows.dtype), rows)
            diagonal[place] += (rows * moved).sum((0, 1)).view_as(diagonal[place])
            own = weights[start:end].to(rows.dtype)
            pulled[place] += torch.einsum("ec,ecn->n", own, rows).view_as(pulled[place])
    return diagonal, pulled


def _agree(ones: list[Tensor], others: Sequence[Tensor | None], dtype: torch.dtype) -> bool:
    pairs = [
        (a, torch.zeros_like(a) if b is None else b) for a, b in zip(ones, others, strict=True)
    ]
    gap = max(float((a - b).abs().max()) for a, b in pairs if a.numel())
    scale = max(float(b.abs().max()) for _, b in pairs if b.numel())
    # NaN does not agree with anything.
    return gap <= 1e4 * torch.finfo(dtype).eps * scale


def _blocks(matrix: OutputMatrix, output: Tensor) -> Tensor:
    """Return M, a block for each example, (examples, outputs, outputs)."""
    examples, count = len(output), output[0].numel() if len(output) else 0
    columns = []
    for column in range(count):
        unit = torch.zeros_like(output).reshape(examples, count)
        unit[:, column] = 1
        columns.append(_times(matrix, unit.view_as(output)).reshape(examples, count))
    blocks = torch.stack(columns, dim=2)
    probe = patternless(output).reshape(examples, count)
    whole = _times(matrix, probe.view_as(output)).reshape(examples, count)
    alone = torch.bmm(blocks, probe.unsqueeze(2)).squeeze(2)
    gap, scale = (whole - alone).abs().max(), blocks.abs().max()
    if bool(gap > 1e3 * torch.finfo(output.dtype).eps * count * scale):
        raise _DependentError("the loss joins examples of a batch")
    return blocks


def _times(matrix: OutputMatrix, tangent: Tensor) -> Tensor:
    (found,) = matrix.times([tangent])
    return torch.zeros_like(tangent) if found is None else found.detach()


def _transformed(
    model: nn.Module,
    piece: Any,
    leaves: dict[str, Tensor],
    count: int,  # noqa: ARG001
    examples: int,  # noqa: ARG001
) -> Iterable[Tensor]:
    """Return jacobians (examples, outputs, …) by each leaf, all at once by torch.func."""

    def one(parameters: dict[str, Tensor], example: Any) -> Tensor:
        alone = map_tensors(example, lambda t: t.unsqueeze(0))
        out: Tensor = functional_call(model, parameters, (alone,))
        return out.reshape(-1)

    found: dict[str, Tensor] = vmap(jacrev(one), in_dims=(None, 0))(leaves, piece)
    return found.values()


def _one_by_one(
    model: nn.Module, piece: Any, leaves: dict[str, Tensor], count: int, examples: int
) -> Iterable[Tensor]:
    """Return the same by a backward pass for each output of each example."""
    own = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    rows: list[list[Tensor]] = [[] for _ in own]
    for number in range(examples):
        alone = cut(piece, number, number + 1, examples)
        with torch.enable_grad():
            out = functional_call(model, own, (alone,)).reshape(-1)
        for position in range(count):
            found = torch.autograd.grad(
                out[position], list(own.values()), retain_graph=True, allow_unused=True
            )
            for held, gradient, leaf in zip(rows, found, own.values(), strict=True):
                held.append(torch.zeros_like(leaf) if gradient is None else gradient)
    return [torch.stack(held).reshape(examples, count, *held[0].shape) for held in rows]
