"""What goes wrong with values, bytes and files, and what may be said to it."""

from __future__ import annotations

import copy
import json
import os
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

__all__ = ["Allowed", "Damage", "damage_bytes", "damage_json", "damage_file", "odd_word"]

# What an accepted try may print: anything, since the mutation asks for another model; only the
# sound seed's text, since it changed nothing that counts or must be noticed; or it must be refused.
Allowed = Literal["any", "same", "refused"]

# JSON texts, for Python's own writer knows neither 5000 digits nor a hundred thousand brackets.
_ODD_JSON = (
    *("null", "true", "false", '"true"', '"false"', '"no"', '""', "0", "-1", "1", "2", "3", "64"),
    *("2147483648", "9223372036854775807", "9223372036854775808", "18446744073709551616"),
    *("1000000000", "10000000", "1e308", "1e-320", "1e400", "-0.0", "0.5", "2.5", "64.0"),
    *("NaN", "Infinity", "-Infinity", "9" * 400, "1" * 5000, '"32"', '"0.5"'),
    *("[]", "{}", "[0]", "[null]", "[[]]", '{"a": 1}', '[{"a": []}]', "[1, 2, 3]", '["a", "b"]'),
    *('"\\u001b[31mred\\u001b[0m"', '"\\u202eabc"', '"\\ud800"', '"a\\nb"', '"a\\u0000b"'),
    *('"../x"', '"/etc/passwd"', '"<s>"', '"</s>"', '"\U0001f600"', '"A"', '" "'),
    *('"llama3"', '"yarn"', '"linear"', '"dynamic"', '"default"', '"I64"', '"F16"', '"bfloat16"'),
    *('{"rope_type": "yarn", "factor": 2.0}', '{"type": "linear", "factor": 1e308}'),
    *('{"String": " "}', '{"Regex": "(a+)+$"}', '{"type": "ByteLevel"}'),
    *('"' + "A" * 100_000 + '"', "[" * 60 + "]" * 60, "[" * 100_000 + "]" * 100_000),
)
_WORDS = (
    *("", "-", "--", "-1", "0", "1", "2", "3", "7", "64", "65", "0.5", "1.5", "1e308", "1e-320"),
    *("nan", "inf", "-inf", "9" * 400, "9" * 5000, "9" * 100_000, "2147483647", "2147483648"),
    *("9223372036854775807", "9223372036854775808", "-9223372036854775809", "18446744073709551616"),
    *(
        "a\nb",
        "\x1b[31mred",
        "\u202eabc",
        "\udcff",
        "\U0001f600",
        "A" * 100_000,
        " ",
        "a b",
        "0x10",
    ),
    *("true", "None", "1_000", "\u0661", "+1", "1e3", "cpu", "cuda", "tensorrt", "float16", "roll"),
    *("bfloat16", "stop", "eager", "<s>", "</s>", "tinyllama-1.1b", "llama-9000", "org/name"),
    *(".", "..", "/", "/dev/null", "/dev/zero", "/proc/self/mem", "/etc/passwd", "missing", "~x"),
    *(
        "hf",
        "bundle",
        "meta2",
        "hf/config.json",
        "lit/lit-llama.pth",
        "text.txt",
        "new/er",
        "a" * 300,
    ),
)
_NEITHER_HERE_NOR_THERE = ("", "x", "null", "[]", "{}", "\0" * 1000, "\x80\x02}q.", "PK\x03\x04")
_LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 99\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One thing that was done.

    Attributes:
        note: In words, for the report.
        allowed: What may come of it.
        positions: Bytes of the undamaged file that were changed in place, if that is all.
    """

    note: str
    allowed: Allowed
    positions: tuple[int, ...] = ()


def odd_word(rng: Random) -> str:
    """A word of a command line that somebody might mean, or nobody."""
    return rng.choice(_WORDS)


def damage_json(rng: Random, raw: bytes, *, typed: bool) -> tuple[bytes, Damage]:
    """Changes a JSON text in one place, or its bytes.

    Args:
        rng: Decides.
        raw: A JSON object that has to be read.
        typed: Whether a value of another type than the sound one is never a way of saying
            something else, and an unknown key says nothing.

    Returns:
        The new text and what was done.
    """
    if rng.random() < 0.12:
        new, damage = damage_bytes(rng, raw)
    else:
        new, damage = _damage_value(rng, json.loads(raw), typed)
    return new, damage if _is_json(new) else replace(damage, allowed="refused")


def damage_bytes(rng: Random, data: bytes) -> tuple[bytes, Damage]:
    """Changes bytes of a file whose kind doesn't matter; the caller knows what it means.

    Args:
        rng: Decides.
        data: At least 2 bytes.

    Returns:
        The new bytes and what was done; what may come of it is open.
    """
    action = rng.choices(
        ("flip", "cut", "twice", "insert", "drop", "zeros", "exchange", "prefix", "append"),
        (50, 12, 4, 8, 8, 5, 5, 4, 4),
    )[0]
    at = rng.randrange(len(data))
    length = rng.choice((1, 1, 2, 8, 64, 4096))
    positions: tuple[int, ...] = ()
    note = f"{action} at {at}, {length} bytes"
    new = bytearray(data)
    if action == "flip":
        positions = tuple(rng.randrange(len(data)) for _ in range(rng.choice((1, 1, 1, 2, 5, 10))))
        for position in positions:
            new[position] = (new[position] + rng.randrange(1, 256)) % 256
        note = f"flip {list(positions)}"
    elif action == "cut":
        del new[at:]
    elif action == "twice":
        new += data
    elif action == "insert":
        new[at:at] = rng.randbytes(length)
    elif action == "drop":
        del new[at : at + length]
    elif action == "zeros":
        new[at : at + length] = bytes(len(new[at : at + length]))
        positions = tuple(range(at, min(at + length, len(data))))
    elif action == "exchange":
        half = len(data) // 2
        new = new[half:] + new[:half]
    elif action == "prefix":
        new[:0] = rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\n", b"\x80", b"#!"))
    else:
        new += rng.choice((b"\0", b"\n", b"x", b"}", b"PK\x05\x06" + bytes(18)))
    return bytes(new), Damage(note=note, allowed="any", positions=positions)


def damage_file(rng: Random, path: Path, *, required: bool, elsewhere: Path) -> Damage:
    """Makes a file another thing.

    Args:
        rng: Decides.
        path: The file.
        required: Whether nothing can be done without it.
        elsewhere: A folder that doesn't belong to the seed.

    Returns:
        What was done.
    """
    what = rng.choice(
        "gone empty folder fifo socket loop dangling zeros memory text pointer sparse sibling link"
        " twins".split()
    )
    allowed: Allowed = "refused" if required else "any"
    original = elsewhere / f"moved-{path.name}"
    siblings = sorted(p for p in path.parent.iterdir() if p.is_file() and p != path)
    path.rename(original)
    if what == "empty":
        path.touch()
    elif what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "socket":
        socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))
    elif what in ("loop", "dangling", "zeros", "memory"):
        targets = {"loop": path.name, "zeros": "/dev/zero", "memory": "/proc/self/mem"}
        path.symlink_to(targets.get(what, "missing"))
    elif what == "text":
        path.write_text(rng.choice(_NEITHER_HERE_NOR_THERE))
        allowed = "any"  # `{}` is an honest side file
    elif what == "pointer":
        path.write_text(_LFS_POINTER)
    elif what == "sparse":
        path.touch()
        os.truncate(path, 8 << 30)
    elif what == "sibling":
        path.write_bytes(rng.choice(siblings or [original]).read_bytes())
        allowed = "any"
    elif what == "link":
        path.symlink_to(original.resolve())
        allowed = "same"
    elif what == "twins":
        path.write_bytes(original.read_bytes())
        (path.parent / rng.choice(("notes.txt", "model.bin", "x.safetensors", "x.pth"))).touch()
        allowed = "any"
    return Damage(note=f"{path.name} is {what}", allowed=allowed)


def _damage_value(rng: Random, data: Any, typed: bool) -> tuple[bytes, Damage]:
    container, key = _pick(rng, data)
    old, where = container[key], f"{key!r:.40}"
    odd, mark = rng.choice(_ODD_JSON), "@odd@"
    actions = ["replace"] * 14 + ["wrap", "remove", "swap", "rename", "add", "twice"]
    action = rng.choice(actions)
    allowed: Allowed = "any"
    if action == "remove":
        del container[key]
    elif action == "swap":
        other, other_key = _pick(rng, data)
        container[key], other[other_key] = map(copy.deepcopy, (other[other_key], old))
        where += f" with {other_key!r:.40}"
    elif action == "rename" and isinstance(container, dict):
        container[rng.choice((f"{key}x", str(key)[:-1], "a\nb", "\x1b[1m"))] = container.pop(key)
    elif action == "add" and isinstance(container, dict):
        container["never_heard_of"] = mark
        allowed = "same" if typed else "any"
    else:
        if action == "wrap":
            odd = rng.choice(("[%s]", '{"a": %s}')) % json.dumps(old)
        container[key] = mark
        if typed and _is_another_type(str(key), old, odd):
            allowed = "same"
    text = json.dumps(data, indent=1)
    if action == "twice":  # the last one counts
        text = f'{{"{next(iter(data))}": {odd},{text[1:]}'
        where, allowed = "the first key", "any"
    has_odd = f'"{mark}"' in text or action == "twice"
    note = f"{action} {where}" + (f" by {odd:.60}" if has_odd else "")
    return text.replace(f'"{mark}"', odd).encode(), Damage(note=note, allowed=allowed)


def _pick(rng: Random, data: Any) -> tuple[Any, Any]:
    """A place in a JSON value, as container and key; long lists don't draw all the fire."""
    container = data
    while True:
        key = rng.choice(list(container)) if isinstance(container, dict) else None
        if key is None:
            key = rng.randrange(len(container))
        inner = container[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.3:
            return container, key
        container = inner


def _is_another_type(key: str, old: Any, text: str) -> bool:
    """Whether an odd value can't mean anything in the old one's place: "false" is not false."""
    try:
        new = json.loads(text)
    except (ValueError, RecursionError):
        return True
    if new is None or old is None or "token" in key:  # absent; ids and tokens have several forms
        return False
    if {type(old), type(new)} == {int, float}:
        return type(old) is int
    return type(old) is not type(new)


def _is_json(raw: bytes) -> bool:
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return True
