"""Files of a checkpoint: named in whatever goes wrong with them, small ones read within a limit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["check_file", "named_errors", "read_side_file"]

_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_BYTES = 64 << 20  # several times the largest published tokenizer


def check_file(path: Path) -> None:
    """Checks that a file can be read and is what its name says.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It isn't a regular file, can't be read, or stands for one that Git LFS keeps.
    """
    with named_errors(path):
        exists, is_file = path.exists(), path.is_file()
    if not exists:
        raise FileNotFoundError(f"{path}: no such file")
    if not is_file:
        raise ValueError(f"{path}: not a file")
    with named_errors(path), path.open("rb") as stream:
        head = stream.read(len(_POINTER))
    if head == _POINTER:
        raise ValueError(f"{path} is a Git LFS pointer; run git lfs pull")


def read_side_file(path: Path, *, max_bytes: int = _MAX_BYTES) -> bytes:
    """Reads a whole file.

    Args:
        path: The file.
        max_bytes: What it may hold.

    Returns:
        Its bytes.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: See check_file; or it is larger.
    """
    check_file(path)
    with named_errors(path), path.open("rb") as stream:
        raw = stream.read(max_bytes + 1) if path.stat().st_size <= max_bytes else None
    if raw is None or len(raw) > max_bytes:
        raise ValueError(
            f"{path}: larger than {max_bytes >> 20} MiB, the most that is read; copy it again"
        )
    return raw


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turns an error of the operating system into a ValueError that names the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror})") from None
