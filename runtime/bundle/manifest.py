"""A bundle's manifest: what an export holds, and whether the folder still is what was exported.

Needs neither torch, onnx nor numpy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..backend import StaticShape

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
    "WEIGHT_BYTES",
    "WeightFile",
    "content_digest",
]

FORMAT = 3
MANIFEST_NAME = "bundle.json"
REPORTS_NAME = "reports"  # the one folder that may change after the export
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # of caches and plain weights
WEIGHT_BYTES = {**ITEM_BYTES, "uint8": 1, "int8": 1, "int32": 4}  # of packed ones, too

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
        role: "prefill" (batch 1, a chunk), "decode" (every slot, one token) or "extend" (every
            slot, the newest token and the guesses behind it).
        target: "tensorrt", "cuda" or "cpu".
        file: Its name in the bundle.
        batch: B.
        tokens: T.
        rows: S.
        attended_rows: R, rows from the first on that attention looks at; less than S in some
            graphs, for steps whose tokens all lie in them.
        logits: N, tokens of a row that get logits.
        dtype: Of what is computed, and of the cache inputs and outputs.
        ops: How many of each operator.
        accuracy_level: MatMulNBits' attribute: 4 rounds what is multiplied with packed weights to
            8 bits; None where there are none.
    """

    role: str
    target: str
    file: str
    batch: int
    tokens: int
    rows: int
    attended_rows: int
    logits: int
    dtype: str
    ops: dict[str, int]
    accuracy_level: int | None

    @property
    def is_step(self) -> bool:
        """Whether it runs every slot, always in the same memory."""
        return self.role != "prefill"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """Where a weight lies in its file, little-endian and contiguous."""

    shape: tuple[int, ...]
    offset: int
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """A safetensors file that the graphs' initializers point into.

    Attributes:
        file: Its name in the bundle.
        tensors: Initializer name (HF's, or rope.cos and rope.sin) to its place; a name may be in
            several files, of different dtypes.
    """

    file: str
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

    @property
    def row_buckets(self) -> tuple[int, ...]:
        """Numbers of rows below S that graphs attend to, ascending."""
        return tuple(sorted({g.attended_rows for g in self.graphs if g.attended_rows < g.rows}))

    def find_graph(self, role: str, target: str, tokens: int | None = None) -> GraphFile:
        """Looks a graph up.

        Args:
            role: "prefill", "decode" or "extend".
            target: One of targets.
            tokens: T; None takes the longest.

        Returns:
            The graph, which attends to all rows; `folder / graph.file` is its path.

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
        return max(found, key=lambda g: (g.tokens, g.attended_rows))

    def to_json(self) -> str:
        """The text of bundle.json; the digest is computed, not taken."""
        data = asdict(self)
        del data["folder"], data["digest"], data["shape"]["mixed_lens"]
        data = {"format": FORMAT, "digest": content_digest({"format": FORMAT, **data}), **data}
        return json.dumps(data, indent=1) + "\n"


def content_digest(data: Mapping[str, Any]) -> str:
    """Of a manifest's content, whatever the spaces and the order of keys: sha256 in hex."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
