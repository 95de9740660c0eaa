"""What config.json says of packed weights: in compressed-tensors' words, and in our own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from ....runtime.typed_json import shown, to_dataclass
from ...packed import PackedFormat
from .modules import Modules

__all__ = ["native_settings", "quantization_settings", "read_native"]


def native_settings(packed: Mapping[str, PackedFormat]) -> dict[str, Any]:
    """Describes packed weights of any kind in this package's own words.

    Args:
        packed: Module name to how its weight is packed.

    Returns:
        The quantization_config.
    """
    modules = {name: asdict(form) for name, form in packed.items()}
    return {"quant_method": "llamac", "modules": modules}


def quantization_settings(
    packed: Mapping[str, PackedFormat], plain: tuple[str, ...]
) -> dict[str, Any]:
    """Describes packed weights as others read them.

    Args:
        packed: Module name to how its weight is packed, without minima or an order of columns.
        plain: Names of the linear modules whose weights are not.

    Returns:
        The quantization_config of compressed-tensors' pack-quantized.
    """
    kinds: dict[PackedFormat, list[str]] = {}
    for name, form in packed.items():
        kinds.setdefault(replace(form, scale_dtype="float32"), []).append(name)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": list(plain),
        "config_groups": {
            f"group_{i}": {
                "targets": names,
                "weights": {
                    "num_bits": form.bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": form.group_size,
                    "dynamic": False,
                },
            }
            for i, (form, names) in enumerate(kinds.items())
        },
    }


def read_native(modules: Modules) -> None:
    """Reads weights that are packed already. See read_quantized."""
    stated = modules.settings.get("modules")
    if not isinstance(stated, dict):
        raise ValueError(f"quantization_config: modules is {shown(stated)}; it must be an object")
    for module, num_rows, width in modules.with_tensor("weight_packed"):
        where = f"quantization_config: {module}"
        form = to_dataclass(PackedFormat, stated.get(module), where)
        modules.pack(module, form)
        for part, (shape, dtype) in form.tensors(num_rows, width).items():
            stored = modules.find(module, part)
            if part == "weight_packed" and stored is not None and stored.dtype == "int32":
                piece = modules.take_words(module, part, (shape[0], shape[1]))
            else:
                piece = modules.take(module, part, shape=shape, dtypes=(dtype,))
            if part == "weight_order":
                columns = modules.values(piece).long()
                if not torch.equal(columns.sort().values, torch.arange(width)):
                    raise ValueError(f"{module}: its order doesn't name every column once")
            modules.keep(module, part, piece)
