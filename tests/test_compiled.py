"""The compiled path: equal to eager, one graph, never recompiled."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from llamac.model import TorchBackend
from llamac.runtime.backend import StepInputs
from llamac.runtime.request import Request
from llamac.runtime.sampling import SamplingParams
from llamac.runtime.scheduler import generate
from variants import our_model

ROWS, CHUNK = 30, 8  # S is no multiple of P


@pytest.fixture(scope="module")
def single() -> TorchBackend:
    """Compiled, one slot: the matrix-vector form of Linear."""
    model = our_model("biases", num_positions=1024)
    return TorchBackend(model, max_seq_len=ROWS, prefill_lens=(CHUNK,))


@pytest.mark.slow
def test_single_row_logits_equal_eager(single: TorchBackend):
    model = our_model("biases", num_positions=1024)
    eager = TorchBackend(model, max_seq_len=ROWS, prefill_lens=(CHUNK,), compile=False)
    for backend in (single, eager):
        backend.prefill(0, [4, 5, 6], 0)
    for position in (3, 4, ROWS - 1):
        ids, positions = np.array([position]), np.array([position])
        np.testing.assert_allclose(
            single.decode(ids, positions), eager.decode(ids, positions), rtol=1e-4, atol=1e-5
        )


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(int(word) % 101 for word in np.random.Philox(seed).random_raw(length))


@pytest.mark.slow
def test_no_graph_break_and_no_recompile_over_a_run(single: TorchBackend):
    before = dict(counters["stats"])
    for length in (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, ROWS - 1, ROWS):
        for _ in range(2):
            (done,) = generate(single, None, [Request(prompt_ids=prompt(length))])
            assert done.finish_reason == "length"
            assert len(done.ids) == ROWS + 1 - length
    rolled = Request(prompt_ids=prompt(3), max_new_tokens=301, limit_policy="roll")
    (done,) = generate(single, None, [rolled])
    assert len(done.ids) == 301  # the window rolled many times
    assert dict(counters["stats"]) == before
    assert not counters["graph_break"]


@pytest.mark.slow
def test_no_step_copies_the_cache():
    model = our_model("llama-2-gqa", num_positions=4096)
    backend = TorchBackend(
        model, batch_size=2, max_seq_len=4096, prefill_lens=(CHUNK,), mixed_lens=(20,)
    )
    zeros = np.array([0, 0])
    for step in (
        lambda: backend.prefill(1, [1, 2, 3], 0),
        lambda: backend.decode(zeros, zeros),
        lambda: backend.mix(np.array([0, 1, 1]), np.array([4, 5, 6]), np.array([7, 3, 4]), [0, 2]),
    ):
        with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
            step()
        assert profile.profiler is not None
        assert profile.profiler.kineto_results is not None
        events = profile.profiler.kineto_results.events()
        allocated = [event.nbytes() for event in events if event.name() == "[memory]"]
        assert 0 < max(allocated) < backend.cache.buffers[0].nbytes / 2


@pytest.mark.slow
def test_a_recompile_after_warm_up_is_an_error(single: TorchBackend):
    for sizes in (StepInputs.sizes(1, 2, 1), StepInputs.sizes(1, 1, 2)):
        inputs = [torch.zeros(size, dtype=torch.int64) for size in sizes.values()]
        with pytest.raises(RuntimeError, match="takes inputs of"):
            single._steps["decode"]._run(*inputs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("in_own_kernels", [False, True])
def test_cuda_decode_is_one_graph_replay_and_equals_the_cpu(in_own_kernels: bool):
    request = Request(
        prompt_ids=prompt(10),
        max_new_tokens=3 * ROWS,
        sampling=SamplingParams(temperature=0.0),
        limit_policy="roll",
    )
    results = []
    for device in ("cpu", "cuda"):
        model = our_model("llama-3.1", num_positions=1024).to(device)
        if in_own_kernels and device == "cuda":
            model.join_weights()
        backend = TorchBackend(
            model, max_seq_len=ROWS, prefill_lens=(CHUNK,), compile=device == "cuda"
        )
        results.append(generate(backend, None, [request])[0].ids)
        num_steps = -(-10 // CHUNK) + 3 * ROWS - 1
        assert backend.num_replays == (num_steps if device == "cuda" else 0)
    assert results[0] == results[1]
