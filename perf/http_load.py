"""Asks a server for streams, as many at once or as often as is wanted, and times their tokens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["StreamTimes", "ask", "run_closed", "run_poisson"]


@dataclass(slots=True, kw_only=True)
class StreamTimes:
    """What one request took.

    Attributes:
        status: Of HTTP; 0 where the connection was refused or cut before it.
        is_finished: Whether it told why it ended.
        is_done: Whether it ended with [DONE]; not every server says so.
        is_told: Whether it told of an error.
        num_tokens: What it says it generated, or its events with text where it doesn't.
        ttft_s: From the request to its first token; None without one.
        gaps_s: Between each two events with text.
        total_s: From the request to the end.
    """

    status: int = 0
    is_finished: bool = False
    is_done: bool = False
    is_told: bool = False
    num_tokens: int = 0
    ttft_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    total_s: float = 0.0


def run_closed(
    port: int, bodies: Sequence[dict[str, Any]], *, num_clients: int
) -> tuple[list[StreamTimes], float]:
    """So many clients at once, each asking again when it has its answer.

    Args:
        port: Of the server, on 127.0.0.1.
        bodies: Of the requests to /v1/completions, shared out.
        num_clients: How many.

    Returns:
        Times of each request, and the seconds of all.
    """

    async def client(waiting: list[dict[str, Any]], times: list[StreamTimes]) -> None:
        while waiting:
            times.append(await ask(port, waiting.pop()))

    async def run() -> list[StreamTimes]:
        waiting, times = list(reversed(bodies)), []
        await asyncio.gather(*(client(waiting, times) for _ in range(num_clients)))
        return times

    begin_s = time.perf_counter()
    return asyncio.run(run()), time.perf_counter() - begin_s


def run_poisson(
    port: int, bodies: Sequence[dict[str, Any]], *, requests_per_s: float
) -> tuple[list[StreamTimes], float]:
    """Requests that come when they like, at a mean rate; see run_closed."""
    waits_s = np.random.default_rng(0).exponential(1 / requests_per_s, len(bodies))

    async def run() -> list[StreamTimes]:
        tasks = []
        for body, wait_s in zip(bodies, waits_s, strict=True):
            await asyncio.sleep(wait_s)
            tasks.append(asyncio.create_task(ask(port, body)))
        return list(await asyncio.gather(*tasks))

    begin_s = time.perf_counter()
    return asyncio.run(run()), time.perf_counter() - begin_s


async def ask(port: int, body: dict[str, Any], *, leave_after: int | None = None) -> StreamTimes:
    """Asks for one stream and reads it to its end.

    Args:
        port: Of the server, on 127.0.0.1.
        body: Of the request to /v1/completions.
        leave_after: Cuts the connection after so many events.

    Returns:
        Its times; those of a cut or refused connection end there.
    """
    stated = {**body, "stream": True, "stream_options": {"include_usage": True}}
    raw = json.dumps(stated).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n"
    head += "Content-Type: application/json\r\nConnection: close\r\n\r\n"
    times, begin_s = StreamTimes(), time.perf_counter()
    with contextlib.suppress(ConnectionError):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(head.encode() + raw)
            if status_line := await reader.readline():
                times.status = int(status_line.split()[1])
                await _read(reader, times, begin_s, leave_after)
        finally:
            writer.close()
    times.total_s = time.perf_counter() - begin_s
    return times


async def _read(
    reader: asyncio.StreamReader, times: StreamTimes, begin_s: float, leave_after: int | None
) -> None:
    last_s, num_events, num_told = None, 0, None
    while num_events != leave_after and (line := await reader.readline()):
        if line.startswith(b"data: [DONE]"):
            times.is_done = True
        elif line.startswith(b"data: "):
            now_s = time.perf_counter()
            event = json.loads(line[6:])
            times.is_told |= "error" in event
            if usage := event.get("usage"):
                num_told = usage["completion_tokens"]
            for choice in event.get("choices", ()):
                times.is_finished |= choice.get("finish_reason") is not None
                if choice.get("text"):
                    num_events += 1
                    if last_s is None:
                        times.ttft_s = now_s - begin_s
                    else:
                        times.gaps_s.append(now_s - last_s)
                    last_s = now_s
    times.num_tokens = num_events if num_told is None else num_told
