"""Model + loss + batches → L(θ + δ) and ∇L(θ + δ): the one room that calls a model forward."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .batches import Batch, Batches, located
from .checks import check_choice, check_device, check_instance
from .errors import (
    ArgumentTypeError,
    DeviceError,
    InvalidArgumentError,
    LossNotScalarError,
    NonFiniteError,
    StateMismatchError,
)
from .metrics import Metric, label_count, metric_value
from .nested import tensors_in, to_device
from .randomness import reseed
from .vectors import Layout, Selection, check_vector, select_parameters
from .weights import check_weight, count_terms, example_count, hides_labels, is_sum

__all__ = ["Objective", "check_objective"]


BatchPart = Callable[[Tensor, list[Tensor]], Tensor]
"""`part(ℓ_b with its graph, leaves)` → what the batch adds, linear in ℓ_b: a vector or a matrix."""


def check_objective(call: str, objective: object) -> Objective:
    """`objective` when it is one."""
    advice = "Make one with fm.Objective(model, loss_fn, data)."
    return check_instance(call, "objective", objective, Objective, advice)


class _Copies:
    """Private tensors in place of a model's own, made again when a forward has written to them."""

    def __init__(self, make: Callable[[], dict[str, Tensor]]) -> None:
        self._make = make
        self._renew()

    def _renew(self) -> None:
        self._tensors = self._make()
        self._versions = [t._version for t in self._tensors.values()]

    def fresh(self) -> dict[str, Tensor]:
        if any(
            t._version != v for t, v in zip(self._tensors.values(), self._versions, strict=True)
        ):
            self._renew()
        return self._tensors


def _cloned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


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
        device: where the model is expected to be; asked for only to be checked.
        cache: keep the batches on the device: True, False, or "auto" for when they take at most
            a quarter of the memory free there. Data read anew must come out the same each time.
        batch_loss: `batch_loss(model, batch)` → a scalar, in place of `loss_fn`, for everything
            that is not `loss_fn(model(input), target)`.
        batch_size: examples in a batch where `data` comes without batches.
        progress: show a bar while the data are first read, if that takes long.

    Attributes:
        model: the module, as given.
        parameters: the selected parameters by name.
        layout: their order in the vectors.
        size: n, the number of selected parameters.
        dtype: of the vectors: the parameters' own, float32 at least.
        device: of model, data and vectors.
        mode: as given.
        examples: number of examples in the data.
        batches: the data as they are read.

    Raises:
        ParameterSelectionError: `params` selects nothing, or integers.
        OneShotDataError: `data` is a generator.
        EmptyDataError: no batch, or none with a weight above zero.
        DeviceError: the model is not on `device`, or a batch cannot be moved there.

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
        progress: bool = True,
    ) -> None:
        check_instance(
            "Objective", "model", model, nn.Module, "Wrap a function in a small nn.Module."
        )
        if (loss_fn is None) == (batch_loss is None):
            raise InvalidArgumentError(
                "Objective takes either loss_fn(output, target) or batch_loss=(model, batch); "
                + ("got neither." if loss_fn is None else "got both.")
            )
        for name, function in (
            ("loss_fn", loss_fn),
            ("batch_loss", batch_loss),
            ("weight", weight),
        ):
            if function is not None and not callable(function):
                raise ArgumentTypeError(
                    f"The {name!r} argument of Objective must be callable; got a "
                    f"{type(function).__name__}."
                )
        if data is None:
            raise InvalidArgumentError(
                "Objective needs data: a tuple of tensors, a list of batches, a DataLoader or a "
                "Dataset."
            )
        self.mode = check_choice("Objective", "mode", mode, ("eval", "train", "keep"))
        self.model = model
        selected = select_parameters(model, params)
        self.layout = Layout.of(selected)
        self._loss_fn, self._weight = loss_fn, weight
        self._forward_module = _Forward(model, loss_fn, batch_loss)
        self._is_sum = loss_fn is not None and is_sum(loss_fn)
        self._check_devices(device)
        self.examples = 0
        self._input_is_written: bool | None = None
        self.batches = Batches(
            data,
            device=self.device,
            weight=self._weigh,
            cache=cache,
            batch_size=batch_size,
            progress=progress,
        )

    # ----------------------------------------------------------------------------- what it is

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
        own = dict(self.model.named_parameters(remove_duplicate=False))
        layout = self.layout
        for name, shape, dtype in zip(layout.names, layout.shapes, layout.dtypes, strict=True):
            now = own.get(name)
            if now is None or (now.shape, now.dtype, now.device) != (shape, dtype, layout.device):
                found = "gone" if now is None else f"{tuple(now.shape)}, {now.dtype}, {now.device}"
                raise StateMismatchError(
                    f"The parameter {name!r} was {tuple(shape)}, {dtype}, {layout.device} when the "
                    f"Objective was made and is now {found}; make a new Objective."
                )
        return {name: own[name] for name in layout.names}

    def __repr__(self) -> str:
        kind = type(self.model).__name__
        return (
            f"Objective({kind}: {self.size} parameters, {self.examples} examples in "
            f"{len(self.batches)} batches, mode={self.mode!r}, {self.dtype}, {self.device})"
        )

    def point(self) -> Tensor:
        """θ: the selected parameters' present values as a new vector, shape (n,)."""
        return self.layout.flatten(self.parameters.values())

    # --------------------------------------------------------------------------------- values

    def loss(self) -> float:
        """L(θ).

        Raises:
            NonFiniteError: the loss of a batch is NaN or infinite; the message says which.
            LossNotScalarError: the loss is not a scalar.
            DataChangedError: the data are not cached and came out differently.
        """
        return self.sum_over_batches(None)[0]

    def loss_at(self, displacement: Tensor) -> float:
        """L(θ + δ) for `displacement` δ of shape (n,); NaN and infinity are returned as such."""
        shift = self._checked(displacement, "loss_at")
        return self.sum_over_batches(None, shift, check=False)[0]

    def gradient(self) -> Tensor:
        """∇L(θ), shape (n,)."""
        return self.value_and_gradient()[1]

    def value_and_gradient(self, displacement: Tensor | None = None) -> tuple[float, Tensor]:
        """L(θ + δ) and ∇L(θ + δ), shape (n,), in one pass; without δ at θ itself.

        At θ a loss that is not finite raises as in `loss`; at θ + δ it is returned as it is.
        """
        shift = None if displacement is None else self._checked(displacement, "value_and_gradient")

        def part(loss: Tensor, leaves: list[Tensor]) -> Tensor:
            return self.layout.flatten(torch.autograd.grad(loss, leaves, allow_unused=True))

        value, gradient = self.sum_over_batches(part, shift, check=displacement is None)
        assert gradient is not None
        if displacement is None and not bool(torch.isfinite(gradient).all()):
            places = self.layout.slices()
            name = next(n for n, place in places if not torch.isfinite(gradient[place]).all())
            raise NonFiniteError(
                f"The gradient by {name!r} holds NaN or infinity although the loss is {value:.4g}; "
                "look for a root or a norm of zero in the model or the loss."
            )
        return value, gradient

    def evaluate_state(
        self, state: Mapping[str, Tensor], metrics: Mapping[str, Metric] | None = None
    ) -> tuple[float, dict[str, float]]:
        """L and metrics with the model's tensors replaced by those of a state dict.

        Args:
            state: parameters and buffers by name; those it leaves out are the model's own.
            metrics: `metric(output, target)` by name, each a mean over the batch's labels (for
                integer targets, those ≠ −100) or examples, averaged over the data accordingly.

        Returns:
            The loss and the metrics; NaN and infinity are returned as such.
        """
        metrics = dict(metrics or {})
        if metrics and self._loss_fn is None:
            raise InvalidArgumentError(
                "metrics= needs an objective with loss_fn(output, target); with batch_loss= "
                "there is no output to judge."
            )
        own = self._detached_parameters()
        given = {name: state.get(name, p) for name, p in own.items()}
        buffers = {name: state.get(name, b) for name, b in self.model.named_buffers()}
        sums = dict.fromkeys(metrics, 0.0)
        counts = dict.fromkeys(metrics, 0.0)

        def measure(batch: Batch, output: Any, target: Any) -> None:
            count = label_count(target)
            count = batch.weight if count is None else count
            for name, metric in metrics.items():
                if count > 0:
                    sums[name] += count * metric_value(name, metric(output, target))
                    counts[name] += count

        value = self._mean_loss(
            lambda: _cloned(given),
            buffers,
            lambda batch, loss, output, target, leaves: measure(batch, output, target),  # noqa: ARG005
            check=False,
        )
        return value, {n: sums[n] / counts[n] if counts[n] else math.nan for n in sums}

    # ----------------------------------------------------------------------- for other rooms

    def sum_over_batches(
        self, part: BatchPart | None, displacement: Tensor | None = None, *, check: bool = True
    ) -> tuple[float, Tensor | None]:
        """The one place where batches are added up.

        Args:
            part: what each batch adds, made from its loss ℓ_b with its graph and the selected
                parameters at θ + δ as leaves, and linear in the loss; None when only the loss is
                wanted.
            displacement: δ, shape (n,), of this objective's dtype and device.
            check: raise for a loss that is not finite, naming the batch.

        Returns:
            L(θ + δ), added up in float64, and Σ_b w_b part_b / Σ_b w_b (None without `part`).
        """
        total: Tensor | None = None

        def add(batch: Batch, loss: Tensor, leaves: dict[str, Tensor]) -> None:
            nonlocal total
            if part is None:
                return
            self._check_graph(loss, batch)
            # Weighted only now: a half-precision loss times a large weight is inf.
            added = part(loss, [leaves[name] for name in self.layout.names])
            weight = 1.0 if self._is_sum else batch.weight
            total = added.mul_(weight) if total is None else total.add_(added, alpha=weight)

        def replaced() -> dict[str, Tensor]:
            leaves = self._leaves(displacement, differentiable=part is not None)
            return leaves if part is not None else self._detached_parameters() | leaves

        value = self._mean_loss(
            replaced,
            dict(self.model.named_buffers()),
            lambda batch, loss, output, target, leaves: add(batch, loss, leaves),  # noqa: ARG005
            check=check,
        )
        return value, None if total is None else total.div_(self.batches.total_weight)

    # -------------------------------------------------------------------------------- private

    def _checked(self, displacement: object, call: str) -> Tensor:
        return check_vector(
            f"Objective.{call}", displacement, size=self.size, dtype=self.dtype, device=self.device
        )

    def _mean_loss(
        self,
        parameters: Callable[[], dict[str, Tensor]],
        buffers: Mapping[str, Tensor],
        visit: Callable[[Batch, Tensor, Any, Any, dict[str, Tensor]], None],
        *,
        check: bool,
    ) -> float:
        """Σ_b w_b ℓ_b / Σ_b w_b in float64: the loop over the batches.

        `parameters` makes private tensors to evaluate with, `buffers` are copied; `visit` is shown
        each batch's loss, output, target and the parameters that they were computed with.
        """
        losses: list[Tensor] = []
        weights: list[float] = []
        indices: list[int] = []
        written = False
        with self._evaluation(), self.batches.reading() as stream:
            leaves, private = _Copies(parameters), _Copies(lambda: _cloned(buffers))
            for batch in stream:
                with located(batch.index):
                    batch, before = self._guarded(batch)
                    reseed(batch.index)
                    tensors = leaves.fresh()
                    loss, output, target = self._forward(batch, tensors | private.fresh())
                    visit(batch, loss, output, target, tensors)
                    written = written or before != _versions(batch.data)
                losses.append(loss.detach())
                weights.append(1.0 if self._is_sum else batch.weight)
                indices.append(batch.index)
        if self._input_is_written is not True:
            self._input_is_written = written
        # One transfer for all batches: reading each loss as it comes would stall a GPU.
        values = torch.stack(losses).cpu().double().tolist()
        for index, value in zip(indices, values, strict=True):
            if check and not math.isfinite(value):
                raise NonFiniteError(
                    f"The loss of batch {index} is {value}; look for NaN in that batch, a "
                    "diverged model, or a logarithm of zero in the loss."
                )
        terms = [w * v for w, v in zip(weights, values, strict=True)]
        return _sum(terms) / self.batches.total_weight

    def _guarded(self, batch: Batch) -> tuple[Batch, list[int]]:
        """The batch, copied unless a pass has shown that the model leaves its input alone."""
        if self._input_is_written is not False:
            data = to_device(batch.data, self.device, duplicate=True)
            batch = dataclasses.replace(batch, data=data)
        return batch, _versions(batch.data)

    def _leaves(self, displacement: Tensor | None, *, differentiable: bool) -> dict[str, Tensor]:
        """The selected parameters at θ + δ, in memory of their own."""
        point = self.point()
        if displacement is not None:
            point += displacement
        pieces = self.layout.unflatten(point)
        return {
            name: piece.detach().requires_grad_(differentiable)
            for name, piece in zip(self.layout.names, pieces, strict=True)
        }

    def _detached_parameters(self) -> dict[str, Tensor]:
        """Every parameter of the model, selected or not, without a graph.

        Where only a value is wanted these take the place of `no_grad`, under which a loss that
        itself differentiates by its input (a differential equation's residual) cannot be had.
        """
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def _forward(self, batch: Batch, tensors: dict[str, Tensor]) -> tuple[Tensor, Any, Any]:
        """The batch's loss, the model's output and the target (None under `batch_loss`)."""
        replaced = {f"model.{name}": tensor for name, tensor in tensors.items()}
        loss, output, target = functional_call(self._forward_module, replaced, (batch,))
        return self._checked_loss(loss, batch), output, target

    @staticmethod
    def _checked_loss(loss: Any, batch: Batch) -> Tensor:
        if not isinstance(loss, Tensor):
            raise LossNotScalarError(
                f"The loss of batch {batch.index} is a {type(loss).__name__}, not a tensor; "
                "return the loss tensor itself, without .item() or float()."
            )
        if loss.numel() != 1:
            raise LossNotScalarError(
                f"The loss of batch {batch.index} has shape {tuple(loss.shape)}, not one value; "
                'use reduction="mean" (or "sum"), or average it yourself.'
            )
        if not loss.dtype.is_floating_point:
            raise LossNotScalarError(
                f"The loss of batch {batch.index} is of type {loss.dtype}; it must be real."
            )
        scalar: Tensor = loss.reshape(())
        return scalar

    @staticmethod
    def _check_graph(loss: Tensor, batch: Batch) -> None:
        if not loss.requires_grad:
            raise LossNotScalarError(
                f"The loss of batch {batch.index} does not depend on the selected parameters: "
                "they are unused, or the graph is cut by detach(), no_grad() or .data."
            )

    def _weigh(self, data: Any, index: int) -> float:
        target = None if self._loss_fn is None else _split(data, index)[1]
        self.examples += example_count(data) or example_count(target) or 0
        if self._weight is not None:
            return check_weight(self._weight(data), index)
        if hides_labels(self._loss_fn, data, target):
            raise InvalidArgumentError(
                f"Batch {index} has labels of −100, which a mean loss leaves out, so it does not "
                "count by its examples; give weight=lambda batch: (batch['labels'] != "
                "-100).sum() (or of batch[1]), with labels[:, 1:] where the model shifts them."
            )
        if self._loss_fn is not None:
            count = count_terms(self._loss_fn, target)
        else:
            count = example_count(data)
        if count is None:
            raise InvalidArgumentError(
                f"Batch {index} does not tell how many examples it holds (no tensor in it, or "
                "tensors of different lengths); give weight=lambda batch: number of terms that "
                "the batch's mean loss averages over."
            )
        return float(count)

    def _check_devices(self, asked: torch.device | str | None) -> None:
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if tensor.device != self.device:
                raise DeviceError(
                    f"The model lies on several devices: {name!r} on {tensor.device}, the "
                    f"selected parameters on {self.device}; move it with model.to(...)."
                )
        if self.device.type == "meta":
            raise DeviceError("The model's parameters are on the meta device and hold no numbers.")
        if asked is not None:
            wanted = check_device("Objective", asked)
            if wanted != self.device:
                raise DeviceError(
                    f"device={str(asked)!r} was asked for, but the model is on {self.device}; "
                    f"move it first with model.to({str(asked)!r})."
                )

    @contextlib.contextmanager
    def _evaluation(self) -> Iterator[None]:
        """Training flags as `mode` wants them, and derivatives possible; undone at the end.

        What a forward binds to its modules (a recurrent layer's list of weights, the normed
        weight of `spectral_norm`, a cache) is undone too: it was made from replaced parameters.
        """
        modules = list(self.model.modules())
        kept = [
            (bound, dict(bound))
            for m in modules
            for bound in (vars(m), m._parameters, m._buffers, m._modules)
            if isinstance(bound, dict)
        ]
        flags = []
        if self.mode != "keep":
            wanted = self.mode == "train"
            flags = [(m, m.training) for m in modules if m.training != wanted]
        try:
            # Set one by one: a model's own train() may do more than set flags.
            for module, flag in flags:
                module.training = not flag
            with torch.inference_mode(False), torch.enable_grad():
                yield
        finally:
            for bound, before in kept:
                for name in bound.keys() - before.keys():
                    del bound[name]
                bound.update(before)
            for module, flag in flags:
                module.training = flag


class _Forward(nn.Module):
    """Batch → (loss, output, target), around the model so that `functional_call` reaches it.

    The tensors are replaced inside the model itself while this runs, so that a `batch_loss` that
    calls `model.encoder(...)` or reads `model.weight` sees the replaced ones too.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Any] | None,
        batch_loss: Callable[[nn.Module, Any], Any] | None,
    ) -> None:
        super().__init__()
        self.model = model
        # Wrapped, so that a criterion that is a module is not taken for a part of the model.
        self._functions = (loss_fn, batch_loss)

    def forward(self, batch: Batch) -> tuple[Any, Any, Any]:
        loss_fn, batch_loss = self._functions
        if batch_loss is not None:
            return batch_loss(self.model, batch.data), None, None
        assert loss_fn is not None
        inputs, target = _split(batch.data, batch.index)
        output = self.model(inputs)
        return loss_fn(output, target), output, target


def _split(data: Any, index: int) -> tuple[Any, Any]:
    if isinstance(data, (tuple, list)) and len(data) == 2:
        return data[0], data[1]
    length = f" of {len(data)}" if isinstance(data, (tuple, list)) else ""
    raise ArgumentTypeError(
        f"Batch {index} is a {type(data).__name__}{length}, and loss_fn needs (input, target) "
        "pairs; say what to do with it by batch_loss=lambda model, batch: ... in place of "
        "loss_fn. (Two tensors with all inputs and all targets go into a tuple, not a list.)"
    )


def _versions(data: Any) -> list[int]:
    """How often each tensor of a batch has been written to."""
    return [t._version for t in tensors_in(data)]


def _sum(values: Sequence[float]) -> float:
    """The exact sum; fsum itself refuses infinities of both signs."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
