"""Runs several systems side by side: checked first, then timed in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .artifacts import build_artifact
from .machine import device_used_bytes
from .plan import Entry, Plan, in_turn, random_prompt
from .process import WorkerError
from .reference import Reference
from .systems import SYSTEMS

__all__ = ["MIN_SWEEP_ROWS", "open_group", "run_cases", "run_sweep", "sweep_contexts"]

_SETTLE_S = 0.05  # lets the last system's threads go to sleep
_SWEEP_STEPS = 8
MIN_SWEEP_ROWS = 4 * _SWEEP_STEPS


@contextmanager
def open_group(
    plan: Plan, *, batch_size: int, max_seq_len: int | None = None
) -> Iterator[list[Entry]]:
    """Prepares every system of a plan in a process of its own and checks it.

    Args:
        plan: What is measured.
        batch_size: B.
        max_seq_len: S; None is the plan's.

    Yields:
        The entries; those with a worker are ready and right.
    """
    sizes: dict[str, Any] = {"batch_size": batch_size, "max_seq_len": max_seq_len}
    entries = [Entry.of(plan, name, **sizes) for name in plan.systems]
    with ExitStack() as stack:
        work = Path(stack.enter_context(TemporaryDirectory(prefix="llamac-bench-")))
        reference = Reference.compute(plan, work, **sizes)
        for entry in entries:
            plan.say(f"preparing {entry.setup.system}")
            stack.callback(entry.close)
            with entry.guarded(plan):
                _prepare(plan, entry, work)
                reference.check(entry)
        yield entries


def run_cases(
    plan: Plan, entries: list[Entry], cases: Sequence[tuple[int, int]], probe: Callable[[], None]
) -> None:
    """Times prompts and the steps after them, the systems taking turns.

    Args:
        plan: What is measured.
        entries: Of open_group; their results gain `cases`, `memory` and `idle_cpu_share`.
        cases: Pairs of prompt length and number of new tokens.
        probe: Called once a trial, to measure the machine under the same conditions.
    """
    for prompt_len, num_new in cases:
        for trial in range(-1, plan.trials):  # trial -1 is the warm-up
            plan.say(
                f"prompt {prompt_len}, new {num_new}: "
                + (f"trial {trial + 1} of {plan.trials}" if trial >= 0 else "warm-up")
            )
            probe()
            for entry in in_turn(entries, trial):
                prompt = random_prompt(plan, entry.setup.batch_size, prompt_len, seed=2 + trial)
                count = num_new if trial >= 0 else min(num_new, 4)
                reply = _timed(entries, entry, "trial", prompt=prompt, num_new=count)
                if reply is None or trial < 0:
                    continue
                case = _case(entry, prompt_len, num_new)
                case["prefill_s"].append(reply["prefill_s"])
                case["step_s"].append(reply["step_s"])
    for entry in entries:
        if entry.worker is not None:
            entry.result["memory"] |= entry.worker.call("memory")
        if entry.idle_s:
            entry.result["idle_cpu_share"] = entry.idle_cpu_s / entry.idle_s


def run_sweep(
    plan: Plan, entries: list[Entry], contexts: Sequence[int], probe: Callable[[], None]
) -> None:
    """Times steps at growing numbers of live tokens.

    Args:
        plan: What is measured.
        entries: Of open_group; their results gain `sweep`.
        contexts: Live tokens before the first step, ascending.
        probe: As of run_cases.
    """
    for trial in range(-1, plan.trials):
        plan.say(f"sweep to {contexts[-1]}: trial {trial + 1} of {plan.trials}")
        probe()
        for entry in entries:
            if entry.worker is not None:
                entry.worker.call("reset")
        for context in contexts:
            for entry in in_turn(entries, trial):
                reply = _timed(
                    entries,
                    entry,
                    "steps_at",
                    context=context,
                    num_steps=_SWEEP_STEPS,
                    batch_size=entry.setup.batch_size,
                )
                if reply is None or trial < 0:
                    continue
                points = entry.result.setdefault("sweep", {}).setdefault(str(context), [])
                points.extend(reply["step_s"])


def sweep_contexts(max_seq_len: int) -> list[int]:
    """Live lengths from 16 to S by factors of four, with 64 and the last that leaves room."""
    points = {16 * 4**power for power in range(8)} | {max_seq_len // 2}
    last = max_seq_len - _SWEEP_STEPS
    return sorted({point for point in points if point < last - _SWEEP_STEPS} | {last})


def _timed(
    entries: list[Entry], entry: Entry, command: str, **arguments: Any
) -> dict[str, Any] | None:
    """One command of one worker, while all others should sleep; None if the worker ended."""
    time.sleep(_SETTLE_S)
    assert entry.worker is not None
    idle = [(other, other.worker) for other in entries if other.worker and other is not entry]
    before = [worker.cpu_s() for _, worker in idle]
    begin = time.perf_counter()
    try:
        reply = entry.worker.call(command, **arguments)
    except WorkerError as error:
        entry.stop("FAIL", str(error))
        reply = None
    elapsed = time.perf_counter() - begin
    for (other, worker), used in zip(idle, before, strict=True):
        other.idle_cpu_s += worker.cpu_s() - used
        other.idle_s += elapsed
    return reply


def _case(entry: Entry, prompt_len: int, num_new: int) -> dict[str, Any]:
    cases = entry.result.setdefault("cases", [])
    for case in cases:
        if (case["prompt_len"], case["num_new"]) == (prompt_len, num_new):
            return case
    cases.append({"prompt_len": prompt_len, "num_new": num_new, "prefill_s": [], "step_s": []})
    return cases[-1]


def _prepare(plan: Plan, entry: Entry, work: Path) -> None:
    """Builds, starts and warms a system; with `cold`, once more before that, from nothing."""
    result = entry.result
    entry.setup, build_s = build_artifact(entry.setup, plan.cache, plan.logs)
    if build_s is not None:
        result["build_s"] = build_s
    environment: dict[str, str] = {}
    if plan.cold and SYSTEMS[entry.setup.system].compiles:
        # The start that is timed afterwards finds what this one leaves there.
        empty = work / f"cache-{entry.setup.system}"
        environment = {
            "XDG_CACHE_HOME": str(empty),
            "TORCHINDUCTOR_CACHE_DIR": str(empty / "inductor"),
        }
        result["cold_phases"] = entry.start(plan, environment)["phases"]
        entry.close()
    used_before = device_used_bytes()
    reply = entry.start(plan, environment)
    result |= {key: reply[key] for key in ("phases", "precision", "facts")}
    result["memory"] = {}
    if used_before is not None and entry.setup.device == "cuda":
        result["memory"]["device_bytes"] = (device_used_bytes() or 0) - used_before
