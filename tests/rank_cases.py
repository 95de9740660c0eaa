"""Started once for each rank: computes models together, and compares with one process.

Reads a JSON list of cases, writes one of how each compares.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from torch._dynamo.utils import counters

from llamac.model import TorchBackend
from llamac.model.checkpoint import open_checkpoint
from llamac.model.distributed import group as group_module
from llamac.model.distributed.backend import ParallelBackend, _Call, follow
from llamac.model.distributed.group import RankGroup
from llamac.model.load import load_part
from llamac.runtime.backend import Backend, BackendUnavailableError
from llamac.runtime.compare import compare_logits
from llamac.runtime.launcher import launched_rank
from llamac.runtime.request import Request
from llamac.runtime.sampling import SamplingParams
from llamac.runtime.scheduler import generate

OPTIONS = {
    "device": "cpu",
    "kv_dtype": None,
    "num_guesses": 2,
    "mixed_lens": (5,),
    "batch_size": 2,
    "max_seq_len": 24,
    "prefill_len": 8,
    "threads": 1,
    "all_logits": True,
}
IDS = [int(word) % 90 for word in np.random.Philox(5).random_raw(20)]
GREEDY, SEEDED = SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, seed=7)


def logits_of(backend: Backend) -> np.ndarray:
    """[steps, V]: a whole chunk's, and of tokens at different positions of two slots."""
    rows = [backend.score(0, IDS[:8], 0), backend.prefill(1, IDS[3:8], 0)[None]]
    for step in range(4):
        ids, positions = np.array(IDS[8 + step : 10 + step]), np.array([8, 5]) + step
        rows.append(backend.decode(ids, positions).copy())
    if backend.shape.num_guesses:
        several = backend.extend(np.array([IDS[12:15], IDS[13:16]]), np.array([12, 9]))
        rows.append(several.reshape(6, -1).copy())
    slots, ids, positions = np.array([0, 1, 1, 1]), np.array(IDS[15:19]), np.array([15, 12, 13, 14])
    rows.append(backend.mix(slots, ids, positions, [0, 3]).copy())
    return np.concatenate(rows)


def run(backend: Backend) -> dict[str, Any]:
    logits = logits_of(backend)
    kept = backend.read_rows(0, 9)
    backend.write_rows(1, kept)
    np.testing.assert_array_equal(backend.read_rows(1, 9), kept)
    requests = [
        Request(prompt_ids=tuple(IDS[:n]), max_new_tokens=14, sampling=sampling)
        for n, sampling in ((11, GREEDY), (3, SEEDED), (5, GREEDY))
    ]
    texts = [done.ids for done in generate(backend, None, requests)]
    return {"logits": logits, "rows": kept, "tokens": texts}


def compare(found: dict[str, Any], expected: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Of the same ids: a bfloat16 model's cache rows and tokens needn't be the float32 model's."""
    comparison = compare_logits(expected["logits"], found["logits"], dtype)
    largest = np.abs(expected["rows"]).max()
    return {
        "passed": comparison.passed,
        "error": comparison.relative_error,
        "rows_error": float(np.abs(found["rows"] - expected["rows"]).max() / largest),
        "same_tokens": found["tokens"] == expected["tokens"],
        "tokens": found["tokens"],
    }


def lead(case: dict[str, Any], own: TorchBackend, group: RankGroup) -> dict[str, Any]:
    checkpoint = open_checkpoint(case["source"])
    heads = checkpoint.config.num_key_value_heads
    together = ParallelBackend(own, group, num_kv_heads=heads)
    before = dict(counters["stats"])
    found = run(together)
    recompiled = dict(counters["stats"]) != before or bool(counters["graph_break"])
    together._send(_Call.STOP, 0, 0, ())
    options = {**OPTIONS, "num_guesses": own.shape.num_guesses}
    alone, _ = load_part(checkpoint, **{**options, "dtype": "float32", "compile": False})
    facts = {"recompiled": recompiled, "from_disk": own.startup.cache_hit}
    return {**compare(found, run(alone), case["dtype"]), **facts}


def get_stuck(own: TorchBackend, group: RankGroup, *, is_first: bool) -> dict[str, Any]:
    """The other rank lives, and does nothing."""
    if not is_first:
        time.sleep(8)
        os._exit(0)
    together = ParallelBackend(own, group, num_kv_heads=1)
    said = []
    for _ in range(2):
        try:
            together.prefill(0, IDS[:8], 0)
        except BackendUnavailableError as error:
            said.append(str(error))
    return {"said": said}


def main() -> None:
    launched = launched_rank()
    assert launched is not None
    group = RankGroup.lead(launched[1], {}) if launched[0] == 0 else RankGroup.join()[0]
    group.connect("cpu")
    results = []
    cases = json.loads(Path(sys.argv[1]).read_text())
    if any(case.get("stuck") for case in cases):
        group_module._STEP = timedelta(seconds=2)
    for case in cases:
        options: Any = {**OPTIONS, "dtype": case["dtype"], "compile": case["compile"]}
        options["num_guesses"] = 0 if case["compile"] else OPTIONS["num_guesses"]
        own, _ = load_part(open_checkpoint(case["source"]), group, **options)
        if case.get("stuck"):
            results.append(get_stuck(own, group, is_first=launched[0] == 0))
        elif launched[0] == 0:
            results.append(lead(case, own, group))
        else:
            follow(own, group)
    if launched[0] == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    group.close()


if __name__ == "__main__":
    main()
