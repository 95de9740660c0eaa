"""The GPU's kernels against torch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llamac.model.kernels.live_attention import attend_live
from llamac.model.linear import multiply_one
from llamac.model.tables import causal_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# A few roundings of the result, and in float32 of scores near 10, which exponentials turn into
# relative errors.
ALLOWED_ERROR = {"float32": 4e-6, "float16": 2e-3, "bfloat16": 2e-2}


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "num_tokens", "rows", "head_dim", "positions"),
    [
        (4, 4, 1, 64, 8, [0]),  # a lone token
        (8, 2, 1, 200, 64, [199, 3, 64]),  # slots of different lengths, one of them full
        (6, 2, 1, 300, 80, [100, 299, 450]),  # the last one's window has rolled
        (32, 8, 1, 8192, 128, [8191]),
        (8, 2, 5, 130, 16, [60]),
        (8, 1, 33, 512, 128, [479]),  # a chunk that ends in the last row
        (32, 8, 128, 8192, 128, [5000]),
        (4, 2, 16, 100, 256, [0, 84]),
    ],
)
def test_live_rows_alone_are_attended(
    dtype: str,
    heads: int,
    kv_heads: int,
    num_tokens: int,
    rows: int,
    head_dim: int,
    positions: list[int],
):
    torch.manual_seed(0)
    batch = len(positions)
    options = {"dtype": getattr(torch, dtype), "device": "cuda"}
    q = torch.randn(batch, num_tokens, heads, head_dim, **options).transpose(1, 2)
    k, v = (torch.randn(batch, kv_heads, rows, head_dim, **options) for _ in range(2))
    starts = torch.tensor(positions, device="cuda")
    mask = causal_mask(starts, num_tokens, rows)
    expected = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), mask, enable_gqa=True
    ).transpose(1, 2)

    dead = ~mask[:, :, -1, :, None]  # rows past the last token's
    k, v = k.masked_fill(dead, float("nan")), v.masked_fill(dead, float("nan"))
    out = attend_live(q, k, v, starts, mask)
    assert out.shape == (batch, num_tokens, heads, head_dim)
    assert out.is_contiguous()
    assert relative_error(out, expected) < ALLOWED_ERROR[dtype]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("width", "num_rows"), [(1, 1), (65, 7), (2048, 256), (5632, 2049)])
def test_one_row_times_a_weight(dtype: str, width: int, num_rows: int):
    torch.manual_seed(0)
    options = {"dtype": getattr(torch, dtype), "device": "cuda"}
    x, weight = torch.randn(1, width, **options), torch.randn(num_rows, width, **options)
    out = multiply_one(x, weight)
    assert out.shape == (1, num_rows)
    expected = x.double() @ weight.double().t()
    assert relative_error(out, expected) < ALLOWED_ERROR[dtype]
