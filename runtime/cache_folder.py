"""Where compiled code, engines and other things worth keeping lie between processes."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

__all__ = ["cache_folder", "cache_root", "cache_sizes", "clear_caches", "folder_bytes"]


def cache_root() -> Path:
    """The folder of all caches; it may be absent.

    Returns:
        `$XDG_CACHE_HOME/llamac`, or `~/.cache/llamac`. A user who has no home, or may not write
        there, as in a container, has a folder of their own among the temporary files.
    """
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "llamac"
    home = Path(os.path.expanduser("~"))  # stays "~" where the system doesn't know the user
    folder = home / ".cache" / "llamac"
    return folder if home.is_absolute() and _can_be_made(folder) else _temporary_root()


def cache_folder(name: str) -> Path:
    """Makes a private folder (mode 0700) below the user's cache.

    Args:
        name: What it is for.

    Returns:
        The folder of this name below cache_root().

    Raises:
        ValueError: It can't be made, or it is another user's, whose code would be run.
    """
    root = cache_root()
    folder = root / name
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status = root.lstat()
        if root == _temporary_root() and (
            not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid()
        ):
            raise PermissionError(None, "it is another user's")
        folder.chmod(0o700)
    except OSError as error:
        raise ValueError(
            f"{folder}: can't be made ({error.strerror}); set XDG_CACHE_HOME to a folder you may "
            "write to"
        ) from None
    return folder


def cache_sizes() -> dict[str, int]:
    """Bytes of each cache, by its name; none is made."""
    root = cache_root()
    if not root.is_dir():
        return {}
    return {entry.name: folder_bytes(entry) for entry in sorted(root.iterdir()) if entry.is_dir()}


def clear_caches(names: Iterable[str] | None = None) -> int:
    """Deletes caches; what they held is made again when it is wanted.

    Args:
        names: Some of cache_sizes(); None is all.

    Returns:
        The bytes that were freed.

    Raises:
        ValueError: There is no such cache.
        OSError: One can't be deleted.
    """
    sizes = cache_sizes()
    chosen = list(sizes) if names is None else list(dict.fromkeys(names))
    for name in chosen:
        if name not in sizes:
            raise ValueError(f"cache is {name!r}; there are {', '.join(sizes) or 'none'}")
    for name in chosen:
        folder = cache_root() / name
        if not folder.is_symlink():
            shutil.rmtree(folder)
            continue
        for entry in folder.iterdir():  # the user's own place for it stays
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    return sum(sizes[name] for name in chosen)


def folder_bytes(folder: Path) -> int:
    """Bytes of the files below a folder, of those that stay while it looks."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _can_be_made(folder: Path) -> bool:
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    return os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)


def _temporary_root() -> Path:
    return Path(tempfile.gettempdir()) / f"llamac-{os.geteuid()}"
