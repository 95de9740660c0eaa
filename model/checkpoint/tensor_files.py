"""Files of named tensors: a table of what lies where, and the rows mapped; safetensors first."""

from __future__ import annotations

import json
import math
import mmap
import os
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...runtime.side_file import check_file, named_errors
from ...runtime.typed_json import shown

__all__ = [
    "MAX_TABLE_BYTES",
    "MAX_TENSORS",
    "Entry",
    "TensorFile",
    "is_tensor_name",
    "open_safetensors",
]

# Many times what a LLaMA of 1024 layers needs; beyond, reading the table would take minutes.
MAX_TABLE_BYTES = 16 << 20
MAX_TENSORS = 50_000
_LONGEST_NAME = 200

# Safetensors' names; those this package computes with are renamed, the rest only measured.
_RENAMED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_RENAMED |= {
    "U8": "uint8",
    "I8": "int8",
    "I32": "int32",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
}
_ITEM_BYTES = {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U8": 1, "I8": 1}
_ITEM_BYTES |= {"U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4}
_ITEM_BYTES |= {"U64": 8, "I64": 8, "F64": 8, "C64": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor of a file.

    Attributes:
        shape: As stored.
        dtype: One of config.DTYPES, or the file's own name for a dtype this package refuses.
        offset: Where its little-endian bytes begin in the file.
    """

    shape: tuple[int, ...]
    dtype: str
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFile:
    """A file of named tensors, known by its table alone.

    Attributes:
        path: The file.
        entries: Name to what is stored, in the order of the file.
        kind: "safetensors", "torch" or "gguf".
    """

    path: Path
    entries: dict[str, Entry]
    kind: str

    def rows(self, entry: Entry, first: int, last: int) -> Tensor:
        """Maps rows of a tensor of one of torch's dtypes; they are unmapped with the tensor.

        Args:
            entry: One of entries, or its bytes as something else.
            first: First row.
            last: Last row + 1, more than first.

        Returns:
            [last - first, ...] on the file's own pages where its bytes are aligned; writing to it
            never reaches the file.

        Raises:
            ValueError: The file is shorter than when it was opened.
        """
        dtype = getattr(torch, entry.dtype)
        row_bytes = math.prod(entry.shape[1:]) * dtype.itemsize
        start = entry.offset + first * row_bytes
        num_bytes = (last - first) * row_bytes
        page_start = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with self.path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size < start + num_bytes:
                raise ValueError(f"{self.path}: changed while it was read; load it again")
            mapping = mmap.mmap(
                stream.fileno(),
                start + num_bytes - page_start,
                access=mmap.ACCESS_COPY,  # writable, which torch wants, but not through to the file
                offset=page_start,
            )
        raw = torch.frombuffer(
            mapping, dtype=torch.uint8, offset=start - page_start, count=num_bytes
        )
        if start % dtype.itemsize:
            raw = raw.clone()  # old writers did not align the data
        return raw.view(dtype).view(last - first, *entry.shape[1:])


def open_safetensors(path: Path) -> TensorFile:
    """Reads the table of a safetensors file, checking that it describes the file exactly.

    Args:
        path: The file.

    Returns:
        Its table, in the order of the bytes.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The header is damaged, tensors overlap, or the file is truncated.

    Source: the format section of safetensors' README.
    """
    check_file(path)
    num_bytes = path.stat().st_size
    with named_errors(path), path.open("rb") as stream:
        prefix = stream.read(8)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_bytes > num_bytes - 8:
            raise ValueError(f"{path}: truncated, or not a safetensors file")
        raw = stream.read(min(header_bytes, MAX_TABLE_BYTES + 1))
    if len(raw) > MAX_TABLE_BYTES or raw.count(b'"data_offsets"') > MAX_TENSORS:
        raise ValueError(f"{path}: its header describes more than a LLaMA's tensors")
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not a safetensors file (its header isn't JSON)") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: not a safetensors file (its header isn't an object)")
    header.pop("__metadata__", None)

    spans: list[tuple[int, int]] = []
    entries: dict[str, Entry] = {}
    for name, item in header.items():
        begin, end, entry = _read_entry(path, name, item, 8 + header_bytes)
        spans.append((begin, end))
        entries[name] = entry
    spans.sort()
    for (_, end), (begin, _) in pairwise([(0, 0), *spans]):
        if begin != end:
            raise ValueError(f"{path}: tensors overlap or leave a gap at byte {end} of the data")
    expected = 8 + header_bytes + (spans[-1][1] if spans else 0)
    if num_bytes < expected:
        raise ValueError(
            f"{path}: truncated, {num_bytes} of {expected} bytes; download or copy it again"
        )
    if num_bytes > expected:
        raise ValueError(f"{path}: {num_bytes - expected} bytes past the last tensor")
    entries = dict(sorted(entries.items(), key=lambda item: item[1].offset))
    return TensorFile(path=path, entries=entries, kind="safetensors")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a key appears twice")
    return data


def _read_entry(path: Path, name: str, item: Any, data_start: int) -> tuple[int, int, Entry]:
    """One line of the header: begin and end within the data, and what it describes."""

    def is_size(value: Any) -> bool:
        return type(value) is int and value >= 0

    match item:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]} if (
            all(map(is_size, (*shape, begin, end)))
            and begin <= end
            and is_tensor_name(name)
            and re.fullmatch(r"\w{1,20}", dtype)
        ):
            item_bytes = _ITEM_BYTES.get(dtype)
            if item_bytes is None or math.prod(shape) * item_bytes == end - begin:
                # A dtype of the future, of unknown size, must not pass for one of ours.
                dtype = repr(dtype) if item_bytes is None else _RENAMED.get(dtype, dtype)
                entry = Entry(shape=tuple(shape), dtype=dtype, offset=data_start + begin)
                return begin, end, entry
    raise ValueError(f"{path}: the header's entry for {shown(name)} is damaged")


def is_tensor_name(name: object) -> bool:
    """Whether a file may call a tensor so: short, and nothing that a terminal obeys."""
    return isinstance(name, str) and name.isprintable() and len(name) <= _LONGEST_NAME
