"""HF folders: config.json beside safetensors or pytorch_model*.bin files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ...runtime.typed_json import check_int, named, read_json, shown
from ..config import DTYPES, LlamaConfig
from .build import build_checkpoint
from .pieces import Piece
from .quantized import read_quantized
from .stored import Checkpoint, weight_shapes
from .tensor_files import TensorFile, open_safetensors
from .torch_file import open_torch_file

__all__ = ["checkpoint_of", "has_hf_weights", "open_hf_folder"]

logger = logging.getLogger(__name__)

_NAMES = ("model.safetensors", "pytorch_model.bin")
_INDEX = ".index.json"
_OLDER_SETTINGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_BASE_PARTS = ("embed_tokens", "layers", "norm")  # of names that a LlamaModel saves
_LONGEST_NAME = 255  # of a file


def open_hf_folder(folder: Path) -> Checkpoint:
    """Opens a folder that `save_pretrained` wrote.

    Safetensors win over `.bin`, one file over shards, and a later shard over an earlier one. Where
    config.json names no dtype, the checkpoint's is the one it is stored in. The end ids of
    generation_config.json, the ones chat models stop on, are added.

    Args:
        folder: Holds config.json and the weights.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: The config, the weights or a shard is missing.
        ValueError: The config isn't a LLaMA's, an index leaves the folder, or a tensor is wrong.
    """
    pieces: dict[str, Piece] = {}
    for file in _open_files(folder):
        for key in file.entries:
            name = f"model.{key}" if key.split(".")[0] in _BASE_PARTS else key
            if name in pieces and pieces[name].file is file:
                raise ValueError(f"{file.path}: tensor {key} is stored twice")
            if not key.endswith("rotary_emb.inv_freq"):
                pieces[name] = Piece(name=name, file=file, key=key)
    return checkpoint_of(folder, pieces)


def checkpoint_of(folder: Path, pieces: dict[str, Piece]) -> Checkpoint:
    """Makes a checkpoint of tensors and the config.json beside them.

    Args:
        folder: Holds config.json.
        pieces: HF's name to the tensor.

    Returns:
        The checkpoint.

    Raises:
        ValueError: See open_hf_folder.
    """
    path = folder / "config.json"
    config, quantization = _read_config(path)
    config = _complete(config, folder, list(pieces.values()))
    if quantization is None:
        quantization = _read_older_settings(folder, pieces)
    if quantization is None:
        return build_checkpoint(config, folder, pieces.values())
    untied = replace(config, tie_word_embeddings=False)
    try:
        parts, packed = read_quantized(quantization, pieces, weight_shapes(untied))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return build_checkpoint(config, folder, parts, packed)


def _read_config(path: Path) -> tuple[LlamaConfig, dict[str, Any] | None]:
    """The model's facts, and how its weights are quantized."""
    data = read_json(path)
    quantization = data.pop("quantization_config", None)
    older = data.pop("compression_config", None)  # compressed-tensors' first name for it
    quantization = older if quantization is None else quantization
    if quantization is not None and not isinstance(quantization, dict):
        raise ValueError(f"{path}: quantization_config is {shown(quantization)}, not an object")
    try:
        return LlamaConfig.from_dict(data), quantization
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_older_settings(folder: Path, pieces: Iterable[str]) -> dict[str, Any] | None:
    """What AutoGPTQ and AutoAWQ once wrote beside config.json."""
    if not any(name.endswith(".qweight") for name in pieces):
        return None
    for name, method in _OLDER_SETTINGS.items():
        if (folder / name).exists():
            return {"quant_method": method, **read_json(folder / name)}
    return None


def has_hf_weights(folder: Path) -> bool:
    """Whether a folder holds the weights of a whole model."""
    return any((folder / f"{n}{suffix}").exists() for n in _NAMES for suffix in ("", _INDEX))


def _complete(config: LlamaConfig, folder: Path, pieces: list[Piece]) -> LlamaConfig:
    """Adds what stands beside config.json."""
    stated = read_json(folder / "config.json")
    if stated.get("dtype") is None and stated.get("torch_dtype") is None and pieces:
        stored = pieces[0].dtype
        config = replace(config, dtype=stored if stored in DTYPES else config.dtype)
    path = folder / "generation_config.json"
    eos = read_json(path, optional=True).get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    for token_id in ids:
        check_int(f"{path}: eos_token_id", token_id, least=-1, most=2**31 - 1)
    return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *ids))))


def _open_files(folder: Path) -> list[TensorFile]:
    """In the order in which a tensor of the later supersedes one of the earlier."""
    for name in _NAMES:
        opener = open_safetensors if name.endswith(".safetensors") else open_torch_file
        whole, index = folder / name, folder / f"{name}{_INDEX}"
        if whole.exists():
            if index.exists():
                logger.warning("%s is read, not the shards that %s lists", whole, index.name)
            return [opener(whole)]
        if index.exists():
            return _open_shards(index, opener)
    if len(found := list(folder.glob("gptq_model*.safetensors"))) == 1:  # as AutoGPTQ names it
        return [open_safetensors(found[0])]
    raise FileNotFoundError(f"{folder}: no {' or '.join(_NAMES)}, nor an index of one")


def _open_shards(index: Path, opener: Callable[[Path], TensorFile]) -> list[TensorFile]:
    """As transformers does: the index names the files, and these what they hold."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: no weight_map")
    for name, shard in weight_map.items():
        if not _is_plain(shard):
            raise ValueError(
                f"{index}: {shown(shard)} for {named([name])} is not a file name in the folder"
            )
    files = {shard: opener(index.parent / shard) for shard in sorted(set(weight_map.values()))}
    holders = {name: shard for shard, file in files.items() for name in file.entries}
    moved = [name for name, shard in weight_map.items() if holders.get(name, shard) != shard]
    if moved:
        logger.warning(
            "%s: tensors are read from other shards than it names: %s", index, named(moved)
        )
    return list(files.values())


def _is_plain(name: object) -> bool:
    if not isinstance(name, str) or name in ("", ".", "..") or len(name) > _LONGEST_NAME:
        return False
    if not name.isprintable():
        return False
    return PurePosixPath(name).name == name and PureWindowsPath(name).name == name
