"""The GPU's kernels are compiled for an H100, which Triton does without one.

The interpreter takes types that the compiler refuses, and has no bfloat16 product of matrices.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gpu_kernels import INTERPRETED

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled for the GPU"),
    pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in this process"),
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]

SHARED_MEMORY = 227 << 10  # of one program
HEADS, KV_HEADS, HEAD_DIM, WIDTH, INNER = 32, 8, 64, 2048, 8192


class H100:
    """As much of Triton's driver as compiling needs."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What the calls within a test compiled, instead of running it."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    found: list[Any] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options) -> None:
        found.append(run(self, *args, grid=grid, warmup=True, **options))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", H100())
    return found


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")
@pytest.mark.parametrize(("dtype", "batch"), [("bfloat16", 1), ("bfloat16", 8), ("float16", 8)])
def test_a_decode_step_compiles(
    monkeypatch: pytest.MonkeyPatch, kernels: list[Any], dtype: str, batch: int
):
    from llamac.model.kernels import attention_gpu, product_gpu, rows_gpu
    from llamac.model.kernels.layer_gpu import multiply_gate_up_on_gpu, multiply_qkv_on_gpu

    overlaps = {"OVERLAPS": True, "launch_pdl": True}
    for module in (attention_gpu, product_gpu, rows_gpu):
        monkeypatch.setattr(module, "overlap", lambda _: overlaps)
    monkeypatch.setattr(attention_gpu, "_num_processors", lambda _: 132 * batch)

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=getattr(torch, dtype))

    x, gain, inner = empty(batch, WIDTH), empty(WIDTH), empty(batch, INNER)
    given = x, gain if batch == 1 else None, 1e-5
    num_rows = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    weight, bias = empty(num_rows, WIDTH), empty(num_rows)
    cache = [empty(batch, KV_HEADS, 4096, HEAD_DIM) for _ in "kv"]
    cos = torch.empty(batch, 1, HEAD_DIM // 2)
    index = torch.empty(batch, dtype=torch.int64)
    for used in (bias, None):
        q = multiply_qkv_on_gpu(*given, weight, used, cos, cos, *cache, index, index)
    counters = torch.empty(64, dtype=torch.int32)
    attention_gpu.attend_on_gpu(q[:, :, None], *cache, index, index, 0.125, counters=counters)
    product_gpu.multiply_on_gpu(x, empty(WIDTH, WIDTH), empty(WIDTH), x)
    multiply_gate_up_on_gpu(*given, empty(2 * INNER, WIDTH), None)
    product_gpu.multiply_on_gpu(inner, empty(WIDTH, INNER), None, x)
    head = {"gain": given[1], "eps": 1e-5, "dtype": torch.float32}
    product_gpu.multiply_on_gpu(x, empty(1000, WIDTH), **head)
    assert len(kernels) == 7
    for kernel in kernels:
        assert kernel.metadata.shared < SHARED_MEMORY
        wide = "cp.async.cg.shared.global" if batch > 1 else "v4.b32"
        assert wide in kernel.asm["ptx"]  # 16 bytes of a weight at a time
        begins, waits, _ = kernel.asm["ptx"].partition("griddepcontrol.wait")
        assert waits or batch > 1
        assert "st.global" not in begins or batch > 1
    rows_gpu.embed_on_gpu(index[:, None], index, empty(50, WIDTH), cos[0], cos[0])
    qkv = empty(batch, num_rows)
    rows_gpu.rotate_and_write_on_gpu(qkv, cos, cos, *cache, index, index)
    rows_gpu.multiply_silu_on_gpu(empty(batch, 2 * INNER))
    rows_gpu.normalize_on_gpu(x, gain, 1e-5)
    waiting = ["griddepcontrol.wait" in kernel.asm["ptx"] for kernel in kernels[7:]]
    assert waiting == [False, True, True, True]
