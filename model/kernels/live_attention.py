"""Attention that reads the live rows of the cache instead of all of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear import STORAGE_DTYPES

__all__ = ["attend_live"]


@torch.library.custom_op("llamac::attend_live", mutates_args=(), device_types="cpu")
def attend_live(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, mask: Tensor
) -> Tensor:
    """Masked attention whose cost follows the context, not the cache's size.

    How many rows live is a value, which a compiled graph must not look at; this operator is
    opaque to the graph, whose shapes stay what they are.

    Args:
        q: [B, H, T, D].
        k_cache: [B, K, S, D].
        v_cache: [B, K, S, D].
        positions: [B] int64, of each row's first token.
        mask: [B, 1, T, S] bool, True where a cache row is seen.

    Returns:
        [B, T, H, D], contiguous.
    """
    num_tokens = q.shape[2]
    live = min(int(positions.max()) + num_tokens, k_cache.shape[2])
    k, v = k_cache[:, :, :live], v_cache[:, :, :live]
    seen = mask[..., :live]
    if num_tokens > 1:
        if q.dtype in STORAGE_DTYPES:
            q, k, v = q.float(), k.float(), v.float()
        q = q.contiguous()  # as the fast kernel asks
        out = F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
    else:
        # The heads that share a key become its queries: each key is read once, not once a head.
        grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
        out = F.scaled_dot_product_attention(grouped, k, v, seen if q.shape[0] > 1 else None)
        out = out.reshape(q.shape)
    return out.transpose(1, 2).to(k_cache.dtype).contiguous()


@attend_live.register_kernel("cuda")
def _(q: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    from .gpu import attend_on_gpu

    return attend_on_gpu(q, k_cache, v_cache, positions)


@attend_live.register_fake
def _(q: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)
