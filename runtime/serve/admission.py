"""Who may come in, to which engine, and the events of those who did."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from types import TracebackType

from ..request import Request
from .engine_client import DIED, EngineClient
from .errors import ApiError
from .messages import EngineEvent
from .metrics import Metrics

__all__ = ["Job", "Limits", "Pool"]

_PREFIX_LEN = 32  # ids that tell a conversation from others
_MAX_PREFIXES = 4096
_MAX_DETOUR = 2  # requests that a conversation's own engine may have more than the idlest


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much is taken in.

    Attributes:
        max_queue: Completions that may wait for a slot.
        max_queued_tokens: Prompt tokens of completions that have no token yet, slots aside.
        max_unread: Events that a client may leave unread.
        request_timeout_s: Seconds a completion may take, waiting included; None is no limit.
    """

    max_queue: int = 128
    max_queued_tokens: int = 262_144
    max_unread: int = 4096
    request_timeout_s: float | None = None


class Pool:
    """The engines, and all completions that are not over.

    Attributes:
        engines: All alike.
        limits: How much is taken in.
        draining: Nothing new is taken in.
    """

    def __init__(self, engines: Sequence[EngineClient], limits: Limits, metrics: Metrics) -> None:
        self.engines = tuple(engines)
        self.limits = limits
        self.draining = False
        self._metrics = metrics
        self._keys = itertools.count()
        self._unstarted: dict[int, int] = {}  # prompt tokens by key
        self._homes: OrderedDict[int, EngineClient] = OrderedDict()  # by a prompt's beginning

    @property
    def status(self) -> str:
        """Whether a request could be taken in: "ready", "loading", "draining" or "dead"."""
        if self.draining:
            return "draining"
        states = [engine.state for engine in self.engines]
        return next((state for state in ("ready", "loading") if state in states), "dead")

    @property
    def num_running(self) -> int:
        """Requests with a slot."""
        return sum(engine.num_running for engine in self.engines)

    @property
    def num_waiting(self) -> int:
        """Requests without one."""
        return sum(engine.load for engine in self.engines) - self.num_running

    def open(self, requests: Sequence[Request]) -> Job:
        """Takes in the completions of one HTTP request, all or none.

        Args:
            requests: One for each completion.

        Returns:
            Their events; entered as a context, so that whatever ends it frees their slots.

        Raises:
            ApiError: There is no engine now (503), too much waits (429), or there are more
                completions than could ever wait (400).
        """
        engines = [engine for engine in self.engines if engine.state == "ready"]
        if self.draining or not engines:
            self._metrics.reject(self.status)
            raise ApiError(
                503,
                DIED if self.status == "dead" else f"the server is {self.status}; try again",
                code=self.status,
                headers={"Retry-After": "5"},
            )
        slots = sum(engine.ready.shape.batch_size for engine in engines if engine.ready)
        load = sum(engine.load for engine in engines)
        room = slots + self.limits.max_queue
        if len(requests) > room:
            raise ApiError(400, f"{len(requests)} completions are asked for; {room} fit", param="n")
        tokens = sum(len(request.prompt_ids) for request in requests)
        waits = load + len(requests) > slots
        queued = sum(self._unstarted.values())
        if load + len(requests) > room:
            self._metrics.reject("queue_full")
            raise self._too_busy(f"{load - slots} completions wait already")
        if waits and queued + tokens > self.limits.max_queued_tokens:
            self._metrics.reject("queued_tokens")
            raise self._too_busy(f"{queued} prompt tokens wait already")
        keys = [next(self._keys) for _ in requests]
        return Job(self, dict(zip(keys, requests, strict=True)), self._metrics)

    def fail_all(self, error: str) -> None:
        """Ends everything that runs or waits with an error."""
        for engine in self.engines:
            engine.fail_all(error)

    def choose(self, request: Request) -> EngineClient:
        """The idlest engine, or the one that had the conversation before, if it isn't busier."""
        ready = [engine for engine in self.engines if engine.state == "ready"]
        idlest = min(ready or self.engines, key=lambda engine: engine.load)
        if len(ready) < 2:
            return idlest
        prefix = hash((request.prefix_scope, request.prompt_ids[:_PREFIX_LEN]))
        home = self._homes.get(prefix)
        if home not in ready or home.load > idlest.load + _MAX_DETOUR:
            home = idlest
        self._homes[prefix] = home
        self._homes.move_to_end(prefix)
        if len(self._homes) > _MAX_PREFIXES:
            self._homes.popitem(last=False)
        return home

    def count_unstarted(self, key: int, num_tokens: int) -> None:
        """Remembers how many prompt tokens of a completion wait; 0 forgets it."""
        if num_tokens:
            self._unstarted[key] = num_tokens
        else:
            self._unstarted.pop(key, None)

    def _too_busy(self, problem: str) -> ApiError:
        return ApiError(
            429,
            f"{problem}; try again later",
            code="queue_full",
            headers={"Retry-After": "1"},
        )


class Job:
    """The completions of one HTTP request, while they run."""

    def __init__(self, pool: Pool, requests: dict[int, Request], metrics: Metrics) -> None:
        self._pool, self._requests, self._metrics = pool, requests, metrics
        self._indices = {key: index for index, key in enumerate(requests)}
        self._engines: dict[int, EngineClient] = {}
        self._events: asyncio.Queue[EngineEvent] = asyncio.Queue()
        self._begin_s = time.perf_counter()
        self._last_s: dict[int, float] = {}
        for key, request in requests.items():
            engine = pool.choose(request)
            self._engines[key] = engine
            pool.count_unstarted(key, len(request.prompt_ids))
            engine.submit(key, request, self._take)

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Frees the slots of what is not over."""
        self.cancel()

    async def events(
        self, *, every_s: float | None = None
    ) -> AsyncGenerator[tuple[int, EngineEvent] | None, None]:
        """Yields events as they come, until each completion has had its last.

        Args:
            every_s: Yield None after so long without one.

        Raises:
            ApiError: A completion failed, or ran out of time, or its events were not read.
        """
        num_open = len(self._indices)
        while num_open:
            try:
                async with asyncio.timeout(every_s if self._events.empty() else None):
                    event = await self._events.get()
            except TimeoutError:
                yield None
                continue
            if event.finish_reason in ("error", "timeout", "cancelled"):
                raise self._error(event)
            num_open -= event.finish_reason is not None
            yield self._indices[event.key], event

    def cancel(self) -> None:
        """Ends what is not over."""
        for key, engine in self._engines.items():
            engine.cancel(key)
            self._pool.count_unstarted(key, 0)
            self._metrics.finish("abort", time.perf_counter() - self._begin_s)
        self._engines = {}

    def _take(self, event: EngineEvent) -> None:
        key, now_s = event.key, time.perf_counter()
        if event.token_id is not None:
            if key in self._last_s:
                self._metrics.next_token(now_s - self._last_s[key])
            else:
                self._pool.count_unstarted(key, 0)
                self._metrics.first_token(now_s - self._begin_s)
            self._last_s[key] = now_s
        if event.finish_reason is not None:
            del self._engines[key]
            self._pool.count_unstarted(key, 0)
            self._metrics.finish(event.finish_reason, now_s - self._begin_s)
            if event.completion is not None:
                self._metrics.count(len(self._requests[key].prompt_ids), event.completion)
        self._events.put_nowait(event)
        if self._events.qsize() > self._pool.limits.max_unread:
            self.cancel()
            error = "the stream was not read; read it faster"
            self._events.put_nowait(EngineEvent(key, finish_reason="error", error=error))

    def _error(self, event: EngineEvent) -> ApiError:
        if event.error == DIED:
            return ApiError(503, DIED, code="engine_died", headers={"Retry-After": "5"})
        if event.finish_reason == "timeout":
            limit = self._pool.limits.request_timeout_s
            return ApiError(504, f"the completion took longer than {limit} s", code="timeout")
        return ApiError(500, event.error or "the completion was cancelled", code="failed")
