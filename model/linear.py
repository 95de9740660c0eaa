"""The one product of activations and weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Linear"]

_CASCADE = 4096


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
            out = _matrix_vector(self.weight, x)[None]
            return out if self.bias is None else out + self.bias
        return F.linear(x, self.weight, self.bias)


def _matrix_vector(weight: Tensor, x: Tensor) -> Tensor:
    """The product as a sum that Inductor turns into a loop over the weight's rows.

    Args:
        weight: [N, K].
        x: [1, K].

    Returns:
        [N].
    """
    num_rows, width = weight.shape
    # as_strided makes Inductor store x: it would recompute the norm or SiLU before it for each row.
    x = torch.as_strided(x, (width,), (1,))
    # Sums of more than 4096 elements are cascaded, a third slower.
    chunks = next((n for n in range(-(-width // _CASCADE), 17) if width % n == 0), 1)
    if chunks == 1:
        return (weight * x).sum(dim=-1)
    parts = weight.view(num_rows, chunks, -1) * x.view(chunks, -1)
    return parts.sum(dim=-1, dtype=torch.float32).sum(dim=-1).to(weight.dtype)
