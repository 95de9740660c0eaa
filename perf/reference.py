"""The gate before timing: a system's logits against those of the eager float32 model.

A system on llamac's own quantized weights is held to the eager float32 model on those weights. A
peer rounds weights its own way, so it is held to the model as it was, and may be a few times as far
from that as our weights of as many bits are: enough to tell rounding from another model, and no
measure of how well it rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..runtime.compare import TOLERANCE, Comparison, compare_logits
from .artifacts import quantize_model
from .plan import Entry, Plan, random_prompt
from .process import Worker
from .systems import SYSTEMS

__all__ = ["Reference", "judge", "judge_quantized"]

_NUM_CHECKED = 16  # predictions compared after each prompt
_CALIBRATED = ("bfloat16", "float16")
_ROUNDING_MARGIN = 1.5  # of a system's error over that of the eager model in the same dtype
_QUANTIZED_MARGIN = 3  # of a peer's error over that of our weights of as many bits
# Logits of another model are off by about their size, which no margin may come near.
_MOST_QUANTIZED = 0.8


@dataclass(slots=True, kw_only=True)
class _Passage:
    """Ids after which logits are compared, and what the reference answered.

    Attributes:
        place: Where they end, in words.
        prompt: [B, n] ids.
        forced: Ids that the reference chose after them.
        answers: [M, B, V] logits of the eager model after the prompt and after each id, by folder
            and dtype.
    """

    place: str
    prompt: list[list[int]]
    forced: list[list[int]] | None = None
    answers: dict[tuple[str, str], NDArray[np.float32]] = field(default_factory=dict)


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
        self._answer(self._setup.model, "float32")

    def check(self, entry: Entry) -> None:
        """Compares an entry's logits; a wrong one is stopped.

        Args:
            entry: With a worker that is ready.
        """
        assert entry.worker is not None
        errors, message = [], ""
        for passage in self._passages:
            self._plan.say(f"checking {entry.name} {passage.place}")
            verdict = self._judge(entry, passage, self._ask(entry.worker, passage))
            errors.append(verdict.relative_error)
            message = f"{verdict.message} {passage.place}"
            if not verdict.passed:
                entry.stop("FAIL", f"wrong logits: {message}")
                break
        entry.result["check"] = {"errors": errors, "message": message}

    def _judge(self, entry: Entry, passage: _Passage, logits: NDArray[np.float32]) -> Comparison:
        system = SYSTEMS[entry.setup.system]
        model = entry.setup.model if system.on_quantized else self._setup.model
        expected = self._expect(passage, model, "float32")
        weights = system.weights
        if weights is not None and not system.on_quantized:

            def answer_quantized() -> NDArray[np.float32]:
                copy, _ = quantize_model(self._setup, weights, self._plan.cache, self._plan.logs)
                return self._expect(passage, copy.model, "float32")

            return judge_quantized(expected, logits, weights, answer_quantized)
        precision = entry.result["facts"].get("activations", entry.result["precision"])
        return judge(expected, logits, precision, lambda: self._expect(passage, model, precision))

    def _expect(self, passage: _Passage, model: str, dtype: str) -> NDArray[np.float32]:
        """What the eager model answers, which is asked once."""
        if (model, dtype) not in passage.answers:
            self._answer(model, dtype)
        return passage.answers[model, dtype]

    def _answer(self, model: str, dtype: str) -> None:
        """Asks the eager model after all passages."""
        self._plan.say(f"computing the {dtype} reference of {model}")
        with Worker("reference", self._plan.logs, threads=self._plan.threads) as worker:
            worker.call("prepare", setup=replace(self._setup, model=model, dtype=dtype))
            for passage in self._passages:
                passage.answers[model, dtype] = self._ask(worker, passage)

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


def judge_quantized(
    expected: NDArray[np.float32],
    logits: NDArray[np.float32],
    weights: str,
    answer_quantized: Callable[[], NDArray[np.float32]],
) -> Comparison:
    """Decides whether the logits of a peer, which rounds weights its own way, are plausible.

    Args:
        expected: [..., V] of the eager float32 model.
        logits: [..., V] of the system.
        weights: What its weights are stored in, "int8" or "int4".
        answer_quantized: Computes [..., V] of the eager model on our weights of as many bits.

    Returns:
        The comparison; it passed if the largest error is at most 3 times that of our weights, or
        what rounding activations to 8 bits may cost where that is more, and never above 0.8 of the
        largest logit.
    """
    least = TOLERANCE["int8"]
    verdict = compare_logits(expected, logits, weights, tolerance=least)
    if verdict.passed:
        return verdict
    rounding = compare_logits(expected, answer_quantized(), weights, tolerance=least)
    allowed = min(max(_QUANTIZED_MARGIN * rounding.relative_error, least), _MOST_QUANTIZED)
    return compare_logits(expected, logits, weights, tolerance=allowed)
