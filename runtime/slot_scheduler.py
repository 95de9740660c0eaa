"""Runs many requests through one backend: a slot each; a step is a chunk, a decode or a mix."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from threading import RLock

import numpy as np
from numpy.typing import NDArray

from .backend import Backend
from .chunks import check_prompt, next_chunk
from .mixed_step import choose_rows, decode_few, take_mixed
from .prefix import Slot, read_kept, write_kept
from .request import Completion, Constraint, Event, LiveRequest, Request
from .sampling import Sampler
from .speculation import take_several
from .text.constraint import Grammar
from .text.tokenizer import StreamDecoder, Tokenizer
from .turns import Turns

__all__ = ["QueueFullError", "Scheduler"]


class QueueFullError(RuntimeError):
    """As much waits as may; the message says how much."""


class Scheduler:
    """Gives requests a cache slot each, first come first served, and moves them on by steps.

    A request's tokens depend on its prompt, its seed and its logits alone, never on its slot, its
    neighbours or the order of steps; its logits, unless `adaptive`, on no neighbour either. Any
    thread may submit, cancel and step. After a step that was interrupted in the backend (Ctrl-C, an
    error) requests can be cancelled, or the next step repeats it.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer | None,
        *,
        eos_ids: tuple[int, ...] | None = None,
        keep_prefixes: bool = False,
        adaptive: bool = False,
        max_queue: int | None = None,
        max_queued_tokens: int | None = None,
        constraints: Callable[[Grammar], Constraint] | None = None,
    ) -> None:
        """Takes a backend whose slots nobody else uses.

        Args:
            backend: Runs the chunks and the decodes.
            tokenizer: Makes the text; with None texts are "" and stop texts are refused.
            eos_ids: Ids that end requests which name none. Default: the tokenizer's.
            keep_prefixes: Whether a prompt that begins like what a free slot still holds starts
                there. The rows then come from other chunks, and logits may differ by a rounding.
            adaptive: Whether chunks and steps are chosen by what else runs: a slot that decodes
                alone doesn't pay for all, prompts go beside others' tokens, and long chunks wait
                while others decode. Logits may then differ by a rounding, too.
            max_queue: How many requests may wait for a slot; None is no limit.
            max_queued_tokens: How many ids their prompts may have, all together.
            constraints: Makes what holds a completion to its request's grammar.
        """
        shape = backend.shape
        self._backend = backend
        self._tokenizer = tokenizer
        self._allowed_size = shape.vocab_size
        if tokenizer is not None:
            self._allowed_size = min(tokenizer.vocab_size, shape.vocab_size)
            eos_ids = tokenizer.eos_ids if eos_ids is None else eos_ids
        self._eos_ids = eos_ids or ()
        self._keep_prefixes, self._adaptive = keep_prefixes, adaptive
        self._max_queue, self._max_queued_tokens = max_queue, max_queued_tokens
        self._constraints = constraints
        self._slots = [Slot() for _ in range(shape.batch_size)]
        self._queue: deque[LiveRequest] = deque()
        self._unfinished: dict[int, LiveRequest] = {}
        self._events: deque[Event] = deque()  # of requests without a sink
        self._num_submitted = 0
        self._decode_next = False
        self._turns = Turns(shape, adaptive=adaptive)
        # A stream that is let go cancels its request wherever the collector runs.
        self._lock = RLock()

    @property
    def idle(self) -> bool:
        """Whether there is nothing left to run or to deliver."""
        return not self._events and not self._unfinished

    @property
    def running(self) -> int:
        """How many requests have a slot."""
        with self._lock:
            return sum(slot.live is not None and not slot.live.finished for slot in self._slots)

    @property
    def waiting(self) -> int:
        """How many requests wait for a slot."""
        with self._lock:
            return len(self._unfinished) - self.running

    @property
    def free(self) -> int:
        """How many slots nobody has."""
        return len(self._slots) - self.running

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
                there are stop texts and no tokenizer, or a grammar and nothing to hold to it.
            QueueFullError: No slot is free, and too much waits already.
        """
        shape = self._backend.shape
        check_prompt(request.prompt_ids, shape)
        if request.stop and self._tokenizer is None:
            raise ValueError("stop texts need a tokenizer; give one, or use stop_ids")
        if request.grammar is not None and self._constraints is None:
            raise ValueError("a grammar needs a scheduler with constraints")
        eos_ids = self._eos_ids if request.eos_ids is None else request.eos_ids
        with self._lock:
            self._check_queue(len(request.prompt_ids))
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

        The two alternate while there is work for both; if the scheduler is adaptive and the backend
        has mixed steps, a step does both instead. If there are events already, from a cancel
        or an interrupted step, these are delivered and nothing is run. A request whose logits
        can't be sampled from ends with "error"; the others go on.

        Returns:
            The events of this step, without those that went to a sink; [] when idle.
        """
        with self._lock:
            self._end_late()
            if not self._events:
                self._assign_slots()
                shape, turns = self._backend.shape, self._turns
                decoding, prompting = turns.split(self._slots)
                prefill_lens, mixed_lens = turns.lens(is_waited_for=bool(decoding))
                if num_rows := choose_rows(shape, mixed_lens, decoding, prompting):
                    take_mixed(self._backend, self._slots, decoding, prompting, num_rows, turns)
                    self._forget_finished()
                elif prompting and not (self._decode_next and decoding):
                    self._prefill(prompting[0], longest=prefill_lens[-1])
                    self._decode_next = True
                elif decoding:
                    self._decode(decoding)
                    self._decode_next = False
            events = list(self._events)
            self._events.clear()
            return events

    def _check_queue(self, num_tokens: int) -> None:
        waiting = self.waiting - self.free  # what no slot is free for
        if self._max_queue is not None and waiting >= self._max_queue:
            raise QueueFullError(f"{waiting} requests wait, max_queue is {self._max_queue}")
        if self._max_queued_tokens is None or waiting < 0:
            return
        queued = sum(len(live.request.prompt_ids) for live in self._queue if not live.finished)
        if queued + num_tokens > self._max_queued_tokens:
            raise QueueFullError(
                f"{queued} prompt tokens wait, with this prompt's {num_tokens} they pass "
                f"max_queued_tokens, {self._max_queued_tokens}"
            )

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

    def read_kept(self, ids: Sequence[int]) -> tuple[tuple[int, ...], NDArray[np.float32]]:
        """Copies what a free slot keeps of a conversation; see prefix.read_kept."""
        with self._lock:
            self._release_slots()
            return read_kept(self._slots, self._backend, ids)

    def write_kept(self, ids: Sequence[int], rows: NDArray[np.float32]) -> None:
        """Gives a free slot what `read_kept` took; see prefix.write_kept."""
        with self._lock:
            self._release_slots()
            write_kept(self._slots, self._backend, ids, rows)

    def _named_ids(self, stop: tuple[str, ...]) -> list[int]:
        """The ids of stop texts that name a special token, which adds no text of its own."""
        names = {} if self._tokenizer is None else self._tokenizer.special_names
        return [names[text] for text in stop if text in names]

    def _end_late(self) -> None:
        """Ends the requests whose time is over, waiting or running."""
        now_s = time.perf_counter()
        for live in [live for live in self._unfinished.values() if live.deadline_s <= now_s]:
            del self._unfinished[live.request_id]
            live.finish("timeout")

    def _assign_slots(self) -> None:
        """Frees the slots of requests that have ended and fills them from the queue."""
        self._release_slots()
        free = [slot for slot in self._slots if slot.live is None]
        while free and self._queue:
            live = self._queue.popleft()
            if live.finished:
                continue
            request = live.request
            # Of equals the one that keeps least, and the first.
            slot = max(free, key=lambda s: (s.common_len(request), -len(s.kept_ids)))
            try:
                self._start(live, slot)
            except ValueError as error:  # a grammar or a bias that this tokenizer has no ids for
                self._unfinished.pop(live.request_id, None)
                live.completion.error = str(error)
                live.finish("error")
                continue
            free.remove(slot)

    def _release_slots(self) -> None:
        for slot in self._slots:
            if slot.live is not None and slot.live.finished:
                max_seq_len = self._backend.shape.max_seq_len
                slot.release(max_seq_len=max_seq_len, keep=self._keep_prefixes)

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
        if request.grammar is not None and self._constraints is not None:
            live.constraint = self._constraints(request.grammar)
        live.num_prefilled = live.completion.num_reused = slot.common_len(request)
        live.completion.queue_s = time.perf_counter() - live.submitted_s
        slot.live = live

    def _prefill(self, slot: Slot, *, longest: int) -> None:
        live = slot.live
        assert live is not None
        prompt_ids = live.request.prompt_ids
        shape = self._backend.shape
        start, end = next_chunk(len(prompt_ids), live.num_prefilled, shape, longest=longest)
        started_s = time.perf_counter()
        logits = self._backend.prefill(self._slots.index(slot), prompt_ids[start:end], start)
        elapsed_s = time.perf_counter() - started_s
        chunk_len = next(n for n in shape.prefill_lens if n >= end - start)
        self._turns.count("prefill", chunk_len, elapsed_s, [live])
        if end == len(prompt_ids):
            live.take(logits)
        live.num_prefilled = end
        self._forget_finished()

    def _decode(self, decoding: Sequence[Slot]) -> None:
        if not take_several(self._backend, self._slots, decoding):
            for slot, row in self._logits(decoding):
                assert slot.live is not None
                slot.live.advance(row)
        self._forget_finished()

    def _logits(self, decoding: Sequence[Slot]) -> Iterator[tuple[Slot, NDArray[np.float32]]]:
        """Feeds each of these slots its next id."""
        shape, first = self._backend.shape, decoding[0]
        is_alone = self._adaptive and len(decoding) == 1 and shape.prefill_lens[0] == 1
        assert first.live is not None
        # What is scored goes through the same step always, as `llamac score` on a bundle does.
        if is_alone and first.next_position < shape.max_seq_len and not first.live.scored:
            index = self._slots.index(first)
            yield first, self._backend.prefill(index, [first.live.next_id], first.next_position)
            return
        if self._adaptive and (few := decode_few(self._backend, self._slots, decoding)) is not None:
            yield from zip(decoding, few, strict=True)
            return
        # A row that isn't decoding is fed id 0 where its own next token will go, which then
        # replaces it. That row exists: a prompt that has filled all S is decoding, or over, since
        # its last chunk, and what a free slot keeps leaves one.
        ids = np.zeros(len(self._slots), dtype=np.int64)
        positions = np.zeros(len(self._slots), dtype=np.int64)
        for index, slot in enumerate(self._slots):
            positions[index] = slot.next_position
            ids[index] = slot.live.next_id if slot.live else 0
        logits = self._backend.decode(ids, positions)
        for slot in decoding:
            yield slot, logits[self._slots.index(slot)]

    def _forget_finished(self) -> None:
        for slot in self._slots:
            if slot.live is not None and slot.live.finished:
                self._unfinished.pop(slot.live.request_id, None)
