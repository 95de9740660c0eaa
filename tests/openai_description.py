"""OpenAI's interface as a description that fuzzers read, out of the types of its own client.

As a program it writes the description: how README's longer run begins.
"""

from __future__ import annotations

import json
from typing import Any

from openai.types import Completion, CompletionCreateParams, Model
from openai.types.chat import ChatCompletion
from openai.types.chat.completion_create_params import CompletionCreateParams as ChatParams
from pydantic import TypeAdapter

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "minLength": 1},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
TEXT = {"type": "string"}
TOKENIZE = {"type": "object", "required": ["prompt"], "properties": {"prompt": TEXT}}
TOKENS = {"type": "object", "required": ["tokens"], "properties": {"tokens": IDS}}
# Refused by name, and tested elsewhere: most bodies would hold one of them.
REFUSED = ("audio", "function_call", "functions", "suffix", "web_search_options")


def describe() -> dict[str, Any]:
    """An OpenAPI description of what fuzzers ask of the server."""
    schemas: dict[str, Any] = {}

    def named(prefix: str, kind: Any) -> dict[str, Any]:
        # Both endpoints have types of the same names.
        template = f"#/components/schemas/{prefix}.{{model}}"
        schema = TypeAdapter(kind).json_schema(ref_template=template)
        for name, inner in schema.pop("$defs", {}).items():
            schemas[f"{prefix}.{name}"] = inner
            for field in REFUSED:
                inner.get("properties", {}).pop(field, None)
        schemas[prefix] = schema
        return {"$ref": f"#/components/schemas/{prefix}"}

    card = named("Model", Model)
    cards = {
        "type": "object",
        "required": ["object", "data"],
        "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": card}},
    }
    name = {"name": "name", "in": "path", "required": True, "schema": TEXT}
    completions = named("CompletionParams", CompletionCreateParams), named("Completion", Completion)
    chats = named("ChatParams", ChatParams), named("ChatCompletion", ChatCompletion)
    return {
        "openapi": "3.1.0",
        "info": {"title": "what OpenAI's client sends and reads", "version": "1"},
        "paths": {
            "/v1/completions": {"post": _operation(*completions, streams=True)},
            "/v1/chat/completions": {"post": _operation(*chats, streams=True)},
            "/v1/models": {"get": _operation(None, cards)},
            "/v1/models/{name}": {"get": {**_operation(None, card), "parameters": [name]}},
            "/tokenize": {"post": _operation(TOKENIZE, TOKENS)},
            "/detokenize": {"post": _operation(TOKENS, TOKENIZE)},
        },
        "components": {"schemas": schemas},
    }


def _operation(
    body: dict[str, Any] | None, answer: dict[str, Any], *, streams: bool = False
) -> dict[str, Any]:
    kinds = {"application/json": {"schema": answer}}
    if streams:
        kinds["text/event-stream"] = {}
    error = {"description": "refused", "content": {"application/json": {"schema": ERROR}}}
    operation: dict[str, Any] = {
        "responses": {"200": {"description": "done", "content": kinds}, "4XX": error}
    }
    if body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": body}},
        }
    return operation


if __name__ == "__main__":
    print(json.dumps(describe(), indent=1))
