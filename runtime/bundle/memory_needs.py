"""The memory that running a bundle takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .manifest import ITEM_BYTES, Manifest

__all__ = ["MemoryNeeds", "memory_needs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeeds:
    """What the graphs of one target take.

    Attributes:
        dtype: Of weights and cache.
        weight_bytes: All weights once.
        weight_copies: How many times they are in memory.
        cache_bytes: The KV cache of all slots.
        host_bytes: In all, where the target runs on the CPU.
        device_bytes: In all, where it runs on a GPU.
    """

    dtype: str
    weight_bytes: int
    weight_copies: int
    cache_bytes: int
    host_bytes: int
    device_bytes: int


def memory_needs(manifest: Manifest, target: str) -> MemoryNeeds:
    """Sums up what a target's graphs take.

    Args:
        manifest: The bundle.
        target: One of its targets.

    Returns:
        The bytes.
    """
    graphs = [graph for graph in manifest.graphs if graph.target == target]
    dtype, model = graphs[0].dtype, manifest.model
    weights = sum(
        math.prod(tensor.shape) * ITEM_BYTES[dtype]
        for file in manifest.weights
        if file.dtype == dtype
        for name, tensor in file.tensors.items()
        if not name.startswith("rope.")
    )
    rows = manifest.shape.batch_size * manifest.shape.max_seq_len
    row_bytes = model.num_key_value_heads * model.head_dim * ITEM_BYTES[dtype]
    cache = 2 * model.num_hidden_layers * rows * row_bytes
    on_host = target == "cpu"
    # Each TensorRT engine and each CUDA session holds the weights; CPU sessions map one file.
    copies = 1 if on_host else len(graphs)
    total = weights * copies + cache
    return MemoryNeeds(
        dtype=dtype,
        weight_bytes=weights,
        weight_copies=copies,
        cache_bytes=cache,
        host_bytes=total if on_host else 0,
        device_bytes=0 if on_host else total,
    )
