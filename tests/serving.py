"""Starts `llamac serve` in a process of its own and asks it things, on 127.0.0.1 alone."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from threading import Thread
from typing import Any

START_S = 60  # on a busy machine


@dataclass(kw_only=True)
class Served:
    """A server that is ready, or was."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        found = re.search(r"listening on http://127\.0\.0\.1:(\d+)", "".join(self.lines))
        assert found, self.lines
        return int(found[1])

    @property
    def engine_id(self) -> int:
        """The process of the engine that was last ready."""
        return int(re.findall(r"engine (\d+) is ready", "".join(self.lines))[-1])

    def ask(
        self, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any, Mapping[str, str]]:
        """Status, JSON or text, and headers of an answer; a body makes it a POST."""
        with self.opened(path, body, headers=headers) as response:
            raw = response.read()
            is_json = response.headers.get_content_type() == "application/json"
            value = json.loads(raw) if is_json else raw.decode()
            return response.status, value, response.headers

    @contextlib.contextmanager
    def opened(
        self, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None
    ) -> Iterator[HTTPResponse]:
        with self.sent(path, body, headers=headers) as connection:
            yield connection.getresponse()

    @contextlib.contextmanager
    def sent(
        self, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None
    ) -> Iterator[HTTPConnection]:
        """A request whose answer is not waited for."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        try:
            connection.request("GET" if raw is None else "POST", path, raw, dict(headers or {}))
            yield connection
        finally:
            connection.close()

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[Any]:
        """The events of a stream as they come: objects, and "[DONE]"."""
        with self.opened(path, {**body, "stream": True}) as response:
            assert response.status == 200, response.read()
            yield from events_of(response)

    def until_status(self, wanted: int, *, timeout_s: float = START_S) -> None:
        """Waits for /health."""
        deadline_s = time.monotonic() + timeout_s
        while self.ask("/health")[0] != wanted:
            assert time.monotonic() < deadline_s, self.lines
            time.sleep(0.01)

    def gauge(self, name: str) -> float:
        """One of /metrics."""
        found = re.search(rf"^llamac:{name} (\S+)$", self.ask("/metrics")[1], re.MULTILINE)
        assert found, name
        return float(found[1])


def events_of(response: HTTPResponse) -> Iterator[Any]:
    while line := response.readline():
        if line.startswith(b"data: "):
            text = line[6:].decode().strip()
            yield text if text == "[DONE]" else json.loads(text)


@contextlib.contextmanager
def serving(*words: str | Path, environment: Mapping[str, str] | None = None) -> Iterator[Served]:
    """A server that is ready; it ends with the context."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "llamac.runtime.cli", "serve", "--port", "0"),
            *("--threads", "1"),
            *map(str, words),
        ],
        stderr=subprocess.PIPE,
        env={**os.environ, **(environment or {})},
        text=True,
    )
    served = Served(process=process)

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            served.lines.append(line)

    reader = Thread(target=read)
    reader.start()
    try:
        deadline_s = time.monotonic() + START_S
        while not any(line.startswith("serving ") for line in served.lines):
            assert process.poll() is None, served.lines
            assert time.monotonic() < deadline_s, served.lines
            time.sleep(0.01)
        yield served
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            reader.join()
            assert process.stderr is not None
            process.stderr.close()
