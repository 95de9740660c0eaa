"""From any checkpoint to one of 4 or 8 bit weights that others read too."""

from .calibration import CALIBRATION_TEXT
from .recipe import Recipe, parse_recipe
from .write import QuantizedKind, quantize_checkpoint, quantized_copy

__all__ = [
    "CALIBRATION_TEXT",
    "QuantizedKind",
    "Recipe",
    "parse_recipe",
    "quantize_checkpoint",
    "quantized_copy",
]
