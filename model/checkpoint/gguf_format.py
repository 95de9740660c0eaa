"""GGUF checkpoints: one file with the config, the weights and the tokenizer."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...runtime.typed_json import check_int, named, shown
from ..config import LlamaConfig
from ..packed import PackedFormat
from .build import build_checkpoint, config_of
from .gguf_blocks import BLOCK_FORMATS
from .gguf_file import GgufFile, GgufTensor, read_gguf
from .gguf_rope import ROPE_KEYS, read_gguf_rope
from .gguf_text import end_ids, token_id, write_text_files
from .pieces import Conversion, Piece
from .stored import Checkpoint

__all__ = ["find_gguf", "open_gguf_file"]

logger = logging.getLogger(__name__)

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_MAX_SHARDS = 1000

_SIZES = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
}
_USED = {
    *_SIZES,
    "vocab_size",
    "context_length",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "tensor_data_layout",  # of q and k, alike for both that there are
}
# Keys that change what the model computes, with the values that leave it a plain LLaMA.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
}


def open_gguf_file(path: Path) -> Checkpoint:
    """Opens a GGUF file, with the shards that follow it.

    Its tokenizer and chat template are written to the user's cache, in the form that they have in
    an HF folder; the next start finds them there.

    Args:
        path: The file, of several the first.

    Returns:
        The checkpoint; q and k are moved to HF's RoPE layout as they are read, blocks repacked.

    Raises:
        FileNotFoundError: The file or a shard is missing.
        ValueError: A file is damaged, the model isn't a plain LLaMA, a type of weights or of
            tokenizer isn't read, a tensor is wrong, or the cache can't be written.
    """
    files = _read_shards(path)
    first = files[0]
    architecture = first.values.get("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"{path}: general.architecture is {shown(architecture)}; only 'llama' is supported"
        )
    tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
    config = _config(path, first, tensors, _rope_factors(files))
    packed: dict[str, PackedFormat] = {}
    pieces = [piece for file in files for piece in _pieces(file, config, packed)]
    texts = write_text_files(path, first.values, first.digest)
    return build_checkpoint(config, path, pieces, packed, side_folder=texts)


def find_gguf(folder: Path) -> Path | None:
    """Finds the GGUF file of a folder.

    Args:
        folder: Where it is looked for, not deeper.

    Returns:
        The only one, or the first of the only sharded one; None if there is none.

    Raises:
        ValueError: There are several.
    """
    found = sorted(folder.glob("*.gguf"))
    shards = {path: match for path in found if (match := _SHARD.fullmatch(path.name))}
    first = [path for path in found if path not in shards or int(shards[path][2]) == 1]
    if len(first or found) > 1:
        names = [path.name for path in first or found]
        raise ValueError(f"{folder}: holds {named(names)}; name the file to open")
    return next(iter(first or found), None)


def _read_shards(path: Path) -> list[GgufFile]:
    first = read_gguf(path)
    count = first.values.get("split.count", 1)
    check_int(f"{path}: split.count", count, least=0, most=_MAX_SHARDS)
    if count < 2:
        return [first]
    name = _SHARD.fullmatch(path.name)
    if name is None or int(name[3]) != count:
        raise ValueError(
            f"{path}: one of {count} shards; name them as they came, NAME-00001-of-{count:05}.gguf"
        )
    if int(name[2]) != 1 or first.values.get("split.no") != 0:
        raise ValueError(
            f"{path}: not the first of {count} shards; name {name[1]}-00001-of-{name[3]}.gguf"
        )
    others = [path.with_name(f"{name[1]}-{n:05}-of-{name[3]}.gguf") for n in range(2, count + 1)]
    return [first, *map(read_gguf, others)]


def _rope_factors(files: list[GgufFile]) -> list[float] | None:
    for file in files:
        tensor = file.tensors.get(_ROPE_FACTORS)
        if tensor is not None:
            if tensor.type != "F32":
                raise ValueError(f"{file.file.path}: {_ROPE_FACTORS} is {tensor.type}, not F32")
            entry = file.file.entries[_ROPE_FACTORS]
            return file.file.rows(entry, 0, entry.shape[0]).flatten().tolist()
    return None


def _config(
    path: Path, file: GgufFile, tensors: dict[str, GgufTensor], factors: list[float] | None
) -> LlamaConfig:
    values = {
        key.removeprefix("llama."): value
        for key, value in file.values.items()
        if key.startswith("llama.")
    }
    for key, neutral in _NEUTRAL.items():
        if key in values and values[key] not in neutral:
            raise ValueError(
                f"{path}: llama.{key} is {shown(values[key])}; only {neutral[-1]!r} is supported"
            )
    if missing := [f"llama.{key}" for key in _SIZES if key not in values]:
        raise ValueError(f"{path}: {', '.join(missing)} missing; a LLaMA's file states it")
    sizes = {name: _size(path, values, key) for key, name in _SIZES.items()}
    heads, width = sizes["num_attention_heads"], sizes["hidden_size"]
    if "attention.key_length" not in values and width % heads:
        raise ValueError(
            f"{path}: llama.embedding_length is {width}; without attention.key_length it must be "
            f"a multiple of attention.head_count, {heads}"
        )
    head_dim = _size(path, values, "attention.key_length", width // heads)
    if _size(path, values, "attention.value_length", head_dim) != head_dim:
        raise ValueError(f"{path}: llama.attention.value_length is another than key_length's")
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError(f"{path}: tensor token_embd.weight is missing; it holds no whole model")
    vocab_size = _size(path, values, "vocab_size", embedding.shape[0])
    tokens = file.values.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > vocab_size:
        raise ValueError(
            f"{path}: tokenizer.ggml.tokens has {len(tokens)} tokens, the embedding {vocab_size} "
            "rows; convert the model again"
        )
    theta, scaling = read_gguf_rope(path, values, head_dim, factors)
    if unknown := sorted(values.keys() - _USED - _NEUTRAL.keys() - ROPE_KEYS):
        logger.warning("%s: unknown keys ignored: %s", path, named(f"llama.{k}" for k in unknown))
    return config_of(
        path,
        **sizes,
        vocab_size=vocab_size,
        num_key_value_heads=_size(path, values, "attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=_size(path, values, "context_length", 2048),
        rms_norm_eps=values.get("attention.layer_norm_rms_epsilon", 1e-5),
        rope_theta=theta,
        rope_scaling=scaling,
        attention_bias="blk.0.attn_q.bias" in tensors,
        mlp_bias="blk.0.ffn_down.bias" in tensors,
        tie_word_embeddings="output.weight" not in tensors,
        dtype=_dtype(tensors),
        bos_token_id=token_id(path, file.values, "bos"),
        eos_token_ids=end_ids(path, file.values),
    )


def _size(path: Path, values: dict[str, Any], key: str, default: int | None = None) -> int:
    return check_int(f"{path}: llama.{key}", values.get(key, default), most=2**31 - 1)


def _dtype(tensors: dict[str, GgufTensor]) -> str:
    """That of the layers' matrices; quantized ones don't tell, but few models pass bfloat16."""
    kinds = [tensor.type for name, tensor in tensors.items() if name.endswith("ffn_down.weight")]
    dtypes = {"F32": "float32", "F16": "float16"}
    return dtypes.get(kinds[0], "bfloat16") if kinds else "bfloat16"


def _pieces(
    file: GgufFile, config: LlamaConfig, packed: dict[str, PackedFormat]
) -> Iterator[Piece]:
    """Notes in `packed` the modules whose weight is quantized."""
    for key, tensor in file.tensors.items():
        if key == _ROPE_FACTORS:
            continue
        module, part = _hf_name(key)
        is_rotated = module.endswith(("q_proj", "k_proj"))
        head_dim = config.head_dim if is_rotated else None
        if head_dim is not None and tensor.shape[0] % head_dim:
            raise ValueError(
                f"{file.file.path}: tensor {key} has {tensor.shape[0]} rows; a head has {head_dim}"
            )
        form = BLOCK_FORMATS.get(tensor.type)
        if form is None:
            yield Piece(
                name=f"{module}.{part}", file=file.file, key=key, interleaved_head_dim=head_dim
            )
            continue
        if part != "weight" or len(tensor.shape) != 2:
            raise ValueError(f"{file.file.path}: tensor {key} is {tensor.type}, but no matrix")
        packed[module] = form.packed
        shapes = form.packed.tensors(*tensor.shape)
        for name, convert in form.parts.items():
            shape, dtype = shapes[name]
            yield Piece(
                name=f"{module}.{name}",
                file=file.file,
                key=key,
                interleaved_head_dim=head_dim,
                conversion=Conversion(apply=convert, row_shape=shape[1:], dtype=dtype),
            )


def _hf_name(key: str) -> tuple[str, str]:
    """HF's module and parameter; a name that isn't a LLaMA's stays, to be reported."""
    module, _, part = key.rpartition(".")
    if module in _TOP:
        return _TOP[module], part
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
    if found is None or found[2] not in _LAYER:
        return module, part
    return f"model.layers.{found[1]}.{_LAYER[found[2]]}", part
