"""The model, eager: against transformers, and against itself in one piece."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from llamac.model import KVCache, Llama, TorchBackend
from llamac.model.llama import TorchAttention, rotate
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


def one_forward(model: Llama, ids: list[int]) -> Tensor:
    """[T, V] logits of a whole sequence at once, the cache exactly as long."""
    cache = KVCache.allocate(model.config, 1, len(ids), dtype=torch.float32)
    zero = torch.zeros(1, dtype=torch.int64)
    wanted = torch.arange(len(ids))[None]
    with torch.no_grad():
        return model(torch.tensor([ids]), zero, zero, wanted, cache, TorchAttention())[0]


@pytest.mark.parametrize(("max_seq_len", "num_prefilled"), [(40, 0), (40, 16), (40, 17), (37, 36)])
def test_chunks_and_steps_equal_one_forward_up_to_the_last_row(
    max_seq_len: int, num_prefilled: int
):
    model = our_model("llama-3.1")
    ids = list(range(max_seq_len))
    backend = TorchBackend(
        model, max_seq_len=max_seq_len, prefill_lens=(4,), compile=False, all_logits=True
    )
    logits = teacher_forced(backend, ids, num_prefilled)
    np.testing.assert_allclose(logits, one_forward(model, ids).numpy(), rtol=1e-4, atol=1e-5)


def test_padding_garbage_and_neighbours_never_leak():
    model = our_model("llama-2-gqa")
    backend = TorchBackend(model, batch_size=3, max_seq_len=32, prefill_lens=(8,), compile=False)
    ids = [5, 6, 7]
    alone = backend.prefill(1, ids, 0).copy()
    step = backend.decode(np.array([0, 9, 0]), np.array([0, 3, 0]))[1].copy()
    for buffer in (*backend.cache.k, *backend.cache.v):
        buffer.fill_(1e4)  # finite garbage in every row that nobody has written
    backend.prefill(0, [1, 2, 3, 4, 5, 6, 7, 8], 0)
    np.testing.assert_array_equal(backend.prefill(1, ids, 0), alone)
    again = backend.decode(np.array([3, 9, 0]), np.array([8, 3, 0]))[1]
    np.testing.assert_allclose(again, step, rtol=1e-5, atol=1e-6)


def test_a_decode_between_two_chunks_of_a_neighbour_changes_neither():
    model = our_model("llama-2-gqa")
    ids = list(range(20, 36))

    def run(interleave: bool) -> tuple[np.ndarray, np.ndarray]:
        backend = TorchBackend(
            model, batch_size=2, max_seq_len=32, prefill_lens=(8,), compile=False
        )
        backend.prefill(0, [1, 2, 3], 0)
        backend.prefill(1, ids[:8], 0)
        if interleave:  # the idle slot is fed an id at the row its own next chunk begins
            step = backend.decode(np.array([4, 0]), np.array([3, 8]))[0].copy()
        chunk = backend.prefill(1, ids[8:], 8)
        if not interleave:
            step = backend.decode(np.array([4, 0]), np.array([3, 16]))[0].copy()
        return step, chunk

    for one, other in zip(run(True), run(False), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def banded_forward(model: Llama, ids: list[int], width: int) -> Tensor:
    """[T, V] logits of one forward in which each token sees only the last `width` positions."""

    class Banded(TorchAttention):
        def prepare(
            self, positions: Tensor, write_indices: Tensor, num_tokens: int, max_seq_len: int
        ) -> tuple[Tensor, ...]:
            mask, *rest = super().prepare(positions, write_indices, num_tokens, max_seq_len)
            distance = torch.arange(num_tokens)[:, None] - torch.arange(max_seq_len)
            return mask & (distance < width), *rest

    cache = KVCache.allocate(model.config, 1, len(ids), dtype=torch.float32)
    zero = torch.zeros(1, dtype=torch.int64)
    wanted = torch.arange(len(ids))[None]
    with torch.no_grad():
        return model(torch.tensor([ids]), zero, zero, wanted, cache, Banded())[0]


def test_roll_equals_the_banded_forward_for_three_windows():
    rows, total = 16, 16 * 4
    model = our_model("llama-3.1")
    ids = torch.randint(0, 101, (total,), generator=torch.Generator().manual_seed(2)).tolist()
    backend = TorchBackend(
        model, max_seq_len=rows, prefill_lens=(8,), compile=False, all_logits=True
    )
    logits = teacher_forced(backend, ids, rows)
    expected = banded_forward(model, ids, rows).numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_rotate_pairs_dimension_i_with_i_plus_half():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    cos, sin = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[1.0, 0.0]]])
    # Dimension 0 and 2 turn by 90 degrees, 1 and 3 stay.
    assert rotate(x, cos, sin).flatten().tolist() == [-3.0, 2.0, 1.0, 4.0]


@pytest.mark.parametrize(
    ("slot", "num_ids", "start", "message"),
    [
        (2, 4, 0, "slot is 2"),
        (0, 0, 0, "chunk has 0 ids"),
        (0, 9, 0, "chunk has 9 ids"),
        (0, 4, 25, "chunk starts at 25"),
        (0, 4, -1, "chunk starts at -1"),
    ],
)
def test_bad_chunks_are_refused(slot: int, num_ids: int, start: int, message: str):
    backend = TorchBackend(
        our_model("llama-1"), batch_size=2, max_seq_len=32, prefill_lens=(8,), compile=False
    )
    with pytest.raises(ValueError, match=message):
        backend.prefill(slot, [1] * num_ids, start)


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
