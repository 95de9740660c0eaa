"""Checkpoints of every format: opened, read, made up."""

from .checkpoint import load_model, load_weights, open_checkpoint, weight_bytes
from .stored import Checkpoint, StoredTensor

__all__ = [
    "Checkpoint",
    "StoredTensor",
    "load_model",
    "load_weights",
    "open_checkpoint",
    "weight_bytes",
]
