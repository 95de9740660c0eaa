"""The scheduler, and requests run to their end or streamed on one that others use as well."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence

from .backend import Backend
from .request import Completion, Event, Request
from .slot_scheduler import QueueFullError, Scheduler
from .text.tokenizer import Tokenizer

__all__ = ["QueueFullError", "Request", "Scheduler", "generate", "run_requests", "stream"]


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
