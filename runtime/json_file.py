"""Reads JSON files, naming the file in what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["read_json"]


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: The file.
        optional: Whether a missing file is an empty object.

    Returns:
        The object.

    Raises:
        FileNotFoundError: There is no such file, and it is not optional.
        ValueError: The file does not hold one JSON object.
    """
    if not path.is_file():
        if optional:
            return {}
        raise FileNotFoundError(f"{path}: no such file")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}; it must be a JSON object")
    return value
