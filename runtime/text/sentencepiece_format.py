"""SentencePiece's tokenizer.model, with the tokens a fine-tune added behind it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..typed_json import read_json
from .tokenizer import Tokenizer

__all__ = ["load_sentencepiece"]


def load_sentencepiece(
    path: Path, data: bytes, texts: dict[str, str | None]
) -> tuple[Tokenizer, dict[str, int]]:
    """Reads a SentencePiece model.

    Args:
        path: The file; its folder names the added tokens.
        data: Its bytes.
        texts: Special tokens that the folder names, by key.

    Returns:
        The tokenizer, and the id of each special or added token's text.

    Raises:
        ValueError: It isn't a SentencePiece model, or an added token's id isn't a number.
    """
    import sentencepiece

    try:
        library = sentencepiece.SentencePieceProcessor(model_proto=data) if data else None
    except RuntimeError:
        library = None
    if library is None:
        raise ValueError(
            f"{path} ({len(data)} bytes) is neither SentencePiece nor a rank file; copy it again"
        )
    size = library.vocab_size()
    pieces: dict[int, bytes] = {}
    for i in range(size):
        text = library.id_to_piece(i)
        if library.is_byte(i):
            pieces[i] = bytes((int(text[3:5], 16),))
        elif library.is_unknown(i):
            pieces[i] = library.decode([i]).encode()
        else:
            pieces[i] = text.replace("▁", " ").encode()
    controls = {i for i in range(size) if library.is_control(i)}
    names = {library.id_to_piece(i): i for i in controls}
    config = read_json(path.parent / "tokenizer_config.json", optional=True)
    for i, text, special in _added_tokens(path.parent, config, texts):
        pieces.setdefault(i, text.encode())
        names[text] = i
        controls |= {i} if special else set()
    split = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
    newline = library.encode("\n")
    plain_joins = config.get("legacy") is False

    def encode(text: str, special: bool) -> list[int]:
        if not special or not names:
            return library.encode(text)
        ids: list[int] = []
        start = 0
        for match in [*split.finditer(text), None]:
            part = text[start : match.start() if match else None]
            # The first text gets the space the format adds; so does text after a special token
            # (as Meta's code encodes turns) unless the checkpoint says `"legacy": false`.
            if part and ids and plain_joins:
                ids += library.encode("\n" + part)[len(newline) :]
            elif part:
                ids += library.encode(part)
            if match:
                ids.append(names[match[0]])
                start = match.end()
        return ids

    tokenizer = Tokenizer(
        encoder=encode,
        pieces=pieces,
        bos_id=library.bos_id() if library.bos_id() >= 0 else None,
        eos_ids=(library.eos_id(),) if library.eos_id() >= 0 else (),
        special_ids=frozenset(controls),
        adds_bos=bool(config.get("add_bos_token", True)),
        leading_spaces=1 - library.decode([library.piece_to_id("▁")]).count(" "),
        replace_each_byte=True,
    )
    return tokenizer, names


def _added_tokens(
    folder: Path, config: dict[str, Any], texts: dict[str, str | None]
) -> list[tuple[int, str, bool]]:
    """Lists the (id, text, special) that a fine-tune added behind its SentencePiece model."""
    found: dict[int, tuple[str, bool]] = {}
    listed = [
        (i, {"content": text, "special": text in texts.values()})
        for text, i in read_json(folder / "added_tokens.json", optional=True).items()
    ]
    for i, token in [*listed, *config.get("added_tokens_decoder", {}).items()]:
        if not str(i).isdecimal() or not isinstance(token, dict) or not token.get("content"):
            raise ValueError(f"{folder} adds the token {token!r} as id {i!r}; ids are 0, 1, 2, ...")
        found[int(i)] = (str(token["content"]), bool(token.get("special")))
    return [(i, text, special) for i, (text, special) in found.items()]
