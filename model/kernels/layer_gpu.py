"""Triton kernels: what a decode step multiplies with several weights at once.

Triton comes with the CUDA builds of torch alone, so this module is imported where it is needed.
"""

# Triton's own types don't know how a kernel is called.
# pyright: reportIndexIssue=false, reportMissingImports=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .product_gpu import TILE_ROWS, add_bias, block_sizes, sum_products

__all__ = ["multiply_gate_up_on_gpu", "multiply_qkv_on_gpu"]


def multiply_gate_up_on_gpu(
    hidden: Tensor,
    gain: Tensor,
    eps: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> Tensor:
    """Normalizes at most 16 rows and computes silu(gate) * up of them.

    Args:
        hidden: [M, E], contiguous.
        gain: [E], RMSNorm's weight.
        eps: RMSNorm's.
        weights: gate and up, each [N, E] in hidden's dtype, contiguous.
        biases: Theirs, each [N], or none.

    Returns:
        [M, N] in hidden's dtype.
    """
    gate, up = weights
    gate_bias, up_bias = biases or (None, None)
    num_x, (num_rows, width) = len(hidden), gate.shape
    out = hidden.new_empty(num_x, num_rows)
    block_rows = 1 if num_x == 1 else TILE_ROWS
    _multiply_gate_up[(triton.cdiv(num_rows, block_rows),)](
        hidden,
        gain,
        eps,
        gate,
        up,
        gate_bias,
        up_bias,
        out,
        num_x,
        num_rows,
        width,
        BLOCK_ROWS=block_rows,
        **block_sizes(num_x, gate, num_weights=2),
    )
    return out


def multiply_qkv_on_gpu(
    hidden: Tensor,
    gain: Tensor,
    eps: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    write_indices: Tensor,
    slots: Tensor,
) -> Tensor:
    """Normalizes one token of at most 16 sequences and makes q, k and v of it, q and k rotated.

    k and v go to the cache, in place.

    Args:
        hidden: [B, E], contiguous.
        gain: [E], RMSNorm's weight.
        eps: RMSNorm's.
        weights: q [H*D, E], k and v [K*D, E] in hidden's dtype, contiguous.
        biases: Theirs, or none.
        cos: [B, 1, D/2] float32, contiguous.
        sin: [B, 1, D/2] float32, contiguous.
        k_cache: [slots, K, S, D] in hidden's dtype, contiguous.
        v_cache: [slots, K, S, D] in hidden's dtype, contiguous.
        write_indices: [B] int64, the cache row of each token.
        slots: [B] int64, the cache slot of each token.

    Returns:
        q [B, H, D] in hidden's dtype.
    """
    num_x, width = hidden.shape
    num_kv_heads, max_seq_len, head_dim = k_cache.shape[1:]
    num_heads = len(weights[0]) // head_dim
    q = hidden.new_empty(num_x, num_heads, head_dim)
    block_pairs = 1 if num_x == 1 else TILE_ROWS
    _multiply_qkv[(triton.cdiv(head_dim // 2, block_pairs), num_heads + 2 * num_kv_heads)](
        hidden,
        gain,
        eps,
        *weights,
        *(biases or (None, None, None)),
        cos,
        sin,
        q,
        k_cache,
        v_cache,
        write_indices,
        slots,
        num_x,
        width,
        max_seq_len,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF_DIM=head_dim // 2,
        BLOCK_PAIRS=block_pairs,
        **block_sizes(num_x, weights[0], num_weights=2),
    )
    return q


@triton.jit
def _multiply_gate_up(
    hidden,
    gain,
    eps,
    gate,
    up,
    gate_bias,
    up_bias,
    out,
    num_x,
    num_rows,
    width,
    BLOCK_X: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """The same few rows of both weights times the normalized rows."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < num_rows
    begin = row.to(tl.int64) * width
    gates, ups = sum_products(
        hidden,
        gain,
        eps,
        gate + begin,
        up + begin,
        is_row,
        num_x,
        width,
        BLOCK_X,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
    )
    gates = add_bias(gates, gate_bias, row, is_row)
    ups = add_bias(ups, up_bias, row, is_row)
    x_row = tl.arange(0, BLOCK_X)
    tl.store(
        out + x_row[None, :] * num_rows + row[:, None],
        (gates * tl.sigmoid(gates) * ups).to(out.dtype.element_ty),
        mask=is_row[:, None] & (x_row < num_x)[None, :],
    )


@triton.jit
def _multiply_qkv(
    hidden,
    gain,
    eps,
    q_weight,
    k_weight,
    v_weight,
    q_bias,
    k_bias,
    v_bias,
    cos,
    sin,
    q,
    k_cache,
    v_cache,
    write_indices,
    slots,
    num_x,
    width,
    max_seq_len,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF_DIM: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """A few pairs of rows i and i + D/2 of one head, of q's, then k's, then v's."""
    head = tl.program_id(1)
    x_row = tl.arange(0, BLOCK_X)
    is_x = x_row < num_x
    slot = tl.load(slots + x_row, mask=is_x, other=0)
    cache_row = tl.load(write_indices + x_row, mask=is_x, other=0)
    weight, bias, out = q_weight, q_bias, q
    target = (x_row * NUM_HEADS + head).to(tl.int64)
    if head >= NUM_HEADS:
        head -= NUM_HEADS
        weight, bias, out = k_weight, k_bias, k_cache
        if head >= NUM_KV_HEADS:
            head -= NUM_KV_HEADS
            weight, bias, out = v_weight, v_bias, v_cache
        target = (slot * NUM_KV_HEADS + head) * max_seq_len + cache_row

    pair = tl.program_id(0) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    is_pair = pair < HALF_DIM
    row = head * (2 * HALF_DIM) + pair
    begin = weight + row.to(tl.int64) * width
    first, second = sum_products(
        hidden,
        gain,
        eps,
        begin,
        begin + HALF_DIM * width,
        is_pair,
        num_x,
        width,
        BLOCK_X,
        BLOCK_PAIRS,
        BLOCK_COLUMNS,
    )
    first = add_bias(first, bias, row, is_pair)
    second = add_bias(second, bias, row + HALF_DIM, is_pair)
    inside = is_pair[:, None] & is_x[None, :]
    if tl.program_id(1) < NUM_HEADS + NUM_KV_HEADS:
        angle = x_row[None, :] * HALF_DIM + pair[:, None]
        c = tl.load(cos + angle, mask=inside, other=0.0)
        s = tl.load(sin + angle, mask=inside, other=0.0)
        first, second = first * c - second * s, second * c + first * s
    place = out + target[None, :] * (2 * HALF_DIM) + pair[:, None]
    tl.store(place, first.to(out.dtype.element_ty), mask=inside)
    tl.store(place + HALF_DIM, second.to(out.dtype.element_ty), mask=inside)
