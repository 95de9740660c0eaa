"""The header of a safetensors file, for files whose tensors are written one by one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import torch

__all__ = ["safetensors_header"]

_STORED_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_STORED_NAMES |= {"uint8": "U8", "int8": "I8", "int32": "I32", "int64": "I64"}
_ALIGNMENT = 64  # of the first tensor; the rest follow without gaps, as the format wants


def safetensors_header(
    tensors: Mapping[str, tuple[tuple[int, ...], str]],
) -> tuple[bytes, dict[str, int]]:
    """Lays tensors out in a file.

    Args:
        tensors: Name to shape and dtype, in the order of the file.

    Returns:
        The file's first bytes, and where each tensor begins in the file.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    begin = 0
    for name, (shape, dtype) in tensors.items():
        end = begin + math.prod(shape) * getattr(torch, dtype).itemsize
        stored = {"dtype": _STORED_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
        entries[name] = stored
        begins[name] = begin
        begin = end
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % _ALIGNMENT)
    header = len(raw).to_bytes(8, "little") + raw
    return header, {name: len(header) + begin for name, begin in begins.items()}
