"""Conversations that are left and taken up again."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from llamac.export import export_bundle
from llamac.model.checkpoint import open_checkpoint
from llamac.model.load import DEMO_FOLDER
from llamac.runtime.cli.chat import Conversation
from llamac.runtime.language_model import LanguageModel
from llamac.runtime.load import load
from llamac.runtime.ort.buffers import CacheBuffers
from llamac.runtime.scheduler import run_requests
from llamac.runtime.session import Session, read_session, write_session

FIRST = "Once upon a time, there was a kind girl named Clara who lived by the sea."
SECOND = "One day she found a red ball in the sand."


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("session") / "demo"
    return export_bundle(open_checkpoint(DEMO_FOLDER), out).folder


def open_model(source: Path, **options) -> LanguageModel:
    if source == DEMO_FOLDER:
        options = {"backend": "eager", **options}
    return load(source, threads=1, keep_prefixes=True, **options)


def turn(conversation: Conversation, text: str) -> tuple[str, int]:
    """What is answered, and how many of the prompt's rows were there already."""
    prompt_ids = conversation.ask(text, max_new_tokens=12)
    assert prompt_ids is not None
    asked = conversation.model.request(prompt_ids, max_new_tokens=12, seed=8)
    (done,) = run_requests(conversation.model.scheduler, [asked])
    conversation.messages.append({"role": "assistant", "content": done.text})
    conversation.ids = (*prompt_ids, *done.ids)
    return done.text, done.num_reused


@pytest.mark.parametrize("ends_in", ["checkpoint", "bundle"])
@pytest.mark.parametrize("begins_in", ["checkpoint", "bundle"])
def test_a_session_goes_on_in_any_backend(
    bundle: Path, tmp_path: Path, begins_in: str, ends_in: str
):
    sources = {"checkpoint": DEMO_FOLDER, "bundle": bundle}
    first = Conversation(open_model(sources[begins_in]))
    turn(first, FIRST)
    write_session(tmp_path / "s", first.session(8))
    expected, _ = turn(first, SECOND)

    later = Conversation(open_model(sources[ends_in]))
    later.restore(read_session(tmp_path / "s"))
    answer, num_reused = turn(later, SECOND)
    assert answer == expected
    assert num_reused >= len(later.model.tokenizer.encode(FIRST))


def test_a_session_is_what_was_written(tmp_path: Path):
    session = Session(
        messages=[{"role": "user", "content": "caf\u00e9 \u6d77"}],
        seed=2**64 - 1,
        ids=np.arange(3),
        rows=np.random.default_rng(0).normal(size=(4, 2, 3, 5)).astype(np.float32),
    )
    write_session(tmp_path / "s", session)
    back = read_session(tmp_path / "s")
    assert (back.messages, back.seed) == (session.messages, session.seed)
    np.testing.assert_array_equal(back.ids, session.ids)
    np.testing.assert_array_equal(back.rows, session.rows)


def test_damage_is_found_wherever_it_is(tmp_path: Path):
    file = tmp_path / "s"
    rows = np.ones((2, 1, 3, 4), np.float32)
    write_session(file, Session(messages=[], seed=1, ids=np.arange(3), rows=rows))
    whole = file.read_bytes()
    for place in range(0, len(whole), 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="is damaged|is no session"):
            read_session(file)
    file.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="is no session"):
        read_session(file)


def test_another_models_session_is_refused(tmp_path: Path):
    first = Conversation(open_model(DEMO_FOLDER))
    turn(first, FIRST)
    session = first.session(8)
    other = Conversation(open_model(DEMO_FOLDER))
    for buffer in other.model.backend.cache.buffers:
        buffer.zero_()
    for parameter in other.model.backend._model.parameters():
        with torch.no_grad():
            parameter.mul_(torch.linspace(0.5, -1.0, parameter.shape[-1]))
    with pytest.raises(ValueError, match="the cache rows are another model's"):
        other.restore(session)
    small = Conversation(open_model(DEMO_FOLDER, max_seq_len=16))  # too small: fed again, in part
    small.restore(session)
    assert small.messages == first.messages


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_of_16_bits_come_back_as_they_were(dtype: str):
    cache = CacheBuffers((2, 3, 5, 4), 2, dtype, device_id=None)
    exact = np.random.default_rng(1).normal(size=(4, 3, 5, 4)).astype(np.float32)
    rounded = exact.astype(dtype if dtype == "float16" else ml_dtypes.bfloat16)
    cache.write_rows(1, exact)
    np.testing.assert_array_equal(cache.read_rows(1, 5), rounded.astype(np.float32))
    assert not cache.read_rows(0, 5).any()
    cache.write_rows(0, cache.read_rows(1, 5))
    np.testing.assert_array_equal(cache.read_rows(0, 5), cache.read_rows(1, 5))


def test_chat_goes_on_where_it_was_left(run, refused, bundle: Path, tmp_path: Path, monkeypatch):
    def chat(*lines: str, words: tuple[str, ...] = ()) -> str:
        text = "\n".join(lines) + "\n"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        source, *more = words or (bundle,)
        code, out, err = run("chat", source, "--threads", "1", "--max-new-tokens", "9", *more)
        assert code == 0, err
        return out

    whole = chat(FIRST, SECOND, words=(bundle, "--seed", "3"))
    file = tmp_path / "talk"
    begun = chat(FIRST, words=(bundle, "--seed", "3", "--session", file))
    assert begun + chat(SECOND, words=(bundle, "--session", file)) == whole
    assert len(read_session(file).messages) == 4
    # The same in torch, and the seed is the session's.
    assert chat("/exit", words=(DEMO_FOLDER, "--backend", "eager", "--session", file)) == ""
    refused("--system is", "chat", bundle, "--session", file, "--system", "Be brief.")
    file.write_bytes(b"x")
    refused("is no session", "chat", bundle, "--session", file)
