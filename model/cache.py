"""The preallocated KV cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import LlamaConfig

__all__ = ["CacheBuffer", "KVCache", "cache_bytes", "layer_buffers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheBuffer:
    """One of the buffers that every layer has.

    Attributes:
        name: What it holds.
        shape: Its size, slots first.
        dtype: Its elements.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def layer_buffers(
    config: LlamaConfig, batch_size: int, max_seq_len: int, *, dtype: torch.dtype
) -> tuple[CacheBuffer, ...]:
    """Declares what a layer keeps: everything else about the cache follows from this.

    Args:
        config: Supplies the head and width counts.
        batch_size: B, number of slots.
        max_seq_len: S, rows of a slot.
        dtype: Of keys and values.

    Returns:
        Keys and values, each [B, K, S, D], in the order in which attention gets them.
    """
    shape = (batch_size, config.num_key_value_heads, max_seq_len, config.head_dim)
    return tuple(CacheBuffer(name=name, shape=shape, dtype=dtype) for name in ("key", "value"))


@dataclass(frozen=True, slots=True)
class KVCache:
    """The buffers of every layer, allocated once.

    Attributes:
        layers: Per layer its buffers, in layer_buffers' order.
    """

    layers: tuple[tuple[Tensor, ...], ...]

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
            dtype: Of keys and values.
            device: Where the buffers live.

        Returns:
            The cache.
        """
        declared = layer_buffers(config, batch_size, max_seq_len, dtype=dtype)
        return cls(
            tuple(
                tuple(torch.zeros(one.shape, dtype=one.dtype, device=device) for one in declared)
                for _ in range(config.num_hidden_layers)
            )
        )

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """All buffers, layer by layer."""
        return tuple(buffer for layer in self.layers for buffer in layer)


def cache_bytes(
    config: LlamaConfig, batch_size: int, max_seq_len: int, *, dtype: torch.dtype
) -> int:
    """Bytes of a cache of B slots and S rows.

    Args:
        config: Supplies the layer, head and width counts.
        batch_size: B.
        max_seq_len: S.
        dtype: Of keys and values.

    Returns:
        The size in bytes.
    """
    declared = layer_buffers(config, batch_size, max_seq_len, dtype=dtype)
    layer = sum(math.prod(one.shape) * one.dtype.itemsize for one in declared)
    return config.num_hidden_layers * layer
