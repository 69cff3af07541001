"""Products on a kept graph as CUDA graphs, whose kernels are launched all at once."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import GraphError
from .products import Block, GradientGraph, PerLeaf

__all__ = ["CapturedGraph", "Recorder"]

WARM_UP = 3
"""Products before the capture, in which libraries allocate what they work with."""


class Recorder:
    """The stream on which graphs are built and captured, and the memory that captures share.

    Autograd runs the derivative of an operation on the stream of the operation itself, and the
    default stream cannot be captured. So what is to be captured is computed here from the start.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()

    def __enter__(self) -> Recorder:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        self._context = torch.cuda.stream(self.stream)
        self._context.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)


class CapturedGraph:
    """The gradient's graph of one batch, with the product by it captured on first use.

    The captured kernels are those that run without it, so that the numbers are the same. The first
    replay is compared with a product that was not captured.

    Args:
        graph: built within `recorder`.
        recorder: of all batches of a session.
        index: of the batch, for messages.
    """

    def __init__(self, graph: GradientGraph, recorder: Recorder, index: int) -> None:
        self._graph, self._recorder, self._index = graph, recorder, index
        self._replayed: torch.cuda.CUDAGraph | None = None
        self._input: Tensor
        self._output: PerLeaf = []

    def products(self, vectors: Sequence[Tensor], *, keep: bool = True) -> PerLeaf:
        """As `GradientGraph.products`; the graph is kept always.

        Raises:
            GraphError: the product cannot be captured.
        """
        del keep
        found: list[Tensor | None] = []
        for number, vector in enumerate(vectors, start=1):
            if self._replayed is None:
                self._replayed = self._capture(vector)
            self._input.copy_(vector)
            self._replayed.replay()
            # The next replay writes to the same memory.
            last = number == len(vectors)
            found += [p if p is None or last else p.clone() for p in self._output]
        return found

    def block_product(
        self, vector: Tensor, blocks: Sequence[Block], *, keep: bool = True
    ) -> PerLeaf:
        """As `GradientGraph.block_product`, not captured: the blocks differ from call to call."""
        return self._graph.block_product(vector, blocks, keep=keep)

    def _capture(self, vector: Tensor) -> torch.cuda.CUDAGraph:
        self._input = vector.clone()
        with self._recorder:
            for _ in range(WARM_UP):
                expected = self._graph.products([self._input], keep=True)
        torch.cuda.synchronize(self._recorder.device)
        captured = torch.cuda.CUDAGraph()
        with self._recorder:
            # Work of other threads, such as a loader that pins memory, is none of the capture's.
            captured.capture_begin(pool=self._recorder.pool, capture_error_mode="thread_local")
            try:
                self._output = self._graph.products([self._input], keep=True)
            except RuntimeError as error:
                raise self._refused(str(error).split("\n")[0]) from error
            finally:
                # After an error the end of the capture complains of it once more.
                with contextlib.suppress(RuntimeError):
                    captured.capture_end()
        captured.replay()
        for piece, wanted in zip(self._output, expected, strict=True):
            if (piece is None) != (wanted is None):
                raise self._refused("its replay gives other zeros")
            if piece is None or wanted is None:
                continue
            tolerance = 100 * torch.finfo(wanted.dtype).eps * float(wanted.abs().max())
            if not bool(((piece - wanted).abs() <= tolerance).all()):
                raise self._refused("its replay gives another product")
        return captured

    def _refused(self, why: str) -> GraphError:
        return GraphError(
            f"The product of batch {self._index} cannot be captured as a CUDA graph: {why}. Use "
            'method="double_backward".'
        )
