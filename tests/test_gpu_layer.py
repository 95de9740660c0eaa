"""A step in our own kernels: each against torch in float64, together against the eager model.

Without a GPU they run where test_gpu_kernels.py's do.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_gpu_kernels import ALLOWED_ERROR, DEVICE, INTERPRETED, anywhere, on_gpu, relative_error

from llamac.model.cache import KVCache
from llamac.model.config import LlamaConfig
from llamac.model.llama import Llama, TorchAttention
from llamac.model.tables import rotate

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


def rows_and_gain(dtype: str, batch: int, width: int) -> tuple[torch.Tensor, ...]:
    """Hidden states and a norm's weight, so large that their product overflows float16."""
    hidden, gain = randoms(dtype, (batch, width), (width,))
    return 5000 * hidden, 5 * gain


def given_to_a_kernel(hidden: torch.Tensor, gain: torch.Tensor) -> tuple:
    """A single row is normalized by the kernel itself."""
    from llamac.model.kernels.rows_gpu import normalize_on_gpu

    if len(hidden) == 1:
        return hidden, gain, EPS
    return normalize_on_gpu(hidden, gain, EPS), None, EPS


def check_qkv(heads: int, kv_heads: int, head_dim: int, width: int, batch: int) -> None:
    from llamac.model.kernels.layer_gpu import multiply_qkv_on_gpu

    for dtype, with_bias in zip(dtypes_of(batch), (True, False, True), strict=False):
        rows = [n * head_dim for n in (heads, kv_heads, kv_heads)]
        hidden, gain = rows_and_gain(dtype, batch, width)
        weight, bias = randoms(dtype, (sum(rows), width), (sum(rows),))
        cos, sin = randoms("float32", *[(batch, 1, head_dim // 2)] * 2)
        slots = torch.arange(batch, 0, -1, device=DEVICE)
        write_indices = (slots * 5 + 2) % MAX_SEQ_LEN
        shape = (batch + 1, kv_heads, MAX_SEQ_LEN, head_dim)
        caches = [torch.full(shape, float("nan"), device=DEVICE).to(hidden.dtype) for _ in "kv"]
        given = given_to_a_kernel(hidden, gain)
        weights = weight, bias if with_bias else None
        q = multiply_qkv_on_gpu(*given, *weights, cos, sin, *caches, write_indices, slots)

        both = normalized(hidden, gain) @ weight.double().t() + (bias if with_bias else 0)
        parts = [part.view(batch, 1, -1, head_dim) for part in both.split(rows, dim=1)]
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


def check_gate_up(num_rows: int, width: int, batch: int) -> None:
    from llamac.model.kernels.layer_gpu import multiply_gate_up_on_gpu

    for dtype, with_bias in zip(dtypes_of(batch), (True, False, True), strict=False):
        hidden, gain = rows_and_gain(dtype, batch, width)
        weight, bias = randoms(dtype, (2 * num_rows, width), (2 * num_rows,))
        weight /= width**0.5
        given = given_to_a_kernel(hidden, gain)
        out = multiply_gate_up_on_gpu(*given, weight, bias if with_bias else None)
        both = normalized(hidden, gain) @ weight.double().t() + (bias if with_bias else 0)
        gate, up = both.chunk(2, dim=1)
        assert out.shape == (batch, num_rows)
        assert out.dtype == hidden.dtype
        assert relative_error(out, F.silu(gate) * up) < ALLOWED_ERROR[dtype]


@anywhere
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "width", "batch"), LAYERS)
def test_q_k_and_v_of_a_norm(heads: int, kv_heads: int, head_dim: int, width: int, batch: int):
    torch.manual_seed(0)
    check_qkv(heads, kv_heads, head_dim, width, batch)


@anywhere
@pytest.mark.parametrize(
    ("num_rows", "width", "batch"), [(1, 1, 1), (5, 2050, 1), (7, 300, 3), (40, 33, 16)]
)
def test_gate_and_up_of_a_norm(num_rows: int, width: int, batch: int):
    torch.manual_seed(0)
    check_gate_up(num_rows, width, batch)


@anywhere
@pytest.mark.parametrize(("rows", "width"), [(1, 3), (5, 2050)])
@pytest.mark.parametrize("dtype", list(ALLOWED_ERROR))
def test_rows_between_products(dtype: str, rows: int, width: int):
    from llamac.model.kernels.rows_gpu import multiply_silu_on_gpu, normalize_on_gpu

    torch.manual_seed(0)
    hidden, gain = rows_and_gain(dtype, rows, width)
    out = normalize_on_gpu(hidden, gain, EPS)
    assert relative_error(out, normalized(hidden, gain)) < ALLOWED_ERROR[dtype]
    (both,) = randoms(dtype, (rows, 2 * width))
    gate, up = both.double().chunk(2, dim=1)
    assert relative_error(multiply_silu_on_gpu(both), F.silu(gate) * up) < ALLOWED_ERROR[dtype]


@anywhere
@pytest.mark.parametrize("dtype", list(ALLOWED_ERROR))
def test_a_step_begins_with_lookups(dtype: str):
    from llamac.model.kernels.rows_gpu import embed_on_gpu

    (table,), (cos, sin) = randoms(dtype, (20, 1030)), randoms("float32", (50, 3), (50, 3))
    ids = torch.tensor([[3, 19], [0, 4], [4, 4]], device=DEVICE)
    positions = torch.tensor([0, 48, 7], device=DEVICE)
    hidden, *angles = embed_on_gpu(ids, positions, table, cos, sin)
    assert torch.equal(hidden, table[ids.flatten()])
    for out, source in zip(angles, (cos, sin), strict=True):
        assert torch.equal(out, source[torch.stack((positions, positions + 1), dim=1)])


@anywhere
@pytest.mark.parametrize("dtype", list(ALLOWED_ERROR))
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "tokens"), [(3, 1, 6, 4), (8, 8, 64, 1), (9, 2, 128, 2)]
)
def test_a_chunk_is_rotated_and_written(
    heads: int, kv_heads: int, head_dim: int, tokens: int, dtype: str
):
    from llamac.model.kernels.rows_gpu import rotate_and_write_on_gpu

    torch.manual_seed(0)
    (qkv,) = randoms(dtype, (2 * tokens, (heads + 2 * kv_heads) * head_dim))
    cos, sin = randoms("float32", *[(2, tokens, head_dim // 2)] * 2)
    caches = [torch.full((3, kv_heads, 7, head_dim), float("nan"), device=DEVICE) for _ in "kv"]
    caches = [cache.to(qkv.dtype) for cache in caches]
    slots, first = torch.tensor([2, 0], device=DEVICE), torch.tensor([3, 0], device=DEVICE)
    q = rotate_and_write_on_gpu(qkv, cos, sin, *caches, first, slots)

    parts = qkv.view(2, tokens, -1, head_dim).split([heads, kv_heads, kv_heads], dim=2)
    parts = [rotate(parts[0], cos, sin), rotate(parts[1], cos, sin), parts[2]]
    rows = first[:, None] + torch.arange(tokens, device=DEVICE)
    written = [q.transpose(1, 2), *(cache[slots[:, None], :, rows] for cache in caches)]
    for out, expected in zip(written, parts, strict=True):
        assert relative_error(out, expected) < ALLOWED_ERROR[dtype]
    for cache in caches:
        cache[slots[:, None], :, rows] = float("nan")
        assert cache.isnan().all()


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


def stepped(model: Llama, batch: int, tokens: int, *, own: bool, dead_value: float = 0.0):
    """[B, V] logits of the last of a few tokens of each slot.

    The first slot was empty, the second is full now, and a single token's third window rolled.
    """
    device = model.cos.device
    full = MAX_SEQ_LEN - tokens
    positions = torch.tensor([0, full, 40 if tokens == 1 else 1] * 6)[:batch]
    cache = KVCache.allocate(model.config, batch, MAX_SEQ_LEN, dtype=model.dtype, device=device)
    dead = torch.arange(MAX_SEQ_LEN) >= positions[:, None]  # [B, S]
    generator = torch.Generator().manual_seed(1)
    slots = torch.arange(batch - 1, -1, -1)
    for buffer in cache.buffers:
        rows = torch.randn(buffer.shape, generator=generator)
        rows = rows.masked_fill(dead[:, None, :, None], dead_value)
        buffer[slots] = rows.to(buffer)
    ids = torch.randint(0, 50, (batch, tokens), generator=generator)
    wanted = torch.full((batch, 1), tokens - 1)
    given = ids, positions, positions % MAX_SEQ_LEN, wanted, slots
    *inputs, slots = (x.to(device) for x in given)
    attention = TorchAttention().to(device)
    with torch.no_grad():
        if own:
            from llamac.model.gpu_step import run_on_gpu

            logits = run_on_gpu(model, attention, cache, *inputs, slots)
        else:
            logits = model(*inputs, cache, attention, slots=slots)
    assert logits.shape == (batch, 1, 50)
    assert logits.dtype == torch.float32 or not own
    return logits[:, 0].cpu()


STEPS = [
    ("float32", 1, 1, False),
    ("float16", 1, 1, True),
    ("float32", 3, 1, True),
    ("float16", 16, 1, True),
    ("float32", 1, 9, False),
    ("float32", 3, 6, True),
    ("float16", 18, 1, False),
]


def check_step(dtype: str, batch: int, tokens: int, bias: bool) -> None:
    exact = stepped(tiny_model(dtype, bias=bias).double(), batch, tokens, own=False)
    model = tiny_model(dtype, bias=bias).to(DEVICE)
    model.join_weights()
    logits = stepped(model, batch, tokens, own=True, dead_value=float("nan"))
    assert relative_error(logits, exact) < 10 * ALLOWED_ERROR[dtype]


@anywhere
@pytest.mark.parametrize(("dtype", "batch", "tokens", "bias"), STEPS)
def test_a_step_in_our_kernels_equals_the_eager_model(
    monkeypatch: pytest.MonkeyPatch, dtype: str, batch: int, tokens: int, bias: bool
):
    from llamac.model.kernels import attention_gpu

    monkeypatch.setattr(attention_gpu, "_num_processors", lambda _: 64)
    check_step(dtype, batch, tokens, bias)


class TestOnAGpu:
    """In the sizes that models have, and which models take them."""

    pytestmark = on_gpu

    @pytest.mark.parametrize("batch", [1, 2, 8, 16])
    @pytest.mark.parametrize(
        ("heads", "kv_heads", "head_dim", "width"),
        [(32, 8, 64, 2048), (32, 8, 128, 4096), (9, 3, 64, 576), (32, 32, 80, 2560)],
    )
    def test_qkv(self, heads: int, kv_heads: int, head_dim: int, width: int, batch: int):
        check_qkv(heads, kv_heads, head_dim, width, batch)

    @pytest.mark.parametrize("batch", [1, 2, 8, 16])
    @pytest.mark.parametrize(("num_rows", "width"), [(8192, 2048), (1537, 576)])
    def test_gate_up(self, num_rows: int, width: int, batch: int):
        check_gate_up(num_rows, width, batch)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize(
        ("batch", "tokens"), [(1, 1), (3, 1), (16, 1), (18, 1), (1, 9), (3, 6)]
    )
    def test_a_step(self, dtype: str, batch: int, tokens: int):
        check_step(dtype, batch, tokens, bias=True)

    def test_models_that_fit(self):
        from llamac.model.gpu_step import fits_gpu

        model = tiny_model("bfloat16").to("cuda")

        def fits(dtype: torch.dtype) -> bool:
            cache = KVCache.allocate(model.config, 1, 9, dtype=dtype, device="cuda")
            return fits_gpu(model, cache)

        assert not fits(torch.bfloat16)  # not joined
        model.join_weights()
        assert fits(torch.bfloat16)
        assert not fits(torch.int8)
        model.model.norm.float()
        assert not fits(torch.bfloat16)
