"""What libraries written in Rust raise, as errors a caller can catch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

__all__ = ["library_errors"]

_STDERR = 2
_stderr_lock = Lock()  # the descriptor is the process's


@contextmanager
def library_errors(message: str) -> Iterator[None]:
    """Names the file that tokenizers or tiktoken failed with.

    Their errors are bare Exceptions, and their panics derive from BaseException alone and are
    announced on stderr.

    Args:
        message: What failed.

    Raises:
        ValueError: The library failed.
    """
    try:
        with _stderr_without_panics():
            yield
    except BaseException as error:
        if not _is_failure(error):
            raise
        text = " ".join(str(error).split())
        raise ValueError(f"{message} ({text:.200}); copy the file again") from None


def _is_failure(error: BaseException) -> bool:
    kind = type(error)
    return kind in (Exception, ValueError) or kind.__name__ == "PanicException"


@contextmanager
def _stderr_without_panics() -> Iterator[None]:
    """Keeps what is written to stderr until the library is done; drops it if that failed."""
    with _stderr_lock, tempfile.TemporaryFile() as kept:
        try:
            stderr = os.dup(_STDERR)
        except OSError:  # closed
            yield
            return
        os.dup2(kept.fileno(), _STDERR)
        has_failed = False
        try:
            yield
        except BaseException as error:
            has_failed = _is_failure(error)
            raise
        finally:
            os.dup2(stderr, _STDERR)
            os.close(stderr)
            if not has_failed and kept.seek(0, os.SEEK_END):
                kept.seek(0)
                os.write(_STDERR, kept.read())
