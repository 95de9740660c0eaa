"""A checkpoint as stored: HF's names, where the parts of each tensor lie, and how to read them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..config import LlamaConfig
from ..llama import Llama
from ..packed import PackedFormat
from .pieces import Part, Piece

__all__ = [
    "Checkpoint",
    "StoredTensor",
    "copy_finite",
    "is_finite",
    "side_folder",
    "weight_shapes",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """What a checkpoint stores for one HF tensor.

    Attributes:
        shape: The full HF shape.
        dtype: One of DTYPES; of a packed weight's parts also uint8 and int32.
        file: The safetensors file that holds its bytes in HF's layout, or None.
        offset: Where those little-endian bytes begin in the file, or None.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path | None
    offset: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An open checkpoint: everything is known of it, no weight has been read.

    Attributes:
        config: The model's facts.
        folder: Where it was found, named in messages: a folder, or the one file of all.
        side_folder: Where the tokenizer's and config files are.
        tensors: HF name to what is stored; exactly the model's distinct parameters, so no
            `lm_head.weight` when it is tied; of a packed weight its parts (see PackedFormat).
        pieces: Where the bytes come from.
        packed: Module name to how its weight is packed.
        adapter: The folder of the adapter that is merged into it, or None.
    """

    config: LlamaConfig
    folder: Path
    side_folder: Path
    tensors: dict[str, StoredTensor]
    pieces: tuple[Part, ...]
    packed: Mapping[str, PackedFormat] = field(default_factory=dict)
    adapter: Path | None = None

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
        for piece in sorted(chosen, key=lambda piece: (piece.file.path, piece.offset)):
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
        if more or not isinstance(piece, Piece) or not piece.is_contiguous:
            return None
        if getattr(torch, piece.dtype) != dtype:
            return None
        return piece.file.rows(piece.entry, *(piece.rows or (0, piece.shape[0])))


def weight_shapes(
    config: LlamaConfig, packed: Mapping[str, PackedFormat] | None = None
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the distinct parameters of a LLaMA, in the module tree's order.

    Args:
        config: The model's facts.
        packed: Module name to how its weight is packed.

    Returns:
        HF name to shape, without `lm_head.weight` when it is tied; of a packed weight its parts.

    Raises:
        ValueError: A group size doesn't divide its weight.
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
    return {
        part: size for name, shape in shapes.items() for part, size in _parts(name, shape, packed)
    }


def _parts(
    name: str, shape: tuple[int, ...], packed: Mapping[str, PackedFormat] | None
) -> Iterator[tuple[str, tuple[int, ...]]]:
    module, _, key = name.rpartition(".")
    form = (packed or {}).get(module) if key == "weight" else None
    if form is None:
        yield name, shape
        return
    try:
        parts = form.tensors(*shape)
    except ValueError as error:
        raise ValueError(f"{module}: {error}") from None
    for part, (size, _) in parts.items():
        yield f"{module}.{part}", size


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
    if is_finite(target):
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


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any dtype holds neither infinities nor what isn't a number."""
    return all(math.isfinite(bound.item()) for bound in tensor.aminmax())
