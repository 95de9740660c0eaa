"""What the rows of a cache slot hold, so that a prompt that begins the same way starts there."""

from __future__ import annotations

from .request import LiveRequest, Request

__all__ = ["Slot"]


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
        limit = min(len(self.kept_ids), len(prompt_ids) - 1)
        same = (i for i in range(limit) if self.kept_ids[i] != prompt_ids[i])
        return next(same, limit)

    @property
    def next_position(self) -> int:
        """Where the slot's next id goes: an idle slot's row there is replaced by it."""
        return len(self.kept_ids) if self.live is None else self.live.next_position
