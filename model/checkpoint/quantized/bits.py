"""Unsigned values of 4 and 8 bits in the integers that they are stored in, and back."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack_columns", "pack_rows", "reorder_columns", "unpack_columns", "unpack_rows"]


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
        [R * 32 / bits, N] uint8.
    """
    raw = stored.contiguous().view(torch.uint8).unflatten(1, (-1, 4))
    parts = [raw[..., i] for i in range(4)]
    if bits == 4:
        parts = [half for part in parts for half in (part & 15, part >> 4)]
    return torch.stack(parts, dim=1).flatten(0, 1)


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


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """Packs a weight's transpose as PackedFormat has the weight.

    Args:
        values: [K, N] uint8 below 2^bits, K even.
        bits: 4 or 8.

    Returns:
        [N, K * bits / 8] uint8.
    """
    if bits == 4:
        values = values[0::2] | values[1::2] << 4
    return values.t().contiguous()
