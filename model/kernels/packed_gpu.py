"""A Triton kernel: products of a few rows with a packed weight.

Triton comes with the CUDA builds of torch alone, so this module is imported where it is needed.
"""

# Triton's own types don't know how a kernel is called.
# pyright: reportIndexIssue=false, reportMissingImports=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["multiply_packed_on_gpu"]

_BLOCK_ROWS = 4  # of a weight
_BLOCK_SUMS = 2048  # of a program: rows of x, rows of the weight and words of a row
_BLOCK_WORDS = 512


def multiply_packed_on_gpu(
    x: Tensor, packed: Tensor, scale: Tensor, minimum: Tensor | None
) -> Tensor:
    """Multiplies a few rows with a packed weight, summing in float32.

    Args:
        x: [M, K]; the time grows with M.
        packed: [N, K * bits / 8] uint8, contiguous.
        scale: [N, K / g], contiguous.
        minimum: [N, K / g], contiguous, or None.

    Returns:
        [M, N] in x's dtype.
    """
    num_x, width = x.shape
    words = packed.view(torch.int32)  # whose columns share a scale
    num_rows, num_words = words.shape
    out = x.new_empty(num_x, num_rows)
    block_x = triton.next_power_of_2(num_x)
    block_words = min(
        _BLOCK_SUMS // (block_x * _BLOCK_ROWS), _BLOCK_WORDS, triton.next_power_of_2(num_words)
    )
    _multiply_packed[(triton.cdiv(num_rows, _BLOCK_ROWS),)](
        x.contiguous(),
        words,
        scale,
        scale if minimum is None else minimum,
        out,
        num_x,
        num_rows,
        width,
        num_words,
        words_per_group=num_words // scale.shape[1],
        BITS=32 * num_words // width,
        HAS_MINIMUM=minimum is not None,
        BLOCK_X=block_x,
        BLOCK_ROWS=_BLOCK_ROWS,
        BLOCK_WORDS=block_words,
        num_warps=4,
    )
    return out


@triton.jit
def _multiply_packed(
    x,
    words,
    scale,
    minimum,
    out,
    num_x,
    num_rows,
    width,
    num_words,
    words_per_group,
    BITS: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """A few rows of a weight times all rows of x."""
    COLUMNS: tl.constexpr = 32 // BITS  # of a word
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    x_row = tl.arange(0, BLOCK_X)
    is_row, is_x = row < num_rows, x_row < num_x
    begin = row[:, None].to(tl.int64) * num_words
    begin_group = row[:, None].to(tl.int64) * (num_words // words_per_group)
    sums = tl.zeros((BLOCK_X, BLOCK_ROWS, BLOCK_WORDS), tl.float32)
    for start in range(0, num_words, BLOCK_WORDS):
        word = start + tl.arange(0, BLOCK_WORDS)
        is_word = word < num_words
        inside = is_row[:, None] & is_word[None, :]
        block = tl.load(
            words + begin + word[None, :], mask=inside, other=0, eviction_policy="evict_first"
        )
        group = begin_group + (word // words_per_group)[None, :]
        factor = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
        x_place = x + x_row[:, None] * width + word[None, :] * COLUMNS
        is_column = is_x[:, None] & is_word[None, :]
        products = tl.zeros((BLOCK_X, BLOCK_ROWS, BLOCK_WORDS), tl.float32)
        columns = tl.zeros((BLOCK_X, BLOCK_WORDS), tl.float32)
        for field in tl.static_range(COLUMNS):
            column = tl.load(x_place + field, mask=is_column, other=0.0).to(tl.float32)
            value = (block >> (BITS * field)) & ((1 << BITS) - 1)
            if HAS_MINIMUM:
                columns += column
            else:
                value -= 1 << (BITS - 1)
            products += value.to(tl.float32)[None, :, :] * column[:, None, :]
        sums += products * factor[None, :, :]
        if HAS_MINIMUM:
            offset = tl.load(minimum + group, mask=inside, other=0.0).to(tl.float32)
            sums += offset[None, :, :] * columns[:, None, :]
    place = out + x_row[:, None] * num_rows + row[None, :]
    total = tl.sum(sums, 2).to(out.dtype.element_ty)
    tl.store(place, total, mask=is_x[:, None] & is_row[None, :])
