"""A model on several processes computes what one computes, and none outlives another."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_foreign_formats import CONFIG
from test_parallel import write_source

from llamac.model.checkpoint.random_weights import write_random_checkpoint

TESTS = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
KINDS = ["hf", "mha", "mqa", "tied", "biased", "meta 1", "meta 2", "lit", "int8", "int4"]


def compare_cases(folder: Path, world_size: int, cases: list[dict[str, Any]]) -> list[dict]:
    """Runs cases one after the other on the same ranks."""
    asked, told = folder / "cases.json", folder / f"{world_size}.json"
    asked.write_text(json.dumps(cases))
    words = [*TORCHRUN, str(world_size), str(TESTS / "rank_cases.py"), str(asked), str(told)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(told.read_text())


def case(folder: Path, kind: str, *, dtype: str = "float32", compile: bool = False) -> dict:
    folder.mkdir()
    if kind in ("mha", "mqa"):
        config = replace(CONFIG, num_key_value_heads=8 if kind == "mha" else 1)
        write_random_checkpoint(None, folder / "hf", config=config, dtype="float32")
        source = folder / "hf"
    else:
        source = write_source(folder, kind)
    return {"source": str(source), "dtype": dtype, "compile": compile}


@pytest.fixture(scope="module")
def eager_results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict]:
    folder = tmp_path_factory.mktemp("cases")
    cases = [case(folder / kind, kind) for kind in KINDS]
    cases.append(case(folder / "bfloat16", "hf", dtype="bfloat16"))
    found = {}
    for world_size, chosen in ((2, cases), (4, [cases[0]])):
        results = compare_cases(folder, world_size, chosen)
        found |= {(k, world_size): r for k, r in zip([*KINDS, "bfloat16"], results, strict=False)}
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "world_size"), [*((kind, 2) for kind in KINDS), ("hf", 4)])
def test_ranks_compute_what_one_process_computes(eager_results, kind: str, world_size: int):
    """Of 4 ranks two have the same key/value head each; of 2 those of `mqa`."""
    result = eager_results[kind, world_size]
    assert result["error"] < 1e-4
    assert result["rows_error"] < 1e-4
    assert result["same_tokens"]
    assert [len(ids) for ids in result["tokens"]] == [14, 14, 14]
    assert len(set(map(tuple, result["tokens"]))) == 3


@pytest.mark.slow
def test_ranks_in_bfloat16_are_within_its_tolerance(eager_results):
    result = eager_results["bfloat16", 2]
    assert result["passed"]
    assert 1e-4 < result["error"]  # it was computed in 16 bits


@pytest.mark.slow
def test_compiled_ranks_compute_the_same_and_start_again_from_disk(tmp_path: Path):
    cases = [case(tmp_path / kind, kind, compile=True) for kind in ("biased", "int8")]
    for from_disk in (False, True):
        for result in compare_cases(tmp_path, 2, cases):
            assert result["error"] < 1e-4
            assert result["same_tokens"]
            assert not result["recompiled"]
            assert result["from_disk"] is from_disk
