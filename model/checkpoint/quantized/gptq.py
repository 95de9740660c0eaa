"""GPTQ folders, as AutoGPTQ and GPTQModel write them: words along the input, one matrix a group.

Source: the layout of AutoGPTQ's QuantLinear; version 1 stores zero points less one, by GPTQModel
subtracted from whole words, so that a zero point of 0 borrows from its neighbour.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....runtime.typed_json import shown
from ...packed import PackedFormat
from .bits import pack_rows, unpack_columns, unpack_rows
from .modules import Modules
from .signed import SCALE_DTYPES

__all__ = ["read_gptq"]

_FIRST_VERSION_LESS = {4: 0x11111111, 8: 0x01010101}  # a word's


def read_gptq(modules: Modules) -> None:
    """Reads GPTQ of 4 and 8 bits, versions 1 and 2, any order of columns. See read_quantized."""
    bits = modules.setting("bits", (4, 8))
    is_symmetric = modules.setting("sym", (True, False), True)
    version = modules.setting("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    group = modules.settings.get("group_size", 128)
    if type(group) is not int or (group != -1 and group < 1):
        raise ValueError(
            f"quantization_config: group_size is {shown(group)}; it must be a size or -1"
        )
    less = _FIRST_VERSION_LESS[bits] if version == "gptq" else 0
    for module, _, width in modules.with_tensor("qweight"):
        size = width if group == -1 else group
        if width % size:
            raise ValueError(
                f"{module}: groups of {shown(size)} columns don't divide {width} columns"
            )
        _read(modules, module, bits, size, is_symmetric, less)
        modules.drop_zeros(module, "bias")  # AutoGPTQ gives every module one


def _read(
    modules: Modules, module: str, bits: int, group_size: int, is_symmetric: bool, less: int
) -> None:
    num_rows, width = modules.size(module)
    num_groups = width // group_size
    words = modules.num_words(module, width, bits)
    values = modules.take(module, "qweight", shape=(words, num_rows), dtypes=("int32",))
    words = modules.num_words(module, num_rows, bits)
    zeros = modules.take(module, "qzeros", shape=(num_groups, words), dtypes=("int32",))
    scales = modules.take(module, "scales", shape=(num_groups, num_rows), dtypes=SCALE_DTYPES)
    order = modules.read_order(module, "g_idx", group_size)
    groups = (num_rows, num_groups)

    def points(stored: Tensor) -> Tensor:  # [N, K / g]
        return unpack_columns(stored + less, bits).t()

    def packed(stored: Tensor, stored_zeros: Tensor) -> Tensor:
        if is_symmetric and bool((points(stored_zeros) != 2 ** (bits - 1)).any()):
            raise ValueError(
                f"{zeros.file.path}: tensor {zeros.key} has a zero point other than "
                f"{2 ** (bits - 1)}, although sym is true"
            )
        if order is None:  # a word holds the same neighbours in both layouts
            return stored.t().contiguous().view(torch.uint8)
        return pack_rows(unpack_rows(stored, bits)[order.long()], bits)

    def minimum(stored_zeros: Tensor, scales: Tensor) -> Tensor:
        return -points(stored_zeros).float() * scales.t().float()

    modules.compute(
        module,
        "weight_packed",
        [values, zeros],
        packed,
        shape=(num_rows, width * bits // 8),
        dtype="uint8",
    )
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
