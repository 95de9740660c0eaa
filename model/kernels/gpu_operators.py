"""The operator of products of few rows on a GPU; its kernel is Triton's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["multiply_rows"]

_library = torch.library.Library("llamac", "FRAGMENT")
_library.define(
    "multiply_rows(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def multiply_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Does what product_gpu.multiply_on_gpu does."""
    return torch.ops.llamac.multiply_rows(x, weight, bias)


def _multiply_rows(*given: Any) -> Tensor:
    from .product_gpu import multiply_on_gpu

    return multiply_on_gpu(*given)


def _fake_rows(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(len(x), len(weight))


_library.impl("multiply_rows", _multiply_rows, "CUDA")
torch.library.register_fake("llamac::multiply_rows", _fake_rows, lib=_library)
