"""A conversation on disk: messages, seed, and the cache rows that its next turn begins with.

The file is a safetensors file; reading it runs nothing.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .atomic_write import write_file
from .side_file import named_errors

__all__ = ["Session", "read_session", "write_session"]

_FORMAT = "llamac session 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What a conversation needs to go on as if it had never been left.

    Attributes:
        messages: All turns so far.
        seed: Of the sampler, which has no other state: it is keyed by seed and position.
        ids: [n] int64, the ids whose rows are kept.
        rows: [buffers, K, n, D] float32, as Backend.read_rows gives them.
    """

    messages: list[dict[str, Any]]
    seed: int
    ids: NDArray[np.int64]
    rows: NDArray[np.float32]


def write_session(path: Path, session: Session) -> None:
    """Writes a session; one that is there is replaced.

    Args:
        path: The file.
        session: What is written.

    Raises:
        ValueError: It can't be written there.
    """
    state = json.dumps({"messages": session.messages, "seed": session.seed})
    metadata = {
        "format": _FORMAT,
        "state": state,
        "sha256": _digest(state, session.ids, session.rows),
    }
    arrays = {"ids": session.ids, "rows": np.ascontiguousarray(session.rows)}
    with named_errors(path):
        write_file(path, save(arrays, metadata))


def read_session(path: Path) -> Session:
    """Reads a session that `write_session` wrote.

    Args:
        path: The file.

    Returns:
        The session.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or no session.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such session")
    try:
        with safe_open(path, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"{path} is no session of this llamac; name another file")
            ids, rows = opened.get_tensor("ids"), opened.get_tensor("rows")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no session: {str(error):.200}") from None
    state = metadata.get("state", "")
    if metadata.get("sha256") != _digest(state, ids, rows):
        raise ValueError(f"{path} is damaged; delete it, and the conversation begins anew")
    told = json.loads(state)
    return Session(messages=told["messages"], seed=told["seed"], ids=ids, rows=rows)


def _digest(state: str, *arrays: NDArray[Any]) -> str:
    digest = hashlib.sha256(state.encode())
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
