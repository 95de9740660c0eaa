"""torchao's int8 weights in safetensors.

Source: torchao's flatten_tensor_state_dict, which names the tensors.
"""

from __future__ import annotations

from ....runtime.typed_json import shown
from .modules import Modules
from .signed import read_signed

__all__ = ["read_torchao"]

_VALUES = "_weight_qdata"


def read_torchao(modules: Modules) -> None:
    """Reads int8 by rows or groups; what else torchao writes is refused. See read_quantized."""
    for module, num_rows, width in modules.with_tensor(_VALUES):
        values = modules.find(module, _VALUES)
        if values is None or values.dtype != "int8" or values.shape != (num_rows, width):
            raise ValueError(
                f"{module}: quantization_config: quant_type is {_kind(modules)}; of torchao's "
                "weights only int8 can be read; use the unquantized checkpoint and llamac quantize"
            )
        read_signed(
            modules, module, weight=_VALUES, scale="_weight_scale", zero="_weight_zero_point"
        )


def _kind(modules: Modules) -> str:
    """The name of torchao's class, where it stands in its place."""
    found = modules.settings.get("quant_type")
    for key in ("default", "_type"):
        found = found.get(key) if isinstance(found, dict) else found
    return shown(found)
