"""compressed-tensors: what llm-compressor and vLLM's publishers write.

Source: compressed-tensors' documentation of its formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ....runtime.typed_json import shown
from ...packed import PackedFormat
from ..pieces import Conversion, Piece
from .bits import unpack_columns
from .fp8 import add_scaled
from .modules import Modules

__all__ = ["read_compressed_tensors"]

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense")
_SCALES = ("float32", "float16", "bfloat16")
# Of activations and of a quantized cache, neither of which is quantized here.
_UNUSED = (
    "weight_shape",
    "input_scale",
    "input_zero_point",
    "output_scale",
    "k_scale",
    "v_scale",
    "q_scale",
)


def read_compressed_tensors(modules: Modules) -> None:
    """Reads pack-quantized, int-quantized and float-quantized weights; see read_quantized."""
    settings = modules.settings
    _check_formats(settings)
    for name in ("transform_config", "sparsity_config"):
        value = settings.get(name)
        if isinstance(value, dict) and value.get("format") != "dense" and value:
            raise ValueError(f"quantization_config: {name} changes the weights; it can't be read")
    for module, num_rows, width in modules.with_tensor("weight_packed"):
        _read_packed(modules, module, num_rows, width)
    for module, num_rows, width in modules.with_tensor("weight_scale"):
        weight = modules.find(module, "weight")
        if weight is not None and weight.dtype == "int8":
            _read_int8(modules, module, num_rows, width)
        else:
            add_scaled(modules, module, "weight_scale", (num_rows, width))
    modules.drop(*_UNUSED)


def _check_formats(settings: Mapping[str, Any]) -> None:
    groups = settings.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        raise ValueError("quantization_config: config_groups is not an object of objects")
    formats = {group.get("format") for group in groups.values()} - {None}
    stated = settings.get("format")
    if stated != "mixed-precision" or not formats:
        formats.add(stated)
    if wrong := [one for one in formats if one not in _FORMATS]:
        raise ValueError(
            f"quantization_config: format is {shown(wrong[0])}; only {', '.join(_FORMATS)} can be "
            "read; use the unquantized checkpoint and llamac quantize"
        )


def _read_packed(modules: Modules, module: str, num_rows: int, width: int) -> None:
    scale = modules.find(module, "weight_scale")
    packed = modules.find(module, "weight_packed")
    assert packed is not None
    if scale is None or len(scale.shape) != 2 or not scale.shape[1] or width % scale.shape[1]:
        raise ValueError(f"{packed.file.path}: {module} has no weight_scale that fits")
    bits = 32 * packed.shape[-1] // width
    if len(packed.shape) != 2 or bits not in (4, 8):
        raise ValueError(
            f"{packed.file.path}: tensor {packed.key} is {list(packed.shape)}, weights of "
            f"{shown(bits)} bits; only 4 and 8 can be read"
        )
    num_groups = scale.shape[1]
    group_size = width // num_groups
    packed = modules.take(
        module, "weight_packed", shape=(num_rows, width * bits // 32), dtypes=("int32",)
    )
    scale = modules.take(module, "weight_scale", shape=(num_rows, num_groups), dtypes=_SCALES)
    raw = _as_bytes(packed)
    order = None
    if modules.find(module, "weight_g_idx") is not None:
        groups = modules.take(module, "weight_g_idx", shape=(width,), dtypes=("int32", "int64"))
        order = modules.order_of(module, groups, group_size)
        if order is not None:
            modules.add_order(module, groups, order)
    if order is None:
        modules.keep(module, "weight_packed", raw)
    else:
        modules.reorder(module, [raw], _same, bits=bits, size=(num_rows, width), order=order)
    modules.keep(module, "weight_scale", scale)
    minimum = None
    if modules.find(module, "weight_zero_point") is not None:
        minimum = "float32"
        _read_zeros(modules, module, scale, bits=bits, num_rows=num_rows)
    modules.pack(
        module,
        PackedFormat(
            bits=bits,
            group_size=group_size,
            scale_dtype=scale.dtype,
            minimum_dtype=minimum,
            has_order=order is not None,
        ),
    )


def _read_zeros(modules: Modules, module: str, scale: Piece, *, bits: int, num_rows: int) -> None:
    """Zero points are packed along the rows."""
    num_groups = scale.shape[1]
    stored_rows = -(-num_rows * bits // 32)
    zeros = modules.take(
        module, "weight_zero_point", shape=(stored_rows, num_groups), dtypes=("int32",)
    )

    def minimum(packed: Tensor, scale: Tensor) -> Tensor:
        unpacked = unpack_columns(packed.t(), bits).t()[:num_rows]
        return -unpacked.float() * scale.float()

    modules.compute(
        module,
        "weight_minimum",
        [zeros, scale],
        minimum,
        shape=(num_rows, num_groups),
        dtype="float32",
    )


def _read_int8(modules: Modules, module: str, num_rows: int, width: int) -> None:
    if modules.find(module, "weight_zero_point") is not None:
        raise ValueError(f"{module}: int-quantized weights with zero points can't be read")
    scale = modules.find(module, "weight_scale")
    assert scale is not None
    num_groups = scale.shape[1] if len(scale.shape) == 2 else 1
    if num_groups == 0 or width % num_groups:
        raise ValueError(f"{scale.file.path}: {scale.key} is {list(scale.shape)}; it doesn't fit")
    weight = modules.take(module, "weight", shape=(num_rows, width), dtypes=("int8",))
    add_signed(modules, module, weight)
    if scale.shape == (1,):
        scale = modules.take(module, "weight_scale", shape=(1,), dtypes=_SCALES)
        modules.compute(
            module,
            "weight_scale",
            [scale],
            lambda one: one.reshape(1, 1).expand(num_rows, 1).contiguous(),
            shape=(num_rows, 1),
            dtype=scale.dtype,
        )
    else:
        scale = modules.take(module, "weight_scale", shape=(num_rows, num_groups), dtypes=_SCALES)
        modules.keep(module, "weight_scale", scale)
    form = PackedFormat(bits=8, group_size=width // num_groups, scale_dtype=scale.dtype)
    modules.pack(module, form)


def add_signed(modules: Modules, module: str, weight: Piece) -> None:
    """Adds signed bytes as packed ones.

    Args:
        modules: Where they go.
        module: Its name.
        weight: [N, K] int8.
    """
    conversion = Conversion(apply=partial(_flip_sign), row_shape=weight.shape[1:], dtype="uint8")
    modules.convert(module, "weight_packed", weight, conversion)


def _flip_sign(values: Tensor) -> Tensor:
    return values.view(torch.uint8) ^ 0x80


def _same(stored: Tensor) -> Tensor:
    return stored


def _as_bytes(piece: Piece) -> Piece:
    """The same bytes, named as what they are: a mapped file serves without a copy."""
    num_rows, words = piece.entry.shape
    return replace(piece, bytes_as=replace(piece.entry, shape=(num_rows, 4 * words), dtype="uint8"))
