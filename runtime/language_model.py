"""A backend with its tokenizer: text in, text out, for any number of callers at once."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypedDict, Unpack

from .backend import Backend
from .request import Completion, Event, LimitPolicy, Request
from .sampling import SamplingParams
from .scheduler import Scheduler, run_requests, stream
from .text.chat_template import ChatTemplate
from .text.constraint import Grammar, GrammarCompiler
from .text.tokenizer import Tokenizer

__all__ = ["LanguageModel", "RequestOptions", "make_request"]

_SAMPLING = {field.name for field in fields(SamplingParams)}


class RequestOptions(TypedDict, total=False):
    """What can be asked for beside the prompt; see Request and SamplingParams."""

    max_new_tokens: int
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    eos_ids: tuple[int, ...] | None
    limit_policy: LimitPolicy
    logprobs: int | None
    prompt_logprobs: int | None
    sample_index: int
    min_tokens: int
    timeout_s: float | None
    prefix_scope: str
    grammar: Grammar | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    seed: int


class LanguageModel:
    """Turns text into text.

    Its scheduler is the only one: any number of `generate`, `stream` and `chat` calls, from any
    thread, share the backend's slots, and each gives the text that it gives alone.

    Args:
        backend: Any backend; nobody else may use it.
        tokenizer: The checkpoint's.
        folder: Where the checkpoint's chat template is.
        template: Used instead of that one.
        name: Backend and device, such as "torch-compile/cpu".
        startup: Seconds and facts of loading and compiling, keys ending in their unit.
        defaults: Options of requests that name none, such as a checkpoint's own temperature.
        keep_prefixes: See Scheduler; on for chats, whose turns begin alike.
        adaptive: See Scheduler; on for servers.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        *,
        folder: Path | None = None,
        template: ChatTemplate | None = None,
        name: str = "",
        startup: Mapping[str, Any] | None = None,
        defaults: RequestOptions | None = None,
        keep_prefixes: bool = False,
        adaptive: bool = False,
    ) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        self.name = name
        self.startup = dict(startup or {})
        self.defaults: RequestOptions = defaults or {}
        self.scheduler = Scheduler(
            backend,
            tokenizer,
            keep_prefixes=keep_prefixes,
            adaptive=adaptive,
            constraints=GrammarCompiler(tokenizer),
        )
        self.folder = folder
        self._template = template

    def generate(
        self, *prompts: str | Sequence[int], n: int = 1, **options: Unpack[RequestOptions]
    ) -> list[Completion]:
        """Continues prompts, as many at once as the backend has slots.

        Args:
            prompts: Texts, "" being BOS alone, or token ids.
            n: Samples of each prompt.
            options: See RequestOptions.

        Returns:
            One completion a sample, those of the first prompt first.

        Raises:
            ValueError: An option is out of its range, or a prompt doesn't fit.
        """
        requests = [
            self.request(prompt, **{"sample_index": i, **options})  # pyright: ignore
            for prompt in prompts
            for i in range(n)
        ]
        return run_requests(self.scheduler, requests)

    def stream(
        self, prompt: str | Sequence[int], **options: Unpack[RequestOptions]
    ) -> Generator[str, None, None]:
        """Like generate for one prompt, yielding pieces of text as they are made.

        Args:
            prompt: A text or token ids.
            options: See RequestOptions.

        Yields:
            Pieces of the continuation.

        Raises:
            ValueError: As generate, or the model's logits can't be sampled from.
        """
        for event in self.events(self.request(prompt, **options)):
            if event.text:
                yield event.text

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **options: Unpack[RequestOptions],
    ) -> Generator[str, None, None]:
        """Answers a conversation, yielding pieces of the answer.

        Args:
            messages: See ChatTemplate.render.
            tools: See ChatTemplate.render.
            documents: See ChatTemplate.render.
            options: See RequestOptions.

        Yields:
            Pieces of the answer.

        Raises:
            FileNotFoundError: The model was loaded without its folder.
            ValueError: There is no chat template, or it refuses the messages; or as stream.
        """
        prompt_ids = self.render(messages, tools=tools, documents=documents)
        yield from self.stream(prompt_ids, **options)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[int, ...]:
        """Writes a conversation as a prompt's token ids; see ChatTemplate.render."""
        if self._template is None:
            if self.folder is None:
                raise FileNotFoundError("this model has no folder with a chat template")
            self._template = ChatTemplate.load(self.folder)
        text = self._template.render(messages, tools=tools, documents=documents)
        if not (ids := self.tokenizer.encode(text, bos=False, special=True)):
            raise ValueError(
                "the chat template writes nothing for these messages; give another with "
                "--chat-template"
            )
        return tuple(ids)

    def events(self, request: Request) -> Generator[Event, None, None]:
        """Runs one request, yielding its events; see scheduler.stream."""
        for event in stream(self.scheduler, request):
            if event.completion is not None and event.completion.error is not None:
                raise ValueError(event.completion.error)
            yield event

    def request(self, prompt: str | Sequence[int], **options: Unpack[RequestOptions]) -> Request:
        """Encodes a prompt into what the scheduler takes, defaults filled in."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return make_request(ids, {**self.defaults, **options})


def make_request(prompt_ids: Sequence[int], options: RequestOptions) -> Request:
    """Joins a prompt and its options.

    Args:
        prompt_ids: The prompt.
        options: See RequestOptions.

    Returns:
        The request.

    Raises:
        ValueError: An option is out of its range, or the prompt is empty.
    """
    chosen: dict[str, Any] = dict(options)
    sampling = {key: chosen.pop(key) for key in _SAMPLING & chosen.keys()}
    return Request(prompt_ids=tuple(prompt_ids), sampling=SamplingParams(**sampling), **chosen)
