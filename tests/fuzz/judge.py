"""What came of a try, and whether it is a fault."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from damage import Allowed

__all__ = ["FAULTS", "OUTCOMES", "TRACEBACK", "Ended", "fingerprint", "judge"]

TRACEBACK = 99  # the exit code of a worker that an exception left
FAULTS = ("traceback", "crash", "hang", "nonsense", "bad message")
OUTCOMES = ("refused", "accepted", *FAULTS)

_MAX_LINE = 480  # a message of 400, and the words around it
_OPTIONS = (" --", "max_seq_len")
_NOTE = re.compile(
    r"warning: |WARNING: |weights .+, cache |\[(torch|ort)-|report: "
    r"|sampling by the model's generation_config.json: "
    r"|the message makes a prompt of |\(the oldest "
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Its exit code, negative for the signal that killed it; None at the time limit.
        out: Standard output.
        err: Standard error.
    """

    code: int | None
    out: str
    err: str


def fingerprint(out: str) -> object:
    """What a command computed: the ids and their log-probabilities, without the timing.

    Args:
        out: What it printed.

    Returns:
        Something to compare.
    """
    try:
        data = json.loads(out)
    except ValueError:
        return out
    if not isinstance(data, dict) or "ids" not in data:
        return out
    logprobs = [round(value, 3) for value in data.get("logprobs", ())]
    return data["prompt_ids"], data["ids"], data["text"], logprobs


def judge(ended: Ended, *, allowed: Allowed, sound: object, names: tuple[str, ...]) -> str:
    """Sorts the end of a try.

    Args:
        ended: How it ended.
        allowed: What an accepted try may print.
        sound: The fingerprint of the undamaged seed, or None where there is none.
        names: A refusal has to say one of them, or an option; empty where any words do.

    Returns:
        One of OUTCOMES, and after a colon, if need be, why.
    """
    lines = ended.err.split("\n")[:-1]
    if ended.code is None:
        return "hang"
    if ended.code == TRACEBACK or "Traceback (most recent call last)" in ended.err:
        return "traceback"
    if ended.code < 0:
        return f"crash: signal {-ended.code}"
    if odd := [line for line in lines if len(line) > _MAX_LINE or not line.isprintable()]:
        return f"bad message: {len(odd[0])} characters: {odd[0][:60]!r}"
    if ended.code == 2:
        # A changed weight is seen in what it makes of the logits, if at all.
        may_be_weights = names and allowed == "any"
        return _judge_refusal(lines, (*names, "the weights") if may_be_weights else names)
    has_failed = ended.code == 1 and lines and lines[-1].startswith("llamac: ")
    if odd := [line for line in lines[: -1 if has_failed else None] if not _NOTE.match(line)]:
        return f"bad message: {odd[0]!r}"
    if ended.code != 0 and not has_failed and not (ended.code == 1 and "FAIL" in ended.out):
        return f"bad message: exit {ended.code}"
    if allowed == "refused" and "FAIL" not in ended.out:
        return "nonsense: accepted what must be refused"
    if allowed == "same" and sound is not None and fingerprint(ended.out) != sound:
        return "nonsense: another text"
    return "accepted"


def _judge_refusal(lines: list[str], names: tuple[str, ...]) -> str:
    if not lines:
        return "bad message: exit 2 without a line"
    *notes, last = lines
    if not re.match(r"llamac( \w+)?: .", last):
        return f"bad message: ends with {last!r}"
    if odd := [line for line in notes if not _NOTE.match(line)]:
        return f"bad message: {odd[0]!r}"
    if names and not any(name in last for name in (*names, *_OPTIONS)):
        return f"bad message: names no file: {last!r}"
    return "refused"
