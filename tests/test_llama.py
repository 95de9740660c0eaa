"""The model, eager: against transformers, at every position and in 16 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llamac.model import KVCache, TorchBackend
from llamac.model.cache import cache_bytes
from llamac.model.llama import TorchAttention
from llamac.model.tables import rotate
from variants import VARIANTS, our_model, reference_model

NUM_TOKENS = 64


def teacher_forced(backend: TorchBackend, ids: list[int], num_prefilled: int) -> np.ndarray:
    """[T, V] logits of ids: chunks for the first ones, then one decode a token."""
    chunk = backend.shape.prefill_len
    rows = [
        backend.score(0, ids[start : min(start + chunk, num_prefilled)], start)
        for start in range(0, num_prefilled, chunk)
    ]
    for position in range(num_prefilled, len(ids)):
        rows.append(backend.decode(np.array([ids[position]]), np.array([position])))
    return np.concatenate(rows)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers_at_every_position(name: str):
    reference = reference_model(name)
    ids = torch.randint(0, 101, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(ids).logits[0].numpy()
    backend = TorchBackend(
        our_model(name), max_seq_len=100, prefill_lens=(16,), compile=False, all_logits=True
    )
    logits = teacher_forced(backend, ids[0].tolist(), 40)
    assert logits.shape == expected.shape
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


def test_rotate_pairs_dimension_i_with_i_plus_half():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    cos, sin = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[1.0, 0.0]]])
    # Dimension 0 and 2 turn by 90 degrees, 1 and 3 stay.
    assert rotate(x, cos, sin).flatten().tolist() == [-3.0, 2.0, 1.0, 4.0]


def test_a_step_in_slots_of_any_order_equals_one_in_order():
    model = our_model("llama-2-gqa")
    cache = KVCache.allocate(model.config, 3, 8, dtype=torch.float32)
    ids, zeros = torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.zeros(2, dtype=torch.int64)
    wanted = torch.tensor([[2], [2]])
    slots = torch.tensor([2, 0])
    attention = TorchAttention()
    with torch.no_grad():
        expected = model(
            ids,
            zeros,
            zeros,
            wanted,
            KVCache.allocate(model.config, 2, 8, dtype=torch.float32),
            attention,
        )
        logits = model(ids, zeros, zeros, wanted, cache, attention, slots=slots)
    torch.testing.assert_close(logits, expected)
    assert all(not buffer[1].any() for buffer in cache.buffers)


def test_the_cache_takes_the_bytes_that_are_announced():
    config = our_model("llama-2-gqa").config
    cache = KVCache.allocate(config, 3, 8, dtype=torch.bfloat16)
    size = cache_bytes(config, 3, 8, dtype=torch.bfloat16)
    assert size == sum(buffer.nbytes for buffer in cache.buffers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_error_is_no_worse_than_transformers(dtype: torch.dtype):
    ids = torch.randint(0, 101, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        exact = reference_model("llama-3.1")(ids).logits[0].numpy()
        import copy

        theirs = copy.deepcopy(reference_model("llama-3.1")).to(dtype)(ids).logits[0].float()
    model = our_model("llama-3.1")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    backend = TorchBackend(
        model, max_seq_len=64, prefill_lens=(16,), compile=False, all_logits=True
    )
    ours = teacher_forced(backend, ids[0].tolist(), 48)
    error = np.sqrt(np.square(ours - exact).mean())
    assert error <= 1.2 * np.sqrt(np.square(theirs.numpy() - exact).mean())
