"""The process of its own that each measured system runs in: `python -m llamac.perf.worker`.

One JSON object a line on standard input and output; whatever libraries print goes to standard
error. A system's threads, allocator and memory are then nobody else's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.backend import BackendUnavailableError
from .setup import Runner, Setup

if TYPE_CHECKING:
    from .limit_probe import LimitProbe

__all__ = ["main"]

_MAX_REPLAYED = 4  # decode steps of a warm-up

Command = Callable[[dict[str, Any]], dict[str, Any]]


class _Worker:
    """Answers commands; `prepare` comes first.

    Args:
        start_s: When the process was ready to import a system, on the clock of `time.time`.
    """

    def __init__(self, start_s: float) -> None:
        self._start_s = start_s
        self._runner: Runner | None = None
        self._probe: LimitProbe | None = None

    @property
    def runner(self) -> Runner:
        assert self._runner is not None, "prepare comes first"
        return self._runner

    def build(self, request: dict[str, Any]) -> dict[str, Any]:
        """Writes a system's artifact."""
        from .systems import SYSTEMS

        setup = Setup(**request["setup"])
        write = SYSTEMS[setup.system].build
        assert write is not None
        begin = time.perf_counter()
        write(setup, Path(request["out"]))
        return {"build_s": time.perf_counter() - begin}

    def quantize(self, request: dict[str, Any]) -> dict[str, Any]:
        """Writes a quantized copy of a checkpoint."""
        from ..model.checkpoint import open_checkpoint
        from ..model.quantization import parse_recipe, quantize_checkpoint

        begin = time.perf_counter()
        checkpoint = open_checkpoint(request["setup"]["model"])
        recipe = parse_recipe(request["weights"])
        quantize_checkpoint(checkpoint, Path(request["out"]), recipe, calibration=None)
        return {"build_s": time.perf_counter() - begin}

    def prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        """Loads a system."""
        begin = time.perf_counter()
        from .systems import SYSTEMS

        setup = Setup(**request["setup"])
        harness_s = time.perf_counter() - begin
        runner = SYSTEMS[setup.system].open(setup)
        self._runner = runner
        phases = {**runner.phases, "harness_s": harness_s}
        facts = {"precision": runner.precision, "facts": runner.facts}
        return {"start_s": self._start_s, "phases": phases, **facts}

    def trial(self, request: dict[str, Any]) -> dict[str, Any]:
        """Times a prompt and the steps after it.

        A step's time includes choosing the next ids and ends with them known.
        """
        ids = np.array(request["prompt"], dtype=np.int64)
        self.runner.reset()
        begin = time.perf_counter()
        ids = _choose(self.runner.extend(ids))
        prefill_s = time.perf_counter() - begin
        return {"prefill_s": prefill_s, "step_s": self._steps(ids, request["num_new"] - 1)}

    def generate(self, request: dict[str, Any]) -> dict[str, Any]:
        """Times requests from end to end, sampling included."""
        from .systems import BackendRunner

        assert isinstance(self.runner, BackendRunner)
        sizes = {name: request[name] for name in ("num_new", "seed")}
        return self.runner.generate(request["prompts"], **sizes)

    def facts(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the system counted so far, among others."""
        return self.runner.facts

    def steps_at(self, request: dict[str, Any]) -> dict[str, Any]:
        """Times steps with a given number of live tokens before the first."""
        self.runner.seek(request["context"])
        ids = np.zeros(request["batch_size"], dtype=np.int64)
        return {"step_s": self._steps(ids, request["num_steps"])}

    def reset(self, request: dict[str, Any]) -> dict[str, Any]:
        """Empties the cache."""
        self.runner.reset()
        return {}

    def check(self, request: dict[str, Any]) -> dict[str, Any]:
        """Writes the logits after a prompt and after each id that follows it, [M, B, V].

        Where no ids are given, each is the one that the logits before it rank highest.
        """
        ids = np.array(request["prompt"], dtype=np.int64)
        forced = request.get("forced")
        self.runner.reset()
        logits = [self.runner.extend(ids).copy()]
        fed: list[list[int]] = []
        for step in range(request["num_new"] - 1):
            fed.append(forced[step] if forced else _choose(logits[-1]).tolist())
            logits.append(self.runner.decode(np.array(fed[-1], dtype=np.int64)).copy())
        np.save(request["out"], np.stack(logits).astype(np.float32, copy=False))
        return {"forced": fed}

    def limits(self, request: dict[str, Any]) -> dict[str, Any]:
        """Measures the machine's rates."""
        from .limit_probe import LimitProbe, ProbeSize

        if self._probe is None:
            names = ("device", "threads")
            self._probe = LimitProbe(
                **{name: request[name] for name in names}, size=ProbeSize(**request["size"])
            )
        return self._probe.measure()

    def memory(self, request: dict[str, Any]) -> dict[str, Any]:
        """Reads this process's memory from the kernel."""
        lines = Path("/proc/self/status").read_text().splitlines()
        sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in _sizes(lines)}
        return {"peak_rss_bytes": sizes["VmHWM"], "anonymous_bytes": sizes["RssAnon"]}

    def _steps(self, ids: NDArray[np.int64], count: int) -> list[float]:
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            ids = _choose(self.runner.decode(ids))
            times.append(time.perf_counter() - begin)
        return times


def _choose(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    return logits.argmax(axis=-1)


def _sizes(lines: list[str]) -> list[tuple[str, str, str]]:
    return [line.partition(":") for line in lines if line.endswith(" kB")]


def main() -> None:
    """Answers commands until standard input ends."""
    worker = _Worker(time.time())
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like a reply
    for line in sys.stdin:
        request = json.loads(line)
        command: Command = getattr(worker, request["command"])
        try:
            reply = command(request)
        except BackendUnavailableError as error:
            reply = {"refused": " ".join(str(error).split())}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
