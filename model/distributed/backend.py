"""The first of several ranks behind the Backend protocol; what the others do meanwhile."""

from __future__ import annotations

import atexit
import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from enum import IntEnum

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ...runtime.backend import BackendUnavailableError, StaticShape, check_rows
from ...runtime.interrupt import hold_interrupt
from ...runtime.mixed_step import mixed_inputs
from ..compiled.torch_backend import TorchBackend
from .group import RankGroup

__all__ = ["ParallelBackend", "follow"]


class _Call(IntEnum):
    STOP = 0
    PREFILL = 1
    SCORE = 2
    DECODE = 3
    READ = 4
    WRITE = 5
    EXTEND = 6
    MIX = 7


_HEADER = 3  # which call, a slot, a number


class ParallelBackend:
    """The first rank's backend: tells the others each call before it makes it.

    Args:
        own: This rank's part.
        group: All of them.
        num_kv_heads: K of the whole model.
    """

    def __init__(self, own: TorchBackend, group: RankGroup, *, num_kv_heads: int) -> None:
        self.shape: StaticShape = own.shape
        self.startup = own.startup
        self._own = own
        self._group = group
        self._num_kv_heads = num_kv_heads
        self._is_told = False
        self._message = _message(own.shape)
        atexit.register(self.close)

    @property
    def num_replays(self) -> int:
        """See TorchBackend; this rank's."""
        return self._own.num_replays

    def prefill(self, slot: int, ids: Sequence[int], start: int) -> NDArray[np.float32]:
        """One chunk of a prompt through one slot; see Backend."""
        self.shape.chunk_inputs(slot, ids, start)  # refuses before the others begin
        with self._tell(_Call.PREFILL, slot, start, ids):
            return self._own.prefill(slot, ids, start)

    def score(self, slot: int, ids: Sequence[int], start: int) -> NDArray[np.float32]:
        """Like prefill, with the logits of every id; see TorchBackend."""
        self.shape.chunk_inputs(slot, ids, start)
        if not self._own.all_logits:
            return self._own.score(slot, ids, start)  # which refuses
        with self._tell(_Call.SCORE, slot, start, ids):
            return self._own.score(slot, ids, start)

    def decode(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """One token of every slot; see Backend."""
        self.shape.step_inputs(ids, positions)
        with self._tell(_Call.DECODE, 0, 0, [*ids, *positions]):
            return self._own.decode(ids, positions)

    def extend(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """A few tokens of every slot; see Backend."""
        self.shape.extend_inputs(ids, positions)
        with self._tell(_Call.EXTEND, 0, 0, [*positions.tolist(), *ids.ravel().tolist()]):
            return self._own.extend(ids, positions)

    def mix(
        self,
        slots: NDArray[np.int64],
        ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        logit_rows: Sequence[int],
    ) -> NDArray[np.float32]:
        """Tokens of any slots; see Backend."""
        mixed_inputs(self.shape, slots, ids, positions, logit_rows)
        with self._tell(_Call.MIX, 0, len(ids), [*slots, *ids, *positions, *logit_rows]):
            return self._own.mix(slots, ids, positions, logit_rows)

    def read_rows(self, slot: int, num_rows: int) -> NDArray[np.float32]:
        """The first rows of a slot's cache; see Backend."""
        with self._tell(_Call.READ, slot, num_rows):
            own = torch.from_numpy(self._own.read_rows(slot, num_rows))
            parts = [torch.empty_like(own) for _ in range(self._group.rank.world_size)]
            dist.gather(own.contiguous(), parts, group=self._group.commands)
        copies = max(1, self._group.rank.world_size // self._num_kv_heads)  # of the same head
        return torch.cat(parts[::copies], dim=1).numpy()

    def write_rows(self, slot: int, rows: NDArray[np.float32]) -> None:
        """Rows into a slot's cache; see Backend."""
        num_buffers, _, head_dim = self._own.cache.row_shape
        expected = (num_buffers, self._num_kv_heads, head_dim)
        check_rows(rows, expected, self.shape.max_seq_len)
        with self._tell(_Call.WRITE, slot, rows.shape[2], [self._num_kv_heads]):
            _take_rows(self._own, self._group, slot, torch.from_numpy(rows))

    def close(self) -> None:
        """Ends the other ranks; the backend can't be used any more."""
        atexit.unregister(self.close)
        try:
            with self._tell(_Call.STOP, 0, 0):
                pass
        except BackendUnavailableError:  # they wait for what this rank didn't finish, or are gone
            self._group.kill()
        self._group.close()

    @contextlib.contextmanager
    def _tell(
        self, call: _Call, slot: int, number: int, more: Sequence[int] = ()
    ) -> Iterator[None]:
        if self._is_told:
            raise BackendUnavailableError("a step was interrupted; the ranks can't go on together")
        with _until_done(), self._group.guarded():
            self._is_told = True
            self._send(call, slot, number, more)
            yield
            self._is_told = False

    def _send(self, call: _Call, slot: int, number: int, more: Sequence[int]) -> None:
        words = [call, slot, number, len(more), *more]
        self._message[: len(words)] = torch.tensor(words)
        dist.broadcast(self._message, 0, group=self._group.commands)


@contextlib.contextmanager
def _until_done() -> Iterator[None]:
    """Makes Ctrl-C wait for the end of a step: the other ranks do it in any case.

    A second Ctrl-C doesn't wait; nothing can be computed after it.
    """
    if (
        signal.getsignal(signal.SIGINT) is None
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    with hold_interrupt() as was_pressed:
        yield
    if was_pressed():
        signal.raise_signal(signal.SIGINT)


def follow(own: TorchBackend, group: RankGroup) -> None:
    """Does what the first rank does until it stops.

    Args:
        own: This rank's part.
        group: All of them.
    """
    message = _message(own.shape)
    while True:
        dist.broadcast(message, 0, group=group.commands)
        call, slot, number, count, *words = message.tolist()
        words = words[:count]
        match call:
            case _Call.STOP:
                return
            case _Call.PREFILL:
                own.prefill(slot, words, number)
            case _Call.SCORE:
                own.score(slot, words, number)
            case _Call.DECODE:
                ids, positions = np.array(words).reshape(2, -1)
                own.decode(ids, positions)
            case _Call.EXTEND:
                positions, ids = np.split(np.array(words), [own.shape.batch_size])
                own.extend(ids.reshape(len(positions), -1), positions)
            case _Call.MIX:
                slots, ids, positions = np.array(words[: 3 * number]).reshape(3, number)
                own.mix(slots, ids, positions, words[3 * number :])
            case _Call.READ:
                rows = torch.from_numpy(own.read_rows(slot, number))
                dist.gather(rows.contiguous(), group=group.commands)
            case _Call.WRITE:
                num_buffers, _, head_dim = own.cache.row_shape
                rows = torch.empty(num_buffers, words[0], number, head_dim)
                _take_rows(own, group, slot, rows)


def _message(shape: StaticShape) -> Tensor:
    mixed = 3 * max(shape.mixed_lens, default=0) + shape.batch_size
    size = max(shape.prefill_len, (2 + shape.num_guesses) * shape.batch_size, mixed)
    return torch.zeros(_HEADER + 1 + size, dtype=torch.int64)


def _take_rows(own: TorchBackend, group: RankGroup, slot: int, rows: Tensor) -> None:
    """Gives every rank the first one's rows of all heads; each keeps its own."""
    rows = rows.contiguous()
    dist.broadcast(rows, 0, group=group.commands)
    first, last = group.rank.heads_of(rows.shape[1])
    own.write_rows(slot, rows[:, first:last].numpy())
