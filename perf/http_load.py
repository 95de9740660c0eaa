"""Asks a server for streams, as many at once or as often as is wanted, and times their tokens."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["StreamTimes", "run_closed", "run_poisson"]


@dataclass(slots=True, kw_only=True)
class StreamTimes:
    """What one request took.

    Attributes:
        status: Of HTTP.
        is_whole: Whether the stream ended with [DONE].
        num_tokens: What it says it generated.
        ttft_s: From the request to its first token; None without one.
        gaps_s: Between each two events with text.
        total_s: From the request to the end.
    """

    status: int = 0
    is_whole: bool = False
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
            times.append(await _ask(port, waiting.pop()))

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
            tasks.append(asyncio.create_task(_ask(port, body)))
        return list(await asyncio.gather(*tasks))

    begin_s = time.perf_counter()
    return asyncio.run(run()), time.perf_counter() - begin_s


async def _ask(port: int, body: dict[str, Any]) -> StreamTimes:
    stated = {**body, "stream": True, "stream_options": {"include_usage": True}}
    raw = json.dumps(stated).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n"
    times, last_s = StreamTimes(), None
    begin_s = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + b"Connection: close\r\n\r\n" + raw)
        times.status = int((await reader.readline()).split()[1])
        while line := await reader.readline():
            if line.startswith(b"data: [DONE]"):
                times.is_whole = True
            elif line.startswith(b"data: "):
                now_s = time.perf_counter()
                event = json.loads(line[6:])
                if event.get("choices") == []:
                    times.num_tokens = event["usage"]["completion_tokens"]
                elif last_s is None:
                    times.ttft_s = now_s - begin_s
                else:
                    times.gaps_s.append(now_s - last_s)
                last_s = now_s
    finally:
        writer.close()
    times.total_s = time.perf_counter() - begin_s
    return times
