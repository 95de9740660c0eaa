"""Holds a completion to a grammar: which ids can come next, by llguidance."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["Grammar", "GrammarCompiler", "GrammarKind", "GrammarState"]

GrammarKind = Literal["json_schema", "regex", "lark"]

# As Python writes JSON. Free whitespace would let a model go on with it for ever.
_JSON_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """A language that a completion must be of.

    Attributes:
        kind: How it is written.
        text: A JSON schema, a regular expression or a Lark grammar.
    """

    kind: GrammarKind
    text: str

    def check(self) -> None:
        """Refuses what is no grammar, before a model is asked.

        Raises:
            ValueError: It can't be read, or holds what isn't supported.
            ModuleNotFoundError: llguidance isn't installed.
        """
        from llguidance import LLMatcher

        if problem := LLMatcher.validate_grammar(self.compiled()):
            raise ValueError(_problem(self.kind, problem))

    def compiled(self) -> str:
        """The grammar in llguidance's own form.

        Raises:
            ValueError: A JSON schema is not JSON.
        """
        from llguidance import LLMatcher

        if self.kind == "regex":
            return LLMatcher.grammar_from_regex(self.text)
        if self.kind == "lark":
            return LLMatcher.grammar_from_lark(self.text)
        try:
            schema = json.loads(self.text)
        except (ValueError, RecursionError):
            raise ValueError("the JSON schema is not JSON") from None
        if not isinstance(schema, dict):
            raise ValueError("the JSON schema is not an object")
        return LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)  # type: ignore[arg-type]


class GrammarCompiler:
    """Makes what holds a completion to a grammar, for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Costs nothing; the first grammar reads the whole vocabulary, 1.2 s for 128k ids."""
        self._tokenizer = tokenizer

    def __call__(self, grammar: Grammar) -> GrammarState:
        """Begins a text.

        Args:
            grammar: What the text must be.

        Returns:
            Its state before the first token.

        Raises:
            ValueError: The grammar is none, or the tokenizer has no id that ends a text.
            ModuleNotFoundError: llguidance isn't installed.
        """
        from llguidance import LLMatcher

        matcher = LLMatcher(self._vocabulary, grammar.compiled(), log_level=0)
        if matcher.is_error():
            raise ValueError(_problem(grammar.kind, matcher.get_error()))
        return GrammarState(matcher, self._tokenizer.vocab_size)

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        from llguidance import LLTokenizer
        from llguidance._tokenizer import TokenizerWrapper

        if not self._tokenizer.eos_ids:
            raise ValueError("a grammar needs a tokenizer with an id that ends a text")
        eos_ids = list(self._tokenizer.eos_ids)
        return LLTokenizer(TokenizerWrapper(_Vocabulary(self._tokenizer)), eos_token=eos_ids)


class GrammarState:
    """How far a completion has come in its grammar; see request.Constraint."""

    def __init__(self, matcher: LLMatcher, num_ids: int) -> None:
        self._matcher = matcher
        self._num_ids = num_ids

    @property
    def finished(self) -> bool:
        """Whether the text is whole, and nothing can follow it."""
        return self._matcher.is_stopped()

    def allowed(self) -> NDArray[np.bool_]:
        """[tokenizer.vocab_size] bool, which ids can come next.

        Raises:
            ValueError: The grammar has become too much work.
        """
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(mask, count=self._num_ids, bitorder="little").view(np.bool_)

    def accept(self, token_id: int) -> None:
        """Takes the next id, one of those allowed.

        Raises:
            ValueError: It isn't, or the grammar has become too much work.
        """
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the grammar failed: {self._matcher.get_error():.200}")


class _Vocabulary:
    """A tokenizer as llguidance reads one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        special = tokenizer.special_ids
        # Bytes that no text has stand for ids without a text.
        self.tokens = [
            (b"" if i in special else tokenizer.pieces.get(i, b"")) or b"\xff<%d>" % i
            for i in range(tokenizer.vocab_size)
        ]
        self.special_token_ids = sorted(special)
        self.bos_token_id = tokenizer.bos_id
        self.eos_token_id = tokenizer.eos_ids[0]

    def __call__(self, text: str) -> list[int]:
        """Ids of a text that continues another: without the space that a format puts in front."""
        if not isinstance(text, str):
            raise TypeError("texts are given as str")
        encode = self._tokenizer.encoder
        if not self._tokenizer.leading_spaces:
            return encode(text, False)
        before = encode("\n", False)
        ids = encode("\n" + text, False)
        return ids[len(before) :] if ids[: len(before)] == before else encode(text, False)


def _problem(kind: str, problem: Any) -> str:
    return f"the {kind.replace('_', ' ')} can't be used: {' '.join(str(problem).split()):.300}"
