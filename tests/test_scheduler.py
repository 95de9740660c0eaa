import hashlib
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamac.runtime.backend import StaticShape
from llamac.runtime.chunks import next_chunk
from llamac.runtime.mixed_step import mixed_inputs, mixed_lens
from llamac.runtime.request import Request
from llamac.runtime.sampling import Sampler, SamplingParams, log_softmax
from llamac.runtime.scheduler import QueueFullError, Scheduler, generate, run_requests, stream
from llamac.runtime.text.constraint import Grammar
from llamac.runtime.text.tokenizer import Tokenizer

VOCAB_SIZE = 64
EOS_ID = 2
GREEDY = SamplingParams(temperature=0)
SEEDED = SamplingParams(temperature=1.5, top_p=0.95, repetition_penalty=1.2, seed=5)


# --- a model whose every logit depends on every (id, position) it can see ---


def mix(token_id: int, position: int, visible) -> int:
    """What a cache row holds: a hash of the token, its position and the rows it attends to."""
    rows = np.sort(np.array([token_id, position, *visible], np.uint64)[2:])
    data = np.concatenate([np.array([token_id, position], np.uint64), rows]).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def row_logits(row: int) -> np.ndarray:
    raw = np.random.Philox(key=np.array([row, 0], np.uint64)).random_raw(VOCAB_SIZE)
    return ((raw >> np.uint64(40)).astype(np.float32) / 2**21) - 4  # in [-4, 4)


class HashBackend:
    """Keeps a real cache, breaks no promise of Backend and lets the caller break none."""

    def __init__(
        self,
        *,
        batch=4,
        max_seq_len=24,
        prefill_lens=(4,),
        num_positions=40,
        mixed_lens=(),
        fail_at=None,
    ):
        self.shape = StaticShape(
            batch_size=batch,
            max_seq_len=max_seq_len,
            prefill_lens=prefill_lens,
            num_positions=num_positions,
            vocab_size=VOCAB_SIZE,
            mixed_lens=mixed_lens,
        )
        self.rows = np.zeros((batch, max_seq_len), np.uint64)
        self.calls = []
        self.fail_at = fail_at or {}
        self._logits = np.zeros((batch, VOCAB_SIZE), np.float32)

    def _begin(self, *call):
        self._logits[:] = np.nan  # logits are valid until the next call
        self.calls.append(call)

    def _end(self):
        if len(self.calls) in self.fail_at:
            raise self.fail_at[len(self.calls)]

    def prefill(self, slot, ids, start):
        self._begin("prefill", slot, tuple(ids), start)
        chunk_len = min(n for n in self.shape.prefill_lens if n >= len(ids))
        assert len(ids) >= 1
        assert 0 <= start <= start + chunk_len <= self.shape.max_seq_len
        assert all(0 <= i < VOCAB_SIZE for i in ids)
        cache = self.rows[slot]
        for position in range(start, start + chunk_len):  # the padding is written too
            offset = position - start
            token_id = ids[offset] if offset < len(ids) else 0
            cache[position] = mix(token_id, position, cache[:position])
        self._logits[0] = row_logits(int(cache[start + len(ids) - 1]))
        self._end()
        return self._logits[0]

    def decode(self, ids, positions):
        self._begin("decode", ids.tolist(), positions.tolist())
        batch = len(self.rows)
        assert ids.shape == positions.shape == (batch,)
        assert ids.dtype == positions.dtype == np.int64
        assert all(0 <= i < VOCAB_SIZE for i in ids)
        assert all(0 <= p < self.shape.num_positions for p in positions)
        for slot, (token_id, position) in enumerate(zip(ids, positions, strict=True)):
            self._logits[slot] = row_logits(self._feed(slot, token_id, position))
        self._end()
        return self._logits

    def mix(self, slots, ids, positions, logit_rows):
        self._begin("mix", slots.tolist(), ids.tolist(), positions.tolist(), logit_rows)
        mixed_inputs(self.shape, slots, ids, positions, logit_rows)  # is what a backend takes
        places = list(
            zip(slots.tolist(), (positions % self.shape.max_seq_len).tolist(), strict=True)
        )
        assert len(set(places)) == len(places)
        rows = [self._feed(*token) for token in zip(slots, ids, positions, strict=True)]
        for number, row in enumerate(logit_rows):
            self._logits[number] = row_logits(rows[row])
        self._end()
        return self._logits[: len(logit_rows)]

    def _feed(self, slot, token_id, position):
        cache, row = self.rows[slot], position % self.shape.max_seq_len
        visible = cache[:position] if position < len(cache) else np.delete(cache, row)
        cache[row] = mix(int(token_id), int(position), visible)
        return int(cache[row])


def expected(request, *, max_seq_len=24, end=None, allowed_size=VOCAB_SIZE, eos_ids=()):
    """Generates without slots, chunks or a cache of fixed size: (ids, finish_reason, logits)."""
    end = max_seq_len if end is None else end
    sampler = Sampler(
        request.sampling,
        VOCAB_SIZE,
        allowed_size=allowed_size,
        prompt_ids=request.prompt_ids,
        sample_index=request.sample_index,
    )
    rows, ids, every_logits = [], [], []
    pending = list(request.prompt_ids)
    while True:
        for token_id in pending:
            position = len(rows)
            window = rows[max(0, position - max_seq_len + 1) :]
            rows.append(mix(token_id, position, window))
        logits = row_logits(rows[-1])
        token_id = sampler.sample(logits, len(rows))
        if token_id in (*eos_ids, *request.stop_ids):
            return ids, "stop", every_logits
        ids.append(token_id)
        every_logits.append(logits)
        if len(ids) == request.max_new_tokens or len(rows) == end:
            return ids, "length", every_logits
        pending = [token_id]


def prompt(length, seed=0):
    return tuple(int(i) for i in (np.arange(length) * 7 + seed * 13 + 3) % 60)


def request(length, seed=0, **kwargs):
    kwargs = {"max_new_tokens": 8, "sampling": GREEDY, **kwargs}
    return Request(prompt_ids=prompt(length, seed), **kwargs)


def run(scheduler, limit=1000):
    events = []
    for _ in range(limit):
        if scheduler.idle:
            return events
        events += scheduler.step()
    raise AssertionError("the scheduler never became idle")


def completions(events):
    return {e.request_id: e.completion for e in events if e.finish_reason}


def letters():
    """A letter for each id from 3 on; 60 and 61 are the halves of one character, 63 isn't there."""
    pieces = {i: bytes([65 + i]) for i in range(3, 60)}
    pieces |= {0: b"", 1: b"", EOS_ID: b"", 60: b"\xc3", 61: b"\xa9", 62: b"!"}
    return Tokenizer(
        encoder=lambda text, special: [ord(c) - 65 for c in text],
        pieces=pieces,
        bos_id=1,
        eos_ids=(EOS_ID,),
        special_ids=frozenset({0, 1, EOS_ID}),
    )


# --- the same ids as alone, whatever happens around ---


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 12, 21, 22, 23])
@pytest.mark.parametrize("limit_policy", ["stop", "roll"])
def test_chunk_edges(length, sampling, limit_policy):
    # S = 23 isn't a multiple of P = 4: the last chunk of a prompt past 20 moves back to row 19.
    backend = HashBackend(max_seq_len=23)
    asked = request(length, sampling=sampling, max_new_tokens=100, limit_policy=limit_policy)
    (got,) = generate(backend, None, [asked])
    end = 23 if limit_policy == "stop" else 40
    ids, reason, _ = expected(asked, max_seq_len=23, end=end)
    assert (got.ids, got.finish_reason) == (ids, reason)
    assert len(ids) == end + 1 - length


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_four_prompts_in_one_batch_give_the_same_ids_as_alone(sampling):
    requests = [request(n, n, sampling=sampling) for n in (2, 17, 5, 11)]
    together = generate(HashBackend(), None, requests)
    for asked, got in zip(requests, together, strict=True):
        (alone,) = generate(HashBackend(batch=1), None, [asked])
        assert got.ids == alone.ids == expected(asked)[0]
        assert got.prompt_ids == asked.prompt_ids
    assert len({tuple(got.ids) for got in together}) == 4


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_decoding_a_slot_between_two_chunks_of_another_changes_neither(sampling):
    backend = HashBackend(batch=2)
    first, second = request(3, 1, sampling=sampling), request(10, 2, sampling=sampling)
    scheduler = Scheduler(backend, None)
    scheduler.submit(first)
    scheduler.step()
    scheduler.submit(second)
    done = completions(run(scheduler))
    kinds = [call[0] for call in backend.calls[:7]]
    assert kinds == ["prefill", "decode", "prefill", "decode", "prefill", "decode", "prefill"]
    assert done[0].ids == expected(first)[0]
    assert done[1].ids == expected(second)[0]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_mix_of_requests_gives_the_reference_ids(data):
    max_seq_len = data.draw(st.integers(1, 18), "S")
    num_positions = max_seq_len + data.draw(st.integers(0, 2 * max_seq_len), "rows past S")
    lens = data.draw(st.sets(st.integers(1, max_seq_len), min_size=1, max_size=3), "P")
    batch = data.draw(st.integers(1, 4), "B")
    mixed = data.draw(st.sets(st.integers(1, batch + 20), max_size=3), "rows of mixed steps")
    scheduler = Scheduler(
        HashBackend(
            batch=batch,
            max_seq_len=max_seq_len,
            prefill_lens=tuple(sorted(lens)),
            num_positions=num_positions,
            mixed_lens=tuple(sorted(mixed)),
        ),
        None,
        eos_ids=(EOS_ID,),
        keep_prefixes=data.draw(st.booleans()),
        adaptive=data.draw(st.booleans()),
    )
    asked, events = {}, []
    for seed in range(data.draw(st.integers(1, 6), "requests")):
        one = request(
            data.draw(st.integers(1, max_seq_len), "prompt"),
            seed,
            sampling=data.draw(st.sampled_from([GREEDY, SEEDED])),
            max_new_tokens=data.draw(st.integers(1, 30)),
            limit_policy=data.draw(st.sampled_from(["stop", "roll"])),
        )
        asked[scheduler.submit(one)] = one
        for _ in range(data.draw(st.integers(0, 6), "steps before the next")):
            events += scheduler.step()
        if data.draw(st.integers(0, 5)) == 0:
            scheduler.cancel(data.draw(st.sampled_from(sorted(asked))))
    events += run(scheduler)
    assert sorted(e.request_id for e in events if e.finish_reason) == sorted(asked)
    for request_id, got in completions(events).items():
        end = max_seq_len if asked[request_id].limit_policy == "stop" else num_positions
        ids, reason, _ = expected(
            asked[request_id], max_seq_len=max_seq_len, end=end, eos_ids=(EOS_ID,)
        )
        own = [e for e in events if e.request_id == request_id]
        assert [e.token_id for e in own if e.token_id is not None] == got.ids
        if got.finish_reason == "cancelled":
            assert got.ids == ids[: len(got.ids)]
        else:
            assert (got.ids, got.finish_reason) == (ids, reason)


# --- chunks ---


@given(data=st.data())
def test_chunks_cover_the_prompt_and_stay_in_the_cache(data):
    max_seq_len = data.draw(st.integers(1, 200))
    lens = data.draw(st.sets(st.integers(1, max_seq_len), min_size=1, max_size=3))
    prompt_len = data.draw(st.integers(1, max_seq_len))
    shape = StaticShape(
        batch_size=1,
        max_seq_len=max_seq_len,
        prefill_lens=tuple(sorted(lens)),
        num_positions=max_seq_len,
        vocab_size=1,
    )
    done = 0
    while done < prompt_len:
        start, end = next_chunk(prompt_len, done, shape)
        assert 0 <= start <= done < end <= prompt_len
        chunk_len = min(n for n in lens if n >= end - start)
        assert start + chunk_len <= max_seq_len
        assert start == done or end == prompt_len  # only the last chunk moves back
        done = end


def test_the_documented_chunks():
    shape = StaticShape(
        batch_size=1, max_seq_len=10, prefill_lens=(4,), num_positions=10, vocab_size=1
    )
    assert [next_chunk(9, done, shape) for done in (0, 4, 8)] == [(0, 4), (4, 8), (6, 9)]


@pytest.mark.parametrize(
    ("prompt_len", "chunks"),
    [
        (1, [(0, 1)]),
        (2, [(0, 2)]),  # of 16: twice one costs more
        (17, [(0, 16), (16, 17)]),
        (48, [(0, 16), (16, 32), (32, 48)]),
        (49, [(0, 49)]),  # of 128
        (128, [(0, 128)]),
        (129, [(0, 128), (128, 129)]),
        (145, [(0, 128), (128, 144), (144, 145)]),
    ],
)
def test_chunks_are_of_the_quickest_length(prompt_len, chunks):
    shape = StaticShape(
        batch_size=2,
        max_seq_len=512,
        prefill_lens=(1, 16, 128),
        num_positions=512,
        vocab_size=1,
    )
    done, cut = 0, []
    while done < prompt_len:
        cut.append(next_chunk(prompt_len, done, shape))
        done = cut[-1][1]
    assert cut == chunks
    assert next_chunk(300, 0, shape, longest=20) == (0, 16)
    assert next_chunk(300, 0, shape, longest=0) == (0, 1)


def test_a_slot_that_decodes_alone_takes_one_row_where_it_may():
    asked = [request(5, 1, max_new_tokens=9, limit_policy="roll"), request(20, 2)]
    for adaptive in (False, True):
        backend = HashBackend(batch=2, prefill_lens=(1, 4))
        scheduler = Scheduler(backend, None, adaptive=adaptive)
        got = [run_requests(scheduler, [one])[0] for one in asked]
        assert [one.ids for one in got] == [expected(asked[0])[0], expected(asked[1])[0]]
        assert any(call[0] == "decode" for call in backend.calls) is not adaptive
        together = run_requests(scheduler, asked)
        assert [one.ids for one in together] == [one.ids for one in got]
        assert any(call[0] == "decode" for call in backend.calls)
    rolled = request(20, 3, max_new_tokens=15, limit_policy="roll")
    (done,) = run_requests(scheduler, [rolled])
    assert done.ids == expected(rolled, end=40)[0]


def test_while_others_decode_a_prompt_takes_the_longest_chunk_that_is_quick():
    class Slow(HashBackend):
        def prefill(self, slot, ids, start):
            time.sleep(0.11 if len(ids) > 4 else 0)
            return super().prefill(slot, ids, start)

    backend = Slow(batch=2, prefill_lens=(4, 8))
    scheduler = Scheduler(backend, None, adaptive=True)
    scheduler.submit(request(8, 1, max_new_tokens=12))  # its chunk of 8 is measured
    scheduler.step()
    scheduler.submit(request(8, 2))
    run(scheduler)
    assert [len(call[2]) for call in backend.calls if call[0] == "prefill"] == [8, 4, 4]


def test_prompts_take_their_chunks_in_turn():
    # A long prompt used to keep a short one that came later from its first token.
    backend = HashBackend(batch=2)
    scheduler = Scheduler(backend, None)
    scheduler.submit(request(20, 1))
    scheduler.step()
    scheduler.submit(request(4, 2))
    run(scheduler)
    slots = [call[1] for call in backend.calls if call[0] == "prefill"]
    assert slots == [0, 1, 0, 0, 0, 0]


# --- prompts beside tokens ---


def mixed_scheduler(*, batch=4, mixed_lens=(8, 12), prefill_lens=(1, 4), **kwargs):
    backend = HashBackend(
        batch=batch, prefill_lens=prefill_lens, mixed_lens=mixed_lens, num_positions=40, **kwargs
    )
    return backend, Scheduler(backend, None, adaptive=True)


def kinds(backend):
    return [call[0] for call in backend.calls]


def test_a_prompt_is_fed_beside_those_who_decode():
    backend, scheduler = mixed_scheduler()
    asked = [request(3, 1), request(13, 2)]
    scheduler.submit(asked[0])
    scheduler.step()  # alone: a chunk
    scheduler.submit(asked[1])
    done = completions(run(scheduler))
    assert [done[n].ids for n in range(2)] == [expected(one)[0] for one in asked]
    assert kinds(backend)[:4] == ["prefill", "mix", "mix", "decode"]
    (_, *first), (_, *second) = backend.calls[1:3]
    newest = expected(asked[0])[0]
    assert first == [[0] + 7 * [1], [newest[0], *prompt(13, 2)[:7]], [3, *range(7)], [0]]
    assert second == [[0] + 6 * [1], [newest[1], *prompt(13, 2)[7:]], [4, *range(7, 13)], [0, 6]]


def test_several_short_prompts_are_one_step():
    backend, scheduler = mixed_scheduler()
    asked = [request(n, n) for n in (3, 2, 4, 2)]
    assert [one.ids for one in run_requests(scheduler, asked)] == [expected(o)[0] for o in asked]
    assert kinds(backend)[:2] == ["mix", "decode"]
    assert backend.calls[0][1] == [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3]
    assert backend.calls[0][4] == [2, 4, 8, 10]


def test_prompts_share_the_rows_of_mixed_steps_in_turn():
    backend, scheduler = mixed_scheduler(mixed_lens=(6,))
    asked = [request(2, 1, max_new_tokens=20), request(16, 2), request(7, 3)]
    scheduler.submit(asked[0])
    scheduler.step()
    scheduler.submit(asked[1])
    scheduler.step()
    scheduler.submit(asked[2])  # new ones first
    done = completions(run(scheduler))
    assert [done[n].ids for n in range(3)] == [expected(one)[0] for one in asked]
    slots = [call[1] for call in backend.calls if call[0] == "mix"]
    assert slots == [
        [0, 1, 1, 1, 1, 1],
        [0, 2, 2, 2, 2, 2],
        [0, 1, 1, 1, 1, 1],
        [0, 2, 2, 1, 1, 1],
        [0, 2, 1, 1, 1],  # the second prompt is through: its slot decodes
    ]


def test_a_prompts_last_id_is_fed_as_a_token_is():
    # It used to be a step of its own. Without mixed steps as well.
    backend = HashBackend(batch=2, prefill_lens=(4,))
    scheduler = Scheduler(backend, None, adaptive=True)
    asked = [request(3, 1), request(5, 2), request(1, 3)]
    assert [one.ids for one in run_requests(scheduler, asked)] == [expected(o)[0] for o in asked]
    assert kinds(backend).count("prefill") == 2


def test_what_is_scored_keeps_to_its_step():
    backend, scheduler = mixed_scheduler()
    scored = request(5, 1, prompt_logprobs=0)
    assert [one.ids for one in run_requests(scheduler, [scored, request(9, 2)])] == [
        expected(scored)[0],
        expected(request(9, 2))[0],
    ]
    first_mix = kinds(backend).index("mix") if "mix" in kinds(backend) else len(backend.calls)
    assert kinds(backend)[:first_mix].count("decode") >= 5


def test_many_rows_are_for_prompts_that_nobody_decodes_beside():
    class Slow(HashBackend):
        def mix(self, slots, ids, positions, logit_rows):
            time.sleep(0.11 if len(ids) > 8 else 0)
            return super().mix(slots, ids, positions, logit_rows)

    backend = Slow(batch=4, prefill_lens=(4,), mixed_lens=(8, 40))
    scheduler = Scheduler(backend, None, adaptive=True)
    run_requests(scheduler, [request(12, n, max_new_tokens=2) for n in range(3)])
    scheduler.submit(request(2, 4, max_new_tokens=12))
    scheduler.step()
    scheduler.submit(request(20, 5))
    run(scheduler)
    sizes = [len(call[1]) for call in backend.calls if call[0] == "mix"]
    assert sizes == [36, 8, 8, 7]


def test_a_rolled_window_beside_a_prompt():
    backend, scheduler = mixed_scheduler(batch=2)
    rolled = request(20, 1, max_new_tokens=15, limit_policy="roll")
    scheduler.submit(rolled)
    for _ in range(12):
        scheduler.step()
    scheduler.submit(request(11, 2))
    done = completions(run(scheduler))
    assert done[0].ids == expected(rolled, end=40)[0]
    assert done[1].ids == expected(request(11, 2))[0]
    assert any(call[0] == "mix" and max(call[3]) >= 24 for call in backend.calls)


@pytest.mark.parametrize(
    ("slots", "ids", "positions", "logit_rows", "message"),
    [
        ([], [], [], [0], r"0 tokens are given; mixed_lens is \(4, 6\)"),
        ([0] * 7, [1] * 7, range(7), [0], "7 tokens are given"),
        ([0], [1, 2], [0, 1], [0], r"slots have shape \(1,\), .* must be \(2,\)"),
        ([0, 2], [1, 2], [0, 1], [0], r"slots are \[0, 2\]; allowed are 0 to 1"),
        ([0, -1], [1, 2], [0, 1], [0], "slots are"),
        ([0, 1], [1, 2], [0, 40], [0], r"positions are \[0, 40\]; allowed are 0 to 39"),
        ([0, 1], [1, VOCAB_SIZE], [0, 0], [0], "ids are from 1 to 64"),
        ([0, 1], [1, 2], [0, 0], [], "logit_rows are .*; allowed are 1 to 2 of the 2 tokens"),
        ([0, 1], [1, 2], [0, 0], [2], "logit_rows are"),
        ([0, 1], [1, 2], [0, 0], [0, 1, 1], "logit_rows are"),
    ],
)
def test_bad_mixes_are_refused(slots, ids, positions, logit_rows, message):
    shape = HashBackend(batch=2, mixed_lens=(4, 6)).shape
    arrays = [np.array(values, np.int64) for values in (slots, ids, positions)]
    with pytest.raises(ValueError, match=message):
        mixed_inputs(shape, *arrays, logit_rows)


def test_a_mix_is_padded_by_its_last_token():
    shape = HashBackend(batch=2, mixed_lens=(4, 6)).shape
    inputs = mixed_inputs(
        shape, np.array([0, 1, 1, 1, 1]), np.arange(3, 8), np.array([39, 0, 1, 2, 3]), [0]
    )
    assert inputs.input_ids.tolist() == [[3], [4], [5], [6], [7], [7]]
    assert inputs.slots.tolist() == [0, 1, 1, 1, 1, 1]
    assert inputs.positions.tolist() == [39, 0, 1, 2, 3, 3]
    assert inputs.write_indices.tolist() == [15, 0, 1, 2, 3, 3]
    assert inputs.logit_indices.tolist() == [[0, 0]]
    assert len(mixed_inputs(shape, *np.zeros((3, 4), np.int64), [3]).slots) == 4


def test_rows_of_mixed_steps():
    assert [mixed_lens(b) for b in (1, 2, 4, 8, 9, 32)] == [
        (),
        (16, 128),
        (16, 128),
        (4, 16, 128),
        (4, 32, 144),
        (4, 48, 160),
    ]
    for wrong in ((6, 4), (4, 4), (0, 4)):
        with pytest.raises(ValueError, match=r"mixed_lens is .* ascending"):
            HashBackend(batch=4, mixed_lens=wrong)


def test_few_of_the_slots_decode_in_fewer_rows():
    for count, kind in ((2, "mix"), (3, "mix"), (4, "decode")):
        backend, scheduler = mixed_scheduler(batch=6, mixed_lens=(3, 8))
        asked = [request(3, n, max_new_tokens=12, eos_ids=()) for n in range(count)]
        done = run_requests(scheduler, asked)
        assert [one.ids for one in done] == [expected(o)[0] for o in asked]
        together = kinds(backend)[-count - 3 : -count]  # they begin and end apart
        assert together == 3 * [kind]
    scored = request(5, 1, prompt_logprobs=0)
    del backend.calls[:]
    assert run_requests(scheduler, [scored])[0].ids == expected(scored)[0]
    assert kinds(backend)[:5] == ["decode"] * 5


# --- slots ---


def test_idle_rows_are_fed_where_their_own_next_token_goes():
    backend = HashBackend(batch=3)
    scheduler = Scheduler(backend, None)
    scheduler.submit(request(2, 1, max_new_tokens=4))
    scheduler.submit(request(11, 2, max_new_tokens=2))
    run(scheduler)
    steps = [call[2] if call[0] == "decode" else call[3] for call in backend.calls]
    # [first request, second, free slot]: prefills by their start, decodes by their positions.
    assert steps == [0, [2, 0, 0], 0, [3, 4, 0], 4, [4, 8, 0], 8, [0, 11, 0]]
    assert backend.calls[3][1][1:] == [0, 0]


def test_a_prompt_that_fills_the_cache_gives_one_token_and_frees_its_slot():
    backend = HashBackend(batch=2)
    full, other = request(24, 1), request(4, 2)
    first, second, third = generate(backend, None, [full, other, full])
    assert first.ids == third.ids == expected(full)[0]
    assert len(first.ids) == 1
    assert first.finish_reason == "length"
    assert second.ids == expected(other)[0]


def test_more_requests_than_slots_wait_their_turn():
    requests = [request(5, n, max_new_tokens=n + 1) for n in range(7)]
    scheduler = Scheduler(HashBackend(batch=2), None)
    assert [scheduler.submit(r) for r in requests] == list(range(7))
    events = run(scheduler)
    first_events = list(dict.fromkeys(e.request_id for e in events))
    assert first_events == list(range(7))
    for request_id, got in completions(events).items():
        assert got.ids == expected(requests[request_id])[0]


def test_step_does_nothing_when_idle():
    scheduler = Scheduler(HashBackend(), None)
    assert scheduler.idle
    assert scheduler.step() == []
    assert generate(HashBackend(), None, []) == []


# --- cancel ---


@pytest.mark.parametrize("num_steps", range(12))
@pytest.mark.parametrize("victim", range(3))
def test_cancel_in_every_state(num_steps, victim):
    requests = [request(n, n, max_new_tokens=5) for n in (3, 9, 6)]
    scheduler = Scheduler(HashBackend(batch=2), None)
    for one in requests:
        scheduler.submit(one)
    events = [event for _ in range(num_steps) for event in scheduler.step()]
    over = victim in completions(events)
    assert scheduler.cancel(victim) is not over
    assert not scheduler.cancel(victim)
    events += run(scheduler)
    assert sorted(e.request_id for e in events if e.finish_reason) == [0, 1, 2]
    done = completions(events)
    for request_id, one in enumerate(requests):
        ids = expected(one)[0]
        if request_id == victim and not over:
            assert done[victim].finish_reason == "cancelled"
            assert done[victim].ids == ids[: len(done[victim].ids)]
            assert (done[victim].ttft_s is None) is (done[victim].ids == [])
        else:
            assert done[request_id].ids == ids


def test_the_step_after_a_cancel_gives_the_held_back_text_and_runs_nothing():
    backend = HashBackend()
    scheduler = Scheduler(backend, letters(), eos_ids=())
    text = letters().decode(expected(request(3), allowed_size=63)[0][:3])
    request_id = scheduler.submit(request(3, stop=(text + "\0",)))  # could be all a stop text
    assert "".join(e.text for _ in range(3) for e in scheduler.step()) == ""
    scheduler.submit(request(4))
    num_calls = len(backend.calls)
    scheduler.cancel(request_id)
    (event,) = scheduler.step()
    assert (event.text, event.token_id, event.finish_reason) == (text, None, "cancelled")
    assert event.completion.text == text
    assert len(backend.calls) == num_calls
    assert not scheduler.idle


def test_cancel_of_an_unknown_id():
    assert not Scheduler(HashBackend(), None).cancel(3)


# --- how requests end ---


def test_stop_ids_end_and_are_not_in_the_ids():
    ids = expected(request(5))[0]
    (got,) = generate(HashBackend(), None, [request(5, stop_ids=(ids[3],))])
    assert got.ids == ids[: ids.index(ids[3])]
    assert got.finish_reason == "stop"
    (got,) = generate(HashBackend(), None, [request(5)], eos_ids=(ids[0],))
    assert (got.ids, got.text, got.finish_reason) == ([], "", "stop")
    assert got.ttft_s is not None


def test_no_id_ends_a_completion_before_min_tokens():
    ids = expected(request(5))[0]
    (got,) = generate(HashBackend(), None, [request(5, stop_ids=(ids[0],), min_tokens=3)])
    assert got.ids[0] != ids[0]
    assert len(got.ids) >= 3
    assert ids[0] not in got.ids[:3]


def test_a_request_out_of_time_ends_wherever_it_is():
    scheduler = Scheduler(HashBackend(batch=1), letters(), eos_ids=())
    scheduler.submit(request(3, timeout_s=0.2, max_new_tokens=20))
    scheduler.submit(request(4, timeout_s=0.2))
    scheduler.submit(request(5))
    events = scheduler.step()
    time.sleep(0.2)
    events += run(scheduler)
    done = completions(events)
    assert [done[n].finish_reason for n in range(3)] == ["timeout", "timeout", "length"]
    assert done[0].ids == expected(request(3), allowed_size=63)[0][:1]
    assert done[0].text == letters().decode(done[0].ids)
    assert done[2].ids == expected(request(5), allowed_size=63)[0]


class Alternating:
    """Even ids, then odd ones, five in all."""

    def __init__(self, grammar):
        self.kind, self.taken = grammar.kind, []

    @property
    def finished(self):
        return len(self.taken) == 5

    def allowed(self):
        return np.arange(VOCAB_SIZE) % 2 == len(self.taken) % 2

    def accept(self, token_id):
        self.taken.append(token_id)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_constraint_holds_its_request_and_no_other(sampling):
    asked = [
        request(3, sampling=sampling, grammar=Grammar(kind="lark", text="")),
        request(3, sampling=sampling),
    ]
    scheduler = Scheduler(HashBackend(batch=2), letters(), eos_ids=(), constraints=Alternating)
    held, free = run_requests(scheduler, asked)
    assert [i % 2 for i in held.ids] == [0, 1, 0, 1, 0]
    assert held.finish_reason == "stop"
    assert free.ids == expected(asked[1], allowed_size=63)[0]


def test_what_a_constraint_refuses_ends_its_request_alone():
    def refuse(grammar):
        raise ValueError("no such rule")

    scheduler = Scheduler(HashBackend(batch=1), letters(), eos_ids=(), constraints=refuse)
    bad, good = run_requests(
        scheduler, [request(3, grammar=Grammar(kind="lark", text="")), request(4)]
    )
    assert (bad.finish_reason, bad.error) == ("error", "no such rule")
    assert good.ids == expected(request(4), allowed_size=63)[0]
    assert scheduler.idle


def test_eos_comes_from_the_tokenizer_unless_given():
    tokenizer = letters()
    asked = next(
        one
        for one in (request(3, seed, max_new_tokens=19, sampling=SEEDED) for seed in range(99))
        if EOS_ID in expected(one, allowed_size=63)[0]
    )
    ids = expected(asked, allowed_size=63)[0]
    (got,) = generate(HashBackend(), tokenizer, [asked])
    assert (got.ids, got.finish_reason) == (ids[: ids.index(EOS_ID)], "stop")
    (got,) = generate(HashBackend(), tokenizer, [asked], eos_ids=())
    assert got.ids == ids


def test_ids_past_the_tokenizer_are_never_drawn():
    samplings = [SamplingParams(temperature=1.5, seed=n) for n in range(30)]
    requests = [request(3, sampling=sampling, max_new_tokens=20) for sampling in samplings]
    assert any(63 in expected(one)[0] for one in requests)
    done = generate(HashBackend(), letters(), requests, eos_ids=())
    assert all(
        got.ids == expected(r, allowed_size=63)[0] for r, got in zip(requests, done, strict=True)
    )


def test_a_stop_text_over_several_tokens_cuts_the_text():
    tokenizer = letters()
    asked = request(4, max_new_tokens=12)
    ids = expected(asked, allowed_size=63)[0]
    text = tokenizer.decode(ids)
    stop = tokenizer.decode(ids[3:6])
    assert len(stop) == 3
    events = []
    asked = request(4, max_new_tokens=12, stop=("never", stop))
    (got,) = generate(HashBackend(), tokenizer, [asked], on_event=events.append, eos_ids=())
    assert got.text == text[: text.index(stop)]
    assert got.finish_reason == "stop"
    assert got.ids == ids[: len(got.ids)]  # the stop text's own tokens are kept
    assert "".join(e.text for e in events) == got.text
    assert events[-1].completion is got


def test_text_is_complete_and_held_back_characters_come_at_the_end():
    tokenizer = letters()
    samplings = [SamplingParams(temperature=2.0, seed=n) for n in range(60)]
    requests = [request(3, sampling=sampling, max_new_tokens=12) for sampling in samplings]
    events = []
    done = generate(HashBackend(), tokenizer, requests, on_event=events.append, eos_ids=())
    assert any("\u00e9" in got.text for got in done)  # both halves in a row
    assert any(got.ids[-1] == 60 for got in done)  # a half at the end, shown as U+FFFD
    for request_id, got in enumerate(done):
        whole = tokenizer.decode([*got.prompt_ids, *got.ids])
        assert tokenizer.decode(got.prompt_ids) + got.text == whole
        assert got.text == "".join(e.text for e in events if e.request_id == request_id)


@pytest.mark.parametrize(
    ("limit_policy", "length", "max_new_tokens", "num_new"),
    [
        ("stop", 20, 3, 3),
        ("stop", 20, 5, 5),
        ("stop", 20, 99, 5),  # prompt + new = S + 1
        ("stop", 24, 99, 1),
        ("roll", 20, 10, 10),
        ("roll", 20, 99, 21),  # prompt + new = num_positions + 1
        ("roll", 24, 99, 17),
        ("roll", 24, 1, 1),
    ],
)
def test_lengths(limit_policy, length, max_new_tokens, num_new):
    asked = request(length, max_new_tokens=max_new_tokens, limit_policy=limit_policy)
    (got,) = generate(HashBackend(), None, [asked])
    assert len(got.ids) == num_new
    assert got.finish_reason == "length"


def test_roll_sees_the_last_s_positions_beside_neighbours():
    options = {"max_new_tokens": 99, "sampling": SEEDED, "limit_policy": "roll"}
    requests = [request(n, n, **options) for n in (24, 1, 13, 24, 7)]
    done = generate(HashBackend(batch=2), None, requests)
    for asked, got in zip(requests, done, strict=True):
        assert got.ids == expected(asked, end=40)[0]


# --- logprobs, samples, times ---


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_logprobs_are_those_of_the_raw_logits(sampling):
    events = []
    asked = request(5, sampling=sampling, logprobs=3)
    (got,) = generate(HashBackend(), letters(), [asked], on_event=events.append, eos_ids=())
    ids, _, every_logits = expected(asked, allowed_size=63)
    assert got.ids == ids
    for i, logits in enumerate(every_logits):
        logprobs = log_softmax(logits)
        assert got.logprobs[i] == events[i].logprob == logprobs[ids[i]]
        best = sorted(range(63), key=lambda j: -logits[j])[:3]
        assert got.top_logprobs[i] == events[i].top_logprobs
        assert got.top_logprobs[i] == tuple((j, logprobs[j]) for j in best)


def test_a_prompt_is_scored_beside_what_others_do():
    asked = [request(9, 1, prompt_logprobs=2, sampling=SEEDED), request(6, 2), request(1, 3)]
    backend = HashBackend(batch=2)
    scheduler = Scheduler(backend, letters(), eos_ids=(), keep_prefixes=True)
    run_requests(scheduler, asked)  # leaves rows that the next ones could start from
    scored, beside, single = run_requests(scheduler, [*asked[:2], request(1, prompt_logprobs=0)])
    assert scored.ids == expected(asked[0], allowed_size=63)[0]
    assert beside.ids == expected(asked[1], allowed_size=63)[0]
    rows = []
    for position, token_id in enumerate(scored.prompt_ids[:-1]):
        rows.append(mix(token_id, position, rows))
        logprobs = log_softmax(row_logits(rows[-1]))
        assert scored.prompt_logprobs[position] == logprobs[scored.prompt_ids[position + 1]]
        best = sorted(range(63), key=lambda j: -logprobs[j])[:2]
        assert scored.prompt_top_logprobs[position] == tuple((j, logprobs[j]) for j in best)
    assert len(scored.prompt_logprobs) == 8
    assert single.prompt_logprobs == beside.prompt_logprobs == []


def test_logprobs_of_0_and_none_and_beside_an_eos():
    ids = expected(request(5))[0]
    (got,) = generate(HashBackend(), None, [request(5, logprobs=0, stop_ids=(ids[3],))])
    assert len(got.logprobs) == len(got.ids)
    assert got.top_logprobs == [()] * len(got.ids)
    (got,) = generate(HashBackend(), None, [request(5)])
    assert got.logprobs is None
    assert got.top_logprobs is None


def test_samples_of_one_prompt_differ():
    requests = [request(5, sampling=SEEDED, sample_index=n) for n in range(4)]
    done = generate(HashBackend(), None, [*requests, requests[0]])
    assert len({tuple(got.ids) for got in done}) == 4
    assert done[4].ids == done[0].ids


def test_times():
    done = generate(HashBackend(batch=1), None, [request(9), request(3)])
    assert len(done) == 2
    for got in done:
        assert 0 < got.prefill_s < got.ttft_s
        assert got.decode_s > 0


# --- streaming ---


def test_stream_gives_one_request_as_it_happens():
    scheduler = Scheduler(HashBackend(), letters(), eos_ids=())
    events = list(stream(scheduler, request(5)))
    (got,) = generate(HashBackend(), letters(), [request(5)], eos_ids=())
    assert [e.token_id for e in events] == got.ids
    assert "".join(e.text for e in events) == got.text
    assert [e.finish_reason for e in events] == [None] * 7 + ["length"]
    assert events[-1].completion.ids == got.ids
    assert scheduler.idle


def test_closing_a_stream_cancels_its_request_only():
    scheduler = Scheduler(HashBackend(batch=1), None)
    inbox = []
    scheduler.submit(request(6, 1), sink=inbox.append)
    events = stream(scheduler, request(5))
    next(events)
    events.close()
    scheduler.submit(request(3, 2), sink=inbox.append)
    assert run(scheduler) == []
    assert [e.completion.ids for e in inbox if e.completion] == [
        expected(request(6, 1))[0],
        expected(request(3, 2))[0],
    ]


def test_streams_of_one_scheduler_can_be_read_in_any_order():
    scheduler = Scheduler(HashBackend(batch=2), None)
    requests = [request(n, n) for n in (3, 9, 5)]
    streams = [stream(scheduler, one) for one in requests]
    rows = zip(*streams, strict=True)
    ids = [[event.token_id for event in events] for events in zip(*rows, strict=True)]
    assert ids == [expected(one)[0] for one in requests]


def test_a_stream_that_another_cancels_ends():
    scheduler = Scheduler(HashBackend(), None)
    events = stream(scheduler, request(5))
    next(events)
    scheduler.cancel(0)
    assert [e.finish_reason for e in events] == ["cancelled"]


# --- when a step fails ---


@pytest.mark.parametrize("mixed", [(), (4,)])
@pytest.mark.parametrize("call", range(1, 9))
def test_an_interrupted_step_can_be_repeated(call, mixed):
    requests = [request(n, n, sampling=SEEDED, max_new_tokens=9) for n in (3, 9)]
    backend = HashBackend(batch=2, fail_at={call: KeyboardInterrupt()}, mixed_lens=mixed)
    scheduler = Scheduler(backend, None, adaptive=bool(mixed))
    for one in requests:
        scheduler.submit(one)
    with pytest.raises(KeyboardInterrupt):
        run(scheduler)
    done = completions(run(scheduler))
    assert [done[n].ids for n in range(2)] == [expected(one)[0] for one in requests]


def test_what_was_generated_is_kept_after_an_interrupt():
    scheduler = Scheduler(HashBackend(fail_at={4: KeyboardInterrupt()}), letters(), eos_ids=())
    request_id = scheduler.submit(request(3))
    with pytest.raises(KeyboardInterrupt):
        run(scheduler)
    assert scheduler.cancel(request_id)
    (event,) = scheduler.step()
    ids = expected(request(3), allowed_size=63)[0]
    assert event.completion.ids == ids[:3]
    assert event.completion.text == letters().decode(ids[:3])
    assert scheduler.idle


def test_a_row_of_nan_ends_its_request_and_no_other():
    # Rows were taken in the order of slots and the first error ended the step: the slots behind
    # the broken one never got a token, and the error named nobody.
    class Broken(HashBackend):
        def decode(self, ids, positions):
            logits = super().decode(ids, positions)
            logits[1] = np.nan
            return logits

    requests = [request(n, n) for n in (3, 4, 5, 6)]
    done = generate(Broken(batch=4), letters(), requests, eos_ids=())
    for n in (0, 2, 3):
        assert done[n].ids == expected(requests[n], allowed_size=63)[0]
        assert done[n].error is None
    assert done[1].finish_reason == "error"
    assert len(done[1].ids) == 1
    assert "the largest logit is nan" in done[1].error


# --- many callers ---


def test_eight_threads_get_what_each_gets_alone():
    scheduler = Scheduler(HashBackend(batch=3), letters(), eos_ids=(), keep_prefixes=True)
    asked = [[request(1 + n % 9, n, sampling=SEEDED) for n in range(t, t + 6)] for t in range(8)]

    def call(mine):
        whole = run_requests(scheduler, mine[:3])
        pieces = [[event.text for event in stream(scheduler, one)] for one in mine[3:]]
        return [done.text for done in whole] + ["".join(texts) for texts in pieces]

    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(call, asked))
    for mine, texts in zip(asked, got, strict=True):
        alone = generate(HashBackend(batch=1), letters(), mine, eos_ids=())
        assert texts == [done.text for done in alone]
    assert scheduler.idle


def test_requests_beside_a_stream():
    scheduler = Scheduler(HashBackend(batch=2), None)
    events = stream(scheduler, request(3, 1))
    first = [next(events) for _ in range(3)]
    (beside,) = run_requests(scheduler, [request(5, 2)])  # used to write over the stream's rows
    assert beside.ids == expected(request(5, 2))[0]
    rest = list(events)
    assert [e.token_id for e in first + rest] == expected(request(3, 1))[0]


def test_what_waits_costs_its_prompt_alone():
    # Sampler and decoder were made when a request was queued: 90 kB each for 128k ids.
    scheduler = Scheduler(HashBackend(batch=1), letters())
    for n in range(100):
        scheduler.submit(request(2, n))
    assert all(live.sampler is None and live.decoder is None for live in scheduler._queue)


# --- how much may wait ---


def test_what_waits_is_bounded():
    scheduler = Scheduler(HashBackend(batch=2), None, max_queue=3, max_queued_tokens=12)
    for n in range(2):  # a free slot takes a prompt of any length
        scheduler.submit(request(20, n))
    scheduler.step()
    assert (scheduler.running, scheduler.waiting, scheduler.free) == (2, 0, 0)
    scheduler.submit(request(5))
    with pytest.raises(QueueFullError, match="5 prompt tokens wait, with this prompt's 8"):
        scheduler.submit(request(8))
    victim = scheduler.submit(request(2))
    scheduler.submit(request(2))
    with pytest.raises(QueueFullError, match="3 requests wait, max_queue is 3"):
        scheduler.submit(request(1))
    scheduler.cancel(victim)
    assert scheduler.waiting == 2
    scheduler.submit(request(1))
    assert len(completions(run(scheduler))) == 6
    assert (scheduler.running, scheduler.waiting, scheduler.free) == (0, 0, 2)


# --- rows that are kept ---


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_prompts_with_shared_beginnings_and_cancels_give_what_each_gives_alone(data):
    mixed = data.draw(st.sampled_from([(), (4,), (5, 9)]), "rows of mixed steps")
    scheduler = Scheduler(
        HashBackend(batch=data.draw(st.integers(1, 3), "B"), prefill_lens=(1, 6), mixed_lens=mixed),
        None,
        keep_prefixes=True,
        adaptive=True,
    )
    asked, done = {}, {}
    conversations = [prompt(4, seed) for seed in range(2)]
    for _ in range(20):
        branch = data.draw(st.integers(0, len(conversations) - 1))
        more = data.draw(st.lists(st.integers(3, 6), max_size=3))
        one = Request(
            prompt_ids=(*conversations[branch], *more)[:20],
            max_new_tokens=data.draw(st.integers(1, 8)),
            sampling=data.draw(st.sampled_from([GREEDY, SEEDED])),
            prompt_logprobs=data.draw(st.sampled_from([None, None, None, 0])),
            timeout_s=data.draw(st.sampled_from([None, None, None, 1e-9])),
        )
        asked[scheduler.submit(one)] = one
        for _ in range(data.draw(st.integers(0, 12), "steps before the next")):
            done |= completions(scheduler.step())
        if data.draw(st.integers(0, 3)) == 0:
            scheduler.cancel(data.draw(st.sampled_from(sorted(asked))))
        for got in done.values():
            conversations.append((*got.prompt_ids, *got.ids)[:18])
    done |= completions(run(scheduler))
    assert done.keys() == asked.keys()
    for request_id, got in done.items():
        ids, reason, _ = expected(asked[request_id])
        if got.finish_reason in ("cancelled", "timeout"):
            assert got.ids == ids[: len(got.ids)]
        else:
            assert (got.ids, got.finish_reason) == (ids, reason)


def test_rows_are_not_shared_between_scopes():
    scheduler = Scheduler(HashBackend(batch=2), None, keep_prefixes=True)
    asked = [request(6, prefix_scope=scope) for scope in ("a", "b", "a", "b")]
    assert [run_requests(scheduler, [one])[0].num_reused for one in asked] == [0, 0, 5, 5]


def test_a_prompt_starts_where_a_free_slot_ends_like_it():
    backend = HashBackend(batch=2)
    scheduler = Scheduler(backend, None, keep_prefixes=True)
    (first,) = run_requests(scheduler, [request(6, 1)])
    again = Request(
        prompt_ids=(*first.prompt_ids, *first.ids, 5, 6), max_new_tokens=4, sampling=GREEDY
    )
    other = request(3, 2)
    done = run_requests(scheduler, [other, again])
    assert [d.num_reused for d in done] == [0, 13]  # the last token of the first was never fed
    assert [d.ids for d in done] == [expected(other)[0], expected(again)[0]]


def test_an_idle_slot_is_fed_behind_what_it_keeps():
    backend = HashBackend(batch=2)
    scheduler = Scheduler(backend, None, keep_prefixes=True)
    long, short = request(9, 1, max_new_tokens=2), request(2, 2)
    run_requests(scheduler, [long])
    run_requests(scheduler, [short])  # in slot 1 or 0; the other keeps its rows
    (again,) = run_requests(scheduler, [long])
    assert again.ids == expected(long)[0]


def test_a_window_that_rolled_is_not_kept():
    scheduler = Scheduler(HashBackend(batch=1), None, keep_prefixes=True)
    rolled = request(6, 1, max_new_tokens=30, limit_policy="roll")
    run_requests(scheduler, [rolled])
    (again,) = run_requests(scheduler, [rolled])
    assert again.num_reused == 0
    assert again.ids == expected(rolled, end=40)[0]


# --- what is refused ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt_ids": ()}, "the prompt has no token"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"stop": ("a", "")}, "stop is"),
        ({"stop": "abc"}, "stop is 'abc'"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"sample_index": -1}, "sample_index is -1"),
        ({"min_tokens": 9, "max_new_tokens": 8}, "min_tokens is 9; it must be between 0 and"),
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"limit_policy": "slide"}, 'limit_policy is \'slide\'; it must be "stop" or "roll"'),
    ],
)
def test_bad_requests(values, message):
    with pytest.raises(ValueError, match=message):
        Request(**{"prompt_ids": (1,), **values})


def test_requests_this_backend_cannot_run():
    backend = HashBackend()
    scheduler = Scheduler(backend, None)
    for bad, message in [
        (request(25), "prompt has 25 tokens, max_seq_len is 24"),
        (Request(prompt_ids=(1, 64)), "vocab_size is 64"),
        (Request(prompt_ids=(1, -1)), "ids from -1 to 1"),
        (request(2, stop=("x",)), "stop texts need a tokenizer"),
        (request(2, grammar=Grammar(kind="regex", text="a")), "a grammar needs"),
    ]:
        with pytest.raises(ValueError, match=message):
            scheduler.submit(bad)
        with pytest.raises(ValueError, match=message):
            generate(backend, None, [request(2), bad])
    assert scheduler.idle
    assert backend.calls == []
