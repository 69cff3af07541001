"""The Hessian of an objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..checks import check_choice
from ..errors import FiniteDifferenceWarning, NonFiniteError, NotTwiceDifferentiableError, warn
from ..objective import Objective, check_objective
from ..products import Block, block_double_backward, central_differences, double_backward, where
from ..randomness import as_generator, rademacher
from ..tracing import GraphTrace
from .linear import LinearOperator

__all__ = ["HessianOperator"]

METHODS = ("auto", "double_backward", "finite_differences")


class HessianOperator(LinearOperator):
    """H = ∇²L(θ), by products over the whole data set.

    Products are exact, reverse over reverse: counting operations, one costs three gradients, the
    gradient with its graph and twice as much to differentiate it. `matmat` reads each batch and
    builds that graph once for all columns. Attention runs under the MATH kernel meanwhile, and
    recurrent modules without their fused kernels, which have no second derivatives.

    Where an operation has none in any form, products are central differences of gradients, four
    gradients each, with an estimate of their error.

    Args:
        objective: what is differentiated twice, at the model's present parameters.
        method: "auto": exact where possible; "double_backward" insists on it;
            "finite_differences" asks for differences.

    Attributes:
        objective: as given.
        method: the one in use, "double_backward" or "finite_differences".
        error: the largest error of a product with a unit vector that has been estimated so far;
            0 where products are exact.
        floor: 100 units of precision of the loss, from the first product on.
        reason: why products are differences, a sentence; "" where they are exact or were asked
            to be differences.

    Raises:
        NonFiniteError: from a product, when the loss of a batch is not finite.
        NotTwiceDifferentiableError: from a product, when an operation has no second derivative
            and `method="double_backward"`.

    Warns:
        FiniteDifferenceWarning: from the first product, when "auto" falls back to differences;
            it names the operation and the module that called it.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> hessian = fm.HessianOperator(fm.Objective(model, torch.nn.MSELoss(), (x, y)))
        >>> hessian @ torch.tensor([1.0, 1.0])  # 2 XᵀX / N = diag(1, 4)
        tensor([1., 4.])
    """

    def __init__(
        self,
        objective: Objective,
        *,
        method: Literal["auto", "double_backward", "finite_differences"] = "auto",
    ) -> None:
        check_objective("HessianOperator", objective)
        super().__init__(objective.size, objective.dtype, objective.device)
        self.objective = objective
        check_choice("HessianOperator", "method", method, METHODS)
        self._insists = method == "double_backward"
        self.method = "finite_differences" if method == "finite_differences" else "double_backward"
        self.reason = ""
        # Whether a pass has shown that every operation has a second derivative.
        self._examined = False

    def _products(self, vectors: Tensor) -> Tensor:
        layout = self.objective.layout

        def part(loss: Tensor, leaves: list[Tensor], trace: GraphTrace | None) -> Tensor:
            return torch.stack(double_backward(loss, leaves, list(vectors), layout, trace))

        def differences() -> Tensor:
            return torch.stack([self._difference(v) for v in vectors])

        return self._exact_or(part, differences)

    def block_product(self, vector: Tensor, blocks: Sequence[Block]) -> Tensor:
        """The product with diagonal blocks of H, those of `blocks`, shape (n,) → (n,).

        Args:
            vector: shape (n,), unchecked.
            blocks: disjoint; each the positions of its parameters in `objective.layout`.
        """
        layout = self.objective.layout

        def part(loss: Tensor, leaves: list[Tensor], trace: GraphTrace | None) -> Tensor:
            return block_double_backward(loss, leaves, vector, blocks, layout, trace)

        def differences() -> Tensor:
            out = torch.zeros_like(vector)
            for block in blocks:
                inside = layout.mask(block)
                out += self._difference(vector * inside) * inside
            return out

        return self._exact_or(part, differences)

    def _exact_or(
        self,
        part: Callable[[Tensor, list[Tensor], GraphTrace | None], Tensor],
        differences: Callable[[], Tensor],
    ) -> Tensor:
        """The exact product where there is one, by `part`."""
        if self.method == "double_backward":
            try:
                if self._examined:
                    return self._summed(lambda loss, leaves: part(loss, leaves, None))
                with GraphTrace(self.objective.model) as trace:
                    product = self._summed(lambda loss, leaves: part(loss, leaves, trace))
                self._check_functions(trace)
                self._examined = True
                return product
            except NotTwiceDifferentiableError as error:
                if self._insists:
                    raise
                self.method, self.reason = "finite_differences", str(error).split(". ")[0] + "."
                product = differences()
                self._announce(product)
                return product
        return differences()

    def _summed(self, part: Callable[[Tensor, list[Tensor]], Tensor]) -> Tensor:
        loss, product = self.objective.sum_over_batches(part, derivatives=2)
        assert product is not None
        # What cancels exactly on paper, such as a bias before batch norm, leaves this much.
        self.floor = 100 * torch.finfo(self.dtype).eps * abs(loss)
        return product

    def _difference(self, vector: Tensor) -> Tensor:
        objective = self.objective
        types = list(objective.layout.dtypes)
        if torch.is_autocast_enabled(self.device.type):
            types.append(torch.get_autocast_dtype(self.device.type))
        eps = max(torch.finfo(dtype).eps for dtype in types)
        product, error = central_differences(
            lambda shift: objective.value_and_gradient(shift)[1], vector, objective.point(), eps
        )
        length = float(torch.linalg.vector_norm(vector))
        if not math.isfinite(error):
            raise NonFiniteError(
                "A gradient holds NaN or infinity at one of the points θ ± h v that a Hessian "
                "product by finite differences needs."
            )
        self.error = max(self.error, error / length if length > 0 else 0.0)
        return product

    def _check_functions(self, trace: GraphTrace) -> None:
        """Try the user's own autograd functions, whose backward may hide what it depends on."""
        if not trace.functions:
            return
        layout = self.objective.layout
        # Not the caller's vector, in which the functions may have no part.
        probe = rademacher(
            1, self.shape[0], as_generator(0, self.device), dtype=self.dtype, device=self.device
        )[0]
        exact = self._summed(lambda loss, leaves: double_backward(loss, leaves, [probe], layout)[0])
        other = self._difference(probe)
        allowed = 10 * self.error * float(torch.linalg.vector_norm(probe))
        self.error = 0.0
        # Tensor by tensor: what is hidden may be small beside the rest of the model's curvature.
        pieces = [torch.split(v, list(layout.sizes)) for v in (exact - other, other)]
        norms = torch.tensor(
            [[float(torch.linalg.vector_norm(p)) for p in piece] for piece in pieces]
        )
        gaps, sizes = norms.double()
        # The estimate knows of kinks, which differences see and derivatives do not.
        if bool((gaps > (0.01 * sizes).clamp(min=allowed)).any()):
            name, module = next(iter(trace.functions.items()))
            raise NotTwiceDifferentiableError(
                f"The second derivative that PyTorch finds by {name}{where(module)} contradicts "
                "differences of gradients: its backward hides what it depends on. Write it with "
                "differentiable operations, or mark it with once_differentiable.",
                name,
                module,
            )

    def _announce(self, product: Tensor) -> None:
        size = float(torch.linalg.vector_norm(product)) or 1.0
        warn(
            f"{self.reason[:-1]}, so Hessian products are central differences of gradients, with "
            f"an estimated error of {self.error:.1e} for unit vectors (the first product has "
            f"norm {size:.1e}). method='double_backward' refuses them.",
            FiniteDifferenceWarning,
        )
