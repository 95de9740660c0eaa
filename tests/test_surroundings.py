"""Bundles where people have them: an empty home, a read-only folder, odd heads, forged sizes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llamac.export import export_bundle
from llamac.export.verify import verify_bundle
from llamac.model.checkpoint import open_checkpoint
from llamac.model.checkpoint.random_weights import write_random_checkpoint
from llamac.model.config import LlamaConfig
from llamac.model.load import DEMO_FOLDER
from llamac.runtime.backend import BackendUnavailableError
from llamac.runtime.bundle.manifest import Manifest
from llamac.runtime.bundle.opening import open_bundle
from llamac.runtime.ort.ort_backend import OrtBackend

TINY = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
SIZES = {"batch_size": 2, "prefill_len": 8, "max_seq_len": 32}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "bundle"
    return export_bundle(open_checkpoint(DEMO_FOLDER), out, prefill_len=16, max_seq_len=64).folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("tiny")
    write_random_checkpoint(None, folder / "checkpoint", config=TINY, dtype="float32")
    return export_bundle(open_checkpoint(folder / "checkpoint"), folder / "bundle", **SIZES)


def llamac(*words: str | Path, home: Path) -> subprocess.CompletedProcess[str]:
    """A process of its own, in a home of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "XDG_CACHE_HOME"}
    (home / "tmp").mkdir(exist_ok=True)
    environment |= {"HOME": str(home), "TMPDIR": str(home / "tmp")}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    return subprocess.run(
        [sys.executable, "-m", "llamac.runtime.cli", *map(str, words)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


@pytest.mark.slow
def test_a_home_gets_llamacs_own_cache_and_nothing_else(demo: Path, tmp_path: Path):
    """Importing onnxruntime used to leave a device id and a database of events there."""
    for words in (
        ("run", demo, "--prompt", "Once", "--max-new-tokens", "2"),
        ("verify", demo, "--provider", "cpu"),
        ("doctor",),
    ):
        done = llamac(*words, home=tmp_path)
        assert done.returncode == 0, done.stderr
        left = [path for path in tmp_path.rglob("*") if not path.is_dir()]
        assert [path for path in left if tmp_path / ".cache/llamac" not in path.parents] == []


@pytest.fixture
def read_only_demo(demo: Path, tmp_path: Path) -> Iterator[Path]:
    """On a disk of its own, which root can't write to either."""
    words = ["mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("no right to mount a disk")
    shutil.copytree(demo, tmp_path / "bundle", ignore=shutil.ignore_patterns("reports"))
    subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
    yield tmp_path / "bundle"
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.slow
def test_a_read_only_bundle_is_verified(read_only_demo: Path, run):
    """It used to print PASS and exit with 2."""
    code, out, err = run("verify", read_only_demo, "--provider", "cpu")
    assert (code, "PASS" in out, "report: " in err) == (0, True, False)
    reports = read_only_demo / "reports"
    assert f"no report is kept: {reports} can't be written (Read-only file system)" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 2), (2, 2, 6), (2, 1, 100)]
)
def test_every_head_size_runs_on_the_cpu(
    num_heads: int, num_kv_heads: int, head_dim: int, tmp_path: Path
):
    """GroupQueryAttention takes multiples of 8; the export said nothing, and running failed."""
    config = replace(
        TINY,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_size=num_heads * head_dim,
    )
    write_random_checkpoint(None, tmp_path / "checkpoint", config=config, dtype="float32")
    bundle = export_bundle(open_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle", **SIZES)
    assert "GroupQueryAttention" not in bundle.find_graph("decode", "cpu").ops
    result = verify_bundle(bundle, providers=("cpu",))
    assert result.passed


def forge(tiny: Manifest, folder: Path, **sizes: int) -> Path:
    """A bundle whose manifest agrees with its hashes but not with its graphs."""
    bundle = Path(shutil.copytree(tiny.folder, folder))
    forged = replace(tiny, model=replace(tiny.model, **sizes))
    (bundle / "bundle.json").write_text(forged.to_json())
    return bundle


@pytest.mark.parametrize(
    "sizes", [{"num_key_value_heads": 1}, {"num_hidden_layers": 1}, {"head_dim": 16}]
)
def test_sizes_that_the_graphs_do_not_have_end_in_one_line(
    tiny: Manifest, tmp_path: Path, sizes: dict[str, int]
):
    """ONNX Runtime's own exceptions used to come through."""
    bundle = forge(tiny, tmp_path / "forged", **sizes)
    with pytest.raises((BackendUnavailableError, ValueError)) as caught:
        OrtBackend(bundle).prefill(0, [1, 2], 0)
    assert "\n" not in str(caught.value)
    assert "cpu-prefill-8.onnx" in str(caught.value)


def test_a_size_of_zero_is_refused(tiny: Manifest, tmp_path: Path):
    bundle = forge(tiny, tmp_path / "forged", num_hidden_layers=0)
    with pytest.raises(ValueError, match="a size of the model is not positive; export again"):
        open_bundle(bundle)


def test_a_bundle_without_a_tokenizer_runs_once_one_is_copied_in(
    tiny: Manifest, tmp_path: Path, run, refused
):
    bundle = Path(shutil.copytree(tiny.folder, tmp_path / "bundle"))
    refused("no tokenizer in .*; copy", "run", bundle, "--prompt", "a", "--max-new-tokens", "1")
    logits = OrtBackend(bundle).decode(np.zeros(2, np.int64), np.zeros(2, np.int64))
    assert np.isfinite(logits).all()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        if (DEMO_FOLDER / name).exists():
            shutil.copy(DEMO_FOLDER / name, bundle)
    open_bundle(bundle)
