"""Operators in C++ for a CPU: attention, and what steps of few tokens do, which reading bounds.

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

__all__ = [
    "MAX_ROWS",
    "SOURCES",
    "attend_in_cpp",
    "layers_few",
    "load_operators",
    "multiply_few",
    "multiply_few_packed",
]

MAX_ROWS = 16  # of x, or tokens of a row

_FOLDER = Path(__file__).parent
# Without torch's operators, whose file is the first that load_operators compiles.
SOURCES = tuple(
    _FOLDER / name
    for name in (
        "packed_product.cpp",
        "many_rows.cpp",
        "unpack.cpp",
        "dense_product.cpp",
        "attention.cpp",
        "attention_many.cpp",
        "layer.cpp",
    )
)

_library = torch.library.Library("llamac", "FRAGMENT")
# The compiler isn't told that layers_few writes the cache: where not all layers fit it is called in
# a region that they share, into which the compiler takes no operator that writes. Nothing else of a
# step reads or writes these layers' cache.
for _schema in (
    "multiply_few(Tensor x, Tensor[] weights) -> Tensor[]",
    "multiply_few_packed(Tensor x, Tensor[] packed, Tensor[] scales, Tensor[] minima) -> Tensor[]",
    "attend_in_cpp(Tensor q, Tensor[] cache, Tensor positions, Tensor slots, float scale) "
    "-> Tensor",
    "layers_few(Tensor hidden, Tensor[] norms, float eps, Tensor[] weights, Tensor?[] scales, "
    "Tensor?[] minima, Tensor?[] biases, Tensor cos, Tensor sin, Tensor positions, "
    "Tensor write_indices, Tensor slots, float scale, Tensor[] cache) -> Tensor",
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


def attend_in_cpp(
    q: Tensor, cache: list[Tensor], positions: Tensor, slots: Tensor, scale: float
) -> Tensor:
    """Does what live_attention.attend_live does.

    Args:
        q: [B, H, T, D].
        cache: A layer's buffers (see cache.layer_buffers): of q's dtype, or int8 with scales.
        positions: [B] int64.
        slots: [B] int64.
        scale: Of the products of queries and keys.

    Returns:
        [B, H, T, D] as a contiguous [B, T, H, D].
    """
    return torch.ops.llamac.attend_in_cpp(q, cache, positions, slots, scale)


def layers_few(
    hidden: Tensor,
    norms: list[Tensor],
    eps: float,
    weights: list[Tensor],
    scales: list[Tensor | None],
    minima: list[Tensor | None],
    biases: list[Tensor | None],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    write_indices: Tensor,
    slots: Tensor,
    scale: float,
    cache: list[Tensor],
) -> Tensor:
    """Decoder layers, one after the other, on at most 16 tokens.

    What is said of products and norms is so for each layer: the lists have the first layer's, then
    the second's. The products are those of q, k, v, o, gate, up and down, in this order.

    Args:
        hidden: [B*T, E] float32, float16 or bfloat16, contiguous.
        norms: Weights of the two norms, each [E] of that dtype.
        eps: Of the norms.
        weights: Of each product [N, K] of that dtype, or packed (see packed_product).
        scales: Of each product; None where the weight isn't packed.
        minima: Of each product; None where there are none.
        biases: Of each product; None where there is none.
        cos: [B, T, D/2] float32.
        sin: [B, T, D/2] float32.
        positions: [B] int64.
        write_indices: [B] int64, the cache row of each row's first token.
        slots: [B] int64, the cache slot of each row.
        scale: Of the products of queries and keys.
        cache: Each layer's buffers (see cache.layer_buffers), which are written: of that dtype, or
            int8 with scales.

    Returns:
        [B*T, E] in hidden's dtype.
    """
    return torch.ops.llamac.layers_few(
        hidden,
        norms,
        eps,
        weights,
        scales,
        minima,
        biases,
        cos,
        sin,
        positions,
        write_indices,
        slots,
        scale,
        cache,
    )


@functools.cache
def load_operators() -> ctypes.CDLL | None:
    """Compiles the operators for this processor and this torch, or finds them in the user's cache.

    Returns:
        Their library; None where it can't be made, which is logged.
    """
    folder = Path(torch.__file__).parent
    return load_library(
        (_FOLDER / "operators.cpp", *SOURCES),
        "-march=native",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-isystem{folder / path}" for path in ("include", "include/torch/csrc/api/include")),
        *(f"-L{folder / 'lib'}", "-ltorch_cpu", "-lc10"),
    )


def _fake_products(x: Tensor, weights: list[Tensor], *_: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(len(x), len(weight)) for weight in weights]


def _fake_attention(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)


def _fake_layers(hidden: Tensor, *_: object) -> Tensor:
    return torch.empty_like(hidden)


torch.library.register_fake("llamac::multiply_few", _fake_products, lib=_library)
torch.library.register_fake("llamac::multiply_few_packed", _fake_products, lib=_library)
torch.library.register_fake("llamac::attend_in_cpp", _fake_attention, lib=_library)
torch.library.register_fake("llamac::layers_few", _fake_layers, lib=_library)
