"""The calls that a bundle is verified with: made once on the reference, then repeated on others.

Prompts are drawn ids; what is decoded after them are the reference's own greedy choices, so where
another backend first prefers another id, its greedy generation would part from the reference's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..runtime.backend import Backend
from ..runtime.chunks import next_chunk

__all__ = ["Group", "Step", "record_groups", "replay"]

_SEED = 0
_NUM_STEPS = 8  # decoded ragged, and past the last row
_NUM_LAST = 3  # decoded, to the last row
_MAX_FILLED = 2048  # rows filled before the last one


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One call of a backend.

    Attributes:
        slot: Of a prefill chunk; None is a step of all slots.
        ids: [n] int64 of a chunk, [B] of a decode, [B, T] of an extend.
        positions: [1] int64, of a chunk's first id, or [B], of each row's first.
        rows: Rows of the logits that are compared; the others are idle.
    """

    slot: int | None
    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    rows: tuple[int, ...]


@dataclass(slots=True, kw_only=True)
class Group:
    """Steps that show one thing, and the reference's logits.

    Attributes:
        name: What is shown.
        steps: The calls; those of all groups run in their order.
        logits: [V] float32 of each prediction.
        places: Slot and position of the id that each prediction is of.
        skipped: Why there is no such step, or None.
    """

    name: str
    steps: list[Step] = field(default_factory=list)
    logits: list[NDArray[np.float32]] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    skipped: str | None = None


def record_groups(
    backend: Backend,
    text_ids: Sequence[int],
    *,
    bos_token_id: int | None,
    row_buckets: Sequence[int] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> list[Group]:
    """Runs all groups on the reference.

    Args:
        backend: The reference, its cache untouched.
        text_ids: Fed token by token, at most max_seq_len.
        bos_token_id: Begins every prompt.
        row_buckets: Numbers of rows, below max_seq_len, that decode graphs attend to.
        progress: Told what is being run.

    Returns:
        The groups: `text`, `prefill`, `chunk edges`, `ragged rows`, `row buckets` if there are any,
        `several tokens` if there is such a step, `last row`, `roll`.
    """
    recorder = _Recorder(backend, bos_token_id)
    groups = []
    for name, run in (
        ("text", lambda: recorder.feed(text_ids)),
        ("prefill", recorder.run_chunks),
        ("chunk edges", recorder.run_edges),
        ("ragged rows", recorder.run_ragged),
        *([("row buckets", lambda: recorder.run_buckets(row_buckets))] if row_buckets else []),
        *(
            [("several tokens", lambda: recorder.run_extend(row_buckets))]
            if backend.shape.num_guesses
            else []
        ),
        ("last row", recorder.run_last),
        ("roll", recorder.run_roll),
    ):
        progress(f"reference: {name}")
        recorder.group = Group(name=name)
        run()
        groups.append(recorder.group)
    return groups


def replay(backend: Backend, group: Group) -> NDArray[np.float32]:
    """Repeats a group on another backend.

    Args:
        backend: Of the reference's shape, all groups before this one repeated on it.
        group: What is repeated.

    Returns:
        [N, V] float32 logits, in the order of the reference's.
    """
    return np.stack([row for step in group.steps for row in _run(backend, step)])


def _run(backend: Backend, step: Step) -> Iterator[NDArray[np.float32]]:
    if step.slot is not None:
        yield backend.prefill(step.slot, step.ids.tolist(), int(step.positions[0]))
        return
    if step.ids.ndim == 2:
        logits = backend.extend(step.ids, step.positions)
        yield from logits[list(step.rows)].reshape(-1, logits.shape[-1]).copy()
        return
    logits = backend.decode(step.ids, step.positions)
    for row in step.rows:
        yield logits[row].copy()


class _Recorder:
    """Makes steps and keeps what the reference answers.

    Attributes:
        group: Takes the steps.
    """

    def __init__(self, backend: Backend, bos_token_id: int | None) -> None:
        self.group = Group(name="")
        self._backend = backend
        self._shape = backend.shape
        self._bos = [] if bos_token_id is None else [bos_token_id]
        self._random = np.random.default_rng(_SEED)
        # The next id and its position; an idle slot is fed id 0 where its next prompt begins.
        self._ids = np.zeros(self._shape.batch_size, np.int64)
        self._positions = np.zeros(self._shape.batch_size, np.int64)

    def feed(self, ids: Sequence[int]) -> None:
        """Given ids through the first slot, one by one, while the others are idle."""
        for position, token_id in enumerate(ids):
            self._ids[0], self._positions[0] = token_id, position
            self._decode((0,))
        self._ids[0] = self._positions[0] = 0

    def run_chunks(self) -> None:
        """Prompts of one chunk."""
        self._prompts({n for p in self._shape.prefill_lens for n in (1, p - 1, p)})

    def run_edges(self) -> None:
        """Prompts that end just before, at and after the edge of a later chunk."""
        p = self._shape.prefill_len
        if p == self._shape.max_seq_len:
            self.group.skipped = f"one chunk of {p} tokens fills the cache"
            return
        self._prompts({p + 1, 2 * p - 1, 2 * p, 2 * p + 1})

    def run_ragged(self) -> None:
        """Every slot decodes at its own position."""
        num_slots, num_rows = self._shape.batch_size, self._shape.max_seq_len
        num_steps = min(_NUM_STEPS, num_rows // 2)
        if not num_steps:
            self.group.skipped = f"max_seq_len is {num_rows}"
            return
        longest = min(num_rows - num_steps, 2 * self._shape.prefill_len + 3)
        for slot in range(num_slots):
            self._prompt(slot, 1 + slot * (longest - 1) // max(1, num_slots - 1))
        self._decode_live(num_steps)

    def run_buckets(self, row_buckets: Sequence[int]) -> None:
        """The last slot decodes over the edge of what each graph attends to; the others follow."""
        num_rows, last_slot = self._shape.max_seq_len, self._shape.batch_size - 1
        for slot in range(last_slot):
            self._prompt(slot, 1)
        for rows in row_buckets:
            begin = max(1, rows - 1)
            self._prompt(last_slot, begin, begin=max(0, begin - _MAX_FILLED))
            self._decode_live(min(_NUM_LAST, num_rows - begin))

    def run_extend(self, row_buckets: Sequence[int]) -> None:
        """Drawn ids in steps of several tokens, the last of them over the edge of each graph."""
        num_slots, num_rows = self._shape.batch_size, self._shape.max_seq_len
        tokens = 1 + self._shape.num_guesses
        if tokens == num_rows:
            self.group.skipped = f"one step of {tokens} tokens fills the cache"
            return
        for slot in range(num_slots - 1):
            self._prompt(slot, 1)
        edges = [begin for rows in row_buckets for begin in (rows - tokens, rows - tokens + 1)]
        for begin in (*edges, num_rows - tokens):
            length = max(1, min(begin, num_rows - tokens))
            self._prompt(num_slots - 1, length, begin=max(0, length - _MAX_FILLED))
            ids = self._random.integers(0, self._shape.vocab_size, (num_slots, tokens))
            rows = tuple(range(num_slots))
            step = Step(slot=None, ids=ids, positions=self._positions.copy(), rows=rows)
            self._take(step, [int(p) + 1 + i for p in self._positions for i in range(tokens)])

    def run_last(self) -> None:
        """The last slot is filled to its last row, first by prefill, then by decode.

        The others follow far behind.
        """
        num_rows, last_slot = self._shape.max_seq_len, self._shape.batch_size - 1
        for slot in range(last_slot):
            self._prompt(slot, 1)
        self._prompt(last_slot, num_rows, begin=max(0, num_rows - _MAX_FILLED))
        num_steps = min(_NUM_LAST, num_rows - 1)
        self._positions[last_slot] = num_rows - num_steps
        self._decode_live(num_steps)

    def run_roll(self) -> None:
        """On from the last row, over the oldest."""
        num_steps = min(_NUM_STEPS, self._shape.num_positions - self._shape.max_seq_len)
        if not num_steps:
            self.group.skipped = "the RoPE tables end where the cache does"
            return
        self._decode_live(num_steps)

    def _prompts(self, lengths: set[int]) -> None:
        """Prompts that fit, in one slot after the other; the slots are idle afterwards."""
        fitting = sorted(n for n in lengths if 1 <= n <= self._shape.max_seq_len)
        for index, length in enumerate(fitting):
            self._prompt(index % self._shape.batch_size, length)
        self._ids[:] = self._positions[:] = 0

    def _prompt(self, slot: int, length: int, *, begin: int = 0) -> None:
        """Drawn ids up to position `length`; rows before `begin` keep what every backend has."""
        ids = self._random.integers(0, self._shape.vocab_size, length)
        ids[: len(self._bos)] = self._bos[:length]
        done = begin
        while done < length:
            start, done = next_chunk(length, done, self._shape)
            position = np.array([start])
            logits = self._take(
                Step(slot=slot, ids=ids[start:done], positions=position, rows=(slot,)), [done]
            )
        self._ids[slot], self._positions[slot] = logits[0].argmax(), length

    def _decode_live(self, num_steps: int) -> None:
        """Greedy steps of all slots."""
        slots = tuple(range(self._shape.batch_size))
        for _ in range(num_steps):
            logits = self._decode(slots)
            self._ids = np.array([row.argmax() for row in logits])
            self._positions = self._positions + 1

    def _decode(self, slots: tuple[int, ...]) -> list[NDArray[np.float32]]:
        ids, positions = self._ids.copy(), self._positions.copy()
        step = Step(slot=None, ids=ids, positions=positions, rows=slots)
        return self._take(step, [int(positions[slot]) + 1 for slot in slots])

    def _take(self, step: Step, predicted: list[int]) -> list[NDArray[np.float32]]:
        logits = list(_run(self._backend, step))
        self.group.steps.append(step)
        self.group.logits += logits
        slots = np.repeat(step.rows, len(predicted) // len(step.rows)).tolist()
        self.group.places += zip(slots, predicted, strict=True)
        return logits
