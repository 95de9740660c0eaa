"""tokenizer.json, read by the library that wrote it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

from ..typed_json import read_json
from .tokenizer import Tokenizer

__all__ = ["load_json"]


def load_json(path: Path, texts: dict[str, str | None]) -> tuple[Tokenizer, dict[str, int]]:
    """Reads a tokenizer.json.

    Args:
        path: The file; its folder's tokenizer_config.json says what else holds.
        texts: Special tokens that the folder names, by key.

    Returns:
        The tokenizer, and the id of each token's text.

    Raises:
        ValueError: The file is damaged, or decodes in a way LLaMA's tokenizers don't.
    """
    import tokenizers

    spec, config = read_json(path), read_json(path.parent / "tokenizer_config.json", optional=True)
    try:
        library = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        if type(error) is not Exception:  # the library's parse errors have no type of their own
            raise
        raise ValueError(f"{path} is not a tokenizer ({error}); copy it again") from None
    library.no_truncation()
    library.no_padding()
    added = library.get_added_tokens_decoder()
    known = {token.content for token in added.values()}
    # Tokens that only the config names are special all the same.
    library.add_special_tokens(
        [t for t in texts.values() if t and t not in known and library.token_to_id(t) is not None]
    )
    names = library.get_vocab()
    to_bytes, leading_spaces, byte_level = _json_decoder(spec.get("decoder"))
    lock = Lock()

    def encode(text: str, special: bool) -> list[int]:
        with lock:  # the switch is the library object's state
            library.encode_special_tokens = not special
            return library.encode(text, add_special_tokens=False).ids

    # As transformers does: an explicit setting, else the file's own post-processor, else the class.
    start = library.encode("a").ids[:1]
    bos = names.get(texts.get("bos_token") or "")
    by_class = str(config.get("tokenizer_class", "Llama")).startswith(("Llama", "CodeLlama"))
    tokenizer = Tokenizer(
        encoder=encode,
        pieces={i: to_bytes(text) for text, i in names.items()},
        special_ids=frozenset(
            i for i, token in library.get_added_tokens_decoder().items() if token.special
        ),
        adds_bos=bool(config.get("add_bos_token", start == [bos] or by_class)),
        leading_spaces=leading_spaces,
        replace_each_byte=not byte_level,
    )
    return tokenizer, names


def _json_decoder(spec: Any) -> tuple[Callable[[str], bytes], int, bool]:
    """Reads the decoder of a tokenizer.json as: token text to bytes, leading spaces, byte-level."""
    steps = spec["decoders"] if spec and spec.get("type") == "Sequence" else [spec]
    byte_level = fallback = False
    spaces, replacements = 0, []
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                byte_level = True
            case {"type": "ByteFallback"}:
                fallback = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replacements.append((old, new))
            case {"type": "Metaspace", "replacement": str(old)}:
                replacements.append((old, " "))
                spaces = int(step.get("prepend_scheme") != "never")
            case {"type": "Strip", "content": " ", "start": int(spaces), "stop": 0}:
                pass
            case _:
                raise ValueError(
                    f"tokenizer.json has the decoder {json.dumps(step)}; allowed are ByteLevel, "
                    "Metaspace, and Replace, ByteFallback, Fuse, Strip as LLaMA uses them"
                )
    # Byte-level BPE writes printable Latin-1 bytes as themselves, the others from U+0100 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (b for b in range(256) if b not in printable)
    byte_of = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}

    def to_bytes(text: str) -> bytes:
        if byte_level:
            known = all(char in byte_of for char in text)  # an added token may be plain text
            return bytes(byte_of[char] for char in text) if known else text.encode()
        for old, new in replacements:
            text = text.replace(old, new)
        if fallback and re.fullmatch("<0x[0-9A-Fa-f]{2}>", text):
            return bytes((int(text[3:5], 16),))
        return text.encode()

    return to_bytes, spaces, byte_level
