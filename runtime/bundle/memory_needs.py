"""The memory that running a bundle takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .manifest import ITEM_BYTES, WEIGHT_BYTES, GraphFile, Manifest, StoredWeight

__all__ = ["OF_TENSORRT", "MemoryNeeds", "memory_needs"]

# Forms of packed weights; see llamac.export.weights.
OF_TENSORRT = (".weight_signed", ".weight_positive_scale", ".weight_unpacked")
_NOT_OF_TENSORRT = (".weight_packed",)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeeds:
    """What the graphs of one target take.

    Attributes:
        dtype: Of weights and cache.
        weight_bytes: All weights once.
        weight_copies: How many times they are in memory, with all graphs open. Where that is too
            much, those that attend to fewer rows aren't opened.
        prepacked_bytes: What CPU sessions hold besides: each its own copy of the packed weights, in
            the layout that its kernels like. None that attends to fewer rows is among them.
        cache_bytes: The KV cache of all slots.
        host_bytes: In all, where the target runs on the CPU.
        device_bytes: In all, where it runs on a GPU.
    """

    dtype: str
    weight_bytes: int
    weight_copies: int
    prepacked_bytes: int
    cache_bytes: int
    host_bytes: int
    device_bytes: int


def memory_needs(
    manifest: Manifest, target: str, graphs: Sequence[GraphFile] | None = None
) -> MemoryNeeds:
    """Sums up what a target's graphs take.

    Args:
        manifest: The bundle.
        target: One of its targets.
        graphs: Those of the target that are opened; None is all.

    Returns:
        The bytes.
    """
    if graphs is None:
        graphs = [graph for graph in manifest.graphs if graph.target == target]
    dtype, model = graphs[0].dtype, manifest.model
    stored = _read_weights(manifest, target, dtype)
    sizes = {name: math.prod(w.shape) * WEIGHT_BYTES[w.dtype] for name, w in stored.items()}
    weights = sum(sizes.values())
    packed = sum(size for name, size in sizes.items() if _is_multiplied_packed(name))
    rows = manifest.shape.batch_size * manifest.shape.max_seq_len
    row_bytes = model.num_key_value_heads * model.head_dim * ITEM_BYTES[dtype]
    cache = 2 * model.num_hidden_layers * rows * row_bytes
    on_host = target == "cpu"
    # Each TensorRT engine and each CUDA session holds the weights; CPU sessions map one file.
    copies = 1 if on_host else len(graphs)
    num_whole = sum(graph.attended_rows == graph.rows for graph in graphs)
    prepacked = packed * num_whole if on_host else 0
    total = weights * copies + prepacked + cache
    return MemoryNeeds(
        dtype=dtype,
        weight_bytes=weights,
        weight_copies=copies,
        prepacked_bytes=prepacked,
        cache_bytes=cache,
        host_bytes=total if on_host else 0,
        device_bytes=0 if on_host else total,
    )


def _read_weights(manifest: Manifest, target: str, dtype: str) -> dict[str, StoredWeight]:
    """Name to the weight that the target's graphs read; of several dtypes their own."""
    found: dict[str, StoredWeight] = {}
    others = _NOT_OF_TENSORRT if target == "tensorrt" else OF_TENSORRT
    for file in manifest.weights:
        for name, stored in file.tensors.items():
            if name.startswith("rope.") or name.endswith(others):
                continue
            if stored.dtype == dtype or name not in found:
                found[name] = stored
    for name in list(found):
        module, _, key = name.rpartition(".")
        if key == "weight_positive_scale" and f"{module}.weight_minimum" not in found:
            del found[f"{module}.weight_scale"]
    return found


def _is_multiplied_packed(name: str) -> bool:
    return name.endswith((".weight_packed", ".weight_scale")) and "embed_tokens" not in name
