"""NVIDIA's GPU and libraries as this process reaches them: through ctypes, without torch."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import struct
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..backend import BackendUnavailableError

__all__ = [
    "Gpu",
    "copy_rows",
    "driver_problem",
    "find_gpu",
    "free_bytes",
    "load_libraries",
    "needed_libraries",
    "num_gpus",
]

_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NEEDED, _DT_STRTAB = 1, 5
_COMPUTE_CAPABILITY = (75, 76)  # CUdevice_attribute: major, minor
_DEVICE_TO_DEVICE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU.

    Attributes:
        name: As the driver calls it.
        compute_capability: Such as "9.0".
        driver_cuda: The newest CUDA the driver runs, such as "13.0".
    """

    name: str
    compute_capability: str
    driver_cuda: str


def find_gpu(device_id: int = 0) -> Gpu | None:
    """Asks the driver for a GPU; None where there is no driver or no such GPU."""
    driver = _driver()
    device, number = ctypes.c_int(), ctypes.c_int()
    if driver is None or driver.cuDeviceGet(ctypes.byref(device), device_id):
        return None
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), device)
    capability = []
    for attribute in _COMPUTE_CAPABILITY:
        driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        capability.append(str(number.value))
    driver.cuDriverGetVersion(ctypes.byref(number))
    return Gpu(
        name=name.value.decode(),
        compute_capability=".".join(capability),
        driver_cuda=f"{number.value // 1000}.{number.value % 1000 // 10}",
    )


def num_gpus() -> int:
    """How many GPUs the driver shows to this process."""
    number, driver = ctypes.c_int(), _driver()
    return 0 if driver is None or driver.cuDeviceGetCount(ctypes.byref(number)) else number.value


def driver_problem() -> str | None:
    """What is missing below CUDA, in one line, or None."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return (
            "libcuda.so.1 was not found, the NVIDIA driver; install it, or run on another machine"
        )
    return None if num_gpus() else "the NVIDIA driver is here but reports no GPU; see nvidia-smi"


def needed_libraries(path: Path) -> list[str]:
    """NVIDIA libraries that a 64-bit ELF library links to, by SONAME.

    Loading it would tell as much, but ONNX Runtime's providers may only be loaded by itself.
    """
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as data:
        (table,) = struct.unpack_from("<Q", data, 0x20)
        entry_size, count = struct.unpack_from("<HH", data, 0x36)
        segments = []
        for index in range(count):
            kind, _, offset, address, _, size = struct.unpack_from(
                "<IIQQQQ", data, table + index * entry_size
            )
            segments.append((kind, offset, address, size))
        entry = next(offset for kind, offset, _, _ in segments if kind == _PT_DYNAMIC)
        tag, value = struct.unpack_from("<QQ", data, entry)
        names, strings = [], 0
        while tag:
            if tag == _DT_NEEDED:
                names.append(value)
            elif tag == _DT_STRTAB:
                strings = next(
                    value - address + offset
                    for kind, offset, address, size in segments
                    if kind == _PT_LOAD and address <= value < address + size
                )
            entry += 16
            tag, value = struct.unpack_from("<QQ", data, entry)
        found = [data[strings + name : data.find(b"\0", strings + name)].decode() for name in names]
    return [name for name in found if name.startswith(("libcu", "libnv"))]


def load_libraries(names: Iterable[str]) -> list[str]:
    """Loads libraries from the system or from NVIDIA's pip packages.

    The loader takes a library that is already loaded under its SONAME, so ONNX Runtime then finds
    those that lie in site-packages too.

    Args:
        names: SONAMEs, in any order.

    Returns:
        Those that could not be loaded.
    """
    missing = list(names)
    for _ in range(len(missing)):  # one may need another that comes later
        left = [name for name in missing if not _load(name)]
        if len(left) == len(missing):
            break
        missing = left
    return missing


def free_bytes(device_id: int) -> int:
    """Free memory of a GPU, once ONNX Runtime's libraries are loaded."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    with _current_device(device_id) as runtime:
        _check(runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)), "MemGetInfo")
    return free.value


def copy_rows(
    pointers: Iterable[int],
    *,
    num_heads: int,
    max_seq_len: int,
    row_bytes: int,
    rows: tuple[int, int],
    device_id: int,
) -> None:
    """Copies one row over another in slots [K, S, D] that lie on the GPU, and waits.

    Args:
        pointers: Where the slots begin.
        num_heads: K.
        max_seq_len: S.
        row_bytes: D elements.
        rows: The row read and the row written.
        device_id: The GPU.
    """
    pitch = ctypes.c_size_t(max_seq_len * row_bytes)
    source, target = (row * row_bytes for row in rows)
    with _current_device(device_id) as runtime:
        for pointer in pointers:
            status = runtime.cudaMemcpy2D(
                ctypes.c_void_p(pointer + target),
                pitch,
                ctypes.c_void_p(pointer + source),
                pitch,
                ctypes.c_size_t(row_bytes),
                ctypes.c_size_t(num_heads),
                _DEVICE_TO_DEVICE,
            )
            _check(status, "Memcpy2D")
        # ONNX Runtime's stream does not wait for this one.
        _check(runtime.cudaDeviceSynchronize(), "DeviceSynchronize")


def _driver() -> ctypes.CDLL | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return None if driver.cuInit(0) else driver


@contextlib.contextmanager
def _current_device(device_id: int) -> Iterator[ctypes.CDLL]:
    """The CUDA runtime that ONNX Runtime has loaded, on a GPU; the thread's own comes back."""
    runtime, before = _cuda_runtime(), ctypes.c_int()
    _check(runtime.cudaGetDevice(ctypes.byref(before)), "GetDevice")
    _check(runtime.cudaSetDevice(device_id), "SetDevice")
    try:
        yield runtime
    finally:
        runtime.cudaSetDevice(before)


def _cuda_runtime() -> ctypes.CDLL:
    for version in (13, 12):
        try:
            return ctypes.CDLL(f"libcudart.so.{version}")
        except OSError:
            continue
    raise BackendUnavailableError("libcudart.so is not loaded; see llamac doctor")


def _check(status: int, name: str) -> None:
    if status:
        raise BackendUnavailableError(f"cuda{name} failed with CUDA error {status}")


def _load(name: str) -> bool:
    patterns = (f"nvidia/*/lib/{name}", f"tensorrt_libs/{name}")
    packaged = (path for folder in sys.path for p in patterns for path in Path(folder).glob(p))
    for candidate in (name, *packaged):
        try:
            ctypes.CDLL(str(candidate), mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return True
    return False
