"""The server's answers: to OpenAI's own client, and to what no client should send."""

from __future__ import annotations

import json
import logging
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from llamac.export import export_bundle
from llamac.model.checkpoint import open_checkpoint
from llamac.model.load import DEMO_FOLDER
from llamac.runtime.language_model import LanguageModel
from llamac.runtime.load import load
from llamac.runtime.serve.run import listen
from serving import Served, serving

PROMPT = "Once upon a time"
CHAT = [{"role": "user", "content": "Once upon a time, there was a kind girl named Clara."}]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("serve") / "demo"
    return export_bundle(open_checkpoint(DEMO_FOLDER), out, batch_size=4).folder


@pytest.fixture(scope="module")
def served(bundle: Path) -> Iterator[Served]:
    with serving(bundle) as server:
        yield server


@pytest.fixture(scope="module")
def exact(bundle: Path) -> Iterator[Served]:
    """A server whose logits depend on nothing that ran before."""
    with serving(bundle, "--exact") as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[OpenAI]:
    with make_client(served) as opened:
        yield opened


@pytest.fixture(scope="module")
def model(bundle: Path) -> LanguageModel:
    """The same bundle in this process."""
    return load(bundle, threads=1)


def make_client(served: Served, **options: Any) -> OpenAI:
    url = f"http://127.0.0.1:{served.port}/v1"
    options = {"api_key": "none", "_strict_response_validation": True, **options}
    return OpenAI(base_url=url, max_retries=0, timeout=60, **options)


# --- OpenAI's client ---


def test_the_client_lists_completes_and_chats(client: OpenAI):
    (card,) = client.models.list().data
    assert (card.id, client.models.retrieve("demo").id) == ("demo", "demo")
    done = client.completions.create(model="demo", prompt=PROMPT, max_tokens=6, temperature=0)
    assert done.choices[0].text == ", there was a cheerful boy"
    assert done.choices[0].finish_reason == "length"
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (5, 6)
    chat = client.chat.completions.create(
        model="demo",
        messages=CHAT,
        max_completion_tokens=5,
        logprobs=True,
        top_logprobs=2,
        temperature=0,
    )
    tokens = chat.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == chat.choices[0].message.content
    assert [len(token.top_logprobs) for token in tokens] == [2] * 5
    assert tokens[0].top_logprobs[0].logprob == tokens[0].logprob
    assert bytes(tokens[0].bytes).decode() == tokens[0].token


def test_the_client_streams(served: Served):
    # The client's own type forbids the null finish_reason that OpenAI sends in streams.
    with make_client(served, _strict_response_validation=False) as client:
        whole = client.chat.completions.create(model="demo", messages=CHAT, max_tokens=9, seed=5)
        *chunks, last = client.chat.completions.create(
            model="demo",
            messages=CHAT,
            max_tokens=9,
            seed=5,
            stream=True,
            stream_options={"include_usage": True},
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == whole.choices[0].message.content
        assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
        assert last.usage.completion_tokens == whole.usage.completion_tokens == 9
        pieces = client.completions.create(model="demo", prompt="", max_tokens=4, stream=True)
        assert [piece.choices[0].finish_reason for piece in pieces][-1] == "length"


def test_the_client_gets_its_errors(client: OpenAI):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="demo", prompt="dog " * 2000)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-7")
    with pytest.raises(openai.BadRequestError, match="embeddings are not supported"):
        client.embeddings.create(model="demo", input="a")


def test_parts_and_tools_reach_the_template(served: Served, tmp_path: Path, bundle: Path):
    template = tmp_path / "tools.jinja"
    template.write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.role }} {{ m.content }}"
        "{% for c in m.tool_calls %}{{ c.function.arguments.x + 1 }}{% endfor %}{% endfor %}"
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
    )
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 41}'}}
    body = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "One"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ],
        "tools": [{"type": "function", "function": {"name": "look"}}],
    }
    with serving(bundle, "--chat-template", template) as other:
        tokens = other.ask("/tokenize", body)[1]["tokens"]
        text = other.ask("/detokenize", {"tokens": tokens})[1]["prompt"]
        assert text == "system Oneassistant 42look"
        tokens = other.ask("/tokenize", {**body, "tool_choice": "none"})[1]["tokens"]
        assert other.ask("/detokenize", {"tokens": tokens})[1]["prompt"] == text[:-4]


# --- structured output ---

PLACE = {
    "type": "object",
    "properties": {"kind": {"enum": ["park", "hill"]}, "size": {"type": "boolean"}},
    "required": ["kind", "size"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": PLACE}} for name in ("go", "see")
]


def test_a_response_format_is_kept(client: OpenAI):
    named = {"name": "place", "schema": PLACE}
    done = client.chat.completions.create(
        model="demo",
        messages=CHAT,
        n=8,
        response_format={"type": "json_schema", "json_schema": named},
    )
    for choice in done.choices:
        assert choice.finish_reason == "stop"
        assert json.loads(choice.message.content)["kind"] in ("park", "hill")


def test_a_tool_is_called_if_it_has_to_be(served: Served):
    body = {"messages": CHAT, "tools": TOOLS, "seed": 4, "n": 4}
    with make_client(served, _strict_response_validation=False) as client:
        whole = client.chat.completions.create(model="demo", tool_choice="required", **body)
        assert {c.message.tool_calls[0].function.name for c in whole.choices} <= {"go", "see"}
        assert {c.finish_reason for c in whole.choices} == {"tool_calls"}
        calls = [c.message.tool_calls[0].function for c in whole.choices]
        assert all(json.loads(call.arguments)["kind"] in ("park", "hill") for call in calls)
        stream = client.chat.completions.create(
            model="demo", tool_choice="required", stream=True, **body
        )
        told = {c.index: c for chunk in stream for c in chunk.choices if c.delta.tool_calls}
        streamed = [told[i].delta.tool_calls[0].function for i in range(4)]
        assert [(f.name, f.arguments) for f in streamed] == [(f.name, f.arguments) for f in calls]
        named = {"type": "function", "function": {"name": "see"}}
        only = client.chat.completions.create(model="demo", tool_choice=named, **body)
        assert {c.message.tool_calls[0].function.name for c in only.choices} == {"see"}


def test_completions_take_grammars_too(served: Served):
    body = {"prompt": PROMPT, "structured_outputs": {"regex": "[ab]{5}"}, "max_tokens": 50}
    (choice,) = served.ask("/v1/completions", body)[1]["choices"]
    assert re.fullmatch("[ab]{5}", choice["text"])


# --- the same tokens as without a server ---

OPTIONS = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"temperature": 0, "logit_bias": {"261": -100, "290": 2}},
    {"temperature": 0.7, "stop": [" there", "zzz"]},
    {"temperature": 1.0, "stop_token_ids": [290]},
    {"temperature": 1.2, "ignore_eos": True, "max_tokens": 150},
    {"temperature": 0, "stop_token_ids": [448, 290], "min_tokens": 12},
    {},
]


def ours(options: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's options under llamac's names."""
    named = {"max_new_tokens": 24, "seed": 7, **options}
    if "max_tokens" in named:
        named["max_new_tokens"] = named.pop("max_tokens")
    if "stop_token_ids" in named:
        named["stop_ids"] = tuple(named.pop("stop_token_ids"))
    if "logit_bias" in named:
        named["logit_bias"] = tuple((int(k), v) for k, v in named["logit_bias"].items())
    if named.pop("ignore_eos", False):
        named["eos_ids"] = ()
    return {**named, "stop": tuple(named.get("stop", ()))}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_give_what_they_give_without_a_server(
    served: Served, model: LanguageModel, options: dict[str, Any]
):
    body = {"prompt": PROMPT, "max_tokens": 24, "seed": 7, **options}
    (done,) = model.generate(PROMPT, **ours(options))
    (choice,) = served.ask("/v1/completions", body)[1]["choices"]
    assert (choice["text"], choice["finish_reason"]) == (done.text, done.finish_reason)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_stream_tells_what_an_answer_tells(exact: Served, path: str, options: dict[str, Any]):
    logprobs: Any = {"logprobs": 2} if path == "completions" else {"logprobs": True}
    prompt: Any = {"prompt": PROMPT} if path == "completions" else {"messages": CHAT}
    body = {**prompt, **logprobs, "max_tokens": 24, "seed": 7, "n": 2, **options}
    path = f"/v1/{path}"
    whole = exact.ask(path, body)[1]
    *events, usage, last = exact.stream(path, {**body, "stream_options": {"include_usage": True}})
    assert last == "[DONE]"
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert usage["usage"][name] == whole["usage"][name]
    assert usage["choices"] == []
    for choice in whole["choices"]:
        own = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        texts = [c["text"] if "text" in c else c["delta"].get("content", "") for c in own]
        assert "".join(texts) == choice.get("text", choice.get("message", {}).get("content"))
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == [choice["finish_reason"]]
        assert own[-1]["finish_reason"]
        told = [c["logprobs"] for c in own if c["logprobs"]]
        assert [x for part in told for x in flat(part)] == flat(choice["logprobs"])


def flat(logprobs: dict[str, Any]) -> list[Any]:
    """Token by token: its name, its log-probability, its alternatives."""
    if "content" in logprobs:
        return [(x["token"], x["logprob"], len(x["top_logprobs"])) for x in logprobs["content"]]
    names = ("tokens", "token_logprobs", "text_offset")
    tops = [list(top) for top in logprobs["top_logprobs"]]
    return [*zip(*(logprobs[name] for name in names), tops, strict=True)]


def test_it_is_right_to_a_rounding_beside_others_and_exact_if_asked(
    served: Served, bundle: Path, model: LanguageModel
):
    body = {"prompt": PROMPT, "max_tokens": 24, "seed": 7, "logprobs": 0}
    (done,) = model.generate(PROMPT, max_new_tokens=24, seed=7, logprobs=0)

    def logprobs(server: Served, n: int) -> list[float]:
        choice = server.ask("/v1/completions", {**body, "n": n})[1]["choices"][0]
        assert choice["text"] == done.text
        return choice["logprobs"]["token_logprobs"]

    for n in (1, 3):
        assert logprobs(served, n) == pytest.approx(done.logprobs, abs=1e-5)
    with serving(bundle, "--exact") as exact:
        for n in (1, 3, 1):
            assert logprobs(exact, n) == done.logprobs


def test_samples_and_lists_of_prompts(served: Served, model: LanguageModel):
    prompts = [PROMPT, "The dog"]
    body = {"prompt": prompts, "n": 3, "max_tokens": 8, "seed": 2}
    answer = served.ask("/v1/completions", body)[1]
    done = model.generate(*prompts, n=3, max_new_tokens=8, seed=2)
    assert [choice["text"] for choice in answer["choices"]] == [d.text for d in done]
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert answer["usage"]["prompt_tokens"] == len(done[0].prompt_ids) + len(done[3].prompt_ids)
    ids = [list(done[0].prompt_ids), list(done[3].prompt_ids)]
    again = served.ask("/v1/completions", {**body, "prompt": ids})[1]
    assert [c["text"] for c in again["choices"]] == [c["text"] for c in answer["choices"]]
    single = served.ask("/v1/completions", {**body, "prompt": ids[0]})[1]
    assert [c["text"] for c in single["choices"]] == [d.text for d in done[:3]]


def test_best_of_gives_the_likeliest(served: Served, model: LanguageModel):
    body = {"prompt": PROMPT, "n": 1, "best_of": 5, "max_tokens": 8, "seed": 2}
    (choice,) = served.ask("/v1/completions", body)[1]["choices"]
    done = model.generate(PROMPT, n=5, max_new_tokens=8, seed=2, logprobs=0)
    best = max(done, key=lambda d: sum(d.logprobs) / len(d.logprobs))
    assert (choice["text"], choice["logprobs"]) == (best.text, None)


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_an_echoed_prompt_has_the_logprobs_of_score(
    served: Served, model: LanguageModel, run, bundle: Path, tmp_path: Path, max_tokens: int
):
    (tmp_path / "text").write_text("The little dog went to the park.")
    out = run("score", bundle, "--threads", "1", "--text-file", tmp_path / "text", "--json")[1]
    ids = model.tokenizer.encode("The little dog went to the park.")
    body = {"prompt": [ids], "echo": True, "logprobs": 1, "max_tokens": max_tokens}
    body["temperature"] = 0
    (choice,) = served.ask("/v1/completions", body)[1]["choices"]
    told = choice["logprobs"]
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    assert told["token_logprobs"][1 : len(ids)] == json.loads(out)["logprobs"]
    assert len(told["tokens"]) == len(ids) + max_tokens
    for token, value, top in zip(
        told["tokens"][1:], told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True
    ):
        assert top[token] == value
    assert choice["text"].startswith("The little dog went to the park.")
    for token, offset in zip(told["tokens"][2:], told["text_offset"][2:], strict=True):
        assert choice["text"][offset - 1 :].startswith(token)  # the format's own space is gone
    *events, last = served.stream("/v1/completions", body)
    assert last == "[DONE]"
    first = events[0]["choices"][0]
    assert (first["text"], first["finish_reason"]) == (choice["text"], None)
    assert first["logprobs"]["tokens"] == told["tokens"]


def test_turns_of_a_chat_reuse_rows(served: Served):
    messages = [{"role": "user", "content": "Once there was a red ball on the hill by the lake."}]
    first = served.ask("/v1/chat/completions", {"messages": messages, "max_tokens": 8})[1]
    messages += [first["choices"][0]["message"], {"role": "user", "content": "It was big."}]
    second = served.ask("/v1/chat/completions", {"messages": messages, "max_tokens": 8})[1]
    reused = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert reused >= first["usage"]["prompt_tokens"]


# --- what is refused ---


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ([1], None, "the body must be a JSON object"),
        (b"{", None, "the body is not JSON"),
        (b"\xff", None, "the body is not JSON"),
        (b"[" * 100_000, None, "the body is not JSON"),
        ({}, "prompt", "prompt is None; it must be"),
        ({"prompt": [[]]}, "prompt", "prompt has no token"),
        ({"prompt": [1, True]}, "prompt", "it must be a text, token ids"),
        ({"prompt": [99999]}, "prompt", "ids outside 0 to 2047"),
        ({"prompt": "a", "temperature": "hot"}, "temperature", "it must be a number"),
        ({"prompt": "a", "temperature": -1}, "temperature", "it must be 0 or above"),
        ({"prompt": "a", "top_p": 1.5}, "top_p", "it must be in"),
        ({"prompt": "a", "max_tokens": 2.5}, "max_tokens", "it must be an integer"),
        ({"prompt": "a", "n": 0}, "n", "it must be an integer from 1 to 128"),
        ({"prompt": "a", "n": 3, "best_of": 2}, "best_of", "at least n, 3"),
        ({"prompt": "a", "stop": [1]}, "stop", "it must be a text or a list"),
        ({"prompt": "a", "stream": "yes"}, "stream", "it must be true or false"),
        ({"prompt": "a", "logprobs": True}, "logprobs", "it must be an integer"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "from token ids to numbers"),
        ({"prompt": "a", "logit_bias": {"2048": 1}}, "logit_bias", "of ids below 2048"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "suffix is not supported"),
        ({"prompt": "\ud800"}, "prompt", "half a character"),
    ],
)
def test_bad_completions(served: Served, body: Any, param: str | None, message: str):
    status, answer, _ = served.ask("/v1/completions", body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert message in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": CHAT, "tools": "all"}, "tools"),
        ({"messages": CHAT, "tool_choice": "required"}, "tool_choice"),
        ({"messages": CHAT, "tools": TOOLS, "tool_choice": "go"}, "tool_choice"),
        ({"messages": CHAT, "tools": [{}], "tool_choice": "required"}, "tools"),
        ({"messages": CHAT, "response_format": {"type": "xml"}}, "response_format"),
        ({"messages": CHAT, "response_format": {"type": "json_schema"}}, "json_schema"),
        ({"messages": CHAT, "structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"messages": CHAT, "audio": {"voice": "x"}}, "audio"),
        ({"messages": CHAT, "modalities": ["audio"]}, "modalities"),
        ({"messages": CHAT, "top_logprobs": 99, "logprobs": True}, "top_logprobs"),
    ],
)
def test_bad_chats(served: Served, body: Any, param: str):
    status, answer, _ = served.ask("/v1/chat/completions", body)
    assert (status, answer["error"]["param"]) == (400, param)


def test_what_nobody_knows_is_ignored_and_null_is_nothing(served: Served):
    body = {"prompt": PROMPT, "max_tokens": 2, "color": "red", "user": "me", "stop": None}
    assert served.ask("/v1/completions", {**body, "suffix": None, "logit_bias": None})[0] == 200


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [("/nowhere", None, 404), ("/v1/completions", None, 405), ("/v1/models", {}, 405)],
)
def test_other_paths_have_the_same_errors(served: Served, path: str, body: Any, status: int):
    got, answer, _ = served.ask(path, body)
    assert got == status
    assert answer["error"].keys() == {"message", "type", "param", "code"}


# --- tokens, metrics, doors ---


def test_tokens_there_and_back(served: Served, model: LanguageModel):
    ids = model.tokenizer.encode(PROMPT)
    answer = served.ask("/tokenize", {"prompt": PROMPT})[1]
    assert answer == {"tokens": ids, "count": len(ids), "max_model_len": 512}
    bare = served.ask("/tokenize", {"prompt": PROMPT, "add_special_tokens": False})[1]
    assert bare["tokens"] == ids[1:]
    for name, special_id in (("<s>", 1), ("</s>", 2)):
        body = {"prompt": name, "add_special_tokens": False}
        assert served.ask("/tokenize", body)[1]["tokens"] == [special_id]
        body = {"prompt": f"{name} {name}", "add_special_tokens": False}
        assert special_id not in served.ask("/tokenize", body)[1]["tokens"]
    assert served.ask("/detokenize", {"tokens": ids})[1] == {"prompt": PROMPT}
    assert served.ask("/detokenize", {"tokens": [5000]})[0] == 400
    about = served.ask("/tokenizer_info")[1]
    assert (about["bos_token"], about["eos_token"]) == ("<s>", "</s>")
    assert "messages" in about["chat_template"]


def test_an_answer_on_a_kept_connection_does_not_wait_for_acknowledgement():
    """It used to: each answer but the first took 40 ms longer."""
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        with listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_metrics_count(served: Served):
    before = served.gauge("generation_tokens_total")
    served.ask("/v1/completions", {"prompt": PROMPT, "max_tokens": 9, "ignore_eos": True})
    assert served.gauge("generation_tokens_total") == before + 9
    assert served.gauge("num_requests_running") == served.gauge("num_requests_waiting") == 0


def test_requests_have_an_id(served: Served):
    assert served.ask("/health", headers={"x-request-id": "a-1"})[2]["x-request-id"] == "a-1"
    drawn = [served.ask("/health", headers={"x-request-id": "a b"})[2] for _ in range(2)]
    assert drawn[0]["x-request-id"] != drawn[1]["x-request-id"] != "a b"


def test_the_log_tells_no_prompt(served: Served):
    served.ask("/v1/completions", {"prompt": "my secret word", "max_tokens": 1})
    assert any("POST /v1/completions 200" in line for line in served.lines)
    assert "secret" not in "".join(served.lines)


def test_keys_origins_and_bodies(bundle: Path, tmp_path: Path):
    keys = tmp_path / "keys"
    keys.write_text("alpha\n\nbeta\n")
    words = ("--api-key-file", keys, "--cors-origin", "http://a.example")
    with serving(bundle, *words, "--max-body-bytes", "2000", "--name", "tale") as served:
        body = {"prompt": "The red ball was lost in the park", "max_tokens": 2}
        for key in (None, "Bearer gamma", "alpha beta"):
            sent = {} if key is None else {"Authorization": key}
            status, answer, _ = served.ask("/v1/completions", body, headers=sent)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert served.ask("/health")[0] == 200
        reused = []
        for key in ("alpha", "beta", "alpha"):
            sent = {"Authorization": f"Bearer {key}"}
            answer = served.ask("/v1/completions", body, headers=sent)[1]
            assert answer["model"] == "tale"
            reused.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0)
        assert reused == [False, False, True]  # rows are not shared between keys
        sent = {"Authorization": "Bearer alpha", "Origin": "http://a.example"}
        status, answer, headers = served.ask("/v1/completions", b"x" * 2001, headers=sent)
        assert (status, headers["access-control-allow-origin"]) == (413, "http://a.example")
        assert "more than 2000 bytes" in answer["error"]["message"]
        headers = served.ask("/health", headers={"Origin": "http://b.example"})[2]
        assert "access-control-allow-origin" not in headers


def test_it_serves_without_torch(bundle: Path, tmp_path: Path):
    for name in ("torch", "onnx", "onnxscript", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} was imported')\n")
    with serving(bundle, environment={"PYTHONPATH": str(tmp_path)}) as served:
        assert served.ask("/v1/completions", {"prompt": PROMPT, "max_tokens": 2})[0] == 200
        assert served.ask("/v1/chat/completions", {"messages": CHAT, "max_tokens": 2})[0] == 200


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("a", "b"), "one source too many"),
        (("--max-queue", "-1"), "--max-queue is -1"),
        (("--request-timeout", "0"), "--request-timeout is 0"),
        (("--api-key-file", "no/keys"), "no/keys"),
    ],
)
def test_what_serve_refuses(refused, words: tuple[str, ...], message: str):
    refused(message, "serve", "--port", "0", *words)


def test_a_model_that_cannot_be_loaded_ends_the_server(run):
    code, out, err = run("serve", "--port", "0", "nowhere")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("llamac: nowhere: no such folder")


def test_what_comes_after_a_server_logs_as_before(run):
    run("serve", "--port", "0", "nowhere")
    run("cache")
    assert not logging.getLogger("llamac.model").isEnabledFor(logging.INFO)


def test_bodies_of_all_kinds_at_once(served: Served):
    bodies = [{"prompt": PROMPT, "max_tokens": n % 7 + 1, "n": n % 3 + 1} for n in range(24)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda body: served.ask("/v1/completions", body)[1], bodies))
    for body, answer in zip(bodies, answers, strict=True):
        assert len(answer["choices"]) == body["n"], json.dumps(answer)
