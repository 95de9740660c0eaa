"""The front's end of an engine process: starts it, restarts it, gives its events to who waits."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Literal

from ..request import Request
from .messages import Batch, Cancel, EngineEvent, EngineSetup, Failed, Ready, Submit, Told

__all__ = ["DIED", "EngineClient", "EngineState"]

logger = logging.getLogger(__name__)

EngineState = Literal["loading", "ready", "dead", "stopped"]

_LONGEST_WAIT_S = 30.0  # between two starts
_STABLE_S = 10.0  # after so long a death counts as the first again
_STOP_S = 5.0  # that a process gets to end by itself
# OpenMP's threads wait 0.2 ms for their next work before they sleep, which is longer than between
# two products. Its default, 3 ms, keeps the front from the cores when a step is over.
_SPINS = {"GOMP_SPINCOUNT": "20000"}

DIED = "the engine ended; it is being started again"


class EngineClient:
    """One engine process, from the event loop's thread alone.

    Attributes:
        state: "loading" until the model is ready, "dead" between a death and the next start.
        ready: What the engine said when it had loaded.
        num_running: Requests with a slot, at the last step.
        num_waiting: Requests without one.
    """

    def __init__(
        self, setup: EngineSetup, *, first_wait_s: float = 0.25, stable_s: float = _STABLE_S
    ) -> None:
        """Knows how to start an engine; `start` does.

        Args:
            setup: What it loads.
            first_wait_s: Between a death and the next start; doubled with every death after it.
            stable_s: Of an engine that was ready for longer the death counts as the first again.
        """
        self.state: EngineState = "loading"
        self.ready: Ready | None = None
        self.num_running = self.num_waiting = 0
        self._setup = setup
        self._first_wait_s, self._stable_s = first_wait_s, stable_s
        self._num_deaths = 0
        self._ready_since_s = 0.0
        self._sinks: dict[int, Callable[[EngineEvent], None]] = {}
        self._connection: Connection | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._restart: asyncio.TimerHandle | None = None
        self._loaded: asyncio.Future[Ready | Failed] | None = None

    @property
    def load(self) -> int:
        """How many requests it has that are not over."""
        return len(self._sinks)

    @property
    def process_id(self) -> int | None:
        """The process's number, while there is one."""
        return None if self._process is None else self._process.pid

    async def start(self) -> Ready:
        """Starts the process and waits until the model is loaded.

        Raises:
            ValueError: It can't be; the message says why.
        """
        self._loaded = asyncio.get_running_loop().create_future()
        self._spawn()
        answer = await self._loaded
        self._loaded = None
        if isinstance(answer, Failed):
            await self.stop()
            raise ValueError(answer.problem)
        return answer

    def submit(self, key: int, request: Request, sink: Callable[[EngineEvent], None]) -> None:
        """Hands a request over; its events, exactly one of them the last, go to the sink.

        Args:
            key: Names the request among all that are not over.
            request: What to run.
            sink: Called on the event loop.
        """
        if self._connection is None:
            sink(EngineEvent(key, finish_reason="error", error=DIED))
            return
        self._sinks[key] = sink
        self._send(Submit(key, request))

    def cancel(self, key: int) -> None:
        """Ends a request, if it is not over; nobody hears of it any more."""
        if self._sinks.pop(key, None) is not None:
            self._send(Cancel(key))

    def fail_all(self, error: str) -> None:
        """Ends every request with an error."""
        for key in list(self._sinks):
            self._send(Cancel(key))
        self._tell_all(error)

    async def stop(self) -> None:
        """Ends the process."""
        self.state = "stopped"
        if self._restart is not None:
            self._restart.cancel()
        self._close()
        if (process := self._process) is None:
            return
        deadline_s = time.monotonic() + _STOP_S
        while process.poll() is None and time.monotonic() < deadline_s:
            await asyncio.sleep(0.02)
        if process.poll() is None:
            process.kill()
            process.wait()

    def _spawn(self) -> None:
        self.state, self._restart = "loading", None
        ours, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "llamac.runtime.serve.engine", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            env={**_SPINS, **os.environ, **self._setup.environment},
        )
        theirs.close()
        self._connection = ours
        ours.send(self._setup)
        asyncio.get_running_loop().add_reader(ours.fileno(), self._read)

    def _send(self, message: Submit | Cancel) -> None:
        if self._connection is None:
            return  # whoever asked has heard of the death
        try:
            self._connection.send(message)
        except OSError:
            self._die()

    def _read(self) -> None:
        connection = self._connection
        try:
            while connection is not None and connection is self._connection and connection.poll():
                self._take(connection.recv())
        except (EOFError, OSError):
            self._die()

    def _take(self, message: Batch | Told | Ready | Failed) -> None:
        if isinstance(message, Batch):
            self.num_running, self.num_waiting = message.num_running, message.num_waiting
            for event in message.events:
                over = event.finish_reason is not None
                sink = self._sinks.pop(event.key, None) if over else self._sinks.get(event.key)
                if sink is not None:  # else it was cancelled
                    sink(event)
            return
        if isinstance(message, Told):
            logger.info("engine %s: %s", self.process_id, message.text)
            return
        if isinstance(message, Ready):
            self.ready, self.state = message, "ready"
            self._ready_since_s = time.monotonic()
            logger.info("engine %s is ready: %s", self.process_id, message.backend)
        elif self._loaded is None:
            logger.error("the engine can't load the model: %s", message.problem)
        if self._loaded is not None and not self._loaded.done():
            self._loaded.set_result(message)

    def _die(self) -> None:
        """After the pipe has closed: what runs gets an error, and the process a successor."""
        if self._connection is None or self.state == "stopped":
            return
        self._close()
        assert self._process is not None
        self._process.kill()
        code = self._process.wait()
        if time.monotonic() - self._ready_since_s > self._stable_s:
            self._num_deaths = 0
        wait_s = min(self._first_wait_s * 2**self._num_deaths, _LONGEST_WAIT_S)
        self._num_deaths += 1
        self.state, self.num_running, self.num_waiting = "dead", 0, 0
        if self._loaded is not None:
            if not self._loaded.done():
                self._loaded.set_result(Failed(problem=f"its process ended with code {code}"))
            return
        logger.error("the engine ended with code %d; another starts in %.2g s", code, wait_s)
        self._restart = asyncio.get_running_loop().call_later(wait_s, self._spawn)
        self._tell_all(DIED)

    def _tell_all(self, error: str) -> None:
        sinks, self._sinks = self._sinks, {}
        for key, sink in sinks.items():
            sink(EngineEvent(key, finish_reason="error", error=error))

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            asyncio.get_running_loop().remove_reader(connection.fileno())
            connection.close()
