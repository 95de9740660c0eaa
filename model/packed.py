"""Weights of 4 and 8 bits: how they are stored, and the modules that compute with them.

A packed weight of N rows and K columns is compressed-tensors' `pack-quantized`, which is ONNX
Runtime's MatMulNBits' too: an unsigned value u of each element, low bits first along K, and a scale
for each group of columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.typed_json import shown
from .config import DTYPES
from .kernels.few_rows import multiply_few, multiply_few_packed
from .kernels.many_rows import multiply_many
from .kernels.packed_product import dequantize, multiply_packed
from .linear import Linear, OverRanks, is_few_rows, is_many_rows

__all__ = ["PackedEmbedding", "PackedFormat", "PackedLinear", "is_packed_part", "project"]

_BITS = (4, 8)
_GROUPS = (16, 32, 64, 128)
_UNIT = 8  # columns that a whole row's group is a multiple of


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFormat:
    """How one weight is packed.

    Attributes:
        bits: 4 or 8.
        group_size: Columns that share a scale: 16, 32, 64 or 128, which divides K, or all K.
        scale_dtype: "float32", "float16" or "bfloat16".
        minimum_dtype: One of these if w = u * scale + minimum; None if w = (u - 2^(bits-1)) *
            scale.
        has_order: Whether column i is stored for input order[i], not for input i.

    Raises:
        ValueError: The bits or a dtype are not supported.
    """

    bits: int
    group_size: int
    scale_dtype: str
    minimum_dtype: str | None = None
    has_order: bool = False

    def __post_init__(self) -> None:
        if self.bits not in _BITS:
            raise ValueError(f"weights of {shown(self.bits)} bits; only 4 and 8 are supported")
        for dtype in (self.scale_dtype, self.minimum_dtype):
            if dtype not in (None, *DTYPES):
                raise ValueError(
                    f"scales of {shown(dtype)}; only {', '.join(DTYPES)} are supported"
                )

    def tensors(self, num_rows: int, width: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Names what is stored for a weight [num_rows, width].

        Args:
            num_rows: N.
            width: K.

        Returns:
            Parameter name to its shape and dtype.

        Raises:
            ValueError: The width can't have such groups.
        """
        allowed = [g for g in _GROUPS if width % g == 0] + [width] * (width % _UNIT == 0)
        if self.group_size not in allowed:
            choices = ", ".join(map(str, allowed)) or "none"
            raise ValueError(
                f"a weight of {width} columns can't have groups of {shown(self.group_size)}; only "
                f"{choices} can be read"
            )
        groups = (num_rows, width // self.group_size)
        found: dict[str, tuple[tuple[int, ...], str]] = {
            "weight_packed": ((num_rows, width * self.bits // 8), "uint8"),
            "weight_scale": (groups, self.scale_dtype),
        }
        if self.minimum_dtype is not None:
            found["weight_minimum"] = (groups, self.minimum_dtype)
        if self.has_order:
            found["weight_order"] = ((width,), "int32")
        return found


def is_packed_part(name: str) -> bool:
    """Whether a parameter is one of a packed weight's, whose dtype is never the model's."""
    return name.rpartition(".")[2].startswith("weight_")


class _Packed(nn.Module):
    """The tensors of a packed weight."""

    weight_packed: nn.Parameter
    weight_scale: nn.Parameter
    weight_minimum: nn.Parameter | None
    weight_order: nn.Parameter | None

    def __init__(self, num_rows: int, width: int, packed: PackedFormat) -> None:
        super().__init__()
        self.packed = packed
        self.width = width
        self.weight_minimum = self.weight_order = None
        for name, (shape, dtype) in packed.tensors(num_rows, width).items():
            value = torch.empty(shape, dtype=getattr(torch, dtype))
            setattr(self, name, nn.Parameter(value, requires_grad=False))


class PackedLinear(_Packed, OverRanks):
    """A Linear whose weight is packed.

    Args:
        in_features: Width of x.
        out_features: Width of the result.
        packed: How the weight is stored.
        bias: Whether there is a bias.

    Attributes:
        product: What an export emits instead of computing; None computes.
    """

    def __init__(
        self, in_features: int, out_features: int, packed: PackedFormat, *, bias: bool = False
    ) -> None:
        super().__init__(out_features, in_features, packed)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.product: Callable[[Tensor, PackedLinear], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies; see project.

        Args:
            x: [M, in_features].

        Returns:
            [M, out_features] in x's dtype.
        """
        return self.combine(project(x, self)[0])


class PackedEmbedding(_Packed):
    """An embedding whose table is packed; only the rows looked up are unpacked.

    Args:
        num_embeddings: V.
        embedding_dim: E.
        packed: How the table is stored.
    """

    def forward(self, ids: Tensor) -> Tensor:
        """Looks rows up.

        Args:
            ids: [...] int64.

        Returns:
            [..., E] float32.
        """
        shape = ids.shape
        form, ids = self.packed, ids.flatten()
        u = F.embedding(ids, self.weight_packed).float()
        if form.bits == 4:  # in float32, in which every ONNX provider has the operators
            high = (u / 16).floor()
            u = torch.stack((u - 16 * high, high), dim=-1).flatten(1)
        groups = u.unflatten(1, (-1, form.group_size))  # [n, E / g, g]
        scale = F.embedding(ids, self.weight_scale).float()[..., None]
        if self.weight_minimum is None:
            rows = (groups - 2 ** (form.bits - 1)) * scale
        else:
            rows = groups * scale + F.embedding(ids, self.weight_minimum).float()[..., None]
        return rows.view(*shape, self.width)


def project(x: Tensor, *layers: Linear | PackedLinear) -> Sequence[Tensor]:
    """Multiplies the same rows with several weights, in one call where that is faster.

    Args:
        x: [M, in_features].
        layers: Linears of that width.

    Returns:
        Of each layer [M, out_features] in x's dtype.
    """
    plain = [layer for layer in layers if isinstance(layer, Linear)]
    packed = [
        layer
        for layer in layers
        if isinstance(layer, PackedLinear) and layer.weight_order is None and _by_kernel(x, layer)
    ]
    if len(plain) == len(layers) and (is_few_rows(x) or is_many_rows(x)):
        multiply = multiply_few if is_few_rows(x) else multiply_many
        outs = multiply(x.contiguous(), [layer.weight for layer in plain])
    elif len(plain) == len(layers) and plain[0].joined is not None:
        return plain[0].multiply_joined(x).split([layer.out_features for layer in plain], dim=1)
    elif len(packed) == len(layers):
        outs = _multiply_by_kernel(x, packed)
    else:
        return [_multiply(x, layer) for layer in layers]
    return [layer.add_bias(out) for layer, out in zip(layers, outs, strict=True)]


def _by_kernel(x: Tensor, layer: PackedLinear) -> bool:
    """Eagerly on a CPU the weight is unpacked first: that is the reference."""
    compiled = torch.compiler.is_dynamo_compiling() and layer.product is None
    return compiled or x.device.type == "cuda"


def _multiply(x: Tensor, layer: Linear | PackedLinear) -> Tensor:
    if isinstance(layer, Linear):
        return layer(x)
    if layer.weight_order is not None:
        x = x.index_select(1, layer.weight_order)
    if layer.product is not None:
        return layer.add_bias(layer.product(x, layer))
    if _by_kernel(x, layer):
        return layer.add_bias(_multiply_by_kernel(x, [layer])[0])
    parts = layer.weight_packed, layer.weight_scale, layer.weight_minimum
    return F.linear(x, dequantize(*parts, x.dtype, width=layer.width), layer.own_bias)


def _multiply_by_kernel(x: Tensor, layers: Sequence[PackedLinear]) -> Sequence[Tensor]:
    minima = [layer.weight_minimum for layer in layers]
    none = x.new_empty(0)
    multiply = multiply_few_packed if is_few_rows(x) else multiply_packed
    return multiply(
        x.contiguous(),
        [layer.weight_packed for layer in layers],
        [layer.weight_scale for layer in layers],
        []
        if not any(m is not None for m in minima)
        else [none if m is None else m for m in minima],
    )
