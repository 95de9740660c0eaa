"""Reads the fields of a JSON body, one by one; what is wrong is refused by the field's name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from .errors import ApiError

__all__ = ["Fields", "parse_body"]


def parse_body(raw: bytes) -> Fields:
    """Reads a request's body.

    Raises:
        ApiError: It is not a JSON object.
    """
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return Fields(value)


class Fields:
    """A body's fields; null is the same as leaving one out, and unknown ones are ignored."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def get(self, name: str) -> Any:
        """The field, whatever it is, or None."""
        return self._values.get(name)

    def refuse(self, *names: str) -> None:
        """Refuses fields that this server can't honour.

        Raises:
            ApiError: One of them is there, and neither empty nor false.
        """
        for name in names:
            if self.get(name):
                raise ApiError(400, f"{name} is not supported; leave it out", param=name)

    def number(self, name: str) -> float | None:
        """A finite number."""
        value = self.get(name)
        if value is None or (type(value) in (int, float) and math.isfinite(value)):
            return value
        raise self.error(name, "a number")

    def integer(self, name: str, low: int, high: int) -> int | None:
        """An integer in [low, high]."""
        value = self.get(name)
        if value is None or (type(value) is int and low <= value <= high):
            return value
        raise self.error(name, f"an integer from {low} to {high}")

    def flag(self, name: str) -> bool:
        """True or false, by default false."""
        value = self.get(name)
        if value is None or type(value) is bool:
            return bool(value)
        raise self.error(name, "true or false")

    def text(self, name: str) -> str | None:
        """A text."""
        value = self.get(name)
        if value is None or isinstance(value, str):
            return value
        raise self.error(name, "a text")

    def object(self, name: str) -> Fields:
        """An object, by default an empty one."""
        value = self.get(name)
        if value is None or isinstance(value, dict):
            return Fields(value or {})
        raise self.error(name, "an object")

    def objects(self, name: str) -> list[dict[str, Any]] | None:
        """A list of objects."""
        value = self.get(name)
        if value is None or (isinstance(value, list) and all(isinstance(v, dict) for v in value)):
            return value
        raise self.error(name, "a list of objects")

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """A text or a list of them, without empty ones."""
        value = self.get(name)
        found = [value] if isinstance(value, str) else [] if value is None else value
        if isinstance(found, list) and len(found) <= most:
            if all(isinstance(text, str) for text in found):
                return tuple(text for text in found if text)
        raise self.error(name, f"a text or a list of at most {most}")

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of integers, by default an empty one."""
        value = [] if self.get(name) is None else self.get(name)
        if is_ids(value):
            return tuple(value)
        raise self.error(name, "a list of integers")

    def biases(self, name: str) -> tuple[tuple[int, float], ...]:
        """An object from token ids, as texts, to numbers."""
        pairs = []
        for key, bias in self.object(name)._values.items():
            if not key.isascii() or not key.isdecimal() or len(key) > 9:
                raise self.error(name, "an object from token ids to numbers")
            if type(bias) not in (int, float):
                raise self.error(name, "an object from token ids to numbers")
            pairs.append((int(key), float(bias)))
        return tuple(pairs)

    def error(self, name: str, allowed: str) -> ApiError:
        """Says what a field is and what it may be."""
        shown = f"{self.get(name)!r:.60}"
        return ApiError(400, f"{name} is {shown}; it must be {allowed}", param=name)


def is_ids(value: object) -> bool:
    """Whether a value is a list of integers, and no booleans."""
    return isinstance(value, list) and all(type(item) is int for item in value)
