"""Files of named tensors, safetensors and torch's own: mapped, and nothing in them executed."""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import pickle
import struct
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import DTYPES

__all__ = ["Entry", "TensorFile", "open_safetensors", "open_torch_file"]

_MAX_HEADER_BYTES = 100_000_000

# Safetensors' names; those this package computes with are renamed, the rest only measured.
_RENAMED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ITEM_BYTES = {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U8": 1, "I8": 1}
_ITEM_BYTES |= {"U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4}
_ITEM_BYTES |= {"U64": 8, "I64": 8, "F64": 8, "C64": 8}

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
        dtype: One of DTYPES, or the file's own name for a dtype this package refuses.
        offset: Where its little-endian bytes begin in the file, or None where they aren't plain.
    """

    shape: tuple[int, ...]
    dtype: str
    offset: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFile:
    """A file of named tensors, known by its table alone.

    Attributes:
        path: The file.
        entries: Name to what is stored, in the order of the file.
        kind: "safetensors", "zip" (torch, mapped) or "legacy" (torch before 1.6, read whole).
    """

    path: Path
    entries: dict[str, Entry]
    kind: str

    def load(self) -> dict[str, Tensor]:
        """Maps every tensor of a supported dtype; a legacy file is read into memory instead.

        Returns:
            Name to a tensor on the file's pages; writing to it never reaches the file.

        Raises:
            ValueError: The file no longer is what it was when opened.
        """
        if self.kind != "safetensors":
            return _load_torch(self.path, mapped=self.kind == "zip")
        data = torch.from_file(
            str(self.path), shared=False, size=self.path.stat().st_size, dtype=torch.uint8
        )
        return {
            name: _view(data, entry) for name, entry in self.entries.items() if _is_supported(entry)
        }

    def release(self, part: Tensor) -> None:
        """Gives the pages under a part of load's tensors back to the system; they stay readable.

        Args:
            part: A contiguous part; anything else is left alone.
        """
        # Clean private pages are read again when touched. Heap memory would be lost: never legacy.
        advice = getattr(mmap, "MADV_DONTNEED", None)
        if self.kind == "legacy" or advice is None or not part.is_contiguous():
            return
        start = part.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        num_bytes = part.data_ptr() + part.nbytes - start
        if num_bytes:
            libc = ctypes.CDLL(None)
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(num_bytes), ctypes.c_int(advice))


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
    _check_is_file(path)
    num_bytes = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_bytes > min(num_bytes - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"{path}: truncated, or not a safetensors file")
        raw = stream.read(header_bytes)
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
    entries = dict(sorted(entries.items(), key=lambda item: item[1].offset or 0))
    return TensorFile(path=path, entries=entries, kind="safetensors")


def open_torch_file(path: Path) -> TensorFile:
    """Reads the table of a `.bin` or `.pth` that torch.save wrote.

    Only tensors are unpickled. A training checkpoint's `model` or `state_dict` is looked into.

    Args:
        path: The file.

    Returns:
        Its table; a legacy file was read whole to know it, and let go.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or holds anything but tensors.
    """
    _check_is_file(path)
    with path.open("rb") as stream:
        is_zip = stream.read(4) == b"PK\x03\x04"
    tensors = _load_torch(path, mapped=is_zip)
    entries = {
        name: Entry(shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))
        for name, tensor in tensors.items()
    }
    return TensorFile(path=path, entries=entries, kind="zip" if is_zip else "legacy")


def _check_is_file(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path}: not a file")


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
            all(map(is_size, (*shape, begin, end))) and begin <= end
        ):
            item_bytes = _ITEM_BYTES.get(dtype)
            if item_bytes is None or math.prod(shape) * item_bytes == end - begin:
                dtype = _RENAMED.get(dtype, dtype)
                entry = Entry(shape=tuple(shape), dtype=dtype, offset=data_start + begin)
                return begin, end, entry
    raise ValueError(f"{path}: the header's entry for {name!r} is damaged")


def _is_supported(entry: Entry) -> bool:
    return entry.dtype in DTYPES


def _view(data: Tensor, entry: Entry) -> Tensor:
    dtype = getattr(torch, entry.dtype)
    assert entry.offset is not None
    raw = data[entry.offset : entry.offset + math.prod(entry.shape) * dtype.itemsize]
    if entry.offset % dtype.itemsize:
        raw = raw.clone()  # old writers did not align the data
    return raw.view(dtype).view(entry.shape)


def _load_torch(path: Path, *, mapped: bool) -> dict[str, Tensor]:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: holds objects other than tensors; refusing to run them"
        ) from None
    except _LOAD_ERRORS:
        raise ValueError(f"{path}: truncated, or not a torch checkpoint") from None
    for key in ("model", "state_dict"):
        if isinstance(data, dict) and isinstance(data.get(key), dict):
            data = data[key]
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds a {type(data).__name__}, not named tensors")
    return OrderedDict(_checked(path, data))


def _checked(path: Path, data: dict[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in data.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise ValueError(f"{path}: {name} is stored as {value.layout}; only plain tensors are")
        yield name, value.detach()
