"""A process of its own for each try, forked from one that has imported everything."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from judge import TRACEBACK, Ended

__all__ = ["Worker", "limit_resources"]

_TYPED = "hello\nand again\n"  # on standard input
_ADDRESS_BYTES = 10 << 30
_FILE_BYTES = 64 << 20
_CPU_S = 20  # a busy machine makes nothing hang


class Worker:
    """A function at work in a new folder, which is its working directory.

    Args:
        folder: Is made; its files `stdout` and `stderr` hold what is printed.
        work: Gives the exit code.
        limit_s: Time after which it is killed.
    """

    def __init__(self, folder: Path, work: Callable[[], int], *, limit_s: float) -> None:
        folder.mkdir()
        self.folder = folder
        self._deadline = time.monotonic() + limit_s
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            _work(folder, work)

    def poll(self) -> Ended | None:
        """How it ended, or None as long as it runs."""
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        code: int | None = None
        if pid:
            code = os.waitstatus_to_exitcode(status)
            code = None if code == -signal.SIGXCPU else code
        elif time.monotonic() < self._deadline:
            return None
        else:
            os.killpg(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        out, err = (
            (self.folder / name).read_bytes().decode(errors="backslashreplace")
            for name in ("stdout", "stderr")
        )
        return Ended(code=code, out=out, err=err)

    def wait(self) -> Ended:
        """Waits until it has ended."""
        while (ended := self.poll()) is None:
            time.sleep(0.005)
        return ended


def limit_resources() -> None:
    """Keeps a command that wants all memory, time, or the whole disk from having it."""
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_BYTES, _ADDRESS_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_BYTES, _FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    begun_s = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (begun_s + _CPU_S, begun_s + _CPU_S + 5))


def _work(folder: Path, work: Callable[[], int]) -> None:
    code = TRACEBACK
    try:
        os.setsid()
        os.chdir(folder)
        Path("stdin").write_text(_TYPED)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, flags), stream)
        os.dup2(os.open("stdin", os.O_RDONLY), 0)
        sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
        code = work()
        sys.stdout.flush()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
