"""The parent's side of a measured system's process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from ..runtime.backend import BackendUnavailableError
from .setup import Setup

__all__ = ["Worker", "WorkerError"]

_EXCEPTION = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b")
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class WorkerError(RuntimeError):
    """A worker ended instead of answering; the message is its last words."""


class Worker:
    """Starts a process and talks to it.

    Args:
        name: Names its log, which holds the latest such process's words.
        log_folder: Where the process's standard error goes.
        threads: What OpenMP libraries find in the environment.
        environment: Further variables.
    """

    def __init__(
        self,
        name: str,
        log_folder: Path,
        *,
        threads: int,
        environment: dict[str, str] | None = None,
    ) -> None:
        log_folder.mkdir(parents=True, exist_ok=True)
        self._log = log_folder / f"{name}.log"
        self.spawned_s = time.time()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "llamac.perf.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), **(environment or {})},
            )

    def call(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Runs one command of worker.py.

        Raises:
            BackendUnavailableError: The system can't run here.
            WorkerError: The process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"command": command, **arguments}
        if isinstance(request.get("setup"), Setup):
            request["setup"] = asdict(request["setup"])
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(self._last_words())
        reply = json.loads(line)
        if "refused" in reply:
            raise BackendUnavailableError(reply["refused"])
        return reply

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def cpu_s(self) -> float:
        """CPU time the process has used so far; an idle one that spins is seen here."""
        text = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2]
        user, system = text.split()[11:13]
        return (int(user) + int(system)) * _TICK_S

    def close(self) -> None:
        """Ends the process, killing it if it doesn't listen."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # of a request that a dead process left unread
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _last_words(self) -> str:
        code = self._process.wait()
        lines = self._log.read_text(errors="replace").strip().splitlines() or ["no message"]
        # An exception's message may go on for lines; what it is says the first one.
        errors = [line for line in lines if _EXCEPTION.match(line)]
        return f"process ended with code {code}: {(errors or lines)[-1].strip()} (see {self._log})"
