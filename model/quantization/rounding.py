"""Rounds weights to 4 or 8 bits, a scale for each group of columns."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checkpoint.quantized.bits import pack_columns
from ..packed import PackedFormat

__all__ = ["round_weight"]


def round_weight(weight: Tensor, form: PackedFormat) -> tuple[Tensor, Tensor]:
    """Rounds to the nearest value that a format can hold.

    With 8 bits the largest magnitude becomes 127. With 4 bits the element of the largest magnitude
    becomes -8, whatever its sign, so that all sixteen values serve; the scale has the other sign.

    Args:
        weight: [N, K] float32.
        form: Without minima and order.

    Returns:
        weight_packed [N, K * bits / 8] uint8 and weight_scale [N, K / g] in the scale's dtype.
    """
    groups = weight.unflatten(1, (-1, form.group_size))  # [N, K / g, g]
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    half = 2 ** (form.bits - 1)
    scale = largest.abs() / (half - 1) if form.bits == 8 else largest / -half
    scale = scale.to(getattr(torch, form.scale_dtype))  # before the values follow from it
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    values = (groups / scale.float()[..., None]).round_().clamp_(-half, half - 1).add_(half)
    return pack_columns(values.to(torch.uint8).flatten(1), form.bits), scale
