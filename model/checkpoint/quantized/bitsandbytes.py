"""bitsandbytes folders: int8 by rows, and four bits by a table of sixteen values.

Source: bitsandbytes' Int8Params and QuantState.as_dict.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from ....runtime.typed_json import check_int, shown
from ...packed import PackedFormat
from ..pieces import Piece
from .modules import Modules
from .signed import add_signed

__all__ = ["read_bitsandbytes"]

_STATE = "weight.quant_state.bitsandbytes__"
_LARGEST_INT8 = 127


def read_bitsandbytes(modules: Modules) -> None:
    """Reads int8, and nf4 and fp4, which become the model's dtype. See read_quantized."""
    for module, num_rows, width in modules.with_tensor("SCB"):
        weight = modules.take(module, "weight", shape=(num_rows, width), dtypes=("int8",))
        largest = modules.take(module, "SCB", shape=(num_rows,), dtypes=("float32",))
        add_signed(modules, module, weight)
        modules.compute(
            module,
            "weight_scale",
            [largest],
            lambda stored: (stored / _LARGEST_INT8)[:, None],
            shape=(num_rows, 1),
            dtype="float32",
        )
        form = PackedFormat(bits=8, group_size=width, scale_dtype="float32")
        modules.pack(module, form)
    for kind in ("nf4", "fp4"):
        for module, num_rows, width in modules.with_tensor(f"{_STATE}{kind}"):
            _read_table(modules, module, (num_rows, width), kind)
    for module, _, _ in modules.with_tensor("weight_format"):
        if modules.values(modules.take(module, "weight_format", shape=(1,), dtypes=("uint8",))):
            raise ValueError(f"{module}: weight_format isn't 0, rows; save the weights by rows")


def _read_table(modules: Modules, module: str, size: tuple[int, int], kind: str) -> None:
    state_piece = modules.find(module, f"{_STATE}{kind}")
    assert state_piece is not None
    modules.take(module, f"{_STATE}{kind}", shape=state_piece.shape, dtypes=("uint8",))
    nested = modules.find(module, "weight.nested_absmax")
    state = _state(modules, state_piece, size, is_nested=nested is not None)
    block = state["blocksize"]
    count = size[0] * size[1]
    num_blocks = -(-count // block)
    weight = modules.take(module, "weight", shape=((count + 1) // 2, 1), dtypes=("uint8",))
    table = modules.take(module, "weight.quant_map", shape=(16,), dtypes=("float32",))
    kinds = ("float32",) if nested is None else ("uint8",)
    largest = modules.take(module, "weight.absmax", shape=(num_blocks,), dtypes=kinds)
    inputs = [weight, table, largest]
    if nested is not None:
        inner = state["nested_blocksize"]
        inputs.append(
            modules.take(
                module,
                "weight.nested_absmax",
                shape=(-(-num_blocks // inner),),
                dtypes=("float32",),
            )
        )
        inputs.append(
            modules.take(module, "weight.nested_quant_map", shape=(256,), dtypes=("float32",))
        )

    def compute(weight: Tensor, table: Tensor, largest: Tensor, *nested: Tensor) -> Tensor:
        if nested:
            factors = nested[0].repeat_interleave(state["nested_blocksize"])[:num_blocks]
            largest = nested[1][largest.int()] * factors + state["nested_offset"]
        byte = torch.arange(256)
        pairs = table[torch.stack((byte >> 4, byte & 15), dim=1)]  # the first in the high half
        values = pairs.index_select(0, weight.flatten().int()).flatten()[:count]
        whole = count // block
        values[: whole * block].view(whole, block).mul_(largest[:whole, None])
        values[whole * block :].mul_(largest[whole:])
        return values.view(size)

    modules.compute(module, "weight", inputs, compute, shape=size, dtype="float32")


def _state(
    modules: Modules, piece: Piece, size: tuple[int, int], *, is_nested: bool
) -> dict[str, Any]:
    """What bitsandbytes wrote as JSON in bytes."""
    where = f"{piece.file.path}: tensor {piece.key}"
    if piece.dtype != "uint8" or len(piece.shape) != 1 or not 0 < piece.shape[0] <= 1 << 16:
        raise ValueError(f"{where} is not bytes of JSON")
    try:
        state = json.loads(bytes(modules.values(piece).tolist()))
    except (ValueError, RecursionError):
        raise ValueError(f"{where} is not bytes of JSON") from None
    if not isinstance(state, dict) or state.get("shape") != list(size):
        raise ValueError(f"{where} describes another weight than {list(size)}")
    for name in ("blocksize", "nested_blocksize") if is_nested else ("blocksize",):
        check_int(f"{where}: {name}", state.get(name), most=1 << 20)
    if is_nested and type(state.get("nested_offset")) is not float:
        raise ValueError(f"{where}: nested_offset is {shown(state.get('nested_offset'))}")
    return state
