"""The one product of activations and weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels.few_rows import MAX_ROWS, multiply_few
from .kernels.gpu_operators import multiply_rows
from .kernels.many_rows import DTYPES_IN_CPP, multiply_many
from .ranks import ALONE, Rank, Role, gather_columns, sum_over_ranks

__all__ = [
    "STORAGE_DTYPES",
    "Linear",
    "OverRanks",
    "compiled_on_cpu",
    "is_few_rows",
    "is_many_rows",
    "join_weights",
    "multiply_in_float32",
]

_FEW_ROWS_16_BIT = 8  # that are multiplied without arithmetic, fast enough
_BLOCK_ELEMENTS = 1 << 20  # of weights in float32 at a time: 4 MiB, within a CPU's cache

# Dtypes that this CPU stores but has no arithmetic for: their products run several times slower
# than float32's.
STORAGE_DTYPES = frozenset(
    dtype
    for dtype, has_arithmetic in (
        (torch.bfloat16, torch.ops.mkldnn._is_mkldnn_bf16_supported),
        (torch.float16, torch.ops.mkldnn._is_mkldnn_fp16_supported),
    )
    if not has_arithmetic()
)


_library = torch.library.Library("llamac", "FRAGMENT")
# Not a custom_op, whose first call imports Dynamo.
_library.define(
    "multiply_in_float32(Tensor x, Tensor weight) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


def compiled_on_cpu(x: Tensor) -> bool:
    """Whether this is a compiled step on a CPU, which can call operators in C++."""
    compiled = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
    return compiled and x.device.type == "cpu"


def is_few_rows(x: Tensor) -> bool:
    """Whether x [M, K] is multiplied by an operator for few rows."""
    return compiled_on_cpu(x) and len(x) <= MAX_ROWS


def is_many_rows(x: Tensor) -> bool:
    """Whether x [M, K] is multiplied by the operator for many rows."""
    by_operator = x.dtype == torch.float32 or x.dtype in DTYPES_IN_CPP
    return compiled_on_cpu(x) and len(x) > MAX_ROWS and by_operator


class OverRanks(nn.Module):
    """What a product does where several ranks hold its weight; alone, nothing.

    Attributes:
        bias: Added to the product, or None.
        role: How the weight is cut, or None.
        rank: Whose part this is.
    """

    bias: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.role: Role | None = None
        self.rank = ALONE

    def share(self, role: Role | None, rank: Rank) -> None:
        """Makes this one rank's part of a product."""
        self.role, self.rank = role, rank

    @property
    def own_bias(self) -> nn.Parameter | None:
        """What this rank's product is added to; a sum over ranks gets its bias once."""
        return None if self.role == "row" else self.bias

    def add_bias(self, out: Tensor) -> Tensor:
        """Adds own_bias to a product, if there is one."""
        return out if self.own_bias is None else out + self.own_bias

    def combine(self, out: Tensor) -> Tensor:
        """Makes the ranks' products one.

        Args:
            out: [M, a rank's columns], with own_bias.

        Returns:
            [M, out_features]; of the role "column" its own columns, which is what follows takes.
        """
        if self.role == "row":
            out = sum_over_ranks(out, self.rank)
            return out if self.bias is None else out + self.bias
        return gather_columns(out, self.rank) if self.role == "vocabulary" else out


class Linear(OverRanks):
    """x @ weight.T + bias, with HF's [out, in] weight.

    Every weight product of the model goes through this class or its packed form.

    Args:
        in_features: Width of x.
        out_features: Width of the result.
        bias: Whether there is a bias.

    Attributes:
        out_features: Width of the result.
        joined: Of the first of joined weights all of them, [all rows, in_features]; else None.
        joined_bias: Their biases, [all rows], if they have any.
        product: What an export emits instead of x @ weight.T; None is that.
    """

    joined: Tensor | None
    joined_bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.register_buffer("joined", None, persistent=False)
        self.register_buffer("joined_bias", None, persistent=False)
        self.product: Callable[[Tensor, Linear], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies.

        A product with few rows is bound by reading the weight, which BLAS does not do at full
        speed: there a compiled step has an operator for it, and a GPU a kernel.

        Args:
            x: [M, in_features].

        Returns:
            [M, out_features] in x's dtype.
        """
        return self.combine(self._multiply(x))

    def _multiply(self, x: Tensor) -> Tensor:
        if self.product is not None:
            return self.add_bias(self.product(x, self))
        if x.device.type == "cuda":
            return _multiply_on_gpu(x, self.weight, self.own_bias)
        if x.device.type == "cpu" and not torch.compiler.is_exporting():
            if is_few_rows(x):
                return self.add_bias(multiply_few(x.contiguous(), [self.weight])[0])
            if is_many_rows(x):
                return self.add_bias(multiply_many(x, [self.weight])[0])
            if x.shape[0] > _FEW_ROWS_16_BIT and x.dtype in STORAGE_DTYPES:
                return self.add_bias(multiply_in_float32(x, self.weight))
        return F.linear(x, self.weight, self.own_bias)

    def multiply_joined(self, x: Tensor) -> Tensor:
        """Multiplies with all weights that were joined to this one.

        Args:
            x: [M, in_features].

        Returns:
            [M, all rows] in x's dtype, biases added.
        """
        assert self.joined is not None
        return _multiply_on_gpu(x, self.joined, self.joined_bias)


def join_weights(*layers: Linear) -> None:
    """Moves weights of one width behind each other, and biases, so that x meets all in one product.

    The layers' own parameters become parts of those tensors. A compiled step must use one or the
    other: torch.compile takes no two inputs of one memory into a region that layers share.

    Args:
        layers: Whose weights become parts of one tensor, in this order; all have a bias, or none.
    """
    sizes = [len(layer.weight) for layer in layers]
    joined: dict[str, Tensor | None] = {"weight": None, "bias": None}
    for name in joined:
        own = [getattr(layer, name) for layer in layers]
        if own[0] is None:
            continue
        joined[name] = together = torch.cat([one.detach() for one in own])
        for layer, old, part in zip(layers, own, together.split(sizes), strict=True):
            setattr(layer, name, nn.Parameter(part, requires_grad=old.requires_grad))
    layers[0].joined, layers[0].joined_bias = joined["weight"], joined["bias"]


def _multiply_on_gpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[M, N]: x [M, K] times weight [N, K], plus bias [N]."""
    if x.device.type == "cuda" and len(x) <= MAX_ROWS:
        return multiply_rows(x, weight, bias)
    return F.linear(x, weight, bias)


def multiply_in_float32(x: Tensor, weight: Tensor) -> Tensor:
    """Multiplies as Linear does, on a CPU, a block of the weight at a time converted to float32.

    Args:
        x: [M, K], 16-bit.
        weight: [N, K] in x's dtype.

    Returns:
        [M, N] in x's dtype.
    """
    return torch.ops.llamac.multiply_in_float32(x, weight)


def _multiply_in_float32(x: Tensor, weight: Tensor) -> Tensor:
    num_rows, width = weight.shape
    columns = x.float().t()  # [K, M]
    out = columns.new_empty(num_rows, x.shape[0])
    block_rows = min(num_rows, max(1, _BLOCK_ELEMENTS // width))
    buffer = columns.new_empty(block_rows, width)
    for part, rows in zip(weight.split(block_rows), out.split(block_rows), strict=True):
        torch.mm(buffer[: len(part)].copy_(part), columns, out=rows)
    return out.t().to(x.dtype, memory_format=torch.contiguous_format)


def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


_library.impl("multiply_in_float32", _multiply_in_float32, "CPU")
torch.library.register_fake("llamac::multiply_in_float32", _fake, lib=_library)
