"""Unsigned values of 4 and 8 bits in the integers that they are stored in, and back."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack_columns", "reorder_columns", "unpack_columns", "unpack_rows"]


def unpack_columns(stored: Tensor, bits: int) -> Tensor:
    """Takes apart integers that each hold values of neighbouring columns, low bits first.

    Args:
        stored: [N, C] uint8 or int32.
        bits: 4 or 8.

    Returns:
        [N, C * item bits / bits] uint8.
    """
    raw = stored.contiguous().view(torch.uint8)
    if bits == 8:
        return raw
    return torch.stack((raw & 15, raw >> 4), dim=-1).flatten(-2)


def unpack_rows(stored: Tensor, bits: int) -> Tensor:
    """Takes apart integers that each hold values of neighbouring rows, low bits first.

    Args:
        stored: [R, N] int32.
        bits: 4 or 8.

    Returns:
        [N, R * 32 / bits] uint8: the values' transpose.
    """
    return unpack_columns(stored.t(), bits)


def pack_columns(values: Tensor, bits: int) -> Tensor:
    """Packs a weight as PackedFormat has it.

    Args:
        values: [N, K] uint8 below 2^bits, K even.
        bits: 4 or 8.

    Returns:
        [N, K * bits / 8] uint8, the even column in the low bits.
    """
    if bits == 8:
        return values.contiguous()
    return values[:, 0::2] | values[:, 1::2] << 4


def reorder_columns(packed: Tensor, bits: int, order: Tensor) -> Tensor:
    """Moves columns of a packed weight.

    Args:
        packed: [N, K * bits / 8] uint8.
        bits: 4 or 8.
        order: [K] int32, the column that each place gets.

    Returns:
        The packed weight of the same size.
    """
    return pack_columns(unpack_columns(packed, bits)[:, order.long()], bits)
