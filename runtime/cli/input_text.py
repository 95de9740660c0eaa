"""The texts a command is given: on its line, in a file, on standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..text.constraint import Grammar

__all__ = [
    "Prompt",
    "checked_text",
    "read_prompts",
    "read_schema",
    "read_text",
    "read_tools",
    "typed_lines",
]

_MAX_BYTES = 1 << 30

# What a line of JSON may ask for beside its prompt; a list is of this kind throughout.
_NUMBER: tuple[type, ...] = (int, float)
_OPTIONS: dict[str, tuple[type, ...] | list[type]] = {
    "max_new_tokens": (int,),
    "temperature": _NUMBER,
    "top_k": (int,),
    "top_p": _NUMBER,
    "min_p": _NUMBER,
    "repetition_penalty": _NUMBER,
    "presence_penalty": _NUMBER,
    "frequency_penalty": _NUMBER,
    "min_tokens": (int,),
    "seed": (int,),
    "stop": [str],
    "stop_ids": [int],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A text to continue.

    Attributes:
        text: The text.
        options: Its own, under the names of RequestOptions; they come before the command's.
    """

    text: str
    options: dict[str, Any] = field(default_factory=dict)


def read_prompts(texts: Sequence[str], file: Path | None) -> list[Prompt]:
    """Collects the prompts of a command line.

    Args:
        texts: Given on the command line; "-" reads standard input, once.
        file: A file holding one prompt or, if its name ends in .jsonl, one a line: a text, or an
            object with "prompt" and options.

    Returns:
        The prompts; one empty prompt (BOS alone) if there are none.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file or standard input is empty, a text is not UTF-8, a line is not as
            described, or standard input is named twice.
    """
    if texts.count("-") > 1:
        raise ValueError(f"--prompt - is given {texts.count('-')} times; stdin can be read once")
    prompts = [
        Prompt(text=_read_stdin() if text == "-" else checked_text(text, "--prompt"))
        for text in texts
    ]
    if file is not None and file.suffix == ".jsonl":
        for number, line in enumerate(read_text(file).splitlines(), start=1):
            if line.strip():
                prompts.append(_read_line(line, f"{file}, line {number}"))
    elif file is not None:
        prompts.append(Prompt(text=_without_newline(read_text(file))))
    return prompts or [Prompt(text="")]


def read_text(file: Path) -> str:
    """Reads a text that may not be empty.

    Args:
        file: UTF-8 text; a byte order mark is dropped.

    Returns:
        Its text.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is empty, over 1 GiB, or not UTF-8.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    if file.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{file}: {file.stat().st_size} bytes; a text has at most {_MAX_BYTES}")
    return _decode(file.read_bytes(), str(file))


def read_tools(file: Path) -> list[dict[str, Any]]:
    """Reads the functions that a chat's model is told of.

    Args:
        file: A JSON list of objects, as OpenAI's clients send them.

    Returns:
        The objects.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else.
    """
    try:
        tools = json.loads(read_text(file))
    except RecursionError:
        tools = None
    except json.JSONDecodeError:
        raise ValueError(f"{file}: not JSON") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{file}: not a list of objects, each a function's description")
    return tools


def read_schema(file: Path | None) -> Grammar | None:
    """Reads the JSON schema that a text must be of.

    Args:
        file: None is no schema.

    Returns:
        The grammar, or None.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds no schema, or one that isn't supported.
    """
    if file is None:
        return None
    grammar = Grammar(kind="json_schema", text=read_text(file))
    grammar.check()
    return grammar


def typed_lines() -> Iterator[str]:
    """What the user types, with a prompt and line editing on a terminal.

    Yields:
        Lines without their end.

    Raises:
        ValueError: A line is not UTF-8 text, or standard input is closed.
    """
    if sys.stdin is None:
        raise ValueError("standard input is closed; type or pipe something into it")
    if sys.stdin.isatty() and sys.stdout.isatty():
        import readline  # noqa: F401  # gives input() its editing and history

        while True:
            try:
                yield checked_text(input("> "), "the line")
            except EOFError:
                return
    binary = getattr(sys.stdin, "buffer", None)
    for line in sys.stdin if binary is None else binary:
        text = line if isinstance(line, str) else _decode(line, "standard input")
        yield text.rstrip("\r\n")


def checked_text(text: str, name: str) -> str:
    """Passes on a text that is one.

    Args:
        text: From the command line or a terminal.
        name: What it is, for the message.

    Returns:
        The text.

    Raises:
        ValueError: It holds bytes that are not UTF-8, which arrive as surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} {text!r:.80}: not UTF-8 text") from None
    return text


def _read_line(line: str, where: str) -> Prompt:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"{where}: not JSON") from None
    stated = {"prompt": value} if isinstance(value, str) else value
    if not isinstance(stated, dict) or not isinstance(stated.get("prompt"), str):
        raise ValueError(f'{where}: {value!r:.60} is neither a text nor an object with "prompt"')
    text = checked_text(stated.pop("prompt"), where)
    return Prompt(text=text, options={k: _option(k, v, where) for k, v in stated.items()})


def _option(name: str, value: Any, where: str) -> Any:
    if name not in _OPTIONS:
        allowed = ", ".join(_OPTIONS)
        raise ValueError(f"{where}: unknown option {name!r:.60}; allowed are {allowed}")
    kind = _OPTIONS[name]
    if isinstance(kind, list):
        if isinstance(value, list) and all(type(item) is kind[0] for item in value):
            return tuple(value)
    elif type(value) in kind:
        return value
    raise ValueError(f"{where}: {name} is {value!r:.60}, not of its type")


def _read_stdin() -> str:
    if sys.stdin is None:
        raise ValueError("standard input is closed; pipe a text into it")
    return _without_newline(_decode(sys.stdin.buffer.read(), "standard input"))


def _without_newline(text: str) -> str:
    """Without the newline that ends a file or `echo`, which is not part of the text."""
    return text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")


def _decode(raw: bytes, name: str) -> str:
    if not raw:
        raise ValueError(f"{name}: empty; write a text into it")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{name}: not UTF-8 text") from None
