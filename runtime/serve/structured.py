"""What a text must be: OpenAI's response_format, and vLLM's structured_outputs."""

from __future__ import annotations

import json
from typing import Any

from ..text.constraint import Grammar, GrammarKind
from .errors import ApiError
from .fields import Fields

__all__ = ["checked", "read_grammar"]

_KINDS: dict[str, GrammarKind] = {"json": "json_schema", "regex": "regex", "grammar": "lark"}


def read_grammar(fields: Fields) -> Grammar | None:
    """Reads the grammar that a request asks for.

    Args:
        fields: The body.

    Returns:
        The grammar, or None.

    Raises:
        ApiError: It can't be used; the message says why.
    """
    own = fields.object("structured_outputs")
    for name, kind in _KINDS.items():
        if (value := own.get(name)) is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            return checked(Grammar(kind=kind, text=text), "structured_outputs")
    wanted = fields.object("response_format")
    match wanted.get("type"):
        case None | "text":
            return None
        case "json_object":
            return checked(_schema({"type": "object"}), "response_format")
        case "json_schema":
            schema = wanted.object("json_schema").get("schema")
            if not isinstance(schema, dict):
                raise wanted.error("json_schema", 'an object with a "schema"')
            return checked(_schema(schema), "response_format")
        case _:
            allowed = "text, json_object or json_schema"
            raise ApiError(400, f"response_format must be {allowed}", param="response_format")


def checked(grammar: Grammar, param: str) -> Grammar:
    """Passes on a grammar that can be used.

    Raises:
        ApiError: It can't, or llguidance isn't installed.
    """
    try:
        grammar.check()
    except ValueError as error:
        raise ApiError(400, str(error), param=param) from None
    except ModuleNotFoundError:
        message = f"{param} needs llguidance on the server: pip install 'llamac[structured]'"
        raise ApiError(400, message, param=param) from None
    return grammar


def _schema(schema: dict[str, Any]) -> Grammar:
    return Grammar(kind="json_schema", text=json.dumps(schema))
