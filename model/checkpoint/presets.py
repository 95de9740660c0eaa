"""The published LLaMA models' sizes, by name."""

from __future__ import annotations

import math
from dataclasses import replace

from ..config import LlamaConfig, RopeScaling
from .stored import weight_shapes

__all__ = ["num_parameters", "preset_config", "preset_names"]

_LLAMA_7B = LlamaConfig(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11_008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    dtype="float16",
)
_LLAMA_65B = replace(
    _LLAMA_7B,
    hidden_size=8192,
    intermediate_size=22_016,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=64,
    rms_norm_eps=1e-5,
)
_LLAMA_2_7B = replace(_LLAMA_7B, max_position_embeddings=4096, rms_norm_eps=1e-5)
_LLAMA_3_8B = replace(
    _LLAMA_7B,
    vocab_size=128_256,
    intermediate_size=14_336,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=500_000.0,
    dtype="bfloat16",
    bos_token_id=128_000,
    eos_token_ids=(128_001,),
)
_LLAMA_32_1B = replace(
    _LLAMA_3_8B,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    head_dim=64,
    max_position_embeddings=131_072,
    rope_scaling=RopeScaling(
        rope_type="llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
    tie_word_embeddings=True,
)

_PRESETS = {
    "llama-7b": _LLAMA_7B,
    "llama-13b": replace(
        _LLAMA_7B,
        hidden_size=5120,
        intermediate_size=13_824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
    ),
    "llama-30b": replace(
        _LLAMA_7B,
        hidden_size=6656,
        intermediate_size=17_920,
        num_hidden_layers=60,
        num_attention_heads=52,
        num_key_value_heads=52,
    ),
    "llama-65b": _LLAMA_65B,
    "llama-2-7b": _LLAMA_2_7B,
    "llama-2-70b": replace(
        _LLAMA_65B,
        intermediate_size=28_672,
        num_key_value_heads=8,
        max_position_embeddings=4096,
    ),
    "codellama-7b": replace(
        _LLAMA_2_7B,
        vocab_size=32_016,
        max_position_embeddings=16_384,
        rope_theta=1_000_000.0,
        dtype="bfloat16",
    ),
    "llama-3-8b": _LLAMA_3_8B,
    "llama-3-70b": replace(
        _LLAMA_3_8B,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
    ),
    "llama-3.2-1b": _LLAMA_32_1B,
    "llama-3.2-3b": replace(
        _LLAMA_32_1B,
        hidden_size=3072,
        num_hidden_layers=28,
        num_attention_heads=24,
        head_dim=128,
    ),
    "tinyllama-1.1b": replace(
        _LLAMA_2_7B,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
        dtype="bfloat16",
    ),
}


def preset_names() -> tuple[str, ...]:
    """The names that preset_config knows."""
    return tuple(_PRESETS)


def preset_config(name: str) -> LlamaConfig:
    """Looks a published model's config up.

    Args:
        name: One of preset_names().

    Returns:
        The config as published on the Hugging Face hub, RoPE and special ids included.

    Raises:
        ValueError: There is no such preset.
    """
    if name not in _PRESETS:
        raise ValueError(f"preset is {name!r}; it must be one of {', '.join(_PRESETS)}")
    return _PRESETS[name]


def num_parameters(config: LlamaConfig) -> int:
    """Counts the distinct parameters; a tied head counts once.

    Args:
        config: The model's facts.

    Returns:
        The number of parameters.
    """
    return sum(math.prod(shape) for shape in weight_shapes(config).values())
