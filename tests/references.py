"""What backends are compared with: one eager forward, and ids, chunks and steps to feed them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from conftest import TOLERANCE
from numpy.typing import NDArray

from llamac.model import KVCache, Llama
from llamac.model.llama import TorchAttention
from llamac.model.tables import rotate
from llamac.runtime.backend import Backend
from llamac.runtime.chunks import next_chunk

VOCAB_SIZE = 101


def random_ids(count: int, seed: int = 0) -> list[int]:
    return [int(word) % VOCAB_SIZE for word in np.random.Philox(seed).random_raw(count)]


def one_forward(model: Llama, ids: Sequence[int], *, window: int | None = None) -> NDArray:
    """[T, V] logits of a whole sequence at once, the cache exactly as long.

    With a window, each token sees itself and the window - 1 positions before it.
    """
    cache = KVCache.allocate(model.config, 1, len(ids), dtype=torch.float32)
    zero = torch.zeros(1, dtype=torch.int64)
    wanted = torch.arange(len(ids))[None]
    attention = TorchAttention() if window is None else Banded(window)
    with torch.no_grad():
        return model(torch.tensor([ids]), zero, zero, wanted, cache, attention)[0].numpy()


class Banded:
    """Attention of a whole sequence in which each token sees only the last positions."""

    def __init__(self, window: int) -> None:
        self.window = window

    def __call__(self, q, k, v, cache, *, cos, sin, positions, write_indices, slots, scale):
        q, k, v = (x.transpose(1, 2) for x in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        order = torch.arange(q.shape[2])
        distance = order[:, None] - order
        seen = (distance >= 0) & (distance < self.window)
        out = F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)


def assert_close(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> None:
    rtol, atol = TOLERANCE["float32"]
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours, theirs, rtol, atol * np.abs(theirs).max())


def prefill_chunks(backend: Backend, slot: int, ids: Sequence[int]) -> NDArray[np.float32]:
    """All of a prompt, cut as the scheduler does; [V] logits of its last id."""
    end = 0
    while end < len(ids):
        start, end = next_chunk(len(ids), end, backend.shape)
        logits = backend.prefill(slot, ids[start:end], start)
    return logits


def decode_slot(backend: Backend, slot: int, token_id: int, position: int) -> NDArray[np.float32]:
    """[V] logits of one slot's step, the others idle at row 0."""
    ids, positions = np.zeros((2, backend.shape.batch_size), np.int64)
    ids[slot], positions[slot] = token_id, position
    return backend.decode(ids, positions)[slot]
