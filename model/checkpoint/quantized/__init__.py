"""Folders of quantized weights, whoever wrote them."""

from .methods import read_quantized
from .native import native_settings, quantization_settings

__all__ = ["native_settings", "quantization_settings", "read_quantized"]
