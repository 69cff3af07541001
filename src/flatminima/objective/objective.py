"""Model + loss + batches → L(θ + δ) and ∇L(θ + δ): the face of all evaluation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..derivatives.gradients import accumulate, checkpoints_reentrantly
from ..derivatives.hand_written import HandWritten
from ..errors import DeviceError, InvalidArgumentError, NonFiniteError
from ..support.checks import check_callables, check_choice, check_device, check_instance
from ..support.trees import count_examples
from ..support.vectors import Layout, all_finite, check_vector
from .batches import Batch, Batches
from .evaluator import Evaluator, Pass, Point
from .forward import Evaluated
from .guards import Derivatives
from .losses import is_sum
from .metrics import Metric
from .microbatches import Microbatch, Pieces
from .modules import check_devices, check_model, unwrap
from .points import State, evaluate_states
from .selection import Selection, select_parameters
from .weights import BatchWeight, example_count, split_pair

__all__ = ["BatchPart", "Objective", "WeightedSum", "check_objective"]


BatchPart = Callable[[Evaluated, list[Tensor]], Sequence[Tensor | None]]
"""`part(seen, leaves)` → what a batch adds, linear in ℓ_b, `seen.loss`: a tensor for each leaf."""


def check_objective(call: str, objective: object) -> Objective:
    """Return `objective` when it is one."""
    advice = "Make one with fm.Objective(model, loss_fn, data)."
    return check_instance(call, "objective", objective, Objective, advice)


class Objective:
    """The function that every measure studies: L(θ) = Σ_b w_b ℓ_b(θ) / Σ_b w_b.

    ℓ_b is the mean loss of batch b and w_b the number of terms it averages over, so the value
    does not depend on how the data are cut into batches (in evaluation mode). The objective
    follows the model: it reads the parameters at each call and never writes to them.

    Args:
        model: any module.
        loss_fn: `loss_fn(output, target)` → a scalar, for batches `(input, target)`, averaging
            or, with `reduction="sum"`, adding up.
        data: a tuple of tensors `(inputs, targets)`, a list of batches, a DataLoader or a
            Dataset. Tuples and Datasets are read in batches of `batch_size`.
        params: which parameters make up θ: None for all that require grad, glob patterns on
            names, or a predicate `(name, parameter) -> bool`. Tied tensors count once.
        weight: `batch -> w_b`, where the default would be wrong. The default counts labels for
            cross-entropy (without `ignore_index`, each with its class weight), elements for MSE
            and its like, and examples otherwise.
        mode: "eval"; "train" (batch norm uses the batch's statistics, dropout is drawn from a
            fixed seed for each batch); or "keep", each module as the model has it.
        device: where the model is expected to be; only checked.
        cache: keep the batches on the device: True, False, or "auto" for when they take at most
            a quarter of the memory free there. Data that are read again must come out the same each
            time.
        batch_loss: `batch_loss(model, batch)` → a scalar, in place of `loss_fn`, for everything
            that is not `loss_fn(model(input), target)`.
        batch_size: examples in a batch where `data` comes without batches.
        microbatch: evaluate each batch in pieces of so many examples, which gives the same value
            in less memory; "auto" cuts them only when memory runs out. Refused where pieces would
            change the loss (batch norm or dropout in training mode, contrastive losses).
        progress: show a bar while the data are first read, if that takes long.
        hand_written: use the library's hand-written second derivatives, which make products
            faster: True, False for PyTorch's own, or the names of those to use, as in
            `pytorch_derivatives`. Default: True.

    Attributes:
        model: the module, without the wrappers of `torch.compile`, `DataParallel` and
            `DistributedDataParallel`; their names for its parameters are without prefixes.
        parameters: the selected parameters by name.
        layout: their order in the vectors.
        size: n, the number of selected parameters.
        dtype: of the vectors: the widest of the parameters' own, float32 at least.
        device: of model, data and vectors.
        mode: as given.
        examples: number of examples in the data.
        batches, loss_fn, criterion: the data; as given; whichever of `loss_fn` and `batch_loss`.
        is_sum: whether the loss is a sum over examples, not a mean.
        weigh: `weigh(data, index)` → w_b of a batch, or of a piece of one.

    Raises:
        ParameterSelectionError: `params` selects nothing, or integers; or the model is not
            initialised, quantized or sharded.
        OneShotDataError: `data` is a generator.
        EmptyDataError: no batch, or none with a weight above zero.
        DeviceError: the model is not on `device`, lies on several or on the meta device, or a
            batch cannot be moved there.
        InvalidArgumentError: an option has a value that it cannot have, or the weight of a batch
            is not known.

    Examples:
        >>> import torch, flatminima as fm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), (x, y))
        >>> objective.loss()
        2.5
        >>> objective.gradient()
        tensor([1., 4.])
        >>> objective.loss_at(torch.tensor([-1.0, -1.0]))
        0.0
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        data: Any = None,
        *,
        params: Selection = None,
        weight: Callable[[Any], float] | None = None,
        mode: Literal["eval", "train", "keep"] = "eval",
        device: torch.device | str | None = None,
        cache: bool | Literal["auto"] = "auto",
        batch_loss: Callable[[nn.Module, Any], Tensor] | None = None,
        batch_size: int = 1024,
        microbatch: Microbatch = None,
        progress: bool = True,
        hand_written: HandWritten = True,
    ) -> None:
        hint = "Wrap a function in a small nn.Module."
        check_instance("Objective", "model", model, nn.Module, hint)
        if (loss_fn is None) == (batch_loss is None):
            raise InvalidArgumentError(
                "Objective takes either loss_fn(output, target) or batch_loss=(model, batch); "
                + ("got neither." if loss_fn is None else "got both.")
            )
        check_callables("Objective", loss_fn=loss_fn, batch_loss=batch_loss, weight=weight)
        if data is None:
            wanted = "a tuple of tensors, a list of batches, a DataLoader or a Dataset"
            raise InvalidArgumentError(f"Objective needs data: {wanted}.")
        self.mode = check_choice("Objective", "mode", mode, ("eval", "train", "keep"))
        model = unwrap(model)
        check_model(model)
        self.model = model
        selected = select_parameters(model, params)
        self.layout = Layout.of(selected)
        self.criterion = batch_loss if loss_fn is None else loss_fn
        self.loss_fn, self.weigh = loss_fn, BatchWeight(loss_fn, weight)
        self.is_sum = loss_fn is not None and is_sum(loss_fn)
        check_devices(model, self.device)
        if device is not None and check_device("Objective", device) != self.device:
            said = f"device={str(device)!r} was asked for, but the model is on {self.device}"
            raise DeviceError(f"{said}; move it first with model.to({str(device)!r}).")
        # Whether gradients need .backward(); None until a pass has shown it.
        self._accumulates: bool | None = None
        pieces = Pieces(microbatch, self.weigh, is_sum=self.is_sum, model=model, mode=mode)
        self.examples = 0
        self.batches = Batches(
            data,
            device=self.device,
            weight=self._first_weight,
            cache=cache,
            batch_size=batch_size,
            progress=progress,
        )
        self._evaluator = Evaluator(
            model,
            loss_fn,
            batch_loss,
            mode=mode,
            batches=self.batches,
            is_sum=self.is_sum,
            pieces=pieces,
            eps=max(torch.finfo(d).eps for d in self.layout.dtypes),
            hand_written=hand_written,
        )
        self.differentiation = self._evaluator.differentiation

    @property
    def size(self) -> int:
        """Number of selected parameters n."""
        return self.layout.size

    @property
    def dtype(self) -> torch.dtype:
        """Type of the vectors."""
        return self.layout.dtype

    @property
    def device(self) -> torch.device:
        """Where model, data and vectors are."""
        return self.layout.device

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The selected parameters by name, as the model has them now.

        Raises:
            StateMismatchError: they are no longer of the shape, type or device that they had.
        """
        return self.layout.pick(dict(self.model.named_parameters(remove_duplicate=False)))

    @property
    def keeps_graphs(self) -> bool:
        """Whether a batch's graph may serve again: it is whole, and the model writes to nothing."""
        return self._evaluator.settled and self.is_whole

    def __repr__(self) -> str:
        kind = type(self.model).__name__
        return (
            f"Objective({kind}: {self.size} parameters, {self.examples} examples in "
            f"{len(self.batches)} batches, mode={self.mode!r}, {self.dtype}, {self.device})"
        )

    def point(self) -> Tensor:
        """Return θ: the selected parameters' present values as a new vector, shape (n,)."""
        return self.layout.flatten(self.parameters.values())

    def loss(self) -> float:
        """Return L(θ).

        Raises:
            NonFiniteError: the loss of a batch is NaN or infinite; the message says which.
            LossNotScalarError: the loss is not a scalar.
            DataChangedError: the data are not cached and came out differently.
        """
        return self.sum_over_batches(None)[0]

    def loss_at(self, displacement: Tensor) -> float:
        """L(θ + δ) for `displacement` δ of shape (n,); NaN and infinity are returned as such."""
        return self.sum_over_batches(None, self._checked(displacement, "loss_at"), check=False)[0]

    def gradient(self) -> Tensor:
        """Return ∇L(θ), shape (n,)."""
        return self.value_and_gradient()[1]

    def value_and_gradient(self, displacement: Tensor | None = None) -> tuple[float, Tensor]:
        """Return L(θ + δ) and ∇L(θ + δ), shape (n,), in one pass; without δ at θ itself.

        At θ a loss that is not finite raises as in `loss`; at θ + δ it is returned as it is.
        """
        shift = None if displacement is None else self._checked(displacement, "value_and_gradient")

        accumulates = bool(self._accumulates)
        # Taken now: within a pass the model has other tensors in their places.
        own = list(self.model.parameters())

        def part(seen: Evaluated, leaves: list[Tensor]) -> Sequence[Tensor | None]:
            nonlocal accumulates
            if self._accumulates is None:
                accumulates = accumulates or checkpoints_reentrantly(seen.loss)
            if accumulates:
                return accumulate(seen.loss, leaves, own)
            return torch.autograd.grad(seen.loss, leaves, allow_unused=True)

        value, (gradient,) = self.sum_over_batches(part, shift, check=displacement is None)
        self._accumulates = accumulates
        if displacement is None and not all_finite(gradient):
            slices = self.layout.slices()
            name = next(n for n, place in slices if not torch.isfinite(gradient[place]).all())
            raise NonFiniteError(
                f"The gradient by {name!r} holds NaN or infinity although the loss is {value:.4g}; "
                "look for a root or a norm of zero in the model or the loss."
            )
        return value, gradient

    def losses_at(self, displacements: Iterable[Tensor]) -> list[float]:
        """Return L(θ + δ) for several displacements δ of shape (n,), such as the rows of a matrix.

        The numbers are those of `loss_at`. If the data are read again each time, a reading serves
        as many δ as fit into a budget of memory (256 MB, or four parameter vectors where those are
        more); they are taken from `displacements` as they are needed.
        """
        point, layout = self.point(), self.layout
        moved = (point + self._checked(shift, "losses_at") for shift in displacements)
        states = (dict(zip(layout.names, layout.unflatten(v), strict=True)) for v in moved)
        return [loss for loss, _ in self.evaluate_states(states)]

    def evaluate_states(
        self, states: Iterable[State], metrics: Mapping[str, Metric] | None = None
    ) -> Iterator[tuple[float, dict[str, float]]]:
        """L and metrics with the model's tensors replaced by those of each of several state dicts.

        Args:
            states: parameters and buffers by name; those that one leaves out are the model's own.
                They are taken as they are needed, several to a reading as in `losses_at`.
            metrics: `metric(output, target)` by name, each a mean over the batch's labels (for
                integer targets, those ≠ −100) or examples, averaged over the data accordingly.

        Returns:
            The loss and the metrics of each; NaN and infinity are returned as such.
        """
        if metrics and self.loss_fn is None:
            wanted = "an objective with loss_fn(output, target)"
            why = "with batch_loss= there is no output to judge"
            raise InvalidArgumentError(f"metrics= needs {wanted}; {why}.")
        return evaluate_states(self._evaluator, states, dict(metrics or {}))

    def evaluate_state(
        self, state: State, metrics: Mapping[str, Metric] | None = None
    ) -> tuple[float, dict[str, float]]:
        """Return the same for one state dict."""
        return next(self.evaluate_states([state], metrics))

    def sum_over_batches(
        self,
        part: BatchPart | None,
        displacement: Tensor | None = None,
        *,
        check: bool = True,
        derivatives: Derivatives = 1,
        rows: int = 1,
    ) -> tuple[float, Tensor]:
        """Return L(θ + δ), and the weighted mean of what `part` makes of each batch.

        Args:
            part: what each batch adds, made from its loss ℓ_b with its graph, `seen.loss`, and
                the selected parameters at θ + δ as leaves, and linear in the loss: a tensor for
                each leaf, or None for zeros, as from `torch.autograd.grad`. Several vectors are
                given one after the other. None if only the loss is wanted.
            displacement: δ, shape (n,), of this objective's dtype and device.
            check: raise for a loss that is not finite, naming the batch.
            derivatives: how many `part` takes; for 2, kernels are chosen that have as many.
            rows: how many vectors `part` gives.

        Returns:
            L(θ + δ), added up in float64, and Σ_b w_b part_b / Σ_b w_b, shape (rows, n), or
            (0, n) without `part`.
        """
        total = WeightedSum(self, rows)
        batches = self.evaluate_batches(
            displacement, derivatives=0 if part is None else derivatives
        )
        with batches:
            for seen in batches:
                with batches.visiting(seen):
                    if part is not None:
                        total.add(seen, part(seen, self.leaves_of(seen)))
        return batches.mean_losses(check=check)[0], total.mean()

    def evaluate_batches(
        self,
        displacement: Tensor | None = None,
        *,
        derivatives: Derivatives,
        kept: Mapping[int, Evaluated] | None = None,
        outputs_only: bool = False,
    ) -> Pass:
        """Return one pass over the batches at θ + δ, as `Pass` describes it.

        Args:
            displacement: δ, shape (n,), of this objective's dtype and device.
            derivatives: how many will be taken.
            kept: batches evaluated there before, shown again.
            outputs_only: the outputs are differentiated, and losses have no graph.
        """
        point = Point(
            lambda: self._leaves(displacement, differentiable=derivatives > 0),
            dict(self.model.named_buffers()),
        )
        return Pass(
            self._evaluator,
            [point],
            derivatives=derivatives,
            kept=kept,
            outputs_only=outputs_only,
        )

    def leaves_of(self, seen: Evaluated) -> list[Tensor]:
        """Return the selected parameters that a batch was evaluated with, in order."""
        return [seen.tensors[name] for name in self.layout.names]

    @property
    def is_whole(self) -> bool:
        """Whether no batch is ever cut into pieces."""
        return self._evaluator.pieces.whole

    def replaced(self, *, loss_fn: Any = None, batches: Sequence[Batch] | None = None) -> Objective:
        """The same with another criterion, or on batches that lie on the device, as weighed."""
        twin = copy.copy(self)
        if loss_fn is not None:
            twin.loss_fn = twin.criterion = loss_fn
        if batches is not None:
            twin.batches = Batches.holding(batches, self.device)
            twin.examples = sum(count_examples(batch.data) or 0 for batch in batches)
        twin._evaluator = self._evaluator.replaced(twin.loss_fn, twin.batches)
        twin.differentiation = twin._evaluator.differentiation
        return twin

    def _checked(self, displacement: object, call: str) -> Tensor:
        return check_vector(
            f"Objective.{call}", displacement, size=self.size, dtype=self.dtype, device=self.device
        )

    def _leaves(self, displacement: Tensor | None, *, differentiable: bool) -> dict[str, Tensor]:
        """Return the selected parameters at θ + δ, each in its own memory."""
        point = self.point()
        if displacement is not None:
            point += displacement
        # Each in its own memory: a write to one view would count as a write to all.
        return {
            name: piece.detach().clone().requires_grad_(differentiable)
            for name, piece in zip(self.layout.names, self.layout.unflatten(point), strict=True)
        }

    def _first_weight(self, data: Any, index: int) -> float:
        """Return the weight of one of the user's batches, whose examples are counted."""
        target = None if self.loss_fn is None else split_pair(data, index)[1]
        self.examples += example_count(data) or example_count(target) or 0
        return self.weigh(data, index)


class WeightedSum:
    """Σ_b w_b part_b / Σ_b w_b, the one place where what batches give is added up.

    Args:
        objective: whose batches they are.
        rows: how many vectors each batch gives.
    """

    def __init__(self, objective: Objective, rows: int) -> None:
        self._objective, self._rows = objective, rows
        self._total = torch.zeros(0, objective.size, dtype=objective.dtype, device=objective.device)

    def add(self, seen: Evaluated, part: Sequence[Tensor | None]) -> None:
        """Add what a batch gives: for each vector a tensor for each leaf, or None for zeros."""
        if len(self._total) == 0:
            self._total = self._total.new_zeros(self._rows, self._objective.size)
        # Weighted only now: a half-precision loss times a large weight is inf.
        weight = 1.0 if self._objective.is_sum else seen.batch.weight
        self._objective.layout.add(self._total, part, weight)

    def mean(self) -> Tensor:
        """Return the weighted mean, shape (rows, n), or (0, n) if nothing was added."""
        return self._total.div_(self._objective.batches.total_weight)
