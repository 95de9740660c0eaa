"""GGUF files written by the format's own library, for tests of the reader."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from llamac.model.checkpoint.gguf_file import BLOCKS
from llamac.model.config import LlamaConfig

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# What the quantizing library can't make: any bits but these two numbers' are valid. The first makes
# random bits weights of standard deviation 1, the second times the first puts them around 0.
_RANDOM = {
    "Q2_K": (0.072, 1.5),
    "Q3_K": (0.023, 0.0),
    "Q4_K": (0.0038, 7.5),
    "Q5_K": (0.0019, 15.5),
    "Q6_K": (0.00075, 0.0),
    "IQ4_NL": (0.0149, 0.0),
    "IQ4_XS": (0.0008, 0.0),
}


def write_gguf(
    path: Path,
    config: LlamaConfig,
    weights: Mapping[str, Tensor],
    *,
    kinds: Iterable[str] = ("F32",),
    vocabulary: Mapping[str, Any] | None = None,
    changes: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Tensor]:
    """Writes a model as the converter of llama.cpp does.

    Args:
        path: The file.
        config: Its facts.
        weights: HF's names and values.
        kinds: Types of the matrices, taken in turns.
        vocabulary: Keys behind `tokenizer.`.
        changes: Keys that replace those of the config; None leaves one out.
        extra: Tensors that are written first.

    Returns:
        HF's names and the values that the file holds.
    """
    writer = gguf.GGUFWriter(path, "llama")
    values = {f"llama.{key}": value for key, value in _facts(config).items()}
    values |= {f"tokenizer.{key}": value for key, value in (vocabulary or {}).items()}
    for key, value in (values | dict(changes or {})).items():
        _add(writer, key, value)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    turns = itertools.cycle(kinds)
    held: dict[str, Tensor] = {}
    for name, weight in weights.items():
        head_dim = config.head_dim if "q_proj" in name or "k_proj" in name else None
        if head_dim is not None:
            weight = _interleaved(weight, head_dim)
        kind = gguf.GGMLQuantizationType["F32" if weight.ndim == 1 else next(turns)]
        raw = raw_blocks(weight.float().numpy(), kind.name)
        writer.add_tensor(_name(name), raw, raw_dtype=kind)
        value = torch.from_numpy(gguf.dequantize(raw, kind).astype(np.float32))
        held[name] = value if head_dim is None else _halved(value, head_dim)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def raw_blocks(weight: np.ndarray, kind: str) -> np.ndarray:
    """Rows of a type of block; of those the library can't make, random ones, as wide."""
    if kind not in _RANDOM:
        return gguf.quantize(weight, gguf.GGMLQuantizationType[kind])
    rng = np.random.default_rng(weight.shape[0])
    num_weights, num_bytes = BLOCKS[kind]
    shape = (weight.shape[0], weight.shape[1] // num_weights)
    raw = rng.integers(0, 256, (*shape, num_bytes), dtype=np.uint8)
    spread, middle = _RANDOM[kind]
    halves = spread * weight.std() * rng.uniform(0.7, 1.3, (*shape, 1))
    set_halves(raw, kind, np.concatenate((halves, middle * halves), -1))
    return raw.reshape(weight.shape[0], -1)


def set_halves(raw: np.ndarray, kind: str, values: np.ndarray) -> None:
    """Writes the scale, and the minimum if there is one, of blocks [..., bytes of one]."""
    place = {
        **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), slice(0, 4)),
        **{"Q2_K": slice(80, 84), "Q3_K": slice(108, 110), "Q6_K": slice(208, 210)},
    }.get(kind, slice(0, 2))
    halves = values.astype(np.float16).view(np.uint8)
    raw[..., place] = halves[..., : place.stop - place.start]


def sentencepiece_vocabulary(model_file: Path) -> dict[str, Any]:
    """The keys that the converter writes for a tokenizer.model."""
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    ids = range(library.vocab_size())

    def kind(i: int) -> int:
        is_kind = {2: library.is_unknown, 3: library.is_control, 6: library.is_byte}
        return next((number for number, test in is_kind.items() if test(i)), 1)

    return {
        "ggml.model": "llama",
        "ggml.tokens": [library.id_to_piece(i) for i in ids],
        "ggml.scores": [library.get_score(i) for i in ids],
        "ggml.token_type": [kind(i) for i in ids],
        "ggml.bos_token_id": library.bos_id(),
        "ggml.eos_token_id": library.eos_id(),
        "ggml.unknown_token_id": library.unk_id(),
    }


def bpe_vocabulary(library: Any, split: str) -> dict[str, Any]:
    """The keys that the converter writes for a byte-level tokenizer.json."""
    model = json.loads(library.to_str())["model"]
    added = {i: token.special for i, token in library.get_added_tokens_decoder().items()}
    ids = range(library.get_vocab_size())
    return {
        "ggml.model": "gpt2",
        "ggml.pre": split,
        "ggml.tokens": [library.id_to_token(i) for i in ids],
        "ggml.token_type": [{None: 1, True: 3, False: 4}[added.get(i)] for i in ids],
        "ggml.merges": [" ".join(pair) for pair in model["merges"]],
    }


def _facts(config: LlamaConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case None:
            pass
        case 64 if key == "general.alignment":
            writer.add_custom_alignment(value)
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _name(name: str) -> str:
    module, _, part = name.rpartition(".")
    if module in _NAMES:
        return f"{_NAMES[module]}.{part}"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{_NAMES[inner]}.{part}"


def _interleaved(weight: Tensor, head_dim: int) -> Tensor:
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _halved(weight: Tensor, head_dim: int) -> Tensor:
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2).contiguous()
