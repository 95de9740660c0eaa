"""A conversation as OpenAI's clients write it, as chat templates read it."""

from __future__ import annotations

import json
from typing import Any

from ..text.constraint import Grammar
from .errors import ApiError
from .fields import Fields
from .structured import checked

__all__ = ["read_messages", "read_tool_choice"]

_ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's newer word, which templates don't know
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


def read_messages(fields: Fields) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Reads the messages and the tools that the template shall tell of.

    Args:
        fields: The body of a chat request.

    Returns:
        The messages, contents being texts, and the tools or None.

    Raises:
        ApiError: Something is wrong or not supported; the message names it.
    """
    messages = fields.objects("messages")
    if not messages:
        raise fields.error("messages", "a list of at least one message")
    tools = fields.objects("tools")
    is_none = fields.get("tool_choice") == "none"
    return [_message(message) for message in messages], None if is_none else tools


def read_tool_choice(fields: Fields, tools: list[dict[str, Any]] | None) -> Grammar | None:
    """What an answer must be where a tool has to be called: `{"name": ..., "arguments": ...}`.

    Args:
        fields: The body of a chat request.
        tools: What `read_messages` found.

    Returns:
        The grammar, or None where the model may answer as it likes.

    Raises:
        ApiError: The choice names no tool, or a tool is not a function with a JSON schema.
    """
    choice = fields.get("tool_choice")
    if choice in (None, "none", "auto"):
        return None
    functions = [tool.get("function") for tool in tools or []]
    if isinstance(choice, dict):
        wanted = Fields(choice).object("function").get("name")
        functions = [f for f in functions if isinstance(f, dict) and f.get("name") == wanted]
    elif choice != "required":
        raise fields.error("tool_choice", '"none", "auto", "required" or a function\'s name')
    if not functions:
        raise ApiError(400, "tool_choice names none of the tools", param="tool_choice")
    calls = [_call_schema(function) for function in functions]
    grammar = Grammar(kind="json_schema", text=json.dumps({"anyOf": calls}))
    return checked(grammar, "tools")


def _call_schema(function: object) -> dict[str, Any]:
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str):
        raise ApiError(400, "a tool is not a function with a name", param="tools")
    arguments = function.get("parameters") or {"type": "object"}
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _message(message: dict[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        allowed = ", ".join(_ROLES)
        raise ApiError(400, f"a role is {role!r:.60}; allowed are {allowed}", param="messages")
    read = {**message, "role": _ROLES[role], "content": _content(message.get("content"))}
    if message.get("tool_calls") is not None:
        read["tool_calls"] = _tool_calls(message["tool_calls"])
    return read


def _content(content: object) -> str:
    """A text, of one or several parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"a content is {content!r:.60}; it must be a text", param="messages")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        text = part.get("text") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(text, str):
            raise ApiError(
                400,
                f"parts of type {kind!r:.60} are not supported; parts are text",
                param="messages",
            )
        texts.append(text)
    return "".join(texts)


def _tool_calls(calls: object) -> list[dict[str, Any]]:
    """Calls whose arguments are objects, which clients send as JSON and templates print."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ApiError(400, "tool_calls must be a list of objects", param="messages")
    read = []
    for call in calls:
        function = call.get("function")
        if not isinstance(function, dict):
            raise ApiError(400, "a tool call has no function", param="messages")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                raise ApiError(400, "a call's arguments are not JSON", param="messages") from None
        read.append({**call, "function": {**function, "arguments": arguments}})
    return read
