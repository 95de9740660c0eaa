"""Ctrl-C, kept back while something must not be cut off."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

__all__ = ["hold_interrupt"]


@contextlib.contextmanager
def hold_interrupt() -> Iterator[Callable[[], bool]]:
    """Makes Ctrl-C a question to ask; a second one interrupts wherever it falls.

    Yields:
        Whether it was pressed.

    Raises:
        ValueError: This is not the main thread.
    """
    was_pressed = False
    before = signal.getsignal(signal.SIGINT)

    def hold(*_: object) -> None:
        nonlocal was_pressed
        was_pressed = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, hold)
    try:
        yield lambda: was_pressed
    finally:
        signal.signal(signal.SIGINT, before)
