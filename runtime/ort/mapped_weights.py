"""A bundle's weights in memory once, for all ONNX Runtime sessions that read them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..bundle.manifest import ITEM_BYTES, Manifest

__all__ = ["map_weights"]

_NUMPY_TYPES = {"float32": "f4", "float16": "f2"}


def map_weights(manifest: Manifest, dtype: str) -> dict[str, Any]:
    """Maps weight files for reading.

    A session by itself maps the files that its graph points into, so that the weights count once
    per session towards the process's resident memory.

    Args:
        manifest: The bundle.
        dtype: Which of its weights: "float32" or "float16".

    Returns:
        Initializer name to onnxruntime.OrtValue; to be kept as long as a session uses them.
    """
    from onnxruntime import OrtValue

    values = {}
    for weights in manifest.weights:
        names = [name for name, stored in weights.tensors.items() if stored.dtype == dtype]
        if not names:
            continue
        mapped = np.memmap(manifest.folder / weights.file, np.uint8, "r")
        for name in names:
            if name.rpartition(".")[2].startswith("weight_"):
                continue  # of a packed weight, which every session takes apart for itself
            stored = weights.tensors[name]
            end = stored.offset + math.prod(stored.shape) * ITEM_BYTES[dtype]
            raw = mapped[stored.offset : end].view(_NUMPY_TYPES[dtype])
            values[name] = OrtValue.ortvalue_from_numpy(raw.reshape(stored.shape))
    return values
