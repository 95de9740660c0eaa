"""Which files were hashed and found right before, so that gigabytes are not hashed at every start.

A weights file may be a hard link to a checkpoint's, and who rewrites that changes the bundle. So a
file is taken for what it was only as long as its inode, size and times of change stay: that of its
bytes, which a copy may keep, and the inode's own, which nobody sets. What is known is kept per
user, in the cache and not in the bundle, which never changes.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from ..cache_folder import cache_folder

__all__ = ["is_marked", "mark_path", "set_mark"]


def mark_path(path: Path, sha256: str) -> Path | None:
    """The empty file that says of a file, as it is now, that it has a hash.

    Args:
        path: The file.
        sha256: Its hash.

    Returns:
        The mark, whether it is there or not; None where there can't be a cache.
    """
    status = path.stat()
    times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
    identity = f"{sha256} {status.st_ino} {status.st_size} {times}"
    try:
        return cache_folder("weights") / hashlib.sha256(identity.encode()).hexdigest()
    except ValueError:
        return None


def is_marked(mark: Path | None) -> bool:
    """Whether the file was found right before."""
    return mark is not None and mark.exists()


def set_mark(mark: Path | None) -> None:
    """Notes that the file is right; where nothing can be written, it is hashed again next time."""
    if mark is not None:
        with contextlib.suppress(OSError):
            mark.touch()
