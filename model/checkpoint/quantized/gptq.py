"""GPTQ folders, as AutoGPTQ and GPTQModel write them: words along the input, one matrix a group.

Source: the layout of AutoGPTQ's QuantLinear; version 1 stores zero points less one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...packed import PackedFormat
from .bits import pack_columns, unpack_columns, unpack_rows
from .modules import Modules

__all__ = ["read_gptq"]

_SCALES = ("float16", "bfloat16", "float32")


def read_gptq(modules: Modules) -> None:
    """Reads GPTQ of 4 and 8 bits, versions 1 and 2, any order of columns. See read_quantized."""
    bits = modules.setting("bits", (4, 8))
    is_symmetric = modules.setting("sym", (True, False), True)
    version = modules.setting("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    group = modules.settings.get("group_size", 128)
    if type(group) is not int or (group != -1 and group < 8):
        raise ValueError(f"quantization_config: group_size is {group}; it must be a size or -1")
    for module, num_rows, width in modules.with_tensor("qweight"):
        size = width if group == -1 else group
        if width % size:
            raise ValueError(f"{module}: groups of {size} don't divide {width} columns")
        _read(modules, module, (num_rows, width), bits, size, is_symmetric, version == "gptq")


def _read(
    modules: Modules,
    module: str,
    size: tuple[int, int],
    bits: int,
    group_size: int,
    is_symmetric: bool,
    is_version_1: bool,
) -> None:
    num_rows, width = size
    groups = (num_rows, width // group_size)
    values = modules.take(
        module, "qweight", shape=(width * bits // 32, num_rows), dtypes=("int32",)
    )
    zeros = modules.take(
        module, "qzeros", shape=(groups[1], num_rows * bits // 32), dtypes=("int32",)
    )
    scales = modules.take(module, "scales", shape=groups[::-1], dtypes=_SCALES)
    order = None
    if modules.find(module, "g_idx") is not None:
        group_of = modules.take(module, "g_idx", shape=(width,), dtypes=("int32", "int64"))
        order = modules.order_of(module, group_of, group_size)
        if order is not None:
            modules.add_order(module, group_of, order)

    def points(stored: Tensor) -> Tensor:  # [N, K / g]
        return unpack_columns(stored, bits).t() + int(is_version_1) & 2**bits - 1

    def unpacked(stored: Tensor, stored_zeros: Tensor) -> Tensor:
        if is_symmetric and bool((points(stored_zeros) != 2 ** (bits - 1)).any()):
            raise ValueError(f"{module}: sym is true, but a zero point isn't {2 ** (bits - 1)}")
        return pack_columns(unpack_rows(stored, bits), bits)

    def minimum(stored_zeros: Tensor, scales: Tensor) -> Tensor:
        return -points(stored_zeros).float() * scales.t().float()

    modules.reorder(module, [values, zeros], unpacked, bits=bits, size=size, order=order)
    modules.compute(module, "weight_scale", [scales], _transposed, shape=groups, dtype=scales.dtype)
    if not is_symmetric:
        modules.compute(
            module, "weight_minimum", [zeros, scales], minimum, shape=groups, dtype="float32"
        )
    modules.pack(
        module,
        PackedFormat(
            bits=bits,
            group_size=group_size,
            scale_dtype=scales.dtype,
            minimum_dtype=None if is_symmetric else "float32",
            has_order=order is not None,
        ),
    )


def _transposed(stored: Tensor) -> Tensor:
    return stored.t().to(memory_format=torch.contiguous_format)
