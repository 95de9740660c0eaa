"""Steps that take prompts and tokens together: a row for each token, of whatever slot.

Beside the weights that a decode reads in any case some ids of prompts cost little, and those who
decode don't wait for a step of theirs.

Source: arXiv 2308.16369 (chunks of prompts beside decodes).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .backend import Backend, StaticShape, StepInputs
from .chunks import chunks_cost
from .prefix import Slot
from .request import LiveRequest
from .turns import Turns

__all__ = ["choose_rows", "decode_few", "mixed_inputs", "mixed_lens", "take_mixed"]

_FEW, _MANY = 16, 128  # rows for short prompts and for long ones
_LIVE = 4  # rows for decodes of few of the slots


def mixed_lens(batch_size: int) -> tuple[int, ...]:
    """The rows of mixed steps that a server of B slots has.

    Args:
        batch_size: B.

    Returns:
        Few rows, which keep nobody waiting, and many, behind those for decodes of a part of the
        slots, if there are enough; () where there is one slot.
    """
    if batch_size == 1:
        return ()
    # Half of the few are prompts' where all other slots decode.
    few = -(-(batch_size + _FEW // 2) // _FEW) * _FEW
    return *([_LIVE] if batch_size > _LIVE else []), few, few + _MANY - _FEW


def mixed_inputs(
    shape: StaticShape,
    slots: NDArray[np.int64],
    ids: NDArray[np.int64],
    positions: NDArray[np.int64],
    logit_rows: Sequence[int],
) -> StepInputs:
    """Pads tokens of any slots to the fewest rows that hold them, once they are known to be valid.

    The last one is repeated: that writes what is written anyhow, to the same place.

    Args:
        shape: The backend's.
        slots: See Backend.mix.
        ids: See Backend.mix.
        positions: See Backend.mix.
        logit_rows: See Backend.mix.

    Returns:
        The inputs of a step with T = 1, a row for each token.

    Raises:
        ValueError: Shapes, ids, slots or positions are not those of a step; the message says what
            is allowed.
    """
    count, last_slot, last = len(ids), shape.batch_size - 1, shape.num_positions - 1
    num_rows = next((n for n in shape.mixed_lens if n >= count), None)
    if count < 1 or num_rows is None:
        raise ValueError(f"{count} tokens are given; mixed_lens is {shape.mixed_lens}")
    if not np.shape(slots) == np.shape(positions) == np.shape(ids) == (count,):
        raise ValueError(
            f"slots have shape {np.shape(slots)}, ids {np.shape(ids)} and positions "
            f"{np.shape(positions)}; all must be ({count},)"
        )
    for name, values, largest in (("slots", slots, last_slot), ("positions", positions, last)):
        if min(values) < 0 or max(values) > largest:
            raise ValueError(f"{name} are {list(map(int, values))}; allowed are 0 to {largest}")
    if not 1 <= len(logit_rows) <= shape.batch_size or not (
        0 <= min(logit_rows) <= max(logit_rows) < count
    ):
        raise ValueError(
            f"logit_rows are {list(logit_rows)}; allowed are 1 to {shape.batch_size} of the "
            f"{count} tokens"
        )
    rows = np.minimum(np.arange(num_rows), count - 1)
    wanted = np.minimum(np.arange(shape.batch_size), len(logit_rows) - 1)
    places = np.asarray(positions)[rows]
    return StepInputs(
        input_ids=shape.check_ids(ids)[rows, None],
        positions=places,
        write_indices=places % shape.max_seq_len,
        logit_indices=np.asarray(logit_rows)[wanted][None],
        slots=np.asarray(slots)[rows],
    )


def decode_few(
    backend: Backend, slots: Sequence[Slot], decoding: Sequence[Slot]
) -> NDArray[np.float32] | None:
    """Feeds some slots their next id in a step of fewer rows than there are slots.

    Args:
        backend: Has all slots.
        slots: All of the backend's.
        decoding: Those that are fed; what is scored goes through the same step always.

    Returns:
        [len(decoding), V] float32 logits; None where no such step holds them.
    """
    lives = [slot.live for slot in decoding if slot.live is not None and not slot.live.scored]
    lens = [n for n in backend.shape.mixed_lens if len(decoding) <= n < len(slots)]
    if len(lives) < len(decoding) or not lens:
        return None
    return backend.mix(
        np.array([slots.index(slot) for slot in decoding]),
        np.array([live.next_id for live in lives]),
        np.array([live.next_position for live in lives]),
        range(len(lives)),
    )


def choose_rows(
    shape: StaticShape, lens: Sequence[int], decoding: Sequence[Slot], prompting: Sequence[Slot]
) -> int:
    """Chooses between a mixed step and one prompt's chunk, by what takes the least time.

    Args:
        shape: The backend's.
        lens: Those of shape.mixed_lens that may be taken.
        decoding: What a mixed step feeds as well; what is scored goes through the same step always.
        prompting: Whose prompts wait.

    Returns:
        The mixed step's rows; 0 is a chunk.
    """
    left = [
        len(slot.live.request.prompt_ids) - slot.live.num_prefilled
        for slot in prompting
        if slot.live is not None
    ]
    if not lens or not left or any(slot.live and slot.live.scored for slot in decoding):
        return 0
    cost, rows = min((chunks_cost(sum(left), n, num_others=len(decoding)), n) for n in lens)
    apart = sum(min(chunks_cost(ids, n) for n in shape.prefill_lens) for ids in left)
    return rows if decoding or cost < apart else 0


def take_mixed(
    backend: Backend,
    slots: Sequence[Slot],
    decoding: Sequence[Slot],
    prompting: Sequence[Slot],
    num_rows: int,
    turns: Turns,
) -> None:
    """Feeds slots their next id, and prompts as many of theirs as there are rows left.

    Args:
        backend: Has such steps.
        slots: All of the backend's.
        decoding: Those that are fed their next id.
        prompting: Those that are fed more of their prompt, while there are rows.
        num_rows: Of the step, more than decoding.
        turns: Told of the step before its tokens are taken.
    """
    fed: list[tuple[LiveRequest, tuple[int, ...], bool]] = []  # with whether its logits are wanted
    owners: list[int] = []
    positions: list[int] = []
    for slot in (*decoding, *prompting):
        live = slot.live
        assert live is not None
        begin, room = live.next_position, num_rows - len(owners)
        prompt_ids = live.request.prompt_ids
        is_prompt = slot in prompting
        ids = prompt_ids[begin : begin + room] if is_prompt else (live.next_id,)
        if not ids:
            break
        fed.append((live, ids, not is_prompt or begin + len(ids) == len(prompt_ids)))
        owners += [slots.index(slot)] * len(ids)
        positions += range(begin, begin + len(ids))
    ends = np.cumsum([len(ids) for _, ids, _ in fed]) - 1
    logit_rows = [int(end) for end, (_, _, wanted) in zip(ends, fed, strict=True) if wanted]
    begin_s = time.perf_counter()
    logits = backend.mix(
        np.array(owners),
        np.concatenate([ids for _, ids, _ in fed]),
        np.array(positions),
        logit_rows or [0],
    )
    elapsed_s = time.perf_counter() - begin_s
    turns.count("mixed", num_rows, elapsed_s, [live for live, _, _ in fed[len(decoding) :]])
    rows = iter(logits)
    for number, (live, ids, wanted) in enumerate(fed):
        if number >= len(decoding):  # a prompt's last id counts once its logits are taken
            live.num_prefilled += len(ids) - wanted
        if wanted:
            live.advance(next(rows))
