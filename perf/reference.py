"""The gate before timing: a system's logits against those of the eager float32 model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..runtime.compare import compare_logits
from .plan import Entry, Plan, random_prompt
from .process import Worker

__all__ = ["Reference"]

_NUM_CHECKED = 16  # predictions compared


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What the eager float32 model answers, on the ids it chose itself.

    Attributes:
        prompt: [B, n] ids.
        forced: [M - 1, B] ids fed after it.
        logits: File of [M, B, V] float32 logits, those after the prompt and after each id.
    """

    prompt: list[list[int]]
    forced: list[list[int]]
    logits: Path

    @classmethod
    def compute(
        cls, plan: Plan, folder: Path, *, batch_size: int, max_seq_len: int | None = None
    ) -> Reference:
        """Runs the reference.

        Args:
            plan: What is measured.
            folder: Where the logits go.
            batch_size: B.
            max_seq_len: S; None is the plan's.

        Returns:
            The reference.

        Raises:
            BackendUnavailableError: It can't run here.
        """
        plan.say("computing the float32 reference")
        setup = plan.setup("eager", batch_size=batch_size, max_seq_len=max_seq_len)
        rows = setup.max_seq_len
        num_checked = min(_NUM_CHECKED, max(rows // 2, 1))
        # Over the edge of a chunk where there is room for that.
        prompt_len = max(min(setup.prefill_len + 3, rows - num_checked), 1)
        prompt = random_prompt(plan, batch_size, prompt_len, seed=1)
        out = folder / "reference.npy"
        with Worker("reference", plan.logs, threads=plan.threads) as worker:
            worker.call("prepare", setup=replace(setup, dtype="float32"))
            reply = worker.call("check", prompt=prompt, num_new=num_checked, out=str(out))
        return cls(prompt=prompt, forced=reply["forced"], logits=out)

    def check(self, entry: Entry) -> None:
        """Compares an entry's logits; a wrong one is stopped.

        Args:
            entry: With a worker that is ready.
        """
        assert entry.worker is not None
        out = self.logits.with_name("candidate.npy")
        entry.worker.call(
            "check",
            prompt=self.prompt,
            forced=self.forced,
            num_new=len(self.forced) + 1,
            out=str(out),
        )
        verdict = compare_logits(np.load(self.logits), np.load(out), entry.result["precision"])
        entry.result["check"] = {"error": verdict.relative_error, "message": verdict.message}
        if not verdict.passed:
            entry.stop("FAIL", f"wrong logits: {verdict.message}")
