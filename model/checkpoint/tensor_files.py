"""Files of named tensors, safetensors and torch's own: mapped, and nothing in them executed."""

from __future__ import annotations

import json
import math
import mmap
import os
import pickle
import re
import struct
import warnings
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ...runtime.side_file import check_file, named_errors
from ...runtime.typed_json import shown

__all__ = ["Entry", "TensorFile", "open_safetensors", "open_torch_file"]

# Many times what a LLaMA of 1024 layers needs; beyond, reading the table would take minutes.
_MAX_TABLE_BYTES = 16 << 20
_MAX_TENSORS = 50_000
_LONGEST_NAME = 200
_SMALL_BYTES = 64 << 10  # of a norm or a bias: all of them are read in no time

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

_ZIP_LENGTHS_AT = 26  # where a record's header has the lengths of its name and extra field
_HAS_DESCRIPTOR = 8  # the flag

# What torch.load raises for bytes that are not a checkpoint, besides UnpicklingError.
_LOAD_ERRORS = (
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    struct.error,
)


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
        kind: "safetensors" or "torch".
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
        raw = stream.read(min(header_bytes, _MAX_TABLE_BYTES + 1))
    if len(raw) > _MAX_TABLE_BYTES or raw.count(b'"data_offsets"') > _MAX_TENSORS:
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


def open_torch_file(path: Path) -> TensorFile:
    """Reads the table of a `.bin` or `.pth` that torch.save wrote.

    Only tensors are unpickled. A training checkpoint's `model` or `state_dict` is looked into.

    Args:
        path: The file.

    Returns:
        Its table, in the order of the pickle.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, older than torch 1.6, or holds anything but plain tensors.

    Source: torch's notes on serialization: under FakeTensorMode, torch.load leaves the offset of
        each storage instead of reading it.
    """
    check_file(path)
    records = _check_zip(path)
    with FakeTensorMode():
        tensors = _named_tensors(path, _load_torch(path))
    num_bytes = path.stat().st_size
    entries: dict[str, Entry] = {}
    for name, tensor in tensors.items():
        base = tensor.untyped_storage()._checkpoint_offset
        if base is None or not tensor.is_contiguous():
            raise ValueError(f"{path}: tensor {name} is not plain bytes; save it contiguous")
        # torch computes the offsets from how it writes; another program's archive has others.
        if records.get(base) != tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{path}: tensor {name} is not where torch would have put it; "
                "save it again with torch.save"
            )
        offset = int(base) + int(tensor.storage_offset()) * tensor.itemsize
        if offset + tensor.nbytes > num_bytes:
            raise ValueError(f"{path}: truncated, tensor {name} ends past the file")
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries[name] = Entry(shape=tuple(tensor.shape), dtype=dtype, offset=offset)
    return TensorFile(path=path, entries=entries, kind="torch")


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
            and _is_name(name)
            and re.fullmatch(r"\w{1,20}", dtype)
        ):
            item_bytes = _ITEM_BYTES.get(dtype)
            if item_bytes is None or math.prod(shape) * item_bytes == end - begin:
                # A dtype of the future, of unknown size, must not pass for one of ours.
                dtype = repr(dtype) if item_bytes is None else _RENAMED.get(dtype, dtype)
                entry = Entry(shape=tuple(shape), dtype=dtype, offset=data_start + begin)
                return begin, end, entry
    raise ValueError(f"{path}: the header's entry for {shown(name)} is damaged")


def _is_name(name: object) -> bool:
    return isinstance(name, str) and name.isprintable() and len(name) <= _LONGEST_NAME


def _check_zip(path: Path) -> dict[int, int]:
    """The tensors' bytes must stand in the file as they are, where its directory says.

    Returns where each record begins, and its number of bytes.
    """
    with named_errors(path), path.open("rb") as stream:
        if stream.read(1) == b"\x80":
            raise ValueError(
                f"{path}: a bare pickle; save it again with torch.save of torch >= 1.6"
            )
        try:
            with zipfile.ZipFile(stream) as archive:
                problem = _zip_problem(archive, stream)
                items = archive.infolist()
                records = {_begin(item, stream): item.file_size for item in items}
        except (zipfile.BadZipFile, OSError, *_LOAD_ERRORS):  # OSError: a seek to nowhere
            problem = "truncated, damaged, or not a torch checkpoint; copy it again"
    if problem is not None:
        raise ValueError(f"{path}: {problem}")
    return records


def _zip_problem(archive: zipfile.ZipFile, stream: BinaryIO) -> str | None:
    """Checks where every record lies, and of the pickle and of small records what they hold."""
    items = sorted(archive.infolist(), key=lambda item: item.header_offset)
    if len(items) > _MAX_TENSORS or len({item.filename for item in items}) < len(items):
        return "holds more than a LLaMA's tensors, or a record twice"
    if any(item.compress_type != zipfile.ZIP_STORED for item in items):
        return "compressed; save it again with torch.save"
    ends = [*(item.header_offset for item in items[1:]), archive.start_dir]
    for item, end in zip(items, ends, strict=True):
        archive.open(item).close()  # compares the name in front of the record
        if not _fills(item, end, stream):
            return "damaged, a record is not where its directory says; copy it again"
    for item in items:
        is_pickle = item.filename.endswith(".pkl")
        if is_pickle and item.file_size > _MAX_TABLE_BYTES:
            return "holds more than a LLaMA's tensors"
        if is_pickle or item.file_size <= _SMALL_BYTES:
            raw = archive.read(item)  # compares its CRC-32
            if item.filename.endswith("/byteorder") and raw != b"little":
                return "not little-endian; save it again on such a machine"
    return None


def _begin(item: zipfile.ZipInfo, stream: BinaryIO) -> int:
    """Where a record's bytes begin: behind its header, name and extra field."""
    stream.seek(item.header_offset + _ZIP_LENGTHS_AT)
    lengths = struct.unpack("<HH", stream.read(4))
    return item.header_offset + _ZIP_LENGTHS_AT + 4 + sum(lengths)


def _fills(item: zipfile.ZipInfo, end: int, stream: BinaryIO) -> bool:
    """Whether a record, and the descriptor that may follow it, ends where the next begins."""
    stream.seek(_begin(item, stream) + item.compress_size)
    gap = end - stream.tell()
    if not item.flag_bits & _HAS_DESCRIPTOR:
        return gap == 0
    return gap in (16, 24) and stream.read(8) == b"PK\7\10" + struct.pack("<I", item.CRC)


def _load_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: damaged, or holds objects other than tensors; refusing to run them"
        ) from None
    except _LOAD_ERRORS:
        raise ValueError(
            f"{path}: truncated, damaged, or not a torch checkpoint; copy it again"
        ) from None


def _named_tensors(path: Path, data: Any) -> dict[str, Tensor]:
    for key in ("model", "state_dict"):
        if isinstance(data, dict) and isinstance(data.get(key), dict):
            data = data[key]
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds a {type(data).__name__}, not named tensors")
    for name, value in data.items():
        if not _is_name(name):
            raise ValueError(f"{path}: the name {shown(name)} is not that of a tensor")
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {shown(name)} is a {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise ValueError(f"{path}: tensor {name} is sparse, quantized or without data")
    return {name: value.detach() for name, value in data.items()}
