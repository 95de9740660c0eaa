"""Loads the three tokenizer files that LLaMA checkpoints carry."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..side_file import read_side_file
from ..typed_json import read_json, shown
from .json_format import load_json
from .rank_format import LLAMA3_BOS, LLAMA3_STOPS, NUM_LLAMA3_SPECIALS, load_ranks
from .sentencepiece_format import count_pieces, load_sentencepiece
from .tokenizer import Tokenizer
from .tokenizer_config import TokenizerConfig, read_tokenizer_config

__all__ = ["load_tokenizer"]

logger = logging.getLogger(__name__)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Loads a checkpoint's tokenizer: `tokenizer.json`, else `tokenizer.model` of either format.

    EOS ids are the union of generation_config.json, config.json and the tokenizer's own; where
    none is named, Llama 3's end_of_text, eom_id and eot_id count if the vocabulary has them.

    A BOS is what tokenizer.json's post-processor begins texts with, else the token that the files
    name, else the SentencePiece model's own, else the id in config.json.

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
    config = read_tokenizer_config(folder)
    num_rows = _num_rows(folder / "config.json") or _num_rows(folder / "params.json")
    json_file, model_file = folder / "tokenizer.json", folder / "tokenizer.model"
    if _is_there(json_file):
        data = read_side_file(json_file).removeprefix(b"\xef\xbb\xbf")
        tokenizer, token_id = load_json(json_file, data, config, num_rows)
        if _is_there(model_file):
            _compare_sizes(tokenizer, model_file)
    elif _is_there(model_file):
        data = read_side_file(model_file)
        load = load_ranks if _is_rank_file(data) else load_sentencepiece
        tokenizer, token_id = load(model_file, data, config, num_rows)
    else:
        raise FileNotFoundError(
            f"no tokenizer in {folder}; copy the checkpoint's tokenizer.json or tokenizer.model in"
        )
    return _with_ends(tokenizer, token_id, config, folder)


def _with_ends(
    tokenizer: Tokenizer,
    token_id: Callable[[str], int | None],
    config: TokenizerConfig,
    folder: Path,
) -> Tokenizer:
    """Adds the ids that begin and end a sequence."""
    size = tokenizer.vocab_size
    model, generation = folder / "config.json", folder / "generation_config.json"
    own_bos = _own("bos_token", "<s>", token_id, config)
    own_eos = _own("eos_token", "</s>", token_id, config)
    bos = [tokenizer.bos_id]
    if config.texts.get("bos_token", "") is not None:  # null says that there is none
        bos += own_bos.values()
        bos += _ids(model, "bos_token_id", size) + _ids(generation, "bos_token_id", size)
        bos.append(token_id(LLAMA3_BOS))
    eos = _ids(generation, "eos_token_id", size) + _ids(model, "eos_token_id", size)
    eos += [*own_eos.values()] or tokenizer.eos_ids
    eos = eos or [i for i in map(token_id, LLAMA3_STOPS) if i is not None]
    names = own_bos | own_eos
    return replace(
        tokenizer,
        bos_id=next((i for i in bos if i is not None), None),
        eos_ids=tuple(dict.fromkeys(eos)),
        special_ids=tokenizer.special_ids.union(names.values()),
        special_names={**tokenizer.special_names, **names},
    )


def _own(
    key: str, default: str, token_id: Callable[[str], int | None], config: TokenizerConfig
) -> dict[str, int]:
    """The token that the folder's files name, with its id; an empty text is no name."""
    text = config.texts.get(key, "")
    if text == "" and config.llama:
        text = default
    found = token_id(text) if text else None
    return {} if text is None or found is None else {text: found}


def _is_there(path: Path) -> bool:
    """A link to nowhere, as half a download leaves it, is not the same as no file."""
    if os.path.lexists(path) and not path.is_file():
        raise ValueError(f"{path}: not a file, or a link to nowhere; copy it again")
    return path.is_file()


def _num_rows(path: Path) -> int | None:
    size = read_json(path, optional=True).get("vocab_size")
    # Meta's params.json says -1 for "see the tokenizer"
    return size if type(size) is int and 0 < size < 2**31 else None


def _ids(path: Path, key: str, size: int) -> list[int]:
    value = read_json(path, optional=True).get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):
        raise ValueError(
            f"{path}: {key} is {shown(value)}; it must be a token id or a list of them"
        )
    if unknown := [i for i in ids if not 0 <= i < size]:
        logger.warning("%s names %s, but the tokenizer has only %d ids", key, shown(unknown), size)
    return [i for i in ids if 0 <= i < size]


def _compare_sizes(tokenizer: Tokenizer, path: Path) -> None:
    try:
        data = read_side_file(path)
        if _is_rank_file(data):
            size = len(data.splitlines()) + NUM_LLAMA3_SPECIALS
        else:
            size = count_pieces(path, data)
    except ValueError as error:
        logger.warning("using tokenizer.json; %s", error)
        return
    if size != tokenizer.vocab_size:
        logger.warning(
            "using tokenizer.json with %d ids; tokenizer.model beside it has %d",
            tokenizer.vocab_size,
            size,
        )


def _is_rank_file(data: bytes) -> bool:
    return re.match(rb"[A-Za-z0-9+/=]+ +\d+\s", data) is not None
