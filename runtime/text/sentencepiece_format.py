"""SentencePiece's tokenizer.model, with the tokens a fine-tune added behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .added_tokens import AddedToken, AddedTokens
from .tokenizer import Tokenizer
from .tokenizer_config import TokenizerConfig

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

__all__ = ["count_pieces", "load_sentencepiece"]

# Appended to a serialized model it overwrites normalizer_spec.add_dummy_prefix with false, as
# protobuf merges a field that comes twice.
_NO_PREFIX = b"\x1a\x02\x18\x00"


def load_sentencepiece(
    path: Path, data: bytes, config: TokenizerConfig, num_rows: int | None
) -> tuple[Tokenizer, Callable[[str], int | None]]:
    """Reads a SentencePiece model.

    Args:
        path: The file, named in errors.
        data: Its bytes.
        config: What the folder adds to it.
        num_rows: V if it is known: a token that is named without an id is added only below it.

    Returns:
        The tokenizer, and the id of a token's text.

    Raises:
        ValueError: It isn't a SentencePiece model, or it is damaged.
    """
    library = _open(path, data)
    size = library.vocab_size()
    try:
        pieces = {i: _piece(library, i) for i in range(size)}
        texts = {library.id_to_piece(i): i for i in range(size)}
        spaces = 1 - library.decode([library.piece_to_id("▁")]).count(" ")
        library.encode("a")
    except (RuntimeError, ValueError):  # UnicodeDecodeError is one
        raise ValueError(f"{path} is damaged; copy it again") from None
    controls = [i for i in range(size) if library.is_control(i)]
    ordinary = {i for i in range(size) if not (library.is_control(i) or library.is_unknown(i))}
    tokens = [AddedToken(text=library.id_to_piece(i), id=i, special=True) for i in controls]
    if 0 <= library.unk_id() < size:
        unknown = library.id_to_piece(library.unk_id())
        tokens.append(AddedToken(text=unknown, id=library.unk_id(), special=True))
    added = _with_ids(config.added, texts, size, num_rows)
    for i, token in added:
        if texts.get(token.text) != i:
            texts[token.text] = i
            pieces[i] = token.text.encode()
    special_ids = frozenset(controls).union(i for i, token in added if token.special)
    tokens += [token for _, token in added]
    named = config.texts.get("bos_token", "")
    bos = None if named is None else texts.get(named, library.bos_id())
    tokenizer = Tokenizer(
        encoder=_encoder(library, data, config, tokens, ordinary),
        pieces=pieces,
        bos_id=None if bos is None or bos < 0 else bos,
        eos_ids=(library.eos_id(),) if library.eos_id() >= 0 else (),
        special_ids=special_ids,
        special_names={t.text: t.id for t in tokens if t.special and t.id is not None},
        adds_bos=config.add_bos is not False,
        leading_spaces=0 if config.spaces == "never" else spaces,
        replace_each_byte=True,
    )
    return tokenizer, texts.get


def count_pieces(path: Path, data: bytes) -> int:
    """Returns the number of a model's own ids.

    Raises:
        ValueError: It isn't a SentencePiece model.
    """
    return _open(path, data).vocab_size()


def _open(path: Path, data: bytes) -> SentencePieceProcessor:
    import sentencepiece

    try:
        if data:
            return sentencepiece.SentencePieceProcessor(model_proto=data)
    except UnicodeDecodeError:  # of the library's own message, which holds a piece
        raise ValueError(f"{path} is damaged; copy it again") from None
    except RuntimeError:
        pass
    raise ValueError(
        f"{path} ({len(data)} bytes) is neither SentencePiece nor a rank file; copy it again"
    )


def _piece(library: SentencePieceProcessor, i: int) -> bytes:
    text = library.id_to_piece(i)
    if library.is_byte(i):
        return bytes((int(text[3:5], 16),))
    if library.is_unknown(i):
        return library.decode([i]).encode()
    return text.replace("▁", " ").encode()


def _with_ids(
    tokens: Iterable[AddedToken], texts: Mapping[str, int], size: int, num_rows: int | None
) -> list[tuple[int, AddedToken]]:
    """The added tokens; one without an id is the piece of its text, or the next id with a row."""
    tokens = list(tokens)
    free = max([size - 1, *(token.id for token in tokens if token.id is not None)]) + 1
    placed = []
    for token in tokens:
        i = texts.get(token.text, free) if token.id is None else token.id
        if i == free and (num_rows is None or free >= num_rows):
            continue
        free += i == free
        placed.append((i, replace(token, id=i)))
    return placed


def _encoder(
    library: SentencePieceProcessor,
    data: bytes,
    config: TokenizerConfig,
    tokens: list[AddedToken],
    ordinary: set[int],
) -> Callable[[str, bool], list[int]]:
    added = AddedTokens(tokens)
    # Special tokens whose text the model itself would find: it is cut where it must stay text.
    found_anyway = AddedTokens(
        replace(token, special=False) for token in tokens if token.special and token.id in ordinary
    )

    @cache
    def without_prefix() -> SentencePieceProcessor:
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=data + _NO_PREFIX)

    def encode_part(start: int, text: str) -> list[int]:
        prefix = config.spaces == "always" or (config.spaces == "first" and start == 0)
        if start and config.llama and text.startswith((" ", "▁")):
            prefix = False  # LlamaTokenizer doesn't double a space between tokens
        return (library if prefix else without_prefix()).encode(text)

    def encode(text: str, special: bool) -> list[int]:
        ids: list[int] = []
        for start, part, token in added.split(text, special=special):
            if token is not None and token.id is not None:
                ids.append(token.id)
            elif special:
                ids += encode_part(start, part)
            else:
                for inner, piece, name in found_anyway.split(part, special=False):
                    cuts = [piece] if name is None else [piece[:1], piece[1:]]
                    for n, cut in enumerate(cuts):
                        first = inner == 0 and n == 0
                        ids += encode_part(start, cut) if first else without_prefix().encode(cut)
        return ids

    return encode
