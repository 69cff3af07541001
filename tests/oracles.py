"""Dense curvature matrices in float64, by ways that know nothing of the library."""

import copy

import torch
from torch.func import functional_call
from torch.utils import _pytree as pytree

from cases import Case


def jacobian(case: Case, batch) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """A batch's outputs one after the other, and their Jacobian (outputs, n) by rows.

    Returns:
        The leaves of the output, all of them joined with a graph, and J.
    """
    model, _ = case.in_float64()
    model.train(case.mode == "train")
    parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
    own = {n: parameters[n].requires_grad_() for n in case.names()}
    torch.manual_seed(0)
    output = functional_call(model, own, (batch[0],))
    leaves = [t for t in pytree.tree_leaves(output) if t.is_floating_point()]
    joined = torch.cat([t.reshape(-1) for t in leaves])
    rows = []
    for value in joined:
        found = torch.autograd.grad(value, list(own.values()), retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).reshape(-1)
                    for g, p in zip(found, own.values(), strict=True)
                ]
            )
        )
    return output, joined.detach(), torch.stack(rows)


def reassembled(output, joined: torch.Tensor):
    """The joined outputs in the form that the model gave them."""
    leaves, form = pytree.tree_flatten(output)
    start, made = 0, []
    for leaf in leaves:
        if leaf.is_floating_point():
            made.append(joined[start : start + leaf.numel()].view(leaf.shape))
            start += leaf.numel()
        else:
            made.append(leaf)
    return pytree.tree_unflatten(made, form)


def weights(case: Case) -> list[float]:
    """What each batch's own loss is multiplied by: 1 / Σw for sums, w_b / Σw for means."""
    batches = list(case.objective().batches.reading().__enter__())
    total = sum(b.weight for b in batches)
    is_sum = getattr(case.loss_fn, "reduction", "mean") == "sum"
    return [(1.0 if is_sum else b.weight) / total for b in batches]


def dense_gauss_newton(case: Case) -> torch.Tensor:
    """Σ_b c_b Jᵀ ∇²ℓ_b J as an (n, n) float64 matrix: J row by row, ∇²ℓ_b by autograd."""
    total = 0
    _, batches = case.in_float64()
    loss_fn = case.loss_fn
    if isinstance(loss_fn, torch.nn.Module):
        loss_fn = copy.deepcopy(loss_fn).double()
    for batch, factor in zip(batches, weights(case), strict=True):
        output, joined, rows = jacobian(case, batch)

        def loss(values, output=output, batch=batch):
            return loss_fn(reassembled(output, values), batch[1])

        middle = torch.autograd.functional.hessian(loss, joined)
        total = total + factor * rows.T @ middle @ rows
    return total
