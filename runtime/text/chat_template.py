"""Chat messages to one prompt, by the checkpoint's own template, in a process with limits."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from ..side_file import read_side_file
from ..typed_json import read_json, shown
from .tokenizer import check_text
from .tokenizer_config import special_texts
from .tokenizer_files import load_tokenizer

__all__ = ["ChatTemplate", "RenderLimits"]

_MAX_SOURCE_BYTES = 2**20  # the largest published have 30 kB


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderLimits:
    """What one rendering may take; a prompt takes milliseconds.

    Attributes:
        seconds: Of processor time.
        num_bytes: Of address space.
        num_chars: Of text.
    """

    seconds: int = 5
    num_bytes: int = 2**29
    num_chars: int = 2**24


class ChatTemplate:
    """A chat template, rendered in a sandbox in a process of its own.

    The template is the checkpoint's code. The sandbox keeps it from Python's internals; the process
    ends when it takes too long or too much memory, and is started again by the next rendering.
    It costs 0.1 s to start and less than a millisecond a turn. Any thread may render.

    Attributes:
        source: The template.
        tokens: The special tokens' texts that the template may use, such as bos_token.
    """

    def __init__(
        self, source: str, tokens: Mapping[str, str], limits: RenderLimits | None = None
    ) -> None:
        """Compiles a template.

        Args:
            source: The template.
            tokens: Special tokens by key.
            limits: Of each rendering and of compiling.

        Raises:
            ValueError: It does not compile.
        """
        self.source, self.tokens = source, tokens
        self._process = _Process(limits=limits or RenderLimits())
        weakref.finalize(self, self._process.end)
        answer = self._process.ask({"source": source, "variables": {}})
        if "error" in answer:
            raise ValueError(
                f"the chat template does not compile, {_one_line(answer['error'])}; "
                "give another with --chat-template"
            )

    @classmethod
    def load(cls, folder: Path, template_file: Path | None = None) -> ChatTemplate:
        """Finds and compiles the template of a checkpoint.

        Args:
            folder: The checkpoint or bundle: its chat_template.jinja, else the `chat_template` of
                its tokenizer_config.json, where of several named ones "default" is taken.
            template_file: Used instead of the checkpoint's.

        Returns:
            The template.

        Raises:
            FileNotFoundError: template_file is missing, or there is no tokenizer in the folder.
            ValueError: The checkpoint has no template, or it does not compile, or never writes the
                messages.
        """
        folder = Path(folder)
        source = _read_template(template_file) if template_file else _find_template(folder)
        if "messages" not in source:
            raise ValueError(
                f"{template_file or folder}: the chat template never writes the messages; give "
                "another with --chat-template"
            )
        tokens = special_texts(folder)
        if not {"bos_token", "eos_token"} <= tokens.keys():
            # Folders without HF's files name their tokens in the tokenizer alone.
            tokenizer = load_tokenizer(folder)
            ids = {"bos_token": tokenizer.bos_id, "eos_token": next(iter(tokenizer.eos_ids), None)}
            for key, i in ids.items():
                tokens.setdefault(
                    key,
                    None if i is None else tokenizer.pieces.get(i, b"").decode(errors="replace"),
                )
        return cls(source, {k: v for k, v in tokens.items() if v is not None})

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Writes a conversation as the prompt the model was trained on.

        Encode it with `encode(text, bos=False, special=True)`: templates write their own BOS.

        Args:
            messages: Each with a "role" (system, user, assistant) and its "content": a string, or
                a list of parts `{"type": "text", "text": ...}`. The template gets the one of the
                two that it writes.
            tools: Functions the model may call, as JSON schemas.
            documents: What the model may quote, each with "title" and "text".
            add_generation_prompt: End with what begins the assistant's answer.

        Returns:
            The prompt's text.

        Raises:
            ValueError: The template refuses the messages, fails, leaves the sandbox, takes longer
                or more memory than it may, or writes what isn't UTF-8.

        Source: the variables and filters that transformers gives a template.
        """
        variables = {
            **self.tokens,
            "messages": [_message(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": tools,
            "documents": documents,
        }
        answer = self._process.ask({"source": self.source, "variables": variables})
        try:
            check_text(answer.get("text", ""))
        except ValueError as error:
            answer = {"error": str(error)}
        if "error" in answer:
            raise ValueError(
                f"the chat template failed: {_one_line(answer['error'])}; "
                "change the messages or give another with --chat-template"
            )
        return answer["text"]


@dataclass(slots=True, kw_only=True)
class _Process:
    """The process of template_child.py, one question at a time."""

    limits: RenderLimits
    _child: subprocess.Popen[bytes] | None = None
    _lock: Lock = field(default_factory=Lock)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            line = json.dumps(request).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"messages and tools must be JSON values ({str(error):.80})") from None
        with self._lock:
            child = self._child or self._start()
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                child.stdin.write(line)
                child.stdin.flush()
                answer = child.stdout.readline()
            except BrokenPipeError:
                answer = b""
            except BaseException:  # Ctrl-C: its answer must not be the next question's
                self.end()
                raise
            if answer.endswith(b"\n"):
                return json.loads(answer)
            self.end()
            if child.returncode == -signal.SIGPROF:
                return {"error": f"it took longer than {self.limits.seconds} s"}
            return {"error": f"its process ended with code {child.returncode}"}

    def end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            with contextlib.suppress(BrokenPipeError), child:  # closes the pipes and waits
                pass

    def _start(self) -> subprocess.Popen[bytes]:
        limits = (self.limits.seconds, self.limits.num_bytes, self.limits.num_chars)
        self._child = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S"),  # the path is given, so that nothing else is read
                str(Path(__file__).with_name("template_child.py")),
                *map(str, limits),
                json.dumps(sys.path),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        return self._child


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without what is null, as in transformers; its parts must be text."""
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(
                    f"a message holds a part of type {shown(kind)}; parts are text: "
                    '{"type": "text", "text": ...}'
                )
    return {key: value for key, value in message.items() if value is not None}


def _find_template(folder: Path) -> str:
    if (folder / "chat_template.jinja").is_file():
        return _read_template(folder / "chat_template.jinja")
    found = read_json(folder / "tokenizer_config.json", optional=True).get("chat_template")
    if isinstance(found, list):
        named = {str(t.get("name")): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
        if not isinstance(found, str):
            raise ValueError(
                f"{folder} has the chat templates {shown(sorted(named))}, none named default; "
                "give one with --chat-template FILE"
            )
    if not isinstance(found, str):
        raise ValueError(f"{folder} has no chat template; give one with --chat-template FILE")
    return found


def _read_template(path: Path) -> str:
    try:
        return read_side_file(Path(path), max_bytes=_MAX_SOURCE_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"no chat template {path}; give --chat-template a file") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; give --chat-template a template") from None


def _one_line(text: str) -> str:
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= 300 else line[:300] + "..."
