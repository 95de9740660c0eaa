"""GGUF files: llama.cpp's format, one file of metadata and of blocks of quantized weights."""

from __future__ import annotations

import hashlib
import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.side_file import check_file, named_errors
from ...runtime.typed_json import shown
from .tensor_files import MAX_TENSORS, Entry, TensorFile, is_tensor_name

__all__ = ["BLOCKS", "GgufFile", "GgufTensor", "read_gguf"]

# Type to a block's weights and bytes, of those that are read.
BLOCKS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (32, 34),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TYPES = dict(enumerate(("F32", "F16", "Q4_0", "Q4_1", "Q4_2", "Q4_3", "Q5_0", "Q5_1", "Q8_0")))
_TYPES |= dict(enumerate(("Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"), 9))
_TYPES |= dict(enumerate(("IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S"), 16))
_TYPES |= dict(
    enumerate(("IQ2_S", "IQ4_XS", "I8", "I16", "I32", "I64", "F64", "IQ1_M", "BF16"), 22)
)
_TYPES |= {30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0"}

# Kind of a value to struct's letter for it; 8 is a text, 9 a list.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_NUMBERS |= {12: "d"}
_TEXT, _LIST = 8, 9

# Many times what the largest published models have; beyond, a damaged count would fill the memory.
_MAX_VALUES = 10_000
_MAX_ITEMS = 1 << 22
_MAX_TABLE_BYTES = 256 << 20
_MAX_ALIGNMENT = 1 << 20
_MAX_DIM = 1 << 40
_LONGEST_KEY = 65_535


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """A tensor as the file describes it.

    Attributes:
        type: GGUF's name, one of BLOCKS.
        shape: Of the weights, rows first.
    """

    type: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """The table of a GGUF file.

    Attributes:
        file: Where the bytes are; a quantized tensor is uint8 [rows, bytes of a row].
        tensors: What these bytes mean, by the file's name.
        values: The metadata: numbers, booleans, texts and lists of one of them.
        digest: Of the metadata.
    """

    file: TensorFile
    tensors: dict[str, GgufTensor]
    values: dict[str, Any]
    digest: str


def read_gguf(path: Path) -> GgufFile:
    """Reads the metadata and the table of tensors, checking that they describe the file.

    Args:
        path: The file, of version 2 or 3.

    Returns:
        Its table; no weight is read.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is truncated, damaged, of another version or byte order, or holds a type of
            tensor that isn't read.

    Source: the specification, docs/gguf.md of github.com/ggml-org/ggml.
    """
    check_file(path)
    with named_errors(path), path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Reader(path, data))


class _Reader:
    """Takes values off a file's bytes, never past their end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 4

    def error(self, problem: str) -> ValueError:
        return ValueError(f"{self.path}: {problem}; download or copy it again")

    def numbers(self, letter: str, count: int = 1) -> tuple[Any, ...]:
        begin = self._skip(count * struct.calcsize(f"<{letter}"))
        return struct.unpack_from(f"<{count}{letter}", self.data, begin)

    def number(self, letter: str) -> Any:
        return self.numbers(letter)[0]

    def text(self) -> str:
        size = self.number("Q")
        begin = self._skip(size)
        try:
            return self.data[begin : begin + size].decode()
        except UnicodeDecodeError:
            raise self.error(f"damaged, a text at byte {begin} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind != _LIST:
            return self._plain(kind, 1)[0]
        kind, count = self.number("I"), self.number("Q")
        if count > _MAX_ITEMS:
            raise self.error(f"damaged, a list of {count} items")
        return [self.text() for _ in range(count)] if kind == _TEXT else self._plain(kind, count)

    def _plain(self, kind: int, count: int) -> list[Any]:
        if kind not in _NUMBERS:
            raise self.error(f"damaged, a value of kind {kind} before byte {self.at}")
        letter = _NUMBERS[kind]
        if letter == "?":  # struct takes any byte for true
            return [self._bool(n) for n in self.numbers("B", count)]
        found = list(self.numbers(letter, count))
        # The shortest decimal that is this float32: what the writer was told.
        return [float(str(np.float32(n))) for n in found] if letter == "f" else found

    def _bool(self, number: int) -> bool:
        if number > 1:
            raise self.error(f"damaged, a boolean before byte {self.at} is {number}")
        return number == 1

    def _skip(self, num_bytes: int) -> int:
        begin, end = self.at, self.at + num_bytes
        if end > len(self.data):
            raise self.error(f"truncated or damaged, byte {begin} begins what ends past the file")
        if end > _MAX_TABLE_BYTES:
            raise self.error("damaged, its metadata is far larger than a LLaMA's")
        self.at = end
        return begin


def _read(reader: _Reader) -> GgufFile:
    version = reader.number("I")
    if version not in (2, 3):
        if version and version % (1 << 16) == 0:
            raise ValueError(f"{reader.path}: big-endian; only little-endian files are read")
        raise ValueError(
            f"{reader.path}: GGUF version {version}; only 2 and 3 are read, convert the model again"
        )
    num_tensors, num_values = reader.numbers("Q", 2)
    if num_tensors > MAX_TENSORS or num_values > _MAX_VALUES:
        raise reader.error(f"damaged, {num_tensors} tensors and {num_values} values")
    values = _read_values(reader, num_values)
    digest = hashlib.sha256(memoryview(reader.data)[: reader.at]).hexdigest()
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or not (
        0 < alignment <= _MAX_ALIGNMENT and alignment.bit_count() == 1
    ):
        raise reader.error(f"damaged, general.alignment is {shown(alignment)}, no power of two")
    found = [_read_tensor(reader) for _ in range(num_tensors)]
    start = reader.at + -reader.at % alignment
    tensors: dict[str, GgufTensor] = {}
    entries: dict[str, Entry] = {}
    expected = 0
    for name, tensor, offset in sorted(found, key=lambda item: item[2]):
        entry = _entry(tensor, start + offset)
        if name in tensors or offset != expected:
            raise reader.error(f"damaged, tensor {name} is there twice, or not where it must be")
        tensors[name], entries[name] = tensor, entry
        end = offset + _num_bytes(tensor)
        if start + end > len(reader.data):
            raise reader.error(f"truncated, tensor {name} ends past the file")
        expected = end + -end % alignment
    file = TensorFile(path=reader.path, entries=entries, kind="gguf")
    return GgufFile(file=file, tensors=tensors, values=values, digest=digest)


def _read_values(reader: _Reader, count: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for _ in range(count):
        key = reader.text()
        if key in values or len(key) > _LONGEST_KEY or not re.fullmatch(r"[!-~]+", key):
            raise reader.error(f"damaged, {shown(key)} is no key, or is there twice")
        values[key] = reader.value(reader.number("I"))
    return values


def _read_tensor(reader: _Reader) -> tuple[str, GgufTensor, int]:
    """A line of the table: name, tensor, and where its bytes begin behind the table."""
    name = reader.text()
    num_dims = reader.number("I")
    if not is_tensor_name(name) or not 1 <= num_dims <= 4:
        raise reader.error(f"damaged, {shown(name)} of {num_dims} dimensions is no tensor")
    shape = tuple(reversed(reader.numbers("Q", num_dims)))
    number, offset = reader.numbers("I")[0], reader.number("Q")
    kind = _TYPES.get(number, f"type {number}")
    if kind not in BLOCKS:
        raise ValueError(
            f"{reader.path}: tensor {name} is stored as {kind}; only {', '.join(BLOCKS)} are read, "
            "take the model's Q4_K_M or Q8_0 file"
        )
    if not all(0 < size <= _MAX_DIM for size in shape) or shape[-1] % BLOCKS[kind][0]:
        raise reader.error(f"damaged, tensor {name} has shape {shown(list(shape))}")
    return name, GgufTensor(type=kind, shape=shape), offset


def _num_bytes(tensor: GgufTensor) -> int:
    num_weights, num_bytes = BLOCKS[tensor.type]
    return math.prod(tensor.shape) // num_weights * num_bytes


def _entry(tensor: GgufTensor, offset: int) -> Entry:
    if tensor.type in _DTYPES:
        return Entry(shape=tensor.shape, dtype=_DTYPES[tensor.type], offset=offset)
    num_weights, num_bytes = BLOCKS[tensor.type]
    row_bytes = tensor.shape[-1] // num_weights * num_bytes
    return Entry(shape=(*tensor.shape[:-1], row_bytes), dtype="uint8", offset=offset)
