"""Meta's folders: params.json beside consolidated.NN.pth, tensors split over the shards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ...runtime.typed_json import check_bool, check_int, check_number, read_json
from ..config import LlamaConfig, RopeScaling
from .build import build_checkpoint, config_of
from .pieces import Piece
from .stored import Checkpoint, side_folder
from .tensor_files import TensorFile
from .torch_file import open_torch_file

__all__ = ["is_meta_folder", "open_meta_folder"]

# Meta's name: HF's name and the dimension split over shards (None: every shard holds it all).
_TOP: dict[str, tuple[str, int | None]] = {
    "tok_embeddings.weight": ("model.embed_tokens.weight", 1),
    "norm.weight": ("model.norm.weight", None),
    "output.weight": ("lm_head.weight", 0),
}
_LAYER: dict[str, tuple[str, int | None]] = {
    "attention.wq.weight": ("self_attn.q_proj.weight", 0),
    "attention.wk.weight": ("self_attn.k_proj.weight", 0),
    "attention.wv.weight": ("self_attn.v_proj.weight", 0),
    "attention.wo.weight": ("self_attn.o_proj.weight", 1),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", 0),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", 1),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", 0),
    "attention_norm.weight": ("input_layernorm.weight", None),
    "ffn_norm.weight": ("post_attention_layernorm.weight", None),
}


def is_meta_folder(folder: Path) -> bool:
    """Whether the folder holds consolidated.NN.pth files."""
    return any(folder.glob("consolidated.*.pth"))


def open_meta_folder(folder: Path) -> Checkpoint:
    """Opens a folder as Meta distributes it.

    Args:
        folder: Holds params.json and consolidated.00.pth and on. The tokenizer is looked for
            beside them, then one folder up.

    Returns:
        The checkpoint; wq and wk are moved to HF's RoPE layout as they are read.

    Raises:
        FileNotFoundError: params.json or a shard is missing.
        ValueError: A key of params.json or a tensor is missing, extra or of the wrong size.
    """
    params = read_json(folder / "params.json")
    files = [open_torch_file(path) for path in _shards(folder)]
    config = _config(folder / "params.json", params, files)
    return build_checkpoint(config, side_folder(folder), _pieces(config, files))


def _shards(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("consolidated.*.pth"))
    for i in range(len(paths)):
        if not (folder / f"consolidated.{i:02}.pth").exists():
            raise FileNotFoundError(f"{folder / f'consolidated.{i:02}.pth'}: no such file")
    return paths


def _config(path: Path, params: dict[str, Any], files: list[TensorFile]) -> LlamaConfig:
    """What params.json says, completed from the weights and from what the models are known for.

    params.json names neither the context nor RoPE's factor nor the special ids.
    """
    dim, num_layers, num_heads = (
        _size(path, params, key) for key in ("dim", "n_layers", "n_heads")
    )
    if dim % num_heads:
        raise ValueError(f"{path}: dim is {dim}; it must be a multiple of n_heads, {num_heads}")
    num_kv_heads = num_heads
    if params.get("n_kv_heads") is not None:
        num_kv_heads = _size(path, params, "n_kv_heads")
    vocab_size = _split_size(files, "tok_embeddings.weight", 0 if _rows_split(files, dim) else None)
    if params.get("vocab_size") not in (None, -1):
        vocab_size = _size(path, params, "vocab_size")
    eps = _number(path, params, "norm_eps", 1e-5)
    theta = _number(path, params, "rope_theta", 10000.0)
    is_scaled = params.get("use_scaled_rope") is not None and check_bool(
        f"{path}: use_scaled_rope", params["use_scaled_rope"]
    )
    is_llama3 = is_scaled or vocab_size >= 128_000
    eos: tuple[int, ...] = (2,)
    if is_llama3:
        eos = (128_001, 128_008, 128_009) if is_scaled else (128_001, 128_009)
    # Only Llama 1 has an eps of 1e-6, or 80 layers without n_kv_heads (65B, whose eps is 1e-5).
    is_llama1 = eps < 5e-6 or (num_layers == 80 and num_kv_heads == num_heads)
    context = 131_072 if is_scaled else 8192 if is_llama3 else 16_384 if theta > 1e5 else 4096
    if is_llama1 and not is_llama3:
        context = 2048
    if params.get("max_seq_len") is not None:
        context = _size(path, params, "max_seq_len")
    return config_of(
        path,
        vocab_size=vocab_size,
        hidden_size=dim,
        intermediate_size=_intermediate_size(path, params, dim, files),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=dim // num_heads,
        max_position_embeddings=context,
        rms_norm_eps=eps,
        rope_theta=theta,
        rope_scaling=_rope_scaling(path, params, dim) if is_scaled else None,
        tie_word_embeddings="output.weight" not in files[0].entries,
        dtype=files[0].entries["tok_embeddings.weight"].dtype,
        bos_token_id=128_000 if is_llama3 else 1,
        eos_token_ids=eos,
    )


def _rope_scaling(path: Path, params: dict[str, Any], dim: int) -> RopeScaling:
    """Llama 3.2's text models (1B, 3B) stretch 32 times, all of 3.1 and 3.3 (dim >= 4096) 8."""
    return RopeScaling(
        rope_type="llama3",
        factor=_number(path, params, "rope_scaling_factor", 32.0 if dim < 4096 else 8.0),
        low_freq_factor=1.0,
        high_freq_factor=_number(path, params, "rope_high_freq_factor", 4.0),
        original_max_position_embeddings=8192,
    )


def _intermediate_size(
    path: Path, params: dict[str, Any], dim: int, files: list[TensorFile]
) -> int:
    """The MLP's width by Meta's formula, which w1 must agree with."""
    stored = _split_size(files, "layers.0.feed_forward.w1.weight", 0)
    if params.get("multiple_of") is None:
        return stored
    multiple = _size(path, params, "multiple_of")
    inner = int(_number(path, params, "ffn_dim_multiplier", 1.0) * (2 * (4 * dim) // 3))
    inner = -(-inner // multiple) * multiple
    if stored != inner:
        raise ValueError(
            f"{path}: makes the MLP {inner} wide, {len(files)} shards of w1 make it {stored}; "
            "a shard may be missing"
        )
    return inner


def _size(path: Path, params: dict[str, Any], key: str) -> int:
    return check_int(f"{path}: {key}", params.get(key), most=2**31 - 1)


def _number(path: Path, params: dict[str, Any], key: str, default: float) -> float:
    value = params.get(key)
    return default if value is None else check_number(f"{path}: {key}", value, most=1e9)


def _split_size(files: list[TensorFile], key: str, dim: int | None) -> int:
    """Rows of a tensor over all shards: summed where dim 0 is split, else of one shard."""
    for file in files:
        if key not in file.entries or len(file.entries[key].shape) != 2:
            raise ValueError(f"{file.path}: tensor {key} is missing or not a matrix")
    sizes = [file.entries[key].shape[0] for file in files]
    return sizes[0] if dim is None else sum(sizes)


def _rows_split(files: list[TensorFile], dim: int) -> bool:
    """Llama 3 splits the embedding by rows, 1 and 2 by columns."""
    entry = files[0].entries.get("tok_embeddings.weight")
    return entry is not None and entry.shape[-1:] == (dim,)


def _pieces(config: LlamaConfig, files: list[TensorFile]) -> Iterator[Piece]:
    kv_rows = config.num_key_value_heads * config.head_dim
    for key in dict.fromkeys(key for file in files for key in file.entries):
        if key.endswith("rope.freqs"):
            continue
        name, dim = _hf_name(key)
        holders = files
        for file in files:
            if key not in file.entries:
                raise ValueError(f"{file.path}: tensor {key} is missing; another shard has it")
        if key == "tok_embeddings.weight" and _rows_split(files, config.hidden_size):
            dim = 0
        if dim is None:
            holders = files[:1]
        elif key.endswith(("wk.weight", "wv.weight")):
            # With more shards than kv heads, neighbours hold the same head: one of each is read.
            copies = max(1, _split_size(files, key, 0) // kv_rows)
            holders = files[::copies]
        is_rotated = key.endswith(("wq.weight", "wk.weight"))
        yield from _place(name, key, holders, dim, config.head_dim if is_rotated else None)


def _place(
    name: str, key: str, files: Iterable[TensorFile], dim: int | None, head_dim: int | None
) -> Iterator[Piece]:
    """One piece a shard, side by side along dim."""
    start = 0
    for file in files:
        shape = file.entries[key].shape
        origin = [0] * len(shape)
        if dim is not None and dim < len(shape):
            origin[dim] = start
            start += shape[dim]
        if head_dim is not None and shape[0] % head_dim:
            raise ValueError(
                f"{file.path}: tensor {key} has {shape[0]} rows; a head has {head_dim}"
            )
        yield Piece(
            name=name, file=file, key=key, target=tuple(origin), interleaved_head_dim=head_dim
        )


def _hf_name(key: str) -> tuple[str, int | None]:
    if key in _TOP:
        return _TOP[key]
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", key)
    if found is None or found[2] not in _LAYER:
        return key, None  # reported as not part of the model
    name, dim = _LAYER[found[2]]
    return f"model.layers.{found[1]}.{name}", dim
