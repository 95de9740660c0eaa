"""Attention that reads the live rows of the cache instead of all of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear import STORAGE_DTYPES
from ..tables import causal_mask

__all__ = ["NUM_COUNTERS", "attend_live"]

# More than a GPU has groups of processors that could share a block of queries.
NUM_COUNTERS = 256


_library = torch.library.Library("llamac", "FRAGMENT")
# Not a custom_op, whose first call imports Dynamo.
_library.define(
    "attend_live(Tensor q, Tensor k_cache, Tensor v_cache, Tensor positions, Tensor slots, "
    "float scale, Tensor? k_scale=None, Tensor? v_scale=None, Tensor? counters=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def attend_live(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    counters: Tensor | None = None,
) -> Tensor:
    """Causal attention whose cost follows the context, not the cache's size.

    How many rows live is a value, which a compiled graph must not look at; this operator is
    opaque to the graph, whose shapes stay what they are.

    Args:
        q: [B, H, T, D].
        k_cache: [slots, K, S, D].
        v_cache: [slots, K, S, D].
        positions: [B] int64, of each row's first token; once it is S or more, all rows are seen.
        slots: [B] int64, the cache slot of each row.
        scale: Of the products of queries and keys.
        k_scale: [slots, K, S] float32 where the caches are int8, else None.
        v_scale: The same of the values.
        counters: [NUM_COUNTERS] int32 zeros, which a GPU needs and leaves as they were.

    Returns:
        [B, H, T, D] as a contiguous [B, T, H, D].
    """
    return torch.ops.llamac.attend_live(
        q, k_cache, v_cache, positions, slots, scale, k_scale, v_scale, counters
    )


def _attend_on_cpu(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    _: Tensor | None = None,
) -> Tensor:
    dtype, num_tokens = q.dtype, q.shape[2]
    live = min(int(positions.max()) + num_tokens, k_cache.shape[2])
    k, v = (_select(cache[:, :, :live], slots) for cache in (k_cache, v_cache))
    if k_scale is not None and v_scale is not None:
        k, v = (
            (rows * _select(own[:, :, :live], slots)[..., None]).to(dtype)
            for rows, own in ((k, k_scale), (v, v_scale))
        )
    seen = causal_mask(positions, num_tokens, live)
    if num_tokens > 1:
        if q.dtype in STORAGE_DTYPES:
            q, k, v = q.float(), k.float(), v.float()
        q = q.contiguous()  # as the fast kernel asks
        out = F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)
    else:
        # The heads that share a key become its queries: each key is read once, not once a head.
        grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
        mask = seen if q.shape[0] > 1 else None  # a lone token sees all live rows
        out = F.scaled_dot_product_attention(grouped, k, v, mask, scale=scale)
        out = out.reshape(q.shape)
    return out.transpose(1, 2).to(dtype).contiguous()


def _attend_on_gpu(*given: Any) -> Tensor:
    from .attention_gpu import attend_on_gpu

    return attend_on_gpu(*given)


def _fake(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)


def _select(cache: Tensor, slots: Tensor) -> Tensor:
    """The slots' part of a cache: a view of one slot, or of all in their order."""
    first, count = int(slots[0]), len(slots)
    if torch.equal(slots, torch.arange(first, first + count)):
        return cache[first : first + count]
    return cache.index_select(0, slots)


_library.impl("attend_live", _attend_on_cpu, "CPU")
_library.impl("attend_live", _attend_on_gpu, "CUDA")
torch.library.register_fake("llamac::attend_live", _fake, lib=_library)
