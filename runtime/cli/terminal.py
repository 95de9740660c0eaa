"""What a terminal shows while something takes long; in a pipe, nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["progress_bar", "status"]


@contextlib.contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """Shows on stderr what is being done."""
    with Console(stderr=True).status("starting") as shown:
        yield shown.update


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Shows on stderr how many bytes of how many are done."""
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)
