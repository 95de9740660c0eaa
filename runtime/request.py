"""A request's whole life: what was asked, what it has become, what is told on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from .sampling import Sampler, SamplingParams, log_softmax, top_logprobs
from .text.constraint import Grammar
from .text.tokenizer import StreamDecoder

__all__ = ["Completion", "Constraint", "Event", "LimitPolicy", "LiveRequest", "Request"]

FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]
LimitPolicy = Literal["stop", "roll"]
TopLogprobs = tuple[tuple[int, float], ...]


class Constraint(Protocol):
    """Holds one completion to a grammar."""

    @property
    def finished(self) -> bool:
        """Whether the text is whole, and nothing can follow it."""
        ...

    def allowed(self) -> NDArray[np.bool_]:
        """[V] bool, which ids can come next."""
        ...

    def accept(self, token_id: int) -> None:
        """Takes the next id, one of those allowed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and what to do with it.

    Attributes:
        prompt_ids: The prompt, BOS included if the model wants one.
        max_new_tokens: How many tokens are sampled at most, the id that ends it included.
        sampling: Filters and seed.
        sample_index: Numbers the samples of one prompt with one seed; each is its own request.
        stop: Texts that end the continuation; they aren't part of it.
        stop_ids: Ids that end the continuation, besides eos_ids.
        eos_ids: Ids that end it; None takes the scheduler's, () ignores them.
        min_tokens: So many tokens come before an id may end it; a grammar's end comes sooner.
        timeout_s: Seconds from submit to its end with "timeout", waiting included; None is never.
        grammar: What the text must be, or None.
        prefix_scope: Rows that other requests left are used where they have the same.
        limit_policy: Where the cache is full, "stop" ends with "length" and "roll" overwrites the
            oldest rows, until the RoPE tables end.
        logprobs: None is off; n gives each token's log-probability and its n best alternatives.
        prompt_logprobs: The same for the prompt's ids but the first. The prompt is then fed a token
            a step, beside what others decode.

    Raises:
        ValueError: The prompt or a stop text is empty, or a number is out of its range.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int = 256
    sampling: SamplingParams = field(default_factory=SamplingParams)
    sample_index: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] | None = None
    min_tokens: int = 0
    timeout_s: float | None = None
    grammar: Grammar | None = None
    prefix_scope: str = ""
    limit_policy: LimitPolicy = "stop"
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("the prompt has no token; give at least one, such as BOS")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.min_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens}; it must be between 0 and max_new_tokens, "
                f"{self.max_new_tokens}"
            )
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise ValueError(f"timeout_s is {self.timeout_s}; it must be above 0, or None")
        if not 0 <= self.sample_index < 2**64:
            raise ValueError(f"sample_index is {self.sample_index}; it must be in [0, 2**64)")
        if isinstance(self.stop, str) or "" in self.stop:
            raise ValueError(f"stop is {self.stop!r}; give a tuple of texts, none empty")
        if self.limit_policy not in ("stop", "roll"):
            raise ValueError(f'limit_policy is {self.limit_policy!r}; it must be "stop" or "roll"')
        for name in ("logprobs", "prompt_logprobs"):
            number = getattr(self, name)
            if number is not None and number < 0:
                raise ValueError(f"{name} is {number}; it must be None (off) or 0 and above")


@dataclass(slots=True, kw_only=True)
class Completion:
    """What became of a request; it grows until finish_reason is set.

    Attributes:
        prompt_ids: The request's prompt.
        ids: The continuation, without the id that ended it. A stop text's tokens are in it.
        text: The continuation up to a stop text; "" without a tokenizer.
        finish_reason: "stop" (an id, a text or a grammar's end), "length" (a limit), "cancelled",
            "timeout" or "error".
        error: What went wrong, in one line, where the reason is "error".
        logprobs: Log-probability of each of ids under the raw logits, if asked for.
        top_logprobs: The best alternatives for each of ids, as (id, logprob), if asked for.
        prompt_logprobs: Log-probability of each of the prompt's ids but the first, if asked for.
        prompt_top_logprobs: The best alternatives for each of these.
        num_reused: Ids at the prompt's beginning whose rows a slot held already.
        queue_s: From submit to the slot.
        prefill_s: Time in the backend for this prompt's chunks.
        ttft_s: From submit to the first token, waiting included; None if there was none.
        decode_s: From the first token to the last, other requests' chunks in between included.
        num_steps: Tokens decoded in that time, the id that ended it included.
        num_guessed: Ids that were guessed; see speculation.
        num_right: How many of these were right, so that their steps were spared.
    """

    prompt_ids: tuple[int, ...]
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    error: str | None = None
    logprobs: list[float] | None = None
    top_logprobs: list[TopLogprobs] | None = None
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_top_logprobs: list[TopLogprobs] = field(default_factory=list)
    num_reused: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    ttft_s: float | None = None
    decode_s: float = 0.0
    num_steps: int = 0
    num_guessed: int = 0
    num_right: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A token, the end of a request, or both; every request ends with exactly one last event.

    Attributes:
        request_id: Whose event this is.
        token_id: The next of the completion's ids; None where a request ends without one.
        text: Text that can be shown now; "" while a character or a stop text is incomplete.
        logprob: The token's log-probability, if asked for.
        top_logprobs: The best alternatives in the token's place, if asked for.
        finish_reason: Why the request ended; None before the last event.
        completion: The whole result in the last event, None before.
    """

    request_id: int
    token_id: int | None
    text: str
    logprob: float | None = None
    top_logprobs: TopLogprobs | None = None
    finish_reason: FinishReason | None = None
    completion: Completion | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class LiveRequest:
    """A request's whole state; sampler and decoder, which cost memory, come with the slot."""

    request_id: int
    request: Request
    sink: Callable[[Event], None]
    completion: Completion
    submitted_s: float
    end_ids: frozenset[int]
    end: int  # the first position that no token can be fed at; one can be sampled for it
    allowed_size: int  # ids from here on aren't the tokenizer's
    sampler: Sampler | None = None
    decoder: StreamDecoder | None = None
    constraint: Constraint | None = None
    num_prefilled: int = 0
    last_fed: int = 0  # counts the steps that fed prompts, of all requests

    @property
    def deadline_s(self) -> float:
        """When the request ends at the latest."""
        timeout_s = self.request.timeout_s
        return math.inf if timeout_s is None else self.submitted_s + timeout_s

    @property
    def finished(self) -> bool:
        """Whether the last event was sent."""
        return self.completion.finish_reason is not None

    @property
    def decoding(self) -> bool:
        """Whether the prompt is done and a first token sampled."""
        return bool(self.completion.ids)

    @property
    def scored(self) -> bool:
        """Whether the prompt is fed by decode steps, whose logits tell of its next id."""
        return self.request.prompt_logprobs is not None and not self.decoding

    @property
    def ending(self) -> bool:
        """Whether one id of the prompt is left, whose logits give the first token."""
        return not self.decoding and self.num_prefilled + 1 == len(self.request.prompt_ids)

    @property
    def next_id(self) -> int:
        """What a decode step feeds the request's slot."""
        if self.scored or self.ending:
            return self.request.prompt_ids[self.num_prefilled]
        return self.completion.ids[-1] if self.decoding else 0

    @property
    def next_position(self) -> int:
        """Where the next id is fed: the newest token's position, or the prompt's next one."""
        num_new = len(self.completion.ids)
        return len(self.request.prompt_ids) + num_new - 1 if num_new else self.num_prefilled

    def advance(self, logits: NDArray[np.float32]) -> None:
        """Takes the [V] logits behind next_id."""
        prompt_ids, completion = self.request.prompt_ids, self.completion
        if self.decoding:
            self.take(logits)
            return
        if self.ending:
            self.take(logits)
        else:
            logprobs = log_softmax(logits)
            logprob = float(logprobs[prompt_ids[self.num_prefilled + 1]])
            if not math.isfinite(logprob):
                completion.error = f"the prompt's log-probability is {logprob}"
                self.finish("error")
                return
            best = top_logprobs(logprobs[: self.allowed_size], self.request.prompt_logprobs or 0)
            completion.prompt_logprobs.append(logprob)
            completion.prompt_top_logprobs.append(best)
        self.num_prefilled += 1

    def take(self, logits: NDArray[np.float32]) -> None:
        """Samples a token from [V] logits and sends its event, which may be the last."""
        assert self.sampler is not None
        request, completion, constraint = self.request, self.completion, self.constraint
        position = len(request.prompt_ids) + len(completion.ids)
        early = constraint is None and len(completion.ids) < request.min_tokens
        try:
            token_id = self.sampler.sample(
                logits,
                position,
                allowed=constraint.allowed() if constraint else None,
                banned_ids=self.end_ids if early else (),
            )
            if constraint and token_id not in self.end_ids:
                constraint.accept(token_id)
        except ValueError as error:  # what can't be sampled from is this request's alone
            completion.error = str(error)
            self.finish("error")
            return
        elapsed_s = time.perf_counter() - self.submitted_s
        if completion.ttft_s is None:
            completion.ttft_s = elapsed_s
        else:
            completion.num_steps += 1
        completion.decode_s = elapsed_s - completion.ttft_s
        if token_id in self.end_ids:
            self.finish("stop")
            return
        logprob, alternatives = None, None
        if completion.logprobs is not None and completion.top_logprobs is not None:
            logprobs = log_softmax(logits)
            logprob = float(logprobs[token_id])
            alternatives = top_logprobs(logprobs[: self.allowed_size], request.logprobs or 0)
            completion.logprobs.append(logprob)
            completion.top_logprobs.append(alternatives)
        completion.ids.append(token_id)
        text = self.decoder.push(token_id) if self.decoder else ""
        reason = None
        if (self.decoder and self.decoder.stopped) or (constraint and constraint.finished):
            reason = "stop"
        elif len(completion.ids) == request.max_new_tokens or position >= self.end:
            reason = "length"
        self._send(token_id, text, reason, logprob=logprob, top_logprobs=alternatives)

    def finish(self, reason: FinishReason) -> None:
        """Sends the last event, without a token."""
        self._send(None, "", reason)

    def _send(
        self,
        token_id: int | None,
        text: str,
        reason: FinishReason | None,
        *,
        logprob: float | None = None,
        top_logprobs: TopLogprobs | None = None,
    ) -> None:
        if reason and self.decoder and not self.decoder.stopped:
            text += self.decoder.flush()  # what was held back for a stop text that never came
        self.completion.text += text
        self.completion.finish_reason = reason
        self.sink(
            Event(
                request_id=self.request_id,
                token_id=token_id,
                text=text,
                logprob=logprob,
                top_logprobs=top_logprobs,
                finish_reason=reason,
                completion=self.completion if reason else None,
            )
        )
