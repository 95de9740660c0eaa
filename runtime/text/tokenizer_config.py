"""What a checkpoint's small files say about its tokenizer, each value read by its type."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..typed_json import check_bool, read_json, shown
from .added_tokens import AddedToken

__all__ = ["TokenizerConfig", "read_tokenizer_config", "special_texts"]

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerConfig:
    """tokenizer_config.json with the older files beside it.

    Attributes:
        texts: Special tokens by key, such as bos_token; None where the file says there is none.
        added: Tokens behind the vocabulary: those with an id by their id, then those without.
        add_bos: `add_bos_token`, if it is given.
        llama: Whether the class is LlamaTokenizer, which sets its own rule for spaces.
        other_class: Whether another class than LLaMA's is named.
        spaces: Which parts of a text begin with the space that SentencePiece models put in front:
            "always" (also those after an added token), "first" or "never".
    """

    texts: Mapping[str, str | None]
    added: tuple[AddedToken, ...]
    add_bos: bool | None
    llama: bool
    other_class: bool
    spaces: str


def special_texts(folder: Path) -> dict[str, str | None]:
    """Reads the special tokens a checkpoint names, such as bos_token, by their key.

    Args:
        folder: Holds tokenizer_config.json, special_tokens_map.json, both or neither.

    Returns:
        Each token's text; None where the files say there is no such token.

    Raises:
        ValueError: A file is not a JSON object, or a token isn't one.
    """
    with _named_folder(folder):
        return {key: token and token.text for key, token in _named(*_read(folder)).items()}


def read_tokenizer_config(folder: Path) -> TokenizerConfig:
    """Reads what a folder says beside its tokenizer.json or tokenizer.model.

    Where `added_tokens_decoder` is given it alone lists the added tokens; else added_tokens.json
    and special_tokens_map.json do.

    Args:
        folder: The checkpoint or bundle.

    Returns:
        Nothing added, no texts, where the files are missing.

    Raises:
        ValueError: A file is not a JSON object, or a value has another type than its key says.

    Source: the rules of transformers 5.24's `PreTrainedTokenizerBase._from_pretrained`.
    """
    with _named_folder(folder):
        return _tokenizer_config(folder, *_read(folder))


def _tokenizer_config(
    folder: Path, config: dict[str, Any], special_map: dict[str, Any]
) -> TokenizerConfig:
    named = _named(config, special_map)
    extra = [*_extra(config), *_extra(special_map)]
    texts = {key: token and token.text for key, token in named.items()}
    found = {token.text: token for token in _numbered(folder, config, {*texts.values()}, extra)}
    for token in [*named.values(), *extra]:
        if token and token.text:
            found.setdefault(token.text, token)
    name = config.get("tokenizer_class") or ""
    if not isinstance(name, str):
        raise ValueError(f"tokenizer_class is {shown(name)}; it must be a text")
    kind = name.removesuffix("Fast")
    llama = kind in ("LlamaTokenizer", "CodeLlamaTokenizer")
    legacy = _flag(config, "legacy", not llama)
    if llama and not _flag(config, "add_prefix_space", True):
        spaces = "never"
    else:
        spaces = "always" if legacy and kind != "CodeLlamaTokenizer" else "first"
    return TokenizerConfig(
        texts=texts,
        added=tuple(found.values()),
        add_bos=_flag(config, "add_bos_token", None),
        llama=llama,
        other_class=bool(name) and not name.startswith(("Llama", "CodeLlama")),
        spaces=spaces,
    )


@contextlib.contextmanager
def _named_folder(folder: Path) -> Iterator[None]:
    """Says where a value stands that was refused; which of the files it was in is forgotten."""
    try:
        yield
    except ValueError as error:
        if str(folder) in str(error):
            raise
        place = folder / "tokenizer_config.json"
        raise ValueError(f"{place} or a file beside it: {error}") from None


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    config = read_json(folder / "tokenizer_config.json", optional=True)
    return config, read_json(folder / "special_tokens_map.json", optional=True)


def _named(config: dict[str, Any], special_map: dict[str, Any]) -> dict[str, AddedToken | None]:
    """The tokens that have a key of their own, in the order transformers adds them."""
    # Older checkpoints say it in special_tokens_map.json, which then wins, as in transformers.
    new = config.get("added_tokens_decoder") is not None
    both = {**special_map, **config} if new else {**config, **special_map}
    found: dict[str, AddedToken | None] = {}
    for key in (*_NAMED, *both):
        if key in both and key in (*_NAMED, "mask_token"):
            found[key] = None if both[key] is None else _token(key, both[key], special=True)
        elif key.endswith("_token") and isinstance(both.get(key), str | dict):
            found[key] = _token(key, both[key], special=True)
    return found


def _extra(config: dict[str, Any]) -> list[AddedToken]:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        extra = list(extra.values())
    if not isinstance(extra, list):
        raise ValueError(
            f"additional_special_tokens is {shown(extra)}; it must be a list of tokens"
        )
    return [_token("additional_special_tokens", value, special=True) for value in extra]


def _numbered(
    folder: Path, config: dict[str, Any], named: set[str | None], extra: list[AddedToken]
) -> Iterator[AddedToken]:
    """The tokens that are listed with their ids, in the order of these."""
    decoder = config.get("added_tokens_decoder")
    if decoder is None:
        special = named.union(token.text for token in extra)
        decoder = {
            i: {"content": text, "special": text in special, "normalized": text not in special}
            for text, i in read_json(folder / "added_tokens.json", optional=True).items()
        }
    if not isinstance(decoder, dict):
        raise ValueError(f"added_tokens_decoder is {shown(decoder)}; it must be an object by ids")
    numbered: list[AddedToken] = []
    for i, value in decoder.items():
        token = _token("added_tokens_decoder", value, special=False)
        if not (str(i).isdecimal() and len(str(i)) < 10 and token.text):
            raise ValueError(
                f"{folder} adds the token {shown(token.text)} as id {shown(i)}; "
                "ids are 0, 1, 2, ..."
            )
        numbered.append(token.at(int(i), special=token.special or token.text in named))
    yield from sorted(numbered, key=lambda token: token.id or 0)


def _token(key: str, value: Any, special: bool) -> AddedToken:
    """Reads a token written as its text or as an object."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise ValueError(
            f"{key} is {shown(value)}; it must be a text, null or an object with `content`"
        )
    if text.encode(errors="ignore").decode() != text:
        raise ValueError(f"{key} is {shown(value)}; it holds half a character (a surrogate)")
    if not isinstance(value, dict):
        return AddedToken(text=text, special=special, normalized=not special)
    special = _flag(value, "special", special)
    return AddedToken(
        text=text,
        special=special,
        normalized=_flag(value, "normalized", not special),
        lstrip=_flag(value, "lstrip", False),
        rstrip=_flag(value, "rstrip", False),
        single_word=_flag(value, "single_word", False),
    )


def _flag(config: Mapping[str, Any], key: str, default: Any) -> Any:
    value = config.get(key)
    return default if value is None else check_bool(key, value)
