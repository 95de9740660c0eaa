"""What a terminal shows; in a pipe, nothing but lines of text."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

__all__ = ["LineFormatter", "emit", "one_line", "progress_bar", "say", "status"]

_MAX_LINE = 400  # characters of a message: paths are long, quoted files may be longer


def one_line(text: str) -> str:
    """Makes a message one line of bounded length that a terminal can only print.

    What files and options hold may stand in it: escape codes, directions of writing, megabytes.

    Args:
        text: Any text.

    Returns:
        The text without line breaks; characters that aren't printable are `?`.
    """
    line = " ".join(text[: 4 * _MAX_LINE].split())
    line = "".join(char if char.isprintable() else "?" for char in line)
    if len(line) <= _MAX_LINE:
        return line
    half = _MAX_LINE // 2
    return f"{line[:half]} ... {line[-half:]}"


def emit(text: str = "", end: str = "\n") -> None:
    """Prints a result to stdout at once.

    Args:
        text: Of any length.
        end: What follows it.

    Raises:
        BrokenPipeError: Nobody reads it any more.
        OSError: It can't be written; the message names standard output.
    """
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"standard output: {error.strerror}") from None


def say(text: str) -> None:
    """Prints a line to stderr, if that can be written to."""
    with contextlib.suppress(OSError):
        print(one_line(text), file=sys.stderr, flush=True)


class LineFormatter(logging.Formatter):
    """One line a record, as one_line makes it; with tracebacks where they were asked for."""

    def __init__(self, *, verbose: bool) -> None:
        super().__init__("%(levelname)s: %(message)s")
        self._verbose = verbose

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        return super().format(record) if self._verbose else one_line(super().format(record))


@contextlib.contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """Shows on stderr what is being done."""
    console = Console(stderr=True, force_terminal=sys.stderr.isatty())
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("starting") as shown:
        yield shown.update


@contextlib.contextmanager
def progress_bar(title: str, *, unit: str = "bytes") -> Iterator[Callable[[int, int], None]]:
    """Shows on stderr how many of how many are done, of bytes their size."""
    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn(title), BarColumn(), count, TimeRemainingColumn())
    console = Console(stderr=True, force_terminal=sys.stderr.isatty())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)
