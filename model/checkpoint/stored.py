"""A checkpoint as stored: HF's names, where the parts of each tensor lie, and how to read them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..config import DTYPES, LlamaConfig
from .tensor_files import Entry, TensorFile

__all__ = [
    "Checkpoint",
    "Piece",
    "StoredTensor",
    "build_checkpoint",
    "refuse_adapter",
    "weight_shapes",
]

# No more than this much of a tensor is mapped or converted at a time.
_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """What a checkpoint stores for one HF tensor.

    Attributes:
        shape: The full HF shape.
        dtype: One of DTYPES.
        file: The safetensors file that holds its bytes in HF's layout, or None.
        offset: Where those little-endian bytes begin in the file, or None.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path | None
    offset: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Rows of a stored tensor and the place they fill in an HF tensor.

    Attributes:
        name: HF's name.
        file: The file that holds it.
        key: The file's name for it.
        rows: First and last + 1 row taken of the stored tensor; None takes all.
        target: First index filled in the HF tensor, one per dimension; None is the origin.
        interleaved_head_dim: D if RoPE's pairs lie side by side in each head's rows (Meta's
            layout); they are moved D/2 apart (HF's layout) while reading.
    """

    name: str
    file: TensorFile
    key: str
    rows: tuple[int, int] | None = None
    target: tuple[int, ...] | None = None
    interleaved_head_dim: int | None = None

    @property
    def entry(self) -> Entry:
        """What the file says of the stored tensor."""
        return self.file.entries[self.key]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the part taken."""
        if self.rows is None:
            return self.entry.shape
        return (self.rows[1] - self.rows[0], *self.entry.shape[1:])

    @property
    def origin(self) -> tuple[int, ...]:
        """First index filled in the HF tensor."""
        return self.target if self.target is not None else (0,) * len(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An open checkpoint: everything is known of it, no weight has been read.

    Attributes:
        config: The model's facts.
        folder: Where the tokenizer's and config files are.
        tensors: HF name to what is stored; exactly the model's distinct parameters, so no
            `lm_head.weight` when it is tied.
        pieces: Where the bytes come from.
    """

    config: LlamaConfig
    folder: Path
    tensors: dict[str, StoredTensor]
    pieces: tuple[Piece, ...]

    def read(
        self, names: Iterable[str] | None = None
    ) -> Iterator[tuple[str, tuple[slice, ...], Tensor]]:
        """Reads tensors in parts, file by file, in the order of the bytes.

        Args:
            names: HF names; None reads all.

        Yields:
            The HF name, the slice of the full tensor that the part fills, and the part: mapped
            memory or a converted temporary, let go with the last reference to it.

        Raises:
            ValueError: A name isn't in the checkpoint.
        """
        wanted = set(self.tensors if names is None else names)
        if unknown := sorted(wanted - self.tensors.keys()):
            raise ValueError(f"{self.folder}: no tensor {unknown[0]}")
        chosen = (piece for piece in self.pieces if piece.name in wanted)
        for piece in sorted(chosen, key=lambda piece: (piece.file.path, piece.entry.offset)):
            yield from _read_piece(piece)

    def map(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """Maps a tensor whose bytes in the file serve as they are.

        Args:
            name: HF's name.
            dtype: What it must be.

        Returns:
            The tensor on the file's own pages, or None if it has to be read: it is stored in
            another dtype or layout, or in several parts. Writing to it never reaches the file.

        Raises:
            ValueError: The file is shorter than when it was opened.
        """
        piece, *more = [piece for piece in self.pieces if piece.name == name]
        as_stored = piece.rows is None and piece.interleaved_head_dim is None
        if more or not as_stored or getattr(torch, piece.entry.dtype) != dtype:
            return None
        return piece.file.rows(piece.key, 0, piece.shape[0])


def weight_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the distinct parameters of a LLaMA, in HF's order.

    Args:
        config: The model's facts.

    Returns:
        HF name to shape, without `lm_head.weight` when it is tied.
    """
    width, inner = config.hidden_size, config.intermediate_size
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    attention = {"q": (q_size, width), "k": (kv_size, width), "v": (kv_size, width)}
    attention["o"] = (width, q_size)
    mlp = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, width)}
    for i in range(config.num_hidden_layers):
        for block, projections, has_bias in (
            ("self_attn", attention, config.attention_bias),
            ("mlp", mlp, config.mlp_bias),
        ):
            for name, shape in projections.items():
                shapes[f"model.layers.{i}.{block}.{name}_proj.weight"] = shape
                if has_bias:
                    shapes[f"model.layers.{i}.{block}.{name}_proj.bias"] = shape[:1]
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (width,)
        shapes[f"model.layers.{i}.post_attention_layernorm.weight"] = (width,)
    shapes["model.norm.weight"] = (width,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes


def build_checkpoint(config: LlamaConfig, folder: Path, pieces: Iterable[Piece]) -> Checkpoint:
    """Checks that the pieces are exactly the model's parameters.

    Args:
        config: The model's facts.
        folder: Where the tokenizer's and config files are.
        pieces: All that the files hold; `lm_head.weight` is dropped when it is tied.

    Returns:
        The checkpoint.

    Raises:
        ValueError: A tensor is missing, extra, misshaped or of an unsupported dtype; it is named.
    """
    by_name: dict[str, list[Piece]] = {}
    for piece in pieces:
        if not (config.tie_word_embeddings and piece.name == "lm_head.weight"):
            by_name.setdefault(piece.name, []).append(piece)
    shapes = weight_shapes(config)
    for found in by_name.values():
        _check_kind(found)
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


def _read_piece(piece: Piece) -> Iterator[tuple[str, tuple[slice, ...], Tensor]]:
    first, last = piece.rows or (0, piece.shape[0])
    head_dim = piece.interleaved_head_dim
    unit = head_dim or 1  # rows that stay together
    row_bytes = math.prod(piece.shape[1:]) * 4  # at most
    step = max(unit, _BLOCK_BYTES // row_bytes // unit * unit)
    for start in range(first, last, step):
        part = piece.file.rows(piece.key, start, min(start + step, last))
        if head_dim is not None:
            part = _uninterleave(part, head_dim)
        origin = (piece.origin[0] + start - first, *piece.origin[1:])
        place = tuple(slice(a, a + n) for a, n in zip(origin, part.shape, strict=True))
        yield piece.name, place, part
        del part  # unmapped before the next part is mapped


def _uninterleave(weight: Tensor, head_dim: int) -> Tensor:
    """Rows 0 1 2 3 of a head with D = 4 become 0 2 1 3: pair (2i, 2i+1) becomes (i, i + D/2)."""
    pairs = weight.unflatten(0, (-1, head_dim // 2, 2))  # [heads, D/2, 2, ...]
    return pairs.transpose(1, 2).flatten(0, 2)
