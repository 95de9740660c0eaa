"""The files that torch.save writes: mapped, and nothing in them executed."""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ...runtime.side_file import check_file, named_errors
from ...runtime.typed_json import shown
from .tensor_files import MAX_TABLE_BYTES, MAX_TENSORS, Entry, TensorFile, is_tensor_name

__all__ = ["open_torch_file"]

_SMALL_BYTES = 64 << 10  # of a norm or a bias: all of them are read in no time

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
    if len(items) > MAX_TENSORS or len({item.filename for item in items}) < len(items):
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
        if is_pickle and item.file_size > MAX_TABLE_BYTES:
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
        if not is_tensor_name(name):
            raise ValueError(f"{path}: the name {shown(name)} is not that of a tensor")
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {shown(name)} is a {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise ValueError(f"{path}: tensor {name} is sparse, quantized or without data")
    return {name: value.detach() for name, value in data.items()}
