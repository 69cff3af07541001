"""Products H v compiled by PyTorch's Inductor, one compilation for each shape of batch."""

from __future__ import annotations

import contextlib
import random
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checks import check_integer
from .errors import NotCompiledError
from .failures import is_out_of_memory
from .nested import tensors_in
from .product_check import by_autograd, signs
from .product_graph import Loss, ProductGraph, trace_product
from .randomness import preserved_random_state
from .settings import described

__all__ = ["BatchProduct", "CompiledProducts"]

MAX_SHAPES = 8
"""Different batches that are compiled for, unless told otherwise."""


class BatchProduct:
    """H_b v for one batch, with all that does not depend on v computed and kept.

    Attributes:
        loss: ℓ_b, a scalar without a graph.
        nbytes: of the tensors that are kept, beyond the inputs themselves; 0 once released.
    """

    def __init__(
        self, plan: _Plan, loss: Tensor, arguments: Sequence[Tensor], kept: Sequence[Tensor]
    ) -> None:
        self.loss = loss
        self._plan = plan
        self._held: list[Tensor] | None = [*arguments, *kept]
        own = {_storage(t) for t in arguments}
        sizes = {_storage(t): t.untyped_storage().nbytes() for t in kept}
        self.nbytes = sum(size for store, size in sizes.items() if store not in own)

    def __call__(self, pieces: Sequence[Tensor]) -> list[Tensor | None]:
        """H_b v.

        Args:
            pieces: v cut into one tensor for each leaf, of the leaf's shape and type.

        Returns:
            One tensor for each leaf, which may share memory with `pieces`; None for zeros.

        Raises:
            RuntimeError: it has been released.
        """
        graph = self._plan.graph
        found: list[Tensor | None] = [None] * len(pieces)
        if self._plan.second is not None:
            with torch.no_grad():
                products = self._plan.second(*self.arguments(pieces))
            for index, product in zip(graph.leaves, products, strict=True):
                found[index] = product
        return found

    def arguments(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """What the compiled part is called with."""
        if self._held is None:
            raise RuntimeError("This product has been released; prepare it again.")
        return [*self._held, *(pieces[i].detach() for i in self._plan.graph.vectors)]

    def release(self) -> None:
        """Let go of what is kept."""
        self._held = None
        self.nbytes = 0


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class CompiledProducts:
    """Compiles the products with the Hessian of a loss, once for each shape of batch.

    The product by reverse over reverse (Pearlmutter 1994) is traced on tensors without values,
    and its graph is cut in two: what depends on the parameters and the batch alone, which is
    computed once and kept (the graph of the gradient, so to speak), and the part that is linear
    in v, which Inductor makes into fused loops. Random operations are in the first part, in their
    own order, so that dropout draws the masks that it draws otherwise.

    What Python has decided is decided for good: numbers among a module's attributes, its training
    flags. Therefore `setting` in `prepare` names what a compiled product is valid for. Buffers,
    other parameters and the batch's tensors are inputs. Tensors that the loss finds elsewhere (a
    plain attribute, a variable of a closure) are read anew each time, so that writes to them are
    seen; their replacement by another tensor must be told by `setting`.

    Args:
        max_shapes: different shapes of batches to compile for.

    Attributes:
        compile_seconds: spent so far on tracing, compiling and checking.

    Raises:
        InvalidArgumentError: max_shapes is not a positive integer.
    """

    def __init__(self, *, max_shapes: int = MAX_SHAPES) -> None:
        self.max_shapes = check_integer("CompiledProducts", "max_shapes", max_shapes, low=1)
        self.compile_seconds = 0.0
        self._plans: dict[Hashable, _Plan] = {}

    @property
    def shapes(self) -> int:
        """Different batches met so far."""
        return len(self._plans)

    def prepare(
        self,
        loss: Loss,
        leaves: Mapping[str, Tensor],
        others: Mapping[str, Tensor],
        data: Any,
        *,
        setting: Hashable = None,
        keep: bool = True,
    ) -> BatchProduct:
        """Compute what does not depend on v for one batch; trace and compile where need be.

        The first batch of each shape is checked: its compiled product with a random vector must
        equal that of autograd.

        Args:
            loss: (leaves, others, data) → ℓ_b, a scalar with its graph; it must use the tensors
                that it is given, and return the same function of them always.
            leaves: the parameters to differentiate by, by name.
            others: other parameters and buffers by name; they are not written to.
            data: the batch, of plain containers and objects.
            setting: what else the loss depends on, such as training flags; compiled products are
                used again only under an equal one.
            keep: whether the result is going to serve for several products. If not, the part
                that does not depend on v is compiled too.

        Returns:
            The product as a function of v.

        Raises:
            NotCompiledError: tracing or compiling fails, the result is not the product, or there
                are too many shapes.
        """
        tensors = list({id(t): t for t in tensors_in(data)}.values())
        inputs = [*leaves.values(), *others.values(), *tensors]
        key = _key(leaves, others, data, tensors, setting)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= self.max_shapes:
                raise NotCompiledError(
                    f"there are more than {self.max_shapes} different shapes of batches, or "
                    "settings (numbers in a batch, attributes of modules), each of which is "
                    "compiled for; pad batches to one length, or make a new operator"
                )
            plan = self._plans[key] = _Plan()
        if plan.reason is not None:
            raise NotCompiledError(plan.reason)
        if plan.fresh:
            self._make(plan, loss, leaves, others, data, tensors)
        if not keep and plan.compile_first is not None:
            with self._counted(plan):
                plan.first = plan.compile_first()
                plan.compile_first = None
        return plan.prepare(inputs)

    def _make(
        self,
        plan: _Plan,
        loss: Loss,
        leaves: Mapping[str, Tensor],
        others: Mapping[str, Tensor],
        data: Any,
        tensors: Sequence[Tensor],
    ) -> None:
        """Trace and compile, and check the result against autograd."""
        start = time.perf_counter()
        inputs = [*leaves.values(), *others.values(), *tensors]
        vectors = signs(leaves)
        with preserved_random_state():
            # Before the tracing, as what fails here fails in the user's own code.
            expected = by_autograd(loss, leaves, others, data, tensors, vectors)
        self.compile_seconds += time.perf_counter() - start
        with self._counted(plan):
            with preserved_random_state():
                with _no_other_randomness():
                    graph = trace_product(loss, leaves, others, data, tensors)
                plan.take(graph)
                plan.second = _compile(
                    graph.second, lambda: plan.prepare(inputs).arguments(vectors)
                )
            plan.compile_first = lambda: _compile(graph.first, lambda: plan.inputs(inputs))
            with preserved_random_state():
                product = plan.prepare(inputs)
            reason = expected.difference(product.loss, product(vectors))
            if reason is not None:
                raise (_RefusedError if expected.finite else _NotFiniteError)(reason)
            plan.fresh = False

    @contextlib.contextmanager
    def _counted(self, plan: _Plan) -> Iterator[None]:
        """Count the seconds, hide the compiler's warnings, and turn its errors into a reason."""
        start = time.perf_counter()
        try:
            with warnings.catch_warnings(), preserved_random_state():
                warnings.simplefilter("ignore")
                yield
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = _reason(error)
            if not isinstance(error, _NotFiniteError):
                plan.reason = reason
            raise NotCompiledError(reason) from error
        finally:
            self.compile_seconds += time.perf_counter() - start


Compiled = Callable[..., Sequence[Tensor]]


class _RefusedError(Exception):
    """A reason found by ourselves."""


class _NotFiniteError(_RefusedError):
    """There was nothing to check by, which may be otherwise the next time."""


class _Plan:
    """What is known of one shape of batch; `reason` says why nothing can be."""

    def __init__(self) -> None:
        self.fresh = True
        self.reason: str | None = None
        self.second: Compiled | None = None
        self.compile_first: Callable[[], Compiled | None] | None = None

    def take(self, graph: ProductGraph) -> None:
        """The traced graph, its first part to be run as it is."""
        self.graph = graph
        self.first: Compiled | None = graph.first

    def inputs(self, given: Sequence[Tensor]) -> list[Tensor]:
        return [t.detach() for t in (*given, *self.graph.captured)]

    def prepare(self, given: Sequence[Tensor]) -> BatchProduct:
        first = self.first
        assert first is not None
        inputs = self.inputs(given)
        with torch.no_grad():
            loss, *kept = first(*inputs)
        return BatchProduct(self, loss, [inputs[i] for i in self.graph.inputs], kept)


def _compile(graph: torch.fx.GraphModule | None, examples: Callable[[], Any]) -> Compiled | None:
    """By Inductor; the same numbers for the same arguments, random ones included."""
    if graph is None:
        return None
    import torch._inductor

    arguments = examples()
    with torch.no_grad():
        compiled: Compiled = torch._inductor.compile(
            graph, list(arguments), options={"fallback_random": True}
        )
        # The compiler may put off its work, and its errors, until the first call.
        compiled(*arguments)
    return compiled


@contextlib.contextmanager
def _no_other_randomness() -> Iterator[None]:
    """Refuse numbers drawn by Python or NumPy, which would be compiled in."""

    def state() -> tuple[Any, str]:
        return random.getstate(), repr(np.random.get_state())  # noqa: NPY002

    before = state()
    yield
    if state() != before:
        raise _RefusedError("the forward draws from Python's or NumPy's random numbers")


_READS = {
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "GuardOnDataDependentSymNode",
    "_ValueReadError",
}


def _reason(error: Exception) -> str:
    """Why tracing or compiling failed, as a part of a sentence."""
    name = type(error).__name__
    # By name: the classes are private to PyTorch and wrapped in others by some releases.
    chain = [name, *(type(e).__name__ for e in (error.__cause__, error.__context__) if e)]
    text = str(error).strip().split("\n")[0][:300]
    if isinstance(error, _RefusedError):
        return text
    if _READS & set(chain):
        return (
            f"the forward asks for values while it is traced ({text}): an `if` on a tensor, "
            ".item(), or a shape that depends on the data"
        )
    if "InvalidCxxCompiler" in chain or "InvalidCxxCompiler" in str(error):
        return "no C++ compiler was found (install g++ or clang++, or set the variable CXX)"
    if "CppCompileError" in chain or "CppCompileError" in str(error):
        return f"the C++ compiler failed (it needs Python's header files, too): {text}"
    if "TritonMissing" in chain or "TritonMissing" in str(error):
        return "Triton is not installed, which compiles for this device"
    return f"{name}: {text}"


def _key(
    leaves: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    data: Any,
    tensors: Sequence[Tensor],
    setting: Hashable,
) -> Hashable:
    """What a compiled product is valid for."""
    places = {id(t): n for n, t in enumerate(tensors)}
    contents, known = described(data, lambda t: places[id(t)])
    strange = next((k for k in known if not isinstance(k, Tensor)), None)
    if strange is not None:
        raise NotCompiledError(
            f"a batch holds a {type(strange).__name__}, of which it cannot be told whether it is "
            "the same in another batch"
        )
    named = (("leaf", leaves), ("other", others))
    kinds = [(kind, n, _spec(t)) for kind, group in named for n, t in group.items()]
    device = next((t.device.type for t in leaves.values()), "cpu")
    return (
        tuple(kinds),
        tuple(map(_spec, tensors)),
        contents,
        setting,
        torch.get_num_threads(),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        torch.are_deterministic_algorithms_enabled(),
        _matmul_precision(),
    )


def _spec(tensor: Tensor) -> Hashable:
    strides = tensor.stride() if tensor.layout == torch.strided else ()
    return tensor.shape, strides, tensor.dtype, tensor.device, tensor.requires_grad


def _matmul_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # asked for by the older name, where the newer one has been set
        return repr([getattr(b.matmul, "fp32_precision", "") for b in _MATMULS])


_MATMULS = (torch.backends.cuda, torch.backends.mkldnn)
