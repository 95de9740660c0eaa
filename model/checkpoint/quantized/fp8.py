"""Eight-bit floats with a scale for each block, as DeepSeek and transformers' fp8 write them."""

from __future__ import annotations

from torch import Tensor

from ....runtime.typed_json import shown
from .modules import Modules
from .signed import SCALE_DTYPES

__all__ = ["add_scaled", "read_fp8"]


def read_fp8(modules: Modules) -> None:
    """Reads fp8 weights; they become the model's dtype. See read_quantized."""
    block = modules.settings.get("weight_block_size")
    for part in ("weight_scale_inv", "weight_scale"):
        for module, num_rows, width in modules.with_tensor(part):
            add_scaled(modules, module, part, (num_rows, width), block)
    modules.drop("activation_scale", "input_scale", "k_scale", "v_scale", "kv_scale")


def add_scaled(
    modules: Modules, module: str, part: str, size: tuple[int, int], block: object
) -> None:
    """Adds a weight of eight-bit floats times scales, as float32.

    Args:
        modules: Where it is taken from and goes.
        module: Its name.
        part: The scales' name; they multiply: one, one a row, or one for each block.
        size: N and K.
        block: What the settings say of a block's rows and columns; None for no blocks.

    Raises:
        ValueError: The weight isn't e4m3, or the scales don't fit.
    """
    scale = modules.find(module, part)
    assert scale is not None
    shape = (1, 1) if scale.shape == (1,) else scale.shape
    steps = [(size[0] if shape[0] == 1 else 1, size[1])]
    if block is not None:
        steps.append(_block_size(block))
    fitting = [s for s in steps if shape == (-(-size[0] // s[0]), -(-size[1] // s[1]))]
    if not fitting:
        raise ValueError(
            f"{scale.file.path}: tensor {scale.key} is {list(scale.shape)}, which doesn't fit a "
            f"weight of {list(size)}"
        )
    weight = modules.take(module, "weight", shape=size, dtypes=("float8_e4m3fn",))
    scale = modules.take(module, part, shape=scale.shape, dtypes=SCALE_DTYPES)

    rows, columns = fitting[0]

    def multiply(weight: Tensor, scale: Tensor) -> Tensor:
        scales = scale.float().reshape(shape).repeat_interleave(min(rows, size[0]), 0)[: size[0]]
        values, whole = weight.float(), size[1] // columns
        values[:, : whole * columns].unflatten(1, (whole, min(columns, size[1]))).mul_(
            scales[:, :whole, None]
        )
        values[:, whole * columns :].mul_(scales[:, whole:])
        return values

    modules.compute(module, "weight", [weight, scale], multiply, shape=size, dtype="float32")


def _block_size(block: object) -> tuple[int, int]:
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(type(n) is int and n > 0 for n in block)
    ):
        raise ValueError(
            f"quantization_config: a block of weights is {shown(block)}; it must be two sizes"
        )
    return block[0], block[1]
