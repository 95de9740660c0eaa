"""How much memory a process may take, in a control group and out of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamac.runtime.memory import available_bytes, format_bytes

MIB = 1 << 20


def write_group(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(text)
    return folder


def test_without_a_group_it_is_what_the_kernel_calls_available(tmp_path: Path):
    free = available_bytes(tmp_path)
    lines = Path("/proc/meminfo").read_text().splitlines()
    numbers = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    assert 0 < free <= numbers["MemTotal"]
    assert abs(free - numbers["MemAvailable"]) < 512 * MIB  # others allocate meanwhile


def test_a_group_limits_it_and_its_cached_files_make_room(tmp_path: Path):
    """Cached files counted as used: a model that had just been exported was refused."""
    stat = f"anon {MIB}\nfile {9 * MIB}\nactive_file {2 * MIB}\ninactive_file {4 * MIB}\nshmem 7\n"
    write_group(tmp_path, max=f"{16 * MIB}\n", current=f"{14 * MIB}\n", stat=stat)
    assert available_bytes(tmp_path) == (16 - 14 + 2 + 4) * MIB


def test_a_group_without_a_limit(tmp_path: Path):
    write_group(tmp_path, max="max\n", current=f"{MIB}\n", stat="active_file 0\n")
    assert available_bytes(tmp_path) > 16 * MIB


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * MIB, "5.0 MiB"), (3 << 29, "1.50 GiB")],
)
def test_format_bytes(size: int, text: str):
    assert format_bytes(size) == text
