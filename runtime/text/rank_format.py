"""Llama 3's tokenizer.model: lines of a token in base64 and its rank."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from pathlib import Path

from .added_tokens import AddedToken, AddedTokens
from .library_errors import library_errors
from .tokenizer import Tokenizer
from .tokenizer_config import TokenizerConfig

__all__ = ["LLAMA3_BOS", "LLAMA3_PATTERN", "LLAMA3_STOPS", "NUM_LLAMA3_SPECIALS", "load_ranks"]

# Llama 3's split of text into words. Source: Llama 3's published tokenizer (github.com/meta-llama).
LLAMA3_PATTERN = (
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
NUM_LLAMA3_SPECIALS = 256


def load_ranks(
    path: Path, data: bytes, config: TokenizerConfig, num_rows: int | None
) -> tuple[Tokenizer, Callable[[str], int | None]]:
    """Reads Llama 3's file of `base64 rank` lines, which tiktoken encodes with.

    Args:
        path: The file, named in errors.
        data: Its bytes.
        config: What the folder adds to it.
        num_rows: V if it is known: the file has as many ids, or it is cut short.

    Returns:
        The tokenizer, and the id of a token's text.

    Raises:
        ValueError: A line is damaged, or the number of ids isn't V.
    """
    import tiktoken

    ranks = _read_ranks(path, data)
    names = _special_names(path, len(ranks), config, num_rows)
    library = tiktoken.Encoding(
        name=str(path), pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    added = AddedTokens(names.values())

    def encode(text: str, special: bool) -> list[int]:
        ids: list[int] = []
        with library_errors(f"{path} can't encode this text"):
            for _, part, token in added.split(text, special=special):
                if token is not None and token.id is not None:
                    ids.append(token.id)
                else:
                    ids += library.encode_ordinary(part)
        return ids

    ids = {token.text: i for i, token in names.items()}
    specials = {token.text: i for i, token in names.items() if token.special}
    tokenizer = Tokenizer(
        encoder=encode,
        pieces={i: token for token, i in ranks.items()} | {i: t.encode() for t, i in ids.items()},
        special_ids=frozenset(specials.values()),
        special_names=specials,
        adds_bos=config.add_bos is not False,
    )
    return tokenizer, ids.get


def _read_ranks(path: Path, data: bytes) -> dict[bytes, int]:
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
    return ranks


def _special_names(
    path: Path, num_ranks: int, config: TokenizerConfig, num_rows: int | None
) -> dict[int, AddedToken]:
    """The tokens behind the ranks, by id; the folder's files may rename and add some."""
    reserved = (f"<|reserved_special_token_{n}|>" for n in range(NUM_LLAMA3_SPECIALS))
    names = {
        num_ranks + n: AddedToken(
            text=_LLAMA3_SPECIALS.get(n) or next(reserved), id=num_ranks + n, special=True
        )
        for n in range(NUM_LLAMA3_SPECIALS)
    }
    size = num_ranks + NUM_LLAMA3_SPECIALS
    listed = {token.id: token for token in config.added if token.id is not None}
    ids = {token.text: i for i, token in names.items()}
    moved = [token.text for i, token in listed.items() if ids.get(token.text, i) != i]
    behind = sorted(i for i in listed if i >= size)
    whole = num_rows in (None, size) or (
        behind[:1] == [size] and num_rows is not None and behind[-1] < num_rows
    )
    if moved or not whole:
        expected = f"{moved[0]} has another id" if moved else f"the model has {num_rows}"
        raise ValueError(
            f"{path} has {num_ranks} ranks, with {NUM_LLAMA3_SPECIALS} special tokens {size} ids, "
            f"but {expected}; it is cut short or another model's, copy it again"
        )
    return names | {i: token for i, token in listed.items() if i >= num_ranks}
