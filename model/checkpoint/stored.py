"""A checkpoint as stored: HF's names, where the parts of each tensor lie, and how to read them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..config import LlamaConfig
from ..llama import Llama
from .tensor_files import Entry, TensorFile

__all__ = [
    "Checkpoint",
    "Piece",
    "StoredTensor",
    "copy_finite",
    "side_folder",
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

    def read(self) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """Reads it in blocks: the slice of the HF tensor that each fills, and the block."""
        first, last = self.rows or (0, self.shape[0])
        head_dim = self.interleaved_head_dim
        unit = head_dim or 1  # rows that stay together
        row_bytes = math.prod(self.shape[1:]) * 4  # at most
        step = max(unit, _BLOCK_BYTES // row_bytes // unit * unit)
        for start in range(first, last, step):
            part = self.file.rows(self.key, start, min(start + step, last))
            if head_dim is not None:
                part = _uninterleave(part, head_dim)
            origin = (self.origin[0] + start - first, *self.origin[1:])
            yield tuple(slice(a, a + n) for a, n in zip(origin, part.shape, strict=True)), part
            del part  # unmapped before the next part is mapped


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
            for place, part in piece.read():
                yield piece.name, place, part
                del part

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
    """Names and shapes of the distinct parameters of a LLaMA, in the module tree's order.

    Args:
        config: The model's facts.

    Returns:
        HF name to shape, without `lm_head.weight` when it is tied.
    """
    with torch.device("meta"):
        model = Llama(replace(config, num_hidden_layers=1), num_positions=1)
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del found["lm_head.weight"]
    first = "model.layers.0."
    layer = {
        name.removeprefix(first): found[name] for name in list(found) if name.startswith(first)
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in found.items():
        if not name.startswith(first):
            shapes[name] = shape
        elif name not in shapes:  # all layers follow the first one's first name
            for i in range(config.num_hidden_layers):
                shapes |= {f"model.layers.{i}.{key}": size for key, size in layer.items()}
    return shapes


def copy_finite(name: str, part: Tensor, target: Tensor) -> None:
    """Copies a part of a weight into place, as every conversion does.

    Args:
        name: HF's name, for the message.
        part: As stored.
        target: Of the same shape, in any dtype.

    Raises:
        ValueError: A value is not a number, infinite, or past the range of the target's dtype.
    """
    target.copy_(part)
    if all(math.isfinite(bound.item()) for bound in target.aminmax()):
        return
    largest = part.float().abs().max().item()
    if math.isfinite(largest):
        dtype = str(target.dtype).removeprefix("torch.")
        raise ValueError(
            f"{name} holds {largest:g}, past {dtype}'s range; use --dtype bfloat16 or float32"
        )
    raise ValueError(f"{name} holds {largest:g}: its weights are damaged; copy them again")


def side_folder(folder: Path) -> Path:
    """Finds a tokenizer where trainers and Meta's downloads leave it.

    Args:
        folder: Holds the weights.

    Returns:
        The folder, or the one above if only that holds a tokenizer.
    """
    for place in (folder, folder.parent):
        if any((place / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
            return place
    return folder


def _uninterleave(weight: Tensor, head_dim: int) -> Tensor:
    """Rows 0 1 2 3 of a head with D = 4 become 0 2 1 3: pair (2i, 2i+1) becomes (i, i + D/2)."""
    pairs = weight.unflatten(0, (-1, head_dim // 2, 2))  # [heads, D/2, 2, ...]
    return pairs.transpose(1, 2).flatten(0, 2)
