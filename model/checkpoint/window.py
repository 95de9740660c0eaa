"""A window of a tensor: of its parts only what lies inside is read, where the file allows it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from .pieces import Computed, Merged, Part, Piece
from .tensor_files import TensorFile

__all__ = ["Window", "cut"]

# First and last + 1 index in each dimension of the whole tensor.
Window = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """A part that has to be computed whole, and is let go but for a window.

    Attributes:
        part: Of the whole tensor.
        window: What is kept; the HF tensor that it fills is the window.
    """

    part: Computed
    window: Window

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
        """Of the window."""
        return tuple(last - first for first, last in self.window)

    @property
    def dtype(self) -> str:
        """The part's."""
        return self.part.dtype

    @property
    def origin(self) -> tuple[int, ...]:
        """The window's own."""
        return (0,) * len(self.window)

    @property
    def offset(self) -> int:
        """The part's."""
        return self.part.offset

    @property
    def is_as_stored(self) -> bool:
        """Never."""
        return False

    def read(self) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """Computes the part and gives a copy of the window."""
        for _, whole in self.part.read():
            kept = whole[tuple(slice(*bounds) for bounds in self.window)].clone()
            yield tuple(slice(0, n) for n in self.shape), kept


def cut(part: Part, window: Window) -> Part | None:
    """Takes what a part of a tensor holds of a window of it.

    Args:
        part: Of the whole tensor. Where heads' rows are moved while reading, the window's rows are
            whole heads.
        window: What is kept of the whole tensor.

    Returns:
        The same part of a tensor that is the window, or None if they have nothing in common.
    """
    if isinstance(part, Merged):
        inner = cut(part.part, window)
        begin = tuple(a + first for a, (first, _) in zip(part.begin, window, strict=True))
        return None if inner is None else replace(part, part=inner, begin=begin)
    if not isinstance(part, Piece):
        assert isinstance(part, Computed), "a window is cut once"
        return _Cut(part=part, window=window)
    ends = [a + n for a, n in zip(part.origin, part.shape, strict=True)]
    kept = [
        (max(a, first), min(end, last))
        for a, end, (first, last) in zip(part.origin, ends, window, strict=True)
    ]
    if any(first >= last for first, last in kept):
        return None
    inside = [(a - o, b - o) for (a, b), o in zip(kept, part.origin, strict=True)]
    begin, *columns = [
        (a + (before[0] if before else 0), b + (before[0] if before else 0))
        for (a, b), before in zip(inside, (part.rows, part.columns)[: len(inside)], strict=True)
    ]
    is_whole = [bounds == (0, n) for bounds, n in zip(inside, part.shape, strict=True)]
    target = tuple(a - first for (a, _), (first, _) in zip(kept, window, strict=True))
    return replace(
        part,
        rows=part.rows if is_whole[0] else begin,
        columns=part.columns if all(is_whole[1:]) else columns[0],
        target=target if any(target) else None,
    )
