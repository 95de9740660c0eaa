"""What files hold becomes a checkpoint once it is exactly a model's parameters."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config import DTYPES, LlamaConfig
from .stored import Checkpoint, Piece, StoredTensor, weight_shapes

__all__ = ["build_checkpoint", "config_of", "refuse_adapter"]

logger = logging.getLogger(__name__)

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def build_checkpoint(config: LlamaConfig, folder: Path, pieces: Iterable[Piece]) -> Checkpoint:
    """Checks that the pieces are exactly the model's parameters.

    A tied model may store its head: alone, it is the embedding; with the embedding's values, it is
    left out; with others, the model isn't tied, whatever its config says.

    Args:
        config: The model's facts.
        folder: Where the tokenizer's and config files are.
        pieces: All that the files hold.

    Returns:
        The checkpoint.

    Raises:
        ValueError: A tensor is missing, extra, misshaped or of an unsupported dtype; it is named.
    """
    by_name: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_name.setdefault(piece.name, []).append(piece)
    for found in by_name.values():
        _check_kind(found)
    config = _resolve_tie(config, folder, by_name)
    shapes = weight_shapes(config)
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
    return Checkpoint(config=config, folder=folder, tensors=tensors, pieces=kept)


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


def _resolve_tie(config: LlamaConfig, folder: Path, by_name: dict[str, list[Piece]]) -> LlamaConfig:
    """Takes a tied model's stored head out of by_name, unless it is one of its own."""
    head, embedding = by_name.get(_HEAD), by_name.get(_EMBEDDING)
    if not config.tie_word_embeddings or head is None:
        return config
    if embedding is not None and not _holds_same(head, embedding, config):
        logger.warning(
            "%s: lm_head.weight is stored with values other than the embedding's and is used, "
            "although tie_word_embeddings is true",
            folder,
        )
        return replace(config, tie_word_embeddings=False)
    del by_name[_HEAD]
    if embedding is None:
        by_name[_EMBEDDING] = [replace(piece, name=_EMBEDDING) for piece in head]
    return config


def _holds_same(head: list[Piece], embedding: list[Piece], config: LlamaConfig) -> bool:
    """Reads both, block by block, up to the first difference."""
    if len(head) != 1 or len(embedding) != 1:
        return False
    pair = (head[0], embedding[0])
    if any(piece.shape != (config.vocab_size, config.hidden_size) for piece in pair):
        return False
    if pair[0].file is pair[1].file and pair[0].entry == pair[1].entry:
        return True
    blocks = zip(pair[0].read(), pair[1].read(), strict=True)
    return all(torch.equal(a.float(), b.float()) for (_, a), (_, b) in blocks)


def _check_kind(pieces: list[Piece]) -> None:
    for piece in pieces:
        refuse_adapter(piece.file.path, piece.key)
        if piece.entry.dtype not in DTYPES:
            raise ValueError(
                f"{piece.file.path}: tensor {piece.key} is stored as {piece.entry.dtype}; "
                f"only {', '.join(DTYPES)} are supported, not quantized weights"
            )
        if piece.entry.dtype != pieces[0].entry.dtype:
            raise ValueError(
                f"{piece.file.path}: tensor {piece.key} is stored as {piece.entry.dtype}, "
                f"in {pieces[0].file.path.name} as {pieces[0].entry.dtype}"
            )


def _check_shape(name: str, shape: tuple[int, ...], pieces: list[Piece]) -> None:
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


def _stored(shape: tuple[int, ...], pieces: list[Piece]) -> StoredTensor:
    piece = pieces[0]
    dtype, offset = piece.entry.dtype, piece.entry.offset
    if (
        piece.file.kind != "safetensors"
        or piece.shape != shape
        or piece.rows
        or piece.interleaved_head_dim
    ):
        return StoredTensor(shape=shape, dtype=dtype, file=None, offset=None)
    return StoredTensor(shape=shape, dtype=dtype, file=piece.file.path, offset=offset)
