"""Verification: what it compares, what it finds, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig as ReferenceConfig
from transformers import LlamaForCausalLM

from llamac.export import export_bundle
from llamac.export.verification import Verification, format_verification, write_report
from llamac.export.verify import bundle_checkpoint, verify_bundle
from llamac.model.checkpoint import load_model, open_checkpoint
from llamac.model.load import DEMO_FOLDER
from llamac.runtime.backend import BackendUnavailableError
from llamac.runtime.bundle.manifest import Manifest
from llamac.runtime.bundle.opening import open_bundle
from llamac.runtime.cli import main
from llamac.runtime.ort.ort_backend import OrtBackend
from llamac.runtime.ort.providers import provider_problem
from llamac.runtime.text.tokenizer_files import load_tokenizer
from variants import VARIANTS

SIZES = {"batch_size": 3, "prefill_len": 8, "max_seq_len": 32}
VOCAB_SIZE = load_tokenizer(DEMO_FOLDER).vocab_size
GROUPS = ["text", "prefill", "chunk edges", "ragged rows", "last row", "roll"]


def save_model(folder: Path, dtype: torch.dtype = torch.float32, **config) -> LlamaForCausalLM:
    """One layer, with weights wide enough for distinct logits."""
    torch.manual_seed(0)
    chosen = {**VARIANTS["llama-3.1"], "num_hidden_layers": 1, **config}
    model = LlamaForCausalLM(ReferenceConfig(**chosen))
    for parameter in model.parameters():
        parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    model.to(dtype).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """All targets, in the checkpoint's float32, with the demo model's tokenizer."""
    folder = tmp_path_factory.mktemp("float32")
    save_model(folder / "checkpoint", vocab_size=VOCAB_SIZE)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(DEMO_FOLDER / name, folder / "checkpoint" / name)
    checkpoint = open_checkpoint(folder / "checkpoint")
    targets = ("cpu", "cuda", "tensorrt")
    return export_bundle(checkpoint, folder / "bundle", targets=targets, **SIZES)


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """From a 16-bit checkpoint: its own file, and one converted for cpu; no tokenizer."""
    folder = tmp_path_factory.mktemp("bfloat16")
    save_model(folder / "checkpoint", torch.bfloat16)
    checkpoint = open_checkpoint(folder / "checkpoint")
    return export_bundle(checkpoint, folder / "bundle", targets=("tensorrt", "cpu"), **SIZES)


@pytest.fixture(scope="module")
def narrowed(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """From float32 weights that can't be linked: two converted files, the narrow one first."""
    folder = tmp_path_factory.mktemp("narrowed")
    model = save_model(folder / "checkpoint")
    (folder / "checkpoint" / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "checkpoint" / "pytorch_model.bin")
    checkpoint = open_checkpoint(folder / "checkpoint")
    options = {"targets": ("tensorrt", "cpu"), "dtype": "bfloat16", **SIZES}
    return export_bundle(checkpoint, folder / "bundle", **options)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run_main(*argv: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()  # what transformers wrote
        code = main([str(word) for word in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_main


@pytest.fixture
def refused(run) -> Callable[..., None]:
    """Asserts one line on stderr, nothing on stdout, exit code 2."""

    def check(message: str, *argv: str | Path) -> None:
        code, out, err = run(*argv)
        assert re.search(message, err), err
        assert re.fullmatch(r"llamac: .+\n", err), err
        assert (code, out) == (2, "")

    return check


def on_cpu(manifest: Manifest, **options) -> Verification:
    return verify_bundle(manifest, providers=["cpu"], **{"targets": ["cpu"], **options})


def failing(result: Verification) -> list[str]:
    return [group.name for run in result.runs for group in run.groups if not group.passed]


# What passes


@pytest.mark.slow
def test_every_target_is_compared_on_every_group(float32: Manifest, run):
    code, out, err = run("verify", float32.folder, "--provider", "cpu")
    assert code == 0
    lines = out.splitlines()
    head, table, verdict = lines[0], lines[2:-1], lines[-1]
    assert re.search("eager in float32; text: 32 of [0-9]+ tokens of a short story", head)
    found = [re.split(r" {2,}", line)[:5] for line in table]
    assert found == [
        ["cpu", target, "float32", group, "ok"]
        for target in ("cpu", "cuda", "tensorrt")
        for group in GROUPS
    ]
    assert verdict == "PASS (relative error: float32 may have 0.001)"
    report = Path(re.fullmatch(r"report: (.+)\n", err)[1])
    assert report.parent == float32.folder / "reports"
    stored = json.loads(report.read_text())
    assert (stored["passed"], stored["digest"]) == (True, float32.digest)
    for result in stored["runs"]:
        for group in result["groups"]:
            assert 0 < group["comparison"]["relative_error"] < 1e-5
            assert group["comparison"]["top1_agreement"] == 1
            assert group["divergence"] is None
            assert (group["perplexity"] is not None) == (group["name"] == "text")
    open_bundle(float32.folder, check=True)  # a report is not a change


def test_json_is_the_report(float32: Manifest, run):
    code, out, err = run("verify", float32.folder, "--provider", "cpu", "--json", "--target", "cpu")
    assert code == 0
    report = Path(err.removeprefix("report: ").strip())
    assert json.loads(out) == json.loads(report.read_text())


def test_perplexity_of_a_text_is_transformers_own(float32: Manifest, tmp_path: Path, run):
    text = "The lily was red. Tom went home with his dog, and they played with the ball. " * 3
    (tmp_path / "text.txt").write_text(text)
    words = ("--text-file", tmp_path / "text.txt", "--provider", "cpu", "--target", "cpu", "--json")
    code, out, _ = run("verify", float32.folder, *words)
    assert code == 0
    result = json.loads(out)
    ids = load_tokenizer(DEMO_FOLDER).encode(text)
    assert result["num_given_tokens"] == len(ids) > 32
    assert result["num_text_tokens"] == 32
    assert result["text"] == "the text given"
    reference = LlamaForCausalLM.from_pretrained(float32.folder.parent / "checkpoint")
    fed = torch.tensor([ids[:32]])
    with torch.no_grad():
        expected = float(reference(fed, labels=fed).loss.exp())
    (group,) = (g for g in result["runs"][0]["groups"] if g["name"] == "text")
    assert group["reference_perplexity"] == pytest.approx(expected, rel=1e-4)
    assert group["perplexity"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_float16_graphs_have_float16_tolerance(tmp_path: Path):
    save_model(tmp_path / "checkpoint", torch.float16)
    checkpoint = open_checkpoint(tmp_path / "checkpoint")
    manifest = export_bundle(checkpoint, tmp_path / "bundle", targets=("tensorrt",), **SIZES)
    result = on_cpu(manifest, targets=["tensorrt"])
    assert result.passed
    (found,) = result.runs
    assert (found.dtype, found.tolerance) == ("float16", 1e-2)
    errors = [g.comparison.relative_error for g in found.groups if g.comparison]
    assert 1e-5 < max(errors) < 1e-2


# The reference


def test_the_bundle_brings_its_own_reference(bfloat16: Manifest):
    assert {"model.safetensors", "model-float32.safetensors"} < bfloat16.files.keys()
    checkpoint = bundle_checkpoint(bfloat16)
    assert {stored.dtype for stored in checkpoint.tensors.values()} == {"float32"}
    linked = load_model(open_checkpoint(bfloat16.folder.parent / "checkpoint"), num_positions=32)
    for name, weight in load_model(checkpoint, num_positions=32).state_dict().items():
        assert torch.equal(weight, linked.state_dict()[name]), name
    assert on_cpu(bfloat16).passed


@pytest.mark.slow
def test_the_exact_weights_are_the_reference_where_there_are_narrower_ones(narrowed: Manifest):
    """The folder's model.safetensors is the bfloat16 copy; cpu graphs would fail against it."""
    assert open_checkpoint(narrowed.folder).tensors["model.norm.weight"].dtype == "bfloat16"
    assert on_cpu(narrowed).passed
    assert on_cpu(narrowed, against=str(narrowed.folder.parent / "checkpoint")).passed
    result = on_cpu(narrowed, against=str(narrowed.folder))
    assert not result.passed


def test_another_checkpoint_fails(float32: Manifest, tmp_path: Path, run):
    model = save_model(tmp_path / "other", vocab_size=VOCAB_SIZE)
    model.model.layers[0].mlp.up_proj.weight.data[3] *= 1.5
    model.save_pretrained(tmp_path / "other")
    words = ("--against", tmp_path / "other", "--provider", "cpu", "--target", "cpu")
    code, out, err = run("verify", float32.folder, *words)
    assert code == 1
    assert out.splitlines()[-1].startswith("FAIL: 6 failed")
    assert len(re.findall(" FAIL ", out)) == 6
    assert re.search("slot [012], position [0-9]+", out)
    assert json.loads(Path(err.removeprefix("report: ").strip()).read_text())["passed"] is False


def test_checkpoints_of_other_sizes_are_refused(float32: Manifest, tmp_path: Path, refused):
    save_model(tmp_path / "other", vocab_size=VOCAB_SIZE)
    path = tmp_path / "other" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "max_position_embeddings": 48}))
    words = ("verify", float32.folder, "--against")
    refused("max_position_embeddings is 48, the bundle has 128 RoPE rows", *words, path.parent)
    refused("hidden_size is 128, the bundle's 32; name the checkpoint", *words, DEMO_FOLDER)
    refused("no such file or folder", *words, tmp_path / "none")


# What is found: each group fails for the fault it is there for


def fail_with(monkeypatch, manifest: Manifest, method: str, fault) -> list[str]:
    original = getattr(OrtBackend, method)
    monkeypatch.setattr(OrtBackend, method, lambda self, *args: fault(self, original, *args))
    return failing(on_cpu(manifest))


def test_a_later_chunk_at_the_wrong_position_is_found(float32: Manifest, monkeypatch):
    def fault(self, prefill, slot, ids, start):
        return prefill(self, slot, ids, max(start - 1, 0))

    found = fail_with(monkeypatch, float32, "prefill", fault)
    assert found == ["chunk edges", "ragged rows", "last row", "roll"]


def test_a_prompt_in_the_wrong_slot_is_found(float32: Manifest, monkeypatch):
    def fault(self, prefill, slot, ids, start):
        return prefill(self, 0, ids, start)

    assert fail_with(monkeypatch, float32, "prefill", fault) == ["ragged rows", "last row", "roll"]


def test_one_position_for_all_rows_is_found(float32: Manifest, monkeypatch):
    def fault(self, decode, ids, positions):
        return decode(self, ids, np.full_like(positions, positions.max()))

    found = fail_with(monkeypatch, float32, "decode", fault)
    assert found == ["ragged rows", "last row", "roll"]


def test_a_token_lost_at_the_last_row_is_found(float32: Manifest, monkeypatch):
    """As a cache that is one row short would."""

    def fault(self, decode, ids, positions):
        return decode(self, ids, np.where(positions == 31, 30, positions))

    assert fail_with(monkeypatch, float32, "decode", fault) == ["text", "last row", "roll"]


def test_a_window_that_does_not_roll_is_found(float32: Manifest, monkeypatch):
    def fault(self, roll, positions):
        return np.minimum(positions, 31)

    assert fail_with(monkeypatch, float32, "_roll", fault) == ["roll"]


def test_numbers_that_are_not_finite_fail_and_stay_json(float32: Manifest, monkeypatch):
    original = OrtBackend.decode

    def fault(self, ids, positions):
        logits = original(self, ids, positions).copy()
        logits[0, 5] = np.nan
        return logits

    monkeypatch.setattr(OrtBackend, "decode", fault)
    result = on_cpu(float32)
    assert failing(result) == ["text", "ragged rows", "last row", "roll"]
    assert " nan " in format_verification(result)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = write_report(result, float32.folder).read_text()
    groups = json.loads(text, parse_constant=refuse)["runs"][0]["groups"]
    assert groups[0]["comparison"]["max_abs_error"] is None


# What is left out, and what is refused


def test_what_cannot_run_is_left_out_and_said(bfloat16: Manifest, run):
    code, out, _ = run("verify", bfloat16.folder, "--provider", "cpu")
    assert code == 0
    assert "text: 32 of 64 tokens of drawn ids" in out
    (line,) = [line for line in out.splitlines() if "left out" in line]
    assert re.match(r"cpu +tensorrt +left out: the graphs of tensorrt are bfloat16, which", line)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_here(provider: str, float32: Manifest, run, refused):
    problem = provider_problem(provider)
    if problem is None:
        pytest.skip(f"{provider} runs here")
    _, out, _ = run("verify", float32.folder, "--target", "cuda", "--target", "cpu")
    assert re.search(rf"\n{provider} +all +left out: {re.escape(problem)}\n", out)
    line = f"--provider {provider}: {re.escape(problem)}"
    refused(line, "verify", float32.folder, "--provider", provider)
    refused(line, "verify", float32.folder, "--provider", "cpu", "--provider", provider)
    refused(line, "run", float32.folder, "--provider", provider, "--prompt", "Once")


def test_what_was_asked_for_and_cannot_run_is_refused(bfloat16: Manifest, refused):
    words = ("verify", bfloat16.folder, "--provider", "cpu", "--target", "tensorrt")
    refused("graphs of tensorrt are bfloat16, which onnxruntime's CPU provider", *words)
    refused("graphs of tensorrt are bfloat16", *words, "--target", "cpu")
    refused("no decode graph for target 'cuda'; .* --target cuda", *words[:2], "--target", "cuda")
    only_tensorrt = replace(
        bfloat16, graphs=tuple(g for g in bfloat16.graphs if g.target == "tensorrt")
    )
    if provider_problem("tensorrt") and provider_problem("cuda"):
        with pytest.raises(BackendUnavailableError, match="no graph of .* runs here: the graphs"):
            verify_bundle(only_tensorrt)


def test_bad_texts_are_refused(bfloat16: Manifest, tmp_path: Path, refused):
    text = tmp_path / "text.txt"
    text.write_text("A text for a bundle without a tokenizer")
    words = ("verify", bfloat16.folder, "--provider", "cpu", "--text-file")
    refused("no tokenizer in", *words, text)
    refused("no such file", *words, tmp_path / "none.txt")
    text.write_text("")
    refused("empty; write a text into it", *words, text)


def test_damaged_bundles_are_refused(float32: Manifest, tmp_path: Path, refused):
    damaged = shutil.copytree(float32.folder, tmp_path / "damaged")
    path = damaged / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    path.write_bytes(data)
    refused("model.safetensors: was changed", "verify", damaged, "--check")
