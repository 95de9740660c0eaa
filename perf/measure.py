"""Runs several systems side by side: checked first, then timed in turns."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..runtime.backend import BackendUnavailableError
from ..runtime.compare import compare_logits
from .artifacts import Model, build_artifact
from .machine import device_used_bytes
from .process import Worker, WorkerError
from .setup import Setup
from .systems import SYSTEMS

__all__ = ["Entry", "Plan", "open_group", "run_cases", "run_sweep", "sweep_contexts"]

_NUM_CHECKED = 16  # tokens compared with the reference's
_SETTLE_S = 0.05  # lets the last system's threads go to sleep
_SWEEP_STEPS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be measured.

    Attributes:
        model: The checkpoint.
        systems: Names, in the order of the report.
        device: Of the systems that can choose: "cpu" or "cuda".
        dtype: Of the systems that can choose.
        threads: CPU threads.
        max_seq_len: S.
        prefill_len: P.
        trials: Timed repetitions of everything.
        cold: Also measure getting ready with an empty cache.
        cache: Artifacts and random weights.
        logs: The workers' standard error.
        options: The systems' own options.
        say: Told what is being done.
    """

    model: Model
    systems: tuple[str, ...]
    device: str
    dtype: str
    threads: int
    max_seq_len: int
    prefill_len: int
    trials: int
    cold: bool
    cache: Path
    logs: Path
    options: dict[str, str]
    say: Callable[[str], None]

    def setup(self, system: str, *, batch_size: int, max_seq_len: int | None = None) -> Setup:
        """The sizes of one system."""
        bundle = self.model.bundle
        return Setup(
            system=system,
            model=str(self.model.folder),
            dtype=self.dtype,
            device=SYSTEMS[system].device or self.device,
            threads=self.threads,
            batch_size=batch_size,
            max_seq_len=max_seq_len or self.max_seq_len,
            prefill_len=self.prefill_len,
            artifact=str(bundle) if bundle and system.startswith("ort-") else None,
            options=self.options,
        )


@dataclass(slots=True, kw_only=True)
class Entry:
    """One system in a run.

    Attributes:
        setup: Its sizes.
        result: What is known about it, ready for JSON; `status` is "ok", "FAIL" or "skipped".
        worker: Its process, while it may be timed.
    """

    setup: Setup
    result: dict[str, Any]
    worker: Worker | None = None
    idle_cpu_s: float = field(default=0.0)
    idle_s: float = field(default=0.0)

    def stop(self, status: str, message: str) -> None:
        """Ends it with a reason."""
        self.result |= {"status": status, "message": message}
        if self.worker is not None:
            self.worker.close()
            self.worker = None


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
    with ExitStack() as stack:
        work = Path(stack.enter_context(TemporaryDirectory(prefix="llamac-bench-")))
        plan.say("computing the float32 reference")
        reference = _Reference.compute(plan, batch_size, max_seq_len, work)
        entries = []
        for name in plan.systems:
            plan.say(f"preparing {name}")
            setup = plan.setup(name, batch_size=batch_size, max_seq_len=max_seq_len)
            entry = Entry(setup=setup, result={"name": name, "batch_size": batch_size})
            entries.append(entry)
            stack.callback(lambda e=entry: e.worker.close() if e.worker else None)
            try:
                _prepare(plan, entry, work)
                reference.check(entry)
            except BackendUnavailableError as error:
                entry.stop("skipped", str(error))
            except WorkerError as error:
                entry.stop("FAIL", str(error))
            if entry.result["status"] != "ok":
                plan.say(f"{name}: {entry.result['status']}: {entry.result['message']}")
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
            for entry in _in_turn(entries, trial):
                prompt = _prompt(plan, entry.setup.batch_size, prompt_len, seed=2 + trial)
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
            for entry in _in_turn(entries, trial):
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


def _in_turn(entries: list[Entry], trial: int) -> list[Entry]:
    """Another one begins each trial, so that nobody always runs after the same neighbour."""
    running = [entry for entry in entries if entry.worker is not None]
    shift = trial % len(running) if running else 0
    return running[shift:] + running[:shift]


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
        empty = work / f"cache-{entry.setup.system}"
        environment = {
            "XDG_CACHE_HOME": str(empty),
            "TORCHINDUCTOR_CACHE_DIR": str(empty / "inductor"),
        }
        shutil.rmtree(empty, ignore_errors=True)
        with _start(plan, entry, environment) as worker:
            result["cold_phases"] = worker.call("prepare", setup=entry.setup)["phases"]
    used_before = device_used_bytes()
    entry.worker = _start(plan, entry, environment)
    reply = entry.worker.call("prepare", setup=entry.setup)
    result |= {key: reply[key] for key in ("phases", "precision", "facts")}
    result["memory"] = {}
    if used_before is not None and entry.setup.device == "cuda":
        result["memory"]["device_bytes"] = (device_used_bytes() or 0) - used_before


def _start(plan: Plan, entry: Entry, environment: dict[str, str]) -> Worker:
    return Worker(entry.setup.system, plan.logs, threads=plan.threads, environment=environment)


def _prompt(plan: Plan, batch_size: int, length: int, *, seed: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    shape = (batch_size, length)
    return generator.integers(0, plan.model.config.vocab_size, shape).tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reference:
    """What the eager float32 model answers, on the ids it chose itself."""

    prompt: list[list[int]]
    forced: list[list[int]]
    logits: Path
    num_new: int

    @classmethod
    def compute(
        cls, plan: Plan, batch_size: int, max_seq_len: int | None, work: Path
    ) -> _Reference:
        setup = plan.setup("eager", batch_size=batch_size, max_seq_len=max_seq_len)
        rows = setup.max_seq_len
        num_new = min(_NUM_CHECKED, max(rows // 2, 1))
        # Over the edge of a chunk where there is room for that.
        prompt_len = max(min(setup.prefill_len + 3, rows - num_new), 1)
        prompt = _prompt(plan, batch_size, prompt_len, seed=1)
        out = work / "reference.npy"
        request = {"prompt": prompt, "num_new": num_new, "out": str(out)}
        setup = replace(setup, dtype="float32")
        with Worker("reference", plan.logs, threads=plan.threads) as worker:
            worker.call("prepare", setup=setup)
            forced = worker.call("check", **request)["forced"]
        return cls(prompt=prompt, forced=forced, logits=out, num_new=num_new)

    def check(self, entry: Entry) -> None:
        """Compares an entry's logits; a wrong one loses its worker."""
        assert entry.worker is not None
        out = self.logits.with_name("candidate.npy")
        entry.worker.call(
            "check", prompt=self.prompt, forced=self.forced, num_new=self.num_new, out=str(out)
        )
        verdict = compare_logits(np.load(self.logits), np.load(out), entry.result["precision"])
        entry.result["check"] = {"error": verdict.relative_error, "message": verdict.message}
        entry.result["status"] = "ok"
        if not verdict.passed:
            entry.stop("FAIL", f"wrong logits: {verdict.message}")
