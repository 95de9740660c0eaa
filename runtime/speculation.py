"""Speculation by prompt lookup: text that repeats is guessed, and a step checks several guesses.

A guess is what followed the newest ids where they stood before. Sampling is keyed by position, so
that checking is comparing: the tokens are those without speculation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from .backend import Backend
from .prefix import Slot
from .typed_json import shown

__all__ = ["SPECULATE", "check_exported", "look_up", "parse_speculate", "take_several"]

SPECULATE = "lookup, or lookup:K for K guesses a step, at most 15"

_DEFAULT_GUESSES, _MAX_GUESSES = 4, 15
_LONGEST_MATCH, _SHORTEST_MATCH = 4, 2  # newest ids that must have stood there


def parse_speculate(text: str | None) -> int:
    """Reads what the command line asks for.

    Args:
        text: Such as "lookup" or "lookup:8"; None is no speculation.

    Returns:
        How many ids a step guesses.

    Raises:
        ValueError: It is none.
    """
    if text is None:
        return 0
    match = re.fullmatch(r"lookup(?::([1-9]|1[0-5]))?", text) if type(text) is str else None
    if match is None:
        raise ValueError(f"speculate is {shown(text)}; it must be {SPECULATE}")
    return int(match[1] or _DEFAULT_GUESSES)


def check_exported(text: str, num_guesses: int) -> None:
    """Checks that a bundle has the step that is asked for; "lookup" is as many guesses as it has.

    Args:
        text: As for parse_speculate.
        num_guesses: Of the bundle's shape.

    Raises:
        ValueError: It has none, or one of another number of guesses.
    """
    wanted = parse_speculate(text)
    if not num_guesses:
        raise ValueError(
            f"the bundle has no step of several tokens; export again with --speculate {text}"
        )
    if ":" in text and wanted != num_guesses:
        raise ValueError(
            f"speculate is {text}, the bundle was exported with lookup:{num_guesses}; say lookup, "
            f"or export again with --speculate {text}"
        )


def look_up(ids: Sequence[int], num_guesses: int) -> list[int]:
    """Guesses what follows, from where the newest ids stood before.

    Args:
        ids: Prompt and continuation.
        num_guesses: How many ids are wanted.

    Returns:
        At most that many; none where the newest two ids are new together. Of the longest matches
        the newest.
    """
    known = np.asarray(ids)
    for length in range(_LONGEST_MATCH, _SHORTEST_MATCH - 1, -1):
        if len(known) <= length:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(known[:-1], length)
        found = np.flatnonzero((windows == known[-length:]).all(axis=1))
        if len(found):
            # One that the wanted ids follow, else that which most follow: the first.
            whole = found[found + length + num_guesses <= len(known)]
            begin = int(whole[-1] if len(whole) else found[0]) + length
            return known[begin : begin + num_guesses].tolist()
    return []


def take_several(backend: Backend, slots: Sequence[Slot], decoding: Sequence[Slot]) -> bool:
    """Feeds slots their next id and guesses behind it, and takes what comes as far as it is right.

    Args:
        backend: Its shape says how many guesses it takes.
        slots: All of the backend's.
        decoding: Those that are fed; the others' rows, as in a decode, get what will be replaced.

    Returns:
        False, and nothing was done, where there is no guess or a slot has no rows for so many.
    """
    num_guesses, rows = backend.shape.num_guesses, backend.shape.max_seq_len
    if not num_guesses or any(slot.next_position + num_guesses >= rows for slot in slots):
        return False
    guesses: dict[int, list[int]] = {}
    for index, slot in enumerate(slots):
        live = slot.live
        if live is not None and live.decoding and slot in decoding:
            known = (*live.request.prompt_ids, *live.completion.ids)
            guesses[index] = look_up(known, num_guesses)
    if not any(guesses.values()):
        return False
    ids = np.zeros((len(slots), 1 + num_guesses), dtype=np.int64)
    for index, slot in enumerate(slots):
        ids[index, 0] = slot.live.next_id if slot.live else 0
        own = guesses.get(index, [])
        ids[index, 1 : 1 + len(own)] = own
    logits = backend.extend(ids, np.array([slot.next_position for slot in slots]))
    for index, slot in enumerate(slots):
        live = slot.live
        if live is None or slot not in decoding:
            continue
        if not live.decoding:
            live.advance(logits[index, 0])
            continue
        own = guesses.get(index, [])
        live.completion.num_guessed += len(own)
        for step, guess in enumerate([*own, None]):
            live.take(logits[index, step])
            if live.finished or live.completion.ids[-1] != guess:
                break
            live.completion.num_right += 1
    return True
