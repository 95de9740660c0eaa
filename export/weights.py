"""The bundle's weight files: the checkpoint's own where they serve, else converted once."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..model.checkpoint import Checkpoint
from ..model.checkpoint.safetensors_header import safetensors_header
from ..model.checkpoint.stored import copy_finite
from ..model.config import LlamaConfig
from ..model.tables import rope_tables
from ..runtime.bundle.manifest import ITEM_BYTES, StoredWeight, WeightFile
from ..runtime.memory import format_bytes

__all__ = ["WeightPlan", "plan_weights", "write_rope_tables", "write_weights"]

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
    links = [plan for dtype in dtypes for plan in _plan_links(checkpoint, dtype)]
    linked = {plan.content.dtype for plan in links}
    conversions: list[WeightPlan] = []
    for dtype in dtypes:
        if dtype not in linked:
            first = not links and not conversions
            name = "model.safetensors" if first else f"model-{dtype}.safetensors"
            conversions.append(_plan_conversion(checkpoint, dtype, name))
    return links + conversions


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
        progress(f"converting weights to {plan.content.dtype}")
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
    header, content = _lay_out(path.name, "float32", {n: tuple(t.shape) for n, t in tables.items()})
    _check_space(path, len(header) + sum(table.nbytes for table in tables.values()))
    with path.open("wb") as stream:
        stream.write(header)
        for table in tables.values():
            stream.write(table.numpy().data)
    return content


def _plan_links(checkpoint: Checkpoint, dtype: str) -> list[WeightPlan]:
    """The checkpoint's files, or nothing if one weight isn't usable where it is."""
    tensors: dict[Path, dict[str, StoredWeight]] = {}
    for name, stored in checkpoint.tensors.items():
        if stored.file is None or stored.offset is None or stored.dtype != dtype:
            return []
        if stored.offset % ITEM_BYTES[dtype]:
            return []
        place = StoredWeight(shape=stored.shape, offset=stored.offset)
        tensors.setdefault(stored.file, {})[name] = place
    paths = sorted(tensors)
    # Never the checkpoint's own names: writing another file of that name would write through the
    # link.
    names = [f"model-{i:05}-of-{len(paths):05}.safetensors" for i in range(1, len(paths) + 1)]
    if len(paths) == 1:
        names = ["model.safetensors"]
    return [
        WeightPlan(
            content=WeightFile(file=name, dtype=dtype, tensors=tensors[path]),
            source=path.resolve(),  # the Hugging Face cache holds symlinks
            bytes=path.stat().st_size,
        )
        for name, path in zip(names, paths, strict=True)
    ]


def _plan_conversion(checkpoint: Checkpoint, dtype: str, name: str) -> WeightPlan:
    shapes = {name: stored.shape for name, stored in checkpoint.tensors.items()}
    header, content = _lay_out(name, dtype, shapes)
    num_bytes = len(header) + sum(map(math.prod, shapes.values())) * ITEM_BYTES[dtype]
    return WeightPlan(content=content, source=None, bytes=num_bytes)


def _lay_out(
    file: str, dtype: str, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[bytes, WeightFile]:
    """A safetensors header, and where it puts the tensors."""
    header, begins = safetensors_header({name: (shape, dtype) for name, shape in shapes.items()})
    tensors = {
        name: StoredWeight(shape=shape, offset=begins[name]) for name, shape in shapes.items()
    }
    return header, WeightFile(file=file, dtype=dtype, tensors=tensors)


def _convert_weights(
    checkpoint: Checkpoint, content: WeightFile, path: Path, num_bytes: int
) -> None:
    """Part by part: what is in memory never grows with the checkpoint."""
    header, _ = _lay_out(
        content.file, content.dtype, {n: stored.shape for n, stored in content.tensors.items()}
    )
    with path.open("wb") as stream:
        stream.write(header)
        stream.flush()
        # A hole that the disk has no room for would be a signal when it is written to.
        os.posix_fallocate(stream.fileno(), 0, num_bytes)
    dtype: torch.dtype = getattr(torch, content.dtype)
    for name, place, part in checkpoint.read():
        stored = content.tensors[name]
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


def _check_space(path: Path, num_bytes: int) -> None:
    free_bytes = shutil.disk_usage(path.parent).free
    if num_bytes > free_bytes:
        raise ValueError(
            f"{path.name} needs {format_bytes(num_bytes)}, {format_bytes(free_bytes)} are free in "
            f"{path.parent.parent}; free some, or name a folder elsewhere"
        )
