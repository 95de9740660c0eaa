"""RoPE, cache write and attention of a layer as ONNX operators: the export's side of the seam.

Each form is an `Attention` (see llamac.model.llama) that emits operators where the torch form
computes, and keeps the caches it wrote, because in a graph they are outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.llama import Attention
from ..model.tables import causal_mask

__all__ = ["ExportAttention", "GroupQueryAttention", "StandardAttention"]


class ExportAttention(Attention):
    """An attention that records what it writes.

    Attributes:
        written: Per layer its buffers after the write, in the order of layers.
    """

    def __init__(self) -> None:
        self.written: list[tuple[Tensor, ...]] = []


class StandardAttention(ExportAttention):
    """Operators of opset 24 alone, in the form that TensorRT takes.

    TensorScatter with a cache that is a graph input and a graph output is TensorRT's in-place
    write. Attention has an explicit bool mask and one output: TensorRT ignores nonpad_kv_seqlen,
    and its causal alignment is unspecified where S > T. Where TensorRT has no kernel for it, it is
    written out.

    Args:
        attended_rows: R, the first cache rows, which are attended to; no token may lie behind
            them. All rows are written and returned.
    """

    def __init__(self, attended_rows: int) -> None:
        super().__init__()
        self._attended_rows = attended_rows
        self._mask: Tensor | None = None  # [B, 1, T, R] bool, of all layers

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: tuple[Tensor, ...],
        *,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        write_indices: Tensor,
        slots: Tensor,
        scale: float,
    ) -> Tensor:
        """See Attention."""
        k_cache, v_cache = cache
        if self._mask is None:
            self._mask = causal_mask(positions, q.shape[1], self._attended_rows)
        k_cache = _scatter(k_cache, _rotate(k.transpose(1, 2), cos, sin), write_indices)
        v_cache = _scatter(v_cache, v.transpose(1, 2), write_indices)
        self.written.append((k_cache, v_cache))
        k_cache = k_cache[:, :, : self._attended_rows]  # of all rows this is no operator
        v_cache = v_cache[:, :, : self._attended_rows]
        # TensorRT's parser scales q and k by a rounded 1 / D**0.25 each, over the whole cache.
        q = _rotate(q.transpose(1, 2), cos, sin, scale=scale)  # [B, H, T, D]
        if not _has_kernel(q):
            return _attend(q, k_cache, v_cache, self._mask).transpose(1, 2)
        out = torch.onnx.ops.symbolic(
            "Attention",
            (q, k_cache, v_cache, self._mask),
            {"scale": 1.0},  # TensorRT refuses softmax_precision
            dtype=q.dtype,
            shape=q.shape,
            version=24,
        )
        return out.transpose(1, 2)


class GroupQueryAttention(ExportAttention):
    """ONNX Runtime's operator, whose cost follows the live length instead of S.

    It appends at its own index: the row count before the write is write_indices, and the token's
    causal mask is over rows. RoPE stays outside, in float32 and at the absolute position.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lengths: tuple[Tensor, Tensor] | None = None  # [B] and [] int32, of all layers

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: tuple[Tensor, ...],
        *,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        write_indices: Tensor,
        slots: Tensor,
        scale: float,
    ) -> Tensor:
        """See Attention."""
        k_cache, v_cache = cache
        if self._lengths is None:
            # What the operator calls seqlens_k, rows after the write - 1, and
            # total_sequence_length: a constant S is exact, and captured CUDA graphs need it.
            seqlens = (write_indices + (q.shape[1] - 1)).to(torch.int32)
            self._lengths = seqlens, torch.full((), k_cache.shape[2], dtype=torch.int32)
        num_heads, num_kv_heads = q.shape[2], k.shape[2]
        query = _rotate(q.flatten(2), cos, sin, num_heads=num_heads)  # [B, T, H*D]
        key = _rotate(k.flatten(2), cos, sin, num_heads=num_kv_heads)
        out, k_cache, v_cache = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            (query, key, v.flatten(2), k_cache, v_cache, *self._lengths),
            {
                "num_heads": num_heads,
                "kv_num_heads": num_kv_heads,
                "do_rotary": 0,
                "scale": scale,
            },
            dtypes=(q.dtype, k_cache.dtype, v_cache.dtype),
            shapes=(query.shape, k_cache.shape, v_cache.shape),
            version=1,
        )
        self.written.append((k_cache, v_cache))
        return out.view(q.shape)


def _rotate(
    x: Tensor, cos: Tensor, sin: Tensor, *, num_heads: int = 0, scale: float = 1.0
) -> Tensor:
    """RotaryEmbedding, which wants one type, in float32; num_heads is for a 3-D x."""
    out = torch.onnx.ops.rotary_embedding(x.float(), cos, sin, num_heads=num_heads)
    return (out if scale == 1.0 else out * scale).to(x.dtype)


def _has_kernel(q: Tensor) -> bool:
    """Whether TensorRT's Attention takes a q [B, H, T, D] of this type and width.

    Of what has no kernel it builds no engine: it splits the operator up where an attribute of its
    own allows that, which is not ONNX. Found by building engines of every width.
    """
    head_dim = q.shape[-1]
    return q.dtype != torch.float32 and 16 <= head_dim <= 256 and head_dim % 8 == 0


def _attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, mask: Tensor) -> Tensor:
    """Attention of q [B, H, T, D], already scaled, in plain products; the softmax in float32."""
    batch, num_heads, num_tokens, head_dim = q.shape
    num_kv_heads, num_rows = k_cache.shape[1:3]
    # The heads that share a key become its queries, so that no key is repeated.
    grouped = q.reshape(batch, num_kv_heads, -1, head_dim)  # [B, K, H/K*T, D]
    scores = (grouped @ k_cache.transpose(2, 3)).float()
    scores = scores.view(batch, num_kv_heads, -1, num_tokens, num_rows)
    scores = torch.where(mask[:, :, None], scores, float("-inf"))  # [B, K, H/K, T, S]
    weights = scores.softmax(-1).to(q.dtype).view(batch, num_kv_heads, -1, num_rows)
    return (weights @ v_cache).view(batch, num_heads, num_tokens, head_dim)


def _scatter(cache: Tensor, update: Tensor, write_indices: Tensor) -> Tensor:
    """Cache [B, K, S, D] with update [B, K, T, D] in rows write_indices to write_indices + T."""
    return torch.onnx.ops.symbolic(
        "TensorScatter",
        (cache, update, write_indices),
        {"axis": -2},
        dtype=cache.dtype,
        shape=cache.shape,
        version=24,
    )
