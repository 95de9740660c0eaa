"""The calls a bundle is verified with, on a backend that checks what it is given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from llamac.export.forced_steps import Group, record_groups, replay
from llamac.runtime.backend import StaticShape

V = 11
NAMES = ["text", "prefill", "chunk edges", "ragged rows", "last row", "roll"]


class CheckedBackend:
    """Logits that depend on every live id of the slot; refuses what a real backend would."""

    def __init__(self, shape: StaticShape) -> None:
        self.shape = shape
        self.cache = np.zeros((shape.batch_size, shape.max_seq_len))

    def prefill(self, slot: int, ids: Sequence[int], start: int) -> NDArray[np.float32]:
        assert 0 <= slot < self.shape.batch_size
        assert 1 <= len(ids) <= self.shape.prefill_len
        assert 0 <= start <= self.shape.max_seq_len - self.shape.prefill_len
        assert 0 <= min(ids) <= max(ids) < V
        self.cache[slot, start : start + len(ids)] = ids
        return self._logits(slot, start + len(ids))

    def decode(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        assert ids.shape == positions.shape == (self.shape.batch_size,)
        assert 0 <= positions.min() <= positions.max() < self.shape.num_positions
        assert 0 <= ids.min() <= ids.max() < V
        self.cache[np.arange(len(ids)), positions % self.shape.max_seq_len] = ids
        return np.stack([self._logits(slot, p + 1) for slot, p in enumerate(positions)])

    def _logits(self, slot: int, length: int) -> NDArray[np.float32]:
        live = self.cache[slot, : min(length, self.shape.max_seq_len)]
        weights = 1 + np.arange(len(live)) % 7
        return np.sin((live @ weights + length) * np.arange(1, V + 1)).astype(np.float32)


def record(shape: StaticShape, text_ids: Sequence[int] = (1, 2)) -> dict[str, Group]:
    groups = record_groups(CheckedBackend(shape), text_ids, bos_token_id=3)
    assert [group.name for group in groups] == NAMES
    return {group.name: group for group in groups}


def make_shape(batch_size: int, prefill_len: int, max_seq_len: int, more: int = 0) -> StaticShape:
    return StaticShape(
        batch_size=batch_size,
        max_seq_len=max_seq_len,
        prefill_lens=(prefill_len,),
        num_positions=max_seq_len + more,
        vocab_size=V,
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_shape_gets_steps_it_can_run(data: st.DataObject):
    num_rows = data.draw(st.integers(1, 40), label="S")
    shape = make_shape(
        data.draw(st.integers(1, 5), label="B"),
        data.draw(st.integers(1, num_rows), label="P"),
        num_rows,
        data.draw(st.integers(0, 12), label="more"),
    )
    text = data.draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=num_rows))
    groups = record(shape, text)
    other = CheckedBackend(shape)
    for name, group in groups.items():
        assert (group.skipped is None) == bool(group.steps), name
        assert len(group.places) == len(group.logits)
        if group.steps:
            np.testing.assert_array_equal(replay(other, group), np.stack(group.logits))
    decoded = [step.positions.max() for step in groups["last row"].steps if step.slot is None]
    assert decoded == list(range(max(num_rows - 3, 1), num_rows))
    assert (groups["roll"].skipped is None) == (shape.num_positions > num_rows)


def test_what_each_group_shows():
    groups = record(make_shape(3, 8, 50, more=20), text_ids=range(10))
    assert [step.ids[0] for step in groups["text"].steps] == list(range(10))
    assert {step.rows for step in groups["text"].steps} == {(0,)}
    assert groups["text"].places == [(0, position) for position in range(1, 11)]

    def prompts(name: str) -> list[int]:
        """Lengths: a prompt's chunks end at its length, the first begins at 0."""
        steps = [step for step in groups[name].steps if step.slot is not None]
        ends = [int(step.positions[0]) + len(step.ids) for step in steps]
        begins = [int(step.positions[0]) for step in steps]
        return [
            end for end, following in zip(ends, [*begins[1:], 0], strict=True) if following == 0
        ]

    assert prompts("prefill") == [1, 7, 8]
    assert prompts("chunk edges") == [9, 15, 16, 17]
    assert prompts("ragged rows") == [1, 10, 19]
    ragged = [step.positions.tolist() for step in groups["ragged rows"].steps if step.slot is None]
    assert ragged == [[1 + i, 10 + i, 19 + i] for i in range(8)]
    assert prompts("last row") == [1, 1, 50]
    # The last chunk of 50 would pass the cache, so it begins at 42 instead of 48.
    chunks = [step for step in groups["last row"].steps if step.slot == 2]
    assert [int(step.positions[0]) for step in chunks] == [0, 8, 16, 24, 32, 40, 42]
    last = [step.positions.tolist() for step in groups["last row"].steps if step.slot is None]
    assert last == [[1, 1, 47], [2, 2, 48], [3, 3, 49]]
    roll = [step.positions.tolist() for step in groups["roll"].steps]
    assert roll == [[4 + i, 4 + i, 50 + i] for i in range(8)]
    for group in groups.values():
        for step in group.steps:
            assert step.slot is None or step.positions[0] > 0 or step.ids[0] == 3


def test_decoded_ids_are_the_greedy_choices():
    groups = record(make_shape(2, 4, 32, more=9))
    for name in ("ragged rows", "roll"):
        decodes = [step for step in groups[name].steps if step.slot is None]
        logits = np.stack(groups[name].logits[-2 * len(decodes) :]).reshape(len(decodes), 2, V)
        for step, row in zip(decodes[1:], logits[:-1], strict=True):
            assert step.ids.tolist() == row.argmax(-1).tolist()


def test_a_huge_cache_is_not_filled_from_its_first_row():
    groups = record(make_shape(1, 128, 100_000))
    fed = sum(len(step.ids) for step in groups["last row"].steps)
    assert 2048 < fed < 2048 + 2 * 128
