"""Llama 3's tokenizer.model: lines of a token in base64 and its rank."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from .tokenizer import Tokenizer

__all__ = ["LLAMA3_BOS", "LLAMA3_STOPS", "load_ranks"]

# Llama 3's split of text into words. Source: Llama 3's published tokenizer (github.com/meta-llama).
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Names by position after the ranks, as of 3.1; 3.0 calls 4, 8 and 10 reserved and never emits them.
_LLAMA3_SPECIALS = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
LLAMA3_BOS = _LLAMA3_SPECIALS[0]
LLAMA3_STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


def load_ranks(path: Path, data: bytes) -> tuple[Tokenizer, dict[str, int]]:
    """Reads Llama 3's file of `base64 rank` lines, which tiktoken encodes with."""
    import tiktoken

    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            text, rank = line.split()
            token = base64.b64decode(text, validate=True)
            if int(rank) != len(ranks) or token in ranks:
                raise ValueError("ranks must count up from 0, tokens be different")
        except (ValueError, binascii.Error) as error:
            raise ValueError(
                f"{path}, line {number}: {line[:40]!r} is no `base64 rank` ({error}); copy it again"
            ) from None
        ranks[token] = int(rank)
    if missing := [b for b in range(256) if bytes((b,)) not in ranks]:
        raise ValueError(
            f"{path} has no token for byte {missing[0]}; it is cut short, copy it again"
        )
    reserved = (f"<|reserved_special_token_{n}|>" for n in range(256))
    names = {_LLAMA3_SPECIALS.get(n) or next(reserved): len(ranks) + n for n in range(256)}
    library = tiktoken.Encoding(
        name=str(path), pat_str=_LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=names
    )

    def encode(text: str, special: bool) -> list[int]:
        allowed = library.special_tokens_set if special else set()
        return library.encode(text, allowed_special=allowed, disallowed_special=())

    pieces = {i: token for token, i in ranks.items()} | {i: t.encode() for t, i in names.items()}
    tokenizer = Tokenizer(encoder=encode, pieces=pieces, special_ids=frozenset(names.values()))
    return tokenizer, names
