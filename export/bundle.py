"""Writes a bundle: graphs, the weights they point into, and the manifest that binds them.

A folder is built beside its final place and renamed there when it is complete. An export that was
killed leaves `.NAME.partial`, which opening refuses and the next export to NAME replaces.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx

from ..model.checkpoint import Checkpoint
from ..model.checkpoint.quantized import native_settings
from ..model.config import DTYPES, LlamaConfig
from ..model.load import static_shape
from ..runtime.atomic_write import new_folder
from ..runtime.backend import StaticShape
from ..runtime.bundle.known_files import mark_path, set_mark
from ..runtime.bundle.manifest import (
    ITEM_BYTES,
    MANIFEST_NAME,
    TOKENIZER_NAMES,
    GraphFile,
    Manifest,
    ModelSizes,
    WeightFile,
)
from ..runtime.bundle.opening import hash_file, open_bundle
from ..runtime.memory import format_bytes
from ..runtime.text.tokenizer_files import load_tokenizer
from ..runtime.typed_json import shown
from .graphs import TARGETS, GraphSpec, attention_type, save_graph, trace_graph
from .operators import StandardAttention
from .packed_weights import plan_packed_weights
from .weights import WeightPlan, plan_weights, write_rope_tables, write_weights

__all__ = ["ROW_BUCKETS", "export_bundle"]

# Each graph is a session more, and on a GPU a copy of the weights more: few, far apart. The rows
# are copied out of the cache: of half of them that takes as long as attending to all.
ROW_BUCKETS = (256, 1024, 4096)
_LARGEST_SHARE = 4  # of S in the largest of these

_ROPE_NAME = "rope.safetensors"
_INDEX_NAME = "model.safetensors.index.json"
_ACCURACY_LEVELS = range(5)
_MAX_CACHE_BYTES = 16 << 40


def export_bundle(
    checkpoint: Checkpoint,
    out: Path,
    *,
    targets: Sequence[str] = ("cpu",),
    batch_size: int = 1,
    prefill_len: int | None = None,
    max_seq_len: int | None = None,
    dtype: str | None = None,
    accuracy_level: int = 4,
    num_guesses: int = 0,
    row_buckets: Sequence[int] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Exports prefill and decode graphs with their weights into one folder.

    Args:
        checkpoint: What is exported; its safetensors files are hard linked where they serve.
        out: The bundle: a new name, or an empty folder.
        targets: Of the graphs, each one of graphs.TARGETS.
        batch_size: B, cache slots.
        prefill_len: P; None is 16 and 128, at most S.
        max_seq_len: S; None is max_position_embeddings, at most 2048.
        dtype: Of the `tensorrt` and `cuda` graphs; None keeps the checkpoint's. `cpu` is float32.
        accuracy_level: Of products with packed weights in `cpu` and `cuda` graphs: 4 rounds what
            they are multiplied with to 8 bits, which is several times faster on a CPU; 0 doesn't.
        num_guesses: Ids behind the newest that a step of its own checks (see speculation); 0 makes
            no such step.
        row_buckets: Numbers of rows below S, for each of which there is a graph of each step that
            attends to no more, where attention costs what it may look at; None takes of
            ROW_BUCKETS those up to a quarter of S.
        progress: Told what is being done.

    Returns:
        The manifest of the finished bundle.

    Raises:
        ValueError: An argument is out of range, `out` is in use, a weight does not fit the dtype,
            the tokenizer is damaged, or the disk is too small; nothing is left behind.
    """
    config = checkpoint.config
    shape = static_shape(
        config, batch_size=batch_size, max_seq_len=max_seq_len, prefill_len=prefill_len
    )
    if not 0 <= num_guesses < shape.max_seq_len:
        raise ValueError(
            f"num_guesses is {num_guesses}; with max_seq_len {shape.max_seq_len} it must be from 0 "
            f"to {shape.max_seq_len - 1}"
        )
    shape = replace(shape, num_guesses=num_guesses)
    dtypes = _target_dtypes(config, targets, dtype)
    if accuracy_level not in _ACCURACY_LEVELS:
        raise ValueError(f"accuracy_level is {accuracy_level}; it must be one of 0 to 4")
    if row_buckets is None:
        row_buckets = [r for r in ROW_BUCKETS if r * _LARGEST_SHARE <= shape.max_seq_len]
    if any(rows < 1 for rows in row_buckets):
        raise ValueError(f"row_buckets are {list(row_buckets)}; each must be at least 1")
    _check_cache(config, shape)
    with contextlib.suppress(FileNotFoundError):  # a bundle may be fed ids alone
        load_tokenizer(checkpoint.side_folder)
    out = Path(os.path.abspath(out))
    with new_folder(out) as folder:
        if checkpoint.packed:
            plans = plan_packed_weights(checkpoint, dtypes)
        else:
            plans = plan_weights(checkpoint, tuple(dict.fromkeys(dtypes.values())))
        for plan in plans:
            write_weights(checkpoint, plan, folder, progress)
        rope = write_rope_tables(config, shape.num_positions, folder / _ROPE_NAME)
        weights = (*(plan.content for plan in plans), rope)
        graphs: list[GraphFile] = []
        level = accuracy_level if checkpoint.packed else None
        for graph in _graph_files(config, shape, dtypes, row_buckets, level):
            progress(f"exporting {graph.target} {graph.role} of {graph.batch} x {graph.tokens}")
            graphs.append(_write_graph(checkpoint, graph, shape.num_positions, weights, folder))
        _copy_side_files(checkpoint, plans, folder)
        progress("hashing")
        manifest = Manifest(
            folder=out,
            digest="",
            shape=shape,
            model=ModelSizes(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                num_key_value_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
            ),
            dtype=config.dtype,
            bos_token_id=config.bos_token_id,
            eos_token_ids=config.eos_token_ids,
            source={"name": checkpoint.folder.resolve().name},
            versions=_versions(),
            graphs=tuple(graphs),
            weights=weights,
            files={path.name: hash_file(path) for path in sorted(folder.iterdir())},
        )
        (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        for file in weights:  # just hashed, and not again when the bundle is opened
            set_mark(mark_path(folder / file.file, manifest.files[file.file].sha256))
    return open_bundle(out)


def _check_cache(config: LlamaConfig, shape: StaticShape) -> None:
    """Far larger sizes overflow in the exporter, and none below this can be run."""
    cache_bytes = (
        *(2, config.num_hidden_layers, config.num_key_value_heads, config.head_dim),
        *(shape.batch_size, shape.max_seq_len, ITEM_BYTES["float32"]),
    )
    if math.prod(cache_bytes) > _MAX_CACHE_BYTES:
        raise ValueError(
            f"a cache of batch_size {shown(shape.batch_size)} and max_seq_len "
            f"{shown(shape.max_seq_len)} has more than {format_bytes(_MAX_CACHE_BYTES)}; "
            "export with a smaller --batch-size or --max-seq-len"
        )


def _target_dtypes(
    config: LlamaConfig, targets: Sequence[str], dtype: str | None
) -> dict[str, str]:
    """Target to the dtype of its graphs."""
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"target is {target!r}; it must be one of {', '.join(TARGETS)}")
    if not targets or len(set(targets)) != len(targets):
        raise ValueError(f"targets are {list(targets)}; name at least one, each once")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    if dtype not in (None, "float32") and set(targets) == {"cpu"}:
        raise ValueError(
            f"dtype is {dtype!r}; cpu graphs are always float32; leave --dtype out, or add "
            "--target cuda or tensorrt"
        )
    return {t: "float32" if t == "cpu" else dtype or config.dtype for t in targets}


def _graph_files(
    config: LlamaConfig,
    shape: StaticShape,
    dtypes: dict[str, str],
    row_buckets: Sequence[int],
    accuracy_level: int | None,
) -> Iterator[GraphFile]:
    num_rows = shape.max_seq_len
    steps = {"decode": 1, **({"extend": 1 + shape.num_guesses} if shape.num_guesses else {})}
    for target, dtype in dtypes.items():
        sizes = [(f"prefill-{p}", "prefill", 1, p, num_rows) for p in shape.prefill_lens]
        for role, tokens in steps.items():
            batch = shape.batch_size
            kind = attention_type(config, target, dtype, batch=batch, tokens=tokens)
            if kind is StandardAttention:
                buckets = sorted({rows for rows in row_buckets if tokens <= rows < num_rows})
                sizes += [(f"{role}-{rows}", role, batch, tokens, rows) for rows in buckets]
            sizes.append((role, role, batch, tokens, num_rows))
        for name, role, batch, tokens, attended_rows in sizes:
            yield GraphFile(
                role=role,
                target=target,
                file=f"{target}-{name}.onnx",
                batch=batch,
                tokens=tokens,
                rows=num_rows,
                attended_rows=attended_rows,
                logits=tokens if role == "extend" else 1,
                dtype=dtype,
                ops={},
                accuracy_level=accuracy_level if target != "tensorrt" else None,
            )


def _write_graph(
    checkpoint: Checkpoint,
    graph: GraphFile,
    num_positions: int,
    weights: Sequence[WeightFile],
    folder: Path,
) -> GraphFile:
    """Returns the graph with its operators counted."""
    spec = GraphSpec(
        target=graph.target,
        dtype=graph.dtype,
        batch=graph.batch,
        tokens=graph.tokens,
        rows=graph.rows,
        attended_rows=graph.attended_rows,
        logits=graph.logits,
        num_positions=num_positions,
        packed=checkpoint.packed,
        embedding_dtype=_embedding_dtype(checkpoint),
        accuracy_level=graph.accuracy_level or 0,
    )
    model = trace_graph(checkpoint.config, spec)
    used = save_graph(model, folder / graph.file, weights, checkpoint.config)
    # The checker reads no weights but refuses hard links, so it gets empty files of their size.
    with TemporaryDirectory(dir=folder) as scratch:
        for name in used:
            with (Path(scratch) / name).open("wb") as stream:
                stream.truncate((folder / name).stat().st_size)
        copy = shutil.copyfile(folder / graph.file, Path(scratch) / graph.file)
        onnx.checker.check_model(str(copy), full_check=True)
    ops = Counter(node.op_type for node in model.graph)
    return replace(graph, ops=dict(sorted(ops.items())))


def _embedding_dtype(checkpoint: Checkpoint) -> str | None:
    """Beside packed weights a plain embedding stays as it is stored: only a few rows are read."""
    stored = checkpoint.tensors.get("model.embed_tokens.weight")
    return stored.dtype if checkpoint.packed and stored is not None else None


def _copy_side_files(checkpoint: Checkpoint, plans: Sequence[WeightPlan], folder: Path) -> None:
    """Config, tokenizer, and the index that makes linked shards a checkpoint of their own."""
    facts = checkpoint.config.to_dict()
    if checkpoint.packed:
        facts["quantization_config"] = native_settings(checkpoint.packed)
    _write_json(folder / "config.json", facts)
    for name in TOKENIZER_NAMES:
        source = checkpoint.side_folder / name
        if source.is_file():
            shutil.copyfile(source, folder / name)
    shards = [plan.content for plan in plans if plan.source is not None]
    if len(shards) > 1:
        weight_map = {name: shard.file for shard in shards for name in shard.tensors}
        _write_json(folder / _INDEX_NAME, {"metadata": {}, "weight_map": weight_map})


def _write_json(path: Path, data: dict[str, object]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    names = ("llamac", "torch", "onnx", "onnxscript", "onnx-ir")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
