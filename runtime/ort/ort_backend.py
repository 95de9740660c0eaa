"""The ONNX Runtime backend: a bundle's prefill and decode graphs on one preallocated cache."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..backend import MAX_THREADS, BackendUnavailableError, StaticShape
from ..bundle.manifest import ITEM_BYTES, GraphFile, Manifest
from ..bundle.memory_needs import memory_needs
from ..bundle.opening import open_bundle
from ..memory import available_bytes, format_bytes
from ..speculation import check_exported
from .bound_graph import GraphsByRows
from .buffers import CacheBuffers
from .engine_cache import kept_engines
from .gpu_libraries import free_bytes, num_gpus
from .graph_opener import GraphOpener
from .mapped_weights import map_weights
from .providers import PROVIDERS, provider_problem

__all__ = ["OrtBackend", "check_choice"]

# Which graphs a provider has kernels for; the first is its own.
_TARGETS = {
    "cpu": ("cpu", "cuda", "tensorrt"),
    "cuda": ("cuda", "tensorrt"),
    "tensorrt": ("tensorrt",),
}
_TENSORRT_ALIGNMENT = 256  # of every address that is bound to an engine


class OrtBackend:
    """A bundle in ONNX Runtime, behind the Backend protocol.

    The cache is bound as the graphs' past and present, so each step writes it in place; prefill
    is bound to one slot of it. Ids, positions and logits have buffers that stay, too.

    Args:
        bundle: The bundle or its folder.
        provider: "cpu", "cuda" or "tensorrt"; nothing else runs if it can't.
        target: Which graphs; None takes the provider's own.
        threads: Of the CPU provider; None takes one per physical core.
        device_id: Which GPU; of the CPU provider 0.
        engine_cache: Where TensorRT's engines are kept; None is the user's cache folder.
        prepack: Whether each step on the CPU gets its own copy of the weights in the layout its
            kernels like best: more tokens per second, most of all with a batch, for a slow start
            and twice the memory, with `speculate` three times.
        speculate: Whether the step of several tokens is opened, too.
        progress: Told in a few words what is being loaded or built.

    Attributes:
        shape: The static sizes.
        provider: What runs.
        target: Whose graphs.
        load_s: Seconds it took to make ready.

    Raises:
        FileNotFoundError: There is no bundle, or one of its files is missing.
        ValueError: The bundle is damaged, or has no such graphs, or the provider can't run them.
        BackendUnavailableError: The machine lacks what the provider needs, or the memory.
    """

    def __init__(
        self,
        bundle: Manifest | str | Path,
        *,
        provider: str = "cpu",
        target: str | None = None,
        threads: int | None = None,
        device_id: int = 0,
        engine_cache: Path | None = None,
        prepack: bool = False,
        speculate: bool = False,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        begin = time.perf_counter()
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise ValueError(f"threads is {threads}; it must be between 1 and {MAX_THREADS}")
        if problem := provider_problem(provider):
            raise BackendUnavailableError(f"--provider {provider}: {problem}")
        manifest = bundle if isinstance(bundle, Manifest) else open_bundle(bundle)
        self.provider = provider
        self.target = check_choice(manifest, provider, target)
        on_gpu = provider != "cpu"
        _check_device(device_id, num_gpus() if on_gpu else 1)
        if speculate:
            check_exported("lookup", manifest.shape.num_guesses)
        shape = manifest.shape if speculate else replace(manifest.shape, num_guesses=0)
        self.shape: StaticShape = shape
        graphs = _choose_graphs(
            manifest,
            self.target,
            speculate=speculate,
            prepack=prepack,
            device_id=device_id if on_gpu else None,
        )
        model, decode = manifest.model, manifest.find_graph("decode", self.target)
        self._cache = CacheBuffers(
            (shape.batch_size, model.num_key_value_heads, shape.max_seq_len, model.head_dim),
            model.num_hidden_layers,
            decode.dtype,
            device_id=device_id if on_gpu else None,
        )
        # On a GPU every session uploads its own copy.
        self._weights = {} if on_gpu else map_weights(manifest, decode.dtype)
        report = progress or (lambda _: None)
        kept = (
            kept_engines(manifest, [g.file for g in graphs], engine_cache, device_id)
            if provider == "tensorrt"
            else contextlib.nullcontext()
        )
        with kept as engines:
            opener = GraphOpener(
                manifest=manifest,
                provider=provider,
                threads=threads,
                device_id=device_id,
                engines=engines,
                prepack=prepack,
                weights=self._weights,
                report=report,
            )
            opened = [(graph, opener.open(graph, self._cache)) for graph in graphs]
        self._prefill = {graph.tokens: bound for graph, bound in opened if not graph.is_step}
        self._decode, self._extend = (
            GraphsByRows([bound for graph, bound in opened if graph.role == role])
            for role in ("decode", "extend")
        )
        # TensorScatter can write any row; GroupQueryAttention appends at its own length.
        self._appends = "GroupQueryAttention" in decode.ops
        self._last_rolled = [-1] * shape.batch_size
        if on_gpu:
            self._warm_up(report)
        self.load_s = time.perf_counter() - begin

    def prefill(self, slot: int, ids: Sequence[int], start: int) -> NDArray[np.float32]:
        """One chunk of a prompt through one slot; see Backend."""
        inputs = self.shape.chunk_inputs(slot, ids, start)
        self._last_rolled[slot] = -1
        return self._prefill[inputs.input_ids.shape[1]].run(inputs)[0, 0].copy()

    def decode(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """One token of every slot; see Backend."""
        inputs = self.shape.step_inputs(ids, positions)
        if self._appends:
            inputs = replace(inputs, write_indices=self._roll(inputs.positions))
        return self._decode.run(inputs)[:, 0]

    def extend(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """A few tokens of every slot; see Backend."""
        inputs = self.shape.extend_inputs(ids, positions)
        self._last_rolled = [-1] * self.shape.batch_size
        return self._extend.run(inputs)

    def mix(
        self,
        slots: NDArray[np.int64],
        ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        logit_rows: Sequence[int],
    ) -> NDArray[np.float32]:
        """Of other slots than a graph is bound to; see Backend.

        Raises:
            ValueError: Always: shape.mixed_lens is ().
        """
        raise ValueError("mixed_lens is (): no graph takes tokens of any slots")

    def read_rows(self, slot: int, num_rows: int) -> NDArray[np.float32]:
        """The first rows of a slot's cache; see Backend."""
        return self._cache.read_rows(slot, num_rows)

    def write_rows(self, slot: int, rows: NDArray[np.float32]) -> None:
        """Rows into a slot's cache; see Backend."""
        self._last_rolled[slot] = -1
        self._cache.write_rows(slot, rows)

    def _roll(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Makes room in full slots, whose next token is always written to the last row.

        With S = 4, position 4: row 3 (position 3) goes over row 0 (position 0), position 4 into
        row 3. Position 5: row 3 (position 4) over row 1. The rows' order is of no matter.

        Returns:
            The rows to write.
        """
        last_row = self.shape.max_seq_len - 1
        rows = np.minimum(positions, last_row)
        for slot in range(len(rows)):
            position = int(positions[slot])
            if position <= last_row:
                self._last_rolled[slot] = -1
            # A step that was interrupted comes again; by then the last row may be the new token's.
            elif position != self._last_rolled[slot]:
                if last_row:
                    target = (position - last_row - 1) % last_row
                    self._cache.copy_row(slot, last_row, target)
                self._last_rolled[slot] = position
        return rows

    def _warm_up(self, report: Callable[[str], None]) -> None:
        """Two runs: on a GPU the first decode is recorded, the second replayed."""
        report("warming up")
        ids = np.zeros(self.shape.batch_size, np.int64)
        for _ in range(2):
            for length in self.shape.prefill_lens:
                self.prefill(0, [0] * length, 0)
            for position in self._decode.first_positions:
                self.decode(ids, np.full_like(ids, position))
            tokens = np.zeros((len(ids), 1 + self.shape.num_guesses), np.int64)
            for position in self._extend.first_positions:
                self.extend(tokens, np.full_like(ids, position))


def check_choice(manifest: Manifest, provider: str, target: str | None) -> str:
    """Checks that a bundle has graphs that a provider has kernels for.

    Args:
        manifest: The bundle.
        provider: What shall run.
        target: Which graphs; None takes the provider's own.

    Returns:
        The target.

    Raises:
        ValueError: The provider is unknown, the bundle lacks the target, they don't match, or a
            slot's cache begins where the provider can't bind it.
    """
    if provider not in PROVIDERS:
        raise ValueError(f"provider is {provider!r}; it must be one of {', '.join(PROVIDERS)}")
    chosen = provider if target is None else target
    graph = manifest.find_graph("decode", chosen)
    if chosen not in _TARGETS[provider]:
        allowed = ", ".join(_TARGETS[provider])
        raise ValueError(f"provider {provider} runs graphs of {allowed}; target is {chosen}")
    if provider == "cpu" and graph.dtype == "bfloat16":
        raise ValueError(
            f"the graphs of {chosen} are bfloat16, which onnxruntime's CPU provider can't run; "
            "use the cpu target, or export with --dtype float32"
        )
    model, shape = manifest.model, manifest.shape
    row_bytes = model.num_key_value_heads * model.head_dim * ITEM_BYTES[graph.dtype]
    slot_bytes = shape.max_seq_len * row_bytes
    if provider == "tensorrt" and shape.batch_size > 1 and slot_bytes % _TENSORRT_ALIGNMENT:
        raise ValueError(
            f"a cache slot has {slot_bytes} bytes a layer, TensorRT wants a multiple of "
            f"{_TENSORRT_ALIGNMENT}; export with --max-seq-len a multiple of 64"
        )
    return chosen


def _check_device(device_id: int, num_devices: int) -> None:
    if type(device_id) is not int or not 0 <= device_id < num_devices:
        allowed = "only 0" if num_devices == 1 else f"0 to {num_devices - 1}"
        raise ValueError(f"device_id is {device_id!r}; there is {allowed}")


def _choose_graphs(
    manifest: Manifest, target: str, *, speculate: bool, prepack: bool, device_id: int | None
) -> list[GraphFile]:
    """Which graphs are opened: those that attend to fewer rows where each needs no more weights.

    On a CPU sessions share a mapped file, unless weights are converted or laid out anew as they are
    read. On a GPU each session has its own copy, so that there has to be room.

    Raises:
        BackendUnavailableError: There is too little memory.
    """
    graphs = [
        g for g in manifest.graphs if g.target == target and (speculate or g.role != "extend")
    ]
    whole = [g for g in graphs if g.attended_rows == g.rows]
    needs, decode = memory_needs(manifest, target, whole), manifest.find_graph("decode", target)
    if device_id is None:
        copies, free, where = 1, available_bytes(), "memory"
        if prepack:
            copies += sum(graph.is_step for graph in whole)
        fits = not prepack and decode.dtype == "float32" and decode.accuracy_level is None
    else:
        copies, free, where = len(whole), free_bytes(device_id), "GPU memory"
        fits = len(graphs) * needs.weight_bytes + needs.cache_bytes <= free
    weights, cache = copies * needs.weight_bytes + needs.prepacked_bytes, needs.cache_bytes
    if weights + cache > free:
        raise BackendUnavailableError(
            f"weights {format_bytes(weights)}, cache {format_bytes(cache)} do not fit in "
            f"{format_bytes(free)} of free {where}; export with a smaller --max-seq-len or "
            "--batch-size"
        )
    return graphs if fits else whole
