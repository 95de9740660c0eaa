"""The Python API: one model, many callers."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from llamac.model.load import DEMO_FOLDER
from llamac.runtime.language_model import LanguageModel
from llamac.runtime.load import load

PROMPTS = ("Once upon a time", "Tom had a red boat.", "One day", "The cat")


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load(backend="eager", max_seq_len=64, prefill_len=8, batch_size=3, threads=1)


@pytest.fixture(scope="module")
def alone() -> dict[str, str]:
    """What each prompt gives where nobody else asks."""
    single = load(backend="eager", max_seq_len=64, prefill_len=8, threads=1)
    return {prompt: single.generate(prompt, **OPTIONS)[0].text for prompt in PROMPTS}


OPTIONS = {"max_new_tokens": 24, "temperature": 0.8, "seed": 3}


def test_two_streams_read_in_turns(model: LanguageModel, alone: dict[str, str]):
    # Each call had a scheduler of its own, and all of them took slot 0.
    first, second = (model.stream(prompt, **OPTIONS) for prompt in PROMPTS[:2])
    pieces: tuple[list[str], list[str]] = ([], [])
    for _ in range(60):
        pieces[0].extend(next(first, "") for _ in range(2))
        pieces[1].append(next(second, ""))
    assert ["".join(texts) for texts in pieces] == [alone[prompt] for prompt in PROMPTS[:2]]


def test_a_generate_in_the_middle_of_a_stream(model: LanguageModel, alone: dict[str, str]):
    events = model.stream(PROMPTS[0], **OPTIONS)
    begin = [next(events) for _ in range(5)]
    beside = model.generate(*PROMPTS, **OPTIONS)
    assert [done.text for done in beside] == [alone[prompt] for prompt in PROMPTS]
    assert "".join([*begin, *events]) == alone[PROMPTS[0]]


def test_eight_threads(model: LanguageModel, alone: dict[str, str]):
    def ask(index: int) -> str:
        prompt = PROMPTS[index % len(PROMPTS)]
        if index % 2:
            return "".join(model.stream(prompt, **OPTIONS))
        return model.generate(prompt, **OPTIONS)[0].text

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, range(16)))
    assert texts == [alone[PROMPTS[index % len(PROMPTS)]] for index in range(16)]
    assert model.scheduler.idle


def test_a_stream_that_is_let_go_frees_its_slot(model: LanguageModel, alone: dict[str, str]):
    for _ in range(4):
        next(model.stream(PROMPTS[0], **OPTIONS))
    assert model.scheduler.idle
    assert model.generate(PROMPTS[1], **OPTIONS)[0].text == alone[PROMPTS[1]]


def test_samples_of_a_prompt(model: LanguageModel):
    texts = [done.text for done in model.generate(PROMPTS[0], n=3, **OPTIONS)]
    assert len({*texts}) == 3
    second = model.generate(PROMPTS[0], **{**OPTIONS, "sample_index": 1})
    assert second[0].text == texts[1]


def test_a_row_of_nan_is_an_error_of_its_request(model: LanguageModel, alone: dict[str, str]):
    class Broken:
        """The backend, with NaN in the second slot's decodes."""

        shape = model.backend.shape
        prefill = staticmethod(model.backend.prefill)

        def decode(self, ids, positions):
            logits = model.backend.decode(ids, positions).copy()
            logits[1] = np.nan
            return logits

    broken = LanguageModel(Broken(), model.tokenizer)
    done = broken.generate(*PROMPTS[:3], **OPTIONS)
    assert [one.finish_reason == "error" for one in done] == [False, True, False]
    assert done[0].text == alone[PROMPTS[0]]
    assert done[2].text == alone[PROMPTS[2]]
    lone = LanguageModel(Broken(), model.tokenizer)
    streams = [lone.stream(prompt, **OPTIONS) for prompt in PROMPTS[:2]]
    next(streams[0])
    with pytest.raises(ValueError, match="the largest logit is nan"):
        list(streams[1])


def test_the_models_own_sampling_settings(tmp_path: Path):
    folder = shutil.copytree(DEMO_FOLDER, tmp_path / "model")
    said: list[str] = []
    config = folder / "generation_config.json"

    def defaults(text: str) -> dict:
        config.write_text(text)
        said.clear()
        model = load(folder, backend="eager", max_seq_len=32, prefill_len=8, announce=said.append)
        return dict(model.defaults)

    assert defaults('{"temperature": 0.6, "top_p": 0.9, "top_k": null}') == {
        "temperature": 0.6,
        "top_p": 0.9,
    }
    assert said[0].endswith("generation_config.json: temperature 0.6, top_p 0.9")
    assert defaults('{"do_sample": false, "temperature": 0.6}') == {"temperature": 0.0}
    assert defaults('{"temperature": 0.8}') == {"temperature": 0.8}
    assert "sampling" not in said[0]  # llamac's own number needs no word
    with pytest.raises(ValueError, match="generation_config.json: top_p is 1.5; it must be in"):
        defaults('{"top_p": 1.5}')
    with pytest.raises(ValueError, match="generation_config.json: temperature is 'hot'; it must"):
        defaults('{"temperature": "hot"}')


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "ort"}, "backend ort runs bundles; llamac export a model first"),
        ({"backend": "tpu"}, "backend is 'tpu'; it must be compile, eager or ort"),
        ({"provider": "cpu"}, "provider is an option of bundles; backend compile goes without it"),
    ],
)
def test_options_that_do_not_fit_the_source(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        load(**options)
