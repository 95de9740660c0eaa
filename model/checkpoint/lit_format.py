"""lit-llama's `.pth`: one file, q, k and v fused in c_attn, no config."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ..config import LlamaConfig
from .build import build_checkpoint, config_of, refuse_adapter
from .pieces import Piece
from .stored import Checkpoint, side_folder
from .tensor_files import TensorFile
from .torch_file import open_torch_file

__all__ = ["open_lit_file"]

_TOP = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.scale": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_LAYER = {
    "rms_1.scale": "input_layernorm.weight",
    "rms_2.scale": "post_attention_layernorm.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "mlp.c_fc1.weight": "mlp.gate_proj.weight",
    "mlp.c_fc2.weight": "mlp.up_proj.weight",
    "mlp.c_proj.weight": "mlp.down_proj.weight",
}
_HEAD_DIM = 128  # of every size lit-llama publishes: 7B, 13B, 30B and 65B


def open_lit_file(path: Path) -> Checkpoint:
    """Opens a lit-llama checkpoint.

    The config comes from the shapes, with heads of 128, unless an HF config.json beside the file
    states it.

    Args:
        path: The file. The tokenizer is looked for beside it, then one folder up, where lit-llama
            keeps it.

    Returns:
        The checkpoint; q and k are moved to HF's RoPE layout as they are read.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It isn't lit-llama's, holds an adapter or quantized weights, or a tensor is
            missing, extra or misshaped.
    """
    file = open_torch_file(path)
    beside = path.parent / "config.json"
    if beside.exists():
        config = LlamaConfig.from_json(beside)
    else:
        config = _config(file)
    return build_checkpoint(config, side_folder(path.parent), _pieces(config, file))


def _config(file: TensorFile) -> LlamaConfig:
    embedding = file.entries.get("transformer.wte.weight")
    mlp = file.entries.get("transformer.h.0.mlp.c_fc1.weight")
    if embedding is None or mlp is None or len(embedding.shape) != 2 or len(mlp.shape) != 2:
        for key in file.entries:
            refuse_adapter(file.path, key)
        raise ValueError(f"{file.path}: not a lit-llama checkpoint (no transformer.wte and layers)")
    vocab_size, width = embedding.shape
    if width % _HEAD_DIM:
        raise ValueError(
            f"{file.path}: width {width} is no multiple of {_HEAD_DIM}; put an HF config.json "
            "beside it to state num_attention_heads"
        )
    layers = {key.split(".")[2] for key in file.entries if key.startswith("transformer.h.")}
    return config_of(
        file.path,
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=mlp.shape[0],
        num_hidden_layers=len(layers),
        num_attention_heads=width // _HEAD_DIM,
        num_key_value_heads=width // _HEAD_DIM,
        head_dim=_HEAD_DIM,
        rms_norm_eps=1e-5,
        dtype=embedding.dtype,
    )


def _pieces(config: LlamaConfig, file: TensorFile) -> Iterator[Piece]:
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    for key, entry in file.entries.items():
        found = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", key)
        if found is None:
            yield Piece(name=_TOP.get(key, key), file=file, key=key)
            continue
        layer, part = found.groups()
        if part == "attn.c_attn.weight":
            if entry.shape[:1] != (q_size + 2 * kv_size,):
                raise ValueError(
                    f"{file.path}: tensor {key} has shape {list(entry.shape)}; "
                    f"q, k and v make {q_size + 2 * kv_size} rows"
                )
            start = 0
            for letter, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
                yield Piece(
                    name=f"model.layers.{layer}.self_attn.{letter}_proj.weight",
                    file=file,
                    key=key,
                    rows=(start, start + size),
                    interleaved_head_dim=None if letter == "v" else config.head_dim,
                )
                start += size
        elif part in _LAYER:
            yield Piece(name=f"model.layers.{layer}.{_LAYER[part]}", file=file, key=key)
        elif part != "attn.rope_cache":
            yield Piece(name=key, file=file, key=key)
