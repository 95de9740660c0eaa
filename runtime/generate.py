"""Runs many requests through one backend: a slot each, one prefill chunk or one decode per step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .backend import Backend, StaticShape
from .sampling import Sampler, SamplingParams, log_softmax, top_logprobs
from .tokenizer import StreamDecoder, Tokenizer

__all__ = ["Completion", "Event", "Request", "Scheduler", "generate", "next_chunk", "stream"]

FinishReason = Literal["stop", "length", "cancelled"]
LimitPolicy = Literal["stop", "roll"]
TopLogprobs = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and what to do with it.

    Attributes:
        prompt_ids: The prompt, BOS included if the model wants one.
        max_new_tokens: How many tokens are sampled at most, the id that ends it included.
        sampling: Filters and seed.
        sample_index: Numbers the samples of one prompt with one seed; each is its own request.
        stop: Texts that end the continuation; they aren't part of it.
        stop_ids: Ids that end the continuation, besides the scheduler's eos_ids.
        logprobs: None is off; n gives each token's log-probability and its n best alternatives.

    Raises:
        ValueError: The prompt or a stop text is empty, or a number is out of its range.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int = 256
    sampling: SamplingParams = field(default_factory=SamplingParams)
    sample_index: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("prompt_ids is empty; give at least one id, such as BOS")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if isinstance(self.stop, str) or "" in self.stop:
            raise ValueError(f"stop is {self.stop!r}; give a tuple of texts, none empty")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs is {self.logprobs}; it must be None (off) or 0 and above")


@dataclass(slots=True, kw_only=True)
class Completion:
    """What became of a request; it grows until finish_reason is set.

    Attributes:
        prompt_ids: The request's prompt.
        ids: The continuation, without the id that ended it. A stop text's tokens are in it.
        text: The continuation up to a stop text; "" without a tokenizer.
        finish_reason: "stop" (an id or a text), "length" (a limit) or "cancelled".
        logprobs: Log-probability of each of ids under the raw logits, if asked for.
        top_logprobs: The best alternatives for each of ids, as (id, logprob), if asked for.
        prefill_s: Time in the backend for this prompt's chunks.
        ttft_s: From submit to the first token, waiting included; None if there was none.
        decode_s: From the first token to the last, other requests' chunks in between included.
        num_steps: Decode steps in that time, the one that gave the id that ended it included.
    """

    prompt_ids: tuple[int, ...]
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    logprobs: list[float] | None = None
    top_logprobs: list[TopLogprobs] | None = None
    prefill_s: float = 0.0
    ttft_s: float | None = None
    decode_s: float = 0.0
    num_steps: int = 0


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


class Scheduler:
    """Gives requests a cache slot each, first come first served, and moves them on by steps.

    A request's tokens depend on its prompt, its seed and its logits alone, never on its slot, its
    neighbours or the order of steps. After a step that was interrupted in the backend (Ctrl-C, an
    error) requests can be cancelled, or the next step repeats it.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer | None,
        *,
        limit_policy: LimitPolicy = "stop",
        eos_ids: tuple[int, ...] | None = None,
    ) -> None:
        """Takes a backend whose slots nobody else uses.

        Args:
            backend: Runs the chunks and the decodes.
            tokenizer: Makes the text; with None texts are "" and stop texts are refused.
            limit_policy: Where the cache is full, "stop" ends with "length" and "roll" overwrites
                the oldest rows, until the RoPE tables end.
            eos_ids: Ids that end every request. Default: the tokenizer's; () ignores them.

        Raises:
            ValueError: limit_policy is unknown.
        """
        if limit_policy not in ("stop", "roll"):
            raise ValueError(f'limit_policy is {limit_policy!r}; it must be "stop" or "roll"')
        shape = backend.shape
        self._backend = backend
        self._tokenizer = tokenizer
        self._end = shape.max_seq_len if limit_policy == "stop" else shape.num_positions
        self._allowed_size = shape.vocab_size
        if tokenizer is not None:
            self._allowed_size = min(tokenizer.vocab_size, shape.vocab_size)
            eos_ids = tokenizer.eos_ids if eos_ids is None else eos_ids
        self._eos_ids = eos_ids or ()
        self._slots: list[_Live | None] = [None] * shape.batch_size
        self._queue: list[_Live] = []
        self._events: deque[Event] = deque()
        self._num_submitted = 0
        self._decode_next = False

    @property
    def idle(self) -> bool:
        """Whether there is nothing left to run or to deliver."""
        return not self._events and all(live.finished for live in self._requests())

    def submit(self, request: Request, *, inbox: deque[Event] | None = None) -> int:
        """Queues a request.

        Args:
            request: What to run.
            inbox: Where its events go; by default `step` returns them.

        Returns:
            The request's id, which its events carry.

        Raises:
            ValueError: The prompt doesn't fit the cache, an id is outside the vocabulary, or
                there are stop texts and no tokenizer.
        """
        shape, prompt_ids = self._backend.shape, request.prompt_ids
        if len(prompt_ids) > shape.max_seq_len:
            raise ValueError(
                f"prompt has {len(prompt_ids)} tokens, max_seq_len is {shape.max_seq_len}; "
                "shorten the prompt or raise max_seq_len"
            )
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < shape.vocab_size:
            raise ValueError(
                f"prompt has ids from {min(prompt_ids)} to {max(prompt_ids)}, vocab_size is "
                f"{shape.vocab_size}; use the tokenizer of this model"
            )
        if request.stop and self._tokenizer is None:
            raise ValueError("stop texts need a tokenizer; give one, or use stop_ids")
        live = _Live(
            request_id=self._num_submitted,
            request=request,
            sampler=Sampler(
                request.sampling,
                shape.vocab_size,
                allowed_size=self._allowed_size,
                prompt_ids=prompt_ids,
                sample_index=request.sample_index,
            ),
            decoder=self._tokenizer and StreamDecoder(self._tokenizer, prompt_ids, request.stop),
            inbox=self._events if inbox is None else inbox,
            end_ids={*self._eos_ids, *request.stop_ids},
            end=self._end,
            allowed_size=self._allowed_size,
            completion=Completion(
                prompt_ids=prompt_ids,
                logprobs=None if request.logprobs is None else [],
                top_logprobs=None if request.logprobs is None else [],
            ),
            submitted_s=time.perf_counter(),
        )
        self._num_submitted += 1
        self._queue.append(live)
        return live.request_id

    def step(self) -> list[Event]:
        """Runs one prefill chunk, or one decode of all slots that are past their prompt.

        The two alternate while there is work for both. If there are events already, from a cancel
        or an interrupted step, these are delivered and nothing is run.

        Returns:
            The events of this step, without those that went to an inbox; [] when idle.

        Raises:
            ValueError: The backend's logits can't be sampled from.
        """
        if not self._events:
            self._assign_slots()
            live = [state for state in self._slots if state is not None]
            prefilling = [state for state in live if not state.decoding]
            if prefilling and not (self._decode_next and len(prefilling) < len(live)):
                self._prefill(min(prefilling, key=lambda state: state.request_id))
                self._decode_next = True
            elif live:
                self._decode()
                self._decode_next = False
        events = list(self._events)
        self._events.clear()
        return events

    def cancel(self, request_id: int) -> bool:
        """Ends a request, waiting or running; its last event comes with the next step.

        Args:
            request_id: What `submit` returned.

        Returns:
            False if the request had ended already, or never was.
        """
        for live in self._requests():
            if live.request_id == request_id and not live.finished:
                live.finish("cancelled")
                return True
        return False

    def _requests(self) -> list[_Live]:
        return [live for live in (*self._slots, *self._queue) if live is not None]

    def _assign_slots(self) -> None:
        """Frees the slots of requests that have ended and fills them from the queue."""
        waiting = [live for live in self._queue if not live.finished]
        for slot, live in enumerate(self._slots):
            if live is None or live.finished:
                self._slots[slot] = waiting.pop(0) if waiting else None
        self._queue = waiting

    def _prefill(self, live: _Live) -> None:
        prompt_ids = live.request.prompt_ids
        start, end = next_chunk(len(prompt_ids), live.num_prefilled, self._backend.shape)
        started_s = time.perf_counter()
        logits = self._backend.prefill(self._slots.index(live), prompt_ids[start:end], start)
        live.completion.prefill_s += time.perf_counter() - started_s
        if end == len(prompt_ids):
            live.take(logits)
        live.num_prefilled = end

    def _decode(self) -> None:
        # A row that isn't decoding is fed id 0 where its own next token will go, which then
        # replaces it: row 0 of a free slot, else the first row its prompt hasn't filled. That row
        # exists: a prompt that has filled all S is decoding, or over, since its last chunk.
        ids = np.zeros(len(self._slots), dtype=np.int64)
        positions = np.zeros(len(self._slots), dtype=np.int64)
        for slot, live in enumerate(self._slots):
            if live is not None:
                ids[slot] = live.completion.ids[-1] if live.decoding else 0
                positions[slot] = live.next_position
        logits = self._backend.decode(ids, positions)
        for slot, live in enumerate(self._slots):
            if live is not None and live.decoding:
                live.take(logits[slot])


@dataclass(slots=True, kw_only=True, eq=False)
class _Live:
    """A request's whole state."""

    request_id: int
    request: Request
    sampler: Sampler
    decoder: StreamDecoder | None
    inbox: deque[Event]
    end_ids: set[int]
    end: int  # the first position that no token can be fed at; one can be sampled for it
    allowed_size: int  # ids from here on aren't the tokenizer's
    completion: Completion
    submitted_s: float
    num_prefilled: int = 0

    @property
    def finished(self) -> bool:
        return self.completion.finish_reason is not None

    @property
    def decoding(self) -> bool:
        return bool(self.completion.ids)

    @property
    def next_position(self) -> int:
        """Where the next id is fed: the newest token's position, or the prompt's next one."""
        num_new = len(self.completion.ids)
        return len(self.request.prompt_ids) + num_new - 1 if num_new else self.num_prefilled

    def take(self, logits: NDArray[np.float32]) -> None:
        """Samples a token from [V] logits and sends its event, which may be the last."""
        request, completion = self.request, self.completion
        position = len(request.prompt_ids) + len(completion.ids)
        token_id = self.sampler.sample(logits, position)
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
        if self.decoder and self.decoder.stopped:
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
        self.inbox.append(
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


def generate(
    backend: Backend,
    tokenizer: Tokenizer | None,
    requests: Sequence[Request],
    *,
    on_event: Callable[[Event], None] | None = None,
    limit_policy: LimitPolicy = "stop",
    eos_ids: tuple[int, ...] | None = None,
) -> list[Completion]:
    """Runs requests to their end, as many at once as the backend has slots.

    Args:
        backend: As for Scheduler.
        tokenizer: As for Scheduler.
        requests: Any number; all are checked before the first one runs.
        on_event: Called with every event as it happens; request ids count from 0.
        limit_policy: As for Scheduler.
        eos_ids: As for Scheduler.

    Returns:
        One completion for each request, in their order.

    Raises:
        ValueError: As Scheduler, its `submit` and its `step`.
    """
    scheduler = Scheduler(backend, tokenizer, limit_policy=limit_policy, eos_ids=eos_ids)
    request_ids = [scheduler.submit(request) for request in requests]
    completions: dict[int, Completion] = {}
    while not scheduler.idle:
        for event in scheduler.step():
            if event.completion is not None:
                completions[event.request_id] = event.completion
            if on_event is not None:
                on_event(event)
    return [completions[request_id] for request_id in request_ids]


def stream(scheduler: Scheduler, request: Request) -> Iterator[Event]:
    """Yields one request's events as they happen; closing the iterator cancels the request.

    It runs the scheduler's steps, so other requests move on too. Several streams can be read in
    any order, each gets its own events; those of requests submitted without an inbox are dropped.

    Args:
        scheduler: Takes the request at the first `next`.
        request: What to run.

    Yields:
        The request's events, the last one with its completion.

    Raises:
        ValueError: As `submit` and `step`.
    """
    inbox: deque[Event] = deque()
    request_id = scheduler.submit(request, inbox=inbox)
    try:
        finished = False
        while not finished:
            while not inbox:
                scheduler.step()
            event = inbox.popleft()
            finished = event.finish_reason is not None
            yield event
    finally:
        scheduler.cancel(request_id)


def next_chunk(prompt_len: int, num_prefilled: int, shape: StaticShape) -> tuple[int, int]:
    """Cuts the next chunk of a prompt.

    With S = 10, P = 4 and a prompt of 9 the chunks are [0, 4), [4, 8) and [6, 9): a third one from
    8 would have its padding run to row 12, so it begins at S - P and two ids are fed again.

    Args:
        prompt_len: Ids in the prompt, at most max_seq_len.
        num_prefilled: How many of them are in the cache, fewer than prompt_len.
        shape: The chunk lengths and the cache's.

    Returns:
        The chunk's first index and the one after its last.
    """
    remaining = prompt_len - num_prefilled
    chunk_len = next((n for n in shape.prefill_lens if n >= remaining), shape.prefill_len)
    start = min(num_prefilled, shape.max_seq_len - chunk_len)
    return start, min(start + chunk_len, prompt_len)
