"""What files hold becomes a checkpoint once it is exactly a model's parameters."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config import DTYPES, LlamaConfig
from ..packed import PackedFormat
from .pieces import Part
from .stored import Checkpoint, StoredTensor, weight_shapes

__all__ = ["build_checkpoint", "config_of", "refuse_adapter"]

logger = logging.getLogger(__name__)

_HEAD, _EMBEDDING = "lm_head", "model.embed_tokens"
# What the parts of a packed weight may be stored in.
_PART_DTYPES = {"weight_packed": ("uint8",), "weight_order": ("int32",)}


def build_checkpoint(
    config: LlamaConfig,
    folder: Path,
    pieces: Iterable[Part],
    packed: Mapping[str, PackedFormat] | None = None,
    *,
    side_folder: Path | None = None,
) -> Checkpoint:
    """Checks that the pieces are exactly the model's parameters.

    A tied model may store its head: alone, it is the embedding; with the embedding's values, it is
    left out; with others, the model isn't tied, whatever its config says.

    Args:
        config: The model's facts.
        folder: Where it was found, for messages.
        pieces: All that the files hold.
        packed: Module name to how its weight is packed; of a tied head under the embedding's.
        side_folder: Where the tokenizer's and config files are; None is the folder.

    Returns:
        The checkpoint.

    Raises:
        ValueError: A tensor is missing, extra, misshaped or of an unsupported dtype; it is named.
    """
    by_name: dict[str, list[Part]] = {}
    for piece in pieces:
        by_name.setdefault(piece.name, []).append(piece)
    for found in by_name.values():
        _check_kind(found)
    packed = dict(packed or {})
    config = _resolve_tie(config, folder, by_name, packed)
    try:
        shapes = weight_shapes(config, packed)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    if extra := sorted(by_name.keys() - shapes.keys()):
        first = by_name[extra[0]][0]
        raise ValueError(
            f"{first.file.path}: tensor {first.key} is not part of this model{_more(extra)}"
        )
    if missing := [name for name in shapes if name not in by_name]:
        raise ValueError(f"{folder}: tensor {missing[0]} is missing{_more(missing)}")
    for name, shape in shapes.items():
        _check_shape(name, shape, by_name[name])
    tensors = {name: _stored(shape, by_name[name]) for name, shape in shapes.items()}
    kept = tuple(piece for name in shapes for piece in by_name[name])
    return Checkpoint(
        config=config,
        folder=folder,
        side_folder=side_folder or folder,
        tensors=tensors,
        pieces=kept,
        packed=packed,
    )


def config_of(path: Path, **facts: Any) -> LlamaConfig:
    """Builds the config that a file implies, naming the file where a fact is out of bounds."""
    try:
        return LlamaConfig(**facts)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def refuse_adapter(path: Path, key: str) -> None:
    """Raises ValueError if a stored name is that of an adapter's weight.

    Args:
        path: The file, for the message.
        key: The file's name for the tensor.
    """
    if any(word in key for word in ("lora_", "adapter_", "gating_factor")):
        raise ValueError(f"{path}: holds adapter weights ({key}); merge them into the model first")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _resolve_tie(
    config: LlamaConfig,
    folder: Path,
    by_name: dict[str, list[Part]],
    packed: dict[str, PackedFormat],
) -> LlamaConfig:
    """Takes a tied model's stored head out of by_name, unless it is one of its own."""
    if not config.tie_word_embeddings:
        return config
    embedding = any(name.startswith(f"{_EMBEDDING}.") for name in by_name)
    if _HEAD in packed:
        if embedding:  # of other bits than the embedding
            return replace(config, tie_word_embeddings=False)
        packed[_EMBEDDING] = packed.pop(_HEAD)
    elif (head := by_name.get(f"{_HEAD}.weight")) is None:
        return config
    elif embedding and not _holds_same(head, by_name.get(f"{_EMBEDDING}.weight", []), config):
        logger.warning(
            "%s: lm_head.weight is stored with values other than the embedding's and is used, "
            "although tie_word_embeddings is true",
            folder,
        )
        return replace(config, tie_word_embeddings=False)
    for name in [name for name in by_name if name.startswith(f"{_HEAD}.")]:
        pieces = by_name.pop(name)
        if not embedding:
            moved = name.replace(_HEAD, _EMBEDDING)
            by_name[moved] = [replace(piece, name=moved) for piece in pieces]
    return config


def _holds_same(head: list[Part], embedding: list[Part], config: LlamaConfig) -> bool:
    """Reads both, block by block, up to the first difference."""
    if len(head) != 1 or len(embedding) != 1:
        return False
    pair = (head[0], embedding[0])
    if any(piece.shape != (config.vocab_size, config.hidden_size) for piece in pair):
        return False
    if pair[0].file is pair[1].file and pair[0].offset == pair[1].offset:
        return True
    blocks = zip(pair[0].read(), pair[1].read(), strict=True)
    return all(torch.equal(a.float(), b.float()) for (_, a), (_, b) in blocks)


def _check_kind(pieces: list[Part]) -> None:
    for piece in pieces:
        path, key = piece.file.path, piece.key
        refuse_adapter(path, key)
        allowed = _PART_DTYPES.get(piece.name.rpartition(".")[2], DTYPES)
        if piece.dtype not in allowed:
            raise ValueError(
                f"{path}: tensor {key} is stored as {piece.dtype}; only {', '.join(allowed)} are "
                "supported, and quantized weights where config.json says how"
            )
        if piece.dtype != pieces[0].dtype:
            raise ValueError(
                f"{path}: tensor {key} is stored as {piece.dtype}, "
                f"in {pieces[0].file.path.name} as {pieces[0].dtype}"
            )


def _check_shape(name: str, shape: tuple[int, ...], pieces: list[Part]) -> None:
    """The pieces' bounding box is the tensor, and their sizes add up to it."""
    fits = all(len(piece.shape) == len(shape) for piece in pieces)
    if fits:
        ends = [
            tuple(a + n for a, n in zip(piece.origin, piece.shape, strict=True)) for piece in pieces
        ]
        found = tuple(map(max, zip(*ends, strict=True)))
        fits = found == shape and sum(math.prod(p.shape) for p in pieces) == math.prod(shape)
    else:
        found = pieces[0].shape
    if not fits:
        key = pieces[0].key if pieces[0].key == name else f"{pieces[0].key} ({name})"
        raise ValueError(
            f"{pieces[0].file.path}: tensor {key} has shape {list(found)}; "
            f"the config makes it {list(shape)}"
        )


def _stored(shape: tuple[int, ...], pieces: list[Part]) -> StoredTensor:
    piece = pieces[0]
    file = piece.file
    if file.kind != "safetensors" or piece.shape != shape or not piece.is_as_stored:
        return StoredTensor(shape=shape, dtype=piece.dtype, file=None, offset=None)
    return StoredTensor(shape=shape, dtype=piece.dtype, file=file.path, offset=piece.offset)
