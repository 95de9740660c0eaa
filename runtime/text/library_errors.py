"""What libraries written in Rust raise, as errors a caller can catch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["library_errors"]


@contextmanager
def library_errors(message: str) -> Iterator[None]:
    """Names the file that tokenizers or tiktoken failed with.

    Their errors are bare Exceptions, and their panics derive from BaseException alone.

    Args:
        message: What failed.

    Raises:
        ValueError: The library failed.
    """
    try:
        yield
    except BaseException as error:
        kind = type(error)
        if kind not in (Exception, ValueError) and kind.__name__ != "PanicException":
            raise
        text = " ".join(str(error).split())
        raise ValueError(f"{message} ({text:.200}); copy the file again") from None
