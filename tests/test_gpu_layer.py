"""A decoder layer in five kernels: each against torch in float64, together against the layer.

Without a GPU they run where test_gpu_kernels.py's do.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_gpu_kernels import ALLOWED_ERROR, DEVICE, INTERPRETED, anywhere, on_gpu, relative_error

from llamac.model import decode_layer
from llamac.model.cache import KVCache
from llamac.model.config import LlamaConfig
from llamac.model.kernels.gpu_operators import multiply_gate_up, multiply_qkv
from llamac.model.llama import Llama, TorchAttention

EPS = 1e-5
MAX_SEQ_LEN = 9

# The heads of q, those of k, D, E and B.
LAYERS = [
    (3, 3, 16, 70, 1),
    (2, 2, 16, 2050, 1),  # more columns than one block has
    (8, 1, 64, 32, 2),
    (6, 2, 80, 300, 3),
    (4, 4, 96, 64, 16),
    (4, 1, 128, 33, 2),
]


def dtypes_of(batch: int) -> list[str]:
    """The interpreter's bfloat16 product of matrices is garbage."""
    return [dtype for dtype in ALLOWED_ERROR if batch == 1 or not INTERPRETED or "bf" not in dtype]


def randoms(dtype: str, *sizes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(size, dtype=getattr(torch, dtype), device=DEVICE) for size in sizes]


def normalized(hidden: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(hidden.double(), hidden.shape[-1:], gain.double(), EPS)


def check_qkv(multiply, heads: int, kv_heads: int, head_dim: int, width: int, batch: int) -> None:
    """Some biases, some inputs so large that x * gain overflows float16."""
    for dtype, with_bias in zip(dtypes_of(batch), (True, False, True), strict=False):
        rows = [n * head_dim for n in (heads, kv_heads, kv_heads)]
        hidden, gain = randoms(dtype, (batch, width), (width,))
        hidden *= 1000 if with_bias else 5000
        gain *= 5
        weights = randoms(dtype, *((n, width) for n in rows))
        biases = randoms(dtype, *((n,) for n in rows)) if with_bias else []
        cos, sin = randoms("float32", *[(batch, 1, head_dim // 2)] * 2)
        slots = torch.arange(batch, 0, -1, device=DEVICE)
        write_indices = (slots * 5 + 2) % MAX_SEQ_LEN
        shape = (batch + 1, kv_heads, MAX_SEQ_LEN, head_dim)
        caches = [torch.full(shape, float("nan"), device=DEVICE).to(hidden.dtype) for _ in "kv"]
        q = multiply(hidden, gain, EPS, weights, biases, cos, sin, *caches, write_indices, slots)

        x = normalized(hidden, gain)
        parts = [x @ weight.double().t() for weight in weights]
        parts = [part + bias for part, bias in zip(parts, biases or (0, 0, 0), strict=True)]
        parts = [part.view(batch, 1, -1, head_dim) for part in parts]
        parts[:2] = [rotated_exactly(part, cos, sin) for part in parts[:2]]
        assert q.shape == (batch, heads, head_dim)
        written = [q, *(cache[slots, :, write_indices] for cache in caches)]
        for out, expected in zip(written, parts, strict=True):
            assert relative_error(out, expected[:, 0]) < ALLOWED_ERROR[dtype]
        for cache in caches:
            cache[slots, :, write_indices] = float("nan")
            assert cache.isnan().all()


def rotated_exactly(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """rotate, in float64."""
    cos, sin = cos.double()[:, :, None], sin.double()[:, :, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def check_gate_up(multiply, num_rows: int, width: int, batch: int) -> None:
    for dtype, with_bias in zip(dtypes_of(batch), (True, False, True), strict=False):
        hidden, gain = randoms(dtype, (batch, width), (width,))
        hidden *= 1000 if with_bias else 5000
        gain *= 5
        weights = randoms(dtype, *[(num_rows, width)] * 2)
        weights = [weight / width**0.5 for weight in weights]
        biases = randoms(dtype, *[(num_rows,)] * 2) if with_bias else []
        out = multiply(hidden, gain, EPS, weights, biases)
        x = normalized(hidden, gain)
        gate, up = (x @ weight.double().t() for weight in weights)
        gate, up = (gate + biases[0], up + biases[1]) if biases else (gate, up)
        assert out.shape == (batch, num_rows)
        assert out.dtype == hidden.dtype
        assert relative_error(out, F.silu(gate) * up) < ALLOWED_ERROR[dtype]


@anywhere
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "width", "batch"), LAYERS)
def test_q_k_and_v_of_a_norm(heads: int, kv_heads: int, head_dim: int, width: int, batch: int):
    from llamac.model.kernels.layer_gpu import multiply_qkv_on_gpu

    torch.manual_seed(0)
    check_qkv(multiply_qkv_on_gpu, heads, kv_heads, head_dim, width, batch)


@anywhere
@pytest.mark.parametrize(
    ("num_rows", "width", "batch"), [(1, 1, 1), (5, 2050, 1), (7, 300, 3), (40, 33, 16)]
)
def test_gate_and_up_of_a_norm(num_rows: int, width: int, batch: int):
    from llamac.model.kernels.layer_gpu import multiply_gate_up_on_gpu

    torch.manual_seed(0)
    check_gate_up(multiply_gate_up_on_gpu, num_rows, width, batch)


def tiny_model(dtype: str, *, bias: bool = False) -> Llama:
    config = LlamaConfig.from_dict(
        {
            "model_type": "llama",
            "hidden_act": "silu",
            "vocab_size": 50,
            "hidden_size": 24,
            "intermediate_size": 20,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": 64,
            "attention_bias": bias,
            "mlp_bias": bias,
        }
    )
    torch.manual_seed(0)
    model = Llama(config, num_positions=64)
    for parameter in model.parameters():
        parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return model.requires_grad_(False)


def decoded(
    model: Llama, batch: int, *, run_layer=decode_layer.call_layer, dead_value: float = 0.0
) -> torch.Tensor:
    """[B, V] logits of a token of each slot: an empty one, a full one, one whose window rolled."""
    device = model.cos.device
    positions = torch.tensor([0, MAX_SEQ_LEN - 1, 40] * 6)[:batch]
    cache = KVCache.allocate(model.config, batch, MAX_SEQ_LEN, dtype=model.dtype, device=device)
    dead = torch.arange(MAX_SEQ_LEN) >= positions[:, None]  # [B, S]
    generator = torch.Generator().manual_seed(1)
    slots = torch.arange(batch - 1, -1, -1)
    for buffer in cache.buffers:
        rows = torch.randn(buffer.shape, generator=generator)
        rows = rows.masked_fill(dead[:, None, :, None], dead_value)
        buffer[slots] = rows.to(buffer)
    ids = torch.randint(0, 50, (batch, 1), generator=generator)
    wanted = torch.zeros(batch, 1, dtype=torch.int64)
    inputs = (x.to(device) for x in (ids, positions, positions % MAX_SEQ_LEN, wanted))
    attention = TorchAttention().to(device)
    with torch.no_grad():
        logits = model(*inputs, cache, attention, slots=slots.to(device), run_layer=run_layer)
    return logits[:, 0].cpu()


@anywhere
@pytest.mark.parametrize(("dtype", "batch", "bias"), [("float32", 1, False), ("float16", 16, True)])
def test_a_decode_step_in_five_kernels_equals_the_eager_model(
    monkeypatch: pytest.MonkeyPatch, dtype: str, batch: int, bias: bool
):
    from llamac.model.kernels import attention_gpu, layer_gpu, product_gpu

    monkeypatch.setattr(attention_gpu, "_num_processors", lambda _: 64)
    monkeypatch.setattr(decode_layer, "attend_live", attention_gpu.attend_on_gpu)
    monkeypatch.setattr(decode_layer, "multiply_qkv", layer_gpu.multiply_qkv_on_gpu)
    monkeypatch.setattr(decode_layer, "multiply_gate_up", layer_gpu.multiply_gate_up_on_gpu)
    monkeypatch.setattr(decode_layer, "multiply_rows", product_gpu.multiply_on_gpu)
    exact = decoded(tiny_model(dtype, bias=bias).double(), batch)
    model = tiny_model(dtype, bias=bias).to(DEVICE)
    logits = decoded(model, batch, run_layer=decode_layer.decode_layer, dead_value=float("nan"))
    assert relative_error(logits, exact) < 10 * ALLOWED_ERROR[dtype]


class TestOnAGpu:
    """The operators, in the sizes that models have, and which steps take them."""

    pytestmark = on_gpu

    @pytest.mark.parametrize("batch", [1, 2, 8, 16])
    @pytest.mark.parametrize(
        ("heads", "kv_heads", "head_dim", "width"),
        [(32, 8, 64, 2048), (32, 8, 128, 4096), (9, 3, 64, 576), (32, 32, 80, 2560)],
    )
    def test_qkv(self, heads: int, kv_heads: int, head_dim: int, width: int, batch: int):
        check_qkv(multiply_qkv, heads, kv_heads, head_dim, width, batch)

    @pytest.mark.parametrize("batch", [1, 2, 8, 16])
    @pytest.mark.parametrize(("num_rows", "width"), [(8192, 2048), (1537, 576)])
    def test_gate_up(self, num_rows: int, width: int, batch: int):
        check_gate_up(multiply_gate_up, num_rows, width, batch)

    @pytest.mark.parametrize("batch", [1, 3, 16])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_a_step_calls_five_kernels_a_layer(self, dtype: str, batch: int):
        model = tiny_model(dtype).to("cuda")
        exact = decoded(tiny_model(dtype).double(), batch)
        with torch.profiler.profile() as profile:
            logits = decoded(model, batch, dead_value=float("nan"))
        assert relative_error(logits, exact) < 10 * ALLOWED_ERROR[dtype]
        calls = {event.key: event.count for event in profile.key_averages()}
        names = ("multiply_qkv", "attend_live", "multiply_gate_up", "multiply_rows")
        counts = [calls[f"llamac::{name}"] for name in names]
        assert counts == [2, 2, 2, 5]  # the head's product, too

    @pytest.mark.parametrize("bias", [False, True])
    def test_a_chunk_meets_joined_weights(self, bias: bool):
        def fed(model: Llama) -> torch.Tensor:
            device = model.cos.device
            cache = KVCache.allocate(model.config, 1, 40, dtype=model.dtype, device=device)
            ids = torch.arange(40)[None]
            inputs = (x.to(device) for x in (ids, *torch.zeros(2, 1, dtype=torch.int64), ids))
            return model(*inputs, cache, TorchAttention().to(device)).cpu()

        exact = fed(tiny_model("float32", bias=bias).double())
        model = tiny_model("float32", bias=bias).to("cuda")
        model.join_weights()
        with torch.profiler.profile() as profile:
            logits = fed(model)
        assert relative_error(logits, exact) < 10 * ALLOWED_ERROR["float32"]
        calls = {event.key: event.count for event in profile.key_averages()}
        assert calls["aten::linear"] == 2 * 4 + 1
