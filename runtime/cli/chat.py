"""A conversation, line by line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..language_model import LanguageModel
from ..request import Request
from ..session import Session, write_session
from .commands import INTERRUPTED
from .terminal import emit, say

__all__ = ["Conversation", "chat"]

MakeRequest = Callable[[tuple[int, ...]], Request]


def chat(
    conversation: Conversation,
    lines: Iterable[str],
    *,
    make_request: MakeRequest,
    session_file: Path | None = None,
) -> int:
    """Answers line by line, the whole conversation being each answer's prompt.

    `/reset` begins a new conversation, `/exit` ends the program. When the conversation outgrows
    the cache, its oldest turns are left out.

    Args:
        conversation: What has been said; it grows.
        lines: What the user says.
        make_request: Adds the options to a prompt's ids.
        session_file: Where the conversation is kept at the end, however that comes.

    Returns:
        The exit code: 0 at the end of the input, 130 after Ctrl-C outside an answer.

    Raises:
        ValueError: The template refuses the messages, or the logits can't be sampled from.
    """
    try:
        for line in lines:
            match line.strip():
                case "":
                    continue
                case "/exit":
                    break
                case "/reset":
                    conversation.reset()
                    say("a new conversation")
                    continue
            _answer(conversation, line, make_request)
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        if session_file is not None:
            seed = make_request((0,)).sampling.seed
            write_session(session_file, conversation.session(seed))
    return 0


def _answer(conversation: Conversation, line: str, make_request: MakeRequest) -> None:
    prompt_ids = conversation.ask(line, max_new_tokens=make_request((0,)).max_new_tokens)
    if prompt_ids is None:
        return
    answer = ""
    conversation.ids = prompt_ids
    events = conversation.model.events(make_request(prompt_ids))
    try:
        for event in events:
            # Templates put their own space before an answer.
            text = event.text if answer else event.text.lstrip(" ")
            answer += text
            emit(text, end="")
            if event.completion is not None:
                conversation.ids = (*prompt_ids, *event.completion.ids)
    except KeyboardInterrupt:
        events.close()
    emit()
    conversation.messages.append({"role": "assistant", "content": answer})


class Conversation:
    """Messages, and how many of them fit.

    Attributes:
        model: Who answers; with `keep_prefixes` a turn costs its own tokens alone.
        messages: What has been said.
        ids: The last prompt and its answer.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Begins one.

        Args:
            model: Who answers.
            system: The system message, or None.
            tools: Functions that the model is told of, as JSON schemas, or None.
        """
        self.model = model
        self._tools = tools
        self._first = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Begins anew."""
        self.messages: list[dict[str, Any]] = list(self._first)
        self.ids: tuple[int, ...] = ()

    def restore(self, session: Session) -> None:
        """Goes on where a session ended.

        Raises:
            ValueError: The session is another model's.
        """
        self.messages = list(session.messages)
        self._first = [m for m in self.messages[:1] if m.get("role") == "system"]
        self.ids = tuple(session.ids.tolist())
        if 0 < len(self.ids) < self.model.backend.shape.max_seq_len:  # else it is fed again
            self.model.scheduler.write_kept(self.ids, session.rows)

    def session(self, seed: int) -> Session:
        """What a later process needs to go on from here."""
        ids, rows = self.model.scheduler.read_kept(self.ids)
        return Session(
            messages=self.messages, seed=seed, ids=np.array(ids, dtype=np.int64), rows=rows
        )

    def ask(self, text: str, *, max_new_tokens: int) -> tuple[int, ...] | None:
        """Adds what the user says; gives the prompt, or None if that alone is too long."""
        max_seq_len = self.model.backend.shape.max_seq_len
        room = max_seq_len - min(max_new_tokens, max_seq_len // 4)
        self.messages.append({"role": "user", "content": text})
        num_dropped = 0
        while len(ids := self.model.render(self.messages, tools=self._tools)) > room:
            if len(self.messages) == len(self._first) + 1:
                del self.messages[-1]
                say(f"the message makes a prompt of {len(ids)} tokens; {room} fit, so shorten it")
                return None
            del self.messages[len(self._first) : len(self._first) + 2]  # a question and its answer
            num_dropped += 1
        if num_dropped:
            say(f"(the oldest {num_dropped} turns were left out: the cache holds {max_seq_len})")
        return ids
