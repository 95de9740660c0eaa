"""compressed-tensors: what llm-compressor and vLLM's publishers write.

Source: compressed-tensors' documentation of its formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ....runtime.typed_json import shown
from ...packed import PackedFormat
from ..pieces import Piece
from .bits import reorder_columns, unpack_columns
from .fp8 import add_scaled
from .modules import Modules
from .signed import SCALE_DTYPES, read_signed

__all__ = ["read_compressed_tensors"]

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense")
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
    for name in ("transform_config", "sparsity_config"):
        value = settings.get(name)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            raise ValueError(f"quantization_config: {name} changes the weights; it can't be read")
    groups = _groups(settings)
    _check_formats(settings.get("format"), groups)
    block = _block(groups)
    for module, num_rows, width in modules.with_tensor("weight_packed"):
        _read_packed(modules, module, num_rows, width)
    for module, num_rows, width in modules.with_tensor("weight_scale"):
        weight = modules.find(module, "weight")
        if weight is not None and weight.dtype == "int8":
            read_signed(
                modules, module, weight="weight", scale="weight_scale", zero="weight_zero_point"
            )
        else:
            add_scaled(modules, module, "weight_scale", (num_rows, width), block)
    modules.drop(*_UNUSED)


def _groups(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    groups = settings.get("config_groups")
    groups = {} if groups is None else groups
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        raise ValueError(
            f"quantization_config: config_groups is {shown(groups)}; it must be an object of "
            "objects"
        )
    return list(groups.values())


def _check_formats(stated: object, groups: list[dict[str, Any]]) -> None:
    formats = [form for group in groups if (form := group.get("format")) is not None]
    if stated != "mixed-precision" or not formats:
        formats.append(stated)
    for form in formats:
        if form not in _FORMATS:
            raise ValueError(
                f"quantization_config: format is {shown(form)}; only {', '.join(_FORMATS)} can be "
                "read; use the unquantized checkpoint and llamac quantize"
            )


def _block(groups: list[dict[str, Any]]) -> object:
    """The rows and columns that share a scale, where all groups of modules agree on them."""
    weights = [group.get("weights") for group in groups]
    blocks = [
        w["block_structure"] for w in weights if isinstance(w, dict) and w.get("block_structure")
    ]
    return blocks[0] if blocks and all(block == blocks[0] for block in blocks) else None


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
    raw = modules.take_words(module, "weight_packed", (num_rows, width * bits // 8))
    scale = modules.take(module, "weight_scale", shape=(num_rows, num_groups), dtypes=SCALE_DTYPES)
    order = modules.read_order(module, "weight_g_idx", group_size)
    if order is None:
        modules.keep(module, "weight_packed", raw)
    else:
        modules.compute(
            module,
            "weight_packed",
            [raw],
            partial(reorder_columns, bits=bits, order=order),
            shape=raw.shape,
            dtype="uint8",
        )
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
