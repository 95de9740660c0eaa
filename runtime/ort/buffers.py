"""Memory that ONNX Runtime reads and writes in place: step inputs, logits and the KV cache.

Every buffer is allocated once, zero-filled, and bound by its address.
"""

from __future__ import annotations

from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..backend import check_rows
from .gpu_libraries import copy_rows

__all__ = ["ONNX_TYPES", "Buffer", "CacheBuffers", "allocate"]

# onnx.TensorProto's numbers.
ONNX_TYPES = {"float32": 1, "int64": 7, "float16": 10, "bfloat16": 16}
# NumPy has no bfloat16; its bits do.
_NUMPY_TYPES = {"float32": "f4", "int64": "i8", "float16": "f2", "bfloat16": "u2"}
_ALIGNMENT = 64


class Buffer(Protocol):
    """Zero-filled memory of a fixed shape, on the host or on the GPU."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what it holds."""
        ...

    @property
    def pointer(self) -> int:
        """Its address, constant for its life."""
        ...

    def write(self, values: NDArray[Any]) -> None:
        """Copies an array of the buffer's shape into it."""
        ...

    def read(self) -> NDArray[Any]:
        """The content; on the host a view, from the GPU a copy."""
        ...


def allocate(shape: tuple[int, ...], dtype: str, *, device_id: int | None) -> Buffer:
    """Allocates zeros: under a mask, 0 x garbage could be 0 x NaN.

    Args:
        shape: Of the buffer.
        dtype: Of its elements.
        device_id: The GPU; None is the host.

    Returns:
        The buffer.
    """
    if device_id is None:
        return _HostBuffer(shape, dtype)
    return _GpuBuffer(shape, dtype, device_id)


class CacheBuffers:
    """The KV cache: per layer one K and one V buffer [B, K, S, D].

    Args:
        shape: B, K, S, D.
        num_layers: Number of layers.
        dtype: Of the elements.
        device_id: The GPU where it lies; None is the host.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        num_layers: int,
        dtype: str,
        *,
        device_id: int | None,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device_id = device_id
        self._buffers = [allocate(shape, dtype, device_id=device_id) for _ in range(2 * num_layers)]

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot in one buffer."""
        return prod(self.shape[1:]) * _item_bytes(self.dtype)

    def pointers(self, slot: int = 0) -> list[int]:
        """Where a slot begins in each buffer: K and V of the first layer, of the second, ..."""
        return [buffer.pointer + slot * self.slot_bytes for buffer in self._buffers]

    def copy_row(self, slot: int, source: int, target: int) -> None:
        """Copies one row of a slot over another, in all heads and buffers."""
        if self.device_id is not None:
            _, num_heads, max_seq_len, head_dim = self.shape
            copy_rows(
                self.pointers(slot),
                num_heads=num_heads,
                max_seq_len=max_seq_len,
                row_bytes=head_dim * _item_bytes(self.dtype),
                rows=(source, target),
                device_id=self.device_id,
            )
            return
        for buffer in self._buffers:
            array = buffer.read()
            array[slot, :, target] = array[slot, :, source]

    def read_rows(self, slot: int, num_rows: int) -> NDArray[np.float32]:
        """Copies the first rows of a slot: [buffers, K, num_rows, D] float32."""
        return np.stack(
            [_widened(buffer.read()[slot, :, :num_rows], self.dtype) for buffer in self._buffers]
        )

    def write_rows(self, slot: int, rows: NDArray[np.float32]) -> None:
        """Puts such rows into a slot.

        Raises:
            ValueError: Their sizes are not this cache's.
        """
        _, num_heads, max_seq_len, head_dim = self.shape
        check_rows(rows, (len(self._buffers), num_heads, head_dim), max_seq_len)
        for buffer, own in zip(self._buffers, rows, strict=True):
            array = buffer.read()
            array[slot, :, : own.shape[1]] = _narrowed(own, self.dtype)
            if self.device_id is not None:
                buffer.write(array)


class _HostBuffer:
    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape = shape
        size = prod(shape) * _item_bytes(dtype)
        raw = np.zeros(size + _ALIGNMENT, np.uint8)
        begin = -raw.ctypes.data % _ALIGNMENT
        self._array = raw[begin : begin + size].view(_NUMPY_TYPES[dtype]).reshape(shape)
        self.pointer = self._array.ctypes.data

    def write(self, values: NDArray[Any]) -> None:
        self._array[:] = values

    def read(self) -> NDArray[Any]:
        return self._array


class _GpuBuffer:
    def __init__(self, shape: tuple[int, ...], dtype: str, device_id: int) -> None:
        from onnxruntime import OrtValue

        self.shape = shape
        element_type = ONNX_TYPES[dtype]
        self._value = OrtValue.ortvalue_from_shape_and_type(
            list(shape), element_type, "cuda", device_id
        )
        self._value.update_inplace(np.zeros(shape, _NUMPY_TYPES[dtype]))
        self.pointer: int = self._value.data_ptr()

    def write(self, values: NDArray[Any]) -> None:
        self._value.update_inplace(np.ascontiguousarray(values))

    def read(self) -> NDArray[Any]:
        return self._value.numpy()


def _item_bytes(dtype: str) -> int:
    return np.dtype(_NUMPY_TYPES[dtype]).itemsize


def _widened(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    if dtype != "bfloat16":
        return values.astype(np.float32)
    return (values.astype(np.uint32) << 16).view(np.float32)


def _narrowed(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    if dtype != "bfloat16":
        return values.astype(_NUMPY_TYPES[dtype])
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)  # ties to even
