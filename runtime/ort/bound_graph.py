"""A graph's session with all its inputs and outputs bound to memory that stays where it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backend import StepInputs
from ..bundle.manifest import GraphFile
from .buffers import ONNX_TYPES, CacheBuffers, allocate
from .providers import named_errors, quiet_run_options

__all__ = ["BoundGraph", "GraphsByRows"]


class BoundGraph:
    """Runs one graph in place.

    A decode graph is bound to the whole cache; a prefill graph has a binding for every slot, each
    to that slot's part of it.

    Args:
        session: The graph's onnxruntime.InferenceSession.
        graph: Its sizes.
        vocab_size: V.
        cache: Bound as past and present; ids and logits lie where it does.

    Attributes:
        attended_rows: R; no token may lie behind these rows.
        tokens: T.
    """

    def __init__(
        self,
        session: Any,
        graph: GraphFile,
        *,
        vocab_size: int,
        cache: CacheBuffers,
    ) -> None:
        self._session = session
        self.attended_rows, self.tokens = graph.attended_rows, graph.tokens
        self._name = graph.file
        device_id = cache.device_id
        self._place = ("cpu", 0) if device_id is None else ("cuda", device_id)
        sizes = StepInputs.graph_sizes(graph.batch, graph.tokens, graph.logits)
        self._inputs = {
            name: allocate(size, "int64", device_id=device_id) for name, size in sizes.items()
        }
        logits_shape = (graph.batch, graph.logits, vocab_size)
        self._logits = allocate(logits_shape, "float32", device_id=device_id)
        num_slots = cache.shape[0] // graph.batch
        self._options = quiet_run_options()
        with named_errors(self._name):
            self._bindings = [self._bind(cache, slot, graph.batch) for slot in range(num_slots)]

    def run(self, inputs: StepInputs) -> NDArray[np.float32]:
        """Runs T tokens of each row.

        Args:
            inputs: In the graph's sizes; the slots are one of a prefill graph, or all in order.

        Returns:
            [B, N, V] float32 logits, on the CPU a view that the next run overwrites.
        """
        for name, buffer in self._inputs.items():
            buffer.write(getattr(inputs, name))
        with named_errors(self._name):
            binding = self._bindings[int(inputs.slots[0])]
            self._session.run_with_iobinding(binding, self._options)
        return self._logits.read()

    def _bind(self, cache: CacheBuffers, slot: int, batch: int) -> Any:
        binding = self._session.io_binding()
        for name, buffer in self._inputs.items():
            self._bind_input(binding, name, "int64", buffer.shape, buffer.pointer)
        self._bind_output(binding, "logits", "float32", self._logits.shape, self._logits.pointer)
        shape = (batch, *cache.shape[1:])
        for index, pointer in enumerate(cache.pointers(slot)):
            name = f"{index // 2}.{('key', 'value')[index % 2]}"
            self._bind_input(binding, f"past_key_values.{name}", cache.dtype, shape, pointer)
            self._bind_output(binding, f"present.{name}", cache.dtype, shape, pointer)
        return binding

    def _bind_input(
        self, binding: Any, name: str, dtype: str, shape: tuple[int, ...], pointer: int
    ) -> None:
        binding.bind_input(name, *self._place, ONNX_TYPES[dtype], list(shape), pointer)

    def _bind_output(
        self, binding: Any, name: str, dtype: str, shape: tuple[int, ...], pointer: int
    ) -> None:
        binding.bind_output(name, *self._place, ONNX_TYPES[dtype], list(shape), pointer)


class GraphsByRows:
    """Graphs of one step that attend to more rows or fewer; the fewest that do run.

    What a graph doesn't look at is masked in the others.

    Args:
        graphs: On one cache, the last one on all its rows.
    """

    def __init__(self, graphs: Sequence[BoundGraph]) -> None:
        self._graphs = sorted(graphs, key=lambda graph: graph.attended_rows)

    @property
    def first_positions(self) -> list[int]:
        """For each graph the first position that it is chosen for."""
        starts = [0, *(graph.attended_rows - graph.tokens + 1 for graph in self._graphs)]
        return starts[: len(self._graphs)]

    def run(self, inputs: StepInputs) -> NDArray[np.float32]:
        """See BoundGraph; past the cache all rows are attended to."""
        rows = int(inputs.positions.max()) + inputs.input_ids.shape[1]
        fitting = (graph for graph in self._graphs if graph.attended_rows >= rows)
        return next(fitting, self._graphs[-1]).run(inputs)
