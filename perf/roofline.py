"""The least a step can cost: exact bytes and FLOPs over the rates that this machine reaches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..model.checkpoint.stored import weight_shapes
from ..model.config import LlamaConfig
from ..runtime.bundle.manifest import ITEM_BYTES
from .weight_sizes import WeightSizes

__all__ = ["Limits", "Work", "bits_per_weight", "decode_work", "prefill_work"]

_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a computation has to read, write and multiply, whoever does it.

    Attributes:
        weight_bytes: Every weight once, of the embedding only the rows looked up.
        live_kv_bytes: The cache rows of the tokens so far, the new ones included.
        wasted_kv_bytes: The other rows of the static cache; not needed, and not in the limit.
        logits_bytes: The float32 logits written.
        flops: A multiplication and an addition count as two.
    """

    weight_bytes: int
    live_kv_bytes: int
    wasted_kv_bytes: int
    logits_bytes: int
    flops: int

    @property
    def needed_bytes(self) -> int:
        """Everything but the waste."""
        return self.weight_bytes + self.live_kv_bytes + self.logits_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Rates measured on this machine.

    Attributes:
        read_bytes_per_s: Reading an array much larger than the caches.
        flops_per_s: Product of large matrices, by dtype.
    """

    read_bytes_per_s: float
    flops_per_s: Mapping[str, float]

    @classmethod
    def of(cls, sample: Mapping[str, Any]) -> Limits:
        """Takes the fastest kernels of one measurement.

        Args:
            sample: What LimitProbe.measure returned.

        Returns:
            The limits. A 16-bit dtype's rate is at least float32's: widening is always possible.
        """
        rates = {dtype: max(found.values()) for dtype, found in sample["flops_per_s"].items()}
        return cls(
            read_bytes_per_s=max(sample["read_bytes_per_s"].values()),
            flops_per_s={
                dtype: max(rates.get(dtype, 0.0), rates["float32"]) for dtype in ITEM_BYTES
            },
        )

    def least_s(self, work: Work, dtype: str) -> float:
        """Seconds below which the work can't be done: memory or arithmetic, whichever is slower.

        Args:
            work: What is to be done.
            dtype: What it is computed in.

        Returns:
            Seconds.
        """
        memory_s = work.needed_bytes / self.read_bytes_per_s
        return max(memory_s, work.flops / self.flops_per_s[dtype])


def decode_work(
    config: LlamaConfig,
    *,
    item_bytes: int,
    batch_size: int,
    context: int,
    max_seq_len: int,
    weights: WeightSizes | None = None,
) -> Work:
    """Counts one decode step.

    Args:
        config: The model's facts.
        item_bytes: Of a cache element, and of a weight where these weren't measured.
        batch_size: B.
        context: Live tokens of each sequence before the step.
        max_seq_len: S.
        weights: What they were measured to take.

    Returns:
        The work.
    """
    live = context + 1
    row = _kv_row_bytes(config, item_bytes) * batch_size
    products = 2 * (_layer_products(config) + _head_products(config))
    scores = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * live
    return Work(
        weight_bytes=_weight_bytes(config, item_bytes, weights, looked_up=batch_size),
        live_kv_bytes=row * live,
        wasted_kv_bytes=row * max(max_seq_len - live, 0),
        logits_bytes=4 * batch_size * config.vocab_size,
        flops=batch_size * (products + scores),
    )


def prefill_work(
    config: LlamaConfig,
    *,
    item_bytes: int,
    batch_size: int,
    num_tokens: int,
    max_seq_len: int,
    weights: WeightSizes | None = None,
) -> Work:
    """Counts a prompt of every sequence; the head runs on the last token alone.

    Args:
        config: The model's facts.
        item_bytes: Of a cache element, and of a weight where these weren't measured.
        batch_size: B.
        num_tokens: Of each prompt.
        max_seq_len: S.
        weights: What they were measured to take.

    Returns:
        The work.
    """
    row = _kv_row_bytes(config, item_bytes) * batch_size
    products = 2 * (_layer_products(config) * num_tokens + _head_products(config))
    pairs = num_tokens * (num_tokens + 1) // 2  # token n attends to n tokens
    scores = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
    return Work(
        weight_bytes=_weight_bytes(config, item_bytes, weights, looked_up=batch_size * num_tokens),
        live_kv_bytes=row * num_tokens,
        wasted_kv_bytes=row * max(max_seq_len - num_tokens, 0),
        logits_bytes=4 * batch_size * config.vocab_size,
        flops=batch_size * (products + scores),
    )


def bits_per_weight(config: LlamaConfig, weights: WeightSizes) -> float:
    """Spreads what weights take, scales and all, over all of them.

    Args:
        config: The model's facts.
        weights: What they were measured to take.

    Returns:
        The bits.
    """
    return 8 * weights.weight_bytes / _num_weights(config)


def _num_weights(config: LlamaConfig) -> int:
    return sum(math.prod(shape) for shape in weight_shapes(config).values())


def _weight_bytes(
    config: LlamaConfig, item_bytes: int, weights: WeightSizes | None, *, looked_up: int
) -> int:
    if weights is not None:
        rows = min(looked_up, config.vocab_size)
        table = weights.lookup_bytes
        return weights.weight_bytes - table + table * rows // config.vocab_size
    shapes, elements = weight_shapes(config), _num_weights(config)
    if not config.tie_word_embeddings:
        vocab_size, width = shapes[_EMBEDDING]
        elements += width * (min(looked_up, vocab_size) - vocab_size)
    return elements * item_bytes


def _layer_products(config: LlamaConfig) -> int:
    """Multiplications of one token with the layers' matrices."""
    shapes = weight_shapes(config)
    return sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if name.startswith("model.layers.") and len(shape) == 2
    )


def _head_products(config: LlamaConfig) -> int:
    return config.vocab_size * config.hidden_size


def _kv_row_bytes(config: LlamaConfig, item_bytes: int) -> int:
    """A token's keys and values in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * item_bytes
