"""From starting a process to its first token, as the second process of a system finds it."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .artifacts import build_artifact
from .plan import Entry, Plan, in_turn, random_prompt
from .reference import Reference

__all__ = ["run_cold_start"]


def run_cold_start(plan: Plan, *, prompt_len: int) -> list[dict[str, Any]]:
    """Starts every system again and again, in turns, a process each time.

    A first start of each fills the compile caches and the page cache and is checked; it is
    recorded by itself. How long it took depends on what the caches held.

    Args:
        plan: What is measured; batch 1.
        prompt_len: Tokens of the prompt.

    Returns:
        A result for each system: `first_start` and `starts`, each with `phases` in seconds that
        add up to `total_s`, and `peak_rss_bytes`.
    """
    entries = [Entry.of(plan, name, batch_size=1) for name in plan.systems]
    prompt = random_prompt(plan, 1, prompt_len, seed=0)
    with TemporaryDirectory(prefix="llamac-bench-") as work:
        reference = Reference(plan, Path(work), batch_size=1)
        for entry in entries:
            plan.say(f"first start of {entry.setup.system}")
            with entry.guarded(plan):
                entry.setup, build_s = build_artifact(entry.setup, plan.cache, plan.logs)
                if build_s is not None:
                    entry.result["build_s"] = build_s
                entry.result["first_start"] = _start(plan, entry, prompt)
                reference.check(entry)
            entry.close()
    for trial in range(plan.trials):
        plan.say(f"cold start: trial {trial + 1} of {plan.trials}")
        for entry in in_turn(entries, trial):
            with entry.guarded(plan):
                entry.result.setdefault("starts", []).append(_start(plan, entry, prompt))
            entry.close()
    sizes = {"prompt_len": prompt_len, "prefill_len": plan.prefill_len}
    return [entry.result | sizes for entry in entries]


def _start(plan: Plan, entry: Entry, prompt: list[list[int]]) -> dict[str, Any]:
    """Starts a process and leaves it running."""
    ready = entry.start(plan)
    assert entry.worker is not None
    reply = entry.worker.call("trial", prompt=prompt, num_new=1)
    total_s = time.time() - entry.worker.spawned_s
    entry.result |= {key: ready[key] for key in ("precision", "facts")}
    phases = {
        "python_s": ready["start_s"] - entry.worker.spawned_s,
        **ready["phases"],
        "first_chunk_s": reply["prefill_s"],
    }
    phases["other_s"] = total_s - sum(phases.values())
    memory = entry.worker.call("memory")
    start = {"phases": phases, "total_s": total_s, "cache_hit": ready["facts"].get("cache_hit")}
    return start | memory
