"""Loads the three tokenizer files that LLaMA checkpoints carry."""

from __future__ import annotations

import base64
import binascii
import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

from .json_file import read_json
from .tokenizer import Tokenizer

__all__ = ["load_tokenizer", "special_texts"]

logger = logging.getLogger(__name__)

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
_LLAMA3_STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Loads a checkpoint's tokenizer: `tokenizer.json`, else `tokenizer.model` of either format.

    EOS ids are the union of generation_config.json, config.json and the tokenizer's own; where
    none is named, Llama 3's end_of_text, eom_id and eot_id count if the vocabulary has them.

    Args:
        folder: The checkpoint or bundle.

    Returns:
        The tokenizer.

    Raises:
        FileNotFoundError: The folder or the tokenizer is missing.
        ValueError: A file is damaged or of another format.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give the checkpoint's folder")
    texts = special_texts(folder)
    json_file, model_file = folder / "tokenizer.json", folder / "tokenizer.model"
    if json_file.is_file():
        tokenizer, names = _load_json(json_file, texts)
        if model_file.is_file():
            _compare_sizes(tokenizer, folder)
    elif model_file.is_file():
        tokenizer, names = _load_model(model_file, texts)
    else:
        raise FileNotFoundError(
            f"no tokenizer in {folder}; copy the checkpoint's tokenizer.json or tokenizer.model in"
        )
    size = tokenizer.vocab_size
    generation, config = (
        read_json(folder / f"{n}.json", optional=True) for n in ("generation_config", "config")
    )
    own_bos, own_eos = (
        [names[text]] if (text := texts.get(key)) in names else []
        for key in ("bos_token", "eos_token")
    )
    special_ids = tokenizer.special_ids.union(own_bos, own_eos)
    bos = own_bos or ([] if tokenizer.bos_id is None else [tokenizer.bos_id])
    bos += _ids(config, "bos_token_id", size) + _ids(generation, "bos_token_id", size)
    bos += [names[text] for text in (_LLAMA3_SPECIALS[0],) if text in names]
    if texts.get("bos_token", "") is None:  # the files say that there is none
        bos = []
    eos = _ids(generation, "eos_token_id", size) + _ids(config, "eos_token_id", size)
    eos += own_eos or tokenizer.eos_ids
    eos = eos or [names[text] for text in _LLAMA3_STOPS if text in names]
    return replace(
        tokenizer,
        bos_id=bos[0] if bos else None,
        eos_ids=tuple(dict.fromkeys(eos)),
        special_ids=special_ids,
    )


def special_texts(folder: Path) -> dict[str, str | None]:
    """Reads the special tokens a checkpoint names, such as bos_token, by their key.

    Args:
        folder: Holds tokenizer_config.json, special_tokens_map.json, both or neither.

    Returns:
        Each token's text; None where tokenizer_config.json says there is no such token.

    Raises:
        ValueError: A file is not a JSON object.
    """
    texts: dict[str, str | None] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in read_json(folder / name, optional=True).items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and (text is None or isinstance(text, str)):
                texts[key] = text
    return texts


def _ids(config: dict[str, Any], key: str, size: int) -> list[int]:
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):
        raise ValueError(f"{key} is {value!r}; it must be a token id or a list of them")
    if unknown := [i for i in ids if not 0 <= i < size]:
        logger.warning("%s names %s, but the tokenizer has only %d ids", key, unknown, size)
    return [i for i in ids if 0 <= i < size]


def _compare_sizes(tokenizer: Tokenizer, folder: Path) -> None:
    try:
        size = _load_model(folder / "tokenizer.model", {})[0].vocab_size
    except ValueError as error:
        logger.warning("using tokenizer.json; %s", error)
        return
    if size != tokenizer.vocab_size:
        logger.warning(
            "using tokenizer.json with %d ids; tokenizer.model beside it has %d",
            tokenizer.vocab_size,
            size,
        )


def _load_json(path: Path, texts: dict[str, str | None]) -> tuple[Tokenizer, dict[str, int]]:
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


def _load_model(path: Path, texts: dict[str, str | None]) -> tuple[Tokenizer, dict[str, int]]:
    data = path.read_bytes()
    if re.match(rb"[A-Za-z0-9+/=]+ +\d+\s", data):
        return _load_ranks(path, data)
    return _load_sentencepiece(path, data, texts)


def _load_ranks(path: Path, data: bytes) -> tuple[Tokenizer, dict[str, int]]:
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


def _load_sentencepiece(
    path: Path, data: bytes, texts: dict[str, str | None]
) -> tuple[Tokenizer, dict[str, int]]:
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
