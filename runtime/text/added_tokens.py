"""Tokens that are found in a text before its vocabulary is asked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

__all__ = ["AddedToken", "AddedTokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedToken:
    """One token with the switches that tokenizers gives it.

    Attributes:
        text: What stands in a text.
        id: Its id; None if the files don't say.
        special: Marks structure: found only where special tokens are parsed, decoded to nothing.
        normalized: Looked for after the others.
        lstrip: Takes the white space before it with it.
        rstrip: Takes the white space behind it with it.
        single_word: Not found inside a word.
    """

    text: str
    id: int | None = None
    special: bool
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    def at(self, token_id: int, *, special: bool) -> AddedToken:
        """The same token with its id and whether it is special."""
        return replace(self, id=token_id, special=special)


class AddedTokens:
    """Splits texts at added tokens as the tokenizers library does, for the other formats."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        """Prepares the search.

        Args:
            tokens: Each with its id; of two with one text the later counts.
        """
        self._tokens = {token.text: token for token in tokens}
        self._searches = []
        for normalized in (False, True):
            texts = [t.text for t in self._tokens.values() if t.normalized is normalized]
            if texts:  # the longest of those that begin at one place
                longest = sorted(texts, key=len, reverse=True)
                self._searches.append(re.compile("|".join(map(re.escape, longest))))

    def split(self, text: str, *, special: bool) -> Iterator[tuple[int, str, AddedToken | None]]:
        """Cuts a text at its added tokens.

        Args:
            text: The text.
            special: Whether special tokens are found too.

        Returns:
            Where each part begins, its text, and the token it is, None for text between tokens.
        """
        parts: list[tuple[int, str, AddedToken | None]] = [(0, text, None)] if text else []
        for search in self._searches:
            parts = [
                new
                for start, part, token in parts
                for new in (
                    [(start, part, token)] if token else self._cut(search, start, part, special)
                )
            ]
        return iter(parts)

    def _cut(
        self, search: re.Pattern[str], offset: int, text: str, special: bool
    ) -> Iterator[tuple[int, str, AddedToken | None]]:
        done = 0
        for match in search.finditer(text):
            token = self._tokens[match[0]]
            start, end = match.span()
            if start < done or (token.special and not special):
                continue
            if token.single_word and any(
                re.match(r"\w", char) for char in (text[start - 1 : start], text[end : end + 1])
            ):
                continue
            while token.lstrip and start > done and text[start - 1].isspace():
                start -= 1
            while token.rstrip and end < len(text) and text[end].isspace():
                end += 1
            if start > done:
                yield offset + done, text[done:start], None
            yield offset + start, text[start:end], token
            done = end
        if done < len(text):
            yield offset + done, text[done:], None
