"""Where a tensor's bytes lie in files, and how they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .tensor_files import Entry, TensorFile

__all__ = ["Computed", "Conversion", "LowRank", "Merged", "Part", "Piece"]

# No more than this much of a tensor is mapped or converted at a time.
_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """How rows as stored become rows of a tensor.

    Attributes:
        apply: From any number of stored rows to as many of the tensor.
        row_shape: Of a converted row.
        dtype: Of the result.
    """

    apply: Callable[[Tensor], Tensor]
    row_shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Rows of a stored tensor and the place they fill in an HF tensor.

    Attributes:
        name: HF's name.
        file: The file that holds it.
        key: The file's name for it.
        rows: First and last + 1 row taken of the stored tensor; None takes all.
        columns: The same of the columns, after the conversion.
        target: First index filled in the HF tensor, one per dimension; None is the origin.
        interleaved_head_dim: D if RoPE's pairs lie side by side in each head's rows (Meta's
            layout); they are moved D/2 apart (HF's layout) while reading.
        conversion: Applied to the rows first, or None.
        bytes_as: What the stored bytes are taken for instead of what the file says, or None.
    """

    name: str
    file: TensorFile
    key: str
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None
    target: tuple[int, ...] | None = None
    interleaved_head_dim: int | None = None
    conversion: Conversion | None = None
    bytes_as: Entry | None = None

    @property
    def entry(self) -> Entry:
        """The stored tensor."""
        return self.bytes_as or self.file.entries[self.key]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the part taken."""
        if not self.entry.shape:  # a lone number
            return ()
        first, last = self.rows or (0, self.entry.shape[0])
        row_shape = self.entry.shape[1:] if self.conversion is None else self.conversion.row_shape
        if self.columns is not None:
            row_shape = (self.columns[1] - self.columns[0], *row_shape[1:])
        return (last - first, *row_shape)

    @property
    def dtype(self) -> str:
        """Of the part taken."""
        return self.entry.dtype if self.conversion is None else self.conversion.dtype

    @property
    def offset(self) -> int:
        """Where the stored tensor begins in its file."""
        return self.entry.offset

    @property
    def num_bytes(self) -> int:
        """Of the file, that reading it takes."""
        first, last = self.rows or (0, self.entry.shape[0] if self.entry.shape else 1)
        row = math.prod(self.entry.shape[1:]) * getattr(torch, self.entry.dtype).itemsize
        return (last - first) * row

    @property
    def is_as_stored(self) -> bool:
        """Whether the file's bytes are the whole tensor's, in HF's layout."""
        return self.rows is None and self.is_contiguous

    @property
    def is_contiguous(self) -> bool:
        """Whether neighbouring bytes of the file are the whole tensor's, in HF's layout."""
        changed = self.columns, self.target, self.interleaved_head_dim, self.conversion
        return all(change is None for change in changed)

    @property
    def origin(self) -> tuple[int, ...]:
        """First index filled in the HF tensor."""
        return self.target if self.target is not None else (0,) * len(self.shape)

    def read(self) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """Reads it in blocks: the slice of the HF tensor that each fills, and the block."""
        first, last = self.rows or (0, self.shape[0])
        head_dim = self.interleaved_head_dim
        unit = head_dim or 1  # rows that stay together
        row_bytes = math.prod(self.entry.shape[1:]) * 4  # at most
        step = max(unit, _BLOCK_BYTES // row_bytes // unit * unit)
        for start in range(first, last, step):
            part = self.file.rows(self.entry, start, min(start + step, last))
            if self.conversion is not None:
                part = self.conversion.apply(part)
            if self.columns is not None:
                part = part[:, slice(*self.columns)]
            if head_dim is not None:
                part = _uninterleave(part, head_dim)
            origin = (self.origin[0] + start - first, *self.origin[1:])
            yield tuple(slice(a, a + n) for a, n in zip(origin, part.shape, strict=True)), part
            del part  # unmapped before the next part is mapped


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """A whole tensor that follows from stored ones that are read whole.

    Attributes:
        name: HF's name.
        inputs: The stored tensors.
        compute: From the stored tensors, in their order, to the tensor.
        shape: Of the result.
        dtype: Of the result.
    """

    name: str
    inputs: tuple[Piece, ...]
    compute: Callable[..., Tensor]
    shape: tuple[int, ...]
    dtype: str

    @property
    def file(self) -> TensorFile:
        """Of the first input."""
        return self.inputs[0].file

    @property
    def key(self) -> str:
        """The first input's name."""
        return self.inputs[0].key

    @property
    def origin(self) -> tuple[int, ...]:
        """First index filled in the HF tensor."""
        return (0,) * len(self.shape)

    @property
    def offset(self) -> int:
        """Where the first input begins in its file."""
        return self.inputs[0].offset

    @property
    def num_bytes(self) -> int:
        """The inputs'."""
        return sum(piece.num_bytes for piece in self.inputs)

    @property
    def is_as_stored(self) -> bool:
        """Never."""
        return False

    def read(self) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """Computes it: the slice of the HF tensor that it fills, and the tensor."""
        stored = [torch.cat([part for _, part in piece.read()]) for piece in self.inputs]
        yield tuple(slice(0, n) for n in self.shape), self.compute(*stored)


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """A change of a weight [N, K]: scale * (left @ right).

    Attributes:
        left: [N, r], stored.
        right: [r, K], stored.
        scale: What the product is multiplied by.
        transposed: Whether both are stored transposed.
    """

    left: Piece
    right: Piece
    scale: float
    transposed: bool = False

    def factors(self) -> tuple[Tensor, Tensor]:
        """Reads both whole.

        Returns:
            left and right, float32.

        Raises:
            ValueError: One holds what is not a number.
        """
        left, right = (self._read(piece) for piece in (self.left, self.right))
        return (left.T, right.T) if self.transposed else (left, right)

    def _read(self, piece: Piece) -> Tensor:
        whole = torch.cat([part.float() for _, part in piece.read()])
        if not torch.isfinite(whole).all():
            raise ValueError(
                f"{piece.file.path}: {piece.key} holds what is not a number: its weights are "
                "damaged; copy them again"
            )
        return whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """A part of a weight with a change added, in float32.

    Attributes:
        part: Of the weight as stored.
        change: Of the whole weight.
        begin: Row and column of the whole weight where the HF tensor begins that the part is of.
    """

    part: Part
    change: LowRank
    begin: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """HF's name."""
        return self.part.name

    @property
    def file(self) -> TensorFile:
        """The part's."""
        return self.part.file

    @property
    def key(self) -> str:
        """The part's."""
        return self.part.key

    @property
    def shape(self) -> tuple[int, ...]:
        """The part's."""
        return self.part.shape

    @property
    def dtype(self) -> str:
        """Of the sum."""
        return "float32"

    @property
    def origin(self) -> tuple[int, ...]:
        """First index filled in the HF tensor."""
        return self.part.origin

    @property
    def offset(self) -> int:
        """The part's."""
        return self.part.offset

    @property
    def num_bytes(self) -> int:
        """The part's and the change's."""
        change = self.change.left.num_bytes + self.change.right.num_bytes
        return self.part.num_bytes + change

    @property
    def is_as_stored(self) -> bool:
        """Never."""
        return False

    def read(self) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """Reads the part's blocks and adds what changes there."""
        left, right = self.change.factors()
        for (rows, columns), block in self.part.read():
            first, start = rows.start + self.begin[0], columns.start + self.begin[1]
            change = left[first : first + len(block)], right[:, start : start + block.shape[1]]
            yield (rows, columns), torch.addmm(block.float(), *change, alpha=self.change.scale)
            del block  # unmapped before the next is mapped


Part = Piece | Computed | Merged


def _uninterleave(weight: Tensor, head_dim: int) -> Tensor:
    """Rows 0 1 2 3 of a head with D = 4 become 0 2 1 3: pair (2i, 2i+1) becomes (i, i + D/2)."""
    pairs = weight.unflatten(0, (-1, head_dim // 2, 2))  # [heads, D/2, 2, ...]
    return pairs.transpose(1, 2).flatten(0, 2)
