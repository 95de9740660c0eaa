"""`llamac bench` from end to end on a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_gguf
from safetensors.torch import load_file

from llamac.export.bundle import export_bundle
from llamac.model.checkpoint import open_checkpoint
from llamac.model.checkpoint.random_weights import write_random_checkpoint
from llamac.model.config import LlamaConfig, RopeScaling
from llamac.perf import bench, step_kernels
from llamac.perf.artifacts import build_artifact, find_model
from llamac.perf.limit_probe import ProbeSize
from llamac.perf.setup import Setup
from llamac.perf.stand_in_tokenizer import write_stand_in_tokenizer
from llamac.runtime.cache_folder import cache_folder
from llamac.runtime.cli import main
from llamac.runtime.text.tokenizer_files import load_tokenizer

CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
# Far too small for a limit; the model's weights are a few KiB, too.
PROBE_SIZE = ProbeSize(num_bytes=1 << 20, matrix_size=64)
SIZES = ["--max-seq-len", "32", "--prefill-len", "4", "--threads", "1"]


def write_model(folder: Path, seed: int = 0, config: LlamaConfig = CONFIG) -> Path:
    write_random_checkpoint(None, folder, config=config, dtype="float32", seed=seed)
    return folder


def read_run(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def rows_of(text: str, name: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(f"| {name} ")]


@pytest.mark.slow
def test_a_wrong_backend_fails_before_it_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bundle of other weights lies where the right one would be built."""
    # llama.cpp is skipped whether it is installed or not: it isn't compared on scaled RoPE.
    config = replace(CONFIG, rope_scaling=RopeScaling(rope_type="linear", factor=2.0))
    model = write_model(tmp_path / "model", config=config)
    other = write_model(tmp_path / "other", seed=1, config=config)
    setup = Setup(
        system="ort-cpu",
        model=str(model),
        dtype="float32",
        device="cpu",
        threads=1,
        batch_size=1,
        max_seq_len=32,
        prefill_len=4,
    )
    built, build_s = build_artifact(setup, cache_folder("bench"), tmp_path / "logs")
    assert built.artifact is not None
    assert build_s is not None
    assert build_artifact(setup, cache_folder("bench"), tmp_path / "logs") == (built, None)
    shutil.rmtree(built.artifact)
    export_bundle(
        open_checkpoint(other),
        Path(built.artifact),
        targets=("cpu",),
        batch_size=1,
        prefill_len=4,
        max_seq_len=32,
    )

    words = ["--model", str(model), *SIZES, "--prompt-len", "6", "--new-tokens", "4"]
    for system in ("eager", "ort-cpu", "llama.cpp"):
        words += ["--backend", system]
    assert bench.main([*words, "--json", str(tmp_path / "out")], probe_size=PROBE_SIZE) == 1

    eager, wrong, skipped = read_run(tmp_path / "out")["systems"]
    assert eager["status"] == "ok"
    assert len(eager["cases"][0]["prefill_s"]) == 5
    assert [len(times) for times in eager["cases"][0]["step_s"]] == [3] * 5
    assert len(eager["cases"][0]["sampled"]["trials"]) == 5
    assert eager["cases"][0]["limits"] == [1, 2, 3, 4, 5]  # 0 is the warm-up's
    assert len(eager["check"]["errors"]) == 2
    assert wrong["status"] == "FAIL"
    assert "wrong logits" in wrong["message"]
    assert "cases" not in wrong
    assert skipped["status"] == "skipped"
    assert list((tmp_path / "out").glob("*-speed.png"))
    output = capsys.readouterr()
    assert rows_of(output.out, "ort-cpu")[0].split("|")[2].strip() == "FAIL"
    assert "**ort-cpu: FAIL**: wrong logits" in output.out
    assert "ort-cpu: FAIL: wrong logits" in output.err


@pytest.mark.slow
def test_sweep_and_cold_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "model")
    write_stand_in_tokenizer(model, CONFIG.vocab_size)
    words = ["--model", str(model), *SIZES, "--backend", "ort-cpu"]
    words += ["--sweep", "32", "--cold-start", "3", "--json", str(tmp_path / "out")]
    assert bench.main(words, probe_size=PROBE_SIZE) == 0
    run = read_run(tmp_path / "out")
    assert run["systems"] == []
    (swept,) = run["sweeps"]["32"]
    assert [point["context"] for point in swept["sweep"]] == [24]
    assert [len(times) for times in swept["sweep"][0]["raw_step_s"]] == [8] * 5
    (cold,) = run["cold_start"]
    assert len(cold["starts"]) == 5
    for start in cold["starts"]:
        assert sum(start["phases"].values()) == pytest.approx(start["total_s"])
        assert min(start["phases"].values()) >= 0
    assert {"python_s", "import_s", "tokenizer_s", "load_s", "first_chunk_s"} < set(cold["phases"])
    charts = {path.name.rpartition("-")[2] for path in (tmp_path / "out").glob("*.png")}
    assert charts == {"sweep.png", "start.png"}
    assert "process start to first token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trials", "4"], "--trials is 4; it must be at least 5"),
        (["--prompt-len", "8", "0"], "--prompt-len is 0; it must be at least 1"),
        (["--sweep", "16"], "--sweep is 16; it must be at least 32"),
        (["--prompt-len", "30", "--new-tokens", "3", "--max-seq-len", "32"], "need 33 cache rows"),
        (["--max-seq-len", "32", "--prefill-len", "64", "--prompt-len", "1"], "prefill_len is 64"),
        (["--layers", "2"], "--layers is for `small` and the presets"),
        (["--backend", "none"], "invalid choice: 'none'"),
        (["--model", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_options_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if "--model" in words else ["--model", str(write_model(tmp_path / "model"))]
    try:
        code = main(["bench", *model, *words])
    except SystemExit as exit:  # argparse's own way out
        code = exit.code
    output = capsys.readouterr()
    assert code == 2
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert message in output.err


def test_help_is_the_benchmark_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["bench", "--help"])
    assert exit.value.code == 0
    assert "--cold-start" in capsys.readouterr().out


def run_gpu_script(
    *words: str, programs: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs perf/gpu.sh with a folder's programs before all others."""
    environment["PATH"] = f"{programs}:{os.environ['PATH']}"
    return subprocess.run(
        [Path(bench.__file__).with_name("gpu.sh"), *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def write_program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("answer", ["exit 9", "exit 0"])
def test_the_gpu_script_wants_a_gpu(answer: str, tmp_path: Path) -> None:
    write_program(tmp_path / "nvidia-smi", answer)
    done = run_gpu_script(programs=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "perf/gpu.sh: no NVIDIA GPU found: nvidia-smi lists none\n"


def test_stages_of_the_gpu_script_are_benchmarks(tmp_path: Path) -> None:
    listed = run_gpu_script("--list", programs=tmp_path).stdout.splitlines()
    stages = {line.split()[0]: line.split()[1:] for line in listed}
    assert {"tests", "8b-speed"} < set(stages)
    for name, words in stages.items():
        if name != "tests":
            parser = step_kernels._parser() if "--kernels" in words else bench.build_parser()
            assert parser.parse_args(words).model
    done = run_gpu_script("8b", programs=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "perf/gpu.sh: no stage 8b; perf/gpu.sh --list names them\n"


def test_the_gpu_script_runs_the_stages_asked_for(tmp_path: Path) -> None:
    write_program(tmp_path / "nvidia-smi", "echo 'GPU 0: none'")
    # The first two calls look for llamac and for a GPU.
    write_program(tmp_path / "python", 'case "$1" in -c) ;; *) echo "$@"; exit 3 ;; esac')
    asked = "8b-speed", "tests", "1b-kernels"
    done = run_gpu_script(*asked, programs=tmp_path, PYTHON=str(tmp_path / "python"), OUT="/out")
    assert done.returncode == 1
    gpu, *stages = done.stdout.splitlines()
    assert gpu == "GPU 0: none"
    assert stages[0] == "== 8b-speed"
    assert "--device cuda --dtype bfloat16 --json /out --model llama-3-8b" in stages[1]
    assert stages[2:4] == ["== tests", "-m pytest -m gpu tests"]
    assert stages[5].endswith("--device cuda --dtype bfloat16 --kernels --model tinyllama-1.1b")
    assert "perf/gpu.sh: tests ended with code 3" in done.stderr


def find(name: str | None, tmp_path: Path, **options: Any) -> tuple[Any, list[str]]:
    said: list[str] = []
    options = {"dtype": "bfloat16", "cache": tmp_path, "announce": said.append} | options
    return find_model(name, **options), said


def test_random_weights_are_written_once(tmp_path: Path) -> None:
    model, said = find("small", tmp_path, layers=1)
    assert (model.name, model.bundle, model.config.num_hidden_layers) == ("small", None, 1)
    assert model.config.dtype == "bfloat16"
    assert len(said) == 1
    tokenizer = load_tokenizer(model.folder)
    assert tokenizer.vocab_size == model.config.vocab_size
    assert tokenizer.decode(tokenizer.encode("naïve 你好\n")) == "naïve 你好\n"
    again, said = find("small", tmp_path, layers=1)
    assert again == model
    assert said == []
    other, said = find("small", tmp_path, layers=1, dtype="float32")
    assert other.folder != model.folder
    assert other.config.dtype == "float32"


def test_a_folder_may_be_a_bundle(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path / "model")
    export_bundle(
        open_checkpoint(checkpoint),
        tmp_path / "bundle",
        targets=("cpu",),
        batch_size=2,
        prefill_len=4,
        max_seq_len=32,
    )
    model, _ = find(str(checkpoint), tmp_path)
    assert model.bundle is None
    model, _ = find(str(tmp_path / "bundle"), tmp_path)
    assert model.bundle == tmp_path / "bundle"
    with pytest.raises(ValueError, match="batch size 2 and max_seq_len 32; --sweep"):
        bench.main(["--model", str(tmp_path / "bundle"), "--sweep", "32"])


@pytest.mark.slow
def test_a_gguf_file_is_measured_as_it_is(tmp_path: Path) -> None:
    config = replace(CONFIG, intermediate_size=64)
    weights = load_file(write_model(tmp_path / "model", config=config) / "model.safetensors")
    path = tmp_path / "model.gguf"
    write_gguf(path, config, weights, kinds=("Q8_0",))
    words = ["--model", str(path), *SIZES, "--prompt-len", "6", "--new-tokens", "4", "--no-charts"]
    for system in ("ort-cpu", "transformers", "genai"):
        words += ["--backend", system]
    assert bench.main([*words, "--json", str(tmp_path / "out")], probe_size=PROBE_SIZE) == 0
    ours, *peers = read_run(tmp_path / "out")["systems"]
    assert ours["status"] == "ok"
    assert 8 < ours["bits_per_weight"] < 10  # 8 and 16 of a scale for each 32, and the norms
    assert ours["facts"]["activations"] == "int8"
    assert [peer["status"] for peer in peers] == ["skipped"] * 2
