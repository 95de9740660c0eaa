"""What a bundle holds, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..memory import format_bytes
from .manifest import Manifest
from .memory_needs import memory_needs

__all__ = ["describe_bundle", "print_bundle"]


def describe_bundle(manifest: Manifest) -> dict[str, Any]:
    """Sums a bundle up.

    Args:
        manifest: The bundle.

    Returns:
        What `llamac inspect --json` prints; every size is in bytes.
    """
    return {
        "folder": str(manifest.folder),
        "digest": manifest.digest,
        "source": manifest.source,
        "versions": manifest.versions,
        "shape": asdict(manifest.shape),
        "model": asdict(manifest.model),
        "disk_bytes": sum(record.bytes for record in manifest.files.values()),
        "files": {name: record.bytes for name, record in manifest.files.items()},
        "targets": {target: asdict(memory_needs(manifest, target)) for target in manifest.targets},
        "graphs": [asdict(graph) for graph in manifest.graphs],
    }


def print_bundle(manifest: Manifest) -> None:
    """Prints what describe_bundle returns, for people."""
    about = describe_bundle(manifest)
    shape, model = manifest.shape, manifest.model
    print(f"{manifest.folder}: {manifest.source.get('name', '?')}, {manifest.dtype}")
    print(
        f"  batch {shape.batch_size}, max_seq_len {shape.max_seq_len}, prefill_len "
        f"{', '.join(map(str, shape.prefill_lens))}, vocab {shape.vocab_size}, "
        f"{model.num_hidden_layers} layers, hidden {model.hidden_size}, "
        f"{model.num_attention_heads} heads on {model.num_key_value_heads} of {model.head_dim}"
    )
    print(f"  {format_bytes(about['disk_bytes'])} on disk (weights may be hard links)")
    for name, size in about["files"].items():
        print(f"    {format_bytes(size):>10}  {name}")
    for target, needs in about["targets"].items():
        print(
            f"  target {target}: {needs['dtype']}, weights {format_bytes(needs['weight_bytes'])}, "
            f"cache {format_bytes(needs['cache_bytes'])}; {_memory(target, needs)}"
        )
        for graph in manifest.graphs:
            if graph.target == target:
                ops = sorted(graph.ops.items(), key=lambda item: -item[1])
                counts = ", ".join(f"{op} {count}" for op, count in ops)
                rows = graph.attended_rows
                among = f" on {rows} rows" if rows < graph.rows else ""
                print(f"    {graph.role} {graph.batch} x {graph.tokens}{among}: {counts}")


def _memory(target: str, needs: dict[str, Any]) -> str:
    if target == "cpu":
        packed = needs["prepacked_bytes"]
        own = f", the sessions' copies of packed ones {format_bytes(packed)}" if packed else ""
        return f"{format_bytes(needs['host_bytes'])} of host memory, the weights mapped once{own}"
    holder = "engine" if target == "tensorrt" else "session"
    return (
        f"{format_bytes(needs['device_bytes'])} of device memory, the weights once per {holder} "
        f"({needs['weight_copies']})"
    )
