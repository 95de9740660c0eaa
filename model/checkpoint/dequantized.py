"""Weights as plain numbers, however they are stored."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..kernels.packed_product import dequantize
from .stored import Checkpoint

__all__ = ["read_dequantized", "read_whole"]

_BLOCK_ELEMENTS = 1 << 22


def read_dequantized(checkpoint: Checkpoint, name: str) -> Iterator[tuple[slice, Tensor]]:
    """Reads a weight by blocks of whole rows.

    Args:
        checkpoint: What is read.
        name: HF's name of the weight, packed or not.

    Yields:
        The rows, and their values: float32 of a packed weight, else as stored.
    """
    module, _, key = name.rpartition(".")
    form = checkpoint.packed.get(module) if key == "weight" else None
    if form is None:
        yield from _by_rows(checkpoint, name)
        return
    names = [n for n in checkpoint.tensors if n.startswith(f"{module}.weight_")]
    parts = {n.rpartition("_")[2]: read_whole(checkpoint, n) for n in names}
    width = parts["packed"].shape[1] * 8 // form.bits
    order = parts.pop("order", None)
    step = max(1, _BLOCK_ELEMENTS // width)
    for start in range(0, len(parts["packed"]), step):
        rows = slice(start, start + step)
        block = {kind: part[rows] for kind, part in parts.items()}
        weight = dequantize(
            *(block["packed"], block["scale"], block.get("minimum"), torch.float32), width=width
        )
        if order is not None:
            weight = torch.empty_like(weight).index_copy_(1, order.long(), weight)
        yield slice(start, start + len(weight)), weight


def _by_rows(checkpoint: Checkpoint, name: str) -> Iterator[tuple[slice, Tensor]]:
    """Blocks as they come where they are whole rows, else the whole tensor."""
    shape = checkpoint.tensors[name].shape
    pieces = [piece for piece in checkpoint.pieces if piece.name == name]
    if all(piece.shape[1:] == shape[1:] for piece in pieces):
        for _, place, part in checkpoint.read([name]):
            yield place[0], part
            del part
    else:
        yield slice(0, shape[0]), read_whole(checkpoint, name)


def read_whole(checkpoint: Checkpoint, name: str) -> Tensor:
    """Reads one tensor as it is stored.

    Args:
        checkpoint: What is read.
        name: One of its tensors.

    Returns:
        All of it.
    """
    stored = checkpoint.tensors[name]
    whole = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
    for _, place, part in checkpoint.read([name]):
        whole[place] = part
    return whole
