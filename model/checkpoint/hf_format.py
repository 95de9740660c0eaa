"""HF folders: config.json beside safetensors or pytorch_model*.bin files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from ...runtime.typed_json import read_json
from ..config import DTYPES, LlamaConfig
from .stored import Checkpoint, Piece, build_checkpoint
from .tensor_files import TensorFile, open_safetensors, open_torch_file

__all__ = ["open_hf_folder"]

_NAMES = ("model.safetensors", "pytorch_model.bin")


def open_hf_folder(folder: Path) -> Checkpoint:
    """Opens a folder that `save_pretrained` wrote.

    Safetensors win over `.bin`. Where config.json names no dtype, the checkpoint's is the one it
    is stored in. The end ids of generation_config.json, the ones chat models stop on, are added.

    Args:
        folder: Holds config.json and the weights.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: The config, the weights or a shard is missing.
        ValueError: The config isn't a LLaMA's, an index leaves the folder, or a tensor is wrong.
    """
    config = LlamaConfig.from_json(folder / "config.json")
    pieces = [
        Piece(name=name, file=file, key=name)
        for file in _open_files(folder)
        for name in file.entries
        if not name.endswith("rotary_emb.inv_freq")
    ]
    return build_checkpoint(_complete(config, folder, pieces), folder, pieces)


def _complete(config: LlamaConfig, folder: Path, pieces: list[Piece]) -> LlamaConfig:
    """Adds what stands beside config.json."""
    stated = read_json(folder / "config.json")
    if stated.get("dtype") is None and stated.get("torch_dtype") is None and pieces:
        stored = pieces[0].entry.dtype
        config = replace(config, dtype=stored if stored in DTYPES else config.dtype)
    path = folder / "generation_config.json"
    if path.exists():
        eos = read_json(path).get("eos_token_id")
        ids = eos if isinstance(eos, list) else [eos]
        new = tuple(i for i in ids if type(i) is int and i not in config.eos_token_ids)
        config = replace(config, eos_token_ids=config.eos_token_ids + new)
    return config


def _open_files(folder: Path) -> list[TensorFile]:
    for name in _NAMES:
        opener = open_safetensors if name.endswith(".safetensors") else open_torch_file
        index = folder / f"{name}.index.json"
        if index.exists():
            return _open_shards(index, opener)
        if (folder / name).exists():
            return [opener(folder / name)]
    raise FileNotFoundError(f"{folder}: no {' or '.join(_NAMES)}, nor an index of one")


def _open_shards(index: Path, opener: Callable[[Path], TensorFile]) -> list[TensorFile]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: no weight_map")
    for name, shard in weight_map.items():
        if not _is_plain(shard):
            raise ValueError(f"{index}: {shard!r} for {name} is not a file name in the folder")
    files = {shard: opener(index.parent / shard) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in files[shard].entries:
            raise ValueError(f"{index}: tensor {name} is not in {shard}")
    for shard, file in files.items():
        for name in file.entries:
            if weight_map.get(name, shard) != shard:
                raise ValueError(f"{index}: tensor {name} is in {shard} and {weight_map[name]}")
    return list(files.values())


def _is_plain(name: object) -> bool:
    if not isinstance(name, str) or name in ("", ".", "..") or "\0" in name:
        return False
    return PurePosixPath(name).name == name and PureWindowsPath(name).name == name
