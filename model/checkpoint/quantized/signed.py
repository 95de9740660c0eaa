"""Signed bytes with scales, as several libraries store weights of 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ...packed import PackedFormat
from ..pieces import Conversion, Piece
from .modules import Modules

__all__ = ["SCALE_DTYPES", "add_signed", "read_signed"]

SCALE_DTYPES = ("float32", "float16", "bfloat16")

_HALF = 128


def read_signed(modules: Modules, module: str, *, weight: str, scale: str, zero: str) -> None:
    """Reads int8 values q that stand for (q - zero) * scale.

    Args:
        modules: Where they are taken from and go.
        module: Its name.
        weight: Name of q, [N, K] int8.
        scale: Name of the scales: [1], or [N, G] of G groups a row.
        zero: Name of the zero points, int8 in the shape of the scales; they may be absent.

    Raises:
        ValueError: A tensor is missing, misshaped or of another dtype.
    """
    num_rows, width = modules.size(module)
    found = modules.find(module, scale)
    one = found is not None and found.shape == (1,)
    num_groups = found.shape[1] if found is not None and len(found.shape) == 2 else 1
    if not num_groups or width % num_groups:
        raise ValueError(f"{module} has {num_groups} scales for {width} columns; they must divide")
    groups = (num_rows, num_groups)
    stored = (1,) if one else groups
    values = modules.take(module, weight, shape=(num_rows, width), dtypes=("int8",))
    scales = modules.take(module, scale, shape=stored, dtypes=SCALE_DTYPES)
    add_signed(modules, module, values)
    if one:
        modules.compute(
            module,
            "weight_scale",
            [scales],
            lambda stored: stored.reshape(1, 1).expand(groups).contiguous(),
            shape=groups,
            dtype=scales.dtype,
        )
    else:
        modules.keep(module, "weight_scale", scales)
    minimum = None
    if modules.find(module, zero) is not None:
        zeros = modules.take(module, zero, shape=stored, dtypes=("int8",))
        if modules.values(zeros).any():
            minimum = "float32"
            modules.compute(
                module,
                "weight_minimum",
                [zeros, scales],
                lambda zeros, scales: (-(zeros.float() + _HALF) * scales.float()).expand(groups),
                shape=groups,
                dtype=minimum,
            )
    form = PackedFormat(
        bits=8,
        group_size=width // num_groups,
        scale_dtype=scales.dtype,
        minimum_dtype=minimum,
    )
    modules.pack(module, form)


def add_signed(modules: Modules, module: str, weight: Piece) -> None:
    """Adds signed bytes as packed ones.

    Args:
        modules: Where they go.
        module: Its name.
        weight: [N, K] int8.
    """
    conversion = Conversion(apply=_flip_sign, row_shape=weight.shape[1:], dtype="uint8")
    modules.convert(module, "weight_packed", weight, conversion)


def _flip_sign(values: Tensor) -> Tensor:
    return values.view(torch.uint8) ^ _HALF
