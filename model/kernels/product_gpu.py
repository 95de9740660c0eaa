"""A Triton kernel: products of at most 16 rows with a weight, and the loop that all products share.

Triton comes with the CUDA builds of torch alone, so this module is imported where it is needed.
"""

# Triton's own types don't know how a kernel is called.
# pyright: reportIndexIssue=false, reportMissingImports=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["TILE_ROWS", "add_bias", "block_sizes", "multiply_on_gpu", "sum_products"]

_ONE_ROW_COLUMNS = 2048  # of a weight at a time, two rows of it; the fastest of eleven on an H100
TILE_ROWS = 16  # of a weight, where several rows of x make it a product of matrices
_TILE_BYTES = 512  # of a weight's row


def multiply_on_gpu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Multiplies at most 16 rows with a weight, summing in float32 and rounding once.

    Args:
        x: [M, K], contiguous.
        weight: [N, K] in x's dtype, contiguous.
        bias: [N], added.
        residual: [M, N] in x's dtype, contiguous, added.

    Returns:
        [M, N] in x's dtype.
    """
    num_x, (num_rows, width) = len(x), weight.shape
    out = x.new_empty(num_x, num_rows)
    block_rows = 2 if num_x == 1 else TILE_ROWS
    _multiply[(triton.cdiv(num_rows, block_rows),)](
        x.contiguous(),
        weight,
        bias,
        residual,
        out,
        num_x,
        num_rows,
        width,
        BLOCK_ROWS=block_rows,
        **block_sizes(num_x, weight),
    )
    return out


def block_sizes(num_x: int, weight: Tensor, *, num_weights: int = 1) -> dict[str, int]:
    """How a program goes through the columns of its rows.

    Args:
        num_x: M, at most 16.
        weight: [N, K].
        num_weights: How many weights it reads rows of at once.

    Returns:
        What sum_products is called with, and what Triton takes.
    """
    columns = triton.next_power_of_2(weight.shape[1])
    if num_x == 1:
        return {"BLOCK_X": 1, "BLOCK_COLUMNS": min(_ONE_ROW_COLUMNS, columns), "num_warps": 8}
    tile = _TILE_BYTES // (weight.itemsize * num_weights)
    return {
        "BLOCK_X": 16,
        "BLOCK_COLUMNS": max(min(tile, columns), 16),
        "num_warps": 2,  # of more, each would read the whole tile from shared memory
        "num_stages": 2 + 2 * num_weights,  # as many bytes on their way whatever their number
    }


@triton.jit
def _multiply(
    x,
    weight,
    bias,
    residual,
    out,
    num_x,
    num_rows,
    width,
    BLOCK_X: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """A few rows of a weight times x, plus bias and residual."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < num_rows
    first = weight + row.to(tl.int64) * width
    sums, _ = sum_products(
        x, None, 0.0, first, None, is_row, num_x, width, BLOCK_X, BLOCK_ROWS, BLOCK_COLUMNS
    )
    sums = add_bias(sums, bias, row, is_row)
    x_row = tl.arange(0, BLOCK_X)
    place = x_row[None, :] * num_rows + row[:, None]
    inside = is_row[:, None] & (x_row < num_x)[None, :]
    if residual is not None:
        sums += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def sum_products(
    x,
    gain,
    eps,
    first,
    second,
    is_row,
    num_x,
    width,
    BLOCK_X: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """x, normalized where there is a gain, times a few rows of one weight or two.

    `first` and `second` are [R], where the rows begin; `second` may be None. Returns two
    [R, BLOCK_X] in float32.

    RMSNorm is one number for each row of x, times x * gain: the loop that reads x for the product
    sums its squares, too. float16 can't hold x * gain of every x, so that a product of matrices in
    it needs that number before.
    """
    NORM_FIRST: tl.constexpr = BLOCK_X > 1 and x.dtype.element_ty == tl.float16
    x_row = tl.arange(0, BLOCK_X)
    is_x = x_row < num_x
    norm = tl.full((BLOCK_X,), 1.0, tl.float32)
    if gain is not None and NORM_FIRST:
        norm = _inverse_rms(x, eps, num_x, width, BLOCK_X, BLOCK_COLUMNS)
    SUM_COLUMNS: tl.constexpr = BLOCK_COLUMNS if BLOCK_X == 1 else BLOCK_X
    sums = tl.zeros((BLOCK_ROWS, SUM_COLUMNS), tl.float32)
    more = tl.zeros((BLOCK_ROWS, SUM_COLUMNS), tl.float32)
    squares = tl.zeros((BLOCK_X, BLOCK_COLUMNS), tl.float32)
    for start in range(0, width, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        is_column = column < width
        inside = is_row[:, None] & is_column[None, :]
        place = x + x_row[:, None] * width + column[None, :]
        rows = tl.load(place, mask=is_x[:, None] & is_column[None, :], other=0.0)
        if gain is not None:
            rows = rows.to(tl.float32)
            if NORM_FIRST:
                rows *= norm[:, None]
            else:
                squares += rows * rows
            rows *= tl.load(gain + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        block = tl.load(
            first[:, None] + column[None, :], mask=inside, other=0.0, eviction_policy="evict_first"
        )
        sums = _add_product(sums, block, rows, BLOCK_X)
        if second is not None:
            block = tl.load(
                second[:, None] + column[None, :],
                mask=inside,
                other=0.0,
                eviction_policy="evict_first",
            )
            more = _add_product(more, block, rows, BLOCK_X)
    if BLOCK_X == 1:
        sums, more = tl.sum(sums, 1)[:, None], tl.sum(more, 1)[:, None]
    if gain is not None and not NORM_FIRST:
        norm = tl.rsqrt(tl.sum(squares, 1) / width + eps)
        sums, more = sums * norm[None, :], more * norm[None, :]
    return sums, more


@triton.jit
def _add_product(sums, block, rows, BLOCK_X: tl.constexpr):
    """Adds block [R, C] times rows [BLOCK_X, C]; one row's sums stay [R, C] until the end."""
    if BLOCK_X == 1:
        sums += block.to(tl.float32) * rows.to(tl.float32)
    else:
        sums = tl.dot(block, tl.trans(rows.to(block.dtype)), sums, input_precision="ieee")
    return sums


@triton.jit
def _inverse_rms(x, eps, num_x, width, BLOCK_X: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """[BLOCK_X] what RMSNorm multiplies each row of x with."""
    x_row = tl.arange(0, BLOCK_X)
    squares = tl.zeros((BLOCK_X, BLOCK_COLUMNS), tl.float32)
    for start in range(0, width, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        inside = (x_row < num_x)[:, None] & (column < width)[None, :]
        place = x + x_row[:, None] * width + column[None, :]
        rows = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        squares += rows * rows
    return tl.rsqrt(tl.sum(squares, 1) / width + eps)


@triton.jit
def add_bias(sums, bias, row, is_row):
    """Adds bias [N], if there is one, to sums [R, BLOCK_X] of some rows."""
    if bias is not None:
        sums += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
    return sums
