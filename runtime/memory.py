"""How much memory there is."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["available_bytes", "format_bytes"]


def available_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes a new allocation can take: what the kernel calls available, within the cgroup.

    Args:
        cgroup: The process's control group, version 2; absent where there is none.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line)
    except (FileNotFoundError, StopIteration):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = (_read_number(cgroup / name) for name in ("memory.max", "memory.current"))
    if limit is None or used is None:
        return free
    # Cached files are counted as used, and make room.
    counts = (line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    cached = sum(int(size) for name, size in counts if name in ("active_file", "inactive_file"))
    return min(free, limit - used + cached)


def format_bytes(size: float) -> str:
    """Writes a size as people read it: "4.4 MiB"."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None
