"""A tokenizer for random weights: it costs what a real one of that size costs to load and use."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

__all__ = ["SPECIALS", "write_stand_in_tokenizer"]

SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>")  # BOS and EOS
_MAX_CHARS = 16  # of a piece
# Byte-level BPE writes printable Latin-1 bytes as themselves, the others from U+0100 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]


def write_stand_in_tokenizer(folder: Path, vocab_size: int) -> None:
    """Writes a byte-level BPE of random merges as tokenizer.json, with its tokenizer_config.json.

    Args:
        folder: Of the checkpoint.
        vocab_size: V, at least 3; the last two ids are BOS and EOS. Below 258 some bytes have no
            token.
    """
    num_pieces = vocab_size - len(SPECIALS)
    pieces = [chr(byte) for byte in _PRINTABLE] + [chr(256 + n) for n in range(68)]
    known, merges = set(pieces), []
    generator = random.Random(0)
    while len(pieces) < num_pieces:
        pair = generator.choice(pieces), generator.choice(pieces)
        piece = "".join(pair)
        if len(piece) <= _MAX_CHARS and piece not in known:
            known.add(piece)
            pieces.append(piece)
            merges.append(pair)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(num_pieces + i, text) for i, text in enumerate(SPECIALS)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {piece: index for index, piece in enumerate(pieces[:num_pieces])},
            "merges": merges,
        },
    }
    names = dict(zip(("bos_token", "eos_token"), SPECIALS, strict=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")


def _special(token_id: int, text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": text, "special": True, **flags}
