"""A bundle's manifest: what an export holds, and whether the folder still is what was exported.

Needs neither torch, onnx nor numpy.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..atomic_write import PARTIAL_SUFFIX
from ..backend import StaticShape
from ..side_file import named_errors
from ..typed_json import to_dataclass
from .known_files import is_marked, mark_path, set_mark

__all__ = [
    "FORMAT",
    "ITEM_BYTES",
    "MANIFEST_NAME",
    "REPORTS_NAME",
    "TOKENIZER_NAMES",
    "FileRecord",
    "GraphFile",
    "Manifest",
    "ModelSizes",
    "StoredWeight",
    "WeightFile",
    "hash_file",
    "open_bundle",
]

FORMAT = 1
MANIFEST_NAME = "bundle.json"
REPORTS_NAME = "reports"  # the one folder that may change after the export
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # of weights and caches

# What a tokenizer and a chat template are read from.
TOKENIZER_NAMES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)

_MAX_MANIFEST_BYTES = 64 << 20
# What people and Hubs put beside a model, and nothing here reads; dot files too.
_BYSTANDERS = ("README", "LICENSE", "NOTICE")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """The sizes of the exported model, under HF's names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphFile:
    """One ONNX graph; see llamac.export.graphs for its inputs and outputs.

    Attributes:
        role: "prefill" (batch 1, a chunk) or "decode" (every slot, one token).
        target: "tensorrt", "cuda" or "cpu".
        file: Its name in the bundle.
        batch: B.
        tokens: T.
        rows: S.
        logits: N, tokens of a row that get logits.
        dtype: Of the weights and of the cache inputs and outputs.
        ops: How many of each operator.
    """

    role: str
    target: str
    file: str
    batch: int
    tokens: int
    rows: int
    logits: int
    dtype: str
    ops: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """Where a weight lies in its file, little-endian and contiguous."""

    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """A safetensors file that the graphs' initializers point into.

    Attributes:
        file: Its name in the bundle.
        dtype: Of every weight listed.
        tensors: Initializer name (HF's, or rope.cos and rope.sin) to its place.
    """

    file: str
    dtype: str
    tensors: dict[str, StoredWeight]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """What a file must be."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """An open bundle.

    Attributes:
        folder: Where it lies.
        digest: sha256 of the manifest, and through its hashes of every file: the bundle's name.
        shape: The static sizes of all graphs.
        model: The model's sizes.
        dtype: Of the checkpoint.
        bos_token_id: Id that begins a sequence, or None.
        eos_token_ids: Ids that end one.
        source: What was exported, in words.
        versions: Of the tools that exported it.
        graphs: The graphs.
        weights: The weight files, RoPE tables included.
        files: Every file but the manifest and the reports.
    """

    folder: Path
    digest: str
    shape: StaticShape
    model: ModelSizes
    dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    source: dict[str, str]
    versions: dict[str, str]
    graphs: tuple[GraphFile, ...]
    weights: tuple[WeightFile, ...]
    files: dict[str, FileRecord]

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets that were exported, in their order."""
        return tuple(dict.fromkeys(graph.target for graph in self.graphs))

    def find_graph(self, role: str, target: str, tokens: int | None = None) -> GraphFile:
        """Looks a graph up.

        Args:
            role: "prefill" or "decode".
            target: One of targets.
            tokens: T; None takes the longest.

        Returns:
            The graph; `folder / graph.file` is its path.

        Raises:
            ValueError: The bundle has no such graph.
        """
        found = [g for g in self.graphs if (g.role, g.target) == (role, target)]
        found = [g for g in found if tokens in (None, g.tokens)]
        if not found:
            raise ValueError(
                f"{self.folder}: no {role} graph for target {target!r}; it was exported for "
                f"{', '.join(self.targets)}; export again with --target {target}"
            )
        return max(found, key=lambda g: g.tokens)

    def to_json(self) -> str:
        """The text of bundle.json; the digest is computed, not taken."""
        data = asdict(self)
        del data["folder"], data["digest"]
        data = {"format": FORMAT, "digest": _digest({"format": FORMAT, **data}), **data}
        return json.dumps(data, indent=1) + "\n"


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
    if version != FORMAT or type(version) is not int:
        raise ValueError(f"{path}: format is {version!r}; this llamac reads {FORMAT}; export again")
    digest = data.pop("digest", None)
    if digest != _digest({"format": version, **data}):
        raise ValueError(f"{path}: was changed after the export; export again")
    # Beyond this point only a forged manifest fails.
    return to_dataclass(Manifest, {"folder": folder, "digest": digest, **data}, str(path))


def _digest(data: Mapping[str, Any]) -> str:
    """Of the content, whatever the spaces and the order of keys."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _check_name(folder: Path, name: str) -> None:
    if name in ("", ".", "..", MANIFEST_NAME) or "\0" in name or Path(name).name != name:
        raise ValueError(
            f"{folder}: the manifest names {name!r}, which is not a file in the folder"
        )


def _check_listed(folder: Path, manifest: Manifest) -> None:
    """What graphs and weights say must agree with the shape and with the files."""
    where = folder / MANIFEST_NAME
    for item in (*manifest.graphs, *manifest.weights):
        if item.file not in manifest.files or item.dtype not in ITEM_BYTES:
            raise ValueError(
                f"{where}: names {item.file}, {item.dtype}, which it does not describe"
            )
    for weight in manifest.weights:
        size = manifest.files[weight.file].bytes
        for name, stored in weight.tensors.items():
            if stored.offset + math.prod(stored.shape) * ITEM_BYTES[weight.dtype] > size:
                raise ValueError(f"{where}: {name} lies past the end of {weight.file}")
    if min(getattr(manifest.model, name) for name in ModelSizes.__slots__) < 1:
        raise ValueError(f"{where}: a size of the model is not positive; export again")
    shape = manifest.shape
    wanted = {("prefill", 1, tokens) for tokens in shape.prefill_lens}
    wanted.add(("decode", shape.batch_size, 1))
    for target in manifest.targets:
        graphs = [graph for graph in manifest.graphs if graph.target == target]
        found = {(graph.role, graph.batch, graph.tokens) for graph in graphs}
        rows = {graph.rows for graph in graphs}
        if found != wanted or len(graphs) != len(wanted) or rows != {shape.max_seq_len}:
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
