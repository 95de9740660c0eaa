"""A step on one GPU in kernels of our own, which is recorded as it is, without a compiler.

Of one row a layer takes five kernels: the norm and q, k and v, rotated, k and v into the cache;
attention; its output's product and the residual; the norm and silu(gate) * up; the last product and
the residual. Of up to 16 rows the norms are kernels of their own. Of more rows the products are
cuBLAS's, with a kernel for what is between two of them.

Triton comes with the CUDA builds of torch alone, so this module is imported where it is needed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import KVCache
from .kernels.attention_gpu import attend_on_gpu
from .kernels.few_rows import MAX_ROWS
from .kernels.layer_gpu import multiply_gate_up_on_gpu, multiply_qkv_on_gpu
from .kernels.product_gpu import multiply_on_gpu
from .kernels.rows_gpu import (
    embed_on_gpu,
    multiply_silu_on_gpu,
    normalize_on_gpu,
    rotate_and_write_on_gpu,
)
from .linear import Linear

__all__ = ["fits_gpu", "run_on_gpu"]


def fits_gpu(model: Any, cache: KVCache) -> bool:
    """Whether run_on_gpu can be called with these.

    It takes plain weights and a cache of one dtype, in one process, q, k and v joined as well as
    gate and up.

    Args:
        model: A Llama.
        cache: What its steps write.
    """
    products = [one for one in model.modules() if isinstance(one, Linear)]
    first = [product for layer in model.model.layers for product in _firsts(layer)]
    return (
        model.cos.device.type == "cuda"
        and model.rank.world_size == 1
        and isinstance(model.model.embed_tokens, nn.Embedding)
        and len(products) == 7 * len(model.model.layers) + 1
        and all(one.dtype == model.dtype for one in (*model.parameters(), *cache.buffers))
        and all(one.joined is not None for one in first)
    )


def run_on_gpu(
    model: Any,
    attention: Any,
    cache: KVCache,
    input_ids: Tensor,
    positions: Tensor,
    write_indices: Tensor,
    logit_indices: Tensor,
    slots: Tensor,
) -> Tensor:
    """Does what Llama.forward does; sums are rounded less often.

    Args:
        model: A Llama that fits.
        attention: A TorchAttention, for its counters.
        cache: The rows so far; written.
        input_ids: [B, T] int64.
        positions: [B] int64.
        write_indices: [B] int64.
        logit_indices: [B, N] int64, or [1, N].
        slots: [B] int64.

    Returns:
        [B, N, V] float32 logits; or [1, N, V].
    """
    table = model.model.embed_tokens.weight
    hidden, cos, sin = embed_on_gpu(input_ids, positions, table, model.cos, model.sin)
    rest = cos, sin, positions, write_indices, slots, attention.counters
    for layer, (k_cache, v_cache) in zip(model.model.layers, cache.layers, strict=True):
        hidden = _run_layer(layer, hidden, *rest, k_cache, v_cache)
    (batch_size, num_tokens), (num_parts, num_logits) = input_ids.shape, logit_indices.shape
    if num_tokens > 1 or num_parts < batch_size:
        starts = torch.arange(num_parts, device=positions.device)[:, None] * num_tokens
        hidden = hidden.index_select(0, (starts + logit_indices).flatten())
    logits = _multiply_normed(hidden, model.model.norm, model.lm_head)
    return logits.view(num_parts, num_logits, -1)


def _run_layer(
    layer: Any,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    write_indices: Tensor,
    slots: Tensor,
    counters: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    own, mlp = layer.self_attn, layer.mlp
    qkv, gate_up = _firsts(layer)
    x, gain, eps = _normed(hidden, layer.input_layernorm)
    if len(hidden) == len(positions) <= MAX_ROWS:
        weights = qkv.joined, qkv.joined_bias
        q = multiply_qkv_on_gpu(
            x, gain, eps, *weights, cos, sin, k_cache, v_cache, write_indices, slots
        )
        q = q[:, :, None]  # [B, H, 1, D]
    else:
        both = _multiply(x, qkv.joined, qkv.joined_bias)
        q = rotate_and_write_on_gpu(both, cos, sin, k_cache, v_cache, write_indices, slots)
    out = attend_on_gpu(q, k_cache, v_cache, positions, slots, own.scale, counters=counters)
    out = out.view(len(hidden), -1)  # [B*T, H*D]
    hidden = _multiply(out, own.o_proj.weight, own.o_proj.bias, hidden)
    x, gain, eps = _normed(hidden, layer.post_attention_layernorm)
    if len(hidden) <= MAX_ROWS:
        inner = multiply_gate_up_on_gpu(x, gain, eps, gate_up.joined, gate_up.joined_bias)
    else:
        inner = multiply_silu_on_gpu(_multiply(x, gate_up.joined, gate_up.joined_bias))
    return _multiply(inner, mlp.down_proj.weight, mlp.down_proj.bias, hidden)


def _firsts(layer: Any) -> tuple[Any, Any]:
    """The Linears that have the joined weights."""
    return layer.self_attn.q_proj, layer.mlp.gate_proj


def _normed(hidden: Tensor, norm: Any) -> tuple[Tensor, Tensor | None, float]:
    """What a kernel multiplies; a single row it normalizes itself."""
    if len(hidden) == 1:
        return hidden, norm.weight, norm.eps
    return normalize_on_gpu(hidden, norm.weight, norm.eps), None, norm.eps


def _multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None
) -> Tensor:
    """[M, N]: x [M, K] times weight [N, K], plus bias [N] and residual [M, N]."""
    if len(x) <= MAX_ROWS:
        return multiply_on_gpu(x, weight, bias, residual)
    if residual is None:
        return F.linear(x, weight, bias)
    return torch.addmm(residual if bias is None else residual + bias, x, weight.t())


def _multiply_normed(hidden: Tensor, norm: Any, head: Linear) -> Tensor:
    """[M, V] float32."""
    x, gain, eps = _normed(hidden, norm)
    if len(x) > MAX_ROWS:
        return F.linear(x, head.weight).float()
    return multiply_on_gpu(x, head.weight, gain=gain, eps=eps, dtype=torch.float32)
