"""Tiny configs of every family, as their config.json files spell them, and transformers' models."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import LlamaConfig as ReferenceConfig
from transformers import LlamaForCausalLM

from llamac.model.config import LlamaConfig
from llamac.model.llama import Llama

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}

_BASE = {**SIZES, "model_type": "llama", "max_position_embeddings": 128, "hidden_act": "silu"}

_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "llama-1": {**_BASE, "rms_norm_eps": 1e-6},
    "llama-2-gqa": {**_BASE, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "llama-3": {**_BASE, "num_key_value_heads": 1, "rope_theta": 500000.0},
    "llama-3.1": {
        **_BASE,
        "num_key_value_heads": 2,
        "rope_theta": 500000.0,
        "rope_scaling": _LLAMA3_SCALING,
        "eos_token_id": [2, 3],
    },
    "llama-3.2-tied": {
        **_BASE,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {**_LLAMA3_SCALING, "factor": 32.0, "rope_theta": 500000.0},
    },
    "code-llama": {**_BASE, "rope_theta": 1e6},
    "tinyllama": {**_BASE, "num_key_value_heads": 2, "head_dim": 8},
    "smollm": {**_BASE, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16},
    "biases": {**_BASE, "attention_bias": True, "mlp_bias": True},
    "linear": {**_BASE, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {**_BASE, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "yarn": {
        **_BASE,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "yarn-all-keys": {
        **_BASE,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 20000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "truncate": False,
        },
    },
}


@cache
def reference_model(name: str) -> LlamaForCausalLM:
    """transformers' model of a variant, float32, with weights wide enough for distinct logits."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(ReferenceConfig(**VARIANTS[name])).eval()
    for parameter in model.parameters():
        parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model


def our_model(name: str, *, num_positions: int | None = None) -> Llama:
    """Our model of a variant with the same weights."""
    config = LlamaConfig.from_dict(VARIANTS[name])
    model = Llama(config, num_positions=num_positions or config.max_position_embeddings)
    weights = dict(reference_model(name).state_dict())
    model.load_state_dict(weights, strict=True)
    return model.requires_grad_(False)
