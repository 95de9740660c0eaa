"""Who is fed next, and by steps of which lengths."""

from __future__ import annotations

from collections.abc import Sequence

from .backend import StaticShape
from .prefix import Slot
from .request import LiveRequest

__all__ = ["Turns"]

_MAX_STALL_S = 0.1  # that a prompt's step should keep others from their next token


class Turns:
    """Prompts are fed in turn, new ones first; adaptively, by steps that others can wait for.

    Args:
        shape: The backend's.
        adaptive: See Scheduler.
    """

    def __init__(self, shape: StaticShape, *, adaptive: bool) -> None:
        self._shape = shape
        self._adaptive = adaptive
        self._num_fed = 0
        self._shortest_s: dict[tuple[str, int], float] = {}  # by kind of step and length

    def split(self, slots: Sequence[Slot]) -> tuple[list[Slot], list[Slot]]:
        """Tells those that are past their prompt from those whose prompts wait.

        Adaptively a prompt's last id is fed as a token is, which costs nothing beside others.

        Args:
            slots: All of the backend's.

        Returns:
            What a decode feeds, and the others that have a request, the next one first.
        """
        decoding: list[Slot] = []
        waiting: list[tuple[int, int, Slot]] = []
        for slot in slots:
            if (live := slot.live) is None:
                continue
            if live.decoding or live.scored or (self._adaptive and live.ending):
                decoding.append(slot)
            else:
                waiting.append((live.last_fed, live.request_id, slot))
        return decoding, [slot for _, _, slot in sorted(waiting)]

    def lens(self, *, is_waited_for: bool) -> tuple[Sequence[int], Sequence[int]]:
        """The lengths of a prompt's chunks, and the rows of mixed steps, that may be taken now.

        Args:
            is_waited_for: Whether others wait for their next token.
        """
        shape = self._shape
        prefill_lens = shape.prefill_lens
        mixed_lens = tuple(n for n in shape.mixed_lens if n > shape.batch_size)
        if not self._adaptive:
            return prefill_lens, ()
        if not is_waited_for:
            return prefill_lens, mixed_lens
        return self._quick("prefill", prefill_lens), self._quick("mixed", mixed_lens)

    def count(self, kind: str, length: int, elapsed_s: float, fed: Sequence[LiveRequest]) -> None:
        """Notes a step.

        Args:
            kind: "prefill" or "mixed".
            length: Of the step.
            elapsed_s: Its time.
            fed: Whose prompts it fed.
        """
        shortest_s = self._shortest_s.get((kind, length), elapsed_s)
        self._shortest_s[kind, length] = min(elapsed_s, shortest_s)
        for live in fed:
            live.completion.prefill_s += elapsed_s
            self._num_fed += 1
            live.last_fed = self._num_fed

    def _quick(self, kind: str, lens: Sequence[int]) -> Sequence[int]:
        """Those that nobody waits for too long, or else the shortest."""
        short = [n for n in lens if self._shortest_s.get((kind, n), 0.0) <= _MAX_STALL_S]
        return short or lens[:1]
