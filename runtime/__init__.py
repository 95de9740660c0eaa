"""The torch-free runtime: tokenizers, sampling, generation, the bundle reader, the CLI."""

from .backend import Backend, BackendUnavailableError, StaticShape

__all__ = ["Backend", "BackendUnavailableError", "StaticShape"]
