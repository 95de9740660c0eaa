"""tokenizer.json, read by the library that wrote it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from .library_errors import library_errors
from .tokenizer import Tokenizer
from .tokenizer_config import TokenizerConfig

if TYPE_CHECKING:
    import tokenizers

__all__ = ["load_json"]

logger = logging.getLogger(__name__)

# How many characters a normalizer or decoder may make of one. Llama's replace one by one.
_MAX_GROWTH = 64
_WORD_PARTS = re.compile(rb'"(continuing_subword_prefix|end_of_word_suffix)"\s*:\s*+(?!null\b|"")')


def load_json(
    path: Path, data: bytes, config: TokenizerConfig, num_rows: int | None
) -> tuple[Tokenizer, Callable[[str], int | None]]:
    """Reads a tokenizer.json.

    Args:
        path: The file, named in errors.
        data: Its bytes.
        config: What the folder adds to it.
        num_rows: V if it is known: a token that is named without an id is added only below it.

    Returns:
        The tokenizer, and the id of a token's text.

    Raises:
        ValueError: The file is damaged, or decodes in a way LLaMA's tokenizers don't.
    """
    import tokenizers

    if _WORD_PARTS.search(data):  # the library panics on some, and writes to stderr
        raise ValueError(f"{path} marks parts of words, as no LLaMA's does; copy the file again")
    with library_errors(f"{path} is not a tokenizer"):
        library = tokenizers.Tokenizer.from_buffer(data)
    library.no_truncation()
    library.no_padding()
    _check_growth(path, _state(library.normalizer))
    _check_growth(path, _state(library.decoder))
    decoder = _read_decoder(path, _state(library.decoder))
    if config.llama and not decoder.byte_level and isinstance(library.model, tokenizers.models.BPE):
        decoder = _set_spaces(library, config.spaces)
    with library_errors(f"{path} is not a tokenizer"):
        _add_tokens(library, config, num_rows)
        begins_with = _template_start(library)
    special = {i: t.content for i, t in library.get_added_tokens_decoder().items() if t.special}
    lock = Lock()

    def encode(text: str, special: bool) -> list[int]:
        with lock, library_errors(f"{path} can't encode this text"):
            library.encode_special_tokens = not special  # the library object's state
            return library.encode(text, add_special_tokens=False).ids

    adds = not config.other_class if config.add_bos is None else config.add_bos
    tokenizer = Tokenizer(
        encoder=encode,
        pieces=_Pieces(library, decoder, _num_ids(library, num_rows)),
        bos_id=begins_with[0] if begins_with else None,
        special_ids=frozenset(special),
        special_names={text: i for i, text in special.items()},
        # As transformers does: a file that says how texts begin decides.
        adds_bos=adds if begins_with is None else bool(begins_with),
        leading_spaces=decoder.leading_spaces,
        replace_each_byte=not decoder.byte_level,
    )
    return tokenizer, library.token_to_id


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decoder:
    """What a tokenizer.json's decoder does to one token."""

    byte_level: bool = False
    fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    leading_spaces: int = 0

    def to_bytes(self, text: str) -> bytes:
        if self.byte_level:
            known = all(char in _BYTE_OF for char in text)  # an added token may be plain text
            return bytes(_BYTE_OF[char] for char in text) if known else text.encode()
        for old, new in self.replacements:
            text = text.replace(old, new)
        if self.fallback and re.fullmatch("<0x[0-9A-Fa-f]{2}>", text):
            return bytes((int(text[3:5], 16),))
        return text.encode()


class _Pieces(Mapping[int, bytes]):
    """The bytes of each id, made when they are asked for: most never are."""

    def __init__(self, library: tokenizers.Tokenizer, decoder: _Decoder, size: int) -> None:
        self._library, self._decoder, self._size = library, decoder, size

    def __getitem__(self, token_id: int) -> bytes:
        if not 0 <= token_id < self._size:
            raise KeyError(token_id)
        text = self._library.id_to_token(token_id)
        return b"" if text is None else self._decoder.to_bytes(text)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._size))

    def __len__(self) -> int:
        return self._size


def _byte_of() -> dict[str, int]:
    # Byte-level BPE writes printable Latin-1 bytes as themselves, the others from U+0100 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (b for b in range(256) if b not in printable)
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_OF = _byte_of()


def _state(part: Any) -> Any:
    """A part of a tokenizer as it stands in the file."""
    return None if part is None else json.loads(part.__getstate__())


def _steps(spec: Any) -> Iterator[Any]:
    """The parts of a sequence, whose list has another name for each kind of part."""
    if isinstance(spec, dict) and spec.get("type") == "Sequence":
        for parts in spec.values():
            for part in parts if isinstance(parts, list) else ():
                yield from _steps(part)
    else:
        yield spec


def _check_growth(path: Path, spec: Any) -> None:
    """Refuses replacements that multiply a text until it fills the memory."""
    growth = 1
    for step in _steps(spec):
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                growth *= max(1, -(-len(new) // max(1, len(old))))
            case {"type": "Replace", "content": str(new)}:
                growth *= max(1, len(new))  # a pattern may match a single character
            case {"type": "Prepend", "prepend": str(new)}:
                growth *= max(1, len(new))
    if growth > _MAX_GROWTH:
        raise ValueError(
            f"{path} replaces one character by up to {growth:.3g}, at most {_MAX_GROWTH} are "
            "allowed; copy it again from where you trust it"
        )


def _read_decoder(path: Path, spec: Any) -> _Decoder:
    byte_level = fallback = False
    spaces, replacements = 0, []
    for step in _steps(spec):
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
                    f"{path} has the decoder {json.dumps(step):.60}; allowed are ByteLevel, "
                    "Metaspace, and Replace, ByteFallback, Fuse, Strip as LLaMA uses them"
                )
    return _Decoder(
        byte_level=byte_level,
        fallback=fallback,
        replacements=tuple(replacements),
        leading_spaces=spaces,
    )


def _set_spaces(library: tokenizers.Tokenizer, spaces: str) -> _Decoder:
    """Has LlamaTokenizer's own rule for spaces, which it sets whatever the file says.

    Source: transformers 5.24's `LlamaTokenizer.__init__`.
    """
    from tokenizers import normalizers, pre_tokenizers

    library.normalizer = normalizers.Sequence([])
    library.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme=spaces, split=False
    )
    return _Decoder(
        fallback=True, replacements=(("▁", " "),), leading_spaces=int(spaces != "never")
    )


def _add_tokens(
    library: tokenizers.Tokenizer, config: TokenizerConfig, num_rows: int | None
) -> None:
    """Adds what only the folder's other files name."""
    import tokenizers

    there = {token.content: token for token in library.get_added_tokens_decoder().values()}
    for token in config.added:
        known = library.token_to_id(token.text)
        if token.id is None and (
            token.text in there
            or (known is None and (num_rows is None or library.get_vocab_size() >= num_rows))
        ):
            continue
        library.add_tokens(
            [
                tokenizers.AddedToken(
                    token.text,
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized,
                    special=token.special,
                )
            ]
        )
        given = library.token_to_id(token.text)
        if token.id not in (None, given):
            logger.warning(
                "%r is id %d by its file, %s by tokenizer.json", token.text, token.id, given
            )


def _template_start(library: tokenizers.Tokenizer) -> list[int] | None:
    """The ids that the file's post-processor begins a text with; None if it can't add any."""
    plain, whole = (library.encode("a", add_special_tokens=add).ids for add in (False, True))
    spec = _state(library.post_processor)
    kinds = {step.get("type") for step in _steps(spec) if step}
    if not kinds & {"TemplateProcessing", "RobertaProcessing", "BertProcessing"}:
        return None
    # "a" may be no token at all.
    return next((whole[:n] for n in range(len(whole)) if whole[n : n + len(plain)] == plain), [])


def _num_ids(library: tokenizers.Tokenizer, num_rows: int | None) -> int:
    """One more than the largest id; with V known, than the largest that the model has a row for."""
    if num_rows is None:
        return max(library.get_vocab().values(), default=-1) + 1
    last = max(num_rows, library.get_vocab_size()) - 1
    return next((i + 1 for i in range(last, -1, -1) if library.id_to_token(i) is not None), 0)
