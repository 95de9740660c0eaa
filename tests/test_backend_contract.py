"""What every backend promises, asked of each; the expected logits are one eager forward's.

The tests share a backend and leave garbage in its cache on purpose: no result may depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from references import (
    VOCAB_SIZE,
    assert_close,
    decode_slot,
    one_forward,
    prefill_chunks,
    random_ids,
)
from test_gpu_kernels import on_gpu
from torch._dynamo.utils import counters

from llamac.export import export_bundle
from llamac.model import TorchBackend
from llamac.model.checkpoint import open_checkpoint
from llamac.runtime.backend import Backend
from llamac.runtime.ort.ort_backend import OrtBackend
from llamac.runtime.request import Request
from llamac.runtime.sampling import SamplingParams
from llamac.runtime.scheduler import Scheduler, generate, run_requests
from variants import our_model, reference_model

VARIANT = "llama-3.1"
B, P, S = 4, 8, 28  # S is no multiple of P
NUM_POSITIONS = 128
MIXED = (6, 24)  # more than the operators for few rows take, too


def torch_backend(folder: Path, *, compile: bool, device: str = "cpu") -> TorchBackend:
    model = our_model(VARIANT, num_positions=NUM_POSITIONS).to(device)
    if device == "cuda":
        model.join_weights()
    return TorchBackend(
        model,
        batch_size=B,
        max_seq_len=S,
        prefill_lens=(P,),
        mixed_lens=MIXED,
        compile=compile,
    )


def ort_backend(folder: Path, *, target: str) -> OrtBackend:
    reference_model(VARIANT).save_pretrained(folder / "checkpoint")
    bundle = export_bundle(
        open_checkpoint(folder / "checkpoint"),
        folder / "bundle",
        targets=(target,),
        batch_size=B,
        prefill_len=P,
        max_seq_len=S,
    )
    return OrtBackend(bundle, target=target, threads=1)


BACKENDS: dict[str, Callable[[Path], Backend]] = {
    "eager": partial(torch_backend, compile=False),
    "compiled": partial(torch_backend, compile=True),
    "own kernels": partial(torch_backend, compile=True, device="cuda"),
    "ort fused": partial(ort_backend, target="cpu"),  # GroupQueryAttention
    "ort standard": partial(ort_backend, target="tensorrt"),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Two threads of a model this small mostly wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(
    scope="module",
    params=[
        "eager",
        pytest.param("compiled", marks=pytest.mark.slow),
        pytest.param("own kernels", marks=on_gpu),
        "ort fused",
        "ort standard",
    ],
)
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backend:
    return BACKENDS[request.param](tmp_path_factory.mktemp("backend"))


@pytest.fixture(scope="module")
def eager() -> TorchBackend:
    return torch_backend(Path(), compile=False)


@cache
def sequence(length: int, seed: int, window: int | None = None) -> tuple[list[int], NDArray]:
    """Random ids and the [T, V] logits they should have."""
    ids = random_ids(length, seed)
    model = our_model(VARIANT, num_positions=NUM_POSITIONS)
    return ids, one_forward(model, ids, window=window)


def step(backend: Backend, ids: list[int], positions: list[int]) -> NDArray[np.float32]:
    return backend.decode(np.array(ids), np.array(positions)).copy()


# Equal to one forward


def test_the_sizes_are_those_it_was_made_with(backend: Backend):
    shape = backend.shape
    assert (shape.batch_size, shape.prefill_lens, shape.max_seq_len) == (B, (P,), S)
    assert (shape.num_positions, shape.vocab_size) == (NUM_POSITIONS, VOCAB_SIZE)


@pytest.mark.parametrize("num_prefilled", [0, 1, P - 1, P, P + 1, 2 * P + 3, S - 1, S])
def test_chunks_and_steps_equal_one_forward_at_every_position(backend: Backend, num_prefilled: int):
    # The last chunk of 2P + 3, S - 1 and S ids is moved back to S - P.
    ids, expected = sequence(S, seed=0)
    slot = num_prefilled % B
    if num_prefilled:
        logits = prefill_chunks(backend, slot, ids[:num_prefilled])
        assert logits.dtype == np.float32
        assert_close(logits, expected[num_prefilled - 1])
    for position in range(num_prefilled, S):
        assert_close(decode_slot(backend, slot, ids[position], position), expected[position])


def test_rows_go_from_one_backend_to_another(backend: Backend, eager: TorchBackend):
    ids, expected = sequence(S, seed=3)
    length = 2 * P + 3
    for source, target in ((backend, eager), (eager, backend)):
        prefill_chunks(source, 1, ids[:length])
        rows = source.read_rows(1, length)
        assert (rows.dtype, rows.shape[2]) == (np.float32, length)
        prefill_chunks(target, 2, random_ids(S, seed=9))  # what was there is overwritten
        target.write_rows(2, rows)
        np.testing.assert_array_equal(target.read_rows(2, length), rows)
        for position in range(length, S):
            assert_close(decode_slot(target, 2, ids[position], position), expected[position])


def test_rows_of_another_model_are_refused(backend: Backend):
    rows = backend.read_rows(0, 3)
    for wrong in (rows[1:], rows[:, 1:], rows[..., 1:], rows[0]):
        with pytest.raises(ValueError, match="this model's are"):
            backend.write_rows(0, wrong)
    with pytest.raises(ValueError, match=f"{S + 1} cache rows are given, max_seq_len is {S}"):
        backend.write_rows(0, np.repeat(rows[:, :, :1], S + 1, axis=2))


def test_every_chunk_length_at_both_ends_of_the_cache(backend: Backend):
    ids, expected = sequence(S, seed=0)
    for length in range(1, P + 1):
        assert_close(backend.prefill(1, ids[:length], 0), expected[length - 1])
    prefill_chunks(backend, 1, ids)
    start = S - P
    for length in range(1, P + 1):  # padding up to the last row
        logits = backend.prefill(1, ids[start : start + length], start)
        assert_close(logits, expected[start + length - 1])


def test_ragged_rows_equal_each_sequence_alone(backend: Backend):
    lengths = (1, S - 5, P, 0)  # tokens of each slot before the first common step
    sequences = [sequence(length + 5, seed=length) for length in lengths]
    for slot, length in enumerate(lengths):
        if length:
            prefill_chunks(backend, slot, sequences[slot][0][:length])
    for number in range(5):
        positions = [length + number for length in lengths]
        ids = [ids[p] for (ids, _), p in zip(sequences, positions, strict=True)]
        found = step(backend, ids, positions)
        assert (found.shape, found.dtype) == ((B, VOCAB_SIZE), np.float32)
        for row, (_, expected) in enumerate(sequences):
            assert_close(found[row], expected[positions[row]])


def test_roll_equals_the_banded_forward_to_the_last_position(backend: Backend):
    ids, expected = sequence(NUM_POSITIONS, seed=2, window=S)
    other, other_expected = sequence(S, seed=3)  # a neighbour that doesn't roll
    assert_close(prefill_chunks(backend, 2, ids[:S]), expected[S - 1])
    for position in range(S, NUM_POSITIONS):  # the window moves on by more than three of itself
        row = position % S
        found = step(backend, [other[row], 0, ids[position], 0], [row, 0, position, 0])
        # Rounding adds up: a row of the window holds what was computed from windows before it.
        np.testing.assert_allclose(found[2], expected[position], rtol=1e-4, atol=1e-4)
        assert_close(found[0], other_expected[row])


def test_a_slot_that_rolled_to_a_position_rolls_there_again_after_a_new_prompt(backend: Backend):
    for seed in (7, 8):
        ids, expected = sequence(S + 1, seed, window=S)
        prefill_chunks(backend, 0, ids[:S])
        assert_close(decode_slot(backend, 0, ids[S], S), expected[S])


# Tokens of any slots in one step


@pytest.fixture
def mixing(backend: Backend) -> Backend:
    if not backend.shape.mixed_lens:
        pytest.skip("graphs have no mixed steps")
    return backend


def mix(backend: Backend, *parts: tuple[int, list[int], int]) -> NDArray[np.float32]:
    """Runs ids of slots from a position on; the logits of each part's last."""
    return backend.mix(
        np.concatenate([np.full(len(ids), slot) for slot, ids, _ in parts]),
        np.concatenate([ids for _, ids, _ in parts]),
        np.concatenate([np.arange(start, start + len(ids)) for _, ids, start in parts]),
        (np.cumsum([len(ids) for _, ids, _ in parts]) - 1).tolist(),
    ).copy()


@pytest.mark.parametrize("num_rest", [1, 6, 13])
def test_prompts_beside_tokens_equal_each_sequence_alone(mixing: Backend, num_rest: int):
    decoded, expected = sequence(S, seed=1)
    long, long_expected = sequence(S, seed=2)
    short, short_expected = sequence(4, seed=3)
    rolled, rolled_expected = sequence(S + 1, seed=4, window=S)
    prefill_chunks(mixing, 0, decoded[:9])
    prefill_chunks(mixing, 1, long[:5])
    prefill_chunks(mixing, 3, rolled[:S])
    rest = long[5 : 5 + num_rest]
    found = mix(mixing, (0, decoded[9:10], 9), (3, rolled[S:], S), (2, short, 0), (1, rest, 5))
    assert (found.shape, found.dtype) == ((4, VOCAB_SIZE), np.float32)
    assert_close(found[0], expected[9])
    np.testing.assert_allclose(found[1], rolled_expected[S], rtol=1e-4, atol=1e-4)
    assert_close(found[2], short_expected[-1])
    assert_close(found[3], long_expected[4 + num_rest])
    # What was written is what other steps read, and padding wrote nothing else.
    for number in range(4):
        places = [10 + number, 5 + num_rest + number, 4, S + 1]
        found = step(mixing, [decoded[places[0]], long[places[1]], 0, 0], places)
        assert_close(found[0], expected[places[0]])
        assert_close(found[1], long_expected[places[1]])


def test_a_prompt_in_mixed_steps_to_the_last_row(mixing: Backend):
    ids, expected = sequence(S, seed=5)
    other, other_expected = sequence(9, seed=6)
    mixing.prefill(0, other[:3], 0)
    starts = (0, 1, 5, 9, 13, S - 4, S)
    for number, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        position = 3 + number
        found = mix(
            mixing, (0, other[position : position + 1], position), (2, ids[start:end], start)
        )
        assert_close(found[0], other_expected[position])
        assert_close(found[1], expected[end - 1])


def test_few_of_the_rows_have_logits(mixing: Backend):
    ids, expected = sequence(6, seed=7)
    slots, positions = np.full(6, 3), np.arange(6)
    for rows in ([5], [0, 2, 3, 5], [4, 1]):
        assert_close(mixing.mix(slots, np.array(ids), positions, rows), expected[rows])


# Slots are independent, calls leave nothing behind


def test_padding_garbage_and_neighbours_never_leak(backend: Backend):
    """To the bit: what else lies in the cache takes no part in any sum."""
    ids = random_ids(4, seed=4)

    def logits(garbage: int) -> list[NDArray[np.float32]]:
        for slot in range(B):
            prefill_chunks(backend, slot, random_ids(S, seed=garbage + slot))
        chunk = backend.prefill(1, ids[:3], 0)
        return [chunk, decode_slot(backend, 1, ids[3], 3).copy()]

    for one, other in zip(logits(10), logits(20), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("decode_first", [False, True])
def test_a_decode_between_two_chunks_of_a_neighbour_changes_neither(
    backend: Backend, decode_first: bool
):
    long, long_expected = sequence(2 * P, seed=5)
    short, short_expected = sequence(4, seed=6)
    backend.prefill(0, short[:3], 0)
    backend.prefill(1, long[:P], 0)
    if decode_first:  # the idle slot is fed an id at the row its own next chunk begins
        assert_close(step(backend, [short[3], 0, 0, 0], [3, P, 0, 0])[0], short_expected[3])
    assert_close(backend.prefill(1, long[P:], P), long_expected[-1])
    if not decode_first:
        assert_close(step(backend, [short[3], 0, 0, 0], [3, 2 * P, 0, 0])[0], short_expected[3])


@pytest.mark.parametrize("position", [1, P, S - 1, S, S + 1, 2 * S])
def test_an_idle_row_leaves_nothing(backend: Backend, position: int):
    """It is fed any id at the position of its next token, which comes later."""
    ids, expected = sequence(2 * S + 1, seed=9, window=S)
    prefill_chunks(backend, 3, ids[: min(position, S)])
    for rolled in range(S, position):
        decode_slot(backend, 3, ids[rolled], rolled)
    for idle in (50, 60):
        step(backend, [1, 2, 3, idle], [0, 0, 0, position])
    np.testing.assert_allclose(
        decode_slot(backend, 3, ids[position], position), expected[position], 1e-4, 1e-4
    )


def test_a_chunks_logits_are_the_callers(backend: Backend):
    logits = backend.prefill(0, [1, 2], 0)
    kept = logits.copy()
    backend.prefill(1, [3], 0)
    decode_slot(backend, 0, 4, 2)
    np.testing.assert_array_equal(logits, kept)


# Behind the scheduler


def tokens(backend: Backend, requests: list[Request]) -> list[list[int]]:
    return [done.ids for done in generate(backend, None, requests)]


@pytest.mark.parametrize("policy", ["stop", "roll"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_requests_in_a_batch_give_the_ids_they_give_alone(
    backend: Backend, temperature: float, policy: str
):
    requests = [
        Request(
            prompt_ids=tuple(random_ids(length, seed=length)),
            max_new_tokens=2 * S,
            sampling=SamplingParams(temperature=temperature, seed=length),
            limit_policy=policy,
        )
        for length in (3, S, 1, P, 2, 17)  # more than slots
    ]
    alone = [tokens(backend, [request])[0] for request in requests]
    assert tokens(backend, requests) == alone
    for request, ids in zip(requests, alone, strict=True):
        assert len(ids) == (2 * S if policy == "roll" else S + 1 - len(request.prompt_ids))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_requests_in_mixed_steps_give_the_ids_they_give_alone(mixing: Backend, temperature: float):
    requests = [
        Request(
            prompt_ids=tuple(random_ids(length, seed=length)),
            max_new_tokens=3 * number + 2,
            sampling=SamplingParams(temperature=temperature, seed=length),
            limit_policy="roll",
        )
        for number, length in enumerate((3, S, 1, P, 2, 17, 20, 5, 11, S - 1, 7))
    ]
    scheduler = Scheduler(mixing, None, adaptive=True, keep_prefixes=True)
    before = dict(counters["stats"])
    together = [done.ids for done in run_requests(scheduler, requests)]
    assert dict(counters["stats"]) == before  # compiled once
    assert together == [tokens(mixing, [request])[0] for request in requests]


def test_a_request_that_comes_later_changes_none(backend: Backend):
    first = Request(prompt_ids=tuple(random_ids(4, seed=1)), max_new_tokens=20)
    second = Request(prompt_ids=tuple(random_ids(20, seed=2)), max_new_tokens=8)
    alone = [tokens(backend, [request])[0] for request in (first, second)]
    scheduler = Scheduler(backend, None)
    scheduler.submit(first)
    scheduler.step()
    scheduler.submit(second)  # its three chunks alternate with decodes of the first
    done = {}
    while not scheduler.idle:
        for event in scheduler.step():
            if event.completion is not None:
                done[event.request_id] = event.completion.ids
    assert [done[0], done[1]] == alone


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_mix_of_requests_gives_the_tokens_of_eager(
    backend: Backend, eager: TorchBackend, data: st.DataObject
):
    requests = [
        Request(
            prompt_ids=tuple(random_ids(data.draw(st.integers(1, S)), seed=index)),
            max_new_tokens=data.draw(st.integers(1, S + 9)),
            sampling=SamplingParams(temperature=0.9, top_p=0.95, seed=index),
            limit_policy=data.draw(st.sampled_from(["stop", "roll"])),
        )
        for index in range(data.draw(st.integers(1, 6)))
    ]
    assert tokens(backend, requests) == tokens(eager, requests)


# What is refused, before anything is written


@pytest.mark.parametrize(
    ("slot", "ids", "start", "message"),
    [
        (B, [1], 0, "slot is 4; allowed are 0 to 3"),
        (-1, [1], 0, "slot is -1; allowed"),
        (0, [], 0, "chunk has 0 ids; allowed are 1 to 8"),
        (0, [1] * (P + 1), 0, "chunk has 9 ids; allowed are 1 to 8"),
        (0, [1], S - P + 1, "chunk starts at 21; .* it may start at 0 to 20"),
        (0, [1], -1, "chunk starts at -1; .* 0 to 20"),
        (0, [1, VOCAB_SIZE], 0, "ids are from 1 to 101; allowed are 0 to 100"),
        (0, [-1, 1], 0, "ids are from -1 to 1; allowed are 0 to 100"),
        (0, [1, 2**70], 0, "ids are object; they must be int64"),
        (0, [0.5], 0, "ids are float64; they must be int64"),
    ],
)
def test_bad_chunks_are_refused(backend: Backend, slot: int, ids, start: int, message: str):
    prompt, expected = sequence(2, seed=11)
    backend.prefill(0, prompt[:1], 0)
    with pytest.raises(ValueError, match=message):
        backend.prefill(slot, ids, start)
    assert_close(decode_slot(backend, 0, prompt[1], 1), expected[1])


@pytest.mark.parametrize(
    ("ids", "positions", "message"),
    [
        ([0, 0, 0, VOCAB_SIZE], [0] * 4, "ids are from 0 to 101; allowed are 0 to 100"),
        ([0, 0, -1, 0], [0] * 4, "ids are from -1 to 0"),
        ([0] * 4, [0, 0, 0, -1], r"positions are \[0, 0, 0, -1\]; allowed are 0 to 127"),
        ([0] * 4, [0, 0, 128, 0], r"positions are \[0, 0, 128, 0\]; allowed are 0 to 127"),
        ([0] * 4, [0, 0, 0.5, 0], r"positions are \[0.0, 0.0, 0.5, 0.0\]; allowed are 0 to 127"),
        ([0], [0], r"ids have shape \(1,\) and positions \(1,\); both must be \(4,\)"),
        ([0] * 4, [0] * 5, r"ids have shape \(4,\) and positions \(5,\); both must be \(4,\)"),
    ],
)
def test_bad_steps_are_refused(backend: Backend, ids, positions, message: str):
    """A compiled step ended the process at an id past V, and decoded one id in every slot."""
    prompt, expected = sequence(2, seed=12)
    backend.prefill(0, prompt[:1], 0)
    with pytest.raises(ValueError, match=message):
        backend.decode(np.array(ids), np.array(positions))
    assert_close(decode_slot(backend, 0, prompt[1], 1), expected[1])
