from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from llamac.runtime.side_file import read_side_file
from llamac.runtime.typed_json import check_bool, check_int, check_number, read_json, shown

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("silu", "'silu'"),
        (3, "3"),
        (10**4000, "an integer of more than 60 digits"),
        ("\x1b[31mred\u202e", r"'\x1b[31mred\u202e'"),
        ([1, [2, "a\nb"]], r"[1, [2, 'a\nb']]"),
    ],
)
def test_shown_values(value: object, expected: str):
    assert shown(value) == expected


@pytest.mark.parametrize(
    "value", ["A" * 100_000, ["A" * 100] * 100_000, {"a" * 99: "b" * 99}, b"a" * 999, 10**59]
)
def test_what_is_shown_is_short_and_plain(value: object):
    """A file's values used to be echoed whole: lines of 100 kB."""
    assert len(shown(value)) <= 60
    assert shown(value).isprintable()


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}{message}") as caught:
        read_json(path, optional=True)
    assert len(str(caught.value)) < len(str(path)) + 120


def test_a_byte_order_mark_is_skipped(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": "é"}).encode())
    assert read_json(path) == {"a": "é"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", " is not JSON"),
        (b"\xff\xfe{", " is not JSON"),
        (b"[" * 100_000, " is not JSON"),
        (b"[1]", " holds list; it must be a JSON object"),
        (b'{"a": ' + b"9" * 5000 + b"}", ": holds a number of thousands of digits"),
        (POINTER, " is a Git LFS pointer; run git lfs pull"),
    ],
)
def test_files_that_hold_something_else(tmp_path: Path, raw: bytes, message: str):
    path = tmp_path / "config.json"
    path.write_bytes(raw)
    refused(path, message)


def test_a_file_of_gigabytes_is_not_read(tmp_path: Path):
    """It used to be read whole, until memory ended."""
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, 8 << 30)
    refused(path, ": larger than 64 MiB, the most that is read")


def test_what_is_not_a_file_is_named(tmp_path: Path):
    os.mkfifo(tmp_path / "config.json")
    refused(tmp_path / "config.json", ": not a file")
    (tmp_path / "folder.json").mkdir()
    refused(tmp_path / "folder.json", ": not a file")
    refused(tmp_path / ("a" * 999), ": can't be read")
    with pytest.raises(FileNotFoundError, match="absent: no such file"):
        read_side_file(tmp_path / "absent")
    assert read_json(tmp_path / "absent", optional=True) == {}


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs /proc")
def test_an_unreadable_file_is_named(tmp_path: Path):
    """The message used to be "Input/output error" alone."""
    (tmp_path / "config.json").symlink_to("/proc/self/mem")
    refused(tmp_path / "config.json", ": can't be read .Input/output error")


@pytest.mark.parametrize("value", ["false", "no", 0, 1, 2.5, [0], {}, None])
def test_only_true_and_false_are_booleans(value: object):
    with pytest.raises(ValueError, match="^tied is .*; it must be true or false$"):
        check_bool("tied", value)


@pytest.mark.parametrize("value", [0, 101, -1, True, 3.0, "3", None, 10**4000])
def test_integers_have_bounds(value: object):
    with pytest.raises(ValueError, match="^size is .*; it must be an integer from 1 to 100$"):
        check_int("size", value, most=100)


@pytest.mark.parametrize("value", [0, 2.5, -1, True, "1", float("nan"), float("inf"), 10**400])
def test_numbers_have_bounds(value: object):
    with pytest.raises(ValueError, match="^eps is .*; it must be a number above 0, at most 2$"):
        check_number("eps", value, most=2.0)


def test_integers_that_python_does_not_write_are_shown():
    assert shown(-(10**5000)) == "an integer of more than 60 digits"
