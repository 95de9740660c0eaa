"""Eight-bit floats with a scale for each block, as DeepSeek and transformers' fp8 write them."""

from __future__ import annotations

import torch
from torch import Tensor

from .modules import Modules

__all__ = ["add_scaled", "read_fp8"]

_SCALES = ("float32", "float16", "bfloat16")


def read_fp8(modules: Modules) -> None:
    """Reads fp8 weights; they become the model's dtype. See read_quantized."""
    for part in ("weight_scale_inv", "weight_scale"):
        for module, num_rows, width in modules.with_tensor(part):
            add_scaled(modules, module, part, (num_rows, width))
    modules.drop("activation_scale", "input_scale")


def add_scaled(modules: Modules, module: str, part: str, size: tuple[int, int]) -> None:
    """Adds a weight of eight-bit floats times scales, as float32.

    Args:
        modules: Where it is taken from and goes.
        module: Its name.
        part: The scales' name; they multiply: one, one a row, or one for each block.
        size: N and K.

    Raises:
        ValueError: The weight isn't e4m3, or the scales don't fit.
    """
    block = modules.settings.get("weight_block_size")
    weight = modules.take(module, "weight", shape=size, dtypes=("float8_e4m3fn",))
    scale = modules.find(module, part)
    assert scale is not None
    shape = (1, 1) if scale.shape == (1,) else scale.shape
    step = (size[0] if shape[0] == 1 else 1, size[1])
    if isinstance(block, list) and part == "weight_scale_inv":
        if len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
            raise ValueError(f"quantization_config: weight_block_size is {block}; it must be two")
        step = (block[0], block[1])
    if shape != tuple(-(-n // by) for n, by in zip(size, step, strict=True)):
        raise ValueError(
            f"{scale.file.path}: tensor {scale.key} is {list(scale.shape)}, which doesn't fit a "
            f"weight of {list(size)}"
        )
    scale = modules.take(module, part, shape=scale.shape, dtypes=_SCALES)

    def multiply(weight: Tensor, scale: Tensor) -> Tensor:
        whole = scale.float().reshape(shape)
        for axis in (0, 1):
            whole = whole.repeat_interleave(step[axis], axis).narrow(axis, 0, size[axis])
        return weight.float() * whole

    modules.compute(
        module, "weight", [weight, scale], multiply, shape=size, dtype=_name(torch.float32)
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
