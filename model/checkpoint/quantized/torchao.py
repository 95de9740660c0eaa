"""torchao's int8 weights in safetensors."""

from __future__ import annotations

from ...packed import PackedFormat
from .compressed_tensors import add_signed
from .modules import Modules

__all__ = ["read_torchao"]

_SCALES = ("float32", "float16", "bfloat16")


def read_torchao(modules: Modules) -> None:
    """Reads int8 by rows; what else torchao writes is refused. See read_quantized."""
    for prefix in ("weight_", "_weight_"):
        for module, num_rows, width in modules.with_tensor(f"{prefix}qdata"):
            scale = modules.find(module, f"{prefix}scale")
            if scale is None or len(scale.shape) != 2 or not scale.shape[1]:
                raise ValueError(f"{module}: has no {prefix}scale of rows and groups")
            groups = (num_rows, scale.shape[1])
            weight = modules.take(
                module, f"{prefix}qdata", shape=(num_rows, width), dtypes=("int8",)
            )
            scale = modules.take(module, f"{prefix}scale", shape=groups, dtypes=_SCALES)
            zeros = modules.find(module, f"{prefix}zero_point")
            if zeros is not None and bool(modules.values(zeros).any()):
                raise ValueError(f"{module}: torchao weights with zero points can't be read")
            add_signed(modules, module, weight)
            modules.keep(module, "weight_scale", scale)
            form = PackedFormat(bits=8, group_size=width // groups[1], scale_dtype=scale.dtype)
            modules.pack(module, form)
        modules.drop(f"{prefix}zero_point")
