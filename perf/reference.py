"""The gate before timing: a system's logits against those of the eager float32 model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..runtime.compare import TOLERANCE, compare_logits
from .plan import Entry, Plan, random_prompt
from .process import Worker

__all__ = ["Reference"]

_NUM_CHECKED = 16  # predictions compared
_CALIBRATED = ("bfloat16", "float16")
_ROUNDING_MARGIN = 1.5  # of a system's error over that of the eager model in the same dtype


class Reference:
    """What the eager float32 model answers, on the ids it chose itself.

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
        # Over the edge of a chunk where there is room for that.
        prompt_len = max(min(self._setup.prefill_len + 3, rows - self._num_checked), 1)
        self._prompt = random_prompt(plan, batch_size, prompt_len, seed=1)
        self._forced: list[list[int]] | None = None
        self._logits = self._answer("float32")
        self._rounding: dict[str, float] = {}

    def check(self, entry: Entry) -> None:
        """Compares an entry's logits; a wrong one is stopped.

        How far 16-bit rounding alone carries logits depends on the model: where an error is above
        the usual tolerance, it is compared with the error of the eager model in the same dtype.

        Args:
            entry: With a worker that is ready.
        """
        assert entry.worker is not None
        precision = entry.result["precision"]
        logits = self._ask(entry.worker)
        verdict = compare_logits(self._logits, logits, precision)
        if not verdict.passed and precision in _CALIBRATED:
            if precision not in self._rounding:
                rounded = compare_logits(self._logits, self._answer(precision), precision)
                self._rounding[precision] = rounded.relative_error
            allowed = max(_ROUNDING_MARGIN * self._rounding[precision], TOLERANCE[precision])
            verdict = compare_logits(self._logits, logits, precision, tolerance=allowed)
        entry.result["check"] = {"error": verdict.relative_error, "message": verdict.message}
        if not verdict.passed:
            entry.stop("FAIL", f"wrong logits: {verdict.message}")

    def _answer(self, dtype: str) -> NDArray[np.float32]:
        """[M, B, V] logits of the eager model, after the prompt and after each id."""
        self._plan.say(f"computing the {dtype} reference")
        with Worker("reference", self._plan.logs, threads=self._plan.threads) as worker:
            worker.call("prepare", setup=replace(self._setup, dtype=dtype))
            return self._ask(worker)

    def _ask(self, worker: Worker) -> NDArray[np.float32]:
        out = self._folder / "logits.npy"
        reply = worker.call(
            "check",
            prompt=self._prompt,
            forced=self._forced,
            num_new=self._num_checked,
            out=str(out),
        )
        self._forced = reply["forced"]
        return np.load(out)
