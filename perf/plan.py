"""What is to be measured, and the state of each system while it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.backend import BackendUnavailableError
from .artifacts import Model
from .process import Worker, WorkerError
from .setup import Setup
from .systems import SYSTEMS

__all__ = ["Entry", "Plan", "in_turn", "random_prompt"]


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
        bundle, rows = self.model.bundle, max_seq_len or self.max_seq_len
        chosen = SYSTEMS[system]
        given = bundle is not None and system.startswith("ort-") and not chosen.on_quantized
        return Setup(
            system=system,
            model=str(self.model.folder),
            dtype=self.dtype,
            device=chosen.device or self.device,
            threads=self.threads,
            batch_size=batch_size,
            max_seq_len=rows,
            prefill_len=min(self.prefill_len, rows),
            artifact=str(bundle) if given else None,
            options=self.options,
        )


@dataclass(slots=True, kw_only=True)
class Entry:
    """One system in a run.

    Attributes:
        setup: Its sizes.
        result: What is known about it, ready for JSON; `status` is "ok", "FAIL" or "skipped".
        worker: Its process, while it may be timed.
        idle_cpu_s: CPU time it took while others were timed.
        idle_s: How long that was.
    """

    setup: Setup
    result: dict[str, Any]
    worker: Worker | None = None
    idle_cpu_s: float = field(default=0.0)
    idle_s: float = field(default=0.0)

    @property
    def name(self) -> str:
        """The system's, with its cache's length."""
        return f"{self.setup.system}-{self.setup.max_seq_len}"

    @classmethod
    def of(
        cls, plan: Plan, system: str, *, batch_size: int, max_seq_len: int | None = None
    ) -> Entry:
        """Describes a system that hasn't been started."""
        return cls(
            setup=plan.setup(system, batch_size=batch_size, max_seq_len=max_seq_len),
            result={"name": system, "batch_size": batch_size, "status": "ok"}
            | ({"weights": weights} if (weights := SYSTEMS[system].weights) else {}),
        )

    def start(self, plan: Plan, environment: dict[str, str] | None = None) -> dict[str, Any]:
        """Starts its process and makes it ready; returns what `prepare` answers."""
        self.worker = Worker(self.name, plan.logs, threads=plan.threads, environment=environment)
        return self.worker.call("prepare", setup=self.setup)

    def close(self) -> None:
        """Ends its process."""
        if self.worker is not None:
            self.worker.close()
            self.worker = None

    def stop(self, status: str, message: str) -> None:
        """Ends it for good, with a reason."""
        self.result |= {"status": status, "message": message}
        self.close()

    @contextmanager
    def guarded(self, plan: Plan) -> Iterator[None]:
        """Stops it where its system is missing or its process breaks in the block."""
        try:
            yield
        except BackendUnavailableError as error:
            self.stop("skipped", str(error))
        except WorkerError as error:
            self.stop("FAIL", str(error))
        if self.result["status"] != "ok":
            plan.say(f"{self.setup.system}: {self.result['status']}: {self.result['message']}")


def in_turn(entries: list[Entry], trial: int) -> list[Entry]:
    """The entries that weren't stopped; another one begins each trial.

    So nobody always runs after the same neighbour.

    Args:
        entries: All of them.
        trial: Number of the trial.

    Returns:
        The order.
    """
    running = [entry for entry in entries if entry.result["status"] == "ok"]
    shift = trial % len(running) if running else 0
    return running[shift:] + running[:shift]


def random_prompt(plan: Plan, batch_size: int, length: int, *, seed: int) -> list[list[int]]:
    """Draws ids, [B, length] as lists."""
    generator = np.random.default_rng(seed)
    shape = (batch_size, length)
    return generator.integers(0, plan.model.config.vocab_size, shape).tolist()
