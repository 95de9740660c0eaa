"""The bundle's weight files: the checkpoint's own where they serve, else converted once."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..model.checkpoint import Checkpoint
from ..model.checkpoint.dequantized import read_dequantized, read_whole
from ..model.checkpoint.safetensors_header import safetensors_header
from ..model.checkpoint.stored import copy_finite
from ..model.config import LlamaConfig
from ..model.tables import rope_tables
from ..runtime.bundle.manifest import WEIGHT_BYTES, StoredWeight, WeightFile
from ..runtime.memory import format_bytes

__all__ = [
    "POSITIVE_SCALE",
    "SIGNED",
    "UNPACKED",
    "WeightPlan",
    "plan_conversion",
    "plan_links",
    "plan_weights",
    "write_rope_tables",
    "write_weights",
]

# What TensorRT wants instead of weight_packed: signed values, and a table that is plain. It takes 8
# bits with positive scales alone: groups of others have the opposite values, or zeros.
SIGNED, UNPACKED = "weight_signed", "weight_unpacked"
POSITIVE_SCALE = "weight_positive_scale"

# Another filesystem, a filesystem without hard links, or too many of them.
_NO_LINK_ERRORS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightPlan:
    """One weight file of the bundle, before it exists.

    Attributes:
        content: What the manifest will say of it.
        source: The checkpoint's file that is hard linked; None converts the weights.
        bytes: Size of the file.
    """

    content: WeightFile
    source: Path | None
    bytes: int


def plan_weights(checkpoint: Checkpoint, dtypes: Sequence[str]) -> list[WeightPlan]:
    """Decides which files hold the weights, each weight once per dtype.

    The checkpoint's files serve where every weight is stored in the dtype, in HF's layout, at an
    offset that is a multiple of its item size.

    Args:
        checkpoint: Where the weights are.
        dtypes: That graphs want, distinct.

    Returns:
        The files, under names that no other file of a bundle has.
    """
    shapes = {name: stored.shape for name, stored in checkpoint.tensors.items()}
    wanted = {dtype: {n: (shape, dtype) for n, shape in shapes.items()} for dtype in dtypes}
    linked = {dtype: plan_links(checkpoint, wanted[dtype]) for dtype in dtypes}
    plans = [plan for found in linked.values() for plan in found]
    for dtype in dtypes:
        if not linked[dtype]:
            name = f"model-{dtype}.safetensors" if plans else "model.safetensors"
            plans.append(plan_conversion(name, wanted[dtype]))
    return plans


def write_weights(
    checkpoint: Checkpoint, plan: WeightPlan, folder: Path, progress: Callable[[str], None]
) -> None:
    """Makes one weight file.

    A hard link shares its bytes with the checkpoint: who edits a checkpoint file in place changes
    the bundle, which opening with check=True finds.

    Args:
        checkpoint: Where the weights are.
        plan: The file.
        folder: Where it goes.
        progress: Told what is being done.

    Raises:
        ValueError: A weight does not fit its dtype, or the disk is too small.
    """
    path = folder / plan.content.file
    if plan.source is None:
        _check_space(path, plan.bytes)
        dtypes = dict.fromkeys(stored.dtype for stored in plan.content.tensors.values())
        progress(f"converting weights to {', '.join(dtypes)}")
        _convert_weights(checkpoint, plan.content, path, plan.bytes)
        return
    try:
        os.link(plan.source, path)
    except OSError as error:
        if error.errno not in _NO_LINK_ERRORS:
            raise
        _check_space(path, plan.bytes)
        progress(f"copying {path.name}")
        shutil.copyfile(plan.source, path)


def write_rope_tables(config: LlamaConfig, num_positions: int, path: Path) -> WeightFile:
    """Writes the RoPE rows, float32, that all graphs share.

    Args:
        config: Supplies the angles.
        num_positions: Number of rows.
        path: The file.

    Returns:
        What the manifest says of it.

    Raises:
        ValueError: The disk is too small.
    """
    tables = dict(zip(("rope.cos", "rope.sin"), rope_tables(config, num_positions), strict=True))
    wanted = {name: (tuple(table.shape), "float32") for name, table in tables.items()}
    header, content = _lay_out(path.name, wanted)
    _check_space(path, len(header) + sum(table.nbytes for table in tables.values()))
    with path.open("wb") as stream:
        stream.write(header)
        for table in tables.values():
            stream.write(table.numpy().data)
    return content


def plan_links(
    checkpoint: Checkpoint, wanted: Mapping[str, tuple[tuple[int, ...], str]]
) -> list[WeightPlan]:
    """Finds the checkpoint's files that hold weights as they are wanted.

    Args:
        checkpoint: Where the weights are.
        wanted: Name to shape and dtype.

    Returns:
        The files, or nothing if one weight isn't usable where it is.
    """
    tensors: dict[Path, dict[str, StoredWeight]] = {}
    for name, (shape, dtype) in wanted.items():
        stored = checkpoint.tensors[name]
        if stored.file is None or stored.offset is None or stored.dtype != dtype:
            return []
        if stored.offset % WEIGHT_BYTES[dtype]:
            return []
        place = StoredWeight(shape=shape, offset=stored.offset, dtype=dtype)
        tensors.setdefault(stored.file, {})[name] = place
    paths = sorted(tensors)
    # Never the checkpoint's own names: writing another file of that name would write through the
    # link.
    names = [f"model-{i:05}-of-{len(paths):05}.safetensors" for i in range(1, len(paths) + 1)]
    if len(paths) == 1:
        names = ["model.safetensors"]
    return [
        WeightPlan(
            content=WeightFile(file=name, tensors=tensors[path]),
            source=path.resolve(),  # the Hugging Face cache holds symlinks
            bytes=path.stat().st_size,
        )
        for name, path in zip(names, paths, strict=True)
    ]


def plan_conversion(file: str, wanted: Mapping[str, tuple[tuple[int, ...], str]]) -> WeightPlan:
    """Lays out a file of weights that are written anew.

    Args:
        file: Its name.
        wanted: Name to shape and dtype; of a packed weight also SIGNED, POSITIVE_SCALE and
            UNPACKED.

    Returns:
        The file.
    """
    header, content = _lay_out(file, wanted)
    num_bytes = sum(math.prod(shape) * WEIGHT_BYTES[dtype] for shape, dtype in wanted.values())
    return WeightPlan(content=content, source=None, bytes=len(header) + num_bytes)


def _lay_out(
    file: str, wanted: Mapping[str, tuple[tuple[int, ...], str]]
) -> tuple[bytes, WeightFile]:
    """A safetensors header, and where it puts the tensors."""
    header, begins = safetensors_header(wanted)
    tensors = {
        name: StoredWeight(shape=shape, offset=begins[name], dtype=dtype)
        for name, (shape, dtype) in wanted.items()
    }
    return header, WeightFile(file=file, tensors=tensors)


def _convert_weights(
    checkpoint: Checkpoint, content: WeightFile, path: Path, num_bytes: int
) -> None:
    """Part by part: what is in memory never grows with the checkpoint."""
    header, _ = _lay_out(
        content.file, {n: (stored.shape, stored.dtype) for n, stored in content.tensors.items()}
    )
    with path.open("wb") as stream:
        stream.write(header)
        stream.flush()
        # A hole that the disk has no room for would be a signal when it is written to.
        os.posix_fallocate(stream.fileno(), 0, num_bytes)
    for name, place, part in _read(checkpoint, content.tensors):
        stored = content.tensors[name]
        dtype: torch.dtype = getattr(torch, stored.dtype)
        # Mapped for this part only, so that written pages don't count as this process's.
        raw = np.memmap(
            path,
            dtype=np.uint8,
            mode="r+",
            offset=stored.offset,
            shape=(math.prod(stored.shape) * dtype.itemsize,),
        )
        copy_finite(
            f"{checkpoint.folder}: {name}",
            part,
            torch.from_numpy(raw).view(dtype).view(stored.shape)[place],
        )
        del raw


def _read(
    checkpoint: Checkpoint, names: Iterable[str]
) -> Iterator[tuple[str, tuple[slice, ...], Tensor]]:
    """Weights as stored, then those that TensorRT wants in another form."""
    yield from checkpoint.read([name for name in names if name in checkpoint.tensors])
    for name in names:
        module, _, form = name.rpartition(".")
        if form == SIGNED:
            for place, part in _read_signed(checkpoint, module):
                yield name, place, part
        elif form == POSITIVE_SCALE:
            for _, place, part in checkpoint.read([f"{module}.weight_scale"]):
                yield name, place, torch.where(part == 0, 1, part.abs())
        elif form == UNPACKED:
            for rows, part in read_dequantized(checkpoint, f"{module}.weight"):
                yield name, (rows,), part


def _read_signed(checkpoint: Checkpoint, module: str) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """Every value less 2^(bits-1), and of 8 bits times its scale's sign."""
    form = checkpoint.packed[module]
    sign = None
    if form.bits == 8:
        sign = read_whole(checkpoint, f"{module}.weight_scale").sign().to(torch.int8)
    turned = 0x88 if form.bits == 4 else 0x80  # the highest bit of each value
    for _, place, part in checkpoint.read([f"{module}.weight_packed"]):
        signed = (part ^ turned).view(torch.int8)
        if sign is not None and (of_groups := sign[place[0]]).min() < 1:
            of_columns = of_groups.repeat_interleave(form.group_size, dim=1)
            signed *= of_columns[(slice(None), *place[1:])]
            if (signed[part == 0] == -128).any():  # -128 * -1 in a byte
                raise ValueError(
                    f"{checkpoint.folder}: {module}.weight has -128 times a negative scale, which "
                    "TensorRT can't hold; llamac quantize the unquantized checkpoint"
                )
        yield place, signed


def _check_space(path: Path, num_bytes: int) -> None:
    free_bytes = shutil.disk_usage(path.parent).free
    if num_bytes > free_bytes:
        raise ValueError(
            f"{path.name} needs {format_bytes(num_bytes)}, {format_bytes(free_bytes)} are free in "
            f"{path.parent.parent}; free some, or name a folder elsewhere"
        )
