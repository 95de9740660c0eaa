"""The GPU's kernels against torch in float64: on a GPU, or on a CPU in Triton's interpreter.

The interpreter is chosen when Triton is imported, so that without a GPU the cases run in a process
of their own.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llamac.model.cache import quantize_rows
from llamac.model.kernels.gpu_operators import multiply_rows
from llamac.model.kernels.live_attention import attend_live
from llamac.model.kernels.packed_product import multiply_packed
from llamac.model.tables import causal_mask
from packed_weight import PackedWeight

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
anywhere = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()),
    reason="no CUDA device; test_the_kernels_in_tritons_interpreter runs this",
)

# A few roundings of the result, and in float32 of scores near 10, which exponentials turn into
# relative errors.
ALLOWED_ERROR = {"float32": 4e-6, "float16": 2e-3, "bfloat16": 2e-2}

DTYPES = [
    "float32",
    "float16",
    pytest.param(
        "bfloat16",
        marks=pytest.mark.skipif(INTERPRETED, reason="the interpreter's bfloat16 dot is garbage"),
    ),
]


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected).abs().max() / expected.abs().max())


def check_attention(
    attend: Callable[..., torch.Tensor],
    dtype: str,
    num_heads: tuple[int, int],
    num_tokens: int,
    rows: int,
    head_dim: int,
    positions: list[int],
    *,
    in_int8: bool = False,
) -> None:
    """Compares with torch; whatever no query may see is NaN, one whole slot among it."""
    torch.manual_seed(0)
    batch = len(positions)
    heads, kv_heads = num_heads
    options = {"dtype": getattr(torch, dtype), "device": DEVICE}
    q = torch.randn(batch, num_tokens, heads, head_dim, **options).transpose(1, 2)
    k, v = (torch.randn(batch, kv_heads, rows, head_dim, **options) for _ in range(2))
    stored = [quantize_rows(x) for x in (k, v)] if in_int8 else []
    if stored:
        k, v = ((rows * own[..., None]).to(q.dtype) for rows, own in stored)
    starts = torch.tensor(positions, device=DEVICE)
    mask = causal_mask(starts, num_tokens, rows)
    scale = 0.7 * head_dim**-0.5
    expected = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), mask, scale=scale, enable_gqa=True
    ).transpose(1, 2)

    dead = ~mask[:, :, -1, :, None]  # rows past the last token's
    slots = torch.arange(batch, 0, -1, device=DEVICE)  # in another order, the first unused
    caches = [torch.full((batch + 1, *x.shape[1:]), float("nan"), **options) for x in (k, v)]
    for cache, x in zip(caches, (k, v), strict=True):
        cache[slots] = x.masked_fill(dead, float("nan"))
    scales: list[torch.Tensor] = []
    if stored:
        scales = [torch.full(cache.shape[:-1], float("nan"), device=DEVICE) for cache in caches]
        caches = [torch.full(cache.shape, 99, dtype=torch.int8, device=DEVICE) for cache in caches]
        for cache, scale_cache, (rows_of, own) in zip(caches, scales, stored, strict=True):
            cache[slots] = rows_of
            scale_cache[slots] = own.masked_fill(dead[..., 0], float("nan"))
    counters = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    out = attend(q, *caches, starts, slots, scale, *scales, counters=counters)
    assert not counters.any()
    assert out.shape == (batch, num_tokens, heads, head_dim)
    assert out.is_contiguous()
    assert relative_error(out, expected) < ALLOWED_ERROR[dtype]


@anywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_processors", [1, 64])  # one split, several
@pytest.mark.parametrize(
    ("heads", "kv_heads", "num_tokens", "rows", "head_dim", "positions"),
    [
        (2, 2, 1, 64, 16, [0]),  # a lone token
        (6, 2, 1, 150, 80, [100, 149, 450]),  # slots of different lengths; a rolled window
        (8, 2, 1, 130, 64, [129, 3, 64]),
        (8, 1, 9, 100, 96, [91]),  # a chunk that ends in the last row
        (4, 1, 5, 130, 128, [60]),
    ],
)
def test_live_rows_alone_are_attended(
    monkeypatch: pytest.MonkeyPatch,
    num_processors: int,
    dtype: str,
    heads: int,
    kv_heads: int,
    num_tokens: int,
    rows: int,
    head_dim: int,
    positions: list[int],
):
    from llamac.model.kernels import attention_gpu

    monkeypatch.setattr(attention_gpu, "_num_processors", lambda _: num_processors)

    sizes = (heads, kv_heads), num_tokens, rows, head_dim, positions
    check_attention(attention_gpu.attend_on_gpu, dtype, *sizes)
    if dtype == "float32":
        check_attention(attention_gpu.attend_on_gpu, dtype, *sizes, in_int8=True)


@anywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_x", [1, 3, 16])
@pytest.mark.parametrize(("width", "num_rows"), [(1, 1), (65, 7), (2100, 35)])
def test_a_few_rows_times_a_weight(width: int, num_rows: int, num_x: int, dtype: str):
    from llamac.model.kernels.product_gpu import multiply_on_gpu

    check_product(multiply_on_gpu, dtype=dtype, num_x=num_x, width=width, num_rows=num_rows)


def check_product(
    multiply: Callable[..., torch.Tensor], *, dtype: str, num_x: int, width: int, num_rows: int
) -> None:
    torch.manual_seed(0)
    sizes = (num_x, width), (num_rows, width), (num_rows,), (num_x, num_rows)
    options = {"dtype": getattr(torch, dtype), "device": DEVICE}
    x, weight, bias, residual = (torch.randn(size, **options) for size in sizes)
    product = x.double() @ weight.double().t()
    for rest in ((), (bias,), (None, residual), (bias, residual)):
        out = multiply(x, weight, *rest)
        assert out.shape == (num_x, num_rows)
        assert out.dtype == x.dtype
        expected = product + sum(part.double() for part in rest if part is not None)
        assert relative_error(out, expected) < ALLOWED_ERROR[dtype]


def check_packed(
    multiply: Callable[..., torch.Tensor], *, dtype: str, num_x: int, weight: PackedWeight
) -> None:
    torch.manual_seed(0)
    x = torch.randn(num_x, weight.exact.shape[1]).to(getattr(torch, dtype))
    minimum = weight.minimum.to(DEVICE) if weight.minimum.numel() else None
    out = multiply(x.to(DEVICE), weight.packed.to(DEVICE), weight.scale.to(DEVICE), minimum)
    assert out.shape == (num_x, len(weight.exact))
    assert out.dtype == x.dtype
    assert relative_error(out.cpu(), x.double() @ weight.exact.t()) < ALLOWED_ERROR[dtype]


@anywhere
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("num_x", [1, 3, 16])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_few_rows_times_a_packed_weight(bits: int, num_x: int, dtype: str):
    from llamac.model.kernels.packed_gpu import multiply_packed_on_gpu

    groups = itertools.cycle((16, 32, 64, 128))  # 40: that of the whole row
    scales = itertools.cycle((torch.float32, torch.bfloat16, torch.float16))
    for num_rows, width in ((5, 40), (1, 128), (7, 384), (3, 4224)):
        for with_minimum in (False, True):
            weight = PackedWeight(
                num_rows,
                width,
                bits=bits,
                group=next(groups),
                dtype=next(scales),
                with_minimum=with_minimum,
            )
            check_packed(multiply_packed_on_gpu, dtype=dtype, num_x=num_x, weight=weight)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_kernels_in_tritons_interpreter():
    files = [__file__, Path(__file__).with_name("test_gpu_layer.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        [*command, "-W", "ignore::RuntimeWarning"],  # of numpy's, about values that are not stored
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "91 passed" in done.stdout, done.stdout[-4000:]


class TestOnAGpu:
    """The operators, in the sizes that models have."""

    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize(
        ("heads", "kv_heads", "num_tokens", "rows", "head_dim", "positions"),
        [
            (32, 8, 1, 8192, 128, [8191]),
            (8, 1, 33, 512, 128, [479]),
            (32, 8, 128, 8192, 128, [5000]),
            (4, 2, 16, 100, 256, [0, 84]),
        ],
    )
    def test_attention(
        self,
        dtype: str,
        heads: int,
        kv_heads: int,
        num_tokens: int,
        rows: int,
        head_dim: int,
        positions: list[int],
    ):
        sizes = (heads, kv_heads), num_tokens, rows, head_dim, positions
        check_attention(attend_live, dtype, *sizes)
        check_attention(attend_live, dtype, *sizes, in_int8=True)

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("num_x", [1, 2, 8, 16])
    @pytest.mark.parametrize(("width", "num_rows"), [(2048, 256), (5632, 2049)])
    def test_product(self, dtype: str, width: int, num_rows: int, num_x: int):
        check_product(multiply_rows, dtype=dtype, num_x=num_x, width=width, num_rows=num_rows)

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("num_x", [1, 8, 40])
    @pytest.mark.parametrize(("bits", "with_minimum"), [(4, False), (4, True), (8, False)])
    def test_packed_product(self, bits: int, with_minimum: bool, num_x: int, dtype: str):
        weight = PackedWeight(2049, 2048, bits=bits, with_minimum=with_minimum)

        def multiply(x, packed, scale, minimum):
            minima = [] if minimum is None else [minimum]
            return multiply_packed(x, [packed], [scale], minima)[0]

        check_packed(multiply, dtype=dtype, num_x=num_x, weight=weight)
