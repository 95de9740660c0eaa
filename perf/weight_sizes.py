"""The bytes that a system's weights take, measured on the tensors that hold them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.bundle.manifest import WEIGHT_BYTES
from ..runtime.bundle.memory_needs import memory_needs

if TYPE_CHECKING:
    from ..model.checkpoint import Checkpoint
    from ..runtime.bundle.manifest import Manifest

__all__ = ["WeightSizes", "describe_precision", "weights_of"]

_FILE = "weight_sizes.json"
# As a checkpoint, a bundle, onnxruntime-genai's builder and GGUF name them.
_EMBEDDINGS = ("model.embed_tokens.", "token_embd.")
_HEADS = ("lm_head.", "output.")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSizes:
    """What weights take, scales and all.

    Attributes:
        weight_bytes: Of all of them.
        lookup_bytes: Of them, the table that a step reads a few rows of: the embedding, unless it
            is the head, too.
    """

    weight_bytes: int
    lookup_bytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, int]) -> WeightSizes:
        """Sums up tensors.

        Args:
            tensors: Name to bytes.

        Returns:
            The sizes.
        """
        has_head = any(name.startswith(_HEADS) for name in tensors)
        table = sum(size for name, size in tensors.items() if name.startswith(_EMBEDDINGS))
        return cls(weight_bytes=sum(tensors.values()), lookup_bytes=table if has_head else 0)

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint, dtype: str) -> WeightSizes:
        """Sums up the weights in torch's memory, where packed ones stay as they are stored."""
        import torch

        from ..model.checkpoint import weight_bytes

        chosen = getattr(torch, dtype)
        return cls.of(
            {
                name: weight_bytes(replace(checkpoint, tensors={name: stored}), chosen)
                for name, stored in checkpoint.tensors.items()
            }
        )

    @classmethod
    def of_bundle(cls, manifest: Manifest, target: str) -> WeightSizes:
        """Sums up what the graphs of one target read from a bundle with packed weights."""
        tensors = {
            name: math.prod(stored.shape) * WEIGHT_BYTES[stored.dtype]
            for file in manifest.weights
            for name, stored in file.tensors.items()
        }
        return replace(cls.of(tensors), weight_bytes=memory_needs(manifest, target).weight_bytes)

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> WeightSizes | None:
        """Finds them among what a runner reports; None where it says nothing."""
        if "weight_bytes" not in facts:
            return None
        return cls(weight_bytes=facts["weight_bytes"], lookup_bytes=facts["lookup_bytes"])

    @classmethod
    def read(cls, folder: Path) -> WeightSizes:
        """Reads what `write` left beside an artifact."""
        return cls(**json.loads((folder / _FILE).read_text(encoding="utf-8")))

    def write(self, folder: Path) -> None:
        """Leaves the sizes beside an artifact."""
        (folder / _FILE).write_text(json.dumps(self.facts), encoding="utf-8")

    @property
    def facts(self) -> dict[str, object]:
        """As a runner reports them."""
        return asdict(self)


def weights_of(result: Mapping[str, Any]) -> str:
    """Names the precision of a system's weights, "int4" or a dtype.

    Args:
        result: Of the system.

    Returns:
        What it is compared by.
    """
    return result.get("weights") or result["precision"]


def describe_precision(result: Mapping[str, Any]) -> str:
    """Writes the precision of the weights, and of the rest where that is another: "int4, float32".

    Args:
        result: Of a system.

    Returns:
        The words.
    """
    return ", ".join(dict.fromkeys((weights_of(result), result["precision"])))
