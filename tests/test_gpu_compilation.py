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
    from llamac.model.kernels import attention_gpu
    from llamac.model.kernels.layer_gpu import multiply_gate_up_on_gpu, multiply_qkv_on_gpu
    from llamac.model.kernels.product_gpu import multiply_on_gpu

    monkeypatch.setattr(attention_gpu, "_num_processors", lambda _: 132 * batch)

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=getattr(torch, dtype))

    hidden, gain, inner = empty(batch, WIDTH), empty(WIDTH), empty(batch, INNER)
    rows = [n * HEAD_DIM for n in (HEADS, KV_HEADS, KV_HEADS)]
    weights, biases = [empty(n, WIDTH) for n in rows], [empty(n) for n in rows]
    caches = [empty(batch, KV_HEADS, 4096, HEAD_DIM) for _ in "kv"]
    cos = torch.empty(batch, 1, HEAD_DIM // 2)
    index = torch.empty(batch, dtype=torch.int64)
    for used in (biases, []):
        q = multiply_qkv_on_gpu(hidden, gain, 1e-5, weights, used, cos, cos, *caches, index, index)
    counters = torch.empty(64, dtype=torch.int32)
    attention_gpu.attend_on_gpu(q[:, :, None], *caches, index, index, 0.125, counters=counters)
    multiply_on_gpu(hidden, weights[0], biases[0], hidden)
    multiply_gate_up_on_gpu(hidden, gain, 1e-5, [empty(INNER, WIDTH)] * 2, [])
    multiply_on_gpu(inner, empty(WIDTH, INNER), None, hidden)
    assert len(kernels) == 6
    for kernel in kernels:
        assert kernel.metadata.shared < SHARED_MEMORY
        wide = "cp.async.cg.shared.global" if batch > 1 else "v4.b32"
        assert wide in kernel.asm["ptx"]  # 16 bytes of a weight at a time
