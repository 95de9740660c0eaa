"""The preallocated KV cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import LlamaConfig

__all__ = ["CacheBuffer", "KVCache", "cache_bytes", "layer_buffers", "quantize_rows"]

_LARGEST = 127  # the magnitude that a row's largest becomes in int8


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
        dtype: Of keys and values; of int8 every row has a scale.

    Returns:
        Keys and values, each [B, K, S, D], and with int8 their scales, each [B, K, S] float32, in
        the order in which attention gets them.
    """
    shape = (batch_size, config.num_key_value_heads, max_seq_len, config.head_dim)
    declared = [CacheBuffer(name=name, shape=shape, dtype=dtype) for name in ("key", "value")]
    if dtype == torch.int8:
        declared += [
            CacheBuffer(name=f"{one.name}_scale", shape=shape[:-1], dtype=torch.float32)
            for one in declared
        ]
    return tuple(declared)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds rows to int8, each by a scale of its own.

    Args:
        x: [..., D].

    Returns:
        [..., D] int8 and [...] float32: x is nearly their product.
    """
    x = x.float()
    scale = (x.abs().amax(-1) / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return (x / scale[..., None]).round().to(torch.int8), scale


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

    @property
    def row_shape(self) -> tuple[int, int, int]:
        """What read_rows returns, less its rows: twice the layers, K, D."""
        _, num_heads, _, head_dim = self.layers[0][0].shape
        return 2 * len(self.layers), num_heads, head_dim

    def read_rows(self, slot: int, num_rows: int) -> Tensor:
        """Copies the first rows of a slot.

        Args:
            slot: Which one.
            num_rows: n.

        Returns:
            [2 * layers, K, n, D] float32 on the CPU: a layer's keys, its values, the next one's.
        """
        found: list[Tensor] = []
        for layer in self.layers:
            for index, buffer in enumerate(layer[:2]):
                rows = buffer[slot, :, :num_rows].float()
                if len(layer) > 2:
                    rows *= layer[2 + index][slot, :, :num_rows, None]
                found.append(rows.cpu())
        return torch.stack(found)

    def write_rows(self, slot: int, rows: Tensor) -> None:
        """Puts what read_rows took into the first rows of a slot.

        Args:
            slot: Which one.
            rows: [2 * layers, K, n, D] float32.
        """
        num_rows = rows.shape[2]
        for layer, pair in zip(self.layers, rows.unflatten(0, (-1, 2)), strict=True):
            values = [pair[0], pair[1]]
            if len(layer) > 2:
                (keys, key_scale), (others, other_scale) = map(quantize_rows, values)
                values = [keys, others, key_scale, other_scale]
            for buffer, own in zip(layer, values, strict=True):
                buffer[slot, :, :num_rows].copy_(own)


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
