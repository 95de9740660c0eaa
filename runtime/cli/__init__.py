"""The command line: `llamac COMMAND ...`.

Nothing is imported here before Ctrl-C has its meaning: imports take most of a short run.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from collections.abc import Sequence

__all__ = ["main"]

_INTERRUPTED, _TERMINATED, _PIPE_CLOSED = 130, 143, 141
_NEW_OBJECTS = 10_000  # before the collector looks at them; imports make many that stay


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The words after `llamac`; None takes the process's own, and the process with them:
            its standard streams, its signals and its collector.

    Returns:
        0, 1 for a failed verification, 2 for bad input, 130 after Ctrl-C, 141 when nobody reads
        the output any more, 143 after SIGTERM.
    """
    signals: list[int] = []

    def stop(number: int, _: object) -> None:
        # Kept as well as raised: a library that is being imported makes another error of it.
        signals.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(_TERMINATED)

    if argv is None:
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
        _open_closed_streams()
        gc.set_threshold(_NEW_OBJECTS)
        atexit.register(_free_no_more)
        argv = sys.argv[1:]
    try:
        try:
            from .dispatch import run

            exit_code = run(argv)
            if exit_code == 0:
                sys.stdout.flush()
        except BaseException:
            if not signals:
                raise
            exit_code = _TERMINATED if signal.SIGTERM in signals else _INTERRUPTED
    except KeyboardInterrupt:
        exit_code = _INTERRUPTED
    except BrokenPipeError:
        exit_code = _PIPE_CLOSED
    except OSError as error:  # the output's, the rest has been told
        print(f"llamac: standard output: {error.strerror}", file=sys.stderr)
        exit_code = 2
    if exit_code not in (0, 1, 2) or not _flushes(sys.stdout):
        _discard(sys.stdout)
    if not _flushes(sys.stderr):
        _discard(sys.stderr)
    return exit_code


def _free_no_more() -> None:
    """Spares the collector a third of a second of looking through all objects once more.

    Where torch's compiler has imported Triton it is needed, whose bindings report what isn't freed.
    """
    if "triton" not in sys.modules:
        gc.freeze()


def _open_closed_streams() -> None:
    """Gives a process that was started without standard streams some that lead nowhere.

    Else the next file that is opened takes their number, and gets what is printed.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
            if name != "stdin":  # which stays None: there is nothing to read
                setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115


def _flushes(stream: object) -> bool:
    try:
        stream.flush()  # type: ignore[attr-defined]
    except OSError:
        return False
    return True


def _discard(stream: object) -> None:
    """Lets what is left in a stream's buffer go nowhere when the process ends."""
    try:
        number = stream.fileno()  # type: ignore[attr-defined]
    except OSError:  # a test's, which is no file
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
