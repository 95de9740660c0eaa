"""A Triton kernel: attention over the live rows of the cache.

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

from .overlap_gpu import overlap, wait_for_inputs

__all__ = ["attend_on_gpu"]

_BLOCK_BYTES = 16 << 10  # of keys at a time, and of values: they wait in shared memory
_MAX_QUERIES = 64  # of one program
_FEWEST_SPLITS = 4  # what fewer gain, merging them costs
_MERGED_NUMBERS = 1 << 13  # of splits at a time


def attend_on_gpu(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    counters: Tensor | None = None,
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
        counters: int32 zeros, which are zeros again afterwards; never None. Where there are fewer
            than blocks of queries, the rows are not split.

    Returns:
        [B, T, H, D] in q's dtype, contiguous.

    Source: arXiv 2205.14135 (the running softmax), its form for one query by splits of the keys.
    """
    assert counters is not None
    batch_size, num_heads, num_tokens, head_dim = q.shape
    num_kv_heads, max_seq_len = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    out = q.new_empty(batch_size, num_tokens, num_heads, head_dim)
    # The heads that share a key are queries of one program: each key is read once.
    block_queries = min(max(triton.next_power_of_2(group * num_tokens), 16), _MAX_QUERIES)
    blocks = triton.cdiv(group * num_tokens, block_queries)
    block_dim = max(triton.next_power_of_2(head_dim), 16)
    block_rows = max(min(_BLOCK_BYTES // (block_dim * q.itemsize), 64), 16)
    num_programs = blocks * batch_size * num_kv_heads  # of a split
    splits = min(_num_processors(q.device) // num_programs, triton.cdiv(max_seq_len, block_rows))
    if splits < _FEWEST_SPLITS or num_programs > len(counters):
        splits = 1
    num_partial = splits if splits > 1 else 0
    partial = q.new_empty(*out.shape[:3], num_partial, head_dim, dtype=torch.float32)
    weights = q.new_empty(*out.shape[:3], num_partial, dtype=torch.float32)
    block_splits = triton.next_power_of_2(splits)
    merged = triton.next_power_of_2(min(group * num_tokens, block_queries))
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
        counters,
        out,
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
        BLOCK_SPLITS=block_splits,
        BLOCK_MERGED=max(min(_MERGED_NUMBERS // (block_splits * block_dim), merged), 1),
        IS_SCALED=k_scale is not None,
        num_stages=2,
        **overlap(q.device),
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
    counters,
    out,
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
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_MERGED: tl.constexpr,
    IS_SCALED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One split of the live rows, for a block of the queries that share a key/value head.

    Of several it writes their sums over values, already divided by the softmax's denominator, and
    the logarithm of that denominator; whichever split ends last merges them all.
    """
    wait_for_inputs(OVERLAPS)
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
    num_live = tl.cdiv(live, rows_per_split)  # splits that have rows
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
    item = (batch * NUM_TOKENS + token) * (NUM_KV_HEADS * GROUP) + head
    inside = is_query[:, None] & is_dim[None, :]
    if num_live == 1:
        if split == 0:
            target = out + item[:, None] * HEAD_DIM + dim[None, :]
            tl.store(target, sums.to(out.dtype.element_ty), mask=inside)
    elif split < num_live:
        weight = tl.where(seen, largest + tl.log(denominator), float("-inf"))
        part = item * num_splits + split
        tl.store(weights + part, weight, mask=is_query)
        tl.store(partial + part[:, None] * HEAD_DIM + dim[None, :], sums, mask=inside)
        tl.debug_barrier()  # all of this program's, before its count
        counter = counters + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel") == num_live - 1:
            tl.store(counter, 0)
            _merge_splits(
                partial,
                weights,
                out,
                batch,
                kv_head,
                num_live,
                num_splits,
                NUM_KV_HEADS,
                GROUP,
                NUM_TOKENS,
                HEAD_DIM,
                BLOCK_DIM,
                BLOCK_QUERIES,
                BLOCK_SPLITS,
                BLOCK_MERGED,
            )


@triton.jit
def _merge_splits(
    partial,
    weights,
    out,
    batch,
    kv_head,
    num_live,
    num_splits,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_MERGED: tl.constexpr,
):
    """The mean of a block of queries' splits, weighted by their denominators."""
    split, dim = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_DIM)
    begin = tl.program_id(0) * BLOCK_QUERIES
    end = tl.minimum(begin + BLOCK_QUERIES, GROUP * NUM_TOKENS)
    for start in range(begin, end, BLOCK_MERGED):
        query = start + tl.arange(0, BLOCK_MERGED)
        head, token = kv_head * GROUP + query // NUM_TOKENS, query % NUM_TOKENS
        item = (batch * NUM_TOKENS + token) * (NUM_KV_HEADS * GROUP) + head
        part = item[:, None] * num_splits + split[None, :]
        is_query, is_dim = query < end, dim < HEAD_DIM
        inside = is_query[:, None] & (split < num_live)[None, :]
        # Other processors wrote these: not from this one's own cache.
        weight = tl.load(weights + part, mask=inside, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(
            partial + part[:, :, None] * HEAD_DIM + dim[None, None, :],
            mask=inside[:, :, None] & is_dim[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        largest = tl.where(is_query, tl.max(weight, 1), 0.0)
        weight = tl.exp(weight - largest[:, None])
        total = tl.where(is_query, tl.sum(weight, 1), 1.0)
        mean = tl.sum(sums * weight[:, :, None], 1) / total[:, None]
        target = out + item[:, None] * HEAD_DIM + dim[None, :]
        inside_out = is_query[:, None] & is_dim[None, :]
        tl.store(target, mean.to(out.dtype.element_ty), mask=inside_out)


def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
