"""Triton kernels: what a step of few tokens multiplies with weights that lie behind each other.

Triton comes with the CUDA builds of torch alone, so this module is imported where it is needed.
"""

# Triton's own types don't know how a kernel is called.
# pyright: reportIndexIssue=false, reportMissingImports=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .product_gpu import add_bias, begin_products, block_sizes, split_halves, sum_products

__all__ = ["multiply_gate_up_on_gpu", "multiply_qkv_on_gpu"]


def multiply_gate_up_on_gpu(
    x: Tensor, gain: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Computes silu(gate) * up of at most 16 rows.

    Args:
        x: [M, E], contiguous.
        gain: [E], the weight of an RMSNorm that a single row of x goes through first; else None.
        eps: RMSNorm's.
        weight: [2 * I, E] in x's dtype, contiguous: gate's rows, then up's.
        bias: [2 * I] or None.

    Returns:
        [M, I] in x's dtype.
    """
    num_x, num_rows = len(x), len(weight) // 2
    out = x.new_empty(num_x, num_rows)
    sizes = block_sizes(num_x, weight)
    _multiply_gate_up[(triton.cdiv(num_rows, sizes["BLOCK_ROWS"] // 2),)](
        x, gain, eps, weight, bias, out, num_x, num_rows, **sizes
    )
    return out


def multiply_qkv_on_gpu(
    x: Tensor,
    gain: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    write_indices: Tensor,
    slots: Tensor,
) -> Tensor:
    """Makes q, k and v of one token of at most 16 sequences, q and k rotated.

    k and v go to the cache, in place.

    Args:
        x: [B, E], contiguous.
        gain: [E], the weight of an RMSNorm that a single row of x goes through first; else None.
        eps: RMSNorm's.
        weight: [(H + 2K) * D, E] in x's dtype, contiguous: q's rows, then k's, then v's.
        bias: [(H + 2K) * D] or None.
        cos: [B, 1, D/2] float32, contiguous.
        sin: [B, 1, D/2] float32, contiguous.
        k_cache: [slots, K, S, D], contiguous.
        v_cache: [slots, K, S, D], contiguous.
        write_indices: [B] int64, the cache row of each token.
        slots: [B] int64, the cache slot of each token.

    Returns:
        q [B, H, D] in x's dtype.
    """
    num_x = len(x)
    num_kv_heads, max_seq_len, head_dim = k_cache.shape[1:]
    num_heads = len(weight) // head_dim - 2 * num_kv_heads
    q = x.new_empty(num_x, num_heads, head_dim)
    sizes = block_sizes(num_x, weight)
    grid = triton.cdiv(head_dim // 2, sizes["BLOCK_ROWS"] // 2), num_heads + 2 * num_kv_heads
    _multiply_qkv[grid](
        x,
        gain,
        eps,
        weight,
        bias,
        cos,
        sin,
        q,
        k_cache,
        v_cache,
        write_indices,
        slots,
        num_x,
        max_seq_len,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF_DIM=head_dim // 2,
        **sizes,
    )
    return q


@triton.jit
def _multiply_gate_up(
    x,
    gain,
    eps,
    weight,
    bias,
    out,
    num_x,
    num_rows,
    WIDTH: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """The same few rows of gate and of up, one half each."""
    half = tl.arange(0, BLOCK_ROWS) // (BLOCK_ROWS // 2)
    row = tl.program_id(0) * (BLOCK_ROWS // 2) + tl.arange(0, BLOCK_ROWS) % (BLOCK_ROWS // 2)
    is_row = row < num_rows
    begin = weight + (half * num_rows + row).to(tl.int64) * WIDTH
    block = begin_products(begin, is_row, WIDTH, BLOCK_X, BLOCK_COLUMNS, OVERLAPS)
    sums = sum_products(
        x, gain, eps, begin, block, is_row, num_x, WIDTH, BLOCK_X, BLOCK_ROWS, BLOCK_COLUMNS
    )
    sums = add_bias(sums, bias, half * num_rows + row, is_row)
    gates, ups = split_halves(sums, BLOCK_ROWS, BLOCK_X)
    row = tl.program_id(0) * (BLOCK_ROWS // 2) + tl.arange(0, BLOCK_ROWS // 2)
    x_row = tl.arange(0, BLOCK_X)
    tl.store(
        out + x_row[None, :] * num_rows + row[:, None],
        (gates * tl.sigmoid(gates) * ups).to(out.dtype.element_ty),
        mask=(row < num_rows)[:, None] & (x_row < num_x)[None, :],
    )


@triton.jit
def _multiply_qkv(
    x,
    gain,
    eps,
    weight,
    bias,
    cos,
    sin,
    q,
    k_cache,
    v_cache,
    write_indices,
    slots,
    num_x,
    max_seq_len,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Rows i and i + D/2 of one head, of q's, then k's, then v's, one half each."""
    head, first_pair = tl.program_id(1), tl.program_id(0) * (BLOCK_ROWS // 2)
    half = tl.arange(0, BLOCK_ROWS) // (BLOCK_ROWS // 2)
    pair = first_pair + tl.arange(0, BLOCK_ROWS) % (BLOCK_ROWS // 2)
    is_row = pair < HALF_DIM
    row = (2 * head + half) * HALF_DIM + pair
    begin = weight + row.to(tl.int64) * WIDTH
    block = begin_products(begin, is_row, WIDTH, BLOCK_X, BLOCK_COLUMNS, OVERLAPS)
    pair = first_pair + tl.arange(0, BLOCK_ROWS // 2)
    x_row = tl.arange(0, BLOCK_X)
    is_x = x_row < num_x
    inside = (pair < HALF_DIM)[:, None] & is_x[None, :]
    out, target = q, (x_row * NUM_HEADS + head).to(tl.int64)
    if head >= NUM_HEADS:
        slot = tl.load(slots + x_row, mask=is_x, other=0)
        cache_row = tl.load(write_indices + x_row, mask=is_x, other=0)
        out, kv_head = k_cache, head - NUM_HEADS
        if kv_head >= NUM_KV_HEADS:
            out, kv_head = v_cache, kv_head - NUM_KV_HEADS
        target = (slot * NUM_KV_HEADS + kv_head) * max_seq_len + cache_row
    c = tl.full((BLOCK_ROWS // 2, BLOCK_X), 1.0, tl.float32)
    s = tl.zeros((BLOCK_ROWS // 2, BLOCK_X), tl.float32)
    if head < NUM_HEADS + NUM_KV_HEADS:
        angle = x_row[None, :] * HALF_DIM + pair[:, None]
        c = tl.load(cos + angle, mask=inside, other=0.0)
        s = tl.load(sin + angle, mask=inside, other=0.0)
    sums = sum_products(
        x, gain, eps, begin, block, is_row, num_x, WIDTH, BLOCK_X, BLOCK_ROWS, BLOCK_COLUMNS
    )
    first, second = split_halves(add_bias(sums, bias, row, is_row), BLOCK_ROWS, BLOCK_X)
    place = out + target[None, :] * (2 * HALF_DIM) + pair[:, None]
    tl.store(place, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(place + HALF_DIM, (second * c + first * s).to(out.dtype.element_ty), mask=inside)
