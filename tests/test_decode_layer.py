"""Decoder layers in one operator against the same layer eagerly, in float32."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llamac.model import KVCache, LlamaConfig
from llamac.model.decode_layer import _few_tokens
from llamac.model.kernels.few_rows import layers_few, load_operators
from llamac.model.llama import Llama, TorchAttention
from llamac.model.packed import PackedFormat

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=1,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
)
ROWS = 40
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SIGNED = PackedFormat(bits=4, group_size=32, scale_dtype="float16")
OFFSET = PackedFormat(bits=4, group_size=16, scale_dtype="bfloat16", minimum_dtype="bfloat16")
BYTES = PackedFormat(bits=8, group_size=32, scale_dtype="float32")
PACKED = {
    "self_attn.q_proj": SIGNED,
    "self_attn.k_proj": OFFSET,
    "self_attn.v_proj": BYTES,
    "mlp.up_proj": SIGNED,
    "mlp.down_proj": BYTES,
}  # the others stay plain


def model_of(config: LlamaConfig, packed: dict[str, PackedFormat]) -> Llama:
    torch.manual_seed(0)
    names = {
        f"model.layers.{i}.{name}": form
        for i in range(config.num_hidden_layers)
        for name, form in packed.items()
    }
    model = Llama(config, num_positions=64, packed=names).requires_grad_(False)
    for weight in model.parameters():
        if weight.dtype == torch.uint8:
            weight.random_(0, 256)
        elif weight.dim() == 1:
            weight.copy_(1 + 0.1 * torch.randn(weight.shape))
        else:
            weight.copy_(0.05 * torch.randn(weight.shape))
    return model


def same_cache(cache: KVCache) -> KVCache:
    return KVCache(tuple(tuple(buffer.clone() for buffer in layer) for layer in cache.layers))


def float32_cache(cache: KVCache) -> KVCache:
    return KVCache(
        tuple(
            tuple(b if b.dtype == torch.int8 else b.float() for b in layer)
            for layer in cache.layers
        )
    )


def arguments(model: Llama, dtype: torch.dtype, *, batch: int, tokens: int) -> tuple[Tensor, ...]:
    """Rows at different places, of other slots than their own numbers, one of them rolled."""
    positions = torch.tensor([3, 20, 50][:batch])
    if tokens > 1:
        positions = positions.clamp_max(ROWS - tokens)
    places = positions[:, None] + torch.arange(tokens)
    hidden = torch.randn(batch * tokens, model.config.hidden_size).to(dtype)
    slots = torch.tensor([2, 0, 1][:batch])
    return hidden, model.cos[places], model.sin[places], positions, positions % ROWS, slots


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("packed", [{}, PACKED], ids=["plain", "packed"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "int8-cache"])
def test_the_operator_does_what_the_layer_does(
    dtype: torch.dtype, packed: dict[str, PackedFormat], scaled: bool
):
    assert load_operators() is not None
    for (batch, tokens), bias in itertools.product(((1, 1), (3, 1), (2, 5)), (False, True)):
        config = replace(CONFIG, attention_bias=bias, mlp_bias=bias)
        model = model_of(config, packed)
        for name, parameter in model.named_parameters():
            if not name.rpartition(".")[2].startswith("weight_"):
                parameter.data = parameter.data.to(dtype)
        given = arguments(model, dtype, batch=batch, tokens=tokens)
        cache = KVCache.allocate(config, 3, ROWS, dtype=torch.int8 if scaled else dtype)
        for buffer in cache.buffers:
            buffer.copy_(torch.randn(buffer.shape).abs() if scaled else torch.randn(buffer.shape))
        own, expected_cache = same_cache(cache), float32_cache(same_cache(cache))
        out = _few_tokens([*model.model.layers], own.layers, *given)
        assert out.dtype == dtype

        exact = model_of(config, packed)
        for parameter, rounded in zip(exact.parameters(), model.parameters(), strict=True):
            parameter.data = rounded if rounded.dtype == torch.uint8 else rounded.float()
        hidden, *rest = given
        expected = exact.model.layers[0](
            TorchAttention(), hidden.float(), *rest, *expected_cache.layers[0]
        )
        tolerance = max(TOLERANCE[dtype], 1e-2) if scaled else TOLERANCE[dtype]  # a step of int8
        assert (out.float() - expected).abs().max() <= tolerance * expected.abs().max()
        for buffer, right in zip(own.buffers, expected_cache.buffers, strict=True):
            allowed = 2 if buffer.dtype == torch.int8 else tolerance * right.abs().max()
            assert (buffer.float() - right.float()).abs().max() <= allowed


@pytest.mark.parametrize("scaled", [False, True], ids=["", "int8-cache"])
def test_layers_in_one_call_are_those_of_several(scaled: bool):
    assert load_operators() is not None
    config = replace(CONFIG, num_hidden_layers=3)
    model = model_of(config, PACKED)
    dtype = torch.int8 if scaled else torch.float32
    together = KVCache.allocate(config, 3, ROWS, dtype=dtype)
    apart, layers = same_cache(together), [*model.model.layers]
    hidden, *rest = arguments(model, torch.float32, batch=3, tokens=1)
    out = _few_tokens(layers, together.layers, hidden, *rest)
    for layer, buffers in zip(layers, apart.layers, strict=True):
        hidden = _few_tokens([layer], [buffers], hidden, *rest)
    assert torch.equal(out, hidden)
    assert all(map(torch.equal, together.buffers, apart.buffers))


def test_what_does_not_fit_is_refused():
    assert load_operators() is not None
    model = model_of(CONFIG, {})
    layers, cache = [*model.model.layers], KVCache.allocate(CONFIG, 3, ROWS, dtype=torch.float32)
    hidden, cos, sin, positions, rows, slots = arguments(model, torch.float32, batch=2, tokens=1)
    right = hidden, cos, sin, positions, rows, slots
    _few_tokens(layers, cache.layers, *right)
    for wrong in (
        (hidden[:, :95], *right[1:]),
        (hidden, cos[..., :7], *right[2:]),
        (*right[:4], rows + ROWS, slots),
        (*right[:4], rows - ROWS, slots),
        (*right[:5], slots + 1),
        (hidden.double(), *right[1:]),
        (hidden.repeat(9, 1), *(part.repeat(9, *[1] * (part.dim() - 1)) for part in right[1:])),
        (hidden.bfloat16(), *right[1:]),
    ):
        before = [buffer.clone() for buffer in cache.buffers]
        with pytest.raises(RuntimeError):
            _few_tokens(layers, cache.layers, *wrong)
        assert all(map(torch.equal, before, cache.buffers))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none_in_an_int8_cache(wrong: float):
    assert load_operators() is not None
    model = model_of(CONFIG, {})
    cache = KVCache.allocate(CONFIG, 3, ROWS, dtype=torch.int8)
    hidden, *rest = arguments(model, torch.float32, batch=2, tokens=1)
    hidden[0, 7] = wrong
    out = _few_tokens([*model.model.layers], cache.layers, hidden, *rest)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()
    assert not cache.layers[0][2][2, :, 3].isfinite().any()


def test_the_operator_is_well_formed():
    assert load_operators() is not None
    model = model_of(CONFIG, {})
    assert layers_few.__doc__  # what a fake tensor of it looks like is checked
    given = arguments(model, torch.float32, batch=2, tokens=1)
    cache = KVCache.allocate(CONFIG, 3, ROWS, dtype=torch.float32)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = _few_tokens([*model.model.layers], cache.layers, *given)
    assert fake.shape == given[0].shape
