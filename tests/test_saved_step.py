"""Compiled steps on disk: found by the next start, and never by another model's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llamac.model import TorchBackend
from variants import our_model

_START = """
import json, torch
from torch._dynamo.utils import counters
from llamac.model import *
torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
model = Llama(config, num_positions=64).requires_grad_(False)
for weight in model.parameters():
    torch.nn.init.normal_(weight)
backend = TorchBackend(model, max_seq_len=32, prefill_lens=(8,))
logits = backend.prefill(0, [1, 2, 3], 0).tolist()
traced = counters["stats"]["unique_graphs"]
print(json.dumps([backend.startup.cache_hit, traced, logits]))
"""


@pytest.mark.slow
def test_the_second_start_loads_from_the_disk_cache(tmp_path: Path):
    def start() -> tuple[bool, int, list[float]]:
        done = subprocess.run(
            [sys.executable, "-c", _START],
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout)

    hit, _, logits = start()
    assert not hit
    assert start() == [True, 0, logits]
    decode, prefill = sorted((tmp_path / ".cache/llamac/inductor").glob("*.step"))
    assert (decode.name.split("-")[0], prefill.name.split("-")[0]) == ("decode", "prefill_8")
    assert decode.parent.stat().st_mode & 0o777 == 0o700
    assert all(step.stat().st_mode & 0o077 == 0 for step in (decode, prefill))

    # A cut file and a whole one without its kernels: both are compiled again, then found again.
    decode.write_bytes(decode.read_bytes()[:1000])
    for kernel in decode.parent.glob("*/*.so"):
        kernel.unlink()
    assert start() == [False, 2, logits]
    assert start() == [True, 0, logits]


def test_a_saved_step_is_told_apart_by_what_its_code_depends_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/cache")
    model = our_model("llama-2-gqa")

    def paths(**options: object) -> list[Path]:
        sizes = {"max_seq_len": 16, "prefill_lens": (4,)} | options
        monkeypatch.setattr(TorchBackend, "_start", lambda *_: None)
        backend = TorchBackend(model, **sizes)  # type: ignore[arg-type]
        return [step._path() for step in (*backend._prefill.values(), backend._decode)]

    base = paths()
    assert base == paths()
    for other in (
        paths(max_seq_len=32),
        paths(prefill_lens=(8,)),
        paths(batch_size=2),
        paths(all_logits=True),
        paths(unroll_layers=True),
    ):
        assert not set(base) & set(other)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert not set(base) & set(paths())
