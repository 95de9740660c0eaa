"""On a GPU: that a compiled decode step is one graph replay, and how near its time is to the limit.

    python -m llamac.perf.gpu_steps [CHECKPOINT|PRESET]     default: llama-3-8b, random weights

Prints one JSON object; ends with 1 if anything was compiled after warm-up or a step was not one
replay.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime
from typing import Any

import numpy as np

from ..runtime.cache_folder import cache_folder
from .artifacts import find_model
from .machine import describe_machine, find_commit, package_versions
from .roofline import LimitProbe, Limits, best_limits, decode_work

_MAX_SEQ_LEN, _PROMPT_LEN, _NUM_NEW, _TRIALS = 512, 128, 32, 5
_DTYPE, _ITEM_BYTES = "bfloat16", 2


def main(name: str = "llama-3-8b") -> int:
    """Measures one model.

    Args:
        name: A checkpoint or a preset.

    Returns:
        The process's exit code.
    """
    from torch._dynamo.utils import counters

    from ..model.load import load_backend

    model = find_model(
        name,
        dtype=_DTYPE,
        cache=cache_folder("bench"),
        announce=lambda text: print(text, file=sys.stderr),
    )
    loaded = load_backend(
        model.folder,
        device="cuda",
        dtype=_DTYPE,
        max_seq_len=_MAX_SEQ_LEN,
        prefill_len=_PROMPT_LEN,
    )
    backend, startup = loaded.backend, loaded.backend.startup
    replays = _count_replays(backend._bound_decode)
    probe = LimitProbe(device="cuda", threads=1, num_bytes=4 << 30, matrix_size=8192)
    traced = counters["stats"]["unique_graphs"]
    prefill_s: list[float] = []
    step_s: list[float] = []
    samples: list[dict[str, Any]] = []
    rng = np.random.default_rng(0)
    for trial in range(-1, _TRIALS):  # trial -1 is the warm-up
        samples.append(probe.measure())
        prompt = rng.integers(0, model.config.vocab_size, _PROMPT_LEN).tolist()
        begin = time.perf_counter()
        best = backend.prefill(0, prompt, 0).argmax()
        times = [time.perf_counter() - begin]
        for position in range(_PROMPT_LEN, _PROMPT_LEN + _NUM_NEW):
            begin = time.perf_counter()
            best = backend.decode(np.array([best]), np.array([position]))[0].argmax()
            times.append(time.perf_counter() - begin)
        if trial >= 0:
            prefill_s.append(times[0])
            step_s += times[1:]
    num_steps = (_TRIALS + 1) * _NUM_NEW
    recompiles = counters["stats"]["unique_graphs"] - traced
    limits: Limits = best_limits(samples)
    work = decode_work(
        model.config,
        item_bytes=_ITEM_BYTES,
        batch_size=1,
        context=_PROMPT_LEN + _NUM_NEW // 2,
        max_seq_len=_MAX_SEQ_LEN,
    )
    tpot_s = float(np.median(step_s))
    result = {
        "command": ["python", "-m", "llamac.perf.gpu_steps", name],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": find_commit(),
        "machine": describe_machine(),
        "versions": package_versions(),
        "model": name,
        "dtype": _DTYPE,
        "load_s": loaded.load_s,
        "compile_s": startup.compile_s,
        "cache_hit": startup.cache_hit,
        "tpot_s": tpot_s,
        "tpot_p10_p90_s": np.percentile(step_s, (10, 90)).tolist(),
        "prefill_s": float(np.median(prefill_s)),
        "read_bytes_per_s": limits.read_bytes_per_s,
        "needed_bytes": work.needed_bytes,
        "share_of_read_bandwidth": work.needed_bytes / limits.read_bytes_per_s / tpot_s,
        "steps": num_steps,
        "graph_replays": len(replays),
        "recompiles": recompiles,
    }
    print(json.dumps(result, indent=1))
    return int(recompiles > 0 or len(replays) != num_steps)


def _count_replays(bound: Any) -> list[None]:
    """Grows by one with every replay of the step's graph."""
    replays: list[None] = []
    replay = bound._graph.replay

    class Counted:
        def replay(self) -> None:
            replays.append(None)
            replay()

    bound._graph = Counted()
    return replays


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
