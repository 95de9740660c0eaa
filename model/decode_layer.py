"""A few tokens through decoder layers: on a CPU all in one operator, on a GPU each in five kernels.

The kernels are: the norm and q, k and v, rotated, k and v into the cache; attention; its output's
product and the residual; the norm and silu(gate) * up; the last product and the residual.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from .kernels.few_rows import MAX_ROWS, layers_few
from .kernels.gpu_operators import multiply_gate_up, multiply_qkv, multiply_rows
from .kernels.live_attention import attend_live
from .linear import Linear, is_few_rows
from .packed import PackedLinear

__all__ = ["call_layer", "call_layers", "decode_layer"]


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
    if _fits_decode(layer, hidden, len(cos), cache):
        return decode_layer(layer, attention, hidden, cos, sin, *rest)
    return layer(attention, hidden, cos, sin, *rest)


def decode_layer(
    layer: Any,
    attention: Any,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    write_indices: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """Does what the layer does, on a GPU; sums are rounded less often.

    Args:
        layer: Of a Llama.
        attention: A TorchAttention.
        hidden: [B, E], B at most 16.
        cos: [B, 1, D/2] float32.
        sin: [B, 1, D/2] float32.
        positions: [B] int64.
        write_indices: [B] int64, the cache row of each token.
        slots: [B] int64, the cache slot of each token.
        k_cache: [slots, K, S, D], written in place.
        v_cache: [slots, K, S, D], written in place.

    Returns:
        [B, E] in hidden's dtype.
    """
    own, mlp = layer.self_attn, layer.mlp
    norm = layer.input_layernorm
    q = multiply_qkv(
        hidden,
        norm.weight,
        norm.eps,
        *_parameters(own.q_proj, own.k_proj, own.v_proj),
        cos,
        sin,
        k_cache,
        v_cache,
        write_indices,
        slots,
    )
    q = q[:, :, None]  # [B, H, 1, D]
    out = attend_live(q, k_cache, v_cache, positions, slots, own.scale, counters=attention.counters)
    out = out.flatten(1)  # [B, H*D]
    hidden = multiply_rows(out, own.o_proj.weight, own.o_proj.bias, hidden)
    norm = layer.post_attention_layernorm
    inner = multiply_gate_up(
        hidden, norm.weight, norm.eps, *_parameters(mlp.gate_proj, mlp.up_proj)
    )
    return multiply_rows(inner, mlp.down_proj.weight, mlp.down_proj.bias, hidden)


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


def _fits_decode(layer: Any, hidden: Tensor, batch_size: int, caches: tuple[Tensor, ...]) -> bool:
    """Whether decode_layer can be called with these.

    It takes plain weights and caches in the dtype of the hidden states, all of them on one GPU.
    """
    if hidden.device.type != "cuda":
        return False
    own, mlp = layer.self_attn, layer.mlp
    qkv = (own.q_proj, own.k_proj, own.v_proj)
    gate_up = (mlp.gate_proj, mlp.up_proj)
    products = _products(layer)
    return (
        len(hidden) == batch_size <= MAX_ROWS
        and len(caches) == 2
        and all(isinstance(one, Linear) and one.rank.world_size == 1 for one in products)
        and all(one.weight.dtype == hidden.dtype for one in products)
        and all(cache.dtype == hidden.dtype for cache in caches)
        and all(len({one.bias is None for one in group}) == 1 for group in (qkv, gate_up))
    )


def _parameters(*products: Linear) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases, if there are any."""
    biases: list[Tensor] = [one.bias for one in products if one.bias is not None]
    return [one.weight for one in products], biases
