"""From samples and events to the objects that OpenAI's clients read."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..request import TopLogprobs
from .messages import EngineEvent
from .openai_request import Asked
from .samples import Sample
from .served_model import ServedModel

__all__ = ["ChatForm", "CompletionForm", "Form"]


class Form(Protocol):
    """How one endpoint writes its choices."""

    @property
    def model(self) -> ServedModel:
        """Whose they are."""
        ...

    @property
    def whole(self) -> str:
        """The kind of object that an answer is."""
        ...

    @property
    def piece(self) -> str:
        """The kind of object that an event of a stream is."""
        ...

    @property
    def prefix(self) -> str:
        """What an answer's id begins with."""
        ...

    def choice(self, index: int, sample: Sample) -> dict[str, Any]:
        """A whole choice."""
        ...

    def opening(self, index: int) -> list[dict[str, Any]]:
        """What a streamed choice begins with."""
        ...

    def token(self, index: int, event: EngineEvent) -> dict[str, Any] | None:
        """A token of a stream, or nothing where it has nothing to show."""
        ...

    def closing(self, index: int, sample: Sample) -> dict[str, Any]:
        """What a streamed choice ends with."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionForm:
    """The choices of /v1/completions."""

    asked: Asked
    model: ServedModel
    whole: str = "text_completion"
    piece: str = "text_completion"
    prefix: str = "cmpl"
    _offsets: dict[int, int] = field(default_factory=dict)  # of each streamed choice's next token

    def choice(self, index: int, sample: Sample) -> dict[str, Any]:
        """See Form."""
        asked = self.asked
        echoed = "" if asked.echo is None else asked.echo[index // asked.num_choices]
        logprobs, reason = None, sample.finish_reason
        if asked.max_tokens == 0:  # one token was made, because a request makes at least one
            sample, reason = Sample(completion=sample.completion), "length"
        if asked.logprobs is not None:
            ids, values, tops = list(sample.ids), [*sample.logprobs], list(sample.top_logprobs)
            if asked.echo is not None and sample.completion is not None:
                request = asked.requests[index // asked.num_choices * asked.num_samples]
                ids = [*request.prompt_ids, *ids]
                values = [None, *sample.completion.prompt_logprobs, *values]
                tops = [None, *sample.completion.prompt_top_logprobs, *tops]
            logprobs = self._logprobs(ids, values, tops, 0)
        return self._choice(index, echoed + sample.text, logprobs, reason)

    def opening(self, index: int) -> list[dict[str, Any]]:
        """See Form."""
        echo = self.asked.echo
        self._offsets[index] = 0
        if not echo:
            return []
        text = echo[index // self.asked.num_choices]
        self._offsets[index] = len(text)
        return [self._choice(index, text, None, None)]

    def token(self, index: int, event: EngineEvent) -> dict[str, Any] | None:
        """See Form."""
        logprobs = None
        if self.asked.max_tokens == 0:
            return None
        if event.token_id is not None and event.logprob is not None:
            offset = self._offsets[index]
            logprobs = self._logprobs(
                [event.token_id], [event.logprob], [event.top_logprobs], offset
            )
            self._offsets[index] += len(logprobs["tokens"][0])
        if not event.text and logprobs is None:
            return None
        return self._choice(index, event.text, logprobs, None)

    def closing(self, index: int, sample: Sample) -> dict[str, Any]:
        """See Form."""
        reason = "length" if self.asked.max_tokens == 0 else sample.finish_reason
        return self._choice(index, "", None, reason)

    def _choice(
        self, index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None
    ) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(
        self,
        ids: Sequence[int],
        values: Sequence[float | None],
        tops: Sequence[TopLogprobs | None],
        offset: int,
    ) -> dict[str, Any]:
        """Four lists; the token itself is among its alternatives, as OpenAI has it."""
        name = self.model.token_text
        tokens = [name(token_id) for token_id in ids]
        offsets = []
        for token_id, token in zip(ids, tokens, strict=True):
            offsets.append(offset)
            offset += 0 if token_id in self.model.tokenizer.special_ids else len(token)
        alternatives = []
        for token, value, top in zip(tokens, values, tops, strict=True):
            if top is None:
                alternatives.append(None)
                continue
            # Of two ids with one text the likelier counts, and it comes first.
            named = {name(i): logprob for i, logprob in reversed(top)}
            alternatives.append({token: value, **named} if token not in named else named)
        return {
            "tokens": tokens,
            "token_logprobs": list(values),
            "top_logprobs": alternatives,
            "text_offset": offsets,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatForm:
    """The choices of /v1/chat/completions."""

    asked: Asked
    model: ServedModel
    whole: str = "chat.completion"
    piece: str = "chat.completion.chunk"
    prefix: str = "chatcmpl"

    def choice(self, index: int, sample: Sample) -> dict[str, Any]:
        """See Form."""
        rows = list(zip(sample.ids, sample.logprobs, sample.top_logprobs, strict=False))
        message = {"role": "assistant", "content": sample.text, "refusal": None}
        reason = sample.finish_reason
        if (call := self._call(sample)) is not None:
            message |= {"content": None, "tool_calls": [call]}
            reason = "tool_calls"
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(rows),
            "finish_reason": reason,
        }

    def opening(self, index: int) -> list[dict[str, Any]]:
        """See Form."""
        content = None if self.asked.calls_tool else ""
        return [self._delta(index, {"role": "assistant", "content": content})]

    def token(self, index: int, event: EngineEvent) -> dict[str, Any] | None:
        """See Form."""
        rows = []
        if event.token_id is not None and event.logprob is not None:
            rows = [(event.token_id, event.logprob, event.top_logprobs or ())]
        logprobs = self._logprobs(rows) if rows else None
        if self.asked.calls_tool:  # a call is told at its end, once it is whole
            return self._delta(index, {}, logprobs) if rows else None
        if not event.text and not rows:
            return None
        return self._delta(index, {"content": event.text}, logprobs)

    def closing(self, index: int, sample: Sample) -> dict[str, Any]:
        """See Form."""
        delta: dict[str, Any] = {}
        reason = sample.finish_reason
        if (call := self._call(sample)) is not None:
            delta, reason = {"tool_calls": [{"index": 0, **call}]}, "tool_calls"
        elif self.asked.calls_tool:
            delta = {"content": sample.text}
        return {**self._delta(index, delta), "finish_reason": reason}

    def _call(self, sample: Sample) -> dict[str, Any] | None:
        """The call that a text is, if it has to be one and is whole."""
        if not self.asked.calls_tool or sample.finish_reason != "stop":
            return None
        try:
            call = json.loads(sample.text)
            function = {"name": call["name"], "arguments": json.dumps(call["arguments"])}
        except (ValueError, TypeError, KeyError):  # a stop text cut it
            return None
        return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}

    def _delta(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self, rows: Sequence[tuple[int, float, TopLogprobs]]) -> dict[str, Any] | None:
        if self.asked.logprobs is None:
            return None
        content = [
            {**self._token(token_id, value), "top_logprobs": [self._token(*one) for one in top]}
            for token_id, value, top in rows
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self.model.tokenizer.token_bytes(token_id)
        return {"token": self.model.token_text(token_id), "logprob": logprob, "bytes": list(raw)}
