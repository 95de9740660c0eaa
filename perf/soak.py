"""Holds a server under load while clients leave and engines are killed; counts what is left."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from .http_load import StreamTimes, ask
from .servers import RunningServer

__all__ = ["run_soak"]

_NUM_CLIENTS = 16
_LEAVING_SHARE = 0.4
_KILL_EVERY_S = 60.0
_MAX_TOKENS = 200
_RETRY_S = 0.1  # while the engine starts again
_SETTLE_S = 1.0  # after which nothing may run on
_MAX_GROWTH = 0.05
_PROMPTS = ("Once upon a time", "The little dog", "Lily went to the park and", "Tom had a ball.")


def run_soak(server: RunningServer, *, minutes: float) -> dict[str, Any]:
    """Runs for some minutes.

    16 clients ask without a pause, and 4 in 10 leave in the middle of their stream; every minute
    the engine is killed. Each minute's memory is read just before that, when each engine is as old
    as the others were.

    Args:
        server: A server of one engine.
        minutes: How long.

    Returns:
        The counts, each minute's bytes and descriptors, and `problems`: what is not as it should
        be, in words.
    """
    return asyncio.run(_run(server, minutes * 60.0))


async def _run(server: RunningServer, duration_s: float) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    end_s = time.monotonic() + duration_s
    await ask(server.port, {"prompt": _PROMPTS[0], "max_tokens": 1})  # opens what stays open
    await asyncio.sleep(_SETTLE_S)
    descriptors = [_num_descriptors(server)]
    clients = [asyncio.create_task(_client(server, i, end_s, counts)) for i in range(_NUM_CLIENTS)]
    memory: list[dict[str, int]] = []
    while (left_s := end_s - time.monotonic()) > 0:
        await asyncio.sleep(min(left_s, _KILL_EVERY_S))
        memory.append(_memory(server))
        if time.monotonic() < end_s:
            for process_id in server.engine_ids():
                os.kill(process_id, signal.SIGKILL)
                counts["killed"] += 1
    await asyncio.gather(*clients)
    await asyncio.sleep(_SETTLE_S)
    descriptors.append(_num_descriptors(server))  # before a connection that asks for the next
    in_flight = await asyncio.to_thread(_in_flight, server)
    result = {
        "minutes": duration_s / 60.0,
        "counts": dict(counts),
        "memory": memory,
        "descriptors": descriptors,
        "in_flight": in_flight,
    }
    return result | {"problems": _problems(result)}


async def _client(server: RunningServer, number: int, end_s: float, counts: Counter[str]) -> None:
    draw = np.random.default_rng(number)
    while time.monotonic() < end_s:
        max_tokens = int(draw.integers(1, _MAX_TOKENS + 1))
        body = {
            "prompt": _PROMPTS[draw.integers(len(_PROMPTS))],
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "seed": int(draw.integers(1 << 31)),
        }
        leaves = draw.random() < _LEAVING_SHARE
        leave_after = int(draw.integers(max_tokens)) if leaves else None
        times = await ask(server.port, body, leave_after=leave_after)
        outcome = _outcome(times, max_tokens, leave_after)
        counts[outcome] += 1
        if outcome == "refused":
            await asyncio.sleep(_RETRY_S)


def _outcome(times: StreamTimes, max_tokens: int, leave_after: int | None) -> str:
    """What became of a stream; only "short" is a lie."""
    if times.status != 200:
        return "refused" if times.status in (429, 503) else "broken"
    if times.is_told:
        return "told of the engine's end"
    if times.is_done and times.num_tokens == max_tokens:
        return "whole"
    return "left" if times.num_tokens == leave_after and not times.is_done else "short"


def _problems(result: dict[str, Any]) -> list[str]:
    counts, memory, (before, after) = result["counts"], result["memory"], result["descriptors"]
    found = [f"{counts[name]} streams are {name}" for name in ("short", "broken") if name in counts]
    if after != before:
        found.append(f"{before} descriptors became {after}")
    if result["in_flight"]:
        found.append(f"{result['in_flight']} requests are in flight")
    if not all(one["engine"] for one in memory):
        found.append("an engine was not back long after its predecessor's end")
    # The first minute fills what is kept: modules, pools, the statistics' labels.
    for name in memory[0]:
        sizes = [one[name] for one in memory if one[name]]
        if sizes and sizes[-1] > (1 + _MAX_GROWTH) * sizes[0]:
            found.append(f"memory of {name} grew from {sizes[0]} to {sizes[-1]} bytes")
    return found


def _memory(server: RunningServer) -> dict[str, int]:
    """Resident bytes of the front and of its engines."""
    engines = server.engine_ids()
    return {
        "front": _resident_bytes(server.process_id),
        "engine": sum(_resident_bytes(process_id) for process_id in engines),
    }


def _resident_bytes(process_id: int) -> int:
    try:
        text = Path(f"/proc/{process_id}/status").read_text()
    except FileNotFoundError:  # ended meanwhile
        return 0
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else 0


def _num_descriptors(server: RunningServer) -> int:
    return len(list(Path(f"/proc/{server.process_id}/fd").iterdir()))


def _in_flight(server: RunningServer) -> int:
    text = server.get("/metrics")[1]
    found = re.findall(r"^llamac:num_requests_(?:running|waiting) (\S+)$", text, re.MULTILINE)
    assert len(found) == 2
    return int(sum(map(float, found)))
