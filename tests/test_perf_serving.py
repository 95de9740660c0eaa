"""`llamac bench --serve` from end to end, on few tokens."""

from __future__ import annotations

import json
from pathlib import Path

from llamac.export import export_bundle
from llamac.model.checkpoint import open_checkpoint
from llamac.model.load import DEMO_FOLDER


def test_a_run_tells_tokens_and_delays(run, tmp_path: Path):
    bundle = export_bundle(open_checkpoint(DEMO_FOLDER), tmp_path / "demo", batch_size=2).folder
    words = ("--requests", "6", "--max-tokens", "5", "--concurrency", "1", "3")
    file = tmp_path / "runs" / "serve.json"
    code, out, _ = run("bench", "--serve", "--model", bundle, *words, "--json", file)
    assert code == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows[:3]] == ["in process", "1 clients", "3 clients"]
    assert rows[3]["name"].startswith("Poisson")
    for row in rows[1:]:
        assert (row["num_requests"], row["num_failed"]) == (6, 0)
        assert 0 < row["inter_token_s"]["p50"] <= row["inter_token_s"]["p99"]
        assert 0 < row["ttft_s"]["p50"] <= row["ttft_s"]["p99"]
        assert row["name"] in out


def test_what_it_refuses(refused):
    refused("--concurrency: invalid int", "bench", "--serve", "--concurrency", "many")
    refused("are above 0", "bench", "--serve", "--requests", "0")
