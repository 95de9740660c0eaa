"""Runs many requests through one backend: a slot each, one prefill chunk or one decode per step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from threading import RLock

import numpy as np

from .backend import Backend
from .chunks import check_prompt, next_chunk
from .prefix import Slot
from .request import Completion, Event, LiveRequest, Request
from .sampling import Sampler
from .text.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "Completion",
    "Event",
    "Request",
    "Scheduler",
    "generate",
    "run_requests",
    "stream",
]


class Scheduler:
    """Gives requests a cache slot each, first come first served, and moves them on by steps.

    A request's tokens depend on its prompt, its seed and its logits alone, never on its slot, its
    neighbours or the order of steps. Any thread may submit, cancel and step. After a step that was
    interrupted in the backend (Ctrl-C, an error) requests can be cancelled, or the next step
    repeats it.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer | None,
        *,
        eos_ids: tuple[int, ...] | None = None,
        keep_prefixes: bool = False,
    ) -> None:
        """Takes a backend whose slots nobody else uses.

        Args:
            backend: Runs the chunks and the decodes.
            tokenizer: Makes the text; with None texts are "" and stop texts are refused.
            eos_ids: Ids that end requests which name none. Default: the tokenizer's.
            keep_prefixes: Whether a prompt that begins like what a free slot still holds starts
                there. The rows then come from other chunks, and logits may differ by a rounding.
        """
        shape = backend.shape
        self._backend = backend
        self._tokenizer = tokenizer
        self._allowed_size = shape.vocab_size
        if tokenizer is not None:
            self._allowed_size = min(tokenizer.vocab_size, shape.vocab_size)
            eos_ids = tokenizer.eos_ids if eos_ids is None else eos_ids
        self._eos_ids = eos_ids or ()
        self._keep_prefixes = keep_prefixes
        self._slots = [Slot() for _ in range(shape.batch_size)]
        self._queue: deque[LiveRequest] = deque()
        self._unfinished: dict[int, LiveRequest] = {}
        self._events: deque[Event] = deque()  # of requests without a sink
        self._num_submitted = 0
        self._decode_next = False
        # A stream that is let go cancels its request wherever the collector runs.
        self._lock = RLock()

    @property
    def idle(self) -> bool:
        """Whether there is nothing left to run or to deliver."""
        return not self._events and not self._unfinished

    def submit(self, request: Request, *, sink: Callable[[Event], None] | None = None) -> int:
        """Queues a request.

        Args:
            request: What to run.
            sink: Called with its events, within a step or a cancel; by default `step` returns
                them.

        Returns:
            The request's id, which its events carry.

        Raises:
            ValueError: The prompt doesn't fit the cache, an id is outside the vocabulary, or
                there are stop texts and no tokenizer.
        """
        shape = self._backend.shape
        check_prompt(request.prompt_ids, shape)
        if request.stop and self._tokenizer is None:
            raise ValueError("stop texts need a tokenizer; give one, or use stop_ids")
        eos_ids = self._eos_ids if request.eos_ids is None else request.eos_ids
        with self._lock:
            live = LiveRequest(
                request_id=self._num_submitted,
                request=request,
                sink=self._events.append if sink is None else sink,
                completion=Completion(
                    prompt_ids=request.prompt_ids,
                    logprobs=None if request.logprobs is None else [],
                    top_logprobs=None if request.logprobs is None else [],
                ),
                submitted_s=time.perf_counter(),
                end_ids=frozenset((*eos_ids, *request.stop_ids, *self._named_ids(request.stop))),
                end=shape.max_seq_len if request.limit_policy == "stop" else shape.num_positions,
                allowed_size=self._allowed_size,
            )
            self._num_submitted += 1
            self._queue.append(live)
            self._unfinished[live.request_id] = live
        return live.request_id

    def step(self) -> list[Event]:
        """Runs one prefill chunk, or one decode of all slots that are past their prompt.

        The two alternate while there is work for both. If there are events already, from a cancel
        or an interrupted step, these are delivered and nothing is run. A request whose logits
        can't be sampled from ends with "error"; the others go on.

        Returns:
            The events of this step, without those that went to a sink; [] when idle.
        """
        with self._lock:
            if not self._events:
                self._assign_slots()
                prompting = [slot for slot in self._slots if slot.live and not slot.live.decoding]
                decoding = [slot for slot in self._slots if slot.live and slot.live.decoding]
                if prompting and not (self._decode_next and decoding):
                    self._prefill(min(prompting, key=_request_id))
                    self._decode_next = True
                elif decoding:
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
        with self._lock:
            live = self._unfinished.pop(request_id, None)
            if live is not None:
                live.finish("cancelled")
            return live is not None

    def _named_ids(self, stop: tuple[str, ...]) -> list[int]:
        """The ids of stop texts that name a special token, which adds no text of its own."""
        names = {} if self._tokenizer is None else self._tokenizer.special_names
        return [names[text] for text in stop if text in names]

    def _assign_slots(self) -> None:
        """Frees the slots of requests that have ended and fills them from the queue."""
        for slot in self._slots:
            if slot.live is not None and slot.live.finished:
                max_seq_len = self._backend.shape.max_seq_len
                slot.release(max_seq_len=max_seq_len, keep=self._keep_prefixes)
        free = [slot for slot in self._slots if slot.live is None]
        while free and self._queue:
            live = self._queue.popleft()
            if live.finished:
                continue
            prompt_ids = live.request.prompt_ids
            # Of equals the one that keeps least, and the first.
            slot = max(free, key=lambda s: (s.common_len(prompt_ids), -len(s.kept_ids)))
            free.remove(slot)
            self._start(live, slot)

    def _start(self, live: LiveRequest, slot: Slot) -> None:
        request = live.request
        live.sampler = Sampler(
            request.sampling,
            self._backend.shape.vocab_size,
            allowed_size=self._allowed_size,
            prompt_ids=request.prompt_ids,
            sample_index=request.sample_index,
        )
        if self._tokenizer is not None:
            live.decoder = StreamDecoder(self._tokenizer, request.prompt_ids, request.stop)
        live.num_prefilled = live.completion.num_reused = slot.common_len(request.prompt_ids)
        live.completion.queue_s = time.perf_counter() - live.submitted_s
        slot.live = live

    def _prefill(self, slot: Slot) -> None:
        live = slot.live
        assert live is not None
        prompt_ids = live.request.prompt_ids
        start, end = next_chunk(len(prompt_ids), live.num_prefilled, self._backend.shape)
        started_s = time.perf_counter()
        logits = self._backend.prefill(self._slots.index(slot), prompt_ids[start:end], start)
        live.completion.prefill_s += time.perf_counter() - started_s
        if end == len(prompt_ids):
            live.take(logits)
        live.num_prefilled = end
        self._forget_finished()

    def _decode(self) -> None:
        # A row that isn't decoding is fed id 0 where its own next token will go, which then
        # replaces it. That row exists: a prompt that has filled all S is decoding, or over, since
        # its last chunk, and what a free slot keeps leaves one.
        ids = np.zeros(len(self._slots), dtype=np.int64)
        positions = np.zeros(len(self._slots), dtype=np.int64)
        for index, slot in enumerate(self._slots):
            positions[index] = slot.next_position
            if slot.live and slot.live.decoding:
                ids[index] = slot.live.completion.ids[-1]
        logits = self._backend.decode(ids, positions)
        for slot, row in zip(self._slots, logits, strict=True):
            if slot.live and slot.live.decoding:
                slot.live.take(row)
        self._forget_finished()

    def _forget_finished(self) -> None:
        for slot in self._slots:
            if slot.live is not None and slot.live.finished:
                self._unfinished.pop(slot.live.request_id, None)


def generate(
    backend: Backend,
    tokenizer: Tokenizer | None,
    requests: Sequence[Request],
    *,
    on_event: Callable[[Event], None] | None = None,
    eos_ids: tuple[int, ...] | None = None,
) -> list[Completion]:
    """Runs requests to their end, as many at once as the backend has slots.

    Args:
        backend: As for Scheduler.
        tokenizer: As for Scheduler.
        requests: Any number; all are checked before the first one runs.
        on_event: Called with every event as it happens; request ids count from 0.
        eos_ids: As for Scheduler.

    Returns:
        One completion for each request, in their order.

    Raises:
        ValueError: As `submit`.
    """
    return run_requests(Scheduler(backend, tokenizer, eos_ids=eos_ids), requests, on_event=on_event)


def run_requests(
    scheduler: Scheduler,
    requests: Sequence[Request],
    *,
    on_event: Callable[[Event], None] | None = None,
) -> list[Completion]:
    """Like generate, beside whatever else the scheduler runs.

    Args:
        scheduler: Takes the requests.
        requests: All are checked before the first one runs.
        on_event: Called with each of their events.

    Returns:
        One completion for each request, in their order.

    Raises:
        ValueError: As `submit`; what was submitted before is cancelled.
    """
    completions: dict[int, Completion] = {}

    def take(event: Event) -> None:
        if event.completion is not None:
            completions[event.request_id] = event.completion
        if on_event is not None:
            on_event(event)

    request_ids: list[int] = []
    try:
        for request in requests:
            request_ids.append(scheduler.submit(request, sink=take))
        while len(completions) < len(request_ids):
            scheduler.step()
    finally:  # nobody waits any more for what an error or an interrupt leaves
        for request_id in request_ids:
            scheduler.cancel(request_id)
    return [completions[request_id] for request_id in request_ids]


def stream(scheduler: Scheduler, request: Request) -> Generator[Event, None, None]:
    """Yields one request's events as they happen; closing the iterator cancels the request.

    It runs the scheduler's steps, so other requests move on too. Several streams can be read in
    any order, from any thread; each gets its own events. Those of requests submitted without a
    sink are dropped.

    Args:
        scheduler: Takes the request at the first `next`.
        request: What to run.

    Yields:
        The request's events, the last one with its completion.

    Raises:
        ValueError: As `submit`.
    """
    events: deque[Event] = deque()
    request_id = scheduler.submit(request, sink=events.append)
    try:
        finished = False
        while not finished:
            while not events:
                scheduler.step()
            event = events.popleft()
            finished = event.finish_reason is not None
            yield event
    finally:
        scheduler.cancel(request_id)


def _request_id(slot: Slot) -> int:
    assert slot.live is not None
    return slot.live.request_id
