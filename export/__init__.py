"""Llama to a bundle of static-shape ONNX graphs."""

from .bundle import export_bundle
from .graphs import TARGETS

__all__ = ["TARGETS", "export_bundle"]
