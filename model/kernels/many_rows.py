"""Products of many rows on a CPU, by what is fastest on its processor."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from ..toolchain import instruction_set, is_amd
from .few_rows import load_operators

__all__ = [
    "CPP_TYPES",
    "DTYPES_IN_CPP",
    "call_product",
    "multiply_dense_in_cpp",
    "multiply_many",
]

CPP_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the C++ libraries' numbers


def _dtypes_in_cpp(flags: frozenset[str]) -> frozenset[torch.dtype]:
    """An AMD's arithmetic MKL and oneDNN leave partly unused; an Intel's float32 is MKL's.

    Args:
        flags: The processor's. Where its libraries multiply in tiles, no vectors are as fast, nor
            are those of float32 as those of float16.
    """
    if "fma" not in flags:
        return frozenset()
    faster = {torch.bfloat16: {"amx_bf16"}, torch.float16: {"amx_fp16", "avx512_fp16"}}
    dtypes = [dtype for dtype, theirs in faster.items() if not theirs & flags]
    return frozenset([*dtypes, torch.float32] if is_amd() else dtypes)


# What this processor multiplies many rows of fastest in C++.
DTYPES_IN_CPP = _dtypes_in_cpp(frozenset(instruction_set().split()))

_library = torch.library.Library("llamac", "FRAGMENT")
# Not a custom_op, whose first call imports Dynamo.
_library.define(
    "multiply_many(Tensor x, Tensor[] weights) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,)
)


def multiply_many(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Multiplies x with each of several weights: x @ weight.T.

    Args:
        x: [M, K] float32, float16 or bfloat16.
        weights: Each [N, K] of x's dtype; N may differ.

    Returns:
        For each weight [M, N] in x's dtype, contiguous, summed in float32.
    """
    return torch.ops.llamac.multiply_many(x, weights)


def multiply_dense_in_cpp(library: ctypes.CDLL, x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Does what multiply_many does, by the library of which load_operators returns one."""
    x = x.contiguous()
    outs = [x.new_empty(len(x), len(weight)) for weight in weights]
    fields: list[int] = []
    for weight, out in zip(weights, outs, strict=True):
        assert weight.shape[1] == x.shape[1]
        assert weight.dtype == x.dtype
        assert weight.is_contiguous()
        fields += (weight.data_ptr(), 0, 0, out.data_ptr())
        fields += (len(weight), 8 * weight.itemsize, x.shape[1], 0, 0)
    call_product(library.multiply_many, x, fields, len(weights))
    return outs


def call_product(
    function: Callable[..., int], x: Tensor, fields: list[int], num_weights: int
) -> None:
    """Calls one of products.h's, of a contiguous x with weights of which fields has the structs."""
    number = ctypes.c_int64
    sizes = number(CPP_TYPES[x.dtype]), number(x.shape[0]), number(x.shape[1])
    table = (number * len(fields))(*fields)
    counts = number(num_weights), number(torch.get_num_threads())
    if not function(ctypes.c_void_p(x.data_ptr()), *sizes, table, *counts):
        raise MemoryError("no memory for a product's scratch")


def _multiply(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    library = load_operators() if x.dtype in DTYPES_IN_CPP else None
    if library is not None:
        return multiply_dense_in_cpp(library, x, weights)
    # With the weight's rows as the result's rows MKL is faster.
    return [torch.mm(weight, x.t()).t().contiguous() for weight in weights]


def _fake(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(len(x), len(weight)) for weight in weights]


_library.impl("multiply_many", _multiply, "CPU")
torch.library.register_fake("llamac::multiply_many", _fake, lib=_library)
