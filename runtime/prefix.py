"""What the rows of a cache slot hold, so that a prompt that begins the same way starts there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .backend import Backend
from .request import LiveRequest, Request

__all__ = ["Slot", "read_kept", "write_kept"]

_MAX_ERROR = 0.1  # of rows that 16 bits have rounded; other weights make an error of 1


class Slot:
    """One slot of the cache: who uses it, and what its rows hold when nobody does.

    Attributes:
        live: The request that has the slot, or None.
        kept_ids: The ids whose keys and values are in rows 0, 1, ... of a free slot.
        scope: Who may start there.
    """

    def __init__(self) -> None:
        self.live: LiveRequest | None = None
        self.kept_ids: tuple[int, ...] = ()
        self.scope = ""

    def release(self, *, max_seq_len: int, keep: bool) -> None:
        """Takes the slot back from a request that has ended.

        Args:
            max_seq_len: S; past it the window has rolled, and the rows are in another order.
            keep: Whether the rows are remembered for a prompt that begins like them.
        """
        live, self.live = self.live, None
        self.kept_ids = ()
        if live is None or not keep:
            return
        # The newest token was sampled and not fed, unless the token that ended it came after.
        fed = (*live.request.prompt_ids, *live.completion.ids)[: live.next_position]
        if len(fed) < max_seq_len:  # one row is left for what an idle slot is fed
            self.kept_ids, self.scope = fed, live.request.prefix_scope

    def common_len(self, request: Request) -> int:
        """How many ids at the beginning of a prompt the rows hold already.

        Args:
            request: The prompt's; its last id is fed in any case, because it gives the logits.

        Returns:
            The number of ids, less than the prompt's.
        """
        if request.prefix_scope != self.scope or request.prompt_logprobs is not None:
            return 0
        prompt_ids = request.prompt_ids
        return min(_shared_len(self.kept_ids, prompt_ids), len(prompt_ids) - 1)

    @property
    def next_position(self) -> int:
        """Where the slot's next id goes: an idle slot's row there is replaced by it."""
        return len(self.kept_ids) if self.live is None else self.live.next_position


def read_kept(
    slots: Sequence[Slot], backend: Backend, ids: Sequence[int]
) -> tuple[tuple[int, ...], NDArray[np.float32]]:
    """Copies what a free slot keeps of a conversation.

    Args:
        slots: All of the backend's.
        backend: Has the rows.
        ids: The conversation.

    Returns:
        As many of the ids as a slot has rows of, perhaps none, and their rows: see
        Backend.read_rows.
    """
    free = [slot for slot in slots if slot.live is None]
    if not free:
        return (), backend.read_rows(0, 0)
    slot = max(free, key=lambda one: _shared_len(one.kept_ids, ids))
    num_rows = _shared_len(slot.kept_ids, ids)
    return tuple(ids[:num_rows]), backend.read_rows(slots.index(slot), num_rows)


def write_kept(
    slots: Sequence[Slot], backend: Backend, ids: Sequence[int], rows: NDArray[np.float32]
) -> None:
    """Gives a free slot what `read_kept` took, here or on another backend.

    The first rows are computed as well, and compared: other weights make others.

    Args:
        slots: All of the backend's.
        backend: Gets the rows.
        ids: What they are of.
        rows: See Backend.write_rows.

    Raises:
        ValueError: The rows are another model's or don't fit, or no slot is free.
    """
    max_seq_len = backend.shape.max_seq_len
    free = [slot for slot in slots if slot.live is None]
    if not free or not 0 < len(ids) == rows.shape[2] < max_seq_len:
        raise ValueError(
            f"{len(ids)} ids and {rows.shape[2]} rows don't fit in {len(free)} free slots of "
            f"{max_seq_len} rows"
        )
    slot = min(free, key=lambda one: len(one.kept_ids))
    index, checked_ids = slots.index(slot), ids[: backend.shape.prefill_lens[0]]
    slot.kept_ids = ()
    backend.prefill(index, checked_ids, 0)
    computed = backend.read_rows(index, len(checked_ids))
    backend.write_rows(index, rows)
    difference = np.linalg.norm(computed - rows[:, :, : len(checked_ids)])
    if not difference <= _MAX_ERROR * np.linalg.norm(computed):
        raise ValueError("the cache rows are another model's")
    slot.kept_ids, slot.scope = tuple(ids), ""


def _shared_len(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two sequences begin with alike."""
    limit = min(len(first), len(second))
    return next((i for i in range(limit) if first[i] != second[i]), limit)
