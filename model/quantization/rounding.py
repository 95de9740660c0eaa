"""Rounds weights to 4 or 8 bits, a scale for each group of columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint.quantized.bits import pack_columns
from ..packed import PackedFormat

__all__ = ["InputMoments", "input_moments", "round_for_inputs", "round_weight"]

# Scales that are tried, as multiples of that which makes the element of the largest magnitude the
# lowest value: smaller ones clip it and round the others finer, with negative ones it becomes the
# highest. TensorRT takes 8 bits with positive scales alone, so there it becomes what its own sign
# says; scales differ by as much as their dtype can tell, and the luckiest is taken.
_TRIED = {
    4: (1.0, 0.95, 0.9, 0.85, -1.05, -8 / 7),
    8: (1.0, 0.992, 0.984, 0.976, 1.008, 1.016),
}
# Where it is known which columns matter, clipping others may gain more.
_TRIED_FOR_INPUTS = {
    4: tuple(sign * f for f in (1, 1.05, 0.95, 0.9, 0.85, 0.8, 0.75, 8 / 7) for sign in (1, -1)),
    8: _TRIED[8],
}
# Columns whose errors make up for each other; twice as many gained nothing.
_BLOCK_COLUMNS = 1024
_CACHED_ELEMENTS = 1 << 17  # whose temporaries stay in a core's cache
_LAZY_COLUMNS = 32  # that are made up for at once in all that follow
_DAMPING = 0.1  # of the mean second moment, added to each: so few tokens don't tell it all


@dataclass(frozen=True, slots=True)
class InputMoments:
    """What a block of a weight's columns is multiplied with.

    Attributes:
        squares: [k] mean squares, damped.
        order: [k] int64, the columns with the largest first.
        factor: [k, k], in that order the upper Cholesky factor of the inverse of the mean products
            of two columns, damped.
    """

    squares: Tensor
    order: Tensor
    factor: Tensor


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
    scale = _best_scale(groups, form, _TRIED[form.bits])
    values = _round(groups, scale.float(), form)
    return _pack(values.flatten(1), form), scale[..., 0]


def input_moments(x: Tensor) -> list[InputMoments]:
    """Describes what a weight is multiplied with, for round_for_inputs.

    Args:
        x: [M, K] float32.

    Returns:
        Of each block of columns.
    """
    found = []
    for part in x.split(_BLOCK_COLUMNS, dim=1):
        products = (part.t() @ part).div_(len(part))
        mean = products.diagonal().mean()
        if not 0 < mean < float("inf"):  # nothing is known of them
            products, mean = torch.eye(len(products)), torch.ones(())
        products.diagonal().add_(_DAMPING * mean)
        squares = products.diagonal().clone()
        order = squares.argsort(descending=True, stable=True)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(products[order][:, order]))
        found.append(InputMoments(squares, order, torch.linalg.cholesky(inverse, upper=True)))
    return found


def round_for_inputs(
    weight: Tensor, form: PackedFormat, moments: Sequence[InputMoments]
) -> tuple[Tensor, Tensor]:
    """Rounds so that products with such inputs change little.

    A group gets the scale, of several, with the smallest squared error, of which a column's counts
    by its mean square. Then the columns are rounded, those with the largest inputs first, and the
    error of each is made up for by those that aren't rounded yet, as GPTQ does (arXiv 2210.17323).

    Args:
        weight: [N, K] float32, any rows.
        form: Without minima and order.
        moments: Of the inputs.

    Returns:
        As round_weight does.
    """
    packed, scales = [], []
    for own, block in zip(moments, weight.split(_BLOCK_COLUMNS, dim=1), strict=True):
        groups = block.unflatten(1, (-1, form.group_size))
        importance = own.squares.view(-1, form.group_size)
        scale = _best_scale(groups, form, _TRIED_FOR_INPUTS[form.bits], importance)[..., 0]
        scales.append(scale)
        group_of = own.order // form.group_size
        steps = scale.float().t()[group_of]  # [k, N], as whole columns are used
        rest, values = block.t()[own.order], torch.empty_like(steps)
        for first in range(0, len(rest), _LAZY_COLUMNS):
            part = slice(first, first + _LAZY_COLUMNS)
            columns, triangle = rest[part], own.factor[part, part]
            errors = torch.empty_like(columns)
            for i, (column, step) in enumerate(zip(columns, steps[part], strict=True)):
                value = _round(column, step, form)
                values[first + i] = value
                error = torch.addcmul(column, value, step, value=-1).div_(triangle[i, i])
                columns[i + 1 :].addr_(triangle[i, i + 1 :], error, alpha=-1)
                errors[i] = error
            later = own.factor[part, first + _LAZY_COLUMNS :]
            rest[first + _LAZY_COLUMNS :].addmm_(later.t(), errors, alpha=-1)
        in_place = torch.empty_like(values).index_copy_(0, own.order, values)
        packed.append(_pack(in_place.t(), form))
    return torch.cat(packed, dim=1), torch.cat(scales, dim=1)


def _best_scale(
    groups: Tensor, form: PackedFormat, tried: Sequence[float], importance: Tensor | None = None
) -> Tensor:
    """[N, G, 1] in the scales' dtype, of groups [N, G, g] whose columns count by [G, g]."""
    rows = max(1, _CACHED_ELEMENTS // groups[0].numel())
    return torch.cat([_best_of(part, form, tried, importance) for part in groups.split(rows)])


def _best_of(
    groups: Tensor, form: PackedFormat, tried: Sequence[float], importance: Tensor | None
) -> Tensor:
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    if form.bits == 8:
        largest = -largest.abs()
    lowest, dtype = -(2 ** (form.bits - 1)), getattr(torch, form.scale_dtype)
    best = least = None
    for multiple in tried:
        scale = (largest * (multiple / lowest)).to(dtype)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        step = scale.float()
        squares = _round(groups, step, form).mul_(step).sub_(groups).square_()
        if importance is not None:
            squares *= importance
        error = squares.sum(-1, keepdim=True)
        if best is None or least is None:
            best, least = scale, error
            continue
        is_better = error < least
        least = torch.where(is_better, error, least)
        best = torch.where(is_better, scale, best)
    assert best is not None
    return best


def _round(weight: Tensor, step: Tensor, form: PackedFormat) -> Tensor:
    """The values that a scale leads to, in float32."""
    half = 2 ** (form.bits - 1)
    return (weight / step).round_().clamp_(-half, half - 1)


def _pack(values: Tensor, form: PackedFormat) -> Tensor:
    """[N, K] to bytes."""
    return pack_columns((values + 2 ** (form.bits - 1)).to(torch.uint8), form.bits)
