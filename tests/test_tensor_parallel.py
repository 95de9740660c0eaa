"""A model on several processes computes what one computes, and none outlives another."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from safetensors.torch import load_file, save_file
from test_foreign_formats import CONFIG
from test_parallel import write_source
from test_run_cli import export_tiny

from llamac.model.checkpoint.random_weights import write_random_checkpoint
from llamac.model.load import DEMO_FOLDER
from llamac.runtime.cache_folder import cache_root
from llamac.runtime.load import load
from serving import serving

TESTS = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
KINDS = ["hf", "mha", "mqa", "tied", "biased", "meta 1", "meta 2", "lit", "int8", "int4"]


def compare_cases(folder: Path, world_size: int, cases: list[dict[str, Any]]) -> list[dict]:
    """Runs cases one after the other on the same ranks."""
    asked, told = folder / "cases.json", folder / f"{world_size}.json"
    asked.write_text(json.dumps(cases))
    words = [*TORCHRUN, str(world_size), str(TESTS / "rank_cases.py"), str(asked), str(told)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=400, check=False)
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
    """Also where a rank lacks a step that the other has, as after an interrupted start."""
    cases = [case(tmp_path / "int8", "int8 biased", compile=True)]
    others, from_disk = decode_steps(), []
    for _ in range(3):
        (result,) = compare_cases(tmp_path, 2, cases)
        assert result["error"] < 1e-4
        assert result["same_tokens"]
        assert not result["recompiled"]
        from_disk.append(result["from_disk"])
        one, other = decode_steps() - others
        if from_disk[-1]:
            one.unlink()
    assert from_disk[:2] == [False, True]
    assert other.exists()


def decode_steps() -> set[Path]:
    return {*(cache_root() / "inductor").glob("decode-*.step")}


STORY = ("-p", "Once upon a time", "--seed", "0", "--max-new-tokens", "60", "--prefill-len", "16")
LLAMAC = [sys.executable, "-m", "llamac.runtime.cli"]


def run_llamac(*words: str, start: list[str] = LLAMAC) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*start, *words], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_the_demo_tells_one_story_however_it_is_started():
    alone = run_llamac("generate", *STORY, "--backend", "eager").stdout
    assert len(alone) > 100
    started = run_llamac("generate", *STORY, "--tensor-parallel", "2")
    assert started.stdout == alone
    memory, speed = started.stderr.splitlines()
    assert memory.startswith("each of 2 ranks: weights 2.8 MiB, cache 640.0 KiB, RoPE")
    assert "from cache" not in speed
    launched = run_llamac("generate", *STORY, start=[*TORCHRUN, "2", "-m", "llamac.runtime.cli"])
    assert launched.stdout == alone
    assert "(from cache)" in launched.stderr


class Running:
    """A story without an end, told by two ranks."""

    def __init__(self, *words: str) -> None:
        self.leader = subprocess.Popen(
            [*LLAMAC, "generate", "--tensor-parallel", "2", "--backend", "eager", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.leader.stdout is not None
        self.follower_id = self._follower()

    def _follower(self) -> int:
        deadline_s = time.monotonic() + 60
        while not (found := followers_of(self.leader.pid)):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        return found[0]

    def told(self, num_chars: int) -> str:
        assert self.leader.stdout is not None
        return self.leader.stdout.read(num_chars)

    def end(self) -> tuple[int, list[str]]:
        """Exit code and what was said, once both are gone."""
        _, said = self.leader.communicate(timeout=60)
        deadline_s = time.monotonic() + 10
        while is_running(self.follower_id):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        return self.leader.returncode, said.splitlines()


def followers_of(process_id: int) -> list[int]:
    """The ranks that a process has started."""
    children = [
        int(word)
        for path in Path(f"/proc/{process_id}/task").glob("*/children")
        for word in path.read_text().split()
    ]
    return [n for n in children if b"distributed.follower" in command_of(n)]


def command_of(process_id: int) -> bytes:
    return Path(f"/proc/{process_id}/cmdline").read_bytes()


def is_running(process_id: int) -> bool:
    """Whether a process is there, and not only its entry until somebody asks for its code."""
    try:
        return " Z " not in Path(f"/proc/{process_id}/stat").read_text()
    except FileNotFoundError:
        return False


ENDLESS = ("-p", "One day", "--ignore-eos", "--limit", "roll", "--max-new-tokens", "8000")


@pytest.mark.slow
@pytest.mark.parametrize("begun", [0, 100])
def test_a_rank_that_is_killed_ends_the_other_with_a_line(begun: int):
    """At load, and in the middle of a text."""
    running = Running(*ENDLESS)
    assert len(running.told(begun)) == begun
    os.kill(running.follower_id, signal.SIGKILL)
    code, (*_, line) = running.end()
    assert code == 1
    assert line == "CRITICAL: rank 1 of 2 was killed by signal 9; the others end too"


@pytest.mark.slow
def test_a_rank_that_hangs_is_missed():
    running = Running(*ENDLESS)
    running.told(100)
    os.kill(running.follower_id, signal.SIGSTOP)
    code, (*_, line) = running.end()
    assert code == 1
    assert line == "CRITICAL: rank 1 of 2 has said nothing for 10 s; the others end too"


@pytest.mark.slow
def test_a_rank_that_is_stuck_is_an_error(tmp_path: Path):
    """It says that it lives, and takes no part."""
    stuck = {**case(tmp_path / "hf", "hf"), "stuck": True}
    (result,) = compare_cases(tmp_path, 2, [stuck])
    first, second = result["said"]
    assert first.startswith("another rank is gone: ")
    assert "Timed out" in first
    assert second == "a step was interrupted; the ranks can't go on together"


@pytest.mark.slow
def test_a_rank_that_can_not_load_says_why_through_the_first(tmp_path: Path):
    """The first one's half of the weight is whole."""
    folder = shutil.copytree(DEMO_FOLDER, tmp_path / "demo")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][-1, 3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    running = Running("--model", str(folder), "--dtype", "bfloat16", "-p", "One day")
    code, (_, line) = running.end()
    assert code == 1
    assert re.search(r"^CRITICAL: rank 1: .*1\.mlp\.up_proj\.weight holds nan.*; the others", line)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "begun"),
    [(signal.SIGKILL, 0), (signal.SIGKILL, 100), (signal.SIGINT, 100), (signal.SIGTERM, 0)],
)
def test_no_rank_outlives_the_first(number: signal.Signals, begun: int):
    running = Running(*ENDLESS)
    running.told(begun)
    running.leader.send_signal(number)
    code, said = running.end()
    assert code == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert not [line for line in said if "Error" in line]


@pytest.mark.slow
def test_a_server_of_ranks_answers_openais_client():
    """`serving` gives the engine one thread, and so each rank; an engine that dies is replaced."""
    body = {"prompt": "Once upon a time", "max_tokens": 30, "seed": 1}
    model = load(backend="eager", threads=1)
    alone = model.generate(body["prompt"], max_new_tokens=30, seed=1)[0].text
    with serving("--backend", "eager", "--tensor-parallel", "2", "--batch-size", "2") as server:
        client = OpenAI(
            base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0
        )
        with client:
            answer = client.completions.create(model="any", **body)
            assert answer.choices[0].text == alone
            (follower_id,) = followers_of(server.engine_id)
            os.kill(follower_id, signal.SIGKILL)
            server.until_status(503)
            server.until_status(200)
            answer = client.completions.create(model="any", **body)
            assert answer.choices[0].text == alone
    assert not is_running(follower_id)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tensor-parallel", "3"), "num_attention_heads is 8, which 3 ranks don't divide"),
        (("--tensor-parallel", "0"), "tensor_parallel is 0; it must be between 1 and"),
        (("--tensor-parallel", "two"), "--tensor-parallel: invalid int value: 'two'"),
        (
            ("--tensor-parallel", "2", "--quantize", "int8"),
            "o_proj: 128 columns in groups of 128 can't be divided by 2 ranks",
        ),
    ],
)
def test_what_ranks_can_not_hold_is_refused_before_any_starts(refused, words, message):
    refused(message, "generate", "-p", "One day", *words)


def test_a_bundle_runs_in_one_process(refused, tmp_path: Path):
    folder = export_tiny(tmp_path).folder
    refused("a bundle runs in one process", "chat", folder, "--tensor-parallel", "2")


@pytest.mark.parametrize(
    ("ranks", "words", "message"),
    [
        (("0", "2"), ("--tensor-parallel", "4"), "--tensor-parallel is 4, 2 ranks were started"),
        (("0", "3"), (), "num_attention_heads is 8, which 3 ranks don't divide"),
        (("a", "2"), (), "RANK is 'a' and WORLD_SIZE '2'; they must be numbers"),
    ],
)
def test_what_torchrun_started_is_checked(
    refused, monkeypatch: pytest.MonkeyPatch, ranks, words, message
):
    monkeypatch.setenv("RANK", ranks[0])
    monkeypatch.setenv("WORLD_SIZE", ranks[1])
    refused(message, "generate", "-p", "One day", *words)


def test_ranks_that_were_started_together_are_one_replica(refused, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("--replicas is 2; ranks that were started together", "serve", "--replicas", "2")
