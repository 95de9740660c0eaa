"""Loads the three tokenizer files that LLaMA checkpoints carry."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..side_file import read_side_file
from ..typed_json import read_json
from .json_format import load_json
from .rank_format import LLAMA3_BOS, LLAMA3_STOPS, load_ranks
from .sentencepiece_format import load_sentencepiece
from .tokenizer import Tokenizer

__all__ = ["load_tokenizer", "special_texts"]

logger = logging.getLogger(__name__)


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
        tokenizer, names = load_json(json_file, texts)
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
    bos += [names[text] for text in (LLAMA3_BOS,) if text in names]
    if texts.get("bos_token", "") is None:  # the files say that there is none
        bos = []
    eos = _ids(generation, "eos_token_id", size) + _ids(config, "eos_token_id", size)
    eos += own_eos or tokenizer.eos_ids
    eos = eos or [names[text] for text in LLAMA3_STOPS if text in names]
    return replace(
        tokenizer,
        bos_id=bos[0] if bos else None,
        eos_ids=tuple(dict.fromkeys(eos)),
        special_ids=special_ids,
        special_names={text: i for text, i in names.items() if i in special_ids},
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


def _load_model(path: Path, texts: dict[str, str | None]) -> tuple[Tokenizer, dict[str, int]]:
    data = read_side_file(path)
    if re.match(rb"[A-Za-z0-9+/=]+ +\d+\s", data):
        return load_ranks(path, data)
    return load_sentencepiece(path, data, texts)
