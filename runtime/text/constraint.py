"""What a completion's text must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Grammar"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """A language that a completion must be of.

    Attributes:
        kind: How it is written.
        text: A JSON schema, a regular expression or a Lark grammar.
    """

    kind: Literal["json_schema", "regex", "lark"]
    text: str
