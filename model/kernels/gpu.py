"""Triton kernels: attention over the live rows of the cache, and the product of one row.

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

__all__ = ["attend_on_gpu", "multiply_one_on_gpu"]

_BLOCK_BYTES = 16 << 10  # of keys at a time, and of values: they wait in shared memory
_MAX_QUERIES = 64  # of one program
_FEWEST_SPLITS = 4  # what fewer gain, merging them costs
_PRODUCT_ROWS, _PRODUCT_COLUMNS = 2, 2048  # of a weight at a time; the fastest of eleven on an H100


def attend_on_gpu(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Runs causal attention, each slot's live rows cut into splits that run side by side.

    How many rows live, and in which slot, is read on the GPU, so that a captured graph follows it.

    Args:
        q: [B, H, T, D].
        k_cache: [slots, K, S, D], contiguous.
        v_cache: [slots, K, S, D], contiguous.
        positions: [B] int64, of each row's first token; its rows are written already.
        slots: [B] int64, the cache slot of each row.
        scale: Of the products of queries and keys.
        k_scale: [slots, K, S] float32, of int8 caches; else None.
        v_scale: The same of the values.

    Returns:
        [B, T, H, D] in q's dtype, contiguous.

    Source: arXiv 2205.14135 (the running softmax), its form for one query by splits of the keys.
    """
    batch_size, num_heads, num_tokens, head_dim = q.shape
    num_kv_heads, max_seq_len = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    out = q.new_empty(batch_size, num_tokens, num_heads, head_dim)
    # The heads that share a key are queries of one program: each key is read once.
    block_queries = min(max(triton.next_power_of_2(group * num_tokens), 16), _MAX_QUERIES)
    blocks = triton.cdiv(group * num_tokens, block_queries)
    block_dim = max(triton.next_power_of_2(head_dim), 16)
    block_rows = max(min(_BLOCK_BYTES // (block_dim * q.itemsize), 64), 16)
    splits = _num_processors(q.device) // (blocks * batch_size * num_kv_heads)
    splits = min(splits, triton.cdiv(max_seq_len, block_rows))
    if splits < _FEWEST_SPLITS:
        splits, partial = 1, out
    else:
        partial = q.new_empty(*out.shape[:3], splits, head_dim, dtype=torch.float32)
    weights = q.new_empty(*out.shape[:3], splits, dtype=torch.float32)
    _attend_split[(blocks, splits, batch_size * num_kv_heads)](
        q,
        k_cache,
        v_cache,
        k_scale,
        v_scale,
        positions,
        slots,
        partial,
        weights,
        *q.stride(),
        max_seq_len,
        scale,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        NUM_TOKENS=num_tokens,
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        BLOCK_QUERIES=block_queries,
        BLOCK_ROWS=block_rows,
        IS_SCALED=k_scale is not None,
        num_stages=2,
    )
    if splits == 1:
        return out
    _merge_splits[(batch_size * num_tokens * num_heads,)](
        partial,
        weights,
        out,
        SPLITS=splits,
        BLOCK_SPLITS=triton.next_power_of_2(splits),
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
    )
    return out


def multiply_one_on_gpu(x: Tensor, weight: Tensor) -> Tensor:
    """Multiplies one row with a weight, summing in float32.

    Args:
        x: [1, K], contiguous.
        weight: [N, K] in x's dtype, contiguous.

    Returns:
        [1, N] in x's dtype.
    """
    num_rows, width = weight.shape
    out = x.new_empty(1, num_rows)
    _multiply_one[(triton.cdiv(num_rows, _PRODUCT_ROWS),)](
        x.contiguous(),
        weight,
        out,
        num_rows,
        width,
        BLOCK_ROWS=_PRODUCT_ROWS,
        BLOCK_COLUMNS=min(_PRODUCT_COLUMNS, triton.next_power_of_2(width)),
        num_warps=8,
    )
    return out


@triton.jit
def _attend_split(
    q,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    positions,
    slots,
    partial,
    weights,
    stride_batch,
    stride_head,
    stride_token,
    stride_dim,
    max_seq_len,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    IS_SCALED: tl.constexpr,
):
    """One split of the live rows, for a block of the queries that share a key/value head.

    Writes their sums over values, already divided by the softmax's denominator, and the logarithm
    of that denominator.
    """
    split, num_splits = tl.program_id(1), tl.num_programs(1)
    batch = (tl.program_id(2) // NUM_KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(2) % NUM_KV_HEADS
    query = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    head, token = kv_head * GROUP + query // NUM_TOKENS, query % NUM_TOKENS
    dim = tl.arange(0, BLOCK_DIM)
    is_query, is_dim = query < GROUP * NUM_TOKENS, dim < HEAD_DIM
    place = batch * stride_batch + head * stride_head + token * stride_token
    queries = tl.load(
        q + place[:, None] + dim[None, :] * stride_dim,
        mask=is_query[:, None] & is_dim[None, :],
        other=0.0,
    )

    position = tl.load(positions + batch)
    live = tl.minimum(position + NUM_TOKENS, max_seq_len).to(tl.int32)
    rows_per_split = tl.cdiv(tl.cdiv(live, num_splits), BLOCK_ROWS) * BLOCK_ROWS
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, live)
    slot = tl.load(slots + batch)
    first = (slot * NUM_KV_HEADS + kv_head) * max_seq_len
    largest = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    denominator = tl.zeros((BLOCK_QUERIES,), tl.float32)
    sums = tl.zeros((BLOCK_QUERIES, BLOCK_DIM), tl.float32)
    for start in range(begin, end, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        is_row = row < end
        offsets = (first + row[:, None]) * HEAD_DIM + dim[None, :]
        inside = is_row[:, None] & is_dim[None, :]
        keys = tl.load(k_cache + offsets, mask=inside, other=0)
        values = tl.load(v_cache + offsets, mask=inside, other=0)
        if IS_SCALED:
            keys, values = keys.to(queries.dtype), values.to(queries.dtype)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        if IS_SCALED:
            scores *= tl.load(k_scale + first + row, mask=is_row, other=0.0)[None, :]
        is_seen = is_row[None, :] & (row[None, :] <= position + token[:, None])
        scores = tl.where(is_seen, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        # A split may hold nothing that a query sees: -inf minus -inf would be NaN.
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        shrink = tl.exp(largest - base)
        probabilities = tl.exp(scores - base[:, None])
        denominator = denominator * shrink + tl.sum(probabilities, 1)
        if IS_SCALED:
            probabilities *= tl.load(v_scale + first + row, mask=is_row, other=0.0)[None, :]
        product = tl.dot(probabilities.to(values.dtype), values, input_precision="ieee")
        sums = sums * shrink[:, None] + product
        largest = new_largest

    seen = denominator > 0
    sums = sums / tl.where(seen, denominator, 1.0)[:, None]
    weight = tl.where(seen, largest + tl.log(denominator), float("-inf"))
    item = (batch * NUM_TOKENS + token) * (NUM_KV_HEADS * GROUP) + head
    item = item * num_splits + split
    tl.store(weights + item, weight, mask=is_query)
    target = partial + item[:, None] * HEAD_DIM + dim[None, :]
    tl.store(target, sums.to(partial.dtype.element_ty), mask=is_query[:, None] & is_dim[None, :])


@triton.jit
def _merge_splits(
    partial,
    weights,
    out,
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """The mean of one query's splits, weighted by their denominators."""
    item = tl.program_id(0).to(tl.int64)
    split, dim = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_DIM)
    is_split, is_dim = split < SPLITS, dim < HEAD_DIM
    weight = tl.load(weights + item * SPLITS + split, mask=is_split, other=float("-inf"))
    weight = tl.exp(weight - tl.max(weight, 0))
    place = partial + (item * SPLITS + split[:, None]) * HEAD_DIM + dim[None, :]
    sums = tl.load(place, mask=is_split[:, None] & is_dim[None, :], other=0.0)
    mean = tl.sum(sums * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + item * HEAD_DIM + dim, mean.to(out.dtype.element_ty), mask=is_dim)


@triton.jit
def _multiply_one(
    x,
    weight,
    out,
    num_rows,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """A few rows of a weight times x."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < num_rows
    begin = row[:, None].to(tl.int64) * width
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, width, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        is_column = column < width
        inside = is_row[:, None] & is_column[None, :]
        block = tl.load(
            weight + begin + column[None, :], mask=inside, other=0.0, eviction_policy="evict_first"
        )
        factor = tl.load(x + column, mask=is_column, other=0.0)
        sums += block.to(tl.float32) * factor.to(tl.float32)[None, :]
    tl.store(out + row, tl.sum(sums, 1).to(out.dtype.element_ty), mask=is_row)


def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
