"""The torch-free runtime: tokenizers, sampling, generation, the bundle reader, the CLI."""

from .backend import Backend, StaticShape

__all__ = ["Backend", "StaticShape"]
