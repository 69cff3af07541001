"""The running statistics of batch norm, recomputed for other parameters."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..derivatives.torch_private import BATCH_NORM, buffers_of
from ..errors import InvalidArgumentError
from ..objective.batches import Batch, located
from ..objective.evaluator import Copies
from ..objective.forward import Forward
from ..objective.guards import evaluating
from ..objective.objective import Objective, check_objective
from ..objective.weights import example_count
from ..support.failures import explain_errors
from ..support.randomness import reseed
from ..support.trees import to_device
from .endpoints import VARIANCE, State, check_same, model_state

__all__ = ["batch_statistics", "recomputed_buffers", "recomputed_names", "tracked_layers"]

STATISTICS = ("running_mean", VARIANCE, "num_batches_tracked")


def tracked_layers(model: nn.Module) -> dict[str, Any]:
    """Return the batch norms that keep running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BATCH_NORM) and module.running_mean is not None
    }


def recomputed_names(model: nn.Module) -> set[str]:
    """Return the names of the buffers in which batch norms keep their statistics."""
    found = tracked_layers(model).items()
    return {_joined(n, s) for n, m in found for s in STATISTICS if buffers_of(m).get(s) is not None}


def _joined(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def recomputed_buffers(objective: Objective, state: Mapping[str, Tensor]) -> State:
    """The statistics that batch norm has on the objective's data, with the tensors of `state`.

    One pass over the data, in which batch norm alone works as in training: every layer normalises
    with the statistics of the batch, so that deeper ones see what they see in training. Their
    means and (unbiased) variances are averaged over all batches, weighted by examples; the
    layers' momentum plays no part. For batches of one size that is what
    `torch.optim.swa_utils.update_bn` computes, on private tensors, without dropout.

    Args:
        objective: its model, which stays as it is, and its data; other modules than batch norm
            are in the objective's mode.
        state: parameters and buffers by name; those left out are the model's own.

    Returns:
        The buffers of batch norm by name, to be put in place of those of `state`; none where no
        batch norm keeps statistics.

    Raises:
        StateMismatchError: `state` has tensors that the model does not have.
        InvalidArgumentError: a batch with one value for each channel, which has no variance.

    Examples:
        >>> import torch, flatminima as fm
        >>> from flatminima.landscape.buffers import recomputed_buffers
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.Linear(1, 1))
        >>> data = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
        >>> objective = fm.Objective(model, torch.nn.MSELoss(), data)
        >>> recomputed_buffers(objective, {})["0.running_mean"], model[0].running_mean
        (tensor([2.]), tensor([0.]))
    """
    check_objective("recomputed_buffers", objective)
    model = objective.model
    layers = tracked_layers(model)
    if not layers:
        return {}
    own = model_state(model)
    tied = set(model.state_dict()) - set(own)
    present = own | {n: t.detach() for n, t in state.items() if n not in tied}
    check_same(own, present, "recomputed_buffers", "the objective's model", "state")
    parameters = Copies(
        lambda: {n: present[n].detach().clone() for n, _ in model.named_parameters()}
    )
    sums = {name: _Average(objective.device) for name in layers}
    criterion = objective.criterion
    batch_loss: Any = criterion if objective.loss_fn is None else None
    forward = Forward(model, objective.loss_fn, batch_loss)

    with (
        _collecting(model, layers, objective.mode),
        evaluating(model, criterion, "keep", 0, copies=True) as guard,
        objective.batches.reading() as stream,
    ):
        for batch in stream:
            with located(batch.index), explain_errors(batch.index, objective.device, batch.data):
                data = to_device(batch.data, objective.device, duplicate=True)
                buffers = {n: _start(n, present[n]) for n, _ in model.named_buffers()}
                count = float(example_count(data) or batch.weight)

                reseed(batch.index)
                try:
                    own_batch = dataclasses.replace(batch, data=data)
                    with forward.replacing(buffers, parameters.fresh()):
                        forward.evaluate(own_batch, parameters.present)
                        for name, layer in layers.items():
                            sums[name].add(layer, count)
                except ValueError as error:
                    _explain(error, batch)
                    raise
                finally:
                    guard.restore()
    found: State = {}
    for name, layer in layers.items():
        for statistic, value in sums[name].means().items():
            if buffers_of(layer).get(statistic) is not None:
                full = _joined(name, statistic)
                found[full] = value.to(present[full])
    return found


def _start(name: str, tensor: Tensor) -> Tensor:
    """Return a private buffer for one batch; batch norm's are at the beginning of their average."""
    statistic = name.rpartition(".")[2]
    if statistic not in STATISTICS:
        return tensor.detach().clone()
    return torch.ones_like(tensor) if statistic == VARIANCE else torch.zeros_like(tensor)


def _explain(error: ValueError, batch: Batch) -> None:
    if "more than 1 value per channel" in str(error):
        raise InvalidArgumentError(
            f"Batch {batch.index} gives a batch norm one value for each channel, and these have "
            "no variance, so that no statistics can be recomputed; leave out a batch of one "
            "example (drop_last=True), or use buffers='interpolate'."
        ) from error


class _Average:
    """The mean of a layer's statistics over the batches."""

    def __init__(self, device: torch.device) -> None:
        self._wide = torch.float32 if device.type == "mps" else torch.float64
        self._sums: State = {}
        self._weight = 0.0
        self._calls = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, layer: Any, count: float) -> None:
        """One batch of `count` examples, unless the layer was not called."""
        calls = layer.num_batches_tracked
        if calls is None or int(calls) == 0:
            return
        self._calls += calls
        self._weight += count
        for name in STATISTICS[:2]:
            value = count * getattr(layer, name).detach().to(self._wide)
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def means(self) -> State:
        """By name; none for a layer that was never called."""
        if not self._sums:
            return {}
        means = {name: value / self._weight for name, value in self._sums.items()}
        return means | {STATISTICS[2]: self._calls}


@contextlib.contextmanager
def _collecting(model: nn.Module, layers: Mapping[str, Any], mode: str) -> Iterator[None]:
    """Training flags as `mode` wants them, but for these layers, which average over their calls."""
    chosen = {id(layer) for layer in layers.values()}
    wanted: list[tuple[Any, str, Any]] = []
    for module in model.modules():
        if id(module) in chosen:
            wanted += [
                (module, "training", True),
                (module, "momentum", None),
                (module, "track_running_stats", True),
            ]
        elif mode != "keep":
            wanted.append((module, "training", mode == "train"))
    with contextlib.ExitStack() as stack:
        for module, name, value in wanted:
            before = getattr(module, name)
            if before is not value:
                stack.callback(setattr, module, name, before)
                setattr(module, name, value)
        yield


@contextlib.contextmanager
def batch_statistics(objective: Objective) -> Iterator[None]:
    """Within it, every batch norm normalises with the statistics of the batch, in any mode.

    Its buffers are taken out of the model, and put back afterwards.

    Raises:
        InvalidArgumentError: the objective cuts batches into pieces, which have other statistics.
    """
    layers = tracked_layers(objective.model)
    if layers and not objective.is_whole:
        raise InvalidArgumentError(
            f"microbatch= cannot be used here: the batch norm {next(iter(layers))!r} works with "
            "the statistics of whole batches, and pieces of them would have others. Make an "
            "Objective without microbatch=, or use buffers='interpolate'."
        )
    with contextlib.ExitStack() as stack:
        for layer in layers.values():
            for name in STATISTICS[:2]:
                own = buffers_of(layer)
                stack.callback(own.__setitem__, name, own[name])
                own[name] = None
        yield
