"""What every backend promises the generation loop: fixed sizes, a prefill chunk, a decode step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_THREADS", "Backend", "BackendUnavailableError", "StaticShape"]

MAX_THREADS = 1024  # more is a slip; libraries take some numbers and crash on others


class BackendUnavailableError(RuntimeError):
    """This machine lacks what the backend that was asked for needs; the message says what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticShape:
    """The sizes that are constant in every compiled or exported graph.

    Attributes:
        batch_size: B, number of cache slots and rows of a decode step.
        max_seq_len: S, cache rows of a slot.
        prefill_lens: P, tokens of a prefill chunk, ascending; the smallest that fits is used.
        num_positions: Rows of the RoPE tables; no token can have this position or a later one.
        vocab_size: V, width of the logits.

    Raises:
        ValueError: A size is not positive, a chunk is longer than the cache, or the RoPE tables
            have fewer rows than the cache.
    """

    batch_size: int
    max_seq_len: int
    prefill_lens: tuple[int, ...]
    num_positions: int
    vocab_size: int

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_seq_len", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.prefill_lens or list(self.prefill_lens) != sorted(set(self.prefill_lens)):
            raise ValueError(f"prefill_lens is {self.prefill_lens}; give ascending lengths")
        if not 1 <= self.prefill_lens[0] <= self.prefill_lens[-1] <= self.max_seq_len:
            raise ValueError(
                f"prefill_len is {self.prefill_lens[-1]}; "
                f"it must be between 1 and max_seq_len, {self.max_seq_len}"
            )
        if self.num_positions < self.max_seq_len:
            raise ValueError(
                f"num_positions is {self.num_positions}; "
                f"it must be at least max_seq_len, {self.max_seq_len}"
            )

    @property
    def prefill_len(self) -> int:
        """The longest prefill chunk, in tokens."""
        return self.prefill_lens[-1]

    def chunk_len(self, slot: int, num_ids: int, start: int) -> int:
        """Chooses the length a prefill chunk is padded to, once the chunk is known to fit.

        Args:
            slot: Which slot it fills.
            num_ids: Token ids in it.
            start: Position of the first.

        Returns:
            P, the smallest chunk that holds the ids.

        Raises:
            ValueError: There is no such slot, or the chunk does not fit; the message says what is
                allowed.
        """
        length = next((p for p in self.prefill_lens if p >= num_ids), None)
        if num_ids < 1 or length is None:
            raise ValueError(f"chunk has {num_ids} ids; allowed are 1 to {self.prefill_len}")
        if not 0 <= slot < self.batch_size:
            raise ValueError(f"slot is {slot}; allowed are 0 to {self.batch_size - 1}")
        if not 0 <= start <= self.max_seq_len - length:
            raise ValueError(
                f"chunk starts at {start}; with prefill_len {length} and max_seq_len "
                f"{self.max_seq_len} it may start at 0 to {self.max_seq_len - length}"
            )
        return length


class Backend(Protocol):
    """A model with its cache: torch (eager or compiled) or an ONNX Runtime session.

    A backend owns a zero-filled cache of `batch_size` slots. Rows past a slot's live length hold
    garbage that no result depends on.
    """

    @property
    def shape(self) -> StaticShape:
        """The static sizes; constant for the backend's life."""
        ...

    def prefill(self, slot: int, ids: Sequence[int], start: int) -> NDArray[np.float32]:
        """Runs one chunk of a prompt through one slot.

        Args:
            slot: Which slot's cache to fill, below batch_size.
            ids: 1 to prefill_len token ids.
            start: Position of the first id; start + prefill_len must not pass max_seq_len.

        Returns:
            [V] float32 logits of the last id.
        """
        ...

    def decode(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Runs one token of every slot, each at its own position.

        Past the cache (position >= max_seq_len) the window rolls: the token's row is
        position % max_seq_len, its RoPE angle is that of the absolute position.

        Args:
            ids: [B] int64 token ids, valid in idle rows too.
            positions: [B] int64 absolute positions; an idle row's is where its next token will go.

        Returns:
            [B, V] float32 logits, valid until the next call.
        """
        ...
