"""All the math of a static-shape LLaMA.

Shape letters: B batch, T query tokens, S cache rows, H query heads, K key/value heads, D head_dim,
E hidden_size, V vocab_size, N tokens that get logits.

Hidden states stay 2-D, [B*T, E], so that every weight product is one plain matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import KVCache, quantize_rows
from .config import LlamaConfig
from .decode_layer import call_layer, call_layers
from .kernels.few_rows import MAX_ROWS, attend_in_cpp
from .kernels.live_attention import NUM_COUNTERS, attend_live
from .kernels.many_rows import DTYPES_IN_CPP
from .linear import Linear, OverRanks, compiled_on_cpu, join_weights
from .packed import PackedEmbedding, PackedFormat, PackedLinear, project
from .ranks import ALONE, Rank, role_of
from .tables import rope_tables, rotate

__all__ = ["Attention", "Llama", "TorchAttention"]

_NOTHING_PACKED: Mapping[str, PackedFormat] = {}


class Attention(Protocol):
    """The seam that keeps this file free of branches: RoPE, cache write and attention of a layer.

    The torch form writes the cache in place; the export forms emit ONNX operators and keep the
    written caches as graph outputs.
    """

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
        """Rotates, writes and attends.

        Args:
            q: [B, T, H, D] queries before RoPE.
            k: [B, T, K, D] keys before RoPE.
            v: [B, T, K, D] values.
            cache: The layer's buffers (see cache.layer_buffers), of any number of slots.
            cos: [B, T, D/2] float32.
            sin: [B, T, D/2] float32.
            positions: [B] int64, of each row's first token.
            write_indices: [B] int64, the cache row it is written to.
            slots: [B] int64, the cache slot of each row.
            scale: Of the products of queries and keys.

        Returns:
            [B, T, H, D] in q's dtype.
        """
        ...


class TorchAttention(nn.Module):
    """Attention over the preallocated cache, written in place.

    A module without weights: torch.compile traces a layer once for all layers only when what it
    is called with are tensors and modules.

    Attributes:
        counters: Of attend_live's; on the device of the cache.
    """

    counters: Tensor

    def __init__(self) -> None:
        super().__init__()
        counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32)
        self.register_buffer("counters", counters, persistent=False)

    def forward(
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
        k_cache, v_cache, *scales = cache
        q = rotate(q, cos, sin).transpose(1, 2)  # [B, H, T, D]
        k = rotate(k, cos, sin).transpose(1, 2)  # [B, K, T, D]
        heads, tokens = (torch.arange(n, device=q.device) for n in k.shape[1:3])
        rows = write_indices[:, None] + tokens  # [B, T]
        index = (slots[:, None, None], heads[:, None], rows[:, None])
        # Inductor writes index_put_ in place; scatter_ it would do on a copy of the whole cache.
        written = [k, v.transpose(1, 2)]
        if scales:
            (k, k_scale), (v, v_scale) = map(quantize_rows, written)
            written = [k, v, k_scale, v_scale]
        for buffer, rows_written in zip(cache, written, strict=True):
            buffer.index_put_(index, rows_written)
        is_fastest = len(tokens) <= MAX_ROWS or q.dtype in DTYPES_IN_CPP
        if compiled_on_cpu(q) and is_fastest and (scales or q.dtype == k_cache.dtype):
            return attend_in_cpp(q, list(cache), positions, slots, scale)
        counters = self.counters if q.device.type == "cuda" else None
        return attend_live(q, k_cache, v_cache, positions, slots, scale, *scales, counters=counters)


class Llama(nn.Module):
    """A LLaMA under HF's weight names, with its RoPE tables.

    Args:
        config: The model's facts; of one of several ranks that rank's, see shard_config.
        num_positions: Rows of the RoPE tables.
        packed: Module name to how its weight is packed; the rest is plain.
        rank: Which part of each weight this is, and who has the others.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        config: LlamaConfig,
        *,
        num_positions: int,
        packed: Mapping[str, PackedFormat] = _NOTHING_PACKED,
        rank: Rank = ALONE,
    ) -> None:
        super().__init__()
        self.config = config
        self.rank = rank
        self.model = _Decoder(config)
        self.lm_head: Linear | PackedLinear = Linear(
            config.hidden_size, config.vocab_size // rank.world_size
        )
        for name, form in packed.items():
            self.set_submodule(name, _packed(self.get_submodule(name), form))
        self.tie()
        for name, module in self.named_modules():
            if isinstance(module, OverRanks) and rank.world_size > 1:
                module.share(role_of(name), rank)
        with torch.device("cpu"):  # real even when the weights are built on the meta device
            cos, sin = rope_tables(config, num_positions)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def tie(self) -> None:
        """Makes the embedding's parameters the head's, if the config says so.

        Every rank has the whole embedding, and its own rows of that as its head.
        """
        if not self.config.tie_word_embeddings:
            return
        table = self.model.embed_tokens
        if isinstance(table, PackedEmbedding) and not isinstance(self.lm_head, PackedLinear):
            first, last = self.rank.part_of(self.config.vocab_size)
            self.lm_head = PackedLinear(self.config.hidden_size, last - first, table.packed)
        for name, parameter in table.named_parameters():
            setattr(self.lm_head, name, self._rows(parameter))

    def _rows(self, table: nn.Parameter) -> nn.Parameter:
        if self.rank.world_size == 1:
            return table
        rows = table.detach()[slice(*self.rank.part_of(len(table)))]
        return nn.Parameter(rows, requires_grad=table.requires_grad)

    def join_weights(self) -> None:
        """Makes q, k and v one weight for many rows, and gate and up; see linear.join_weights."""
        for layer in self.model.layers:
            assert isinstance(layer, _Layer)
            own, mlp = layer.self_attn, layer.mlp
            for group in ((own.q_proj, own.k_proj, own.v_proj), (mlp.gate_proj, mlp.up_proj)):
                plain = [one for one in group if isinstance(one, Linear)]
                if len(plain) == len(group):
                    join_weights(*plain)

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states: the norms', which no form of the weights changes."""
        return self.model.norm.weight.dtype

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        write_indices: Tensor,
        logit_indices: Tensor,
        cache: KVCache,
        attention: Attention,
        *,
        slots: Tensor | None = None,
        run_layer: Callable[..., Tensor] = call_layer,
    ) -> Tensor:
        """Runs T tokens of each row through the model and its cache.

        Args:
            input_ids: [B, T] int64.
            positions: [B] int64, absolute position of each row's first token (RoPE, mask).
            write_indices: [B] int64, cache row that token is written to.
            logit_indices: [B, N] int64, which of the T tokens the head runs on; or [1, N], which of
                all B * T.
            cache: The rows so far; written by `attention`.
            attention: The seam; see Attention.
            slots: [B] int64, the cache slot of each row; None is each row's own number.
            run_layer: How a layer is called.

        Returns:
            [B, N, V] float32 logits; or [1, N, V].
        """
        batch_size, num_tokens = input_ids.shape
        if slots is None:
            slots = torch.arange(batch_size, device=positions.device)
        tokens = positions[:, None] + torch.arange(num_tokens, device=positions.device)
        cos, sin = F.embedding(tokens, self.cos), F.embedding(tokens, self.sin)  # [B, T, D/2]

        hidden = self.model.embed_tokens(input_ids).flatten(0, 1).to(self.dtype)  # [B*T, E]
        rest = cos, sin, positions, write_indices, slots
        layers = [*self.model.layers]
        hidden = call_layers(layers, cache.layers, run_layer, attention, hidden, *rest)

        num_parts = len(logit_indices)
        starts = torch.arange(num_parts, device=positions.device)[:, None] * num_tokens
        hidden = hidden.index_select(0, (starts + logit_indices).flatten())  # [B*N, E]
        logits = self.lm_head(self.model.norm(hidden))
        return logits.float().view(num_parts, -1, logits.shape[-1])


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the statistics in float32. Source: arXiv 1910.07467."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes the last dimension of x, [..., E]."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class _Decoder(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        weight = torch.empty(config.vocab_size, config.hidden_size)
        # nothing to initialize
        self.embed_tokens: nn.Module = nn.Embedding.from_pretrained(weight)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class _Layer(nn.Module):
    """One decoder layer; compiled once, whatever the number of layers."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = _MLP(config)

    def forward(
        self,
        attention: Attention,
        hidden: Tensor,  # [B*T, E]
        cos: Tensor,  # [B, T, D/2]
        sin: Tensor,  # [B, T, D/2]
        positions: Tensor,  # [B]
        write_indices: Tensor,  # [B]
        slots: Tensor,  # [B]
        *cache: Tensor,
    ) -> Tensor:  # [B*T, E]
        x = self.input_layernorm(hidden)
        attend = partial(
            attention,
            cache=cache,
            cos=cos,
            sin=sin,
            positions=positions,
            write_indices=write_indices,
            slots=slots,
        )
        hidden = hidden + self.self_attn(x, attend, batch_size=len(positions))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class _SelfAttention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        width, bias = config.hidden_size, config.attention_bias
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(width, q_size, bias=bias)
        self.k_proj = Linear(width, kv_size, bias=bias)
        self.v_proj = Linear(width, kv_size, bias=bias)
        self.o_proj = Linear(q_size, width, bias=bias)

    def forward(self, x: Tensor, attend: Callable[..., Tensor], *, batch_size: int) -> Tensor:
        num_tokens = len(x) // batch_size

        def heads(projection: Tensor) -> Tensor:  # head count from the local weights
            return projection.view(batch_size, num_tokens, -1, self.head_dim)

        # x is [B*T, E]; q is [B, T, H, D], k and v [B, T, K, D].
        q, k, v = map(heads, project(x, self.q_proj, self.k_proj, self.v_proj))
        out = attend(q, k, v, scale=self.scale)  # [B, T, H, D]
        return self.o_proj(out.reshape(len(x), -1))


class _MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(width, inner, bias=bias)
        self.up_proj = Linear(width, inner, bias=bias)
        self.down_proj = Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # [B*T, E] to the same
        gate, up = project(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


def _packed(module: nn.Module, form: PackedFormat) -> nn.Module:
    """A packed module in a plain one's place."""
    if isinstance(module, nn.Embedding):
        return PackedEmbedding(module.num_embeddings, module.embedding_dim, form)
    assert isinstance(module, Linear)
    num_rows, width = module.weight.shape
    return PackedLinear(width, num_rows, form, bias=module.bias is not None)
