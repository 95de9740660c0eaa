"""Quantized Hugging Face folders: which method wrote one, and what its tensors become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ....runtime.typed_json import shown
from ...packed import PackedFormat
from ..pieces import Part, Piece
from .awq import read_awq
from .bitsandbytes import read_bitsandbytes
from .compressed_tensors import read_compressed_tensors
from .fp8 import read_fp8
from .gptq import read_gptq
from .modules import Modules
from .native import read_native
from .torchao import read_torchao

__all__ = ["read_quantized"]

_READERS: dict[str, Callable[[Modules], None]] = {
    "awq": read_awq,
    "bitsandbytes": read_bitsandbytes,
    "compressed-tensors": read_compressed_tensors,
    "fp8": read_fp8,
    "gptq": read_gptq,
    "llamac": read_native,
    "torchao": read_torchao,
}


def read_quantized(
    settings: Mapping[str, Any],
    pieces: Mapping[str, Piece],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[list[Part], dict[str, PackedFormat]]:
    """Turns a method's tensors into plain and packed weights; nothing big is read.

    Args:
        settings: config.json's quantization_config.
        pieces: HF's name to what the files hold under it.
        shapes: HF's name to the shape of every weight of the unquantized model.

    Returns:
        The parts of the checkpoint, and module name to how its weight is packed.

    Raises:
        ValueError: The method or one of its settings isn't supported, or a tensor doesn't fit.
    """
    method = settings.get("quant_method")
    if method is None and True in (settings.get("load_in_8bit"), settings.get("load_in_4bit")):
        method = "bitsandbytes"  # which was the only one
    if not isinstance(method, str) or method not in _READERS:
        raise ValueError(
            f"quantization_config: quant_method is {shown(method)}; only {', '.join(_READERS)} can "
            "be read; use the unquantized checkpoint and llamac quantize"
        )
    modules = Modules(settings, pieces, shapes)
    _READERS[method](modules)
    return modules.finish()
