"""Operators in C++ for steps of few tokens on a CPU, which are bound by reading weights and cache.

They are for compiled steps: `load_operators` must have been called before one runs. Their shapes
are checked, at each call.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from .cpp_library import load_library

__all__ = ["MAX_ROWS", "attend_few", "load_operators", "multiply_few", "multiply_few_packed"]

MAX_ROWS = 16  # of x, or tokens of a row

_FOLDER = Path(__file__).parent
_SOURCES = tuple(
    _FOLDER / name
    for name in ("operators.cpp", "packed_product.cpp", "dense_product.cpp", "attention.cpp")
)

_library = torch.library.Library("llamac", "FRAGMENT")
for _schema in (
    "multiply_few(Tensor x, Tensor[] weights) -> Tensor[]",
    "multiply_few_packed(Tensor x, Tensor[] packed, Tensor[] scales, Tensor[] minima) -> Tensor[]",
    "attend_few(Tensor q, Tensor k_cache, Tensor v_cache, Tensor positions, Tensor slots, "
    "float scale, Tensor? k_scale=None, Tensor? v_scale=None) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def multiply_few(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Multiplies x with each of several weights: x @ weight.T.

    Args:
        x: [M, K] float32, float16 or bfloat16, contiguous, M at most 16.
        weights: Each [N, K] of x's dtype, contiguous; N may differ.

    Returns:
        For each weight [M, N] in x's dtype, summed in float32.
    """
    return torch.ops.llamac.multiply_few(x, weights)


def multiply_few_packed(
    x: Tensor, packed: list[Tensor], scales: list[Tensor], minima: list[Tensor]
) -> list[Tensor]:
    """Does what packed_product.multiply_packed does, for a contiguous x of at most 16 rows."""
    return torch.ops.llamac.multiply_few_packed(x, packed, scales, minima)


def attend_few(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Does what live_attention.attend_live does, for at most 16 tokens.

    The caches are of q's dtype, or int8 with scales.
    """
    return torch.ops.llamac.attend_few(
        q, k_cache, v_cache, positions, slots, scale, k_scale, v_scale
    )


@functools.cache
def load_operators() -> ctypes.CDLL | None:
    """Compiles the operators for this processor and this torch, or finds them in the user's cache.

    Returns:
        Their library; None where it can't be made, which is logged.
    """
    folder = Path(torch.__file__).parent
    return load_library(
        _SOURCES,
        "-march=native",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-isystem{folder / path}" for path in ("include", "include/torch/csrc/api/include")),
        *(f"-L{folder / 'lib'}", "-ltorch_cpu", "-lc10"),
    )


def _fake_products(x: Tensor, weights: list[Tensor], *_: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(len(x), len(weight)) for weight in weights]


def _fake_attention(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)


torch.library.register_fake("llamac::multiply_few", _fake_products, lib=_library)
torch.library.register_fake("llamac::multiply_few_packed", _fake_products, lib=_library)
torch.library.register_fake("llamac::attend_few", _fake_attention, lib=_library)
