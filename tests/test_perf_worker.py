"""The processes that systems are measured in, and the order in which they are."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llamac.model.checkpoint.random_weights import write_random_checkpoint
from llamac.model.config import LlamaConfig
from llamac.perf.measure import sweep_contexts
from llamac.perf.plan import Entry, in_turn
from llamac.perf.process import Worker, WorkerError
from llamac.perf.setup import Setup
from llamac.runtime.backend import BackendUnavailableError


def make_setup(system: str, model: Path, device: str = "cpu") -> Setup:
    return Setup(
        system=system,
        model=str(model),
        dtype="float32",
        device=device,
        threads=1,
        batch_size=1,
        max_seq_len=16,
        prefill_len=4,
    )


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    with Worker("test", tmp_path / "logs", threads=1) as running:
        yield running


def test_memory_is_the_process_s_own(worker: Worker) -> None:
    memory = worker.call("memory")
    assert 10 << 20 < memory["anonymous_bytes"] <= memory["peak_rss_bytes"] < 200 << 20


def test_a_crash_is_reported_with_its_reason(worker: Worker, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"ended with code 1: KeyError: 'none such' \(see .*test"):
        worker.call("prepare", setup=make_setup("none such", tmp_path))
    assert "Traceback" in (tmp_path / "logs" / "test.log").read_text()


def test_a_crash_is_reported_by_the_exception_s_first_line(worker: Worker, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    with pytest.raises(WorkerError, match="FileNotFoundError: .*nowhere"):
        worker.call("prepare", setup=make_setup("eager", missing))


def test_a_killed_process_is_reported(worker: Worker) -> None:
    worker.call("memory")
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match="ended with code -9: no message"):
        worker.call("memory")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_what_cannot_run_here_is_refused_and_the_process_lives(
    worker: Worker, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=16,
    )
    write_random_checkpoint(None, folder, config=config, dtype="float32")
    with pytest.raises(BackendUnavailableError, match="no CUDA device"):
        worker.call("prepare", setup=make_setup("eager", folder, device="cuda"))
    ready = worker.call("prepare", setup=make_setup("eager", folder))
    assert ready["precision"] == "float32"
    first = worker.call("trial", prompt=[[1, 2, 3, 4, 5]], num_new=3)
    assert first["prefill_s"] > 0
    assert len(first["step_s"]) == 2


def test_cpu_time_of_an_idle_process_stands_still(worker: Worker) -> None:
    worker.call("memory")
    before = worker.cpu_s()
    time.sleep(0.2)
    assert 0 < before == worker.cpu_s()


def test_the_log_holds_the_latest_process(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with (
            Worker("test", tmp_path, threads=1) as running,
            pytest.raises(WorkerError, match=f"'{name}'"),
        ):
            running.call("prepare", setup=make_setup(name, tmp_path))
    assert "first" not in (tmp_path / "test.log").read_text()


def test_environment_and_threads_reach_the_process(tmp_path: Path) -> None:
    with Worker("test", tmp_path, threads=3, environment={"LLAMAC_TEST": "here"}) as running:
        running.call("memory")  # it has begun
        environment = Path(f"/proc/{running.pid}/environ").read_text().split("\0")
    assert "OMP_NUM_THREADS=3" in environment
    assert "LLAMAC_TEST=here" in environment


def make_entries(tmp_path: Path, *names: str) -> list[Entry]:
    return [
        Entry(setup=make_setup(name, tmp_path), result={"name": name, "status": "ok"})
        for name in names
    ]


def test_another_one_begins_each_trial(tmp_path: Path) -> None:
    entries = make_entries(tmp_path, "a", "b", "c")
    orders = [[entry.result["name"] for entry in in_turn(entries, trial)] for trial in range(4)]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]
    entries[1].stop("FAIL", "wrong")
    assert [entry.result["name"] for entry in in_turn(entries, 1)] == ["c", "a"]
    for entry in entries:
        entry.stop("skipped", "absent")
    assert in_turn(entries, 2) == []


@pytest.mark.parametrize(
    ("max_seq_len", "contexts"),
    [
        (32, [24]),
        (64, [16, 32, 56]),
        (512, [16, 64, 256, 504]),
        (2048, [16, 64, 256, 1024, 2040]),
        (8192, [16, 64, 256, 1024, 4096, 8184]),
    ],
)
def test_swept_lengths_leave_room_for_the_steps(max_seq_len: int, contexts: list[int]) -> None:
    assert sweep_contexts(max_seq_len) == contexts
