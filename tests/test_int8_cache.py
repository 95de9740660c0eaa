"""Keys and values in int8, a scale for each row and head."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llamac.model import TorchBackend
from llamac.model.cache import KVCache, cache_bytes, quantize_rows
from llamac.runtime.request import Request
from llamac.runtime.sampling import SamplingParams
from llamac.runtime.scheduler import generate
from variants import our_model

ROWS, CHUNKS = 40, (4, 20)  # chunks of few tokens and of many


def backend_of(*, compile: bool = False, in_int8: bool = True) -> TorchBackend:
    return TorchBackend(
        our_model("biases", num_positions=1024),
        batch_size=2,
        max_seq_len=ROWS,
        prefill_lens=CHUNKS,
        cache_dtype=torch.int8 if in_int8 else None,
        compile=compile,
    )


def prompt(length: int, seed: int) -> tuple[int, ...]:
    return tuple(int(word) % 101 for word in np.random.Philox(seed).random_raw(length))


def test_rows_are_rounded_by_their_own_scale():
    x = torch.tensor([[1.27, -0.3, 0.004], [0, 0, 0], [-254, 2, 0.9]])
    values, scale = quantize_rows(x)
    assert values.tolist() == [[127, -30, 0], [0, 0, 0], [-127, 1, 0]]
    torch.testing.assert_close(scale[[0, 2]], torch.tensor([0.01, 2]))
    assert torch.equal(quantize_rows(values * scale[:, None])[0], values)


def test_the_memory_is_that_of_the_buffers():
    config = our_model("biases").config
    cache = KVCache.allocate(config, 2, ROWS, dtype=torch.int8)
    assert cache_bytes(config, 2, ROWS, dtype=torch.int8) == sum(b.nbytes for b in cache.buffers)
    heads = config.num_hidden_layers * 2 * config.num_key_value_heads
    assert sum(b.nbytes for b in cache.buffers) == heads * 2 * ROWS * (config.head_dim + 4)


def test_logits_are_near_those_of_the_full_cache():
    logits = []
    for in_int8 in (False, True):
        backend = backend_of(in_int8=in_int8)
        backend.prefill(0, prompt(17, 1), 0)
        ids, positions = np.array([5, 0]), np.array([17, 0])
        logits.append(backend.decode(ids, positions)[0])
    error = np.abs(logits[0] - logits[1]).max() / np.abs(logits[0]).max()
    assert 0 < error < 0.02


def test_rows_move_between_caches():
    backend, other = backend_of(), backend_of()
    backend.prefill(1, prompt(18, 2), 0)
    rows = backend.read_rows(1, 18)
    other.write_rows(0, rows)
    np.testing.assert_array_equal(other.read_rows(0, 18), rows)
    whole = backend_of(in_int8=False)
    whole.write_rows(0, rows)
    np.testing.assert_array_equal(whole.read_rows(0, 18), rows)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_compiled_tokens_equal_eager(temperature: float):
    requests = [
        Request(
            prompt_ids=prompt(length, length),
            max_new_tokens=60,
            limit_policy="roll",
            sampling=SamplingParams(temperature=temperature, seed=length),
        )
        for length in (1, 3, 19, 33)
    ]
    eager, compiled = (
        [done.ids for done in generate(backend_of(compile=compile), None, requests)]
        for compile in (False, True)
    )
    assert compiled == eager
    assert all(len(ids) == 60 for ids in eager)
