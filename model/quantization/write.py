"""Writes a checkpoint anew with packed weights, a block of rows at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...runtime.atomic_write import new_folder
from ...runtime.bundle.manifest import TOKENIZER_NAMES
from ...runtime.cache_folder import cache_folder
from ...runtime.memory import format_bytes
from ..checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.dequantized import read_dequantized
from ..checkpoint.quantized import quantization_settings
from ..checkpoint.safetensors_header import safetensors_header
from ..checkpoint.stored import copy_finite, weight_shapes
from ..kernels.packed_product import dequantize
from ..packed import PackedFormat
from .recipe import Recipe
from .rounding import round_weight

__all__ = ["QuantizedKind", "quantize_checkpoint", "quantized_copy"]

logger = logging.getLogger(__name__)

_FILE = "model.safetensors"
_BLOCK_ELEMENTS = 1 << 19  # rounded at a time: its temporaries stay near a core's cache
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


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


def quantize_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    recipe: Recipe,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[QuantizedKind, ...]:
    """Writes a Hugging Face folder of packed weights, with all that is beside them.

    It is compressed-tensors' pack-quantized, which transformers and vLLM read. A tied head becomes
    a packed one of its own beside the embedding, which has no packed form that others read.

    Args:
        checkpoint: Of any format; packed weights are unpacked first.
        out: A new name, or an empty folder.
        recipe: Which weight gets how many bits.
        progress: Called with the weights done and their number.

    Returns:
        The kinds of weights, in the order in which they first appear.

    Raises:
        ValueError: `out` is in use, a weight isn't finite, or the disk is too small; nothing is
            left behind.
    """
    config = replace(checkpoint.config, tie_word_embeddings=False)
    shapes = weight_shapes(config)
    packed = recipe.formats(config, shapes)
    layout = _lay_out(shapes, packed, config.dtype)
    header, begins = safetensors_header(layout)
    num_bytes = len(header) + sum(math.prod(s) * _item_bytes(d) for s, d in layout.values())
    plain = tuple(
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if len(shape) == 2 and name.removesuffix(".weight") not in packed and name != _EMBEDDING
    )
    with new_folder(out) as folder:
        free_bytes = shutil.disk_usage(folder).free
        if num_bytes > free_bytes:
            raise ValueError(
                f"{out}: needs {format_bytes(num_bytes)}, {format_bytes(free_bytes)} are free there"
            )
        with (folder / _FILE).open("wb") as stream:
            stream.write(header)
            stream.flush()
            os.posix_fallocate(stream.fileno(), 0, num_bytes)
        total, done = sum(map(math.prod, shapes.values())), 0
        with _threads() as pool:
            writer = _Writer(folder / _FILE, layout, begins, packed, str(checkpoint.folder), pool)
            for name in shapes:
                for rows, part in _read(checkpoint, name):
                    writer.add(name, rows, part)
                    done += part.numel()
                    progress(done, total)
        facts = {**config.to_dict(), "quantization_config": quantization_settings(packed, plain)}
        text = json.dumps(facts, indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        for side in TOKENIZER_NAMES:
            if (checkpoint.side_folder / side).is_file():
                shutil.copyfile(checkpoint.side_folder / side, folder / side)
    return writer.summary()


def quantized_copy(
    checkpoint: Checkpoint, recipe: Recipe, *, progress: Callable[[str], None] = lambda _: None
) -> Checkpoint:
    """Quantizes a checkpoint into the user's cache, once.

    Args:
        checkpoint: What is quantized; the copy is known by its files' names, sizes and times, an
            adapter's among them, and replaces one of what they were before.
        recipe: Which weight gets how many bits.
        progress: Told what is being done.

    Returns:
        The packed checkpoint.

    Raises:
        ValueError: See quantize_checkpoint.
    """
    common, rest = _name(checkpoint, recipe)
    parent = cache_folder("quantized")
    folder = parent / f"{common}{rest}"
    if folder.exists():
        try:
            return open_checkpoint(folder)
        except (ValueError, OSError) as error:
            logger.warning("%s; it is made again", error)
            shutil.rmtree(folder)
    quantize_checkpoint(
        checkpoint,
        folder,
        recipe,
        progress=lambda done, total: progress(f"quantizing, {done / total:.0%}"),
    )
    for older in parent.glob(f"{common}-*"):
        if older != folder:  # of files that have changed since
            shutil.rmtree(older, ignore_errors=True)
    return open_checkpoint(folder)


class _Writer:
    """Puts rows in their places and keeps account of the errors."""

    def __init__(
        self,
        path: Path,
        layout: Mapping[str, tuple[tuple[int, ...], str]],
        begins: Mapping[str, int],
        packed: Mapping[str, PackedFormat],
        source: str,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._path, self._layout, self._begins, self._source = path, layout, begins, source
        self._packed, self._pool = packed, pool
        self._counts: dict[tuple[str, PackedFormat], set[str]] = defaultdict(set)
        self._errors: dict[tuple[str, PackedFormat], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for module in packed:
            shape = self._rows(f"{module}.weight_packed").shape
            form = packed[module]
            size = torch.tensor((shape[0], shape[1] * 32 // form.bits))
            self._rows(f"{module}.weight_shape").copy_(size)

    def add(self, name: str, rows: slice, part: Tensor) -> None:
        module = name.rpartition(".")[0]
        form = self._packed.get(module) if part.dim() == 2 else None
        if form is None:
            copy_finite(f"{self._source}: {name}", part, self._rows(name, rows))
            return
        width = part.shape[1]
        step = max(1, _BLOCK_ELEMENTS // width)
        packed = self._rows(f"{module}.weight_packed", rows).view(torch.uint8)
        scales = self._rows(f"{module}.weight_scale", rows)

        def write(start: int) -> tuple[float, float]:
            """Rounds a block; gives its squared error and squares."""
            block = torch.empty(part[start : start + step].shape)
            copy_finite(f"{self._source}: {name}", part[start : start + step], block)
            values, scale = round_weight(block, form)
            packed[start : start + step] = values
            scales[start : start + step] = scale
            difference = dequantize(values, scale, None, torch.float32, width=width).sub_(block)
            return difference.square_().sum().item(), block.square_().sum().item()

        key = (module.rpartition(".")[2], form)
        self._counts[key].add(module)
        for error, square in self._pool.map(write, range(0, len(part), step)):
            self._errors[key][0] += error
            self._errors[key][1] += square

    def summary(self) -> tuple[QuantizedKind, ...]:
        return tuple(
            QuantizedKind(
                kind=kind,
                form=form,
                count=len(self._counts[kind, form]),
                relative_error=math.sqrt(error / total) if total else 0.0,
            )
            for (kind, form), (error, total) in self._errors.items()
        )

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


def _read(checkpoint: Checkpoint, name: str) -> Iterator[tuple[slice, Tensor]]:
    """A weight in float32 or as stored, by rows; a tied head is the embedding."""
    if name == _HEAD and checkpoint.config.tie_word_embeddings:
        name = _EMBEDDING
    yield from read_dequantized(checkpoint, name)


def _item_bytes(dtype: str) -> int:
    return getattr(torch, dtype).itemsize


def _name(checkpoint: Checkpoint, recipe: Recipe) -> tuple[str, str]:
    """Of a copy: what all copies of the source have in common, and the rest for its files now."""
    folders = {checkpoint.folder, checkpoint.side_folder}
    paths = {piece.file.path for piece in checkpoint.pieces}
    own = str(min(paths).resolve())
    if checkpoint.adapter is not None:
        own += f" {checkpoint.adapter.resolve()}"
        folders.add(checkpoint.adapter)
        paths.update(checkpoint.adapter.glob("*.safetensors"))
    paths |= {path for folder in folders for path in folder.glob("*.json")}
    paths |= {checkpoint.side_folder / name for name in TOKENIZER_NAMES}
    facts = [
        (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(paths)
        if path.is_file()
    ]
    config = checkpoint.config
    # What a recipe is, and how it rounds, may change.
    forms = sorted(recipe.formats(config, weight_shapes(config)).items())
    rounding = Path(__file__).with_name("rounding.py").read_bytes()
    return f"{_digest(own)}-{recipe.name}", f"-{_digest(repr((facts, forms, rounding)))}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


@contextlib.contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """One for each core, and none of torch's, which would wait for each other at every step."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)
