"""Chat messages to one prompt, by the checkpoint's own template, in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..typed_json import read_json
from .tokenizer_files import load_tokenizer, special_texts

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import SandboxedEnvironment

__all__ = ["ChatTemplate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """A compiled chat template.

    The template is the checkpoint's code: the sandbox keeps it from Python's internals and limits
    `range`, but does not limit its time or memory.

    Attributes:
        template: The compiled template.
        tokens: The special tokens' texts that the template may use, such as bos_token.
    """

    template: Template
    tokens: Mapping[str, str]

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
            ValueError: The checkpoint has no template, or it does not compile.
        """
        import jinja2

        folder = Path(folder)
        source = _read_template(template_file) if template_file else _find_template(folder)
        try:
            template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"the chat template does not compile, line {error.lineno}: {_one_line(error)}; "
                "give another with --chat-template"
            ) from None
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
        return cls(template=template, tokens={k: v for k, v in tokens.items() if v is not None})

    def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Writes a conversation as the prompt the model was trained on.

        Encode it with `encode(text, bos=False, special=True)`: templates write their own BOS.

        Args:
            messages: Each with a "role" (system, user, assistant) and its "content".
            add_generation_prompt: End with what begins the assistant's answer.

        Returns:
            The prompt's text.

        Raises:
            ValueError: The template refuses the messages, fails, or leaves the sandbox.

        Source: the variables and filters that transformers gives a template.
        """
        import jinja2

        try:
            return self.template.render(
                **self.tokens,
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
            )
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            MemoryError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise ValueError(
                f"the chat template failed: {_one_line(error)}; "
                "change the messages or give another with --chat-template"
            ) from None


def _find_template(folder: Path) -> str:
    if (folder / "chat_template.jinja").is_file():
        return _read_template(folder / "chat_template.jinja")
    found = read_json(folder / "tokenizer_config.json", optional=True).get("chat_template")
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
        if not isinstance(found, str):
            raise ValueError(
                f"{folder} has the chat templates {sorted(map(str, named))}, none named default; "
                "give one with --chat-template FILE"
            )
    if not isinstance(found, str):
        raise ValueError(f"{folder} has no chat template; give one with --chat-template FILE")
    return found


def _read_template(path: Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"no chat template {path}; give --chat-template a file") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise ValueError(f"{path} is not a UTF-8 text file; give --chat-template one") from None


def _environment() -> SandboxedEnvironment:
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
            # Jinja's own would print as nothing and fail only when it is used.
            raise SecurityError(f"{attribute!r} of {type(obj).__name__} is out of bounds")

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text for training; here it is just its body."""

        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own escapes HTML.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
