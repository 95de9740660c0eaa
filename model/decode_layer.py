"""A few tokens through decoder layers on a CPU: all layers in one operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from .kernels.few_rows import layers_few
from .linear import Linear, is_few_rows
from .packed import PackedLinear

__all__ = ["call_layer", "call_layers"]


def call_layers(
    layers: Sequence[Any],
    caches: Sequence[tuple[Tensor, ...]],
    run_layer: Callable[..., Tensor],
    attention: Any,
    hidden: Tensor,
    *rest: Tensor,
) -> Tensor:
    """Calls decoder layers one after the other, or in one operator.

    Args:
        layers: Of a Llama.
        caches: Of each layer its part of the cache.
        run_layer: How one is called; see call_layer.
        attention: See Attention.
        hidden: [B*T, E].
        rest: What else each is called with, but for its cache.

    Returns:
        The hidden states after all of them.
    """
    pairs = [*zip(layers, caches, strict=True)]
    if all(_fits_operator(layer, hidden, cache) for layer, cache in pairs):
        return _few_tokens(layers, caches, hidden, *rest)
    for layer, cache in pairs:
        hidden = run_layer(layer, attention, hidden, *rest, *cache)
    return hidden


def call_layer(
    layer: Any, attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor, *rest: Tensor
) -> Tensor:
    """Calls one decoder layer; the compiled path marks this call as one shared region.

    Args:
        layer: Of a Llama.
        attention: See Attention.
        hidden: [B*T, E].
        cos: [B, T, D/2] float32.
        sin: [B, T, D/2] float32.
        rest: What else it is called with: positions, write indices, slots and its cache.

    Returns:
        The hidden states after it.
    """
    cache = rest[3:]
    if _fits_operator(layer, hidden, cache):
        return _few_tokens([layer], [cache], hidden, cos, sin, *rest[:3])
    return layer(attention, hidden, cos, sin, *rest)


def _few_tokens(
    layers: Sequence[Any],
    caches: Sequence[tuple[Tensor, ...]],
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    write_indices: Tensor,
    slots: Tensor,
) -> Tensor:
    """Does what the layers do, in a compiled step on a CPU."""
    norms = [(one.input_layernorm, one.post_attention_layernorm) for one in layers]
    products = [*chain(*map(_products, layers))]
    packed = [one if isinstance(one, PackedLinear) else None for one in products]
    return layers_few(
        hidden,
        [norm.weight for norm in chain(*norms)],
        norms[0][0].eps,
        [one.weight_packed if isinstance(one, PackedLinear) else one.weight for one in products],
        [one and one.weight_scale for one in packed],
        [one and one.weight_minimum for one in packed],
        [one.bias for one in products],
        cos,
        sin,
        positions,
        write_indices,
        slots,
        layers[0].self_attn.scale,
        [*chain(*caches)],
    )


def _fits_operator(layer: Any, hidden: Tensor, cache: tuple[Tensor, ...]) -> bool:
    """Whether _few_tokens can be called with these.

    It takes weights in the dtype of the hidden states or packed, not in another order of columns,
    and caches in that dtype or in int8.
    """
    if not is_few_rows(hidden):
        return False
    dtype, products = hidden.dtype, _products(layer)
    return (
        all(one.rank.world_size == 1 for one in products)
        and all(
            one.weight_order is None if isinstance(one, PackedLinear) else one.weight.dtype == dtype
            for one in products
        )
        and layer.input_layernorm.weight.dtype == dtype
        and (len(cache) > 2 or all(buffer.dtype == dtype for buffer in cache))
    )


def _products(layer: Any) -> list[Linear | PackedLinear]:
    """In the order of their use."""
    own, mlp = layer.self_attn, layer.mlp
    attention = [own.q_proj, own.k_proj, own.v_proj, own.o_proj]
    return [*attention, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
