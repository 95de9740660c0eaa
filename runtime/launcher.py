"""What torchrun tells the processes that it starts."""

from __future__ import annotations

import os

__all__ = ["launched_rank", "num_local_ranks"]


def launched_rank() -> tuple[int, int] | None:
    """This process's number among those that were started together, and how many they are.

    Returns:
        RANK and WORLD_SIZE of the environment; None where nothing started several.

    Raises:
        ValueError: They are not two numbers.
    """
    words = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if None in words:
        return None
    try:
        rank, world_size = (int(word or "") for word in words)
    except ValueError:
        raise ValueError(
            f"RANK is {words[0]!r} and WORLD_SIZE {words[1]!r}; they must be numbers, as torchrun "
            "sets them"
        ) from None
    return (rank, world_size) if world_size > 1 else None


def num_local_ranks(world_size: int) -> int:
    """How many of the ranks run on this machine: all, if this process starts them."""
    return world_size if launched_rank() is None else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
