"""Opens bundles: whether a folder still is what was exported.

Needs neither torch, onnx nor numpy.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from ..atomic_write import PARTIAL_SUFFIX
from ..side_file import named_errors
from ..typed_json import to_dataclass
from .known_files import is_marked, mark_path, set_mark
from .manifest import (
    FORMAT,
    ITEM_BYTES,
    MANIFEST_NAME,
    REPORTS_NAME,
    TOKENIZER_NAMES,
    WEIGHT_BYTES,
    FileRecord,
    Manifest,
    ModelSizes,
    content_digest,
)

__all__ = ["hash_file", "open_bundle"]

_MAX_MANIFEST_BYTES = 64 << 20
# What people and Hubs put beside a model, and nothing here reads; dot files too.
_BYSTANDERS = ("README", "LICENSE", "NOTICE")


def open_bundle(path: str | Path, *, check: bool = False) -> Manifest:
    """Opens a bundle, refusing a folder that isn't exactly what was exported.

    Every file must be there, regular, and of its size, and there may be no other (but reports).
    The manifest, the graphs and other small files are hashed; the weights on request, and where
    they are not the file that was hashed before: after a copy, or when a checkpoint's file that
    they are a hard link to was written to.

    Args:
        path: The folder.
        check: Hash the weights too, which reads all of them.

    Returns:
        The manifest.

    Raises:
        FileNotFoundError: There is no bundle, or one of its files is missing.
        ValueError: It is an unfinished export, of another version, or a file was added or changed.
    """
    folder = Path(path)
    manifest = _read_manifest(folder)
    for name in manifest.files:
        _check_name(folder, name)
    _check_listed(folder, manifest)
    for entry in sorted(folder.iterdir()):
        if not (entry.name in manifest.files or _may_be_added(entry, manifest)):
            raise ValueError(f"{entry}: not part of this bundle; remove it")
    weights = {weight.file for weight in manifest.weights}
    for name, record in manifest.files.items():
        _check_file(folder / name, record, keep=name in weights, check=check)
    return manifest


def hash_file(path: Path) -> FileRecord:
    """Measures a file, reading it in small blocks.

    Args:
        path: The file.

    Returns:
        Its size and sha256.
    """
    with path.open("rb", buffering=0) as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return FileRecord(bytes=stream.tell(), sha256=digest)


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if folder.name.endswith(PARTIAL_SUFFIX):
        raise ValueError(f"{folder}: an unfinished export; run the export again")
    if not path.exists():
        raise FileNotFoundError(f"{folder}: not a bundle, it has no {MANIFEST_NAME}")
    if not path.is_file() or path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise ValueError(f"{path}: not a bundle's manifest; export again")
    with named_errors(path):
        raw = path.read_bytes()
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: damaged, not JSON; export again") from None
    if not isinstance(data, dict) or "format" not in data:
        raise ValueError(f"{path}: not a bundle's manifest; export again")
    version = data.pop("format")
    if version not in range(1, FORMAT + 1) or type(version) is not int:
        raise ValueError(
            f"{path}: format is {version!r}; this llamac reads 1 to {FORMAT}; export again"
        )
    digest = data.pop("digest", None)
    if digest != content_digest({"format": version, **data}):
        raise ValueError(f"{path}: was changed after the export; export again")
    # Beyond this point only a forged manifest fails.
    _upgrade(data, version)
    if isinstance(data.get("shape"), dict):
        data["shape"]["mixed_lens"] = []  # no graph is of such a step
    return to_dataclass(Manifest, {"folder": folder, "digest": digest, **data}, str(path))


def _upgrade(data: dict[str, Any], version: int) -> None:
    """Format 1 had one dtype a file and no packed weights, 2 no graphs of fewer rows."""
    with contextlib.suppress(AttributeError, KeyError, TypeError):  # refused after this
        if version == 1:
            for file in data["weights"]:
                dtype = file.pop("dtype")
                for stored in file["tensors"].values():
                    stored["dtype"] = dtype
            for graph in data["graphs"]:
                graph["accuracy_level"] = None
        if version < FORMAT:
            data["shape"].setdefault("num_guesses", 0)  # not in the first of format 2
            for graph in data["graphs"]:
                graph["attended_rows"] = graph["rows"]


def _check_name(folder: Path, name: str) -> None:
    if name in ("", ".", "..", MANIFEST_NAME) or "\0" in name or Path(name).name != name:
        raise ValueError(
            f"{folder}: the manifest names {name!r}, which is not a file in the folder"
        )


def _check_listed(folder: Path, manifest: Manifest) -> None:
    """What graphs and weights say must agree with the shape and with the files."""
    where = folder / MANIFEST_NAME
    for graph in manifest.graphs:
        if graph.dtype not in ITEM_BYTES:
            raise ValueError(f"{where}: {graph.file} is {graph.dtype}; export again")
    for item in (*manifest.graphs, *manifest.weights):
        if item.file not in manifest.files:
            raise ValueError(f"{where}: names {item.file}, which it does not describe")
    for weight in manifest.weights:
        size = manifest.files[weight.file].bytes
        for name, stored in weight.tensors.items():
            item_bytes = WEIGHT_BYTES.get(stored.dtype)
            if item_bytes is None:
                raise ValueError(f"{where}: {name} is {stored.dtype}; export again")
            if stored.offset + math.prod(stored.shape) * item_bytes > size:
                raise ValueError(f"{where}: {name} lies past the end of {weight.file}")
    if min(getattr(manifest.model, name) for name in ModelSizes.__slots__) < 1:
        raise ValueError(f"{where}: a size of the model is not positive; export again")
    shape = manifest.shape
    num_rows = shape.max_seq_len
    steps = {("decode", shape.batch_size, 1)}
    if shape.num_guesses:
        steps.add(("extend", shape.batch_size, 1 + shape.num_guesses))
    wanted = {("prefill", 1, tokens, num_rows) for tokens in shape.prefill_lens}
    wanted |= {(*step, num_rows) for step in steps}
    for target in manifest.targets:
        graphs = [graph for graph in manifest.graphs if graph.target == target]
        found = {(graph.role, graph.batch, graph.tokens, graph.attended_rows) for graph in graphs}
        fewer = {graph for graph in found if graph[:3] in steps and 1 <= graph[3] < num_rows}
        rows = {graph.rows for graph in graphs}
        if found - fewer != wanted or len(graphs) != len(found) or rows != {num_rows}:
            raise ValueError(
                f"{where}: the graphs of {target} do not match the shape; export again"
            )
    if not manifest.graphs:
        raise ValueError(f"{where}: lists no graph; export again")


def _may_be_added(entry: Path, manifest: Manifest) -> bool:
    """Whether what wasn't exported changes nothing, or is the tokenizer that a bundle lacks."""
    if entry.name in (MANIFEST_NAME, REPORTS_NAME):
        return entry.name == MANIFEST_NAME or entry.is_dir()
    if entry.name in TOKENIZER_NAMES:
        return not {"tokenizer.json", "tokenizer.model"} & manifest.files.keys()
    return entry.name.startswith((".", *_BYSTANDERS))


def _check_file(path: Path, record: FileRecord, *, keep: bool, check: bool) -> None:
    """Follows symlinks, of which a Hub's snapshot is made."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: missing from the bundle; export again")
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file; export again")
    size = path.stat().st_size
    if size != record.bytes:
        raise ValueError(f"{path}: has {size} bytes, exported with {record.bytes}; export again")
    mark = mark_path(path, record.sha256) if keep else None  # before it is read
    if is_marked(mark) and not check:
        return
    if hash_file(path) != record:
        raise ValueError(f"{path}: was changed after the export; export again")
    set_mark(mark)
