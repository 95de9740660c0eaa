"""Plain tables: the same on a terminal and in a pipe."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["format_table"]


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligns cells in columns two spaces apart.

    Args:
        rows: Of cells; a row may be shorter, and its last cell may then be of any length.

    Returns:
        The lines, without a newline at the end.
    """
    num_columns = max(len(row) for row in rows)
    widths = [
        max(
            (len(row[i]) for row in rows if i < len(row) - 1 or len(row) == num_columns > i),
            default=0,
        )
        for i in range(num_columns)
    ]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
