"""What every backend promises the generation loop: fixed sizes, a prefill chunk, a decode step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_THREADS", "Backend", "BackendUnavailableError", "StaticShape", "StepInputs"]

MAX_THREADS = 1024  # more is a slip; libraries take some numbers and crash on others


class BackendUnavailableError(RuntimeError):
    """This machine lacks what the backend that was asked for needs; the message says what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """What a step is fed, T tokens of each of B rows; int64 arrays.

    The fields' names are those of the parameters of compiled steps and, but for `slots`, of the
    inputs of exported graphs.

    Attributes:
        input_ids: [B, T] token ids; padding ids must be valid too.
        positions: [B] absolute position of each row's first token (RoPE, mask).
        write_indices: [B] cache row that token is written to.
        logit_indices: [B, N] which of the T tokens get logits; of a mixed step [1, N], which rows.
        slots: [B] cache slot of each row; a graph is bound to its slots' memory instead.
    """

    input_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    write_indices: NDArray[np.int64]
    logit_indices: NDArray[np.int64]
    slots: NDArray[np.int64]

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The fields' names, in their order."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def graph_sizes(cls, batch: int, tokens: int, logits: int) -> dict[str, tuple[int, ...]]:
        """The sizes of an exported graph's inputs by name, for B, T and N."""
        sizes = cls.sizes(batch, tokens, logits)
        del sizes["slots"]
        return sizes

    @classmethod
    def sizes(cls, batch: int, tokens: int, logits: int) -> dict[str, tuple[int, ...]]:
        """The fields' sizes by name, for B, T and N."""
        sizes = ((batch, tokens), (batch,), (batch,), (batch, logits), (batch,))
        return dict(zip(cls.names(), sizes, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticShape:
    """The sizes that are constant in every compiled or exported graph.

    Attributes:
        batch_size: B, number of cache slots and rows of a decode step.
        max_seq_len: S, cache rows of a slot.
        prefill_lens: P, tokens of a prefill chunk, ascending; the smallest that holds it is used.
        num_positions: Rows of the RoPE tables; no token can have this position or a later one.
        vocab_size: V, width of the logits.
        num_guesses: Ids behind the newest that `extend` takes; 0 where there is no such step.
        mixed_lens: Rows of a step that `mix` runs, ascending; the fewest that hold the tokens are
            used. () where there is no such step.

    Raises:
        ValueError: A size is not positive, a chunk is longer than the cache, the RoPE tables have
            fewer rows than the cache, or mixed_lens is not ascending.
    """

    batch_size: int
    max_seq_len: int
    prefill_lens: tuple[int, ...]
    num_positions: int
    vocab_size: int
    num_guesses: int = 0
    mixed_lens: tuple[int, ...] = ()

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
        if list(self.mixed_lens) != sorted({n for n in self.mixed_lens if n > 0}):
            raise ValueError(f"mixed_lens is {self.mixed_lens}; give ascending numbers")

    @property
    def prefill_len(self) -> int:
        """The longest prefill chunk, in tokens."""
        return self.prefill_lens[-1]

    def chunk_inputs(
        self, slot: int, ids: Sequence[int], start: int, *, all_logits: bool = False
    ) -> StepInputs:
        """Pads a chunk of a prompt to the smallest P that holds it, once it is known to be valid.

        Args:
            slot: Which slot it fills.
            ids: 1 to prefill_len token ids.
            start: Position of the first.
            all_logits: Whether each of the P tokens gets logits; else the last id alone.

        Returns:
            The inputs of a step with B = 1 and T = P.

        Raises:
            ValueError: There is no such slot or id, or the chunk does not fit; the message says
                what is allowed.
        """
        length = next((p for p in self.prefill_lens if p >= len(ids)), None)
        if len(ids) < 1 or length is None:
            raise ValueError(f"chunk has {len(ids)} ids; allowed are 1 to {self.prefill_len}")
        if not 0 <= slot < self.batch_size:
            raise ValueError(f"slot is {slot}; allowed are 0 to {self.batch_size - 1}")
        if not 0 <= start <= self.max_seq_len - length:
            raise ValueError(
                f"chunk starts at {start}; with prefill_len {length} and max_seq_len "
                f"{self.max_seq_len} it may start at 0 to {self.max_seq_len - length}"
            )
        padded = np.zeros((1, length), np.int64)
        padded[0, : len(ids)] = self.check_ids(ids)
        position = np.array([start])
        return StepInputs(
            input_ids=padded,
            positions=position,
            write_indices=position,
            logit_indices=np.arange(length)[None] if all_logits else np.array([[len(ids) - 1]]),
            slots=np.array([slot]),
        )

    def step_inputs(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> StepInputs:
        """Lays out one token of every slot, once ids and positions are known to be valid.

        Args:
            ids: [B] int64 token ids.
            positions: [B] int64 absolute positions; past the cache the window rolls.

        Returns:
            The inputs of a step with T = 1; positions are written to rows position % S.

        Raises:
            ValueError: Shapes, ids or positions are not those of a step; the message says what is
                allowed.
        """
        if not np.shape(ids) == np.shape(positions) == (self.batch_size,):
            raise ValueError(
                f"ids have shape {np.shape(ids)} and positions {np.shape(positions)}; both must be "
                f"({self.batch_size},), one for every slot"
            )
        tokens, places, last = self.check_ids(ids), np.asarray(positions), self.num_positions - 1
        if places.dtype.kind not in "iu" or places.min() < 0 or places.max() > last:
            raise ValueError(f"positions are {places.tolist()}; allowed are 0 to {last}")
        return StepInputs(
            input_ids=tokens[:, None],
            positions=places.astype(np.int64, copy=False),
            write_indices=places % self.max_seq_len,
            logit_indices=np.zeros((self.batch_size, 1), np.int64),
            slots=np.arange(self.batch_size),
        )

    def extend_inputs(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> StepInputs:
        """Lays out a few tokens of every slot, once ids and positions are known to be valid.

        Args:
            ids: [B, 1 + num_guesses] int64 token ids.
            positions: [B] int64 absolute position of each row's first; none may pass the cache.

        Returns:
            The inputs of a step that gives logits for all its tokens.

        Raises:
            ValueError: Shapes, ids or positions are not those of a step; the message says what is
                allowed.
        """
        tokens = 1 + self.num_guesses
        if self.num_guesses == 0:
            raise ValueError("num_guesses is 0: there is no step of several tokens")
        if np.shape(ids) != (self.batch_size, tokens):
            raise ValueError(
                f"ids have shape {np.shape(ids)}; it must be {(self.batch_size, tokens)}"
            )
        first = self.step_inputs(ids[:, 0], positions)
        if (last := self.max_seq_len - tokens) < first.positions.max():
            raise ValueError(
                f"positions are {first.positions.tolist()}; allowed are 0 to {last}, as "
                f"{tokens} tokens follow"
            )
        return replace(
            first,
            input_ids=self.check_ids(ids),
            logit_indices=np.tile(np.arange(tokens), (self.batch_size, 1)),
        )

    def check_ids(self, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Refuses ids that the model doesn't have; returns them as int64."""
        given = np.asarray(ids)
        if given.dtype.kind not in "iu":
            raise ValueError(f"ids are {given.dtype}; they must be int64")
        if given.min() < 0 or given.max() >= self.vocab_size:
            raise ValueError(
                f"ids are from {given.min()} to {given.max()}; "
                f"allowed are 0 to {self.vocab_size - 1}"
            )
        return given.astype(np.int64, copy=False)


def check_rows(rows: NDArray[np.float32], expected: tuple[int, int, int], max_seq_len: int) -> None:
    """Refuses cache rows of another model.

    Args:
        rows: [buffers, K, n, D] float32.
        expected: How many buffers, K and D this cache has.
        max_seq_len: S; n is at most that.

    Raises:
        ValueError: The sizes differ.
    """
    if rows.ndim != 4 or (rows.shape[0], rows.shape[1], rows.shape[3]) != expected:
        raise ValueError(
            f"cache rows are {rows.shape}; this model's are [buffers, K, n, D] with buffers, K "
            f"and D {expected}"
        )
    if rows.shape[2] > max_seq_len:
        raise ValueError(f"{rows.shape[2]} cache rows are given, max_seq_len is {max_seq_len}")


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

    def extend(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Runs a few tokens of every slot, where shape.num_guesses isn't 0.

        Args:
            ids: [B, 1 + num_guesses] int64 token ids, valid in idle rows too.
            positions: [B] int64 absolute positions of the first ones; the window may not roll.

        Returns:
            [B, 1 + num_guesses, V] float32 logits, valid until the next call.
        """
        ...

    def mix(
        self,
        slots: NDArray[np.int64],
        ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        logit_rows: Sequence[int],
    ) -> NDArray[np.float32]:
        """Runs tokens of any slots in one step, where shape.mixed_lens isn't empty.

        Each sees what its slot holds up to its own position, the step's other tokens included. Past
        the cache the window rolls, as in a decode; a slot may then have one token.

        Args:
            slots: [n] int64 slot of each token, n at most mixed_lens[-1].
            ids: [n] int64 token ids.
            positions: [n] int64 absolute positions.
            logit_rows: Which of the n get logits: 1 to batch_size of them.

        Returns:
            [len(logit_rows), V] float32 logits, valid until the next call.
        """
        ...

    def read_rows(self, slot: int, num_rows: int) -> NDArray[np.float32]:
        """Copies the first rows of a slot's cache, whose window has not rolled.

        Args:
            slot: Which slot.
            num_rows: How many rows, at most S.

        Returns:
            [buffers, K, num_rows, D] float32: keys and values of the first layer, of the second...
        """
        ...

    def write_rows(self, slot: int, rows: NDArray[np.float32]) -> None:
        """Puts rows into a slot's cache that `read_rows` took, here or on another backend.

        Args:
            slot: Which slot.
            rows: [buffers, K, n, D] float32.

        Raises:
            ValueError: They are those of another model, or too many.
        """
        ...
