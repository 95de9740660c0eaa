"""Programs that speak OpenAI's interface, unmodified, against a server of the demo model.

What they need pins much of what it needs, so that it wants an environment of its own; tests are
skipped for what isn't there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llamac.export import export_bundle
from llamac.model.checkpoint import open_checkpoint
from llamac.model.load import DEMO_FOLDER
from serving import Served, serving

pytestmark = [
    pytest.mark.slow,
    # Others' libraries warn of each other's.
    pytest.mark.filterwarnings("ignore"),
]

INSTALL = "pip install 'llamac[clients]'"
PROMPT = "Once upon a time"
CHAT = [{"role": "user", "content": "Once there was a red ball on the hill."}]
STOP = " the"
GREEDY = {"max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clients") / "demo"
    return export_bundle(open_checkpoint(DEMO_FOLDER), out, batch_size=4).folder


@pytest.fixture(scope="module")
def served(bundle: Path) -> Iterator[Served]:
    with serving(bundle) as server:
        yield server


@pytest.fixture
def url(served: Served) -> str:
    return f"http://127.0.0.1:{served.port}/v1"


def completed(served: Served, **options: Any) -> str:
    body = {"prompt": PROMPT, **GREEDY, **options}
    return served.ask("/v1/completions", body)[1]["choices"][0]["text"]


def chatted(served: Served, **options: Any) -> str:
    body = {"messages": CHAT, **GREEDY, **options}
    answer = served.ask("/v1/chat/completions", body)[1]
    return answer["choices"][0]["message"]["content"]


def assert_left_alone(served: Served) -> None:
    """Nothing runs on for a stream that was left."""
    deadline_s = time.monotonic() + 10
    while served.gauge("num_requests_running"):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_the_stop_text_stops_these_prompts(served: Served):
    for made in (completed, chatted):
        whole, stopped = made(served), made(served, stop=[STOP])
        assert whole.partition(STOP)[0] == stopped != whole


def test_litellm(served: Served, url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it looks for prices outside
    litellm = pytest.importorskip("litellm", reason=INSTALL)
    base: dict[str, Any] = {"api_base": url, "api_key": "none", **GREEDY}
    chat = {"model": "openai/demo", "messages": CHAT, **base}
    assert litellm.completion(**chat).choices[0].message.content == chatted(served)
    pieces = litellm.completion(**chat, stream=True)
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == chatted(served)
    stopped = litellm.completion(**chat, stop=[STOP]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (chatted(served, stop=STOP), "stop")
    plain = {"model": "text-completion-openai/demo", "prompt": PROMPT, **base}
    assert litellm.text_completion(**plain).choices[0].text == completed(served)


def test_langchain(served: Served, url: str):
    langchain = pytest.importorskip("langchain_openai", reason=INSTALL)
    base: dict[str, Any] = {"base_url": url, "api_key": "none", "model": "demo", "temperature": 0}
    chat = langchain.ChatOpenAI(**base, max_tokens=24)
    said = CHAT[0]["content"]
    assert chat.invoke(said).content == chatted(served)
    assert "".join(piece.content for piece in chat.stream(said)) == chatted(served)
    assert chat.invoke(said, stop=[STOP]).content == chatted(served, stop=STOP)
    plain = langchain.OpenAI(**base, max_tokens=24)
    assert plain.batch([PROMPT, PROMPT]) == [completed(served)] * 2
    long = langchain.ChatOpenAI(**base, max_tokens=480, extra_body={"ignore_eos": True})
    stream = long.stream(said)
    next(stream)
    stream.close()
    assert_left_alone(served)


def test_llama_index(served: Served, url: str):
    openai_like = pytest.importorskip("llama_index.llms.openai_like", reason=INSTALL)
    from llama_index.core.llms import ChatMessage

    base: dict[str, Any] = {"api_base": url, "api_key": "none", "model": "demo", **GREEDY}
    plain = openai_like.OpenAILike(**base, is_chat_model=False, context_window=512)
    assert plain.complete(PROMPT).text == completed(served)
    assert "".join(piece.delta for piece in plain.stream_complete(PROMPT)) == completed(served)
    chat = openai_like.OpenAILike(**base, is_chat_model=True, context_window=512)
    messages = [ChatMessage(**CHAT[0])]
    assert chat.chat(messages).message.content == chatted(served)
    pieces = chat.stream_chat(messages)
    assert "".join(piece.delta or "" for piece in pieces) == chatted(served)
    assert chat.chat(messages, stop=[STOP]).message.content == chatted(served, stop=STOP)


def test_lm_eval_reads_the_log_likelihoods_of_score(
    served: Served, url: str, bundle: Path, run, tmp_path: Path
):
    models = pytest.importorskip("lm_eval.models.openai_completions", reason=INSTALL)
    from lm_eval.api.instance import Instance

    texts = ["The little dog went to the park.", "Tom had a red ball. One day he ran."]
    client = models.LocalCompletionsAPI(
        base_url=f"{url}/completions", model="demo", max_length=512, tokenizer_backend="remote"
    )
    # It puts BOS before a text, as score does, where there is no context.
    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=("", text), idx=i)
        for i, text in enumerate(texts)
    ]
    for text, (log_likelihood, is_greedy) in zip(texts, client.loglikelihood(asked), strict=True):
        (tmp_path / "text").write_text(text)
        words = ("--threads", "1", "--text-file", tmp_path / "text", "--json")
        out = run("score", bundle, *words)[1]
        assert log_likelihood == pytest.approx(sum(json.loads(out)["logprobs"]), abs=1e-6)
        assert not is_greedy
