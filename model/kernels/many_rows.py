"""Products of many rows in float32 on a CPU, by the library that is fastest on its processor."""

from __future__ import annotations

import torch
from torch import Tensor

from ..toolchain import is_amd

__all__ = ["multiply_many"]

_library = torch.library.Library("llamac", "FRAGMENT")
# Not a custom_op, whose first call imports Dynamo.
_library.define(
    "multiply_many(Tensor x, Tensor weight) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


def multiply_many(x: Tensor, weight: Tensor) -> Tensor:
    """Multiplies: x @ weight.T.

    Args:
        x: [M, K] float32.
        weight: [N, K] float32.

    Returns:
        [M, N], contiguous.
    """
    return torch.ops.llamac.multiply_many(x, weight)


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    if is_amd() and torch.backends.mkldnn.is_available():
        # MKL leaves a sixth of an AMD's arithmetic unused, and more on the newest.
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    # With the weight's rows as the result's rows MKL is faster.
    return torch.mm(weight, x.t()).t().contiguous()


def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight))


_library.impl("multiply_many", _multiply, "CPU")
torch.library.register_fake("llamac::multiply_many", _fake, lib=_library)
