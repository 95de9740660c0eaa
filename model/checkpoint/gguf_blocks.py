"""GGUF's blocks of quantized weights, rearranged into packed weights without loss.

A block holds 32 or 256 weights of a row: scales, then the weights' low bits, two to a byte, then
the high ones, in an order made for one machine. Here each becomes up to three tensors (see
PackedFormat): `weight_packed`, `weight_scale` and `weight_minimum`.

Source: the comments on the block types in ggml-common.h of github.com/ggml-org/ggml, and that
    repository's `gguf` package, whose results these are equal to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from ..packed import PackedFormat
from .gguf_file import BLOCKS

__all__ = ["BLOCK_FORMATS", "BlockFormat"]

# What a nibble of IQ4_NL and IQ4_XS stands for, 128 being zero.
_LEVELS = (
    torch.tensor(
        [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113],
        dtype=torch.int16,
    )
    .add(128)
    .to(torch.uint8)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFormat:
    """How blocks of one type are packed.

    Attributes:
        packed: The form that they become.
        parts: From raw rows, uint8 [n, bytes of a row], to the rows of each part, by its name.
    """

    packed: PackedFormat
    parts: Mapping[str, Callable[[Tensor], Tensor]]


def _q8_0(blocks: Tensor) -> Tensor:
    """Float16 scale, 32 signed bytes."""
    return blocks[..., 2:] ^ 0x80


def _q4_0(blocks: Tensor) -> Tensor:
    """Float16 scale, 16 bytes of nibbles."""
    return _halves(blocks[..., 2:])


def _q4_1(blocks: Tensor) -> Tensor:
    """Float16 scale and minimum, 16 bytes of nibbles."""
    return _halves(blocks[..., 4:])


def _q5_0(blocks: Tensor) -> Tensor:
    """Float16 scale, 32 fifth bits, 16 bytes of nibbles; 16 is zero."""
    return (_halves(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6])) + (128 - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    """Float16 scale and minimum, 32 fifth bits, 16 bytes of nibbles."""
    return _halves(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])


def _q4_k(blocks: Tensor) -> Tensor:
    """Two float16, 12 bytes of scales and minima, 128 bytes: four times 32 of nibbles."""
    return _halves(blocks[..., 16:].unflatten(-1, (4, 32)))


def _q5_k(blocks: Tensor) -> Tensor:
    """As Q4_K, with 32 bytes of fifth bits, a bit each for the eight groups, before the nibbles."""
    low = _halves(blocks[..., 48:].unflatten(-1, (4, 32)))
    high = _bits(blocks[..., None, 16:48], range(8), 1, -2)  # [n, blocks, 8, 32]
    return low | high.flatten(-2) << 4


def _q6_k(blocks: Tensor) -> Tensor:
    """128 bytes of nibbles, 64 of high bits, 16 signed scales, a float16; 32 is zero.

    Of each half of the block, 64 bytes of nibbles are two groups of 32 low and two high ones, and
    32 bytes have two bits for each of the four.
    """
    low = _halves(blocks[..., :128].unflatten(-1, (2, 64)))
    high = _bits(blocks[..., 128:192].unflatten(-1, (2, 1, 32)), range(0, 8, 2), 3, -2)
    return (low | high.flatten(-3) << 4) + (128 - 32)


def _q2_k(blocks: Tensor) -> Tensor:
    """16 bytes of scales and minima, 64 bytes of pairs of bits, two float16."""
    return _pairs(blocks[..., 16:80])


def _q3_k(blocks: Tensor) -> Tensor:
    """32 bytes of third bits, 64 of pairs of bits, 12 of scales, a float16; 4 is zero."""
    high = _bits(blocks[..., None, :32], range(8), 1, -2).flatten(-2)
    return (_pairs(blocks[..., 32:96]) | high << 2) + (8 - 4)


def _iq4_nl(blocks: Tensor) -> Tensor:
    """As Q4_0, of values from a table."""
    return _levels(_q4_0(blocks))


def _iq4_xs(blocks: Tensor) -> Tensor:
    """A float16, 6 bytes of scales, eight times 16 bytes of nibbles; values from a table."""
    return _levels(_halves(blocks[..., 8:].unflatten(-1, (8, 16))))


def _levels(nibbles: Tensor) -> Tensor:
    return _LEVELS.index_select(0, nibbles.flatten().int()).view_as(nibbles)


def _pairs(packed: Tensor) -> Tensor:
    """Two times 32 bytes, each of them a weight of four groups of 32."""
    return _bits(packed.unflatten(-1, (2, 1, 32)), range(0, 8, 2), 3, -2).flatten(-3)


def _halves(nibbles: Tensor) -> Tensor:
    """The low nibbles of [..., groups, bytes], then its high ones, group after group."""
    both = torch.stack((nibbles & 0xF, nibbles >> 4), -2)
    return both.flatten(2)


def _fifth_bits(four: Tensor) -> Tensor:
    """A little-endian word's bits, from the lowest on, each in the place of a fifth bit."""
    return _bits(four[..., None], range(8), 1, -1).flatten(-2) << 4


def _bits(packed: Tensor, shifts: range, mask: int, dim: int) -> Tensor:
    """Repeats along a dimension of size 1, shifted ever further."""
    shape = [1] * packed.ndim
    shape[dim] = len(shifts)
    return packed >> torch.tensor(shifts, dtype=torch.uint8).view(shape) & mask


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte of each block: [n, blocks]."""
    two = blocks[..., at : at + 2].clone(memory_format=torch.contiguous_format)
    return two.view(torch.float16).squeeze(-1)


def _q6_k_scale(blocks: Tensor) -> Tensor:
    small = blocks[..., 192:208].contiguous().view(torch.int8)
    return (_half(blocks, 208).float()[..., None] * small).flatten(1)


def _k_scale(blocks: Tensor) -> Tensor:
    return (_half(blocks, 0).float()[..., None] * _six_bits(blocks)[0]).flatten(1)


def _k_minimum(blocks: Tensor) -> Tensor:
    return -(_half(blocks, 2).float()[..., None] * _six_bits(blocks)[1]).flatten(1)


def _q2_k_scale(blocks: Tensor) -> Tensor:
    return (_half(blocks, 80).float()[..., None] * (blocks[..., :16] & 0xF)).flatten(1)


def _q2_k_minimum(blocks: Tensor) -> Tensor:
    return -(_half(blocks, 82).float()[..., None] * (blocks[..., :16] >> 4)).flatten(1)


def _q3_k_scale(blocks: Tensor) -> Tensor:
    """Eight bytes have the low nibbles of 16 scales, four the upper two bits of four each."""
    low = torch.cat((blocks[..., 96:104] & 0xF, blocks[..., 96:104] >> 4), -1)
    high = _bits(blocks[..., None, 104:108], range(0, 8, 2), 3, -2).flatten(-2)
    return (_half(blocks, 108).float()[..., None] * ((low | high << 4).float() - 32)).flatten(1)


def _iq4_xs_scale(blocks: Tensor) -> Tensor:
    """Two bytes have the upper two bits of eight scales, four their low nibbles."""
    low = torch.stack((blocks[..., 4:8] & 0xF, blocks[..., 4:8] >> 4), -1).flatten(-2)
    high = _bits(blocks[..., 2:4, None], range(0, 8, 2), 3, -1).flatten(-2)
    return (_half(blocks, 0).float()[..., None] * ((low | high << 4).float() - 32)).flatten(1)


def _six_bits(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The eight scales and the eight minima of Q4_K and Q5_K, uint8 [n, blocks, 8] each.

    Four bytes have the first four scales, four the first four minima, and four the low nibbles of
    the other scales and minima, whose upper two bits are above the first ones'.
    """
    first, second, third = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat((first & 63, third & 0xF | first >> 6 << 4), -1)
    minima = torch.cat((second & 63, third >> 4 | second >> 6 << 4), -1)
    return scales, minima


def _format(
    kind: str,
    bits: int,
    values: Callable[[Tensor], Tensor],
    scale: Callable[[Tensor], Tensor],
    minimum: Callable[[Tensor], Tensor] | None = None,
    *,
    group_size: int = 32,
    scale_dtype: str = "float32",
    stretch: int = 1,
) -> BlockFormat:
    """How a type is packed.

    Values of fewer bits are stretched, and their scales shrunk, by a power of two, which is exact:
    a kernel that quantizes activations subtracts 2^(bits-1), and values far from that on one side
    would multiply its error.
    """

    def of_rows(compute: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda rows: compute(rows.unflatten(1, (-1, BLOCKS[kind][1])))

    def pack(blocks: Tensor) -> Tensor:
        unsigned = values(blocks).flatten(1) * stretch
        return unsigned if bits == 8 else unsigned[:, 0::2] | unsigned[:, 1::2] << 4

    def shrink(blocks: Tensor) -> Tensor:
        return scale(blocks).to(getattr(torch, scale_dtype)) / stretch

    parts = {"weight_packed": of_rows(pack), "weight_scale": of_rows(shrink)}
    if minimum is not None:
        parts["weight_minimum"] = of_rows(lambda b: minimum(b).to(getattr(torch, scale_dtype)))
    packed = PackedFormat(
        bits=bits,
        group_size=group_size,
        scale_dtype=scale_dtype,
        minimum_dtype=None if minimum is None else scale_dtype,
    )
    return BlockFormat(packed=packed, parts=MappingProxyType(parts))


def _first_half(blocks: Tensor) -> Tensor:
    return _half(blocks, 0)


def _second_half(blocks: Tensor) -> Tensor:
    return _half(blocks, 2)


BLOCK_FORMATS = MappingProxyType(
    {
        "Q8_0": _format("Q8_0", 8, _q8_0, _first_half, scale_dtype="float16"),
        "Q4_0": _format("Q4_0", 4, _q4_0, _first_half, scale_dtype="float16"),
        "Q4_1": _format("Q4_1", 4, _q4_1, _first_half, _second_half, scale_dtype="float16"),
        "Q5_0": _format("Q5_0", 8, _q5_0, _first_half, scale_dtype="float16"),
        "Q5_1": _format("Q5_1", 8, _q5_1, _first_half, _second_half, stretch=8),
        "Q4_K": _format("Q4_K", 4, _q4_k, _k_scale, _k_minimum),
        "Q5_K": _format("Q5_K", 8, _q5_k, _k_scale, _k_minimum, stretch=8),
        "Q6_K": _format("Q6_K", 8, _q6_k, _q6_k_scale, group_size=16),
        "Q2_K": _format("Q2_K", 4, _q2_k, _q2_k_scale, _q2_k_minimum, group_size=16, stretch=4),
        "Q3_K": _format("Q3_K", 4, _q3_k, _q3_k_scale, group_size=16),
        "IQ4_NL": _format("IQ4_NL", 8, _iq4_nl, _first_half, scale_dtype="float16"),
        "IQ4_XS": _format("IQ4_XS", 8, _iq4_xs, _iq4_xs_scale),
    }
)
