"""The one product of activations and weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Linear"]


class Linear(nn.Module):
    """x @ weight.T + bias, with HF's [out, in] weight.

    Every weight product of the model goes through this class, so that other forms (quantized,
    tensor-parallel) have one place to live.

    Args:
        in_features: Width of x.
        out_features: Width of the result.
        bias: Whether there is a bias.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies.

        One row on a CPU is a matrix-vector product, bound by reading the weight; the code
        Inductor generates for the written-out sum reads it about twice as fast as the BLAS call.
        Eager mode would materialize the product, so it takes the BLAS call.

        Args:
            x: [M, in_features].

        Returns:
            [M, out_features] in x's dtype.
        """
        one_row = x.shape[0] == 1 and x.device.type == "cpu"
        if one_row and torch.compiler.is_dynamo_compiling():
            out = (self.weight * x).sum(dim=-1)[None]
            return out if self.bias is None else out + self.bias
        return F.linear(x, self.weight, self.bias)
