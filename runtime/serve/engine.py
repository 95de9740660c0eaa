"""The engine process: one model, stepped as long as there is work.

A process of its own, because a compiled step holds Python's lock for its whole length: clients of
an event loop beside it would wait for every step.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread

from ..backend import BackendUnavailableError
from ..load import open_source
from ..request import Event
from ..scheduler import Scheduler
from .messages import Batch, Cancel, EngineEvent, EngineSetup, Failed, Ready, Submit, Told

__all__ = ["main"]

_LOAD_ERRORS = (
    ValueError,
    OSError,
    OverflowError,
    RecursionError,
    MemoryError,
    ModuleNotFoundError,
    BackendUnavailableError,
)


def main() -> None:
    """Loads what the front asks for on the connection whose number is the first argument."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the front ends it, once it has drained
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    try:
        _run(connection)
    except (BrokenPipeError, ConnectionResetError, EOFError):  # the front is gone
        os._exit(0)  # without waiting for the thread that reads


def _run(connection: Connection) -> None:
    setup: EngineSetup = connection.recv()
    try:
        model = open_source(setup.source, **setup.options).load(
            default_batch=setup.default_batch,
            generation_config=setup.generation_config,
            keep_prefixes=not setup.exact,
            adaptive=not setup.exact,
            announce=lambda text: connection.send(Told(text)),
            progress=lambda text: connection.send(Told(text)),
        )
    except _LOAD_ERRORS as error:
        connection.send(Failed(problem=str(error) or type(error).__name__))
        return
    assert model.folder is not None  # a source has one
    connection.send(
        Ready(
            shape=model.backend.shape,
            folder=model.folder,
            backend=model.name,
            defaults=model.defaults,
        )
    )
    commands: SimpleQueue[Submit | Cancel | None] = SimpleQueue()
    Thread(target=_read, args=(connection, commands), daemon=True).start()
    _Engine(model.scheduler, connection).run(commands)


def _read(connection: Connection, commands: SimpleQueue[Submit | Cancel | None]) -> None:
    """Empties the pipe during steps, so that the front never waits for one to end."""
    try:
        while True:
            commands.put(connection.recv())
    except (EOFError, OSError):
        commands.put(None)


class _Engine:
    def __init__(self, scheduler: Scheduler, connection: Connection) -> None:
        self._scheduler = scheduler
        self._connection = connection
        self._request_ids: dict[int, int] = {}  # by key
        self._events: list[EngineEvent] = []

    def run(self, commands: SimpleQueue[Submit | Cancel | None]) -> None:
        """Does commands and steps until None comes."""
        while True:
            while self._scheduler.idle or not commands.empty():
                command = commands.get()
                if command is None:
                    return
                self._do(command)
                self._send()
            self._scheduler.step()
            self._send()

    def _do(self, command: Submit | Cancel) -> None:
        if isinstance(command, Cancel):
            request_id = self._request_ids.get(command.key)
            if request_id is not None:
                self._scheduler.cancel(request_id)
            return
        key = command.key
        try:
            request_id = self._scheduler.submit(
                command.request, sink=lambda event: self._take(key, event)
            )
        except ValueError as error:
            self._events.append(EngineEvent(key, finish_reason="error", error=str(error)))
        else:
            self._request_ids[key] = request_id

    def _take(self, key: int, event: Event) -> None:
        completion, error = event.completion, None
        if completion is not None:
            self._request_ids.pop(key, None)
            error = completion.error
            completion = replace(
                completion, prompt_ids=(), ids=[], text="", logprobs=None, top_logprobs=None
            )
        self._events.append(
            EngineEvent(
                key,
                event.token_id,
                event.text,
                event.logprob,
                event.top_logprobs,
                event.finish_reason,
                completion,
                error,
            )
        )

    def _send(self) -> None:
        if self._events:
            running, waiting = self._scheduler.running, self._scheduler.waiting
            self._connection.send(Batch(self._events, running, waiting))
            self._events = []


if __name__ == "__main__":
    main()
