import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llamac.runtime import draw as drawing
from llamac.runtime.sampling import Sampler, SamplingParams, log_softmax, top_logprobs

VOCAB_SIZE = 1000
# Ours is float64, the reference's softmax float32.
PROBABILITY_ATOL = 1e-6


def random_logits(seed: int, size: int = VOCAB_SIZE, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=size) * scale).astype(np.float32)


def sampler(vocab_size: int = VOCAB_SIZE, **params) -> Sampler:
    return Sampler(SamplingParams(**params), vocab_size)


# --- against transformers ---


def probabilities(sampler: Sampler, logits: np.ndarray) -> np.ndarray:
    """The distribution that `sample` draws from, [V] float64."""
    result = np.zeros(logits.size)
    scores = sampler._scores(logits, None, ())
    if sampler._params.temperature == 0:
        result[np.argmax(scores)] = 1
        return result
    ids, weights = sampler._candidates(scores)
    result[np.arange(weights.size) if ids is None else ids] = weights / weights.sum()
    return result


def reference_probabilities(
    logits: np.ndarray, params: SamplingParams, prompt_ids: list[int]
) -> np.ndarray:
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    ids = torch.tensor([prompt_ids], dtype=torch.int64)
    scores = torch.from_numpy(logits.copy())[None]
    if params.repetition_penalty != 1:
        scores = process.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    scores = process.TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.top_k:
        scores = process.TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = process.TopPLogitsWarper(params.top_p)(ids, scores)
    if params.min_p > 0:
        scores = process.MinPLogitsWarper(params.min_p)(ids, scores)
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize("size", [50, VOCAB_SIZE, 20_000])
@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1.0},
        {"temperature": 0.3},
        {"temperature": 2.5},
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": 10**6},
        {"top_p": 0.9},
        {"top_p": 0.37},
        {"top_p": 1e-6},
        {"top_p": 0.9, "temperature": 5.0},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7},
        {"top_k": 40, "top_p": 0.9},
        {"top_k": 40, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.2, "temperature": 1.5},
    ],
    ids=str,
)
def test_probabilities_equal_transformers(values, size):
    params = SamplingParams(**values)
    prompt_ids = [3, 17, 17, size - 1]
    for seed in range(3):
        logits = random_logits(seed, size)
        expected = reference_probabilities(logits, params, prompt_ids)
        ours = probabilities(Sampler(params, size, prompt_ids=prompt_ids), logits)
        np.testing.assert_array_equal(ours > 0, expected > 0)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=PROBABILITY_ATOL)


# --- properties ---

logit_rows = st.lists(
    st.one_of(
        st.floats(-30, 30, width=32),
        st.sampled_from([0.0, 1.0, 2.0, -math.inf]),  # ties and ids that are masked already
    ),
    min_size=1,
    max_size=60,
).filter(lambda row: max(row) > -math.inf)
temperatures = st.floats(0.01, 10)


@example(row=[0.0, 0.0, 1.0, 7.9e-22], temperature=1.0, top_p=0.5)
@given(row=logit_rows, temperature=temperatures, top_p=st.floats(1e-9, 0.999999))
def test_top_p_is_the_smallest_set_by_sorting(row, temperature, top_p):
    logits = np.array(row, np.float32)
    ours = probabilities(sampler(len(row), temperature=temperature, top_p=top_p), logits)
    every = probabilities(sampler(len(row), temperature=temperature), logits)
    kept = set(np.flatnonzero(ours))
    # In float64, from the largest down: logits that are one number there are equally likely.
    with np.errstate(over="ignore"):
        scores = (logits.astype(np.float64) - logits.max()) / temperature
    ranked = sorted(range(len(row)), key=lambda i: (-scores[i], i))
    assert kept == set(ranked[: len(kept)])  # the likeliest, ties to the lower id
    total = math.fsum(every)
    assert math.fsum(every[list(kept)]) >= top_p * total - 1e-12
    assert math.fsum(every[ranked[: len(kept) - 1]]) < top_p * total + 1e-12
    assert ours.sum() == pytest.approx(1)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([0.0, 1e-30, 0.01, 1.0, 8.0, 1e6]),
    levels=st.sampled_from([2, 50, 0]),
    top_p=st.floats(0.01, 0.9999),
)
def test_top_p_of_a_big_vocabulary_equals_a_full_sort(seed, scale, levels, top_p):
    # More candidates than are sorted outright, with and without many ties.
    logits = random_logits(seed, 5000, 1.0)
    if levels:
        logits = np.round(logits * levels) / levels
    logits = (logits * scale).astype(np.float32)
    ours = probabilities(sampler(5000, temperature=1.0, top_p=top_p), logits)
    weights = np.exp(logits.astype(np.float64) - logits.max())
    order = np.argsort(-logits, kind="stable")
    sums = np.cumsum(weights[order])
    count = int(np.searchsorted(sums, top_p * weights.sum())) + 1
    kept = np.flatnonzero(ours)
    assert abs(len(kept) - count) <= 1  # the sums differ in their last digits
    np.testing.assert_array_equal(kept, np.sort(order[: len(kept)]))


@given(row=logit_rows, k=st.integers(1, 70))
def test_top_k_keeps_k_with_ties_to_the_lower_id(row, k):
    logits = np.array(row, np.float32)
    kept = np.flatnonzero(probabilities(sampler(len(row), temperature=1.0, top_k=k), logits))
    ranked = sorted(range(len(row)), key=lambda i: (-logits[i], i))[:k]
    assert set(kept) == {i for i in ranked if logits[i] > -math.inf}


@given(
    row=logit_rows,
    temperature=st.floats(0, 10),
    top_k=st.integers(0, 5),
    top_p=st.floats(1e-300, 1),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**31),
)
def test_a_sample_is_always_a_kept_id(row, temperature, top_k, top_p, min_p, seed, position):
    logits = np.array(row, np.float32)
    draw = sampler(
        len(row), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
    )
    distribution = probabilities(draw, logits)
    token_id = draw.sample(logits, position)
    assert type(token_id) is int
    assert distribution[token_id] > 0
    assert logits[token_id] > -math.inf


# --- greedy, ties, masks, seen ids ---


def test_temperature_0_is_the_lowest_of_the_largest_for_every_seed():
    logits = np.array([0, 5, 5, 1, 5], np.float32)
    assert {sampler(5, temperature=0, seed=s).sample(logits, s) for s in range(20)} == {1}


def test_a_tiny_temperature_is_greedy_and_does_not_overflow():
    logits = np.array([3, 5, -40], np.float32)
    assert sampler(3, temperature=1e-310, seed=5).sample(logits, 0) == 1


def test_ids_past_the_tokenizer_are_never_drawn():
    logits = np.array([1, 2, 3, 50, 60], np.float32)
    params = SamplingParams(temperature=1.0)
    assert np.flatnonzero(probabilities(Sampler(params, 5, allowed_size=3), logits)).tolist() == [
        0,
        1,
        2,
    ]
    assert Sampler(SamplingParams(temperature=0), 5, allowed_size=3).sample(logits, 0) == 2


def test_presence_and_frequency_penalties_count_what_was_drawn():
    logits = np.array([2.0, 1.9, 1.0, 0.0], np.float32)
    drawer = Sampler(
        SamplingParams(temperature=0, presence_penalty=0.25, frequency_penalty=0.5),
        4,
        prompt_ids=[0, 0, 0],  # the prompt's ids don't count
    )
    # 2.0 | 1.25, 1.9 | 1.25, 1.15 | 0.75, 1.15 | 0.75, 0.65 and 1.0
    assert [drawer.sample(logits, n) for n in range(5)] == [0, 1, 0, 1, 2]


def test_a_bias_moves_logits():
    logits = np.array([2.0, 1.0, 0.0, 9.0], np.float32)
    drawer = Sampler(
        SamplingParams(temperature=0, logit_bias=((2, 2.5), (3, -100.0))), 4, allowed_size=3
    )
    assert drawer.sample(logits, 0) == 2
    with pytest.raises(ValueError, match="logit_bias names id 4; allowed are 0 to 3"):
        sampler(4, logit_bias=((4, 1.0),))


@pytest.mark.parametrize(
    "values", [{"temperature": 0}, {"top_k": 5}, {"top_p": 0.3}, {"min_p": 0.9}, {}], ids=str
)
def test_what_is_not_allowed_is_never_drawn(values):
    logits = random_logits(0, 50)
    allowed = np.zeros(50, np.bool_)
    allowed[[3, 8, 21]] = True
    best = [int(i) for i in np.argsort(-logits)]
    drawer = sampler(50, **values)
    drawn = {drawer.sample(logits, n, allowed=allowed, banned_ids=(8, 99)) for n in range(200)}
    assert drawn <= {3, 21}
    assert min((3, 21), key=best.index) in drawn
    with pytest.raises(ValueError, match="no token may come next"):
        drawer.sample(logits, 0, allowed=allowed, banned_ids=(3, 8, 21))


def test_repetition_penalty_counts_the_prompt_and_what_was_drawn():
    logits = np.array([4.0, 3.0, -1.0, 2.5], np.float32)
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    draw = Sampler(params, 4, prompt_ids=[0])
    # 4 / 2 = 2 loses to 3; then 3 / 2 = 1.5 loses to 2.5; then 1.25, 1.5 and 2 are left.
    assert [draw.sample(logits, p) for p in range(3)] == [1, 3, 0]
    negative = np.array([-1.0, -1.5], np.float32)
    assert Sampler(params, 2, prompt_ids=[0]).sample(negative, 0) == 1


# --- the random numbers ---


def test_philox_bits_are_the_published_ones():
    # The known-answer test of Philox4x64-10 for counter 0 and key 0 (Random123, kat_vectors).
    # NumPy counts up before the first block, so ours is the block of position + 1.
    before_zero = np.array([2**64 - 1] * 4, np.uint64)
    raw = np.random.Philox(key=np.zeros(2, np.uint64), counter=before_zero).random_raw()
    assert raw == 0x16554D9ECA36314C


@pytest.mark.parametrize(
    ("seed", "sample_index", "position", "expected"),
    [
        (0, 0, 0, "0x1.7a5d3204726c0p-7"),
        (0, 0, 1, "0x1.0137e64510730p-1"),
        (1, 0, 0, "0x1.36da89edd58a0p-2"),
        (0, 1, 0, "0x1.a06ff187f343ap-1"),
        (1234, 5, 4096, "0x1.47a9867906b40p-5"),
        (2**64 - 1, 2**64 - 1, 2**32, "0x1.d0fd1cae009d4p-1"),
    ],
)
def test_the_keys_never_drift(seed, sample_index, position, expected):
    draw = Sampler(SamplingParams(seed=seed), 4, sample_index=sample_index)
    assert drawing.uniform(draw._key, position).hex() == expected


def test_golden_tokens():
    draw = sampler(temperature=1.0, top_p=0.95, seed=1234)
    rows = [np.arange(1000) * 7919 % (1009 + p) / 100 for p in range(12)]
    tokens = [draw.sample(row.astype(np.float32), p) for p, row in enumerate(rows)]
    assert tokens == [331, 609, 48, 326, 564, 158, 490, 482, 694, 114, 302, 728]


def test_draws_do_not_depend_on_earlier_draws():
    logits = random_logits(0)
    forwards = sampler(temperature=1.0, seed=7)
    backwards = sampler(temperature=1.0, seed=7)
    ahead = [forwards.sample(logits, p) for p in range(50)]
    assert [backwards.sample(logits, p) for p in reversed(range(50))] == ahead[::-1]
    assert len(set(ahead)) > 10


def test_seed_and_sample_index_both_change_the_draws():
    logits = random_logits(0)

    def draws(seed, sample_index):
        params = SamplingParams(temperature=1.0, seed=seed)
        draw = Sampler(params, VOCAB_SIZE, sample_index=sample_index)
        return tuple(draw.sample(logits, p) for p in range(20))

    assert len({draws(s, i) for s in (0, 1, 2**64 - 1) for i in (0, 1, 2)}) == 9


@pytest.mark.parametrize("number", [0.0, 0.3, 0.7, 1 - 2**-53])
@pytest.mark.parametrize("zeros", [slice(0, 0), slice(0, 300), slice(200, 900), slice(250, None)])
@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000])
def test_a_draw_is_where_the_sum_passes_a_share(size: int, zeros: slice, number: float):
    weights = np.random.default_rng(size).random(size)
    weights[1:][zeros] = 0
    index = drawing.draw(weights, number)
    assert weights[index] > 0
    before, total = math.fsum(weights[:index]), math.fsum(weights)
    assert before - 1e-12 * total <= number * total <= before + weights[index] + 1e-12 * total


def test_frequencies_follow_the_probabilities():
    logits = np.array([2, 1, 0.5, 0, 0, -1, -2, -9], np.float32)
    draw = sampler(8, temperature=1.3, top_p=0.97, seed=11)
    expected = probabilities(draw, logits) * 20_000
    counts = np.bincount([draw.sample(logits, p) for p in range(20_000)], minlength=8)
    kept = expected > 0
    assert not counts[~kept].any()
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert kept.sum() == 6
    assert chi_square < 20.5  # 5 degrees of freedom, p = 0.001; the seed is fixed


def test_noise_of_another_backend_does_not_change_tokens():
    noise = np.random.default_rng(1)
    params = {"temperature": 0.9, "top_p": 0.95, "min_p": 0.01, "seed": 3}
    a, b = sampler(**params), sampler(**params)
    for position in range(300):
        logits = random_logits(position)
        close = (logits * (1 + noise.normal(size=VOCAB_SIZE) * 1e-7)).astype(np.float32)
        assert a.sample(logits, position) == b.sample(close, position)


# --- logprobs ---


def test_log_softmax_of_raw_logits():
    logits = np.array([math.log(1), math.log(2), math.log(5), -math.inf], np.float32)
    logprobs = log_softmax(logits)
    np.testing.assert_allclose(np.exp(logprobs), [0.125, 0.25, 0.625, 0], rtol=1e-6)
    assert logprobs.dtype == np.float64
    big = log_softmax(np.array([1e5, 1e5], np.float32))
    np.testing.assert_allclose(big, [-math.log(2)] * 2)


def test_top_logprobs_are_ranked_with_ties_to_the_lower_id():
    logprobs = np.array([-3.0, -1.0, -2.0, -1.0, -math.inf])
    assert top_logprobs(logprobs, 0) == ()
    assert top_logprobs(logprobs, 1) == ((1, -1.0),)
    assert top_logprobs(logprobs, 3) == ((1, -1.0), (3, -1.0), (2, -2.0))
    assert [i for i, _ in top_logprobs(logprobs, 99)] == [1, 3, 2, 0, 4]


# --- what is refused ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 2.0}, r"top_p is 2.0; it must be in \(0, 1\]"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"min_p": math.nan}, "min_p is nan"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"presence_penalty": 101}, "presence_penalty is 101"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan"),
        ({"logit_bias": ((-1, 0.0),)}, "logit_bias of id -1 is 0.0"),
        ({"logit_bias": ((1, math.inf),)}, "logit_bias of id 1 is inf"),
        ({"repetition_penalty": 1e-320}, "repetition_penalty is 1e-320; it must be in"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
    ],
)
def test_bad_params(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**values)


def test_bad_sizes():
    with pytest.raises(ValueError, match="allowed_size is 6"):
        Sampler(SamplingParams(), 5, allowed_size=6)
    with pytest.raises(ValueError, match="sample_index is -1"):
        Sampler(SamplingParams(), 5, sample_index=-1)
    with pytest.raises(ValueError, match="logits have shape"):
        sampler(5).sample(np.zeros(4, np.float32), 0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "logits", [[0, math.nan, 1], [0, 1, math.nan], [math.inf, 0, 0], [-math.inf] * 3], ids=str
)
def test_logits_that_are_not_finite_are_refused(logits, temperature):
    draw = Sampler(SamplingParams(temperature=temperature), 3, allowed_size=2)
    with pytest.raises(ValueError, match="the largest logit is"):
        draw.sample(np.array(logits, np.float32), 0)
