"""Products with weights as ONNX operators: the export's side of Linear and PackedLinear."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..model.linear import Linear
from ..model.llama import Llama
from ..model.packed import PackedEmbedding, PackedFormat, PackedLinear

__all__ = ["set_products"]

_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 128
_WEIGHT_FIRST = range(2, 65)  # rows of x


def set_products(model: Llama, target: str, dtype: torch.dtype, *, accuracy_level: int) -> None:
    """Makes a model's layers emit operators, with parameters in the shapes these want.

    A tied head gets parameters of its own: the operator wants the table's bytes in another shape.

    Args:
        model: Without values.
        target: Of packed weights "cpu" and "cuda" get MatMulNBits, "tensorrt" DequantizeLinear
            and Gemm; "cpu" gets plain weights as left factors of a few rows.
        dtype: Of the hidden states.
        accuracy_level: Of MatMulNBits.
    """
    for module in list(model.modules()):
        if isinstance(module, PackedEmbedding) and target == "tensorrt":
            model.model.embed_tokens = _UnpackedTable(module, dtype)
        if isinstance(module, Linear) and target == "cpu":
            module.product = _multiply_plain
        if not isinstance(module, PackedLinear):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach(), requires_grad=False))
        num_rows, num_groups = module.weight_scale.shape
        if target == "tensorrt":
            del module.weight_packed
            signed = _empty((num_rows, module.width), torch.int8)
            module.register_parameter("weight_signed", signed)
            if module.packed.bits == 8:
                scale = _empty(module.weight_scale.shape, module.weight_scale.dtype)
                module.register_parameter("weight_positive_scale", scale)
            module.product = _dequantize_and_multiply
        else:
            block = _block_size(module.packed)
            shape = (num_rows, module.width // block, block * module.packed.bits // 8)
            module.weight_packed = _empty(shape, torch.uint8)
            module.product = partial(_multiply_packed, accuracy_level=accuracy_level)


class _UnpackedTable(nn.Module):
    """TensorRT takes packed values in products alone."""

    def __init__(self, table: PackedEmbedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight_unpacked = _empty((table.weight_scale.shape[0], table.width), dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.weight_unpacked)


def _block_size(form: PackedFormat) -> int:
    """The operator's largest block within a group: a power of two from 16 on."""
    block = min(form.group_size & -form.group_size, _LARGEST_BLOCK)
    if block < _SMALLEST_BLOCK:
        raise ValueError(
            f"groups of {form.group_size} columns have no ONNX operator, which wants a multiple of "
            f"{_SMALLEST_BLOCK}; llamac quantize the unquantized checkpoint"
        )
    return block


def _multiply_plain(x: Tensor, layer: Linear) -> Tensor:
    """X [M, K] times the weight, of a few rows turned around.

    ONNX Runtime's CPU provider copies a right factor at every step, and reads a left one as it is.
    """
    if len(x) not in _WEIGHT_FIRST:
        return nn.functional.linear(x, layer.weight)
    out = torch.onnx.ops.symbolic(
        "Gemm",
        (layer.weight, x),
        {"transB": 1},
        dtype=x.dtype,
        shape=(layer.out_features, len(x)),
        version=13,
    )
    return out.t()


def _multiply_packed(x: Tensor, layer: PackedLinear, *, accuracy_level: int) -> Tensor:
    """X [M, K] times the weight, values less 2^(bits-1), and the minima's share."""
    num_rows, num_blocks, _ = layer.weight_packed.shape
    scale = layer.weight_scale.to(x.dtype)
    if num_blocks > scale.shape[1]:
        scale = scale.repeat_interleave(num_blocks // scale.shape[1], dim=1)
    out = torch.onnx.ops.symbolic(
        "com.microsoft::MatMulNBits",
        (x, layer.weight_packed, scale),
        {
            "K": layer.width,
            "N": num_rows,
            "bits": layer.packed.bits,
            "block_size": layer.width // num_blocks,
            "accuracy_level": accuracy_level,
        },
        dtype=x.dtype,
        shape=(x.shape[0], num_rows),
        version=1,
    )
    return _add_minima(out, x, layer)


def _dequantize_and_multiply(x: Tensor, layer: PackedLinear) -> Tensor:
    """The form in which TensorRT keeps a weight packed in its engine."""
    signed = layer.get_parameter("weight_signed")
    name = "weight_positive_scale" if layer.packed.bits == 8 else "weight_scale"
    scale = layer.get_parameter(name).to(x.dtype)
    is_grouped = scale.shape[1] > 1
    weight = torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (signed, scale if is_grouped else scale[:, 0]),
        {"axis": 1, "block_size": layer.packed.group_size} if is_grouped else {"axis": 0},
        dtype=x.dtype,
        shape=signed.shape,
        version=24,
    )
    return _add_minima(nn.functional.linear(x, weight), x, layer)


def _add_minima(out: Tensor, x: Tensor, layer: PackedLinear) -> Tensor:
    """Adds what u * scale + minimum is more than (u - 2^(bits-1)) * scale."""
    if layer.weight_minimum is None:
        return out
    half = 2 ** (layer.packed.bits - 1)
    excess = layer.weight_minimum.float() + half * layer.weight_scale.float()  # [N, K / g]
    sums = x.float().unflatten(1, (-1, layer.packed.group_size)).sum(-1)  # [M, K / g]
    return out + nn.functional.linear(sums, excess).to(out.dtype)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
