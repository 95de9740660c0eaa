"""The tokenizer, chat template and end ids of a GGUF file, written as an HF folder has them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...runtime.cache_folder import cache_folder
from ...runtime.sampling import SamplingParams
from ...runtime.text.rank_format import LLAMA3_STOPS
from ...runtime.text.tokenizer_files import load_tokenizer
from ...runtime.typed_json import check_bool, check_int, shown
from .gguf_tokenizer import Vocabulary, sentencepiece_model, tokenizer_json

__all__ = ["end_ids", "token_id", "write_text_files"]

_CACHE_NAME = "gguf"
_VERSION = "1"  # of what is written; another is written anew

# What chat models end their turns with, whether or not the file says that it is an end.
_STOPS = (*LLAMA3_STOPS, "<|im_end|>")
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def write_text_files(path: Path, values: dict[str, Any], digest: str) -> Path:
    """Writes what load_tokenizer, ChatTemplate.load and generation settings are read from.

    Args:
        path: The GGUF file, for messages.
        values: Its metadata.
        digest: Of the metadata: the files' folder is named by it, and reused.

    Returns:
        A folder in the user's cache.

    Raises:
        ValueError: The tokenizer is damaged or of a kind that isn't read, or the cache can't be
            written.
    """
    parent = cache_folder(_CACHE_NAME)
    folder = parent / hashlib.sha256(f"{_VERSION} {digest}".encode()).hexdigest()[:32]
    if folder.is_dir():
        return folder
    files = _text_files(path, values)
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix=".") as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            for name, content in files.items():
                with (new / name).open("wb") as stream:
                    stream.write(content)
                    os.fsync(stream.fileno())
            _check(path, new)
            try:
                new.rename(folder)
            except OSError:
                if not folder.is_dir():  # another process was faster, with the same
                    raise
    except OSError as error:
        raise ValueError(
            f"{parent}: can't be written ({error.strerror}); set XDG_CACHE_HOME to a folder you "
            "may write to"
        ) from None
    return folder


def token_id(path: Path, values: dict[str, Any], name: str) -> int | None:
    """The id of a special token, None where the file names none.

    Args:
        path: The GGUF file, for messages.
        values: Its metadata.
        name: "bos", "eos", "eot", "eom" or "unknown".

    Returns:
        The id; of SentencePiece models a default.

    Raises:
        ValueError: It is no id of the vocabulary.
    """
    key = f"tokenizer.ggml.{name}_token_id"
    defaults = {"unknown": 0, "bos": 1, "eos": 2}
    is_sentencepiece = values.get("tokenizer.ggml.model") == "llama"
    found = values.get(key, defaults.get(name) if is_sentencepiece else None)
    if found is None:
        return None
    tokens = values.get("tokenizer.ggml.tokens")
    most = len(tokens) - 1 if isinstance(tokens, list) else 2**31 - 1
    return check_int(f"{path}: {key}", found, least=0, most=most)


def end_ids(path: Path, values: dict[str, Any]) -> tuple[int, ...]:
    """Every id that ends an answer.

    Args:
        path: The GGUF file, for messages.
        values: Its metadata.

    Returns:
        Those that the file names, then those of well-known names.

    Raises:
        ValueError: The file names an id that is none of the vocabulary.
    """
    found = [token_id(path, values, name) for name in ("eos", "eot", "eom")]
    tokens = values.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        found += [tokens.index(text) for text in _STOPS if text in tokens]
    return tuple(dict.fromkeys(i for i in found if i is not None))


def _text_files(path: Path, values: dict[str, Any]) -> dict[str, bytes]:
    """File name to content; only the end ids where the file has no tokenizer."""
    generation = {"eos_token_id": list(end_ids(path, values)), **_sampling(path, values)}
    files = {"generation_config.json": _json(generation)}
    kind = values.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return files
    writers: dict[str, tuple[str, str, Callable[[Vocabulary], bytes]]] = {
        "llama": ("tokenizer.model", "LlamaTokenizer", sentencepiece_model),
        "gpt2": ("tokenizer.json", "PreTrainedTokenizerFast", tokenizer_json),
    }
    if kind not in writers:
        raise ValueError(
            f"{path}: tokenizer.ggml.model is {shown(kind)}; only {', '.join(writers)} are read"
        )
    file_name, class_name, write = writers[kind]
    vocabulary = Vocabulary.read(path, values)
    files[file_name] = write(vocabulary)
    config: dict[str, Any] = {"tokenizer_class": class_name}
    for name in ("bos", "eos"):
        found = token_id(path, values, name)
        config[f"{name}_token"] = None if found is None else vocabulary.tokens[found]
    adds_bos = values.get("tokenizer.ggml.add_bos_token", vocabulary.adds_bos)
    config["add_bos_token"] = check_bool(f"{path}: tokenizer.ggml.add_bos_token", adds_bos)
    if kind == "llama":
        key = "tokenizer.ggml.add_space_prefix"
        config["add_prefix_space"] = check_bool(f"{path}: {key}", values.get(key, True))
        config["legacy"] = False
        config["unk_token"] = vocabulary.tokens[vocabulary.unknown_id]
        config["added_tokens_decoder"] = vocabulary.added_tokens()
    files["tokenizer_config.json"] = _json(config | _templates(path, values))
    return files


def _check(path: Path, folder: Path) -> None:
    """What is wrong with the tokenizer is said of the file that it came from."""
    with contextlib.suppress(FileNotFoundError):  # there need not be one
        try:
            load_tokenizer(folder)
        except ValueError as error:
            text = str(error).replace(f"{folder}/", "")
            raise ValueError(f"{path}: its tokenizer is damaged ({text})") from None


def _sampling(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The sampling settings that the file recommends, under their names in HF's folders."""
    stated = {name: values.get(f"general.sampling.{key}") for key, name in _SAMPLING.items()}
    found = {name: value for name, value in stated.items() if value is not None}
    try:
        for name, value in found.items():
            if type(value) not in (int, float):
                raise ValueError(f"{name} is {shown(value)}; it must be a number")
        SamplingParams(**found)
    except ValueError as error:
        raise ValueError(f"{path}: general.sampling: {error}") from None
    return found


def _templates(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The template, or the named ones in a list, as tokenizer_config.json has them."""
    key = "tokenizer.chat_template"
    found = {"default": values[key]} if key in values else {}
    found |= {
        name.removeprefix(f"{key}."): text
        for name, text in values.items()
        if name.startswith(f"{key}.")
    }
    for name, text in found.items():
        if not isinstance(text, str):
            raise ValueError(f"{path}: the chat template {shown(name)} is no text")
    if not found:
        return {}
    if found.keys() == {"default"}:
        return {"chat_template": found["default"]}
    return {
        "chat_template": [{"name": name, "template": text} for name, text in found.items()],
    }


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
