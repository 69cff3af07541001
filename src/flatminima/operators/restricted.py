"""Operators seen through something: some of the parameters, a subspace, a scaling of each."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentTypeError, InvalidArgumentError
from ..objective.selection import matching
from ..support.checks import check_instance
from ..support.vectors import Layout, check_vector
from .linear import LinearOperator, Reader, check_operator

__all__ = ["BlockOperator", "PreconditionedOperator", "ProjectedOperator"]


class _Seen(LinearOperator):
    """An operator made of another one, whose sessions, data, parameters and errors it shares."""

    def __init__(self, operator: LinearOperator, size: int) -> None:
        check_operator(type(self).__name__, operator)
        super().__init__(size, operator.dtype, operator.device)
        self.operator = operator

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """The operator's own."""
        with self.operator.session():
            yield

    @property
    def readings(self) -> int:
        """The operator's own."""
        return self.operator.readings

    @property
    def _readers(self) -> tuple[Reader, ...]:
        return self.operator._readers

    @property
    def notes(self) -> tuple[str, ...]:
        """The operator's own."""
        return self.operator.notes

    @property
    def layout(self) -> Layout | None:
        """The operator's own."""
        return self.operator.layout

    @property
    def parameters(self) -> dict[str, nn.Parameter] | None:
        """The operator's own."""
        return self.operator.parameters

    def _inner(self, vectors: Tensor) -> Tensor:
        """Return products with the operator within."""
        products = self.operator._products(vectors)
        self.error, self.floor = self.operator.error, self.operator.floor
        return products


class BlockOperator(_Seen):
    """The diagonal block of an operator that belongs to some of the parameters.

    Its vectors hold these parameters alone. A product costs as much as one with the whole
    operator; `fm.Objective(..., params=...)` gives the same block of a Hessian for less, where only
    the last layers are wanted, and `fm.layerwise` all blocks at once.

    Args:
        operator: with a layout, such as a `HessianOperator`.
        params: glob patterns on the names of its parameters, or a predicate
            `(name, parameter) -> bool`.

    Attributes:
        operator: as given.

    Raises:
        InvalidArgumentError: the operator does not know of parameters.
        ParameterSelectionError: a pattern matches nothing.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1)
        >>> data = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
        >>> hessian = fm.HessianOperator(fm.Objective(model, torch.nn.MSELoss(), data))
        >>> fm.BlockOperator(hessian, "bias").to_dense()
        tensor([[2.]])
    """

    def __init__(
        self,
        operator: LinearOperator,
        params: str | Sequence[str] | Callable[[str, nn.Parameter], bool],
    ) -> None:
        check_operator("BlockOperator", operator)
        if params is None:
            raise ArgumentTypeError(
                "BlockOperator takes params as glob patterns on parameter names, or a predicate "
                "(name, parameter) -> bool; got None. All parameters are the operator itself."
            )
        layout, parameters = operator.layout, operator.parameters
        if layout is None or parameters is None:
            raise InvalidArgumentError(
                f"BlockOperator needs an operator on the parameters of a model; {operator!r} "
                "does not know of any. Use ProjectedOperator for a subspace of your own."
            )
        chosen = matching(list(parameters.items()), params)
        # Of the operator's type, which may be wider than that of the block's parameters.
        self._layout = dataclasses.replace(Layout.of(chosen), dtype=layout.dtype)
        places = [place for name, place in layout.slices() if name in chosen]
        super().__init__(operator, self._layout.size)
        index = torch.arange(operator.shape[0], device=operator.device)
        self._index = torch.cat([index[place] for place in places])

    @property
    def layout(self) -> Layout:
        """Of the block's parameters."""
        return self._layout

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The block's."""
        own = self.operator.parameters or {}
        return {name: own[name] for name in self._layout.names}

    @property
    def knows_diagonal(self) -> bool:
        """Whether the operator does."""
        return self.operator.knows_diagonal

    def exact_diagonal(self) -> Tensor | None:
        """Return that part of the operator's own."""
        whole = self.operator.exact_diagonal()
        return None if whole is None else whole[self._index]

    def _products(self, vectors: Tensor) -> Tensor:
        whole = vectors.new_zeros(len(vectors), self.operator.shape[0])
        whole[:, self._index] = vectors
        return self._inner(whole)[:, self._index]


class ProjectedOperator(_Seen):
    """P A P, with P the projection onto the span of some vectors, or off it.

    Off the span of eigenvectors it is the operator without them (deflation).

    Args:
        operator: A.
        basis: (n, k), columns that span the subspace; they need not be orthonormal.
        complement: project off the subspace, P = I − QQᵀ, and not onto it, P = QQᵀ.

    Attributes:
        operator: as given.
        basis: Q, (n, k), orthonormal.

    Raises:
        ShapeError: the basis has another number of rows.
        InvalidArgumentError: its columns are linearly dependent.

    Examples:
        >>> import torch, flatminima as fm
        >>> operator = fm.MatrixOperator(torch.diag(torch.tensor([9.0, 4.0, 1.0])))
        >>> top = fm.lanczos(operator, k=1).eigenvectors
        >>> rest = fm.ProjectedOperator(operator, top, complement=True)
        >>> round(fm.lanczos(rest).eigenvalues.item(), 4)
        4.0
    """

    def __init__(
        self, operator: LinearOperator, basis: Tensor, *, complement: bool = False
    ) -> None:
        check_operator("ProjectedOperator", operator)
        super().__init__(operator, operator.shape[0])
        columns = check_vector(
            "ProjectedOperator",
            basis,
            size=operator.shape[0],
            dtype=operator.dtype,
            device=operator.device,
            columns=True,
        )
        lengths = torch.linalg.vector_norm(columns, dim=0).clamp(min=torch.finfo(self.dtype).tiny)
        # A short column is as good as a long one.
        q, r = torch.linalg.qr(columns / lengths)
        rank = int((r.diagonal().abs() > 1e3 * torch.finfo(q.dtype).eps).sum())
        if columns.shape[1] == 0 or rank < columns.shape[1]:
            raise InvalidArgumentError(
                f"ProjectedOperator takes linearly independent columns, at most {self.shape[0]}; "
                f"the basis of shape {tuple(columns.shape)} has rank {rank}."
            )
        self.basis, self._complement = q, complement

    def _projected(self, vectors: Tensor) -> Tensor:
        inside: Tensor = (vectors @ self.basis) @ self.basis.T
        return vectors - inside if self._complement else inside

    def _products(self, vectors: Tensor) -> Tensor:
        return self._projected(self._inner(self._projected(vectors)))


class PreconditionedOperator(_Seen):
    """D^{-1/2} A D^{-1/2} with a positive diagonal D.

    With A the Hessian and D the preconditioner of an adaptive optimiser its largest eigenvalue is
    what the edge of stability speaks of: training with step η settles where it is about
    (2 + 2β₁) / ((1 − β₁) η), 38 / η for Adam's β₁ = 0.9 (Cohen et al. 2022, arXiv:2207.14484,
    section 3). An eigenvector u belongs to the direction D^{-1/2} u of the parameters.

    Args:
        operator: A.
        preconditioner: D as a tensor (n,), or an optimiser that has made a step, from whose state
            it is taken as it is now: √v̂ + ε of Adam, AdamW, NAdam and RAdam (with the bias
            correction; the running maximum with AMSGrad), √v + ε of RMSprop (less the squared
            mean if centred). What RAdam's rectification multiplies steps by counts as part of
            its step size.

    Attributes:
        operator: as given.
        diagonal: D, a copy.

    Raises:
        InvalidArgumentError: D has entries that are not positive; the optimiser has made no step
            yet, or does not hold a parameter; or the operator does not know of parameters.
        ArgumentTypeError: the optimiser is of another kind.
        ShapeError: D has another length.
        NonFiniteError: NaN or infinity in D.

    Examples:
        >>> import torch, flatminima as fm
        >>> operator = fm.MatrixOperator(torch.diag(torch.tensor([8.0, 1.0])))
        >>> scaled = fm.PreconditionedOperator(operator, torch.tensor([4.0, 1.0]))
        >>> scaled.to_dense()
        tensor([[2., 0.],
                [0., 1.]])
    """

    def __init__(
        self, operator: LinearOperator, preconditioner: Tensor | torch.optim.Optimizer
    ) -> None:
        check_operator("PreconditionedOperator", operator)
        super().__init__(operator, operator.shape[0])
        if isinstance(preconditioner, torch.optim.Optimizer):
            diagonal = _second_moments(operator, preconditioner)
        else:
            check_instance(
                "PreconditionedOperator",
                "preconditioner",
                preconditioner,
                Tensor,
                "Give a tensor of shape (n,) or a torch.optim.Optimizer.",
            )
            diagonal = check_vector(
                "PreconditionedOperator",
                preconditioner.detach(),
                size=operator.shape[0],
                dtype=operator.dtype,
                device=operator.device,
            ).clone()
        if not bool((diagonal > 0).all()):
            raise InvalidArgumentError(
                f"PreconditionedOperator takes a positive diagonal; the least of its entries is "
                f"{float(diagonal.min()):.3g}. Add a small number to it, as optimisers add ε."
            )
        self.diagonal = diagonal
        self._scale = diagonal.rsqrt()
        wide = diagonal.double()
        self._error_factor = float(1 / wide.min())
        # Rounding in an entry is as small as the gradients of its parameter, and these are as
        # small as D. The worst case would be 1 / ε wherever a parameter has no gradient at all.
        self._floor_factor = float(wide.sum() / wide.square().sum())

    @property
    def knows_diagonal(self) -> bool:
        """Whether the operator does."""
        return self.operator.knows_diagonal

    def exact_diagonal(self) -> Tensor | None:
        """Return the operator's own over D."""
        own = self.operator.exact_diagonal()
        return None if own is None else own / self.diagonal

    def _products(self, vectors: Tensor) -> Tensor:
        products = self._inner(vectors * self._scale) * self._scale
        self.error *= self._error_factor
        self.floor *= self._floor_factor
        return products


def _second_moments(operator: LinearOperator, optimiser: torch.optim.Optimizer) -> Tensor:
    """Return D of the optimiser for the operator's parameters, shape (n,)."""
    layout, parameters = operator.layout, operator.parameters
    if layout is None or parameters is None:
        raise InvalidArgumentError(
            f"PreconditionedOperator takes an optimiser for operators on the parameters of a "
            f"model; {operator!r} does not know of any. Give the diagonal as a tensor."
        )
    groups = {id(p): group for group in optimiser.param_groups for p in group["params"]}
    pieces = []
    for name, parameter in parameters.items():
        if id(parameter) not in groups:
            raise InvalidArgumentError(
                f"The optimiser given to PreconditionedOperator does not hold the parameter "
                f"{name!r}: it is that of another model or copy, or of some parameters only. "
                "Leave out what it does not hold with params=."
            )
        state, group = optimiser.state.get(parameter, {}), groups[id(parameter)]
        # Before the first step the settings alone tell what kind it is.
        if not ({"betas", "alpha"} & group.keys() and isinstance(group.get("eps"), (int, float))):
            raise _unknown(optimiser)
        if not state:
            raise InvalidArgumentError(
                f"The optimiser given to PreconditionedOperator has made no step for {name!r} "
                "yet, so there are no second moments. Let it make one, or load its state_dict."
            )
        pieces.append(_preconditioner(state, group, optimiser))
    return layout.flatten(pieces)


def _preconditioner(
    state: dict[str, Tensor], group: dict[str, Any], optimiser: torch.optim.Optimizer
) -> Tensor:
    """Return √v + ε of one parameter, in float32 at least: ε is zero in float16."""
    eps = float(group["eps"])
    found: Tensor | None = None
    if {"exp_avg_sq", "step"} <= state.keys():
        moments = _wide(state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"])
        root = (1 - float(group["betas"][1]) ** float(state["step"])) ** 0.5
        rooted = isinstance(optimiser, torch.optim.RAdam)
        found = (moments.sqrt() + eps) / root if rooted else moments.sqrt() / root + eps
    elif "square_avg" in state and "acc_delta" not in state:
        moments = _wide(state["square_avg"])
        if group.get("centered"):
            moments = moments - _wide(state["grad_avg"]).square()
        found = moments.clamp(min=0).sqrt() + eps
    if found is None:
        raise _unknown(optimiser)
    return found


def _wide(moments: Tensor) -> Tensor:
    return moments.detach().to(torch.promote_types(moments.dtype, torch.float32))


def _unknown(optimiser: torch.optim.Optimizer) -> ArgumentTypeError:
    return ArgumentTypeError(
        f"PreconditionedOperator knows the state of Adam, AdamW, NAdam, RAdam and RMSprop; got "
        f"{type(optimiser).__name__}. Give the diagonal as a tensor (plain gradient descent has "
        "none: its edge of stability is that of the operator itself)."
    )
