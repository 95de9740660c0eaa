"""From the body of a request to what the scheduler takes."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..language_model import RequestOptions, make_request
from ..request import Request
from .conversation import read_messages, read_tool_choice
from .errors import ApiError
from .fields import Fields, is_ids
from .served_model import ServedModel
from .structured import read_grammar

__all__ = ["Asked", "read_chat", "read_completions"]

_MAX_CHOICES = 128
_MAX_PROMPTS = 2048
_MAX_STOPS = 16
_MAX_LOGPROBS = 20
_DEFAULT_MAX_TOKENS = 16  # of completions, as OpenAI has it; an answer may fill the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What one HTTP request asks for.

    Attributes:
        requests: One for each sample; those of the first prompt first.
        num_choices: How many samples of each prompt are given.
        num_samples: How many of each are made; the best are given.
        logprobs: Alternatives of each token, or None.
        echo: For each prompt its text, which the choice begins with; None without echo.
        max_tokens: 0 gives the prompt alone; the sample that is made then is not told.
        stream: Whether the answer is a stream of events.
        usage: Whether such a stream tells the number of tokens.
        calls_tool: Whether each text is a tool's call, written as JSON.
    """

    requests: tuple[Request, ...]
    num_choices: int
    num_samples: int
    logprobs: int | None
    echo: tuple[str, ...] | None
    max_tokens: int | None
    stream: bool
    usage: bool
    calls_tool: bool = False

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        prompts = self.requests[:: self.num_samples]
        return sum(len(request.prompt_ids) for request in prompts)


def read_completions(fields: Fields, model: ServedModel, scope: RequestOptions) -> Asked:
    """Reads the body of /v1/completions.

    Args:
        fields: The body.
        model: Whose tokenizer and sizes count.
        scope: Options that the server sets.

    Raises:
        ApiError: A field is wrong or not supported; the message names it.
    """
    fields.refuse("suffix", "use_beam_search", "prompt_embeds")
    prompts = _prompts(fields, model)
    n = fields.integer("n", 1, _MAX_CHOICES) or 1
    best_of = fields.integer("best_of", 1, _MAX_CHOICES) or n
    stream = fields.flag("stream")
    if best_of < n or (stream and best_of > n):
        raise ApiError(
            400,
            f"best_of is {best_of}; it must be at least n, {n}, and n in a stream",
            param="best_of",
        )
    logprobs = fields.integer("logprobs", 0, _MAX_LOGPROBS)
    echo = fields.flag("echo")
    max_tokens = fields.integer("max_tokens", 0, 2**31)
    if max_tokens is None:
        max_tokens = _DEFAULT_MAX_TOKENS
    options: dict[str, Any] = {
        **_sampling(fields, model),
        **scope,
        "grammar": read_grammar(fields),
        "logprobs": 0 if logprobs is None and best_of > n else logprobs,
        "prompt_logprobs": logprobs if echo else None,
    }
    requests = [
        _request(fields, model, ids, max_tokens, {**options, "sample_index": index})
        for ids, _ in prompts
        for index in range(best_of)
    ]
    return Asked(
        requests=tuple(requests),
        num_choices=n,
        num_samples=best_of,
        logprobs=logprobs,
        echo=tuple(text for _, text in prompts) if echo else None,
        max_tokens=max_tokens,
        stream=stream,
        usage=stream and fields.object("stream_options").flag("include_usage"),
    )


def read_chat(fields: Fields, model: ServedModel, scope: RequestOptions) -> Asked:
    """Reads the body of /v1/chat/completions; see read_completions."""
    fields.refuse("audio", "web_search_options", "functions", "function_call", "use_beam_search")
    modalities = fields.texts("modalities", _MAX_STOPS)
    if set(modalities) - {"text"}:
        raise ApiError(400, "modalities other than text are not supported", param="modalities")
    messages, tools = read_messages(fields)
    forced = read_tool_choice(fields, tools)
    ids = model.render(messages, tools)
    model.check_prompt(ids, "messages")
    n = fields.integer("n", 1, _MAX_CHOICES) or 1
    logprobs = None
    if fields.flag("logprobs"):
        logprobs = fields.integer("top_logprobs", 0, _MAX_LOGPROBS) or 0
    max_tokens = fields.integer("max_completion_tokens", 1, 2**31)
    if max_tokens is None:
        max_tokens = fields.integer("max_tokens", 1, 2**31)
    options: dict[str, Any] = {
        **_sampling(fields, model),
        **scope,
        "grammar": forced or read_grammar(fields),
        "logprobs": logprobs,
    }
    requests = [
        _request(fields, model, ids, max_tokens, {**options, "sample_index": index})
        for index in range(n)
    ]
    stream = fields.flag("stream")
    return Asked(
        requests=tuple(requests),
        num_choices=n,
        num_samples=n,
        logprobs=logprobs,
        echo=None,
        max_tokens=max_tokens,
        stream=stream,
        usage=stream and fields.object("stream_options").flag("include_usage"),
        calls_tool=forced is not None,
    )


def _prompts(fields: Fields, model: ServedModel) -> list[tuple[list[int], str]]:
    """The prompts' ids and texts: a text, a list of texts, of ids, or of lists of ids."""
    given = fields.get("prompt")
    several = isinstance(given, list) and given and not is_ids(given)
    prompts: Sequence[Any] = given if several else [given]
    if len(prompts) > _MAX_PROMPTS:
        raise ApiError(400, f"prompt has {len(prompts)} texts; at most {_MAX_PROMPTS} are taken")
    found = []
    for prompt in prompts:
        if isinstance(prompt, str):
            try:
                ids = model.tokenizer.encode(prompt)
            except ValueError as error:
                raise ApiError(400, str(error), param="prompt") from None
            text = prompt
        elif is_ids(prompt):
            ids, text = prompt, ""
        else:
            raise fields.error("prompt", "a text, token ids, or a list of either")
        model.check_prompt(ids, "prompt")
        found.append((ids, text or model.tokenizer.decode(ids)))
    return found


def _sampling(fields: Fields, model: ServedModel) -> RequestOptions:
    """The options that both endpoints have, the model's own where they name none."""
    named: dict[str, Any] = {
        "temperature": fields.number("temperature"),
        "top_k": fields.integer("top_k", -1, 2**31),
        "top_p": fields.number("top_p"),
        "min_p": fields.number("min_p"),
        "repetition_penalty": fields.number("repetition_penalty"),
        "presence_penalty": fields.number("presence_penalty"),
        "frequency_penalty": fields.number("frequency_penalty"),
        "min_tokens": fields.integer("min_tokens", 0, 2**31),
    }
    if named["top_k"] == -1:
        named["top_k"] = 0
    biases = fields.biases("logit_bias")
    if any(token_id >= model.shape.vocab_size for token_id, _ in biases):
        raise fields.error("logit_bias", f"of ids below {model.shape.vocab_size}")
    seed = fields.integer("seed", -(2**63), 2**64 - 1)
    return RequestOptions(
        **{
            "temperature": 1.0,
            **model.defaults,
            **{name: value for name, value in named.items() if value is not None},
            "logit_bias": biases,
            "stop": fields.texts("stop", _MAX_STOPS),
            "stop_ids": fields.integers("stop_token_ids"),
            "eos_ids": () if fields.flag("ignore_eos") else None,
            "seed": secrets.randbits(64) if seed is None else seed % 2**64,
        }
    )


def _request(
    fields: Fields,
    model: ServedModel,
    ids: Sequence[int],
    max_tokens: int | None,
    options: dict[str, Any],
) -> Request:
    room = model.shape.max_seq_len + 1 - len(ids)
    max_new_tokens = room if max_tokens is None else max(1, min(max_tokens, room))
    try:
        return make_request(ids, RequestOptions(**{**options, "max_new_tokens": max_new_tokens}))
    except ValueError as error:
        name = str(error).split(" ")[0]
        raise ApiError(400, str(error), param=name if fields.get(name) else None) from None
