"""Damage that knows a file's format, and so whether it can be noticed."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from random import Random

from damage import Damage, damage_bytes, damage_json

__all__ = ["damage_content", "damage_quantization"]


def damage_content(rng: Random, path: Path) -> Damage:
    """Changes what a file holds.

    Args:
        rng: Decides.
        path: A file of a checkpoint.

    Returns:
        What was done.
    """
    raw = path.read_bytes()
    if path.suffix == ".json":
        new, damage = damage_json(rng, raw, typed=path.name != "tokenizer.json")
        # Whatever else an index says, the weights are those that lie there.
        if path.name.endswith("index.json") and damage.allowed == "any":
            damage = replace(damage, allowed="same")
    elif path.suffix == ".safetensors":
        new, damage = _damage_safetensors(rng, raw)
    elif path.suffix in (".bin", ".pth"):
        new, damage = _damage_zip(rng, raw)
    elif path.suffix == ".gguf":
        new, damage = _damage_gguf(rng, raw)
    elif b" 0\n" in raw[:10]:
        new, damage = _damage_ranks(rng, raw)
    else:  # a template, or a SentencePiece model, which has no checksum
        new, damage = damage_bytes(rng, raw)
    path.write_bytes(new)
    return damage


def damage_quantization(rng: Random, path: Path) -> Damage:
    """Changes what a config.json says of the weights' quantization, and nothing else.

    Args:
        rng: Decides.
        path: The file.

    Returns:
        What was done.
    """
    config = json.loads(path.read_bytes())
    settings = json.dumps(config["quantization_config"]).encode()
    new, damage = damage_json(rng, settings, typed=True)
    config["quantization_config"] = mark = "@settings@"
    path.write_bytes(json.dumps(config).encode().replace(f'"{mark}"'.encode(), new))
    return damage


def _damage_safetensors(rng: Random, raw: bytes) -> tuple[bytes, Damage]:
    end = 8 + int.from_bytes(raw[:8], "little")
    header, data = raw[8:end], raw[end:]
    where = rng.random()
    if where < 0.5:
        new, damage = damage_json(rng, header, typed=True)
        # Two tensors of one shape may have been exchanged, which nobody can see.
        if damage.allowed == "any" and not damage.note.startswith("swap"):
            damage = replace(damage, allowed="same")
        return len(new).to_bytes(8, "little") + new + data, damage
    if where < 0.75:
        new, damage = damage_bytes(rng, raw[:end])
        return new + data, replace(damage, allowed="same")
    new, damage = damage_bytes(rng, raw)
    if any(position >= end for position in damage.positions) or new == raw:
        return new, damage
    return new, replace(damage, allowed="same" if damage.positions else "refused")


def _damage_gguf(rng: Random, raw: bytes) -> tuple[bytes, Damage]:
    """Most of it where a byte means much: the config's keys and the table of tensors."""
    if rng.random() < 0.3:
        new, damage = damage_bytes(rng, raw)
        # What is behind the last weight says nothing.
        if damage.note.startswith(("cut", "append", "twice")):
            damage = replace(damage, allowed="same")
        return new, damage
    lists, tensors = raw.index(b"tokenizer."), raw.index(b"token_embd")
    end = raw.rindex(b".weight") + 40
    parts = ((0, lists), (lists, tensors), (tensors, end))
    first, last = rng.choices(parts, (45, 15, 40))[0]
    new, damage = damage_bytes(rng, raw[first:last])
    note = f"from {first}: {damage.note}"
    return raw[:first] + new + raw[last:], replace(damage, note=note, positions=())


def _damage_zip(rng: Random, raw: bytes) -> tuple[bytes, Damage]:
    """Everything but the weights' own bytes is a table that says where they are."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        items = archive.infolist()
        if rng.random() < 0.15:
            return _rebuilt(rng, {item.filename: archive.read(item) for item in items})
    tables: list[int] = []
    begin = 0
    for item in items:
        lengths = raw[item.header_offset + 26 : item.header_offset + 30]
        name_length, extra_length = (int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
        end = item.header_offset + 30 + name_length + extra_length
        if "/data/" in item.filename:
            tables += range(begin, end)
            begin = end + item.file_size
    tables += range(begin, len(raw))
    if rng.random() < 0.6:
        new = bytearray(raw)
        positions = tuple(rng.choice(tables) for _ in range(rng.choice((1, 1, 1, 2, 5))))
        for position in positions:
            new[position] = (new[position] + rng.randrange(1, 256)) % 256
        return bytes(new), Damage(note=f"flip tables {list(positions)}", allowed="same")
    changed, damage = damage_bytes(rng, raw)
    if not damage.positions or set(damage.positions) <= set(tables):
        damage = replace(damage, allowed="same")
    return changed, damage


def _rebuilt(rng: Random, records: dict[str, bytes]) -> tuple[bytes, Damage]:
    """Another archive of the same records, or nearly."""
    name = rng.choice(list(records))
    what = rng.choice(("drop", "shorten", "lengthen", "rename", "shuffle", "compress", "extra"))
    names = list(records)
    compression = zipfile.ZIP_DEFLATED if what == "compress" else zipfile.ZIP_STORED
    if what == "drop":
        names.remove(name)
    elif what == "shuffle":
        rng.shuffle(names)
    elif what in ("shorten", "lengthen"):
        records[name] = records[name][:-1] if what == "shorten" else records[name] + b"\0"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for key in names:
            new = f"{key}x" if what == "rename" and key == name else key
            archive.writestr(new, records[key])
        if what == "extra":
            archive.writestr(f"{name.partition('/')[0]}/more", b"\0" * 1000)
    return buffer.getvalue(), Damage(note=f"zip: {what} {name}", allowed="same")


def _damage_ranks(rng: Random, raw: bytes) -> tuple[bytes, Damage]:
    """Ranks count up from 0, one a line, as many as the model has rows."""
    lines = raw.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    what = rng.choice(("cut", "cut", "drop", "twice", "exchange", "rank", "blank", "bytes"))
    if what == "bytes":
        return damage_bytes(rng, raw)
    if what == "cut":
        del lines[at:]
    elif what == "drop":
        del lines[at]
    elif what == "twice":
        lines.insert(at, lines[at])
    elif what == "exchange":
        other = rng.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    elif what == "rank":
        number = rng.choice((b"-1", b"0", b"1", b"999999", b"9" * 5000, b"x", b"1_0", b"0x1"))
        lines[at] = lines[at].split()[0] + b" " + number + b"\n"
    else:
        lines.insert(at, rng.choice((b"\n", b"  \n", b"IQ==\n", b"IQ== 0 0\n", b"\xff\xfe 1\n")))
    new = b"".join(lines)
    damage = Damage(note=f"{what} line {at + 1}", allowed="refused")
    if what in ("exchange", "blank", "rank"):  # the order of lines says nothing the ranks don't
        damage = replace(damage, allowed="same")
    return new, damage
