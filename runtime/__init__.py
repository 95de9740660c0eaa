"""The torch-free runtime: `load`, the scheduler, tokenizers, the bundle, the command line."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backend import Backend, BackendUnavailableError, StaticShape

__all__ = ["Backend", "BackendUnavailableError", "StaticShape"]

# Importing onnxruntime otherwise writes a device id and a database of events into the user's home.
# Here, because every part of llamac that imports it imports this package first.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> Any:
    """Imports what is offered when it is asked for: the command line begins with this package."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".backend", __name__), name)
