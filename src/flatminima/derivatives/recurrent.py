"""LSTM layers with a second derivative of a few operations for each time step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .torch_private import in_transform, is_pytorchs, names_of_weights

__all__ = ["twice_differentiable"]


def twice_differentiable(module: nn.RNNBase, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward for a module that equals its own and is cheap to differentiate twice.

    PyTorch's own LSTM without fused kernels runs some twenty small operations for each time step,
    and its second derivative some hundred and thirty. Here the loop over time contains only the
    recurrence, in about five operations; everything else is done for the whole sequence at once.

    Args:
        module: the module whose forward is replaced, examined at each call.
        forward: its own forward, called for everything that is not treated here: modules other
            than `nn.LSTM` and its subclasses, packed sequences, projections (`proj_size`),
            dropout in training mode, half precision, autocast, input that is a leaf of the graph,
            input that does not fit (for PyTorch's error), and a forward of `nn.LSTM` that another
            library has wrapped.

    Returns:
        A function with the arguments of `forward`.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        found = _arguments(*args, **kwargs)
        if found is None or not _is_treated(module, *found):
            return forward(*args, **kwargs)
        return _lstm(module, *found)

    return run


def _arguments(*args: Any, **kwargs: Any) -> tuple[Any, Any] | None:
    """The input and the initial state of a call of `nn.LSTM`."""
    names = ("input", "hx")
    given = dict(zip(names, args, strict=False)) | kwargs
    if len(args) > 2 or "input" not in given or not given.keys() <= set(names):
        return None
    return given["input"], given.get("hx")


def _is_treated(module: nn.RNNBase, x: Any, hx: Any) -> bool:
    if (
        in_transform()
        or type(module) is not nn.LSTM
        or not is_pytorchs(nn.LSTM.forward, nn.modules.rnn)
        or module.proj_size
        or not isinstance(x, Tensor)
    ):
        return False
    if x.requires_grad and x.is_leaf:
        return False  # a loss that differentiates by the input needs a third derivative
    if (module.dropout and module.training) or torch.is_autocast_enabled(x.device.type):
        return False
    if x.dim() not in (2, 3) or x.shape[-1] != module.input_size or not x.numel():
        return False
    size = (module.num_layers * (1 + module.bidirectional), module.hidden_size)
    if hx is not None:
        if not isinstance(hx, tuple) or len(hx) != 2:
            return False
        batch = x.shape[0 if module.batch_first else 1] if x.dim() == 3 else None
        wanted = (size[0], size[1]) if batch is None else (size[0], batch, size[1])
        if any(not isinstance(h, Tensor) or h.shape != wanted for h in hx):
            return False
    tensors = [x, *(() if hx is None else hx), *_weights(module)]
    kinds = {(t.dtype, t.device) for t in tensors}
    return len(kinds) == 1 and x.dtype in (torch.float32, torch.float64)


def _weights(module: nn.RNNBase) -> list[Tensor]:
    return [getattr(module, name) for names in names_of_weights(module) for name in names]


def _lstm(
    module: nn.RNNBase, x: Tensor, hx: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Compute `nn.LSTM`; its documentation has the shapes."""
    batched = x.dim() == 3
    if not batched:
        x = x.unsqueeze(1)
        hx = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
    elif module.batch_first:
        x = x.transpose(0, 1)
    directions = 1 + module.bidirectional
    if hx is None:
        zeros = x.new_zeros(module.num_layers * directions, x.shape[1], module.hidden_size)
        hx = (zeros, zeros)
    last_h: list[Tensor] = []
    last_c: list[Tensor] = []
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            w_ih, w_hh, *biases = (getattr(module, n) for n in names_of_weights(module)[number])
            inputs = F.linear(x, w_ih, biases[0] + biases[1] if biases else None)
            if direction:
                inputs = inputs.flip(0)
            first = hx[0][number], hx[1][number]
            h, c, _ = _Layer.apply(inputs, *first, w_hh)  # type: ignore[no-untyped-call]
            last_h.append(h[-1])
            last_c.append(c[-1])
            outputs.append(h.flip(0) if direction else h)
        x = torch.cat(outputs, -1) if directions == 2 else outputs[0]
    if not batched:
        x = x.squeeze(1)
    elif module.batch_first:
        x = x.transpose(0, 1)
    states = [torch.stack(s) for s in (last_h, last_c)]
    if not batched:
        states = [s.squeeze(1) for s in states]
    return x, (states[0], states[1])


# Below, `gates` holds i, f, g, o after their sigmoids and tanh, (T, N, 4 H). A name with d_ is an
# adjoint in the computation of the gradient, one with g_ an adjoint in that of the product.


class _Layer(Function):
    """Inputs (T, N, 4 H), initial states and W_hh → hidden states, cells and gates at each time."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, h0: Tensor, c0: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        h, c, size = h0, c0, h0.shape[-1]
        hidden, cells, gates = [], [], []
        for x in inputs:
            a = torch.addmm(x, h, weight.t())
            first, g, o = torch.split(a, [2 * size, size, size], -1)
            first, g, o = first.sigmoid(), g.tanh(), o.sigmoid()
            i, f = torch.chunk(first, 2, -1)
            c = torch.addcmul(f * c, i, g)
            h = o * c.tanh()
            hidden.append(h)
            cells.append(c)
            gates += [first, g, o]
        stacked = torch.cat(gates, -1).view(h.shape[0], len(hidden), 4 * size).transpose(0, 1)
        out = torch.stack(hidden), torch.stack(cells), stacked.contiguous()
        ctx.save_for_backward(h0, c0, weight, *out)
        ctx.factors = None
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(
        ctx: Any, d_hidden: Tensor | None, d_cells: Tensor | None, d_gates: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        h0, c0, weight, hidden, cells, gates = ctx.saved_tensors
        if d_hidden is None and d_cells is None and d_gates is None:
            return (None,) * 4
        if ctx.factors is None:
            # Constants in the gradient's recurrence, kept for later passes.
            with torch.no_grad():
                ctx.factors = _Factors(gates, cells, c0)
        d_inputs, d_c0 = _LayerBackward.apply(  # type: ignore[no-untyped-call]
            *(d_hidden, d_cells, d_gates, gates, cells, c0, weight, ctx.factors),
            torch.is_grad_enabled(),
        )
        before = torch.cat([h0.unsqueeze(0), hidden[:-1]])
        d_weight = d_inputs.flatten(0, 1).t() @ before.flatten(0, 1)
        return d_inputs, d_inputs[0] @ weight, d_c0, d_weight


class _Factors:
    """The factors in the recurrences of the derivatives, for all times at once.

    Of shape (T, N, 4, H): `slopes`, the gates' derivatives; `slopes_partners`, these times what
    each gate multiplies; `curves`, the derivative of those by the gate. Of shape (T, N, H):
    `by_c`, the derivative of h by c; `m`, tanh c; the output gate and the forget gate.
    """

    def __init__(self, gates: Tensor, cells: Tensor, c0: Tensor) -> None:
        quads = _quads(gates)
        i, self.f, g, self.o = quads.unbind(-2)
        self.m = cells.tanh()
        before = torch.cat([c0.unsqueeze(0), cells[:-1]])
        partners = torch.stack([g, before, i, self.m], -2)
        self.bends = 1 - 2 * quads
        self.bends[:, :, 2] -= 1
        self.slopes = quads - quads * quads
        self.slopes[:, :, 2] += 1 - g
        self.slopes_partners = self.slopes * partners
        self.curves = partners.mul_(self.bends)
        self.by_c = self.o * (1 - self.m * self.m)


def _quads(gates: Tensor) -> Tensor:
    return gates.view(*gates.shape[:-1], 4, gates.shape[-1] // 4)


class _LayerBackward(Function):
    """The gradient by the inputs and by c0, as a function with a derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        d_hidden: Tensor | None,
        d_cells: Tensor | None,
        d_gates: Tensor | None,
        gates: Tensor,  # noqa: ARG004
        cells: Tensor,  # noqa: ARG004
        c0: Tensor,
        weight: Tensor,
        factors: _Factors,
        again: bool,
    ) -> tuple[Tensor, Tensor]:
        own = None if d_gates is None else _quads(d_gates) * factors.slopes
        d_h: Tensor = torch.zeros_like(c0) if d_hidden is None else d_hidden[-1]
        d_c = torch.zeros_like(c0)
        spreads: list[Tensor] = []
        inputs: list[Tensor] = []
        for t in range(len(factors.m) - 1, -1, -1):
            if inputs:
                a = inputs[-1].flatten(-2)
                d_h = a @ weight if d_hidden is None else torch.addmm(d_hidden[t], a, weight)
            d_c = torch.addcmul(d_c if d_cells is None else d_c + d_cells[t], d_h, factors.by_c[t])
            spread, by = torch.stack([d_c, d_c, d_c, d_h], -2), factors.slopes_partners[t]
            if again:
                spreads.append(spread)
            inputs.append(spread * by if own is None else torch.addcmul(own[t], spread, by))
            d_c = d_c * factors.f[t]
        d_inputs = torch.stack(inputs[::-1]).flatten(-2)
        if again:  # it will be differentiated
            ctx.save_for_backward(
                # The factors too, so that their memory is counted.
                *(weight, c0, d_gates, d_inputs, torch.stack(spreads[::-1])),
                *vars(factors).values(),
            )
            ctx.factors = factors
        ctx.set_materialize_grads(False)
        return d_inputs, d_c

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_inputs: Tensor | None, g_c0: Tensor | None) -> tuple[Any, ...]:
        weight, c0, d_gates, d_inputs, spreads = ctx.saved_tensors[:5]
        factors: _Factors = ctx.factors
        if g_inputs is None:
            g_inputs = torch.zeros_like(d_inputs)
        # The adjoint of a recurrence that runs backwards in time runs forwards.
        g_c = torch.zeros_like(c0) if g_c0 is None else g_c0
        g_h: Tensor | None = None
        inputs, hs, cs = [], [], [g_c]
        for t, g_input in enumerate(g_inputs):
            g_a = g_input if g_h is None else torch.addmm(g_input, g_h, weight.t())
            inputs.append(g_a)
            shares = _quads(g_a) * factors.slopes_partners[t]
            g_c = torch.addcmul(shares[:, :3].sum(1), g_c, factors.f[t])
            g_h = torch.addcmul(shares[:, 3], g_c, factors.by_c[t])
            cs.append(g_c)
            hs.append(g_h)
        a, all_c, g_hidden = _quads(torch.stack(inputs)), torch.stack(cs), torch.stack(hs)
        g_c, d_c, d_h, m = all_c[1:], spreads[:, :, 0], spreads[:, :, 3], factors.m
        # Each gate acts through its own slope, and as the partner of another gate. In place,
        # because allocating tensors of this size takes longer than multiplying them.
        g_gates = a * spreads
        own = g_gates * factors.slopes
        g_gates.mul_(factors.curves)
        if d_gates is not None:
            g_gates += a * _quads(d_gates) * factors.bends
        both = g_c * d_h
        tail = 1 - m * m
        g_gates[:, :, 0] += own[:, :, 2]
        g_gates[:, :, 1] += all_c[:-1] * d_c
        g_gates[:, :, 2] += own[:, :, 0]
        g_gates[:, :, 3] += both * tail
        g_cells = (own[:, :, 3] - 2 * both * factors.o * m) * tail
        g_past = own[:, :, 1]
        g_cells[:-1] += g_past[1:]
        has = ctx.needs_input_grad
        return (
            g_hidden if has[0] else None,
            g_c if has[1] else None,
            a.mul_(factors.slopes).flatten(-2) if has[2] else None,
            g_gates.flatten(-2),
            g_cells,
            g_past[0],
            d_inputs[1:].flatten(0, 1).t() @ g_hidden[:-1].flatten(0, 1),
            None,
            None,
        )
