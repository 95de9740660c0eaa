"""Where caches are, whoever runs llamac, and how they are measured and cleared."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamac.runtime.cache_folder import cache_folder, cache_root, cache_sizes, clear_caches

PRINT_FOLDER = """
import os
from llamac.runtime.cache_folder import cache_folder
os.setgroups([]); os.setgid(12345); os.setuid(12345)
try:
    print(cache_folder("x"))
except ValueError as error:
    print(error)
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def folder_of_unknown_user(tmp_path: Path, **environment: str) -> str:
    """What cache_folder says to a user whom the system does not know."""
    kept = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME", "TMPDIR")}
    tmp_path.chmod(0o777)
    words = [sys.executable, "-c", PRINT_FOLDER]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        check=True,
        env=kept | {"TMPDIR": str(tmp_path)} | environment,
        cwd="/",
    )
    return done.stdout.strip()


@pytest.fixture
def open_tmp(tmp_path: Path) -> Path:
    """A folder that another user reaches."""
    for parent in tmp_path.parents[:3]:
        if parent.stat().st_uid == os.geteuid() and parent != Path("/tmp"):
            parent.chmod(0o755)
    return tmp_path


@needs_root
def test_a_user_without_a_home_gets_a_private_temporary_folder(open_tmp: Path):
    """`RuntimeError: Could not determine home directory.` it used to be."""
    folder = open_tmp / "llamac-12345" / "x"
    assert folder_of_unknown_user(open_tmp) == str(folder)
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
    # Containers say that such a user's home is the root.
    assert folder_of_unknown_user(open_tmp, HOME="/") == str(folder)
    assert folder_of_unknown_user(open_tmp, HOME="/nonexistent") == str(folder)


@needs_root
def test_a_home_that_can_be_written_is_used(open_tmp: Path):
    assert folder_of_unknown_user(open_tmp, HOME=str(open_tmp)) == f"{open_tmp}/.cache/llamac/x"


@needs_root
def test_another_users_folder_is_refused(open_tmp: Path):
    """Code is loaded from there."""
    (open_tmp / "llamac-12345").mkdir(mode=0o777)
    (open_tmp / "llamac-12345").chmod(0o777)
    message = f"{open_tmp}/llamac-12345/x: can't be made (it is another user's); set XDG_CACHE_HOME"
    assert folder_of_unknown_user(open_tmp).startswith(message)


@needs_root
def test_a_folder_that_was_asked_for_is_never_replaced(open_tmp: Path):
    said = folder_of_unknown_user(open_tmp, XDG_CACHE_HOME="/")
    assert said == (
        "/llamac/x: can't be made (Permission denied); set XDG_CACHE_HOME to a folder you may "
        "write to"
    )


def test_caches_are_measured_and_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_sizes() == {}
    assert clear_caches() == 0
    for name, size in (("a", 5), ("b", 7), ("c", 11)):
        (cache_folder(name) / "deep").mkdir()
        (cache_folder(name) / "deep" / "file").write_bytes(bytes(size))
    assert cache_sizes() == {"a": 5, "b": 7, "c": 11}
    with pytest.raises(ValueError, match="cache is 'd'; there are a, b, c"):
        clear_caches(["a", "d"])
    assert clear_caches(["a", "a"]) == 5
    assert cache_sizes() == {"b": 7, "c": 11}
    assert clear_caches() == 18
    assert list(cache_root().iterdir()) == []


def test_a_cache_that_lies_elsewhere_is_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    elsewhere, other = tmp_path / "disk", tmp_path / "other"
    for folder in (elsewhere, elsewhere / "deep", other):
        folder.mkdir()
        (folder / "file").write_bytes(b"123")
    (elsewhere / "link").symlink_to(other)
    cache_folder("a")
    (cache_root() / "b").symlink_to(elsewhere)
    assert clear_caches(["b"]) >= 6
    assert (cache_root() / "b").is_symlink()
    assert [*elsewhere.iterdir()] == []
    assert (other / "file").exists()
    assert (cache_root() / "a").exists()
