"""Runs many requests through one backend: a slot each, one prefill chunk or one decode per step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Literal

import numpy as np

from .backend import Backend, StaticShape
from .request import Completion, Event, LiveRequest, Request
from .sampling import Sampler
from .text.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "Completion",
    "Event",
    "Request",
    "Scheduler",
    "check_prompt",
    "generate",
    "next_chunk",
    "stream",
]

LimitPolicy = Literal["stop", "roll"]


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
        self._slots: list[LiveRequest | None] = [None] * shape.batch_size
        self._queue: list[LiveRequest] = []
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
        check_prompt(prompt_ids, shape)
        if request.stop and self._tokenizer is None:
            raise ValueError("stop texts need a tokenizer; give one, or use stop_ids")
        live = LiveRequest(
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

    def _requests(self) -> list[LiveRequest]:
        return [live for live in (*self._slots, *self._queue) if live is not None]

    def _assign_slots(self) -> None:
        """Frees the slots of requests that have ended and fills them from the queue."""
        waiting = [live for live in self._queue if not live.finished]
        for slot, live in enumerate(self._slots):
            if live is None or live.finished:
                self._slots[slot] = waiting.pop(0) if waiting else None
        self._queue = waiting

    def _prefill(self, live: LiveRequest) -> None:
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


def stream(scheduler: Scheduler, request: Request) -> Generator[Event, None, None]:
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


def check_prompt(prompt_ids: Sequence[int], shape: StaticShape) -> None:
    """Refuses a prompt that a backend of this shape can't take.

    Args:
        prompt_ids: At least one id.
        shape: The backend's.

    Raises:
        ValueError: The prompt doesn't fit the cache, or an id is outside the vocabulary.
    """
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
