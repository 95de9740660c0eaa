from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from references import assert_close, prefill_chunks

from llamac.export import export_bundle
from llamac.export.verify import verify_bundle
from llamac.model import TorchBackend
from llamac.model.checkpoint import open_checkpoint
from llamac.perf.speculation import compare, make_prompts
from llamac.runtime.bundle.manifest import Manifest
from llamac.runtime.load import load, open_source
from llamac.runtime.ort.ort_backend import OrtBackend
from llamac.runtime.request import Completion, Request
from llamac.runtime.sampling import SamplingParams
from llamac.runtime.scheduler import generate
from llamac.runtime.speculation import check_exported, look_up, parse_speculate
from variants import our_model, reference_model

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


# On bundles


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Manifest]:
    """Of 1 or 3 slots, when first asked for."""
    exported: dict[int, Manifest] = {}

    def export(batch_size: int) -> Manifest:
        if batch_size not in exported:
            folder = tmp_path_factory.mktemp("bundle")
            reference_model("biases").save_pretrained(folder / "checkpoint")
            exported[batch_size] = export_bundle(
                open_checkpoint(folder / "checkpoint"),
                folder / "bundle",
                batch_size=batch_size,
                prefill_len=16,
                max_seq_len=ROWS,
                num_guesses=3,
                row_buckets=(32,),
            )
        return exported[batch_size]

    return export


def test_a_bundle_has_graphs_of_several_tokens(bundles: Callable[[int], Manifest]):
    """GroupQueryAttention takes several tokens of one row alone."""
    for batch_size, rows, operator in (
        (1, [ROWS], "GroupQueryAttention"),
        (3, [32, ROWS], "TensorScatter"),
    ):
        bundle = bundles(batch_size)
        assert bundle.shape.num_guesses == 3
        found = [graph for graph in bundle.graphs if graph.role == "extend"]
        assert [graph.attended_rows for graph in found] == rows
        for graph in found:
            assert (graph.batch, graph.tokens, graph.logits) == (batch_size, 4, 4)
            assert operator in graph.ops
        # The step of one token is what it is without.
        (decode,) = (graph for graph in bundle.graphs if graph.role == "decode")
        assert "GroupQueryAttention" in decode.ops


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_bundles_tokens_are_those_without(
    bundles: Callable[[int], Manifest], batch_size: int, temperature: float
):
    """GroupQueryAttention and the standard operators take turns on one cache."""

    def texts(speculate: bool) -> list[Completion]:
        backend = OrtBackend(bundles(batch_size), speculate=speculate, threads=1)
        assert backend.shape.num_guesses == 3 * speculate
        return generate(backend, None, requests(temperature))

    plain, guessed = texts(False), texts(True)
    assert [*map(result_of, guessed)] == [*map(result_of, plain)]
    assert sum(done.num_guessed for done in guessed) > sum(done.num_right for done in guessed) > 0
    assert [done.ids for done in guessed] == [
        done.ids for done in generate(backend_of(num_guesses=0), None, requests(temperature))
    ]


def test_a_bundles_step_of_several_tokens_is_as_many_steps(bundles: Callable[[int], Manifest]):
    """At the edge of 32 rows, and in slots of different lengths."""
    bundle = bundles(3)
    several, single = (
        OrtBackend(bundle, speculate=speculate, threads=1) for speculate in (True, False)
    )
    ids = np.random.Philox(1).random_raw((3, ROWS)).astype(np.int64) % 101
    assert several._extend.first_positions == [0, 29]
    assert single._extend.first_positions == []
    for begin in (0, 12, 28, 29, ROWS - 4):
        positions = np.array([0, begin // 2, begin])
        for backend in (several, single):
            for slot, position in enumerate(positions):
                if position:
                    prefill_chunks(backend, slot, ids[slot, :position].tolist())
        fed = np.stack([row[p : p + 4] for row, p in zip(ids, positions, strict=True)])
        found = several.extend(fed, positions)
        expected = np.stack([single.decode(fed[:, i], positions + i).copy() for i in range(4)], 1)
        assert_close(found, expected)


def test_a_bundle_speculates_as_it_was_exported(bundles: Callable[[int], Manifest], tmp_path: Path):
    bundle = bundles(1)
    for speculate in ("lookup", "lookup:3"):
        assert open_source(bundle.folder, speculate=speculate).manifest is not None
    with pytest.raises(ValueError, match="speculate is lookup:4, .* lookup:3; say lookup, or exp"):
        open_source(bundle.folder, speculate="lookup:4")
    with pytest.raises(ValueError, match="no step of several .* with --speculate lookup:4"):
        check_exported("lookup:4", 0)
    plain = replace(bundle, shape=replace(bundle.shape, num_guesses=0))
    with pytest.raises(ValueError, match="export again with --speculate lookup"):
        OrtBackend(plain, speculate=True)
    with pytest.raises(ValueError, match="num_guesses is 0: there is no step"):
        OrtBackend(bundle).extend(np.zeros((1, 1), np.int64), np.zeros(1, np.int64))
    checkpoint = open_checkpoint(bundle.folder.parent / "checkpoint")
    with pytest.raises(ValueError, match="num_guesses is 8; with max_seq_len 8 it must be from 0"):
        export_bundle(checkpoint, tmp_path / "b", max_seq_len=8, prefill_len=8, num_guesses=8)


def test_a_bundles_step_of_several_tokens_is_verified(bundles: Callable[[int], Manifest]):
    found = verify_bundle(bundles(3), providers=["cpu"], targets=["cpu"])
    groups = {group.name: group for group in found.runs[0].groups}
    assert found.passed
    several = groups["several tokens"].comparison
    assert several is not None
    # Two prompts, then at 28, 29 and 60 rows prompts of 2, 2 and 4 chunks and 3 x 4 tokens.
    assert several.num_predictions == 2 + (2 + 12) + (2 + 12) + (4 + 12)


@pytest.mark.slow
def test_a_bundle_on_the_command_line(run, tmp_path: Path):
    demo = str(Path(__file__).parents[1] / "model" / "demo")
    bundle = str(tmp_path / "bundle")
    sizes = ("--max-seq-len", "64", "--prefill-len", "16", "--speculate", "lookup:3")
    assert run("export", demo, bundle, *sizes)[0] == 0
    words = ("run", bundle, "One day", "--max-new-tokens", "40", "--seed", "3")
    plain, guessed = run(*words), run(*words, "--speculate", "lookup")
    assert plain[0] == guessed[0] == 0
    assert guessed[1] == plain[1]
    code, _, said = run(*words, "--speculate", "lookup:5")
    assert code == 2
    assert "exported with lookup:3" in said


def test_the_benchmark_finds_the_same_tokens_and_guesses():
    sizes = {"backend": "eager", "max_seq_len": 256, "prefill_len": 128}
    models = [load(**sizes), load(**sizes, speculate="lookup")]
    ids = models[0].tokenizer.encode("Once upon a time there was a little dog. " * 20, bos=False)
    prompts = make_prompts(ids, [1])
    assert [*map(len, prompts.values())] == [50, 50]
    first = prompts["copying"][0]
    assert first == [1, *ids[:40], *ids[:40], *ids[:8]]
    said = compare(models, prompts["copying"][:2], temperature=0.0)
    assert said.startswith("2 of 2 prompts with the same tokens; ")
    guessed = re.search(r"(\d+) of (\d+) guesses right", said)
    assert guessed is not None
    assert 0 < int(guessed[1]) <= int(guessed[2])
