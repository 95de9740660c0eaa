"""The torch backend: eager, or compiled and kept on disk."""

from .torch_backend import TorchBackend

__all__ = ["TorchBackend"]
