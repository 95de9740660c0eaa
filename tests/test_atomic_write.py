"""Files and folders appear whole or not at all, whatever happens on the way."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamac.runtime.atomic_write import new_folder, remove_abandoned, write_file


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    words = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_folder_takes_its_name_when_it_is_filled(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty", "a/b/c"):
        with new_folder(tmp_path / name) as folder:
            assert not (tmp_path / name / "file").exists()
            (folder / "file").write_text("x")
        assert (tmp_path / name / "file").read_text() == "x"
        assert not folder.exists()


def test_a_failure_leaves_nothing(tmp_path: Path):
    """The parents that were made used to stay."""

    def fail(path: Path, error: type[BaseException]) -> None:
        with new_folder(path) as folder:
            (folder / "inner").mkdir()
            raise error("on the way")

    for error in (KeyboardInterrupt, ValueError, OSError):
        with pytest.raises(error, match="on the way"):
            fail(tmp_path / "a" / "b" / "c", error)
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="on the way"):
        fail(tmp_path / "a" / "b", ValueError)
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]


def test_names_that_cannot_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name, message in (
        ("full", "full: already there; remove it or name a new folder"),
        ("full/file", "file: already there; remove it"),
        ("full/file/x", r"full/file/x: can't be made \(File exists\); name a folder elsewhere"),
        ("link", "link: already there"),
        ("here", "here: can't be replaced; name a new folder in it"),
        ("/", "/: not a name for a folder; name a new one in it"),
    ):
        with pytest.raises(ValueError, match=message), new_folder(tmp_path / name):
            pytest.fail("was taken")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "here", "link"]


def test_what_a_killed_process_left_is_replaced_or_removed(tmp_path: Path):
    """`.NAME.PID.partial` used to stay for ever."""
    for name in (".out.partial", ".other.partial", ".held.partial"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "half").write_text("half")
    with new_folder(tmp_path / "out") as folder:
        assert list(folder.iterdir()) == []
    held = os.open(tmp_path / ".held.partial", os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        remove_abandoned(tmp_path)
        with (
            pytest.raises(ValueError, match="another process is writing it; wait for it to end"),
            new_folder(tmp_path / "held"),
        ):
            pytest.fail("two write at once")
    finally:
        os.close(held)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".held.partial", "out"]


def test_a_full_disk_is_one_line_and_leaves_nothing(small_disk: Path):
    message = r"a/b: the disk is full; free some space, or name a folder elsewhere"
    with pytest.raises(ValueError, match=message), new_folder(small_disk / "a" / "b") as folder:
        (folder / "file").write_bytes(bytes(1 << 20))
    assert list(small_disk.iterdir()) == []
    with pytest.raises(OSError, match="No space") as caught:
        write_file(small_disk / "file", "x" * (1 << 20))
    assert caught.value.errno == errno.ENOSPC
    assert list(small_disk.iterdir()) == []


def test_a_file_is_replaced_whole(tmp_path: Path):
    write_file(tmp_path / "file", "one")
    write_file(tmp_path / "file", "two")
    assert (tmp_path / "file").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
