"""Operators of steps of few rows on a GPU; their kernels are Triton's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["multiply_gate_up", "multiply_qkv", "multiply_rows"]

_library = torch.library.Library("llamac", "FRAGMENT")
# The compiler isn't told that multiply_qkv writes the cache: it takes no such operator into a
# region that layers share. Whoever reads the cache afterwards must need q, which orders the two.
for _schema in (
    "multiply_rows(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None) -> Tensor",
    "multiply_gate_up(Tensor hidden, Tensor gain, float eps, Tensor[] weights, Tensor[] biases)"
    " -> Tensor",
    "multiply_qkv(Tensor hidden, Tensor gain, float eps, Tensor[] weights, Tensor[] biases, "
    "Tensor cos, Tensor sin, Tensor k_cache, Tensor v_cache, Tensor write_indices, Tensor slots)"
    " -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def multiply_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Does what product_gpu.multiply_on_gpu does."""
    return torch.ops.llamac.multiply_rows(x, weight, bias, residual)


def multiply_gate_up(
    hidden: Tensor, gain: Tensor, eps: float, weights: list[Tensor], biases: list[Tensor]
) -> Tensor:
    """Does what layer_gpu.multiply_gate_up_on_gpu does."""
    return torch.ops.llamac.multiply_gate_up(hidden, gain, eps, weights, biases)


def multiply_qkv(
    hidden: Tensor,
    gain: Tensor,
    eps: float,
    weights: list[Tensor],
    biases: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    write_indices: Tensor,
    slots: Tensor,
) -> Tensor:
    """Does what layer_gpu.multiply_qkv_on_gpu does."""
    return torch.ops.llamac.multiply_qkv(
        hidden, gain, eps, weights, biases, cos, sin, k_cache, v_cache, write_indices, slots
    )


def _multiply_rows(*given: Any) -> Tensor:
    from .product_gpu import multiply_on_gpu

    return multiply_on_gpu(*given)


def _multiply_gate_up(*given: Any) -> Tensor:
    from .layer_gpu import multiply_gate_up_on_gpu

    return multiply_gate_up_on_gpu(*given)


def _multiply_qkv(*given: Any) -> Tensor:
    from .layer_gpu import multiply_qkv_on_gpu

    return multiply_qkv_on_gpu(*given)


def _fake_rows(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(len(x), len(weight))


def _fake_gate_up(
    hidden: Tensor, gain: Tensor, eps: float, weights: list[Tensor], *_: object
) -> Tensor:
    return hidden.new_empty(len(hidden), len(weights[0]))


def _fake_qkv(
    hidden: Tensor,
    gain: Tensor,
    eps: float,
    weights: list[Tensor],
    biases: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    *_: object,
) -> Tensor:
    head_dim = k_cache.shape[3]
    return hidden.new_empty(len(hidden), len(weights[0]) // head_dim, head_dim)


for _name, _kernel, _fake in (
    ("multiply_rows", _multiply_rows, _fake_rows),
    ("multiply_gate_up", _multiply_gate_up, _fake_gate_up),
    ("multiply_qkv", _multiply_qkv, _fake_qkv),
):
    _library.impl(_name, _kernel, "CUDA")
    torch.library.register_fake(f"llamac::{_name}", _fake, lib=_library)
