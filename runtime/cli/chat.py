"""A conversation, line by line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..language_model import LanguageModel
from ..request import Request
from .commands import INTERRUPTED
from .terminal import emit, say

__all__ = ["chat"]

MakeRequest = Callable[[tuple[int, ...]], Request]


def chat(
    model: LanguageModel,
    lines: Iterable[str],
    *,
    system: str | None,
    tools: Sequence[Mapping[str, Any]] | None,
    make_request: MakeRequest,
) -> int:
    """Answers line by line, the whole conversation being each answer's prompt.

    `/reset` begins a new conversation, `/exit` ends the program. When the conversation outgrows
    the cache, its oldest turns are left out.

    Args:
        model: What runs; with `keep_prefixes` a turn costs its own tokens alone.
        lines: What the user says.
        system: The system message, or None.
        tools: Functions that the model is told of, as JSON schemas, or None.
        make_request: Adds the options to a prompt's ids.

    Returns:
        The exit code: 0 at the end of the input, 130 after Ctrl-C outside an answer.

    Raises:
        ValueError: The template refuses the messages, or the logits can't be sampled from.
    """
    conversation = _Conversation(model, system, tools)
    try:
        for line in lines:
            match line.strip():
                case "":
                    continue
                case "/exit":
                    break
                case "/reset":
                    conversation = _Conversation(model, system, tools)
                    say("a new conversation")
                    continue
            _answer(model, conversation, line, make_request)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _answer(
    model: LanguageModel, conversation: _Conversation, line: str, make_request: MakeRequest
) -> None:
    prompt_ids = conversation.ask(line, max_new_tokens=make_request((0,)).max_new_tokens)
    if prompt_ids is None:
        return
    answer = ""
    events = model.events(make_request(prompt_ids))
    try:
        for event in events:
            # Templates put their own space before an answer.
            text = event.text if answer else event.text.lstrip(" ")
            answer += text
            emit(text, end="")
    except KeyboardInterrupt:
        events.close()
    emit()
    conversation.messages.append({"role": "assistant", "content": answer})


class _Conversation:
    """Messages, and how many of them fit."""

    def __init__(
        self,
        model: LanguageModel,
        system: str | None,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> None:
        self._model = model
        self._tools = tools
        self.messages = [{"role": "system", "content": system}] if system else []
        self._num_fixed = len(self.messages)

    def ask(self, text: str, *, max_new_tokens: int) -> tuple[int, ...] | None:
        """Adds what the user says; gives the prompt, or None if that alone is too long."""
        max_seq_len = self._model.backend.shape.max_seq_len
        room = max_seq_len - min(max_new_tokens, max_seq_len // 4)
        self.messages.append({"role": "user", "content": text})
        num_dropped = 0
        while len(ids := self._model.render(self.messages, tools=self._tools)) > room:
            if len(self.messages) == self._num_fixed + 1:
                del self.messages[-1]
                say(f"the message makes a prompt of {len(ids)} tokens; {room} fit, so shorten it")
                return None
            del self.messages[self._num_fixed : self._num_fixed + 2]  # a question and its answer
            num_dropped += 1
        if num_dropped:
            say(f"(the oldest {num_dropped} turns were left out: the cache holds {max_seq_len})")
        return ids
