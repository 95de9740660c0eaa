"""Where compiled code and engines are kept between processes."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder(name: str) -> Path:
    """Makes a private folder (mode 0700) below the user's cache.

    Args:
        name: What it is for.

    Returns:
        `$XDG_CACHE_HOME/llamac/name`, or `~/.cache/llamac/name`.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "llamac" / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder
