"""Folders of quantized weights, whoever wrote them."""

from .methods import read_quantized
from .native import quantization_settings

__all__ = ["quantization_settings", "read_quantized"]
