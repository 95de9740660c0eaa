"""Writes HF checkpoints of random weights: models of any size to measure with no download."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...runtime.atomic_write import new_folder
from ...runtime.bundle.manifest import ITEM_BYTES
from ...runtime.memory import format_bytes
from ..config import DTYPES, LlamaConfig
from .presets import preset_config
from .safetensors_header import safetensors_header
from .stored import weight_shapes

__all__ = ["write_random_checkpoint"]

_STD = 0.02  # transformers' initializer_range
_CHUNK = 1 << 22  # values drawn at a time; part of what a seed means


def write_random_checkpoint(
    preset: str | None,
    out: Path,
    *,
    dtype: str = "bfloat16",
    seed: int = 0,
    shards: int = 1,
    num_hidden_layers: int | None = None,
    config: LlamaConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a folder that save_pretrained could have written, without a tokenizer.

    Weights are normal with std 0.02, norms one. Each tensor's values depend on the seed, its name,
    shape and dtype alone, so not on the shards. Each core draws one tensor at a time, of which one
    chunk is in memory, and the folder appears whole or not at all.

    Args:
        preset: A name of presets.preset_names(); ignored where config is given.
        out: The folder, new or empty.
        dtype: Of the weights, one of DTYPES.
        seed: Of the weights.
        shards: Number of safetensors files.
        num_hidden_layers: Replaces the preset's depth.
        config: Replaces the preset.
        progress: Called with the bytes written so far and in all.

    Raises:
        ValueError: An argument is out of range, `out` is in use or can't be made, or the disk is
            too small.
    """
    if config is None:
        config = preset_config(preset or "")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    if num_hidden_layers is not None:
        config = replace(config, num_hidden_layers=num_hidden_layers)
    config = replace(config, dtype=dtype)
    shapes = weight_shapes(config)
    if not 1 <= shards <= len(shapes):
        raise ValueError(f"shards is {shards}; this model takes 1 to {len(shapes)}")
    total_bytes = sum(map(math.prod, shapes.values())) * ITEM_BYTES[dtype]
    with new_folder(out) as folder:
        free_bytes = shutil.disk_usage(folder).free
        if total_bytes > free_bytes:
            raise ValueError(
                f"{out}: needs {format_bytes(total_bytes)}, {format_bytes(free_bytes)} are free "
                "there"
            )
        _write(folder, config, shapes, seed=seed, shards=shards, progress=progress)


def _write(
    folder: Path,
    config: LlamaConfig,
    shapes: dict[str, tuple[int, ...]],
    *,
    seed: int,
    shards: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    _write_json(folder / "config.json", config.to_dict())
    dtype = _torch_dtype(config.dtype)
    total_bytes = sum(map(math.prod, shapes.values())) * dtype.itemsize
    weight_map: dict[str, str] = {}
    todo: list[tuple[Path, int, str]] = []
    for i, names in enumerate(_split(shapes, shards)):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(names, name)
        header, begins = safetensors_header({key: (shapes[key], config.dtype) for key in names})
        (folder / name).write_bytes(header)
        todo += [(folder / name, begin, key) for key, begin in begins.items()]

    def write(path: Path, offset: int, key: str) -> int:
        with path.open("r+b") as stream:
            stream.seek(offset)
            for chunk in _values(key, shapes[key], dtype, seed):
                stream.write(chunk.view(torch.uint8).numpy().data)
        return math.prod(shapes[key]) * dtype.itemsize

    done_bytes = 0
    # Drawing is what takes long, in one thread a tensor.
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        for written in as_completed([pool.submit(write, *task) for task in todo]):
            done_bytes += written.result()
            if progress is not None:
                progress(done_bytes, total_bytes)
    finally:
        pool.shutdown(cancel_futures=True)
    if shards > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _split(shapes: dict[str, tuple[int, ...]], shards: int) -> list[list[str]]:
    """Cuts the names, in order, into groups of about equal size, none empty."""
    groups: list[list[str]] = [[]]
    target = sum(map(math.prod, shapes.values())) / shards
    done = 0
    for i, (name, shape) in enumerate(shapes.items()):
        is_full = done + math.prod(shape) / 2 > target * len(groups)
        must_cut = len(shapes) - i <= shards - len(groups)
        if groups[-1] and len(groups) < shards and (is_full or must_cut):
            groups.append([])
        groups[-1].append(name)
        done += math.prod(shape)
    return groups


def _values(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Iterator[Tensor]:
    """The tensor's values, flat, a chunk at a time."""
    size = math.prod(shape)
    if name.endswith("norm.weight"):
        yield torch.ones(size, dtype=dtype)
        return
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    for start in range(0, size, _CHUNK):
        count = min(_CHUNK, size - start)
        yield torch.empty(count).normal_(0.0, _STD, generator=generator).to(dtype)


def _torch_dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def _write_json(path: Path, data: dict[str, object]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
