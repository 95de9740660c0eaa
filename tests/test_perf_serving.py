"""`llamac bench --serve` from end to end, on few tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llamac.export import export_bundle
from llamac.model.checkpoint import open_checkpoint
from llamac.model.load import DEMO_FOLDER
from llamac.perf.servers import PEER_SERVERS, peer_server
from llamac.runtime.backend import BackendUnavailableError


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("serving") / "demo"
    return export_bundle(open_checkpoint(DEMO_FOLDER), out, batch_size=2).folder


def test_a_run_tells_tokens_and_delays(run, bundle: Path, tmp_path: Path):
    words = ("--requests", "6", "--max-tokens", "5", "--concurrency", "1", "3")
    file = tmp_path / "runs" / "serve.json"
    code, out, _ = run("bench", "--serve", "--model", bundle, *words, "--json", file)
    assert code == 0
    rows = json.loads(file.read_text())["rows"]
    names = ["in process", "in process, JSON", "1 clients", "3 clients"]
    assert [row["name"] for row in rows[:4]] == names
    assert rows[4]["name"].startswith("Poisson")
    assert file.with_suffix(".png").exists()
    for row in rows[2:]:
        assert (row["num_requests"], row["num_failed"]) == (6, 0)
        assert 0 < row["inter_token_s"]["p50"] <= row["inter_token_s"]["p99"]
        assert 0 < row["ttft_s"]["p50"] <= row["ttft_s"]["p99"]
        assert row["name"] in out


@pytest.mark.parametrize("name", PEER_SERVERS)
def test_a_peer_that_is_not_there_says_what_installs_it(name: str):
    if PEER_SERVERS[name].is_there():
        pytest.skip(f"{name} is installed")
    with pytest.raises(BackendUnavailableError, match="pip (install|download)"):
        with peer_server(name, "model", threads=1, batch_size=1):
            pass


@pytest.mark.slow
def test_a_soak_counts_every_stream(run, bundle: Path):
    code, out, _ = run("bench", "--serve", "--model", bundle, "--soak", "0.1")
    soak = json.loads(out)
    assert (code, soak["problems"], soak["in_flight"]) == (0, [], 0)
    assert soak["counts"].keys() == {"whole", "left"}  # no engine is killed in 6 s
    assert soak["memory"][0]["engine"] > 0


def test_what_it_refuses(refused):
    refused("llamas is not NAME=SOURCE", "bench", "--serve", "--peer", "llamas")
    refused("--concurrency: invalid int", "bench", "--serve", "--concurrency", "many")
    refused("are above 0", "bench", "--serve", "--requests", "0")
