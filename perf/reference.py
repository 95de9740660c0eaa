"""The gate before timing: a system's logits against those of the eager float32 model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..runtime.compare import TOLERANCE, Comparison, compare_logits
from .plan import Entry, Plan, random_prompt
from .process import Worker

__all__ = ["Reference", "judge"]

_NUM_CHECKED = 16  # predictions compared after each prompt
_CALIBRATED = ("bfloat16", "float16")
_ROUNDING_MARGIN = 1.5  # of a system's error over that of the eager model in the same dtype


@dataclass(slots=True, kw_only=True)
class _Passage:
    """Ids after which logits are compared, and what the reference answered.

    Attributes:
        place: Where they end, in words.
        prompt: [B, n] ids.
        forced: Ids that the reference chose after them.
        answers: [M, B, V] logits of the eager model after the prompt and after each id, by dtype.
    """

    place: str
    prompt: list[list[int]]
    forced: list[list[int]] | None = None
    answers: dict[str, NDArray[np.float32]] = field(default_factory=dict)


class Reference:
    """What the eager float32 model answers, on the ids it chose itself.

    It is asked after a short prompt, and again after one that fills the cache.

    Args:
        plan: What is measured.
        folder: Where the logits go.
        batch_size: B.
        max_seq_len: S; None is the plan's.

    Raises:
        BackendUnavailableError: The reference can't run here.
    """

    def __init__(
        self, plan: Plan, folder: Path, *, batch_size: int, max_seq_len: int | None = None
    ) -> None:
        self._plan = plan
        self._folder = folder
        self._setup = plan.setup("eager", batch_size=batch_size, max_seq_len=max_seq_len)
        rows = self._setup.max_seq_len
        self._num_checked = min(_NUM_CHECKED, max(rows // 2, 1))
        longest = max(rows - self._num_checked + 1, 1)  # the last id goes to the last row
        # Over the edge of a chunk where there is room for that.
        lengths = {min(self._setup.prefill_len + 3, longest): "after a short prompt"}
        lengths[longest] = "at the end of the cache"
        self._passages = [
            _Passage(place=place, prompt=random_prompt(plan, batch_size, length, seed=1))
            for length, place in lengths.items()
        ]
        self._answer("float32")

    def check(self, entry: Entry) -> None:
        """Compares an entry's logits; a wrong one is stopped.

        Args:
            entry: With a worker that is ready.
        """
        assert entry.worker is not None
        precision = entry.result["precision"]
        errors, message = [], ""
        for passage in self._passages:

            def answer_rounded(passage: _Passage = passage) -> NDArray[np.float32]:
                if precision not in passage.answers:
                    self._answer(precision)
                return passage.answers[precision]

            self._plan.say(f"checking {entry.name} {passage.place}")
            logits = self._ask(entry.worker, passage)
            verdict = judge(passage.answers["float32"], logits, precision, answer_rounded)
            errors.append(verdict.relative_error)
            message = f"{verdict.message} {passage.place}"
            if not verdict.passed:
                entry.stop("FAIL", f"wrong logits: {message}")
                break
        entry.result["check"] = {"errors": errors, "message": message}

    def _answer(self, dtype: str) -> None:
        """Asks the eager model."""
        self._plan.say(f"computing the {dtype} reference")
        with Worker("reference", self._plan.logs, threads=self._plan.threads) as worker:
            worker.call("prepare", setup=replace(self._setup, dtype=dtype))
            for passage in self._passages:
                passage.answers[dtype] = self._ask(worker, passage)

    def _ask(self, worker: Worker, passage: _Passage) -> NDArray[np.float32]:
        out = self._folder / "logits.npy"
        reply = worker.call(
            "check",
            prompt=passage.prompt,
            forced=passage.forced,
            num_new=self._num_checked,
            out=str(out),
        )
        passage.forced = reply["forced"]
        return np.load(out)


def judge(
    expected: NDArray[np.float32],
    logits: NDArray[np.float32],
    precision: str,
    answer_rounded: Callable[[], NDArray[np.float32]],
) -> Comparison:
    """Decides whether logits are right.

    How far 16-bit rounding alone carries logits depends on the model: where an error is above the
    usual tolerance, it is compared with the error of the eager model in the same dtype.

    Args:
        expected: [..., V] of the eager float32 model.
        logits: [..., V] of the system.
        precision: Of the system.
        answer_rounded: Computes [..., V] of the eager model in that precision.

    Returns:
        The comparison; it passed if they are.
    """
    verdict = compare_logits(expected, logits, precision)
    if verdict.passed or precision not in _CALIBRATED:
        return verdict
    rounding = compare_logits(expected, answer_rounded(), precision).relative_error
    allowed = max(_ROUNDING_MARGIN * rounding, TOLERANCE[precision])
    return compare_logits(expected, logits, precision, tolerance=allowed)
