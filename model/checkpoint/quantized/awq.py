"""AWQ folders of version gemm: words along the output, nibbles in an order of their own.

Source: the layout of AutoAWQ's WQLinear_GEMM.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...packed import PackedFormat
from .bits import pack_rows, unpack_columns
from .modules import Modules
from .signed import SCALE_DTYPES

__all__ = ["read_awq"]

_BITS = 4
# Column j of eight lies in nibble _NIBBLES[j].
_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)


def read_awq(modules: Modules) -> None:
    """Reads AWQ's gemm layout. See read_quantized."""
    modules.setting("bits", (_BITS,), modules.settings.get("w_bit", _BITS))
    modules.setting("version", ("gemm", "GEMM"), "gemm")
    modules.setting("zero_point", (True,), True)
    for module, num_rows, width in modules.with_tensor("qweight"):
        _read(modules, module, num_rows, width)


def _read(modules: Modules, module: str, num_rows: int, width: int) -> None:
    scales = modules.find(module, "scales")
    if scales is None or len(scales.shape) != 2 or not scales.shape[0] or width % scales.shape[0]:
        raise ValueError(f"{module} has no scales that fit its {width} columns")
    num_groups = scales.shape[0]
    groups = (num_rows, num_groups)
    words = modules.num_words(module, num_rows, _BITS)
    values = modules.take(module, "qweight", shape=(width, words), dtypes=("int32",))
    zeros = modules.take(module, "qzeros", shape=(num_groups, words), dtypes=("int32",))
    scales = modules.take(module, "scales", shape=groups[::-1], dtypes=SCALE_DTYPES)
    modules.compute(
        module,
        "weight_packed",
        [values],
        _packed,
        shape=(num_rows, width * _BITS // 8),
        dtype="uint8",
    )
    modules.compute(
        module,
        "weight_scale",
        [scales],
        lambda stored: stored.t().contiguous(),
        shape=groups,
        dtype=scales.dtype,
    )
    modules.compute(
        module,
        "weight_minimum",
        [zeros, scales],
        lambda stored, scales: -_columns(stored).t().float() * scales.t().float(),
        shape=groups,
        dtype="float32",
    )
    form = PackedFormat(
        bits=_BITS,
        group_size=width // num_groups,
        scale_dtype=scales.dtype,
        minimum_dtype="float32",
    )
    modules.pack(module, form)


def _packed(stored: Tensor) -> Tensor:
    """[K, N / 8] int32 to [N, K / 2] uint8, a column of eight at a time."""
    raw = stored.contiguous().view(torch.uint8).unflatten(1, (-1, 4))
    out = raw.new_empty(8 * stored.shape[1], len(stored) // 2)
    for column, nibble in enumerate(_NIBBLES):
        pair = raw[..., nibble // 2]
        out[column::8] = pack_rows(pair >> 4 if nibble % 2 else pair & 15, _BITS)
    return out


def _columns(stored: Tensor) -> Tensor:
    """[R, N / 8] int32 to [R, N] uint8."""
    nibbles = unpack_columns(stored, _BITS).unflatten(1, (-1, 8))
    return nibbles[:, :, list(_NIBBLES)].flatten(1)
