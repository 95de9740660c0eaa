"""The texts a command is given: on its line, in a file, on standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["read_prompts", "read_text", "typed_lines"]


def read_prompts(texts: Sequence[str], file: Path | None) -> list[str]:
    """Collects the prompts of a command line.

    Args:
        texts: Given on the command line; "-" reads standard input, once.
        file: A file holding one prompt.

    Returns:
        The prompts; one empty prompt (BOS alone) if there are none.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file or standard input is empty, a text is not UTF-8, or standard input is
            named twice.
    """
    if texts.count("-") > 1:
        raise ValueError(f"--prompt - is given {texts.count('-')} times; stdin can be read once")
    prompts = [_read_stdin() if text == "-" else _given_text(text) for text in texts]
    if file is not None:
        prompts.append(read_text(file))
    return prompts or [""]


def read_text(file: Path) -> str:
    """Reads a text that may not be empty.

    Args:
        file: UTF-8 text.

    Returns:
        Its text.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is empty or not UTF-8.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    return _checked_text(file.read_bytes(), str(file))


def typed_lines() -> Iterator[str]:
    """What the user types, with a prompt on a terminal."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line


def _given_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of the command line that are not UTF-8 arrive as surrogates
        raise ValueError(f"--prompt {text!r}: not UTF-8 text") from None
    return text


def _read_stdin() -> str:
    return _checked_text(sys.stdin.buffer.read(), "standard input")


def _checked_text(raw: bytes, name: str) -> str:
    if not raw:
        raise ValueError(f"{name}: empty; write a text into it")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{name}: not UTF-8 text") from None
