"""Where compiled code and engines are kept between processes."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder", "cache_root"]


def cache_root() -> Path:
    """The folder of all caches, `$XDG_CACHE_HOME/llamac` or `~/.cache/llamac`; it may be absent."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamac"


def cache_folder(name: str) -> Path:
    """Makes a private folder (mode 0700) below the user's cache.

    Args:
        name: What it is for.

    Returns:
        The folder of this name below cache_root().
    """
    folder = cache_root() / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder
