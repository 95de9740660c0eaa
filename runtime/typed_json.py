"""JSON files, named in what goes wrong, and their values as frozen dataclasses."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from .side_file import read_side_file

__all__ = ["check_bool", "check_int", "check_number", "named", "read_json", "shown", "to_dataclass"]

_T = TypeVar("_T")

_SHOWN_LENGTH = 60
_NUM_NAMED = 8


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: The file.
        optional: Whether a missing file is an empty object.

    Returns:
        The object.

    Raises:
        FileNotFoundError: There is no such file, and it is not optional.
        ValueError: The file can't be read, is too large, or does not hold one JSON object.
    """
    try:
        raw = read_side_file(path)
    except FileNotFoundError:
        if optional:
            return {}
        raise
    try:
        value = json.loads(raw)  # a byte order mark is skipped
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again") from None
    except ValueError:  # the only other one: an integer past Python's limit
        raise ValueError(f"{path}: holds a number of thousands of digits") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}; it must be a JSON object")
    return value


def shown(value: object) -> str:
    """Writes a value that a message echoes: short, and nothing that a terminal obeys.

    Args:
        value: From a file or an option.

    Returns:
        Its repr, escaped, at most 60 characters; of lists and objects the first items.
    """
    if isinstance(value, int) and abs(value) >= 10**_SHOWN_LENGTH:
        return f"an integer of more than {_SHOWN_LENGTH} digits"  # repr refuses thousands
    short = reprlib.Repr()
    short.maxstring = short.maxother = _SHOWN_LENGTH
    text = short.repr(value)
    return text if len(text) <= _SHOWN_LENGTH else f"{text[: _SHOWN_LENGTH - 3]}..."


def named(keys: Iterable[str]) -> str:
    """Lists names out of a file for a message: the first few, each short and plain."""
    keys = list(keys)
    texts = [
        key if len(key) <= _SHOWN_LENGTH and key.replace(".", "_").isidentifier() else shown(key)
        for key in keys[:_NUM_NAMED]
    ]
    more = len(keys) - len(texts)
    return ", ".join(texts) + (f" and {more} more" if more else "")


def check_int(name: str, value: object, *, most: int, least: int = 1) -> int:
    """Returns the value if it is an integer (true and 2.0 are not) within the bounds.

    Args:
        name: Begins the message.
        value: From a file.
        most: Largest allowed.
        least: Smallest allowed.

    Returns:
        The value.

    Raises:
        ValueError: It isn't.
    """
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {shown(value)}; it must be an integer from {least} to {most}")
    return value


def check_number(name: str, value: object, *, most: float, above: float = 0.0) -> float:
    """Returns the value if it is a number (true and NaN are not) within the bounds.

    Args:
        name: Begins the message.
        value: From a file.
        most: Largest allowed.
        above: What it must exceed.

    Returns:
        The value.

    Raises:
        ValueError: It isn't.
    """
    if type(value) not in (int, float) or not above < value <= most:  # type: ignore[operator]
        raise ValueError(
            f"{name} is {shown(value)}; it must be a number above {above:g}, at most {most:g}"
        )
    return float(value)  # type: ignore[arg-type]


def check_bool(name: str, value: object) -> bool:
    """Returns the value if it is true or false, which "false", 0 and {} are not.

    Args:
        name: Begins the message.
        value: From a file.

    Returns:
        The value.

    Raises:
        ValueError: It isn't.
    """
    if type(value) is not bool:
        raise ValueError(f"{name} is {shown(value)}; it must be true or false")
    return value


def to_dataclass(kind: type[_T], value: Any, where: str) -> _T:
    """Builds a dataclass from what json.loads returned.

    Fields may be str, int (not negative), Path, another dataclass, tuple[X, ...], dict[str, X], or
    X | None. A Path field takes a Path, which JSON never holds.

    Args:
        kind: The dataclass.
        value: An object with exactly the fields' names.
        where: Begins the message of an error.

    Returns:
        The dataclass.

    Raises:
        ValueError: A name is missing or unknown, a type is another, or the dataclass refuses.
    """
    return _convert(kind, value, where)


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        names = {field.name for field in fields(kind)}
        if isinstance(value, dict) and value.keys() == names:
            items = {n: _convert(hints[n], v, f"{where}, {n}") for n, v in value.items()}
            try:
                return kind(**items)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(_convert(args[0], item, where) for item in value)
    elif origin is dict:
        if isinstance(value, dict):
            return {name: _convert(args[1], v, f"{where}, {name}") for name, v in value.items()}
    elif origin is UnionType:
        if value is None and NoneType in args:
            return None
        return _convert(next(arg for arg in args if arg is not NoneType), value, where)
    elif (kind is Path and isinstance(value, Path)) or (
        type(value) is kind and not (kind is int and value < 0)
    ):
        return value
    raise ValueError(f"{where}: damaged, holds {shown(value)}")
