from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llamac.model import TorchBackend
from llamac.runtime.request import Completion, Request
from llamac.runtime.sampling import SamplingParams
from llamac.runtime.scheduler import generate
from llamac.runtime.speculation import look_up, parse_speculate
from variants import our_model

ROWS = 64


def test_what_followed_is_guessed():
    assert look_up([5, 6, 7, 8, 5, 6], 2) == [7, 8]
    assert look_up([5, 6, 7, 8, 5, 6], 9) == [7, 8, 5, 6]
    assert look_up([5, 6, 1, 5, 6, 2, 5, 6], 1) == [2]  # the newest
    assert look_up([4, 5, 6, 1, 9, 5, 6, 2, 4, 5, 6], 1) == [1]  # the longest match
    assert look_up([3, 3, 3], 2) == [3]
    for ids in ([], [1], [1, 2], [1, 2, 3], [1, 2, 3, 1]):
        assert look_up(ids, 4) == []


def test_what_is_asked_for():
    assert [parse_speculate(text) for text in ("lookup", "lookup:1", "lookup:15")] == [4, 1, 15]
    for text in ("", "lookup:", "lookup:0", "lookup:16", "lookup:04", "eagle", "lookup:4 "):
        with pytest.raises(ValueError, match="it must be lookup, or lookup:K"):
            parse_speculate(text)


def backend_of(*, num_guesses: int, compile: bool = False, batch_size: int = 3) -> TorchBackend:
    return TorchBackend(
        our_model("biases", num_positions=1024),
        batch_size=batch_size,
        max_seq_len=ROWS,
        prefill_lens=(16,),
        num_guesses=num_guesses,
        compile=compile,
    )


def requests(temperature: float) -> list[Request]:
    """Prompts that repeat and one that doesn't; ends by number, by an id, by the cache, rolling."""
    found: list[Request] = []
    for seed, options in enumerate(
        (
            {"max_new_tokens": 30},
            {"max_new_tokens": 40, "stop_ids": (11, 57)},
            {"logprobs": 2},
            {"max_new_tokens": 100, "limit_policy": "roll"},
            {"max_new_tokens": 20, "prompt_logprobs": 0},
        )
    ):
        words = np.random.Philox(seed).random_raw(4 if seed < 4 else 19)
        ids = tuple(int(word) % 101 for word in words) * (4 if seed < 4 else 1)
        sampling = SamplingParams(temperature=temperature, seed=seed, top_k=3)
        found.append(Request(prompt_ids=ids, sampling=sampling, **options))
    return found


def result_of(done: Completion) -> tuple:
    return done.ids, done.finish_reason, done.num_steps, done.top_logprobs and len(done.ids)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("num_guesses", [1, 4, 15])
def test_the_tokens_are_those_without(num_guesses: int, temperature: float):
    plain = generate(backend_of(num_guesses=0), None, requests(temperature))
    guessed = generate(backend_of(num_guesses=num_guesses), None, requests(temperature))
    assert [*map(result_of, guessed)] == [*map(result_of, plain)]
    assert all(done.num_guessed == 0 for done in plain)
    assert sum(done.num_guessed for done in guessed) > 0
    for done in guessed:
        assert 0 <= done.num_right <= min(done.num_guessed, len(done.ids))
        if done.logprobs is not None:
            assert len(done.logprobs) == len(done.ids)


def test_right_guesses_spare_steps(monkeypatch: pytest.MonkeyPatch):
    backend, num_steps = backend_of(num_guesses=4, batch_size=1), 0
    extend = backend.extend

    def count(ids, positions):
        nonlocal num_steps
        num_steps += 1
        return extend(ids, positions)

    monkeypatch.setattr(backend, "extend", count)
    always = SamplingParams(temperature=0, logit_bias=((7, 100.0),))
    request = Request(prompt_ids=(5,), max_new_tokens=43, sampling=always)
    (done,) = generate(backend, None, [request])
    assert done.ids == [7] * 43
    assert num_steps <= 12
    assert 43 - 12 - 4 <= done.num_right < 43 - num_steps


@pytest.mark.slow
def test_compiled_tokens_are_those_without():
    for temperature in (0.0, 0.7):
        plain = generate(backend_of(num_guesses=0), None, requests(temperature))
        guessed = generate(backend_of(num_guesses=4, compile=True), None, requests(temperature))
        assert [*map(result_of, guessed)] == [*map(result_of, plain)]


@pytest.mark.slow
def test_the_command_line(run):
    demo = str(Path(__file__).parents[1] / "model" / "demo")
    words = ("generate", demo, "One day", "--max-new-tokens", "40", "--backend", "eager")
    words += ("--seed", "3")
    plain, guessed = run(*words), run(*words, "--speculate", "lookup:3")
    assert plain[0] == guessed[0] == 0
    assert guessed[1] == plain[1]
    code, _, said = run(*words, "--speculate", "eagle")
    assert (code, "speculate is 'eagle'; it must be lookup" in said) == (2, True)
