"""Triton kernels: products of at most 16 rows with a weight, and the loop that they share.

Triton comes with the CUDA builds of torch alone, so this module is imported where it is needed.
"""

# Triton's own types don't know how a kernel is called.
# pyright: reportIndexIssue=false, reportMissingImports=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap_gpu import overlap, wait_for_inputs

__all__ = [
    "add_bias",
    "begin_products",
    "block_sizes",
    "multiply_on_gpu",
    "split_halves",
    "sum_products",
]

_LEAST_COLUMNS, _MOST_COLUMNS = 1024, 4096  # of a weight's row at a time, for one row of x
_TILE_ROWS = 16  # of a weight, where several rows of x make it a product of matrices
_TILE_BYTES = 1024  # of a weight's row


def multiply_on_gpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    gain: Tensor | None = None,
    eps: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiplies at most 16 rows with a weight, summing in float32 and rounding once.

    Args:
        x: [M, K], contiguous.
        weight: [N, K] in x's dtype, contiguous.
        bias: [N], added.
        residual: [M, N] in x's dtype, contiguous, added.
        gain: [K], the weight of an RMSNorm that a single row of x goes through first.
        eps: RMSNorm's.
        dtype: Of the result; None is x's.

    Returns:
        [M, N].
    """
    num_x, num_rows = len(x), len(weight)
    out = x.new_empty(num_x, num_rows, dtype=dtype)
    sizes = block_sizes(num_x, weight)
    _multiply[(triton.cdiv(num_rows, sizes["BLOCK_ROWS"]),)](
        x.contiguous(), gain, eps, weight, bias, residual, out, num_x, num_rows, **sizes
    )
    return out


def block_sizes(num_x: int, weight: Tensor) -> dict[str, Any]:
    """How many rows of a weight a program takes, and how it goes through their columns.

    Args:
        num_x: M, at most 16.
        weight: [N, K].

    Returns:
        What sum_products is called with, and what Triton takes.
    """
    width = weight.shape[1]
    columns = triton.next_power_of_2(width)
    if num_x == 1:
        # Half a row is on its way when x comes: the fastest of seventeen on an H100.
        columns = min(max(columns // 2, _LEAST_COLUMNS), _MOST_COLUMNS, columns)
        return {
            "WIDTH": width,
            "BLOCK_X": 1,
            "BLOCK_ROWS": 2,
            "BLOCK_COLUMNS": columns,
            "num_warps": 8 if columns > _LEAST_COLUMNS else 4,
            **overlap(weight.device),
        }
    return {
        "WIDTH": width,
        "BLOCK_X": 16,
        "BLOCK_ROWS": _TILE_ROWS,
        "BLOCK_COLUMNS": max(min(_TILE_BYTES // weight.itemsize, columns), 16),
        "num_warps": 2,  # of more, each would read the whole tile from shared memory
        "num_stages": 3,
        "OVERLAPS": False,  # was slower, with the rows' beginnings fetched ahead
    }


@triton.jit
def _multiply(
    x,
    gain,
    eps,
    weight,
    bias,
    residual,
    out,
    num_x,
    num_rows,
    WIDTH: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """A few rows of a weight times x, plus bias and residual."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < num_rows
    begin = weight + row.to(tl.int64) * WIDTH
    block = begin_products(begin, is_row, WIDTH, BLOCK_X, BLOCK_COLUMNS, OVERLAPS)
    x_row = tl.arange(0, BLOCK_X)
    place = x_row[None, :] * num_rows + row[:, None]
    inside = is_row[:, None] & (x_row < num_x)[None, :]
    added = tl.zeros((BLOCK_ROWS, BLOCK_X), tl.float32)
    if residual is not None:
        added += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    sums = sum_products(
        x, gain, eps, begin, block, is_row, num_x, WIDTH, BLOCK_X, BLOCK_ROWS, BLOCK_COLUMNS
    )
    sums = add_bias(sums, bias, row, is_row) + added
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def begin_products(
    begin,
    is_row,
    WIDTH: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """For one row of x asks for the first columns of rows that begin at [R] places; waits for x."""
    block = begin
    if BLOCK_X == 1:
        block = _load_rows(begin, is_row, 0, WIDTH, BLOCK_COLUMNS)
    wait_for_inputs(OVERLAPS)
    return block


@triton.jit
def sum_products(
    x,
    gain,
    eps,
    begin,
    block,
    is_row,
    num_x,
    WIDTH: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """[R, BLOCK_X] in float32: rows of a weight that begin at [R] places times x [BLOCK_X, K].

    `block` is what begin_products gave. A single row of x is normalized where there is a gain:
    RMSNorm is one number times x * gain, and the loop that reads x sums its squares, too.
    """
    tl.static_assert(gain is None or BLOCK_X == 1, "several rows of x are normalized before")
    SUM_COLUMNS: tl.constexpr = BLOCK_COLUMNS if BLOCK_X == 1 else BLOCK_X
    x_row = tl.arange(0, BLOCK_X)
    is_x = x_row < num_x
    sums = tl.zeros((BLOCK_ROWS, SUM_COLUMNS), tl.float32)
    squares = tl.zeros((1, BLOCK_COLUMNS), tl.float32)
    for start in range(0, WIDTH, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        is_column = column < WIDTH
        place = x + x_row[:, None] * WIDTH + column[None, :]
        rows = tl.load(place, mask=is_x[:, None] & is_column[None, :], other=0.0)
        if BLOCK_X == 1:
            wide = rows.to(tl.float32)
            if gain is not None:
                squares += wide * wide
                wide *= tl.load(gain + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
            sums += block.to(tl.float32) * wide
            if WIDTH > BLOCK_COLUMNS:  # the last is beyond the row and isn't read
                block = _load_rows(begin, is_row, start + BLOCK_COLUMNS, WIDTH, BLOCK_COLUMNS)
        else:
            tile = _load_rows(begin, is_row, start, WIDTH, BLOCK_COLUMNS)
            sums = tl.dot(tile, tl.trans(rows), sums, input_precision="ieee")
    if BLOCK_X == 1:
        sums = tl.sum(sums, 1)[:, None]
        if gain is not None:
            sums *= tl.rsqrt(tl.sum(squares, 1) / WIDTH + eps)[None, :]
    return sums


@triton.jit
def split_halves(sums, BLOCK_ROWS: tl.constexpr, BLOCK_X: tl.constexpr):
    """The first and the second half of rows [R, BLOCK_X]."""
    halves = tl.reshape(sums, (2, BLOCK_ROWS // 2, BLOCK_X))
    return tl.split(tl.permute(halves, (1, 2, 0)))


@triton.jit
def _load_rows(begin, is_row, start, WIDTH: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """[R, BLOCK_COLUMNS] of a weight's rows, which are read once."""
    column = start + tl.arange(0, BLOCK_COLUMNS)
    inside = is_row[:, None] & (column < WIDTH)[None, :]
    place = begin[:, None] + column[None, :]
    return tl.load(place, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def add_bias(sums, bias, row, is_row):
    """Adds bias [N], if there is one, to sums [R, BLOCK_X] of some rows."""
    if bias is not None:
        sums += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
    return sums
