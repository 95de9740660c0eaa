"""GGUF's vocabularies as the files that tokenizers' libraries read."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.text.library_errors import library_errors
from ...runtime.text.rank_format import LLAMA3_BOS, LLAMA3_PATTERN
from ...runtime.text.sentencepiece_format import count_pieces
from ...runtime.typed_json import check_int, shown

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Vocabulary", "sentencepiece_model", "tokenizer_json"]

# Kinds of token; SentencePiece's own numbers.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

# How a text is split before BPE, by one of the names of those that split alike.
_SPLITS = {
    "llama-bpe": ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2", "midm-2.0"),
    "smaug-bpe": ("smaug-bpe", "dbrx"),
    "smollm": ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "gpt-2": ("gpt-2", "default", "phi-2", "olmo", "mpt", "jais", "trillion", "exaone4"),
    "qwen2": ("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"),
    "tekken": ("tekken",),
    "seed-coder": ("seed-coder",),
    "deepseek-llm": ("deepseek-llm",),
    "deepseek-coder": ("deepseek-coder",),
}
# Those that begin texts with a BOS unless told otherwise, and take a word that is a token whole.
_LIKE_LLAMA3 = ("llama-bpe", "tekken")

_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# Source: the pre-tokenizers in these models' tokenizer.json.
_PATTERNS = {
    "llama-bpe": (LLAMA3_PATTERN,),
    "smaug-bpe": (LLAMA3_PATTERN,),
    "qwen2": (LLAMA3_PATTERN.replace("{1,3}", ""),),
    "seed-coder": (
        LLAMA3_PATTERN.replace("{1,3}", "").replace(
            r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}]+"
        ),
    ),
    "tekken": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "deepseek-llm": (
        r"[\r\n]",
        # Cased letters as of Unicode 10, when Georgian's had no case.
        "\\s?(?:(?![\u10d0-\u10ff])[\\p{Lu}\\p{Ll}\\p{Lt}])+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        _ASIAN,
        r"\p{N}",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _ASIAN, r"\p{N}"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The tokens of a GGUF file.

    Attributes:
        path: The file, for messages.
        tokens: Text by id.
        kinds: Kind by id.
        scores: Score by id, of SentencePiece models.
        merges: Pairs that BPE merges, in their order.
        split: How a text is split before BPE, a key of _SPLITS.
        unknown_id: Id of what isn't in the vocabulary, of SentencePiece models.
    """

    path: Path
    tokens: list[str]
    kinds: list[int]
    scores: list[float]
    merges: list[tuple[str, str]]
    split: str
    unknown_id: int

    @classmethod
    def read(cls, path: Path, values: dict[str, Any]) -> Vocabulary:
        """Reads the keys `tokenizer.ggml.`.

        Args:
            path: The file, for messages.
            values: Its metadata.

        Returns:
            The vocabulary.

        Raises:
            ValueError: A list is missing, of another length or type, a token is there twice, or
                the way of splitting a text is unknown.
        """
        tokens = _list(path, values, "tokens", str)
        if len(set(tokens)) < len(tokens):
            raise ValueError(f"{path}: tokenizer.ggml.tokens has a token twice; copy it again")
        is_bpe = values.get("tokenizer.ggml.model") == "gpt2"
        kinds = _list(path, values, "token_type", int, len(tokens), default=_NORMAL)
        scores: list[float] = []
        merges: list[tuple[str, str]] = []
        if is_bpe:
            for merge in _list(path, values, "merges", str):
                first, _, second = merge[1:].partition(" ")  # a token may begin with a space
                merges.append((merge[:1] + first, second))
        else:
            scores = _list(path, values, "scores", (int, float), len(tokens))
        return cls(
            path=path,
            tokens=tokens,
            kinds=kinds,
            scores=scores,
            merges=merges,
            split=_split_name(path, values, tokens) if is_bpe else "",
            unknown_id=check_int(
                f"{path}: tokenizer.ggml.unknown_token_id",
                values.get("tokenizer.ggml.unknown_token_id", 0),
                least=0,
                most=len(tokens) - 1,
            ),
        )

    @property
    def adds_bos(self) -> bool:
        """Whether texts begin with a BOS where the file doesn't say."""
        return not self.split or self.split in _LIKE_LLAMA3

    def added_tokens(self) -> dict[str, dict[str, Any]]:
        """The user-defined tokens of a SentencePiece model, as tokenizer_config.json lists them."""
        return {
            str(i): {"content": text.replace("▁", " "), "special": False, "normalized": False}
            for i, (text, kind) in enumerate(zip(self.tokens, self.kinds, strict=True))
            if kind == _USER_DEFINED
        }


def tokenizer_json(vocabulary: Vocabulary) -> bytes:
    """Writes a byte-level BPE vocabulary as a tokenizer.json.

    Args:
        vocabulary: With merges and a way of splitting.

    Returns:
        The file's bytes.

    Raises:
        ValueError: A merge is of what is no token.
    """
    import tokenizers
    from tokenizers import decoders, models

    ids = {text: i for i, text in enumerate(vocabulary.tokens)}
    with library_errors(f"{vocabulary.path}: its tokenizer is damaged"):
        whole_words = vocabulary.split in _LIKE_LLAMA3
        model = models.BPE(ids, vocabulary.merges, ignore_merges=whole_words)
        library = tokenizers.Tokenizer(model)
        library.pre_tokenizer = _pre_tokenizer(vocabulary.split)
        library.decoder = decoders.ByteLevel()
        library.add_tokens(
            [
                tokenizers.AddedToken(text, special=kind != _USER_DEFINED, normalized=False)
                for text, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
                if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN)
            ]
        )
        return library.to_str().encode()


def sentencepiece_model(vocabulary: Vocabulary) -> bytes:
    """Writes a SentencePiece vocabulary as a tokenizer.model.

    User-defined tokens are left to added_tokens: a model would look for them with its own marks in
    place of spaces.

    Args:
        vocabulary: With scores.

    Returns:
        The file's bytes.

    Raises:
        ValueError: The library doesn't take it: there are two tokens for a byte, or none.

    Source: sentencepiece_model.proto of github.com/google/sentencepiece, for the fields' numbers.
    """
    pieces = bytearray()
    for i, text in enumerate(vocabulary.tokens):
        kind = vocabulary.kinds[i]
        if i == vocabulary.unknown_id:
            kind = _UNKNOWN
        elif kind not in (_NORMAL, _CONTROL, _BYTE):
            kind = _UNUSED
        score = _key(2, 5) + struct.pack("<f", vocabulary.scores[i])
        piece = _field(1, (text or f"[EMPTY_{i}]").encode()) + score + _number(3, kind)
        pieces += _field(1, piece)
    trainer = _number(3, 2)  # BPE
    trainer += _number(35, int(_BYTE in vocabulary.kinds))
    trainer += _number(40, vocabulary.unknown_id)
    trainer += _field(45, vocabulary.tokens[vocabulary.unknown_id].encode())
    normalizer = _field(1, b"identity") + _number(3, 1) + _number(4, 0) + _number(5, 1)
    data = bytes(pieces) + _field(2, trainer) + _field(3, normalizer)
    try:
        count_pieces(vocabulary.path, data)
    except ValueError:
        raise ValueError(
            f"{vocabulary.path}: its SentencePiece vocabulary is damaged; copy it again"
        ) from None
    return data


def _list(
    path: Path,
    values: dict[str, Any],
    name: str,
    kind: type | tuple[type, ...],
    length: int | None = None,
    default: Any = None,
) -> list[Any]:
    """A list of the metadata; where it is missing, as many of the default, if there is one."""
    key = f"tokenizer.ggml.{name}"
    if key not in values and default is not None and length is not None:
        return [default] * length
    found = values.get(key)
    if not isinstance(found, list) or not found or not all(isinstance(x, kind) for x in found):
        raise ValueError(f"{path}: {key} is {shown(found)}; it must be a list; copy it again")
    if length is not None and len(found) != length:
        raise ValueError(f"{path}: {key} has {len(found)} items for {length} tokens; copy it again")
    if any(isinstance(x, float) and not math.isfinite(x) for x in found):
        raise ValueError(f"{path}: {key} holds what is no number; copy it again")
    return found


def _split_name(path: Path, values: dict[str, Any], tokens: list[str]) -> str:
    stated = values.get("tokenizer.ggml.pre", "default")
    if stated == "default" and LLAMA3_BOS in tokens:
        return "llama-bpe"  # of the first weeks of Llama 3, when nothing else was stated
    for name, names in _SPLITS.items():
        if stated in names:
            return name
    known = ", ".join(name for names in _SPLITS.values() for name in names)
    raise ValueError(
        f"{path}: tokenizer.ggml.pre is {shown(stated)}; known are {known}; take the model's "
        "Hugging Face folder"
    )


def _pre_tokenizer(split: str) -> tokenizers.pre_tokenizers.PreTokenizer:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if split == "gpt-2":
        return ByteLevel(add_prefix_space=False, use_regex=True)
    if split == "smollm":
        return Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    splits = [Split(Regex(pattern), "isolated") for pattern in _PATTERNS[split]]
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


def _field(number: int, content: bytes) -> bytes:
    """A field of protobuf's wire format that holds bytes."""
    return _key(number, 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _key(number, 0) + _varint(value)


def _key(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _varint(value: int) -> bytes:
    return bytes(_varint_bytes(value))


def _varint_bytes(value: int) -> Iterator[int]:
    while value > 127:
        yield value & 127 | 128
        value >>= 7
    yield value
