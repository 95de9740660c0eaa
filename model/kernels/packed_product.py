"""Products with weights of 4 or 8 bits, packed as they lie in their file.

A packed weight of N rows and K columns is

- packed: [N, K * bits / 8] uint8, the unsigned values u; of 4 bits, the low half of byte i is
  column 2 i and the high half column 2 i + 1 (compressed-tensors' pack-quantized, the B of ONNX
  Runtime's MatMulNBits);
- scale: [N, K / g] float16, bfloat16 or float32, one for every g columns of a row;
- minimum, which it may lack: like scale.

Its values are (u - 2**(bits - 1)) * scale, or u * scale + minimum where it has a minimum.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear import STORAGE_DTYPES
from .cpp_library import load_library
from .few_rows import MAX_ROWS, SOURCES, load_operators
from .many_rows import CPP_TYPES, DTYPES_IN_CPP, call_product, multiply_many

__all__ = ["cpp_library", "dequantize", "multiply_in_cpp", "multiply_packed"]

_GROUPS = (16, 32, 64, 128)
_BLOCK_BYTES = 4 << 20  # of a weight at a time, so that they stay within a CPU's cache
_GPU_BLOCK_ELEMENTS = 1 << 24  # enough to keep a GPU busy

_Weight = tuple[Tensor, Tensor, Tensor | None]  # packed, scale, minimum

_library = torch.library.Library("llamac", "FRAGMENT")
# Not a custom_op, whose first call imports Dynamo.
_library.define(
    "multiply_packed(Tensor x, Tensor[] packed, Tensor[] scales, Tensor[] minima) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def multiply_packed(
    x: Tensor, packed: list[Tensor], scales: list[Tensor], minima: list[Tensor]
) -> list[Tensor]:
    """Multiplies x with each of several packed weights: x @ weight.T.

    Args:
        x: [M, K] float32, float16 or bfloat16.
        packed: Of each weight [N, K * bits / 8] uint8, contiguous; N and bits may differ.
        scales: Of each weight [N, K / g], contiguous; g and the dtype may differ.
        minima: Empty, or of each weight [N, K / g] or a tensor of no elements for none.

    Returns:
        For each weight [M, N] in x's dtype, summed in float32.
    """
    return torch.ops.llamac.multiply_packed(x, packed, scales, minima)


def dequantize(
    packed: Tensor, scale: Tensor, minimum: Tensor | None, dtype: torch.dtype, *, width: int
) -> Tensor:
    """Unpacks a weight, on any device.

    Args:
        packed: [N, K * bits / 8] uint8.
        scale: [N, K / g].
        minimum: [N, K / g], or None.
        dtype: Of the result, which is rounded once, from float32.
        width: K, which tells 4 bits from 8.

    Returns:
        [N, K].
    """
    bits = 8 * packed.shape[1] // width
    values = packed
    if bits == 4:
        values = torch.stack((packed & 15, packed >> 4), dim=-1)
    groups = values.view(*scale.shape, -1).float()  # [N, K / g, g]
    if minimum is None:
        groups = (groups - 2 ** (bits - 1)) * scale.float()[..., None]
    else:
        groups = groups * scale.float()[..., None] + minimum.float()[..., None]
    return groups.view(-1, width).to(dtype)


@functools.cache
def cpp_library(*options: str) -> ctypes.CDLL | None:
    """The functions of products.h; None where they can't be compiled.

    Args:
        options: Of the compiler, for the processor; none is what this processor has.
    """
    library = load_library(SOURCES, *options) if options else load_operators()
    if library is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        library.unpack.argtypes = pointer, number, number, number
        library.unpack.restype = None
    return library


def multiply_in_cpp(library: ctypes.CDLL, x: Tensor, weights: Sequence[_Weight]) -> list[Tensor]:
    """Multiplies with each weight, on a CPU.

    Args:
        library: What cpp_library returns.
        x: [M, K].
        weights: Of each its packed numbers, scale, and minimum or None.

    Returns:
        For each weight [M, N] in x's dtype.
    """
    x = x.contiguous()
    num_x, width = x.shape
    outs = [x.new_empty(num_x, len(packed)) for packed, _, _ in weights]
    fields = _fields(width, *[(*weight, out) for weight, out in zip(weights, outs, strict=True)])
    multiply = library.multiply_packed if num_x <= MAX_ROWS else library.multiply_many
    call_product(multiply, x, fields, len(weights))
    return outs


def _multiply_on_cpu(
    x: Tensor, packed: list[Tensor], scales: list[Tensor], minima: list[Tensor]
) -> list[Tensor]:
    weights = [*_weights(packed, scales, minima)]
    library = cpp_library()
    in_cpp = 0 < len(x) <= MAX_ROWS or x.dtype in DTYPES_IN_CPP
    if library is None or not in_cpp:
        return [_multiply_dequantized(x, *weight) for weight in weights]
    return multiply_in_cpp(library, x, weights)


def _multiply_on_gpu(
    x: Tensor, packed: list[Tensor], scales: list[Tensor], minima: list[Tensor]
) -> list[Tensor]:
    weights = _weights(packed, scales, minima)
    if not 0 < len(x) <= MAX_ROWS:
        return [_multiply_dequantized(x, *weight) for weight in weights]
    from .packed_gpu import multiply_packed_on_gpu

    return [multiply_packed_on_gpu(x, *weight) for weight in weights]


def _multiply_dequantized(
    x: Tensor, packed: Tensor, scale: Tensor, minimum: Tensor | None
) -> Tensor:
    """The product by BLAS, a block of the weight's rows at a time."""
    on_cpu = x.device.type == "cpu"
    brain = x.dtype == torch.bfloat16 and x.dtype not in STORAGE_DTYPES
    in_float32 = on_cpu and not brain
    rows = x.float() if in_float32 else x
    out = x.new_empty(len(x), len(packed))
    elements = _BLOCK_BYTES // rows.itemsize if on_cpu else _GPU_BLOCK_ELEMENTS
    block = min(len(packed), max(1, elements // x.shape[1]))
    buffer = rows.new_empty(block, x.shape[1])
    for begin in range(0, len(packed), block):
        own = slice(begin, begin + block)
        part = minimum if minimum is None else minimum[own]
        rest = packed[own]
        weight = _unpack(rest, scale[own], part, buffer[: len(rest)])
        out[:, own] = multiply_many(rows, [weight])[0] if in_float32 else F.linear(rows, weight)
    return out


def _unpack(packed: Tensor, scale: Tensor, minimum: Tensor | None, buffer: Tensor) -> Tensor:
    """Dequantizes, in C++ and into the buffer where that can be."""
    width, library = buffer.shape[1], cpp_library()
    if buffer.device.type != "cpu" or library is None:
        return dequantize(packed, scale, minimum, buffer.dtype, width=width)
    fields = _fields(width, (packed, scale, minimum, buffer))
    library.unpack(
        (ctypes.c_int64 * len(fields))(*fields),
        width,
        CPP_TYPES[buffer.dtype],
        torch.get_num_threads(),
    )
    return buffer


def _fields(width: int, *weights: tuple[*_Weight, Tensor]) -> list[int]:
    """The fields of each weight's PackedWeight in products.h, with what it is multiplied into."""
    fields: list[int] = []
    for packed, scale, minimum, out in weights:
        num_rows, row_bytes = packed.shape
        bits, group = 8 * row_bytes // width, width // scale.shape[1]
        assert row_bytes * 8 in (4 * width, 8 * width)
        assert group in _GROUPS or group == width
        assert packed.is_contiguous()
        assert scale.is_contiguous()
        offsets, offsets_type = 0, 0
        if minimum is not None:
            assert minimum.is_contiguous()
            offsets, offsets_type = minimum.data_ptr(), CPP_TYPES[minimum.dtype]
        fields += (packed.data_ptr(), scale.data_ptr(), offsets, out.data_ptr())
        fields += (num_rows, bits, group, CPP_TYPES[scale.dtype], offsets_type)
    return fields


def _weights(packed: list[Tensor], scales: list[Tensor], minima: list[Tensor]) -> Iterator[_Weight]:
    given = [m if m.numel() else None for m in minima] or [None] * len(packed)
    return zip(packed, scales, given, strict=True)


def _fake(
    x: Tensor, packed: list[Tensor], scales: list[Tensor], minima: list[Tensor]
) -> list[Tensor]:
    return [x.new_empty(len(x), len(weight)) for weight in packed]


_library.impl("multiply_packed", _multiply_on_cpu, "CPU")
_library.impl("multiply_packed", _multiply_on_gpu, "CUDA")
torch.library.register_fake("llamac::multiply_packed", _fake, lib=_library)
