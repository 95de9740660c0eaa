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
from .reference import Reference
from .systems import PEERS, SYSTEMS

__all__ = ["MIN_SWEEP_ROWS", "measure_cases", "measure_sweeps", "sweep_contexts"]

_SETTLE_S = 0.05  # lets the last system's threads go to sleep
_SWEEP_STEPS = 8
MIN_SWEEP_ROWS = 4 * _SWEEP_STEPS


def measure_cases(
    plan: Plan, *, batch_size: int, cases: Sequence[tuple[int, int]], probe: Callable[[], int]
) -> list[dict[str, Any]]:
    """Times prompts and the steps after them, all systems side by side.

    Ours are also timed from end to end, through the scheduler and with sampling.

    Args:
        plan: What is measured.
        batch_size: B.
        cases: Pairs of prompt length and number of new tokens.
        probe: Called once a trial, to measure the machine under the same conditions; returns the
            measurement's index, which the trial is recorded with.

    Returns:
        A result for each system, with `cases`, `memory` and `idle_cpu_share`.
    """
    entries = [Entry.of(plan, name, batch_size=batch_size) for name in plan.systems]
    with TemporaryDirectory(prefix="llamac-bench-") as work:
        reference = Reference(plan, Path(work), batch_size=batch_size)
        with _open_group(plan, entries, [reference] * len(entries), Path(work)):
            for prompt_len, num_new in cases:
                _run_case(plan, entries, prompt_len, num_new, probe)
            _finish(entries)
    return [entry.result for entry in entries]


def measure_sweeps(
    plan: Plan, *, lengths: Sequence[int], probe: Callable[[], int]
) -> dict[str, list[dict[str, Any]]]:
    """Times steps at growing numbers of live tokens, in caches of several lengths.

    The lengths are what is compared, so the caches of one system are timed side by side, and the
    systems one after the other.

    Args:
        plan: What is measured; batch 1.
        lengths: S.
        probe: As of measure_cases.

    Returns:
        By length, a result for each system, with `sweep`.
    """
    results: dict[str, list[dict[str, Any]]] = {str(length): [] for length in lengths}
    with ExitStack() as stack:
        folders = [
            Path(stack.enter_context(TemporaryDirectory(prefix="llamac-bench-"))) for _ in lengths
        ]
        references = [
            Reference(plan, folder, batch_size=1, max_seq_len=length)
            for folder, length in zip(folders, lengths, strict=True)
        ]
        for name in plan.systems:
            entries = [Entry.of(plan, name, batch_size=1, max_seq_len=rows) for rows in lengths]
            with _open_group(plan, entries, references, folders[0]):
                _run_sweep(plan, entries, probe)
                _finish(entries)
            for entry in entries:
                results[str(entry.setup.max_seq_len)].append(entry.result)
    return results


def sweep_contexts(max_seq_len: int) -> list[int]:
    """Live lengths from 16 to S by factors of four, with 64 and the last that leaves room."""
    points = {16 * 4**power for power in range(8)} | {max_seq_len // 2}
    last = max_seq_len - _SWEEP_STEPS
    return sorted({point for point in points if point < last - _SWEEP_STEPS} | {last})


@contextmanager
def _open_group(
    plan: Plan, entries: list[Entry], references: Sequence[Reference], work: Path
) -> Iterator[None]:
    """Starts every entry in a process of its own and checks it; what has a worker is right."""
    with ExitStack() as stack:
        for entry, reference in zip(entries, references, strict=True):
            plan.say(f"preparing {entry.name}")
            stack.callback(entry.close)
            with entry.guarded(plan):
                _prepare(plan, entry, work)
                reference.check(entry)
        yield


def _run_case(
    plan: Plan, entries: list[Entry], prompt_len: int, num_new: int, probe: Callable[[], int]
) -> None:
    for trial in range(-1, plan.trials):  # trial -1 is the warm-up
        plan.say(
            f"prompt {prompt_len}, new {num_new}: "
            + (f"trial {trial + 1} of {plan.trials}" if trial >= 0 else "warm-up")
        )
        limits = probe()
        for entry in in_turn(entries, trial):
            prompt = random_prompt(plan, entry.setup.batch_size, prompt_len, seed=2 + trial)
            count = num_new if trial >= 0 else min(num_new, 4)
            reply = _timed(plan, entries, entry, "trial", prompt=prompt, num_new=count)
            sampled = None
            if reply is not None and entry.setup.system not in PEERS:
                request = {"prompts": prompt, "num_new": count, "seed": 2 + trial}
                sampled = _timed(plan, entries, entry, "generate", **request)
            if reply is None or trial < 0:
                continue
            case = _case(entry, prompt_len, num_new)
            case["limits"].append(limits)
            case["prefill_s"].append(reply["prefill_s"])
            case["step_s"].append(reply["step_s"])
            if sampled is not None:
                case.setdefault("sampled", {"trials": []})["trials"].append(sampled)


def _run_sweep(plan: Plan, entries: list[Entry], probe: Callable[[], int]) -> None:
    contexts = {entry.name: sweep_contexts(entry.setup.max_seq_len) for entry in entries}
    for trial in range(-1, plan.trials):
        plan.say(
            f"{entries[0].setup.system}, live context: "
            + (f"trial {trial + 1} of {plan.trials}" if trial >= 0 else "warm-up")
        )
        limits = probe()
        for entry in in_turn(entries, trial):
            _timed(plan, entries, entry, "reset")
            if trial >= 0:
                entry.result.setdefault("limits", []).append(limits)
        for context in sorted({point for points in contexts.values() for point in points}):
            for entry in in_turn(entries, trial):
                if context not in contexts[entry.name]:
                    continue
                step = {"context": context, "num_steps": _SWEEP_STEPS, "batch_size": 1}
                reply = _timed(plan, entries, entry, "steps_at", **step)
                if reply is None or trial < 0:
                    continue
                points = entry.result.setdefault("sweep", {}).setdefault(str(context), [])
                points.append(reply["step_s"])


def _finish(entries: list[Entry]) -> None:
    for entry in entries:
        if entry.worker is not None:
            entry.result["memory"] |= entry.worker.call("memory")
            facts = entry.result["facts"] = entry.worker.call("facts")
            if facts.get("recompiles") or facts.get("steps") != facts.get("graph_replays"):
                entry.stop("FAIL", f"a step was compiled or not replayed after warm-up: {facts}")
        if entry.idle_s:
            entry.result["idle_cpu_share"] = entry.idle_cpu_s / entry.idle_s


def _timed(
    plan: Plan, entries: list[Entry], entry: Entry, command: str, **arguments: Any
) -> dict[str, Any] | None:
    """One command of one worker, while all others should sleep; None if the worker ended."""
    time.sleep(_SETTLE_S)
    assert entry.worker is not None
    idle = [(other, other.worker) for other in entries if other.worker and other is not entry]
    before = [worker.cpu_s() for _, worker in idle]
    begin = time.perf_counter()
    reply = None
    with entry.guarded(plan):
        reply = entry.worker.call(command, **arguments)
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
    raw: dict[str, Any] = {"limits": [], "prefill_s": [], "step_s": []}
    cases.append({"prompt_len": prompt_len, "num_new": num_new, **raw})
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
