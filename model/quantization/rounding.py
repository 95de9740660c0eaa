"""Rounds weights to 4 or 8 bits, a scale for each group of columns."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checkpoint.quantized.bits import pack_columns
from ..packed import PackedFormat

__all__ = ["round_weight"]


# Scales that are tried, as multiples of that which makes the element of the largest magnitude the
# lowest value: smaller ones clip it and round the others finer, with negative ones it becomes the
# highest. TensorRT takes 8 bits with positive scales alone, so there it becomes what its own sign
# says; scales differ by as much as their dtype can tell, and the luckiest is taken.
_TRIED = {
    4: (1.0, 0.95, 0.9, 0.85, -1.05, -8 / 7),
    8: (1.0, 0.992, 0.984, 0.976, 1.008, 1.016),
}


def round_weight(weight: Tensor, form: PackedFormat) -> tuple[Tensor, Tensor]:
    """Rounds to the nearest values that a format can hold.

    A group gets the scale, of several, with the smallest squared error: of normally distributed
    weights a tenth less.

    Args:
        weight: [N, K] float32.
        form: Without minima and order.

    Returns:
        weight_packed [N, K * bits / 8] uint8 and weight_scale [N, K / g] in the scale's dtype.
    """
    groups = weight.unflatten(1, (-1, form.group_size))  # [N, K / g, g]
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))  # [N, K / g, 1]
    if form.bits == 8:
        largest = -largest.abs()
    half = 2 ** (form.bits - 1)
    dtype = getattr(torch, form.scale_dtype)
    first, *others = _TRIED[form.bits]
    scale, values = _round(groups, largest * (first / -half), dtype, half)
    least = _squared_error(groups, scale, values)
    for factor in others:
        tried, rounded = _round(groups, largest * (factor / -half), dtype, half)
        error = _squared_error(groups, tried, rounded)
        is_better = error < least
        least = torch.where(is_better, error, least)
        scale = torch.where(is_better, tried, scale)
        values = torch.where(is_better, rounded, values)
    packed = pack_columns(values.add_(half).to(torch.uint8).flatten(1), form.bits)
    return packed, scale[..., 0]


def _round(groups: Tensor, scale: Tensor, dtype: torch.dtype, half: int) -> tuple[Tensor, Tensor]:
    """The scale in its dtype, and the values that follow from it."""
    scale = scale.to(dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, (groups / scale.float()).round_().clamp_(-half, half - 1)


def _squared_error(groups: Tensor, scale: Tensor, values: Tensor) -> Tensor:
    return (values * scale.float()).sub_(groups).square_().sum(-1, keepdim=True)
