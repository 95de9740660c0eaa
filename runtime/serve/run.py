"""Runs the application: a socket, an event loop, and an end that lets streams end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from .app import ServeConfig, create_app

__all__ = ["listen", "run_server", "serving_threads"]

logger = logging.getLogger(__name__)

_GRACE_S = 5  # for the error events of what didn't end in time


def serving_threads(num_engines: int) -> int:
    """CPU threads of each engine: all cores but the one that the front needs, shared out."""
    cores = len(os.sched_getaffinity(0))
    return max(1, (cores - 1) // num_engines)


def listen(host: str, port: int) -> socket.socket:
    """Opens the socket that clients connect to.

    Raises:
        OSError: The address can't be taken.
    """
    listener = socket.create_server((host, port), backlog=1024)
    # What it accepts inherits this. asyncio leaves it out where a socket doesn't name its protocol,
    # and on a kept connection each answer then waits 40 ms for the client to acknowledge its head.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def run_server(
    config: ServeConfig, *, host: str, port: int, announce: Callable[[str], None]
) -> int:
    """Serves until a signal ends it: SIGTERM and Ctrl-C let what runs end.

    Args:
        config: What is served.
        host: Where it listens.
        port: 0 takes a free one.
        announce: Told where it listens, and when the model is ready.

    Returns:
        The exit code, 0.

    Raises:
        OSError: The address can't be taken.
        ValueError: The model can't be loaded.
    """
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of clients that have left
    app = create_app(config)
    listener = listen(host, port)
    server = _Drained(
        uvicorn.Config(
            app,
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(config.shutdown_timeout_s) + _GRACE_S,
        ),
        app,
        config.shutdown_timeout_s,
    )
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}"
    announce(f"loading; listening on {address}")

    async def serve() -> None:
        serving = asyncio.create_task(server.serve([listener]))
        loading = asyncio.create_task(app.state.server.loaded.wait())
        await asyncio.wait((serving, loading), return_when=asyncio.FIRST_COMPLETED)
        loading.cancel()  # where a signal came first
        if app.state.server.problem is not None:
            server.should_exit = True
        elif app.state.server.model is not None:
            announce(f"serving {app.state.server.model.name} on {address}")
        await serving
        if app.state.server.problem is not None:
            raise app.state.server.problem

    try:
        asyncio.run(serve())
    except (KeyboardInterrupt, SystemExit):
        if not server.drained:
            raise
    return 0


class _Drained(uvicorn.Server):
    """A server that refuses new requests once it shall end, and tells those that take too long.

    Attributes:
        drained: A signal ended it, and it ended by itself.
    """

    def __init__(self, config: uvicorn.Config, app: Starlette, timeout_s: float) -> None:
        super().__init__(config)
        self.drained = False
        self._server = app.state.server
        self._timeout_s = timeout_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See uvicorn.Server."""
        name = signal.Signals(sig).name
        logger.info("%s: what runs gets %g s to end", name, self._timeout_s)
        self._server.drain()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn.Server."""
        error = "the server is shutting down"
        loop = asyncio.get_running_loop()
        late = loop.call_later(self._timeout_s, self._server.pool.fail_all, error)
        await super().shutdown(sockets)
        late.cancel()
        self.drained = True
