"""The preallocated KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import LlamaConfig

__all__ = ["KVCache", "cache_bytes"]


@dataclass(frozen=True, slots=True)
class KVCache:
    """One K and one V buffer per layer, allocated once.

    Attributes:
        k: Per layer [B, K, S, D].
        v: Per layer [B, K, S, D].
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]

    @classmethod
    def allocate(
        cls,
        config: LlamaConfig,
        batch_size: int,
        max_seq_len: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        """Allocates zero-filled buffers: under a mask, 0 x garbage could be 0 x NaN.

        Args:
            config: Supplies the layer, head and width counts.
            batch_size: B, number of slots.
            max_seq_len: S, rows of a slot.
            dtype: Element type.
            device: Where the buffers live.

        Returns:
            The cache.
        """
        size = (batch_size, config.num_key_value_heads, max_seq_len, config.head_dim)
        layers = range(config.num_hidden_layers)
        return cls(
            tuple(torch.zeros(size, dtype=dtype, device=device) for _ in layers),
            tuple(torch.zeros(size, dtype=dtype, device=device) for _ in layers),
        )

    def slot(self, index: int) -> KVCache:
        """One slot as a contiguous batch-1 view that shares memory with this cache."""
        return KVCache(
            tuple(k[index : index + 1] for k in self.k), tuple(v[index : index + 1] for v in self.v)
        )


def cache_bytes(config: LlamaConfig, batch_size: int, max_seq_len: int, itemsize: int) -> int:
    """Bytes of a cache of B slots and S rows with elements of `itemsize` bytes."""
    row = config.num_key_value_heads * config.head_dim * itemsize
    return 2 * config.num_hidden_layers * batch_size * max_seq_len * row
