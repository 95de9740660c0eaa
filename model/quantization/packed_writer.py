"""The file that packed weights are written to, in their places."""

from __future__ import annotations

import contextlib
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.safetensors_header import safetensors_header
from ..checkpoint.stored import copy_finite
from ..kernels.packed_product import dequantize
from ..packed import PackedFormat
from .rounding import InputMoments, round_for_inputs, round_weight

__all__ = ["PackedWriter", "QuantizedKind"]

_BLOCK_ELEMENTS = 1 << 19  # rounded at a time: its temporaries stay near a core's cache
_BLOCK_ROWS = 1 << 12  # where columns are rounded one after the other: each is worth some calls


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedKind:
    """What became of all weights of one kind and format.

    Attributes:
        kind: The module's own name, such as "q_proj".
        form: How they are packed.
        count: How many weights.
        relative_error: Root of the summed squared differences over that of the summed squares.
    """

    kind: str
    form: PackedFormat
    count: int
    relative_error: float


class PackedWriter:
    """Puts rows of weights in their places in a file and keeps account of the errors.

    Args:
        path: Of the file, in safetensors; `create` makes it.
        shapes: HF's name to the shape of every weight.
        packed: Module name to how its weight is packed.
        dtype: Of the others.
        source: Named in messages.
        pool: Rounds blocks of rows.

    Attributes:
        num_bytes: Of the file.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        packed: Mapping[str, PackedFormat],
        *,
        dtype: str,
        source: str,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._path, self._source, self._packed, self._pool = path, source, packed, pool
        self._layout = _lay_out(shapes, packed, dtype)
        self._header, self._begins = safetensors_header(self._layout)
        sizes = (math.prod(shape) * _item_bytes(d) for shape, d in self._layout.values())
        self.num_bytes = len(self._header) + sum(sizes)
        self._counts: dict[tuple[str, PackedFormat], set[str]] = defaultdict(set)
        self._errors: dict[tuple[str, PackedFormat], list[float]] = defaultdict(lambda: [0.0, 0.0])

    def create(self) -> None:
        """Makes the file in its whole size."""
        with self._path.open("wb") as stream:
            stream.write(self._header)
            stream.flush()
            os.posix_fallocate(stream.fileno(), 0, self.num_bytes)
        for module, form in self._packed.items():
            num_rows, num_words = self._rows(f"{module}.weight_packed").shape
            size = torch.tensor((num_rows, num_words * 32 // form.bits))
            self._rows(f"{module}.weight_shape").copy_(size)

    def is_packed(self, name: str) -> bool:
        """Whether a weight is rounded."""
        return name.endswith(".weight") and name.removesuffix(".weight") in self._packed

    def add(self, name: str, rows: slice, part: Tensor) -> None:
        """Writes rows of a weight, rounded to the nearest values if it is packed.

        Args:
            name: HF's.
            rows: Their place.
            part: Their values.

        Raises:
            ValueError: One is no number or past the range of the dtype.
        """
        if not self.is_packed(name):
            copy_finite(f"{self._source}: {name}", part, self._rows(name, rows))
            return
        module, width = name.removesuffix(".weight"), part.shape[1]
        form = self._packed[module]
        step = max(1, _BLOCK_ELEMENTS // width)
        packed = self._rows(f"{module}.weight_packed", rows).view(torch.uint8)
        scales = self._rows(f"{module}.weight_scale", rows)

        def write(start: int) -> tuple[float, float]:
            block = torch.empty(part[start : start + step].shape)
            copy_finite(f"{self._source}: {name}", part[start : start + step], block)
            values, scale = round_weight(block, form)
            packed[start : start + step] = values
            scales[start : start + step] = scale
            difference = dequantize(values, scale, None, torch.float32, width=width).sub_(block)
            return difference.square_().sum().item(), block.square_().sum().item()

        self._write_blocks(module, write, range(0, len(part), step))

    def replace(self, name: str, weight: Tensor, moments: Sequence[InputMoments]) -> None:
        """Writes a whole weight, rounded for its inputs.

        Args:
            name: HF's, of a packed weight.
            weight: [N, K] float32, which becomes what was written.
            moments: Of the inputs.
        """
        module, (num_rows, width) = name.removesuffix(".weight"), weight.shape
        form = self._packed[module]
        step = min(_BLOCK_ROWS, -(-num_rows // len(os.sched_getaffinity(0))))
        packed = self._rows(f"{module}.weight_packed").view(torch.uint8)
        scales = self._rows(f"{module}.weight_scale")

        def write(start: int) -> tuple[float, float]:
            own = slice(start, start + step)
            packed[own], scales[own] = round_for_inputs(weight[own], form, moments)
            error = square = 0.0
            few = max(1, _BLOCK_ELEMENTS // width)
            parts = (tensor[own].split(few) for tensor in (weight, packed, scales))
            for block, values, scale in zip(*parts, strict=True):
                made = dequantize(values, scale, None, torch.float32, width=width)
                square += block.square().sum().item()
                error += block.sub_(made).square_().sum().item()
                block.copy_(made)
            return error, square

        self._write_blocks(module, write, range(0, num_rows, step))

    def summary(self) -> tuple[QuantizedKind, ...]:
        """What was rounded, in the order in which kinds first came."""
        return tuple(
            QuantizedKind(
                kind=kind,
                form=form,
                count=len(self._counts[kind, form]),
                relative_error=math.sqrt(error / total) if total else 0.0,
            )
            for (kind, form), (error, total) in self._errors.items()
        )

    def _write_blocks(
        self, module: str, write: Callable[[int], tuple[float, float]], starts: range
    ) -> None:
        """Has blocks of rows written, by what gives their squared errors and squares."""
        key = (module.rpartition(".")[2], self._packed[module])
        self._counts[key].add(module)
        with _one_thread_each():
            for error, square in self._pool.map(write, starts):
                self._errors[key][0] += error
                self._errors[key][1] += square

    def _rows(self, name: str, rows: slice = slice(None)) -> Tensor:
        """A tensor's place in the file, mapped for this use only."""
        shape, dtype = self._layout[name]
        first, last, _ = rows.indices(shape[0])
        row_bytes = math.prod(shape[1:]) * _item_bytes(dtype)
        raw = np.memmap(
            self._path,
            dtype=np.uint8,
            mode="r+",
            offset=self._begins[name] + first * row_bytes,
            shape=((last - first) * row_bytes,),
        )
        return torch.from_numpy(raw).view(getattr(torch, dtype)).view(last - first, *shape[1:])


def _lay_out(
    shapes: Mapping[str, tuple[int, ...]], packed: Mapping[str, PackedFormat], dtype: str
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Tensor name to shape and dtype in compressed-tensors' words, neighbours in the order used.

    The small ones come last: behind them the others would not begin at lines of the cache, and be
    read a fifth slower.
    """
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    sizes: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, shape in shapes.items():
        module, _, key = name.rpartition(".")
        form = packed.get(module) if key == "weight" else None
        if form is None:
            found[name] = shape, dtype
            continue
        for part, (size, kind) in form.tensors(*shape).items():
            is_packed = part == "weight_packed"
            found[f"{module}.{part}"] = (
                ((size[0], size[1] // 4), "int32") if is_packed else (size, kind)
            )
        sizes[f"{module}.weight_shape"] = (2,), "int64"
    return found | sizes


def _item_bytes(dtype: str) -> int:
    return getattr(torch, dtype).itemsize


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """None of torch's own, which would wait for each other at every step."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
