"""A window of a tensor: of its parts only what lies inside is read, where the file allows it."""

from __future__ import annotations

from dataclasses import replace

from .pieces import Merged, Part, Piece

__all__ = ["Window", "cut"]

# First and last + 1 index in each dimension of the whole tensor.
Window = tuple[tuple[int, int], ...]


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
        compute, kept = part.compute, tuple(slice(*bounds) for bounds in window)
        return replace(
            part,
            compute=lambda *stored: compute(*stored)[kept].clone(),  # the rest is let go
            shape=tuple(last - first for first, last in window),
        )
    ends = [a + n for a, n in zip(part.origin, part.shape, strict=True)]
    common = [
        (max(a, first), min(end, last))
        for a, end, (first, last) in zip(part.origin, ends, window, strict=True)
    ]
    if any(first >= last for first, last in common):
        return None
    inside = [(a - o, b - o) for (a, b), o in zip(common, part.origin, strict=True)]
    begin, *columns = [
        (a + (before[0] if before else 0), b + (before[0] if before else 0))
        for (a, b), before in zip(inside, (part.rows, part.columns)[: len(inside)], strict=True)
    ]
    is_whole = [bounds == (0, n) for bounds, n in zip(inside, part.shape, strict=True)]
    target = tuple(a - first for (a, _), (first, _) in zip(common, window, strict=True))
    return replace(
        part,
        rows=part.rows if is_whole[0] else begin,
        columns=part.columns if all(is_whole[1:]) else columns[0],
        target=target if any(target) else None,
    )
