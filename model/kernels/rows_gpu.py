"""Triton kernels: what a step does with the rows of its tokens between products.

Triton comes with the CUDA builds of torch alone, so this module is imported where it is needed.
"""

# Triton's own types don't know how a kernel is called.
# pyright: reportIndexIssue=false, reportMissingImports=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap_gpu import begin_next, overlap, wait_for_inputs

__all__ = ["embed_on_gpu", "multiply_silu_on_gpu", "normalize_on_gpu", "rotate_and_write_on_gpu"]

_BLOCK_NUMBERS = 1024  # of a row, of one program
_BLOCK_PAIRS = 256  # of some heads, of one program


def embed_on_gpu(
    ids: Tensor, positions: Tensor, table: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Looks up what a step begins with.

    Args:
        ids: [B, T] int64, contiguous.
        positions: [B] int64, of each row's first token.
        table: [V, E], the embedding.
        cos: [positions, D/2] float32, contiguous.
        sin: [positions, D/2] float32, contiguous.

    Returns:
        Hidden states [B*T, E] in table's dtype, and [B, T, D/2] of cos and of sin.
    """
    batch_size, num_tokens = ids.shape
    width, half_dim = table.shape[1], cos.shape[1]
    hidden = table.new_empty(ids.numel(), width)
    angles = [table.new_empty(*ids.shape, half_dim, dtype=torch.float32) for _ in "cs"]
    _embed[(batch_size, num_tokens, triton.cdiv(width, _BLOCK_NUMBERS))](
        ids,
        positions,
        table,
        cos,
        sin,
        hidden,
        *angles,
        width,
        half_dim,
        BLOCK=_BLOCK_NUMBERS,
        BLOCK_ANGLES=triton.next_power_of_2(half_dim),
        OVERLAPS=overlap(table.device)["OVERLAPS"],  # the next kernel; none is before it
    )
    return hidden, angles[0], angles[1]


def normalize_on_gpu(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """RMSNorm, in float32.

    Args:
        x: [M, E], contiguous.
        gain: [E].
        eps: Added to the mean square.

    Returns:
        [M, E] in x's dtype.
    """
    out = torch.empty_like(x)
    width = x.shape[1]
    block = triton.next_power_of_2(width)
    _normalize[(len(x),)](
        x,
        gain,
        out,
        eps,
        width,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
        **overlap(x.device),
    )
    return out


def rotate_and_write_on_gpu(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    write_indices: Tensor,
    slots: Tensor,
) -> Tensor:
    """Rotates q and k, and writes k and v to the cache, in place.

    Args:
        qkv: [B*T, (H + 2K) * D], contiguous.
        cos: [B, T, D/2] float32, contiguous.
        sin: [B, T, D/2] float32, contiguous.
        k_cache: [slots, K, S, D], contiguous.
        v_cache: [slots, K, S, D], contiguous.
        write_indices: [B] int64, the cache row of each row's first token.
        slots: [B] int64, the cache slot of each row.

    Returns:
        q [B, H, T, D] in qkv's dtype.
    """
    batch_size, num_tokens, half_dim = cos.shape
    num_kv_heads, max_seq_len, head_dim = k_cache.shape[1:]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    q = qkv.new_empty(batch_size, num_tokens, num_heads, head_dim)
    block_pairs = triton.next_power_of_2(half_dim)
    block_heads = max(_BLOCK_PAIRS // block_pairs, 1)
    all_heads = num_heads + 2 * num_kv_heads
    _rotate_and_write[(batch_size, num_tokens, triton.cdiv(all_heads, block_heads))](
        qkv,
        cos,
        sin,
        q,
        k_cache,
        v_cache,
        write_indices,
        slots,
        max_seq_len,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF_DIM=half_dim,
        BLOCK_HEADS=block_heads,
        BLOCK_PAIRS=block_pairs,
        num_warps=1,
        **overlap(qkv.device),
    )
    return q.transpose(1, 2)


def multiply_silu_on_gpu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, in float32.

    Args:
        gate_up: [M, 2 * I], contiguous: gate's columns, then up's.

    Returns:
        [M, I] in its dtype.
    """
    num_rows, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(num_rows, width)
    _multiply_silu[(num_rows, triton.cdiv(width, _BLOCK_NUMBERS))](
        gate_up, out, width, BLOCK=_BLOCK_NUMBERS, **overlap(gate_up.device)
    )
    return out


@triton.jit
def _embed(
    ids,
    positions,
    table,
    cos,
    sin,
    hidden,
    out_cos,
    out_sin,
    width,
    half_dim,
    BLOCK: tl.constexpr,
    BLOCK_ANGLES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """A part of one token's row; the first part's program looks up its angles, too."""
    begin_next(OVERLAPS)
    token = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    numbers = tl.load(table + tl.load(ids + token) * width + column, mask=inside)
    place = hidden + token.to(tl.int64) * width + column
    tl.store(place, numbers, mask=inside)
    if tl.program_id(2) == 0:
        position = tl.load(positions + tl.program_id(0)) + tl.program_id(1)
        angle = tl.arange(0, BLOCK_ANGLES)
        is_angle = angle < half_dim
        source, target = position * half_dim + angle, token * half_dim + angle
        tl.store(out_cos + target, tl.load(cos + source, mask=is_angle), mask=is_angle)
        tl.store(out_sin + target, tl.load(sin + source, mask=is_angle), mask=is_angle)


@triton.jit
def _normalize(x, gain, out, eps, width, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = column < width
    scale = tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(OVERLAPS)
    begin = tl.program_id(0).to(tl.int64) * width
    row = tl.load(x + begin + column, mask=inside, other=0.0).to(tl.float32)
    norm = tl.rsqrt(tl.sum(row * row, 0) / width + eps)
    tl.store(out + begin + column, (row * norm * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_and_write(
    qkv,
    cos,
    sin,
    q,
    k_cache,
    v_cache,
    write_indices,
    slots,
    max_seq_len,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Some heads of one token, of q's, then k's, then v's."""
    wait_for_inputs(OVERLAPS)
    batch, in_row = tl.program_id(0), tl.program_id(1)
    token = (batch * tl.num_programs(1) + in_row).to(tl.int64)
    head = tl.program_id(2) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    pair = tl.arange(0, BLOCK_PAIRS)
    is_pair = pair < HALF_DIM
    inside = (head < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & is_pair[None, :]
    begin = token * ((NUM_HEADS + 2 * NUM_KV_HEADS) * 2 * HALF_DIM)
    place = qkv + begin + head[:, None] * (2 * HALF_DIM) + pair[None, :]
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + HALF_DIM, mask=inside, other=0.0).to(tl.float32)
    angle = token * HALF_DIM + pair
    c = tl.load(cos + angle, mask=is_pair, other=0.0)[None, :]
    s = tl.load(sin + angle, mask=is_pair, other=0.0)[None, :]
    is_rotated = (head < NUM_HEADS + NUM_KV_HEADS)[:, None]
    turned = tl.where(is_rotated, first * c - second * s, first)
    other = tl.where(is_rotated, second * c + first * s, second)

    is_q = (head < NUM_HEADS)[:, None]
    target = q + (token * NUM_HEADS + head)[:, None] * (2 * HALF_DIM) + pair[None, :]
    tl.store(target, turned.to(q.dtype.element_ty), mask=inside & is_q)
    tl.store(target + HALF_DIM, other.to(q.dtype.element_ty), mask=inside & is_q)
    slot = tl.load(slots + batch)
    cache_row = tl.load(write_indices + batch) + in_row
    in_slot = slot * NUM_KV_HEADS + head - NUM_HEADS
    target = k_cache + ((in_slot * max_seq_len + cache_row) * (2 * HALF_DIM))[:, None] + pair
    is_k = inside & (head >= NUM_HEADS)[:, None] & is_rotated
    tl.store(target, turned.to(k_cache.dtype.element_ty), mask=is_k)
    tl.store(target + HALF_DIM, other.to(k_cache.dtype.element_ty), mask=is_k)
    in_slot -= NUM_KV_HEADS
    target = v_cache + ((in_slot * max_seq_len + cache_row) * (2 * HALF_DIM))[:, None] + pair
    is_v = inside & (head >= NUM_HEADS + NUM_KV_HEADS)[:, None]
    tl.store(target, turned.to(v_cache.dtype.element_ty), mask=is_v)
    tl.store(target + HALF_DIM, other.to(v_cache.dtype.element_ty), mask=is_v)


@triton.jit
def _multiply_silu(gate_up, out, width, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    """A part of one row."""
    wait_for_inputs(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = gate_up + row * (2 * width) + column
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(place + width, mask=inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=inside)
